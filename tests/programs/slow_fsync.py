"""train.py on a disk whose fsync takes four seconds."""

import time

from run_train import run_train

from keepgpt import checkpoint

fsync = checkpoint.Disk.fsync


def fsync_slowly(disk, file):
    time.sleep(4)
    fsync(disk, file)


checkpoint.Disk.fsync = fsync_slowly
run_train()
