"""A config file that reads the defaults, which it does not define."""
# ruff: noqa: F821

n_layer = n_layer * 2
n_layer += 1
lr_decay_iters = max_iters


def wide():
    return n_embd


n_head = wide()
