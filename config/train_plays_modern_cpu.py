# The modern recipe on a laptop without a GPU: Qwen3's block, Muon and a linear schedule.
# python prepare.py plays_char && python train.py config/train_plays_modern_cpu.py
out_dir = "out-plays-modern-cpu"
dataset = "plays_char"

eval_interval = 950
# all of tinyshakespeare's validation text, with --dataset=shakespeare_char
eval_iters = 49
checkpoint_interval = 200  # a pulled plug costs twelve seconds of work at most
log_interval = 10
sample_tokens = 200  # a glimpse of its text at each evaluation

# 12 sequences of 192 characters a step, 2,304 tokens
gradient_accumulation_steps = 1  # two processes: 2, and batch_size 6
batch_size = 12
block_size = 192

# 0.87 million parameters
architecture = "qwen3"
n_layer = 4
n_head = 4  # 32 wide: a loss 0.02 lower than 2 heads of 64
n_embd = 128
tie_embeddings = False  # 0.01 lower
dropout = 0.0

max_iters = 1900
lr_decay_iters = 1900
optimizer = "muon"
muon_lr = 0.008  # 0.007 to 0.015 differ by less than one run from another
learning_rate = 4e-3  # of the embedding, the output layer and the norms
lr_schedule = "linear"
decay_fraction = 0.65
min_lr = 0.0  # 0.007 lower than with a floor of 5%
beta2 = 0.99  # few tokens a step: average the squares for longer
warmup_iters = 50
