# The modern GPT-2 124M: Qwen3's block, Muon and a linear schedule on FineWeb-Edu.
# python prepare.py fineweb-edu
# torchrun --standalone --nproc_per_node=8 train.py config/train_fineweb.py
#
# No GPU has measured this file. Its numbers follow from public logs of the same class of model on
# FineWeb (modded-nanogpt's records): to a validation loss of about 3.28, GPT-2 with
# AdamW takes 10.3 billion tokens (llm.c), with Muon and a modern block 2.7 billion.
out_dir = "out-fineweb"
dataset = "fineweb-edu"

# 16 sequences of 1024 tokens, 4 micro-batches on each of 8 GPUs: 524,288 tokens a step, as there
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 4 * 8  # on one GPU of 80 GB: batch_size 64, and 8

# 85 million parameters in the blocks, 39 million each in the embedding and the output layer
architecture = "qwen3"
n_layer = 12
n_embd = 768
n_head = 6  # 128 wide, as in every released Qwen3
tie_embeddings = False

# 5,100 steps x 524,288 tokens = 2.7 billion tokens. A token costs 6 x 124 million FLOPs and 0.11
# billion for attention: 2.3e18 in all, 12 minutes on eight H100 at 40% of their peak
max_iters = 5100
lr_decay_iters = 5100

optimizer = "muon"
# The rates are others' best, of public runs, not ours. Steps of one
# fixed model to a loss of 3.28 with Muon's rate / decay: 0.02 / 0.01 3,600; 0.025 / 0.025 3,375;
# 0.035 / 0.025 3,325; with AdamW's rates tuned as well 3,250.
muon_lr = 0.035
# of embedding, output layer and norms: the best for AdamW alone there
learning_rate = 1.8e-3
lr_schedule = "linear"
decay_fraction = 0.65  # there 0.65 to 0.7, down to between 0 and 5%
min_lr = 0.0
warmup_iters = 100
# Muon's rate is high: 0.1, as for AdamW, would forget within 300 steps
weight_decay = 0.025

eval_interval = 250
eval_iters = 640  # 10.5 million tokens with batch_size 16
log_interval = 10
