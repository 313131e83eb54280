"""train.py that prints at its end whether PyTorch's compiler was imported."""

import atexit
import sys

from run_train import run_train

atexit.register(lambda: print("torch._dynamo" in sys.modules))
run_train()
