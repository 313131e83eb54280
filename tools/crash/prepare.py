"""prepare: prepare.py dies before each of its file operations. Training then reads a complete
dataset or is an error, and the next preparation gives exactly the right files."""

import io
import itertools
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
# ids that could be GPT-2's tokens
SINGLE = ["".join(map(chr, range(97, 497))) * 2]
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
# functions that change the disk, as methods of files also do
CALLS = {open, os.open, os.close, os.replace, os.remove, os.unlink, os.mkdir, os.rmdir}
# the exit code of a preparation that dies
DIED = 9
# a function that gets the name of the next operation
Before = Callable[[str], None]


def prepare_texts(
    data_dir: Path, texts: list[str], before: Before | None = None
) -> int:
    """Prepare `texts` as data_dir/x in a fork that calls `before` with the name of each file
    operation. Return its exit code."""

    def profile(_frame: Any, event: str, call: Any) -> None:
        if event != "c_call":
            return
        if call in CALLS or isinstance(call.__self__, io.IOBase):
            before(call.__name__)

    def fsync(_file: int) -> None:
        # do not wait for the real disk: a process leaves the same files to others without that
        if before:
            before("fsync")

    def work() -> None:
        # shards of these texts, instead of files to read
        shards = [
            script.Shard(lambda text=text: iter([io.StringIO(text)]), 1, 0.25)
            for text in texts
        ]
        script.describe_source = lambda *_args: {"texts": texts}
        script.open_shards = lambda *_args: shards
        os.fsync = fsync
        # each call of a C function, so no operation is missed
        if before:
            sys.setprofile(profile)
        config = script.PrepareConfig("x", "char", 0.25, data_dir=str(data_dir))
        script.prepare(config, {"tokenizer": "char"}, ["text"], ExitStack())

    return runs.wait_for_exit(runs.fork(work, data_dir.with_name("log")))


def list_operations(data_dir: Path, texts: list[str]) -> list[str]:
    """Prepare `texts` and return the names of its file operations. Raises UserError."""
    # through a file, because the preparation is another process
    path = data_dir.with_name("operations")
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    code = prepare_texts(
        data_dir, texts, lambda name: os.write(handle, f"{name}\n".encode())
    )
    os.close(handle)
    if code:
        raise UserError(
            f"an uninterrupted preparation: expected exit code 0, got {code}; see "
            f"{data_dir.with_name('log')}"
        )
    return path.read_text().splitlines()


def read_dataset(folder: Path) -> tuple[dict, list[bytes]]:
    """Return meta.json and the tokens of both splits, as training reads them. Raises UserError."""
    meta = read_meta(folder)
    tokens = []
    for name in ("train", "val"):
        split = Split(folder, name, meta, block_size=1, seed=1, shift=True)
        tokens.append(split.read(0, split.ends[-1]))
    return meta, tokens


def check_dataset(folder: Path, allowed: list[Any]) -> str:
    """Return the problem of a training run that starts now, or "". It must read one of the
    `allowed` datasets without a note, or end with one line."""
    # a note would mean that training had to guess
    with redirect_stderr(io.StringIO()) as printed:
        try:
            found = read_dataset(folder)
        except UserError as e:
            return f"more than a line: {e}" if "\n" in str(e) else ""
        # anything else would be a traceback
        except Exception as e:
            return f"training ends in {e!r}"
    if printed.getvalue():
        return f"training guesses: {printed.getvalue()}"
    return "" if found in allowed else "training starts on another dataset"


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in a folder, by its name."""
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def die_before(number: int) -> Before:
    """Return a function that ends the process in its call of that number, counted from 1."""
    calls = itertools.count(1)

    def die(_name: str) -> None:
        if next(calls) == number:
            os._exit(DIED)

    return die


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
    # the second attempt may have fewer operations than that, and be complete
    later = rng.randint(1, n + 9)
    for number, codes in ((n, [DIED]), (later, [DIED, 0])):
        code = prepare_texts(data_dir, texts, die_before(number))
        if code not in codes:
            return f"before operation {number}: exit code {code}"
        problem = check_dataset(data_dir / "x", allowed)
        if problem:
            return f"before operation {number}: {problem}"

    code = prepare_texts(data_dir, texts)
    if code:
        log = data_dir.with_name("log")
        return f"the next preparation: exit code {code}, see {log}"
    # also no file too many
    if read_files(data_dir / "x") != read_files(right):
        return "the next preparation gives other files"
    return ""


def prepare(part: Part, place: Path) -> str:
    """Die in preparations of one file and of shards, new and replacing another dataset."""
    data_dir = place / "data"

    def restore(i: int) -> None:
        shutil.rmtree(data_dir, ignore_errors=True)
        shutil.copytree(place / f"old{i}", data_dir)

    # a case is a change, the number of an operation, and the name of the one before it
    cases = []
    for i, (old, new) in enumerate(CHANGES):
        for age, texts in (("old", old), ("new", new)):
            folder = place / f"{age}{i}"
            folder.mkdir()
            if texts:
                prepare_texts(folder, texts)
        # the operations also depend on the dataset that is replaced
        restore(i)
        names = list_operations(data_dir, new)
        cases += [(i, n, name) for n, name in enumerate(["", *names[:-1]], 1)]

    # after these two names change; most others are writes
    is_rare = [name in ("replace", "unlink") for _, _, name in cases]
    for number in part.choose(is_rare, few=100):
        i, n, name = cases[number]
        # a killed run may read the old dataset or the new one, if there is an old one
        restore(i)
        right = place / f"new{i}" / "x"
        allowed = [read_dataset(right)]
        if CHANGES[i][0]:
            allowed.append(read_dataset(place / f"old{i}" / "x"))
        problem = die_twice(
            data_dir, CHANGES[i][1], n, part.rng(number), right, allowed
        )
        part.count(number, problem, f"change {i}, after {name}: ")
    return f"of {len(cases):,} operations of {len(CHANGES)} preparations"
