"""The parts with single saves: nth and rot. The old or the new checkpoint must be left."""

import errno
import io
import os
import random
import zipfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keepgpt import checkpoint
from keepgpt.checkpoint import Disk, Saver
from tools.crash.common import KEEP, PAGE, Part, check_folder, clone, make_bundles
from tools.runs import Bundle, full_state_of, list_temporary, newest_state, read_state

# checkpoints before a save; is it the best one?
BEFORE = ((0, True), (KEEP, False), (KEEP, True))
# an error instead of the operation, after it (late), or from it on (gone)
FAULTS = ("EIO", "ENOSPC", "EINTR", "EDQUOT", "ENOTSUP", "late", "gone")


class FaultyDisk(Disk):
    """A disk that logs each operation of `Disk`; the n-th one fails in the way of `fault`, or is a
    write that takes half of the data ("short"). It does not wait for the real disk."""

    def __init__(self, fault: str = "", n: int = 0) -> None:
        super().__init__()
        self.fault = fault
        self.n = n
        self.count = 0
        self.log = []
        # the operation that failed
        self.failed = ""
        # a rule that the save broke
        self.problem = ""
        # paths by descriptor
        self.opened = {}
        # paths whose fsync failed
        self.distrusted = set()
        # each public operation goes through `perform`, also one that is added later
        for name in vars(Disk):
            if not name.startswith("_"):
                setattr(self, name, partial(self.perform, name))

    def perform(self, name: str, *args: Any) -> Any:
        """Do an operation, or raise OSError."""
        # a descriptor stands for the path that it was opened with
        self.count += 1
        path = self.opened.get(args[0], args[0])
        self.check_trust(name, path)
        # a disk that is gone fails from there on, others once
        gone = self.fault == "gone" and self.count > self.n
        if self.count != self.n and not gone:
            return self.do(name, *args)
        if self.fault == "short":
            # a disk may take a part of the data without an error
            half = len(args[1]) // 2 + 1
            return self.do(name, args[0], args[1][:half])

        self.failed = name
        # done, and an error nevertheless; a file is closed in any case
        if self.fault == "late" or name == "close":
            self.do(name, *args)
        if name == "fsync":
            self.distrusted.add(path)
        number = getattr(errno, self.fault, errno.EIO)
        raise OSError(number, os.strerror(number))

    def check_trust(self, name: str, path: Any) -> None:
        """Note an operation on a file whose fsync has failed: the kernel has dropped its data."""
        if name == "remove":
            self.distrusted.discard(path)
        elif path in self.distrusted and name != "close":
            self.problem = f"{name} of a file whose fsync has failed"

    def do(self, name: str, *args: Any) -> Any:
        """Do an operation and log it."""
        # without the wait of a real fsync: only the order of operations counts here
        result = None
        if not name.startswith("fsync"):
            result = getattr(super(), name)(*args)
        if name == "create":
            self.opened[result] = args[0]
        self.log.append(name)
        return result

    def is_harmless(self) -> bool:
        """Return True if a save may succeed although that operation failed."""
        # without links it writes a copy
        if self.failed == "link":
            return self.fault == "ENOTSUP"
        return self.failed in ("", "close", "remove")


def save(folder: Path, bundle: Bundle, best: bool, disk: Disk) -> bool:
    """Save as a run does. Return True if the saver says that it succeeded."""
    # the saver of a real run, with its thread and its messages
    saver = Saver(folder, KEEP, None, lambda: None, torch.device("cpu"), disk)
    saver.save(bundle, best)
    return saver.wait()


def check_next_save(folder: Path, bundle: Bundle) -> str:
    """Save on a disk without faults. Return the problem, or ""."""
    # a failed save must not spoil the folder for the next one
    saved = save(folder, bundle, False, FaultyDisk())
    found = (saved, newest_state(folder), list_temporary(folder))
    if found != (True, full_state_of(bundle), ""):
        return f"the next save fails: {found}"
    return ""


def check_faulty_save(
    folder: Path,
    older: list[Bundle],
    new: Bundle,
    later: Bundle,
    best: bool,
    disk: FaultyDisk,
) -> str:
    """Save `new` on a faulty disk, then `later` on a sound one. Return the problem, or ""."""
    # states of ckpt.pt and best.pt before the save, between its two links, and after it
    old = full_state_of(older[-1]) if older else ""
    old_best = full_state_of(older[0]) if older else ""
    now = full_state_of(new)
    now_best = now if best else old_best
    allowed = {(old, old_best), (old, now_best), (now, now_best)}

    # a save that succeeds, says the saver, must be found
    if save(folder, new, best, disk):
        allowed = {(now, now_best)}
        if not disk.is_harmless():
            return "the saver calls it a success"
    # a disk that is gone can't remove anything either
    leftovers = list_temporary(folder)
    if leftovers and disk.fault != "gone":
        return f"{leftovers} is left behind"
    least = min(len(older), KEEP)
    return (
        disk.problem
        or check_folder(folder, allowed, least)
        or check_next_save(folder, later)
    )


@dataclass
class Fault:
    """A case of nth: the n-th operation, `name`, of a save after `count` others fails."""

    count: int
    best: bool
    kind: str
    n: int
    name: str


def list_faults(
    place: Path, bundles: list[Bundle], count: int, best: bool
) -> list[Fault]:
    """Make a folder with `count` checkpoints, save once more in a copy, and return all faults of
    that save."""
    folder = place / f"{count}{best}"
    folder.mkdir()
    # the folder before the save; its first checkpoint is the best one
    for i, bundle in enumerate(bundles[:count]):
        checkpoint.commit(bundle, folder, KEEP, i == 0, Disk())
    # a save without a fault tells which operations there are
    disk = FaultyDisk()
    checkpoint.commit(bundles[count], clone(folder, place / "case"), KEEP, best, disk)

    faults = []
    for n, name in enumerate(disk.log, 1):
        # only a write can be short
        kinds = (*FAULTS, "short") if name == "write" else FAULTS
        faults += [Fault(count, best, kind, n, name) for kind in kinds]
    return faults


def nth(part: Part, place: Path) -> str:
    """Let each operation of a save fail in each way, in folders with and without checkpoints."""
    # all faults of all saves first: their order gives them numbers
    bundles = make_bundles(part, place)
    faults = []
    for count, best in BEFORE:
        faults += list_faults(place, bundles, count, best)

    # most operations are writes of a few bytes
    for number in part.choose([fault.name != "write" for fault in faults], few=300):
        fault = faults[number]
        folder = clone(place / f"{fault.count}{fault.best}", place / "case")
        older = bundles[: fault.count]
        new, later = bundles[fault.count : fault.count + 2]
        disk = FaultyDisk(fault.kind, fault.n)
        # warnings about a disk that fails are right, and thousands
        with redirect_stderr(io.StringIO()):
            problem = check_faulty_save(folder, older, new, later, fault.best, disk)
        part.count(
            number, problem, f"operation {fault.n}, {fault.name}, {fault.kind}: "
        )
    return f"of {len(faults):,} faults in the {faults[-1].n} operations of a save"


def corrupt(
    raw: bytes, edges: list[int], case: int, rng: random.Random
) -> tuple[bytes, str]:
    """Return a file's content with a fault, and its description. Cuts are at `edges` first."""
    number, kind = divmod(case, 3)
    changed = bytearray(raw)
    if kind == 0:
        # a single bit half of the time
        bits = rng.sample(range(8 * len(raw)), rng.choice((1, 1, 2, 3)))
        for bit in bits:
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed), f"bits {bits} flipped"
    if kind == 1:
        # a page that is zero already would not change
        pages = [slice(i, i + PAGE) for i in range(0, len(raw), PAGE)]
        page = rng.choice([page for page in pages if any(raw[page])])
        changed[page] = bytes(len(raw[page]))
        return bytes(changed), f"page at byte {page.start} zeroed"
    # first each edge once, then anywhere
    end = edges[number] if number < len(edges) else rng.randrange(len(raw))
    return raw[:end], f"cut to {end} bytes"


def rot(part: Part, place: Path) -> str:
    """Corrupt the newest checkpoint: it must be rejected, and the one before it used."""
    older, newer = make_bundles(part, place)[-2:]
    folder = place / "rot"
    folder.mkdir()
    # two checkpoints, both also as best.pt
    for bundle in (older, newer):
        checkpoint.commit(bundle, folder, KEEP, True, Disk())
    path = folder / "ckpt.pt"
    raw = path.read_bytes()
    if newest_state(folder) != full_state_of(newer):
        part.count(-1, "an intact checkpoint is not used", cases=0)

    # cut at and around the edges of the records, of the zip's directory and of the file
    with zipfile.ZipFile(path) as file:
        edges = [record.header_offset for record in file.infolist()]
        records = len(edges)
        edges += [file.start_dir, len(raw)]
    around = {edge + distance for edge in edges for distance in (-1, 0, 1)}
    ends = sorted(around & set(range(len(raw))))

    # the file is recognized, and the older checkpoint is used
    expected = ("corrupt", full_state_of(older))
    for case in part.choose([False] * (part.config.cases or 500), few=500):
        content, how = corrupt(raw, ends, case, part.rng(case))
        # in place: the numbered checkpoint is the same file
        path.write_bytes(content)
        with redirect_stderr(io.StringIO()):
            found = (read_state(path), newest_state(folder))
        problem = "" if found == expected else "it is used, or the older one is not"
        part.count(case, problem, f"{how}, of {len(raw)}: ")
    return f"faults in a checkpoint of {len(raw):,} bytes and {records} records"
