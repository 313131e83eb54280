"""nth: each file operation of a save fails in each way."""
import errno
import io
import math
import os
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keepgpt import checkpoint
from keepgpt.checkpoint import Disk, Saver
from tools import runs
from tools.crash.common import KEEP, Part, check_folder, clone, make_bundles

BEFORE = ((0, True), (KEEP, False), (KEEP, True))  # checkpoints before a save; is it the best one?
# an error instead of the operation, after it (late), or from it on (gone)
FAULTS = ("EIO", "ENOSPC", "EINTR", "EDQUOT", "late", "gone")


class FaultyDisk(Disk):
    """A disk that logs each operation of `Disk`; the n-th one fails in the way of `fault`, or is a
    write that takes half of the data ("short"). It does not wait for the real disk."""

    def __init__(self, fault: str = "", n: int = 0) -> None:
        self.fault, self.n, self.count, self.log = fault, n, 0, []
        self.failed = self.problem = ""  # the operation that failed; a rule that the save broke
        self.opened, self.distrusted = {}, set()  # paths by descriptor; those whose fsync failed
        for name in vars(Disk):
            if not name.startswith("_"):
                setattr(self, name, partial(self.perform, name))

    def perform(self, name: str, *args: Any) -> Any:
        """Do an operation, or raise OSError."""
        self.count += 1
        path = self.opened.get(args[0], args[0])
        if name == "remove":
            self.distrusted.discard(path)
        elif path in self.distrusted and name != "close":
            self.problem = f"{name} of a file whose fsync has failed"
        if self.count != self.n and not (self.fault == "gone" and self.count > self.n):
            return self.do(name, *args)
        if self.fault == "short":
            return self.do(name, args[0], args[1][:len(args[1]) // 2 + 1])
        self.failed = name
        if self.fault == "late" or name == "close":  # done, and an error nevertheless
            self.do(name, *args)
        if name == "fsync":
            self.distrusted.add(path)
        number = getattr(errno, self.fault, errno.EIO)
        raise OSError(number, os.strerror(number))

    def do(self, name: str, *args: Any) -> Any:
        """Do an operation and log it."""
        result = None if name.startswith("fsync") else getattr(Disk, name)(*args)
        if name == "create":
            self.opened[result] = args[0]
        self.log.append(name)
        return result


def save(folder: Path, bundle: dict[str, Any], best: bool, disk: Disk) -> bool:
    """Save as a run does. Return True if the saver says that it succeeded."""
    saver = Saver(folder, KEEP, math.inf, lambda: None, torch.device("cpu"), disk)
    saver.save(bundle, best)
    return saver.wait()


def check_next_save(folder: Path, bundle: dict[str, Any]) -> str:
    """Save on a disk without faults. Return the problem, or ""."""
    saved = save(folder, bundle, False, FaultyDisk())
    if saved and runs.newest_state(folder) == runs.state_of(bundle) \
            and not runs.list_temporary(folder):
        return ""
    return "the next save fails, or leaves an older checkpoint or a temporary file"


def check_faulty_save(folder: Path, older: list, new: dict, later: dict, best: bool,
                      disk: FaultyDisk) -> str:
    """Save `new` on a faulty disk, then `later` on a sound one. Return the problem, or ""."""
    old, old_best = (runs.state_of(older[-1]), runs.state_of(older[0])) if older else ("", "")
    now, now_best = runs.state_of(new), runs.state_of(new) if best else old_best
    allowed = {(old, old_best), (old, now_best), (now, now_best)}
    if save(folder, new, best, disk):
        allowed = {(now, now_best)}
        if disk.failed not in ("", "close", "remove"):
            return "the saver calls it a success"
    if runs.list_temporary(folder) and disk.fault != "gone":
        return f"{runs.list_temporary(folder)} is left behind"
    return (disk.problem or check_folder(folder, allowed, min(len(older), KEEP))
            or check_next_save(folder, later))


def nth(part: Part, place: Path) -> str:
    """Let each operation of a save fail in each way, in folders with and without checkpoints."""
    bundles, cases = make_bundles(part, place), []
    for count, best in BEFORE:
        folder = place / f"{count}{best}"
        folder.mkdir()
        for i, bundle in enumerate(bundles[:count]):
            checkpoint.commit(bundle, folder, KEEP, i == 0, Disk())
        disk = FaultyDisk()
        checkpoint.commit(bundles[count], clone(folder, place / "case"), KEEP, best, disk)
        cases += [(count, best, fault, n, name) for n, name in enumerate(disk.log, 1)
                  for fault in FAULTS + ("short",) * (name == "write")]
    for number in part.choose([name != "write" for *_, name in cases], few=300):
        count, best, fault, n, name = cases[number]
        folder = clone(place / f"{count}{best}", place / "case")
        with redirect_stderr(io.StringIO()):
            problem = check_faulty_save(folder, bundles[:count], bundles[count], bundles[count + 1],
                                        best, FaultyDisk(fault, n))
        part.count(number, problem and f"operation {n}, {name}, {fault}: {problem}")
    return f"of {len(cases):,} faults in the {len(disk.log)} operations of a save"
