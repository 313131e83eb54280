"""train.py on a disk whose fsync takes two seconds."""

import time

from run_train import run_train

from keepgpt import checkpoint

fsync = checkpoint.Disk.fsync


def fsync_slowly(_disk, file):
    time.sleep(2)
    fsync(file)


checkpoint.Disk.fsync = fsync_slowly
run_train()
