"""The parts with single saves: nth, power and rot. The old or the new checkpoint must be left."""
import copy
import errno
import io
import itertools
import math
import os
import random
import shutil
import zipfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keepgpt import checkpoint
from keepgpt.checkpoint import Disk, Saver
from tools import runs
from tools.crash.common import KEEP, PAGE, Part, check_folder, clone, make_bundles

BEFORE = ((0, True), (KEEP, False), (KEEP, True))  # checkpoints before a save; is it the best one?
# an error instead of the operation, after it (late), or from it on (gone)
FAULTS = ("EIO", "ENOSPC", "EINTR", "EDQUOT", "ENOTSUP", "late", "gone")
TEARS = ("lost", "kept", "cut", "pages", "zeros")  # what becomes of data without an fsync


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
        result = None if name.startswith("fsync") else getattr(super(), name)(*args)
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
    saved = (save(folder, bundle, False, FaultyDisk()), runs.newest_state(folder),
             runs.list_temporary(folder))
    return "" if saved == (True, runs.state_of(bundle), "") else f"the next save fails: {saved}"


def check_faulty_save(folder: Path, older: list, new: dict, later: dict, best: bool,
                      disk: FaultyDisk) -> str:
    """Save `new` on a faulty disk, then `later` on a sound one. Return the problem, or ""."""
    old, old_best = (runs.state_of(older[-1]), runs.state_of(older[0])) if older else ("", "")
    now, now_best = runs.state_of(new), runs.state_of(new) if best else old_best
    allowed = {(old, old_best), (old, now_best), (now, now_best)}
    if save(folder, new, best, disk):
        allowed = {(now, now_best)}
        without_links = (disk.failed, disk.fault) == ("link", "ENOTSUP")  # it writes a copy
        if disk.failed not in ("", "close", "remove") and not without_links:
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


@dataclass
class File:
    """A file's content as programs read it, and as the disk surely has it."""
    now: bytes = b""
    synced: bytes = b""

    def tear(self, how: str, rng: random.Random) -> bytes:
        """Return the content after a power cut: data since the fsync may have arrived or not."""
        if self.now == self.synced or how == "kept":
            return self.now
        if how == "pages":
            pages = [self.now[i:i + PAGE] for i in range(0, len(self.now), PAGE)]
            return b"".join(page if rng.random() < 0.7 else bytes(len(page)) for page in pages)
        if how == "cut":
            return self.now[:rng.randrange(len(self.now) + 1)]
        return self.synced if how == "lost" else bytes(len(self.now))


class RecordingDisk(FaultyDisk):
    """A disk without faults. Its `instants` are, after each operation, the files in the folder at
    its last fsync, by name, and the changes of names since then (None: no file)."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.durable, self.pending, self.instants = {}, {}, [], []

    def do(self, operation: str, *args: Any) -> Any:
        """Do an operation and record it."""
        result, change = super().do(operation, *args), {}
        name = self.opened.get(args[0], args[0]).name if operation != "close" else ""
        file = self.names.get(name)
        if operation == "create":
            change = {} if file else {name: File()}
            (file or change[name]).now = b""
        elif operation == "write":
            file.now += args[1][:result]
        elif operation == "fsync":
            file.synced = file.now
        elif operation == "rename":
            change = {name: None, args[1].name: file}
        elif operation == "link":
            change = {args[1].name: file}
        elif operation == "remove":
            change = {name: None}
        elif operation == "fsync_folder":
            self.durable, self.pending = self.names, []
        if change:
            self.names = self.names | change
            self.pending.append(change)
        self.instants.append(copy.deepcopy((self.durable, self.pending)))
        return result


def list_outcomes(durable: dict[str, File | None], pending: list[dict]) -> itertools.product:
    """Return the outcomes of a power cut: any of the last ten pending changes, any tear of data."""
    older = [(True,)] * (len(pending) - 10)
    arrived = itertools.product(*older, *[(False, True)] * min(10, len(pending)))
    files = [file for names in (durable, *pending) for file in names.values() if file]
    torn = any(file.now != file.synced for file in files)
    return itertools.product(arrived, TEARS if torn else TEARS[:1])


def power(part: Part, place: Path) -> str:
    """Cut the power after each operation of four saves, with all that may be on the disk then. The
    old or the new checkpoints must be left, and the next save must succeed."""
    states, cases, folder = [("", "")], [], place / "recorded"
    folder.mkdir()
    disk, (*bundles, later) = RecordingDisk(), make_bundles(part, place)
    for i, bundle in enumerate(bundles):
        first, state, best = len(disk.log), runs.state_of(bundle), i % 2 == 0
        checkpoint.commit(bundle, folder, KEEP, best, disk)
        states.append((state, state if best else states[-1][1]))  # of ckpt.pt and best.pt
        operations = range(first, len(disk.log))
        synced = [n for n in operations if disk.log[n] == "fsync_folder"] or operations
        for n in operations:
            durable = i + (n >= synced[-1])  # saves that a power cut can't undo
            cases += [(n, durable, i + 1, *how) for how in list_outcomes(*disk.instants[n])]
    left = place / "left"
    for number in part.choose([disk.log[n] != "write" for n, *_ in cases], few=1000):
        n, durable, started, arrived, tear = cases[number]
        (names, pending), rng = disk.instants[n], part.rng(number)
        for change in itertools.compress(pending, arrived):
            names = names | change
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
        for name, file in names.items():
            if file:
                (left / name).write_bytes(file.tear(tear, rng))
        old, new, found = states[durable], states[started], ", ".join(sorted(os.listdir(left)))
        with redirect_stderr(io.StringIO()):
            problem = check_folder(left, {old, (old[0], new[1]), new}, min(durable, KEEP)
                                   ) or check_next_save(left, later)
        part.count(number, problem and f"a cut after {disk.log[n]} of save {started} leaves "
                                       f"{found}: {problem}")
    return f"of {len(cases):,} states after a power cut"


def corrupt(raw: bytes, edges: list[int], case: int, rng: random.Random) -> tuple[bytes, str]:
    """Return a file's content with a fault, and its description. Cuts are at `edges` first."""
    kind, number = case % 3, case // 3
    if kind == 0:
        bits, changed = rng.sample(range(8 * len(raw)), rng.choice((1, 1, 2, 3))), bytearray(raw)
        for bit in bits:
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed), f"bits {bits} flipped"
    if kind == 1:
        page = rng.choice([i for i in range(0, len(raw), PAGE) if any(raw[i:i + PAGE])])
        zeros = bytes(len(raw[page:page + PAGE]))
        return raw[:page] + zeros + raw[page + PAGE:], f"page at byte {page} zeroed"
    end = edges[number] if number < len(edges) else rng.randrange(len(raw))
    return raw[:end], f"cut to {end} bytes"


def rot(part: Part, place: Path) -> str:
    """Corrupt the newest checkpoint: it must be rejected, and the one before it used."""
    older, newer = make_bundles(part, place)[-2:]
    folder, path = place / "rot", place / "rot" / "ckpt.pt"
    folder.mkdir()
    for bundle in (older, newer):
        checkpoint.commit(bundle, folder, KEEP, True, Disk())  # also as best.pt
    raw, expected = path.read_bytes(), runs.state_of(older)
    if runs.newest_state(folder) != runs.state_of(newer):
        part.count(-1, "an intact checkpoint is not used", 0)
    with zipfile.ZipFile(path) as file:
        edges = [record.header_offset for record in file.infolist()] + [file.start_dir, len(raw)]
    around = sorted({at + d for at in edges for d in (-1, 0, 1)} & set(range(len(raw))))
    for case in part.choose([False] * (part.config.cases or 500), few=500):
        content, how = corrupt(raw, around, case, part.rng(case))
        path.write_bytes(content)  # in place: the numbered checkpoint is the same file
        with redirect_stderr(io.StringIO()):
            states = runs.read_state(path), runs.newest_state(folder)
        problem = "" if states == ("corrupt", expected) else "it is used, or the older one is not"
        part.count(case, problem and f"{how}, of {len(raw)}: {problem}")
    return f"faults in a checkpoint of {len(raw):,} bytes and {len(edges) - 2} records"
