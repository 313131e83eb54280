# The same for a laptop without a GPU: a smaller GPT that learns to write plays in about three minutes.
# python prepare.py shakespeare_char && python train.py config/train_shakespeare_char_cpu.py
out_dir = "out-shakespeare-char-cpu"
dataset = "shakespeare_char"

eval_interval = 500
eval_iters = 40
log_interval = 10
sample_tokens = 160  # a glimpse of its text at each evaluation

# two micro-batches, so that two processes can share a step
gradient_accumulation_steps = 2
batch_size = 16
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # it sees each letter too few times to overfit

learning_rate = 4e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 4e-4
beta2 = 0.99
warmup_iters = 100
