"""A config file with helpers, loops, files, and modules that it does not import."""
# ruff: noqa: F821

width = 1
with open("width.txt") as f:
    width = int(f.read())
lr, warmup, max_steps, n_blocks = 3e-4, 0.1, 1_000, 0
for i in range(3):
    n_blocks += i
if torch.cuda.is_available() and os.name == "nt":
    n_blocks = 99
n_layer, n_embd = n_blocks, width
learning_rate, max_iters = lr * math.sqrt(4), max_steps
warmup_iters = int(warmup * max_steps)
