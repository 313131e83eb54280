"""A config file whose values are scalars of NumPy and PyTorch, and a path."""
# ruff: noqa: F821

from pathlib import Path

learning_rate = np.float32(0.5)
n_layer = np.int64(3)
bias = np.bool_(True)
max_iters = torch.tensor(7)
min_lr = np.logspace(-4, -3, 2)[0]
out_dir = Path("a") / "b"
