"""prepare: prepare.py dies before each of its file operations. Training then reads a complete
dataset or is an error, and the next preparation gives exactly the right files."""

import io
import os
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr
from pathlib import Path
from typing import Any

import prepare as script
from keepgpt.dataset import read_meta
from keepgpt.errors import UserError
from keepgpt.loader import Split
from tools import runs
from tools.crash.common import Part

SHARDS = ["to be\n" * 40, "or not\n" * 30, "to\n"]
SINGLE = ["".join(map(chr, range(97, 497))) * 2]  # ids that could be GPT-2's tokens
# the texts of the existing dataset ([]: none) and of the one that replaces it; each is a shard
CHANGES = [
    ([], SINGLE),
    ([SINGLE[0][::-1]], SINGLE),
    (["short\n" * 5], SINGLE),
    ([], SHARDS),
    ([text.upper() for text in SHARDS], SHARDS),
    (SHARDS[::-1], SHARDS),
    (SINGLE, SHARDS),
    (SHARDS, SINGLE),
]
CALLS = {open, os.open, os.close, os.replace, os.remove, os.unlink, os.mkdir, os.rmdir}
DIED = 9


def prepare_texts(
    data_dir: Path, texts: list[str], before: Callable[[str], None] | None = None
) -> int:
    """Prepare `texts` as data_dir/x in a fork that calls `before` with the name of each file
    operation. Return its exit code."""

    def profile(_frame: Any, event: str, call: Any) -> None:
        if event == "c_call" and (
            call in CALLS or isinstance(call.__self__, io.IOBase)
        ):
            before(call.__name__)

    def work() -> None:
        script.describe_source = lambda *_args: {"texts": texts}
        script.open_shards = lambda *_args: [
            script.Shard(lambda text=text: iter([io.StringIO(text)]), 1, 0.25)
            for text in texts
        ]
        # do not wait for the real disk: a process leaves the same files to others without that
        os.fsync = lambda _file: before and before("fsync")
        sys.setprofile(profile if before else None)
        script.prepare(
            script.PrepareConfig("x", "char", 0.25, data_dir=str(data_dir)),
            {"tokenizer": "char"},
            ["text"],
            ExitStack(),
        )

    return runs.wait_for_exit(runs.fork(work, data_dir.with_name("log")))


def list_operations(data_dir: Path, texts: list[str]) -> list[str]:
    """Prepare `texts` and return the names of its file operations. Raises UserError."""
    log = data_dir.with_name("operations")
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if code := prepare_texts(
        data_dir, texts, lambda name: os.write(handle, f"{name}\n".encode())
    ):
        raise UserError(
            f"an uninterrupted preparation: expected exit code 0, got {code}; see "
            f"{data_dir.with_name('log')}"
        )
    os.close(handle)
    return log.read_text().splitlines()


def read_dataset(folder: Path) -> tuple[dict[str, Any], list[bytes]]:
    """Return meta.json and the tokens of both splits, as training reads them. Raises UserError."""
    meta = read_meta(folder)
    splits = [
        Split(folder, name, meta, block_size=1, seed=1, shift=True)
        for name in ("train", "val")
    ]
    return meta, [split.read(0, split.ends[-1]) for split in splits]


def check_dataset(folder: Path, allowed: list[Any]) -> str:
    """Return the problem of a training run that starts now, or "". It must read one of the
    `allowed` datasets without a note, or end with one line."""
    with redirect_stderr(io.StringIO()) as printed:
        try:
            found = read_dataset(folder)
        except UserError as e:
            return f"more than a line: {e}" if "\n" in str(e) else ""
        except Exception as e:
            return f"training ends in {e!r}"
    if printed.getvalue():
        return f"training guesses: {printed.getvalue()}"
    return "" if found in allowed else "training starts on another dataset"


def die_twice(
    data_dir: Path,
    texts: list[str],
    n: int,
    rng: random.Random,
    right: Path,
    allowed: list[Any],
) -> str:
    """Prepare `texts` and die before operation n, again before a random one, then prepare them
    again. Return the problem, or ""."""

    def die_at(n: int) -> Callable[[str], None]:
        calls = iter(range(1, n))
        return lambda _name: next(calls, None) is None and os._exit(DIED)

    for number, codes in ((n, (DIED,)), (rng.randint(1, n + 9), (DIED, 0))):
        code = prepare_texts(data_dir, texts, die_at(number))
        if code not in codes:
            return f"before operation {number}: exit code {code}"
        if problem := check_dataset(data_dir / "x", allowed):
            return f"before operation {number}: {problem}"
    if code := prepare_texts(data_dir, texts):
        return (
            f"the next preparation: exit code {code}, see {data_dir.with_name('log')}"
        )
    found, expected = (
        {path.name: path.read_bytes() for path in folder.glob("*")}
        for folder in (data_dir / "x", right)
    )
    return "" if found == expected else "the next preparation gives other files"


def prepare(part: Part, place: Path) -> str:
    """Die in preparations of one file and of shards, new and replacing another dataset."""
    data_dir, cases = place / "data", []

    def restore(i: int) -> None:
        shutil.rmtree(data_dir, ignore_errors=True)
        shutil.copytree(place / f"old{i}", data_dir)

    for i, change in enumerate(CHANGES):
        for folder, texts in zip((place / f"old{i}", place / f"new{i}"), change):
            folder.mkdir()
            if texts:
                prepare_texts(folder, texts)
        restore(i)
        before = ["", *list_operations(data_dir, change[1])]
        cases += [(i, n, before[n - 1]) for n in range(1, len(before))]
    for number in part.choose(
        [name in ("replace", "unlink") for *_, name in cases], few=100
    ):
        i, n, name = cases[number]
        restore(i)
        datasets = [
            read_dataset(place / f"{age}{i}" / "x")
            for age, texts in zip(("old", "new"), CHANGES[i])
            if texts
        ]
        problem = die_twice(
            data_dir,
            CHANGES[i][1],
            n,
            part.rng(number),
            place / f"new{i}" / "x",
            datasets,
        )
        part.count(number, problem and f"change {i}, after {name}: {problem}")
    return f"of {len(cases):,} operations of {len(CHANGES)} preparations"
