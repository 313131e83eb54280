"""A package `wandb` that writes its rows to the file $SENT. $INIT, $LOG and $FINISH name what else
its functions do, a function of this file each; $FIRST_STEP is the step that its run starts at."""

import json
import os
import threading


def nothing(mode):
    """Work without a fault."""


def hang(mode):
    threading.Event().wait()


def mark_and_hang(mode):
    """Make the file $SENT.end, then hang."""
    open(os.environ["SENT"] + ".end", "w").close()
    hang(mode)


def print_and_hang(mode):
    print("starting", flush=True)
    hang(mode)


def exit_with_1(mode):
    """End as a command-line program does, with an error that is not an Exception."""
    raise SystemExit(1)


def lack_a_key(mode):
    raise RuntimeError("no key")


def lack_a_network(mode):
    if mode != "offline":
        raise RuntimeError("no route to host")


def limit_the_end(mode):
    """Let keepGPT wait for one second at its end instead of ten."""
    from keepgpt import metrics

    metrics.CLOSE_SECONDS = 1


def misbehave(part, mode=""):
    globals()[os.environ[part]](mode)


class Run:
    id = "fake"
    dir = "wandb/run-1/files"
    summary = {}
    starting_step = int(os.environ["FIRST_STEP"])

    def log(self, row, step):
        misbehave("LOG")
        with open(os.environ["SENT"], "a") as file:
            print(json.dumps(row), file=file)

    def finish(self):
        misbehave("FINISH")


class Settings:
    def __init__(self, **_):
        pass


def init(mode=None, **_):
    misbehave("INIT", mode)
    return Run()
