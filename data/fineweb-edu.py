# FineWeb-Edu's sample of 10 billion tokens, 28.5 GB, in GPT-2's tokens
# pip install pyarrow huggingface_hub
hub = "HuggingFaceFW/fineweb-edu"
revision = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
train_files = "sample/10BT/*.parquet"
file_count = 14

tokenizer = "gpt2"
val_fraction = 0.0005  # every 2,000th document
