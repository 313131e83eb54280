# TinyStories, 2 million short stories in simple English, in GPT-2's tokens
# pip install pyarrow huggingface_hub
hub = "roneneldan/TinyStories"
revision = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
train_files = "data/train-*.parquet"
val_files = "data/validation-*.parquet"
file_count = 5

tokenizer = "gpt2"
val_fraction = 0.0  # of the training files: validation has its own
