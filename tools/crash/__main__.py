"""Try to make a training run lose something: `python -m tools.crash [PART ...] [--key=value ...]`.

    kill     kill -9 at random instants of real runs; each must end bit-identical
    nth      each file operation of a save fails
    power    the states of the disk that a power cut or a kill during a save may leave
    rot      flipped bits, zeroed pages and cuts in the newest checkpoint
    full     no room for a checkpoint, whatever part of it would still fit
    elastic  kill -9 of a run that comes back on another number of ranks
    skip     kill -9 of runs that skip batches which give NaN, elastic or with DDP
    prepare  prepare.py dies before each of its file operations, and again in the next attempt
    hosts    two hosts without a common disk: one is killed, comes back, is cut off
    checks   is a killed run bit-identical on --device? tools.gpu runs the same checks

Without a part, all but hosts and checks in small numbers. The exit code is 1 if anything failed.
Files are in the temporary folder: TMPDIR=/mnt/x tests another file system. Linux only.
"""

import os
import shutil
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from keepgpt.errors import UserError
from tools.common import run_tool
from tools.crash.checks import checks
from tools.crash.common import CrashConfig, Part
from tools.crash.jobs import elastic, full, hosts, kill, skip
from tools.crash.power import power
from tools.crash.prepare import prepare
from tools.crash.saves import nth, rot

# the parts that a call without arguments runs: seconds or a few minutes each
QUICK = {
    "kill": kill,
    "nth": nth,
    "power": power,
    "rot": rot,
    "full": full,
    "elastic": elastic,
    "skip": skip,
    "prepare": prepare,
}
# hosts takes minutes, and checks wait for compilers
PARTS = QUICK | {"hosts": hosts, "checks": checks}


def run_part(name: str, config: CrashConfig) -> int:
    """Run one part and print its counts. Return its failures; their files are kept."""
    # not a context manager: the files of a failure stay
    place = Path(tempfile.mkdtemp(prefix="keepgpt-crash-"))
    part = Part(name, config)
    tried = PARTS[name](part, place)
    # one line for each part, with what repeats it
    seconds = perf_counter() - part.started
    print(
        f"{name:7} {part.cases:6,} {tried}: {part.failures} failures, {seconds:.0f} s, "
        f"seed {config.seed}",
        flush=True,
    )
    if part.failures:
        print(f"{name}: its files are in {place}")
    else:
        shutil.rmtree(place)
    return part.failures


def main(config: CrashConfig, names: list[str]) -> int:
    """Run the named parts, or the quick ones. Return the exit code. Raises UserError."""
    # before the first part, so a misspelled one is noticed at once
    for name in names:
        if name not in PARTS:
            raise UserError(f"{name!r}: expected one of {', '.join(PARTS)}")
    # a process with one thread may be forked
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # all of them, even after a failure
    failures = [run_part(name, config) for name in names or QUICK]
    return 1 if any(failures) else 0


if __name__ == "__main__":
    run_tool(
        CrashConfig,
        f"python -m tools.crash [{' | '.join(PARTS)} ...] [--key=value ...]",
        main,
    )
