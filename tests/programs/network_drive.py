"""train.py on a drive that fails fsyncs of folders, locks and links with the error $NUMBER."""

import errno
import fcntl
import os
import stat

from run_train import run_train

number = getattr(errno, os.environ["NUMBER"])
fsync = os.fsync


def fail(*_args):
    raise OSError(number, os.strerror(number))


def fsync_files(file):
    if stat.S_ISDIR(os.fstat(file).st_mode):
        fail()
    fsync(file)


os.fsync = fsync_files
fcntl.flock = fail
os.link = fail
run_train()
