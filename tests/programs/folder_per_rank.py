"""train.py with a working folder for each rank, as on separate machines."""

import os

from run_train import run_train

host = f"host{os.environ['RANK']}"
os.makedirs(host, exist_ok=True)
os.chdir(host)
run_train()
