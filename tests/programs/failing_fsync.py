"""train.py whose first $FAILURES fsyncs of the checkpoint of step 2 fail."""

import errno
import os

from run_train import run_train

from keepgpt import checkpoint

failures = int(os.environ["FAILURES"])


class FailingDisk(checkpoint.Disk):
    def fsync(self, file):
        global failures
        path = os.readlink(f"/proc/self/fd/{file}")
        if failures and "ckpt-00000002" in path:
            failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        super().fsync(file)


checkpoint.Disk = FailingDisk
run_train()
