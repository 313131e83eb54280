"""A config file that imports, defines and computes."""

import os.path as p
import time
from math import sqrt

_tokens = 2**10


def half(x):
    return x // 2


class Sizes:
    wide = 64


block_size = half(_tokens)
n_embd = Sizes.wide
learning_rate = sqrt(1e-6)
wandb_run_name = "ft-" + str(time.time())
out_dir = p.join("a", "b")
min_lr = min(learning_rate, 1) / 10
max_iters = sum(i for i in [1, 2] if half(i) < block_size)
