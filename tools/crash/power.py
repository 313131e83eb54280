"""power: each state of the disk that a power cut, or the death of the process, may leave."""
import copy
import io
import itertools
import random
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from keepgpt import checkpoint
from tools import runs
from tools.crash.common import KEEP, PAGE, Part, check_folder, make_bundles
from tools.crash.nth import FaultyDisk, check_next_save

TEARS = ("lost", "kept", "cut", "pages", "zeros")  # what becomes of data without an fsync


class Volume:
    """A folder as programs see it, as the disk has it for sure, and the changes between the two."""

    def __init__(self) -> None:
        self.files, self.synced = [], []  # contents, by file number
        self.names, self.durable = {}, {}  # file numbers, by name
        self.pending, self.opened = [], {}  # renames since the folder's fsync; files by descriptor

    def rename(self, change: dict[str, int | None]) -> None:
        """Change the files that names stand for (None: no file), all at once."""
        self.pending.append(change)
        self.names = {n: file for n, file in (self.names | change).items() if file is not None}

    def apply(self, name: str, args: tuple, result: Any) -> None:
        """Follow an operation of a disk."""
        if name == "create":
            if args[0].name not in self.names:
                self.files.append(b"")
                self.synced.append(b"")
                self.rename({args[0].name: len(self.files) - 1})
            self.opened[result] = self.names[args[0].name]
            self.files[self.opened[result]] = b""
        elif name == "write":
            self.files[self.opened[args[0]]] += args[1][:result]
        elif name == "fsync":
            self.synced[self.opened[args[0]]] = self.files[self.opened[args[0]]]
        elif name == "rename":
            self.rename({args[0].name: None, args[1].name: self.names[args[0].name]})
        elif name == "link":
            self.rename({args[1].name: self.names[args[0].name]})
        elif name == "remove":
            self.rename({args[0].name: None})
        elif name == "fsync_folder":
            self.durable, self.pending = self.names, []

    def list_outcomes(self) -> itertools.product:
        """Return what a power cut may leave: any of the last ten pending changes, and any tear of
        data."""
        older = [(True,)] * (len(self.pending) - 10)
        arrived = itertools.product(*older, *[(False, True)] * min(10, len(self.pending)))
        return itertools.product(arrived, TEARS if self.files != self.synced else TEARS[:1])

    def cut_power(self, arrived: tuple, tear: str, rng: random.Random) -> dict[str, bytes]:
        """Return the content of each file when the power is back."""
        names = self.durable.copy()
        for change in itertools.compress(self.pending, arrived):
            names |= change
        return {name: self.tear(file, tear, rng) for name, file in names.items()
                if file is not None}

    def tear(self, file: int, tear: str, rng: random.Random) -> bytes:
        """Return a file's content after a power cut: data after its fsync may have arrived or
        not."""
        now, sure = self.files[file], self.synced[file]
        if now == sure or tear == "kept":
            return now
        if tear == "pages":
            pages = [now[i:i + PAGE] for i in range(0, len(now), PAGE)]
            return b"".join(page if rng.random() < 0.7 else bytes(len(page)) for page in pages)
        if tear == "cut":
            return now[:rng.randrange(len(now) + 1)]
        return sure if tear == "lost" else bytes(len(now))


class RecordingDisk(FaultyDisk):
    """A disk without faults that keeps the volume after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.volume, self.volumes = Volume(), []

    def do(self, name: str, *args: Any) -> Any:
        result = super().do(name, *args)
        self.volume.apply(name, args, result)
        self.volumes.append(copy.deepcopy(self.volume))
        return result


def power(part: Part, place: Path) -> str:
    """Cut the power after each operation of four saves, with all that may be on the disk then. The
    old or the new checkpoints must be left, and the next save must succeed."""
    states, cases, folder = [("", "")], [], place / "recorded"
    folder.mkdir()
    disk = RecordingDisk()
    *bundles, later = make_bundles(part, place)
    for i, bundle in enumerate(bundles):
        first, state, best = len(disk.log), runs.state_of(bundle), i % 2 == 0
        checkpoint.commit(bundle, folder, KEEP, best, disk)
        states.append((state, state if best else states[-1][1]))  # of ckpt.pt and best.pt
        operations = range(first, len(disk.log))
        synced = [n for n in operations if disk.log[n] == "fsync_folder"] or operations
        for n in operations:
            durable = i + (n >= synced[-1])  # saves that a power cut can't undo
            cases += [(n, durable, i + 1, *how) for how in disk.volumes[n].list_outcomes()]
    distinct, left = set(), place / "left"
    for number in part.choose([disk.log[n] != "write" for n, *_ in cases], few=1000):
        n, durable, started, *how = cases[number]
        files, problem = disk.volumes[n].cut_power(*how, part.rng(number)), ""
        if (key := runs.digest([sorted(files.items()), durable, started])) not in distinct:
            distinct.add(key)
            shutil.rmtree(left, ignore_errors=True)
            left.mkdir()
            for path, content in files.items():
                (left / path).write_bytes(content)
            old, new = states[durable], states[started]
            with redirect_stderr(io.StringIO()):
                problem = check_folder(left, {old, (old[0], new[1]), new}, min(durable, KEEP)
                                       ) or check_next_save(left, later)
        part.count(number, problem and f"a cut after {disk.log[n]} of save {started} leaves "
                                       f"{', '.join(sorted(files))}: {problem}")
    return f"of {len(cases):,} states after a power cut, {len(distinct):,} distinct ones"
