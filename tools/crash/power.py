"""power: each state of the disk that a power cut during a save may leave."""
import copy
import io
import itertools
import random
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from keepgpt import checkpoint
from tools import runs
from tools.crash.common import KEEP, PAGE, Part, check_folder, make_bundles
from tools.crash.nth import FaultyDisk

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

    def apply(self, name: str, args: list, result: Any) -> None:
        """Follow an operation of a FaultyDisk's log."""
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

    def list_subsets(self) -> list[tuple]:
        """Return which of the pending changes may have reached the disk: any, of the last ten."""
        older, n = max(0, len(self.pending) - 10), min(10, len(self.pending))
        return [(True,) * older + last for last in itertools.product((False, True), repeat=n)]

    def list_tears(self) -> tuple[str, ...]:
        """Return what may become of the files."""
        return TEARS if self.files != self.synced else TEARS[:1]

    def cut_power(self, subset: tuple, tear: str, rng: random.Random) -> dict[str, bytes]:
        """Return the content of each file when the power is back."""
        names = self.durable.copy()
        for change in itertools.compress(self.pending, subset):
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


def replay(log: list) -> Iterator[tuple[str, Volume, int, int]]:
    """Yield after each operation its name, a copy of the volume, and how many saves are durable
    and how many have started."""
    volume, names, durable = Volume(), [name for name, _, _ in log], 0
    for i, (name, args, result) in enumerate(log):
        volume.apply(name, args, result)
        started, rest = names[:i].count("saved") + 1, names[i + 1:names.index("saved", i)]
        if name == "saved" or name == "fsync_folder" and name not in rest:
            durable = started
        yield name, copy.deepcopy(volume), durable, started


def power(part: Part, place: Path) -> str:
    """Cut the power after each operation of four saves, with all that may be on the disk then."""
    disk, states, bests, folder = FaultyDisk(), [""], [""], place / "recorded"
    folder.mkdir()
    for i, bundle in enumerate(make_bundles(part, place)):
        best = i % 2 == 0
        checkpoint.commit(bundle, folder, KEEP, best, disk)
        disk.log.append(("saved", [], None))
        states.append(runs.state_of(bundle))
        bests.append(states[-1] if best else bests[-1])
    cases = [(*instant, *how) for instant in replay(disk.log)
             for how in itertools.product(instant[1].list_subsets(), instant[1].list_tears())]
    distinct, left = set(), place / "left"
    for number in part.choose([name != "write" for name, *_ in cases], few=1000):
        name, volume, durable, started, subset, tear = cases[number]
        files, problem = volume.cut_power(subset, tear, part.rng(number)), ""
        if (key := runs.digest([sorted(files.items()), durable, started])) not in distinct:
            distinct.add(key)
            shutil.rmtree(left, ignore_errors=True)
            left.mkdir()
            for path, content in files.items():
                (left / path).write_bytes(content)
            allowed = {"ckpt.pt": {states[durable], states[started]},
                       "best.pt": {bests[durable], bests[started]}}
            with redirect_stderr(io.StringIO()):
                problem = check_folder(left, allowed, (states[started], bests[started]),
                                       min(durable, KEEP))
        part.count(number, problem and f"a cut after {name} of save {started} leaves "
                                       f"{', '.join(sorted(files))}: {problem}")
    return f"of {len(cases):,} states after a power cut, {len(distinct):,} distinct ones"
