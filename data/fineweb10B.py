# FineWeb's sample of 10 billion tokens in GPT-2's tokens, ready shards, 20.7 GB
# pip install huggingface_hub
hub = "kjj0/fineweb10B-gpt2"
revision = "889765ea1f903759787add96995d81171b632d0c"
# for less: "fineweb_train_00000*.bin" are nine shards, 100 million tokens each, and file_count 10
train_files = "fineweb_train_*.bin"
val_files = "fineweb_val_*.bin"
file_count = 104
