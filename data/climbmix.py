# ClimbMix, web text grouped by topic and mixed, its first 100 of 6,543 shards, in GPT-2's tokens
# pip install pyarrow huggingface_hub
hub = "karpathy/climbmix-400b-shuffle"
revision = "915333b4f8b8684f39aeaafea600fea6f43fb703"
train_files = "shard_000*.parquet"
val_files = "shard_06542.parquet"
file_count = 101

tokenizer = "gpt2"
val_fraction = 0.0  # of the training files: the last shard is for validation
