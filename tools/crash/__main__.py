"""The proving machine: can anything take a run away? Run it as `python -m tools.crash [PART ...]`.

    kill     kill -9 at random instants of real runs; each must end in an undisturbed one's bits
    nth      each file operation of a save fails, or the process dies in it
    power    the states of the disk that a power cut during a save may leave
    rot      flipped bits, zeroed pages and cuts in the newest bundle
    full     no room for a bundle, whatever part of it would still have fitted
    elastic  kill -9 of a run that comes back on another number of ranks
    prepare  a preparation dies before each of its file operations, and again in the next one
    hosts    two hosts without a common disk: one is killed, comes back, is cut off (needs root)

Without a part, all but hosts in small numbers. A line each; exit code 1 if anything failed.
Linux only.
"""
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from keepgpt.config import parse
from keepgpt.process import fail
from tools.crash.common import CrashConfig, Part
from tools.crash.full import full
from tools.crash.hosts import hosts
from tools.crash.kill import elastic, kill
from tools.crash.nth import nth
from tools.crash.power import power
from tools.crash.prepare import prepare
from tools.crash.rot import rot

PARTS = {"kill": kill, "nth": nth, "power": power, "rot": rot, "full": full, "prepare": prepare,
         "elastic": elastic, "hosts": hosts}


def main(settings: CrashConfig, words: list[str]) -> int:
    """Try the parts that are named, or all; the exit code."""
    if unknown := [word for word in words if word not in PARTS]:
        fail(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # a process with one thread may be forked
    failed = 0
    for name in words or [name for name in PARTS if name != "hosts"]:
        place = Path(tempfile.mkdtemp(prefix="keepgpt-crash-", dir=settings.folder or None))
        if PARTS[name](Part(name, settings), place):
            failed = 1
            print(f"{name}: what it has left is in {place}")
        else:
            shutil.rmtree(place)
    return failed


if __name__ == "__main__":
    USAGE = f"python -m tools.crash [{' | '.join(PARTS)} ...] [--key=value ...]"
    CONFIG, _, WORDS = parse(CrashConfig, USAGE, sys.argv[1:])
    sys.exit(main(CONFIG, WORDS))
