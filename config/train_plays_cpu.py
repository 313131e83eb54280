# For a laptop without a GPU: a small GPT that learns to write plays, letter by letter, in minutes.
# python prepare.py plays_char && python train.py config/train_plays_cpu.py
out_dir = "out-plays-cpu"
dataset = "plays_char"

eval_interval = 400
eval_iters = 40
checkpoint_interval = 100  # a pulled plug costs four seconds of work at most
log_interval = 10
sample_tokens = 200  # a glimpse of its text at each evaluation

# 12 sequences of 128 characters a step, 1,536 tokens
gradient_accumulation_steps = 1  # two processes: 2, and batch_size 6
batch_size = 12
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # it reads the text about once: too little to overfit

learning_rate = 4e-3  # small models bear high rates
max_iters = 2800
lr_decay_iters = 2800
min_lr = 2e-4
beta2 = 0.99  # few tokens a step: average the squares for longer
warmup_iters = 100
