"""nth: each file operation of a save fails in each way, or the process dies in it."""
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
# an error instead of the operation, after it (late), from it on (gone); or the process dies before
FAULTS = ("EIO", "ENOSPC", "EINTR", "EDQUOT", "late", "gone", "dies")
WRITE_FAULTS = (*FAULTS, "short", "dies halfway")  # half of the data is taken, then it fails
DIED = 9


class FaultyDisk(Disk):
    """A disk that logs each operation of `Disk`; the n-th one fails in the way of `fault`.

    It does not wait for the real disk: a process leaves the same files to others without that.
    """

    def __init__(self, fault: str = "", n: int = 0) -> None:
        self.fault, self.n, self.count, self.log = fault, n, 0, []
        self.failed = self.problem = ""  # the operation that failed; a rule that the save broke
        self.opened, self.distrusted = {}, set()  # paths by descriptor; those whose fsync failed
        for name in vars(Disk):
            if not name.startswith("_"):
                setattr(self, name, partial(self.perform, name))

    def perform(self, name: str, *args: Any) -> Any:
        """Do an operation, or fail."""
        self.count += 1
        path = self.opened.get(args[0], args[0])
        if name == "remove":
            self.distrusted.discard(path)
        elif path in self.distrusted and name != "close":
            self.problem = f"{name} of a file whose fsync has failed"
        if self.fault == "thin" and name == "write":  # a disk that takes little at a time
            args = args[0], args[1][:999]
        elif self.count == self.n or self.fault == "gone" and self.count > self.n:
            return self.fail(name, *args)
        return self.do(name, *args)

    def do(self, name: str, *args: Any) -> Any:
        """Do an operation and log it."""
        result = None if name.startswith("fsync") else getattr(Disk, name)(*args)
        if name == "create":
            self.opened[result] = args[0]
        self.log.append(name)
        return result

    def fail(self, name: str, *args: Any) -> Any:
        """Raise OSError, end the process, or write half of the data."""
        self.failed, fault = name, self.fault
        if fault in ("short", "dies halfway"):
            taken = self.do(name, args[0], args[1][:len(args[1]) // 2 + 1])
        elif fault == "late" or name == "close":  # done, and an error nevertheless
            self.do(name, *args)
        if fault.startswith("dies"):
            os._exit(DIED)
        if fault == "short":  # the error comes with the next operation
            self.n, self.fault = self.n + 1, "ENOSPC"
            return taken
        if name == "fsync":
            self.distrusted.add(self.opened[args[0]])
        number = getattr(errno, fault, errno.EIO)
        raise OSError(number, os.strerror(number))


def save(folder: Path, bundle: dict[str, Any], best: bool, disk: Disk) -> bool:
    """Save as a run does. Return True if the saver says that it succeeded."""
    saver = Saver(folder, KEEP, math.inf, lambda: None, torch.device("cpu"), disk)
    saver.save(bundle, best)
    return saver.wait()


def check_faulty_save(folder: Path, older: list, new: dict, later: dict, best: bool,
                      disk: FaultyDisk) -> str:
    """Save `new` on a faulty disk, then `later` on a sound one. Return the problem, or ""."""
    old, old_best = (runs.state_of(older[-1]), runs.state_of(older[0])) if older else ("", "")
    now, now_best = runs.state_of(new), runs.state_of(new) if best else old_best
    allowed = {(old, old_best), (old, now_best), (now, now_best)}
    dies = disk.fault.startswith("dies")
    if dies:
        code = runs.wait_for_exit(runs.fork(lambda: save(folder, new, best, disk) and 0,
                                            folder.with_name("log")))
        if code != DIED:
            return f"exit code {code}: the save never reaches that operation"
    elif save(folder, new, best, disk):
        allowed = {(now, now_best)}
        if disk.failed not in ("", "close", "remove"):
            return "the saver calls it a success"
    if problem := disk.problem or check_folder(folder, allowed, min(len(older), KEEP)):
        return problem
    if runs.list_temporary(folder) and not dies and disk.fault != "gone":
        return f"{runs.list_temporary(folder)} is left behind"
    if not save(folder, later, False, FaultyDisk()):
        return "the next save fails"
    if runs.newest_state(folder) != runs.state_of(later) or runs.list_temporary(folder):
        return "the next save leaves an older checkpoint or a temporary file"
    return ""


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
        cases += [(count, best, "thin", 0, "")]
        cases += [(count, best, fault, n, name) for n, name in enumerate(disk.log, 1)
                  for fault in (WRITE_FAULTS if name == "write" else FAULTS)]
    for number in part.choose([name != "write" for *_, name in cases], few=300):
        count, best, fault, n, name = cases[number]
        folder = clone(place / f"{count}{best}", place / "case")
        with redirect_stderr(io.StringIO()):
            problem = check_faulty_save(folder, bundles[:count], bundles[count], bundles[count + 1],
                                        best, FaultyDisk(fault, n))
        part.count(number, problem and f"operation {n}, {name}, {fault}: {problem}")
    return f"of {len(cases):,} faults in the {len(disk.log)} operations of a save"
