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
from tools.crash.common import (
    KEEP,
    Part,
    clone,
    exit_code,
    half_written,
    newest,
    real_bundles,
    state,
    wrong,
)

BEFORE = ((0, True), (KEEP, False), (KEEP, True))  # bundles before a save; whether it is the best
# an error instead of the operation, after it (late), from it on (gone); or the process dies before
FAULTS = ("EIO", "ENOSPC", "EINTR", "EDQUOT", "late", "gone", "dies")
WRITE_FAULTS = (*FAULTS, "short", "dies halfway")  # half of the data is taken, and then it fails


class TappedDisk(Disk):
    """Logs each operation, whatever there is in Disk; the `n`-th fails in the way of `fault`.

    Does not wait for the real disk: what a process leaves to others does not depend on it.
    """

    def __init__(self, fault: str = "", n: int = 0) -> None:
        self.fault, self.n, self.count, self.log = fault, n, 0, []
        self.struck = self.problem = ""
        self.opened, self.distrusted = {}, set()  # paths by descriptor; those whose fsync failed

    def __getattribute__(self, name: str) -> Any:
        is_operation = name in vars(Disk) and not name.startswith("_")
        return partial(self.on, name) if is_operation else super().__getattribute__(name)

    def on(self, name: str, *args: Any) -> Any:
        """What each operation does instead."""
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
        result = None if name.startswith("fsync") else getattr(Disk, name)(self, *args)
        if name == "create":
            self.opened[result] = args[0]
        kept = [bytes(arg) if isinstance(arg, memoryview) else arg for arg in args]
        self.log.append((name, kept, result))
        return result

    def fail(self, name: str, *args: Any) -> Any:
        self.struck, fault = name, self.fault
        if fault in ("short", "dies halfway"):
            taken = self.do(name, args[0], args[1][:len(args[1]) // 2 + 1])
        elif fault == "late" or name == "close":  # it is done, and an error comes nevertheless
            self.do(name, *args)
        if fault.startswith("dies"):
            os._exit(9)
        if fault == "short":  # no error yet: it comes with the next operation
            self.n, self.fault = self.n + 1, "ENOSPC"
            return taken
        if name == "fsync":
            self.distrusted.add(self.opened[args[0]])
        number = getattr(errno, fault, errno.EIO)
        raise OSError(number, os.strerror(number))


def save(saver: Saver, bundle: dict[str, Any], best: bool) -> bool:
    """Save as a run does; whether it says that it succeeded."""
    saver.save(bundle, best)
    return saver.wait()


def faulty_save(folder: Path, older: list, new: dict, later: dict, best: bool, disk: TappedDisk,
                known: dict[str, str]) -> str:
    """Save `new` on a faulty disk, then `later` on a sound one. What is wrong then, or ""."""
    old, old_best = (state(older[-1]), state(older[0])) if older else ("", "")
    now, now_best = state(new), state(new) if best else old_best
    allowed = {"ckpt.pt": {old, now}, "best.pt": {old_best, now_best}}
    saver_on = partial(Saver, folder, KEEP, math.inf, lambda: None, torch.device("cpu"))
    saver = saver_on()
    saver.disk = disk
    dies = disk.fault.startswith("dies")
    if dies:
        pid = os.fork()
        if not pid:
            save(saver, new, best)
            os._exit(0)
        if (code := exit_code(pid)) != 9:
            return f"exit code {code}: the save never comes to that operation"
    elif save(saver, new, best):
        allowed = {"ckpt.pt": {now}, "best.pt": {now_best}}
        if disk.struck not in ("", "close", "remove"):
            return "it is called a success"
    if problem := disk.problem or wrong(folder, allowed, (now, now_best), min(len(older), KEEP),
                                        known):
        return problem
    if half_written(folder) and not dies and disk.fault != "gone":
        return f"{half_written(folder)} left behind"
    saver = saver_on() if dies else saver
    saver.disk = TappedDisk()
    if not save(saver, later, False) or newest(folder) != state(later):
        return "the next save fails"
    return f"{half_written(folder)} left behind for good" * bool(half_written(folder))


def nth(part: Part, place: Path) -> int:
    """Each operation of a save fails in each way, in folders with and without older bundles."""
    bundles, known, cases = real_bundles(place), {}, []
    for there, best in BEFORE:
        folder = place / f"{there}{best}"
        folder.mkdir()
        for i, bundle in enumerate(bundles[:there]):
            checkpoint.commit(bundle, folder, KEEP, i == 0, Disk())
        disk = TappedDisk()
        checkpoint.commit(bundles[there], clone(folder, place / "case"), KEEP, best, disk)
        cases += [(there, best, "thin", 0, "")]
        cases += [(there, best, fault, n, name) for n, (name, _, _) in enumerate(disk.log, 1)
                  for fault in (WRITE_FAULTS if name == "write" else FAULTS)]
    for number in part.choose([name != "write" for *_, name in cases], few=300):
        there, best, fault, n, name = cases[number]
        folder = clone(place / f"{there}{best}", place / "case")
        with redirect_stderr(io.StringIO()):
            problem = faulty_save(folder, bundles[:there], bundles[there], bundles[there + 1], best,
                                  TappedDisk(fault, n), known)
        part.count(number, problem and f"{name} is operation {n}, {fault}: {problem}")
    return part.end(f"of {len(cases):,} faults in the {len(disk.log)} operations of a save")
