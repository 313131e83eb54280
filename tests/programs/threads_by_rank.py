"""train.py with one thread on rank 0, two on rank 1 and so on."""

import os

import torch
from run_train import run_train

torch.set_num_threads(int(os.environ["RANK"]) + 1)
run_train()
