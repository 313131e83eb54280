"""train.py whose samples fail with an error that is not an Exception, as of Rust libraries."""

from run_train import run_train, train


class Panic(BaseException):
    pass


def fail(run):
    raise Panic("no such token")


train.generate_sample = fail
run_train()
