"""power: every state of the disk that a power cut during a save may leave."""
import io
import itertools
import random
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from keepgpt import checkpoint
from tools.crash.common import KEEP, PAGE, Part, digest, real_bundles, state, wrong
from tools.crash.nth import TappedDisk

TEARS = ("lost", "kept", "cut", "pages", "zeros")  # what becomes of data without an fsync


class Volume:
    """A folder as the programs see it, as the disk has it for sure, and what lies between."""

    def __init__(self) -> None:
        self.files, self.synced = [], []  # contents, by file number
        self.names, self.durable = {}, {}  # file numbers, by name
        self.pending, self.opened = [], {}  # changes of names since the folder's fsync; descriptors

    def rename(self, change: dict[str, int | None]) -> None:
        """Change what names stand for (None: for nothing), all at once."""
        self.pending.append(change)
        self.names = {n: file for n, file in (self.names | change).items() if file is not None}

    def apply(self, name: str, args: list, result: Any) -> None:
        """Follow an operation that was logged."""
        if name == "create" and args[0].name not in self.names:
            self.files.append(b"")
            self.synced.append(b"")
            self.rename({args[0].name: len(self.files) - 1})
        if name == "create":
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

    def subsets(self, dice: random.Random) -> list[tuple]:
        """Which of the pending changes may have reached the disk: any of them."""
        n = len(self.pending)
        if n <= 8:
            return list(itertools.product((False, True), repeat=n))
        first = [(True,) * kept + (False,) * (n - kept) for kept in range(n + 1)]
        return first + [tuple(dice.random() < 0.5 for _ in range(n)) for _ in range(200)]

    def after_cut(self, subset: tuple, tear: str, dice: random.Random) -> dict[str, bytes]:
        """The folder when the power is back: contents by name."""
        names = self.durable.copy()
        for change in itertools.compress(self.pending, subset):
            names |= change
        return {n: self.torn(file, tear, dice) for n, file in names.items() if file is not None}

    def torn(self, file: int, tear: str, dice: random.Random) -> bytes:
        """What is left of a file: what came after its fsync may be there or not."""
        now, sure = self.files[file], self.synced[file]
        if now == sure or tear == "kept":
            return now
        if tear == "pages":
            pages = [now[i:i + PAGE] for i in range(0, len(now), PAGE)]
            return b"".join(page if dice.random() < 0.7 else bytes(len(page)) for page in pages)
        if tear == "cut":
            return now[:dice.randrange(len(now) + 1)]
        return sure if tear == "lost" else bytes(len(now))


def instants(log: list) -> Iterator[tuple[str, Volume, int, int]]:
    """After each operation: its name, the volume, how many saves are durable and have begun."""
    volume, names, durable = Volume(), [name for name, _, _ in log], 0
    for i, (name, args, result) in enumerate(log):
        volume.apply(name, args, result)
        begun, rest = names[:i].count("saved") + 1, names[i + 1:names.index("saved", i)]
        if name == "saved" or name == "fsync_folder" and name not in rest:
            durable = begun
        yield name, volume, durable, begun


def power(part: Part, place: Path) -> int:
    """Every instant of a few saves, and all that may be on the disk if the power goes then."""
    bundles, known, distinct, cases, disk = real_bundles(place), {}, set(), [], TappedDisk()
    states, bests, folder = [""], [""], place / "recorded"
    folder.mkdir()
    for i, bundle in enumerate(bundles):
        best = i % 2 == 0
        checkpoint.commit(bundle, folder, KEEP, best, disk)
        disk.log.append(("saved", [], None))
        states.append(state(bundle))
        bests.append(states[-1] if best else bests[-1])
    for i, (name, volume, _, _) in enumerate(instants(disk.log)):
        tears = TEARS if volume.files != volume.synced else TEARS[:1]
        subsets = volume.subsets(part.dice(-2 - i))
        cases += [(i, name, *left) for left in itertools.product(subsets, tears)]
    chosen = part.choose([name != "write" for _, name, _, _ in cases], few=1000)
    for i, (name, volume, durable, begun) in enumerate(instants(disk.log)):
        allowed = {name: {those[durable], those[begun]}
                   for name, those in (("ckpt.pt", states), ("best.pt", bests))}
        while chosen and cases[chosen[0]][0] == i:
            number = chosen.pop(0)
            left, problem = volume.after_cut(*cases[number][2:], part.dice(number)), ""
            if (key := digest([sorted(left.items()), durable, begun])) not in distinct:
                distinct.add(key)
                shutil.rmtree(place / "left", ignore_errors=True)
                (place / "left").mkdir()
                for path, content in left.items():
                    (place / "left" / path).write_bytes(content)
                with redirect_stderr(io.StringIO()):
                    problem = wrong(place / "left", allowed, (states[begun], bests[begun]),
                                    min(durable, KEEP), known)
            part.count(number, problem and f"a cut after operation {i}, {name}, that leaves "
                                           f"{', '.join(sorted(left))}: {problem}")
    return part.end(f"of {len(cases):,} states after a power cut, {len(distinct):,} distinct ones")
