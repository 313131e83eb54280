"""power: each state of the disk that a power cut, or the death of the process, may leave."""
import copy
import io
import itertools
import random
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepgpt import checkpoint
from tools import runs
from tools.crash.common import KEEP, PAGE, Part, check_folder, make_bundles
from tools.crash.nth import FaultyDisk, check_next_save

TEARS = ("lost", "kept", "cut", "pages", "zeros")  # what becomes of data without an fsync


@dataclass
class File:
    """What programs read in a file, and what is on the disk for sure."""
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
    """Return what a power cut may leave: any of the last ten pending changes, any tear of data."""
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
    distinct, left = set(), place / "left"
    for number in part.choose([disk.log[n] != "write" for n, *_ in cases], few=1000):
        n, durable, started, arrived, tear = cases[number]
        (names, pending), rng, problem = disk.instants[n], part.rng(number), ""
        for change in itertools.compress(pending, arrived):
            names = names | change
        files = {name: file.tear(tear, rng) for name, file in names.items() if file}
        if (key := runs.digest([sorted(files.items()), durable, started])) not in distinct:
            distinct.add(key)
            shutil.rmtree(left, ignore_errors=True)
            left.mkdir()
            for name, content in files.items():
                (left / name).write_bytes(content)
            old, new = states[durable], states[started]
            with redirect_stderr(io.StringIO()):
                problem = check_folder(left, {old, (old[0], new[1]), new}, min(durable, KEEP)
                                       ) or check_next_save(left, later)
        part.count(number, problem and f"a cut after {disk.log[n]} of save {started} leaves "
                                       f"{', '.join(sorted(files))}: {problem}")
    return f"of {len(cases):,} states after a power cut, {len(distinct):,} distinct ones"
