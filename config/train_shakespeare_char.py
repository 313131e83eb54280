# A GPT that fits a single GPU in minutes: Shakespeare, letter by letter.
# python prepare.py shakespeare_char && python train.py config/train_shakespeare_char.py
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

eval_interval = 250  # it overfits in the end, so look often; best.pt keeps the best
eval_iters = 200
log_interval = 10

# 64 sequences of 256 characters a step
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models bear high rates
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens a step: average the squares for longer
warmup_iters = 100

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"
