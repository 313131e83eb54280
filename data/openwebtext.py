# OpenWebText, 8 million web pages, in GPT-2's tokens (nanoGPT's GPT-2)
# pip install pyarrow huggingface_hub
hub = "Skylion007/openwebtext"
revision = "79d93d786212f7344586290adb811d4ae6a1762c"
train_files = "plain_text/train-*.parquet"
file_count = 80

tokenizer = "gpt2"
val_fraction = 0.0005  # every 2,000th document
