"""power: the power is cut after each operation of a save. The old or the new checkpoint must be
left, with all that may be on the disk then."""

import copy
import io
import itertools
import os
import random
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepgpt import checkpoint
from tools.crash.common import KEEP, PAGE, Part, check_folder, make_bundles
from tools.crash.saves import FaultyDisk, check_next_save
from tools.runs import full_state_of

# what becomes of data without an fsync
TEARS = ("lost", "kept", "cut", "pages", "zeros")
# changes of names that may each be lost; older ones have arrived
PENDING = 10


@dataclass
class File:
    """A file's content as programs read it, and as the disk surely has it."""

    now: bytes = b""
    synced: bytes = b""

    def tear(self, how: str, rng: random.Random) -> bytes:
        """Return the content after a power cut: data since the fsync may have arrived or not."""
        if self.now == self.synced or how == "kept":
            return self.now
        if how == "lost":
            return self.synced
        if how == "zeros":
            return bytes(len(self.now))
        if how == "cut":
            return self.now[: rng.randrange(len(self.now) + 1)]
        # pages arrive in any order
        pages = [self.now[i : i + PAGE] for i in range(0, len(self.now), PAGE)]
        return b"".join(
            page if rng.random() < 0.7 else bytes(len(page)) for page in pages
        )


# None: no file
Names = dict[str, File | None]


class RecordingDisk(FaultyDisk):
    """A disk without faults. Its `instants` are, after each operation, the files in the folder at
    its last fsync, by name, and the changes of names since then."""

    def __init__(self) -> None:
        super().__init__()
        # the files now, those after a power cut, and the changes in between
        self.names = {}
        self.durable = {}
        self.pending = []
        self.instants = []

    def do(self, operation: str, *args: Any) -> Any:
        """Do an operation and record it."""
        result = super().do(operation, *args)
        # names are durable with an fsync of their folder, and only then
        if operation == "fsync_folder":
            self.durable = self.names
            self.pending = []
        elif operation != "close":
            change = self.record(operation, args, result)
            if change:
                self.names = self.names | change
                self.pending.append(change)
        # a copy, because later operations change the same files
        self.instants.append(copy.deepcopy((self.durable, self.pending)))
        return result

    def record(self, operation: str, args: tuple, result: Any) -> Names:
        """Change the content of a file, or return the change of names that an operation makes."""
        # a descriptor stands for an open file, a path for others
        name = self.opened.get(args[0], args[0]).name
        file = self.names.get(name)
        # operations on names
        if operation == "create" and not file:
            return {name: File()}
        if operation == "rename":
            return {name: None, args[1].name: file}
        if operation == "link":
            return {args[1].name: file}
        if operation == "remove":
            return {name: None}

        # operations on content; fsync makes it durable, whatever its name
        if operation == "create":
            file.now = b""
        elif operation == "write":
            file.now += args[1][:result]
        elif operation == "fsync":
            file.synced = file.now
        return {}


def list_outcomes(durable: Names, pending: list[Names]) -> itertools.product:
    """Return the outcomes of a power cut: any of the last pending changes, any tear of data."""
    # all subsets of the recent changes: a disk may order them as it likes
    recent = min(PENDING, len(pending))
    choices = [(True,)] * (len(pending) - recent) + [(False, True)] * recent
    # tears differ only if some data was not synced
    files = [file for names in (durable, *pending) for file in names.values() if file]
    torn = any(file.now != file.synced for file in files)
    return itertools.product(itertools.product(*choices), TEARS if torn else TEARS[:1])


@dataclass
class Cut:
    """A case: the power goes after an operation of save number `save`."""

    save: int
    operation: str
    durable: int  # saves that a power cut can't undo
    names: Names
    arrived: tuple[Names, ...]
    tear: str


def list_cuts(disk: RecordingDisk, first: int, save: int) -> list[Cut]:
    """Return all cuts of a save whose operations start at number `first`."""
    # numbers in the log of the disk, which covers all saves
    operations = range(first, len(disk.log))
    # a save is durable with its last fsync of the folder
    synced = [n for n in operations if disk.log[n] == "fsync_folder"] or operations
    cuts = []
    for n in operations:
        names, pending = disk.instants[n]
        durable = save if n >= synced[-1] else save - 1
        for arrived, tear in list_outcomes(names, pending):
            changes = tuple(itertools.compress(pending, arrived))
            cuts.append(Cut(save, disk.log[n], durable, names, changes, tear))
    return cuts


def write_outcome(cut: Cut, left: Path, rng: random.Random) -> None:
    """Write the files that a cut leaves."""
    names = cut.names
    # names change in the order of the operations
    for change in cut.arrived:
        names = names | change
    shutil.rmtree(left, ignore_errors=True)
    left.mkdir()
    for name, file in names.items():
        if file:
            (left / name).write_bytes(file.tear(cut.tear, rng))


def power(part: Part, place: Path) -> str:
    """Cut the power after each operation of four saves, with all that may be on the disk then. The
    old or the new checkpoints must be left, and the next save must succeed."""
    # the last checkpoint is for the save after the power is back
    *bundles, later = make_bundles(part, place)
    folder = place / "recorded"
    folder.mkdir()
    disk = RecordingDisk()
    # of ckpt.pt and best.pt, before the first save and after each one
    states = [("", "")]
    cuts = []
    for i, bundle in enumerate(bundles):
        first = len(disk.log)
        # each second one is the best
        best = i % 2 == 0
        checkpoint.commit(bundle, folder, KEEP, best, disk)
        state = full_state_of(bundle)
        states.append((state, state if best else states[-1][1]))
        cuts += list_cuts(disk, first, save=i + 1)

    left = place / "left"
    # most operations are writes of a few bytes
    for number in part.choose([cut.operation != "write" for cut in cuts], few=1000):
        cut = cuts[number]
        write_outcome(cut, left, part.rng(number))
        names = ", ".join(sorted(os.listdir(left)))
        old = states[cut.durable]
        new = states[cut.save]
        # best.pt is linked before ckpt.pt
        allowed = {old, (old[0], new[1]), new}
        with redirect_stderr(io.StringIO()):
            problem = check_folder(left, allowed, min(cut.durable, KEEP))
            problem = problem or check_next_save(left, later)
        part.count(
            number,
            problem,
            f"a cut after {cut.operation} of save {cut.save} leaves {names}: ",
        )
    return f"of {len(cuts):,} states after a power cut"
