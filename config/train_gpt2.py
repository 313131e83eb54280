# GPT-2 124M on OpenWebText, for one node of 8 A100 40GB or better:
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
dataset = "openwebtext"

# 12 sequences of 1024 tokens, 5 micro-batches on each of 8 GPUs: 491,520 tokens a step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens in all
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10

wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M"
