"""prepare: a preparation dies before each of its file operations; what is left trains right or is
refused, and the next preparation gives exactly the right files."""
import io
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import prepare as script
from keepgpt.dataset import BadData, read_meta
from keepgpt.loader import Split
from keepgpt.process import fail
from tools.crash.common import Part, exit_code

NOTHING, SHARDS = [], ["to be\n" * 40, "or not\n" * 30, "to\n"]
SINGLE = ["".join(map(chr, range(97, 497))) * 2]  # ids that could be GPT-2's tokens
# the existing dataset (no text: none), and the one that replaces it; each text is a shard
CHANGES = [(NOTHING, SINGLE), ([SINGLE[0][::-1]], SINGLE), (["short\n" * 5], SINGLE),
           (NOTHING, SHARDS), ([text.upper() for text in SHARDS], SHARDS), (SHARDS[::-1], SHARDS),
           (SINGLE, SHARDS), (SHARDS, SINGLE)]
CALLS = {open, os.open, os.close, os.replace, os.remove, os.unlink, os.mkdir, os.rmdir}
Count = Callable[[str], None]  # called with the name of a file operation, before it
DIED = 9


def prepare_texts(data_dir: Path, texts: list[str], count: Count | None = None) -> int:
    """Prepare `texts` as data_dir/x in a fork that calls `count` before each file operation; return
    its exit code."""
    def profile(_frame: Any, event: str, call: Any) -> None:
        if event == "c_call" and (call in CALLS or isinstance(call.__self__, io.IOBase)):
            count(call.__name__)

    def open_shards(*_args: Any) -> list[script.Shard]:
        return [script.Shard(lambda text=text: iter([io.StringIO(text)]), 0.25, 1)
                for text in texts]
    if pid := os.fork():
        return exit_code(pid)
    code = 1
    try:
        os.dup2(os.open(data_dir.with_name("log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        script.describe_source = lambda *_args: {"texts": texts}
        script.open_shards = open_shards
        # the real disk is not waited for: a process leaves the same to others without it
        os.fsync = lambda _file: count and count("fsync")
        settings = script.PrepareConfig("x", "char", 0.25, data_dir=str(data_dir), workers=1)
        sys.setprofile(profile if count else None)
        script.prepare(settings, {"tokenizer": "char"}, ["text"])
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def dies_at(n: int) -> Count:
    """Return a function that ends the process, as kill -9 does, when it is called the n-th time."""
    calls = iter(range(1, n))
    return lambda _name: next(calls, None) is None and os._exit(DIED)


def operations(data_dir: Path, texts: list[str]) -> list[str]:
    """Prepare `texts` and return the names of the file operations that this takes."""
    log = data_dir.with_name("operations")
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if code := prepare_texts(data_dir, texts, lambda name: os.write(handle, f"{name}\n".encode())):
        fail(f"an uninterrupted preparation ends with exit code {code}; see {data_dir.parent}/log")
    os.close(handle)
    return log.read_text().splitlines()


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def opened(folder: Path) -> tuple[dict[str, Any], list[bytes]] | str:
    """Return what training would read, meta.json and the tokens of both splits, or why it would not
    start."""
    try:
        meta, tokens = read_meta(folder), []
        for name in ("train", "val"):
            split = Split(folder, name, meta, block_size=1, seed=1, shift=True)
            tokens.append(split.read(0, split.ends[-1]))
        return meta, tokens
    except BadData as e:
        return str(e)


def wrong(data_dir: Path, allowed: list[Any]) -> str:
    """Return what is wrong with a training that starts now, or ""."""
    with redirect_stderr(io.StringIO()) as said:
        try:
            found = opened(data_dir / "x")
        except Exception as e:
            return f"training ends in {e!r}"
    if said.getvalue():
        return f"training guesses: {said.getvalue()}"
    if isinstance(found, str):
        return f"more than a line: {found!r}" * ("\n" in found)
    return "training starts on another dataset" * (found not in allowed)


def killed(data_dir: Path, texts: list[str], n: int, dice: random.Random, right: dict[str, bytes],
           allowed: list[Any]) -> str:
    """Prepare `texts`, die before operation n, then at a random one, then prepare them again.
    Return what is wrong, or ""."""
    for death, again in ((n, False), (dice.randint(1, n + 9), True)):
        code = prepare_texts(data_dir, texts, dies_at(death))
        if code not in ((DIED, 0) if again else (DIED,)):
            return f"preparation {1 + again} ends with exit code {code}"
        if problem := wrong(data_dir, allowed):
            return f"after kill {1 + again}, before operation {death}: {problem}"
    if code := prepare_texts(data_dir, texts):
        return f"the next preparation ends with exit code {code}, see {data_dir.parent}/log"
    return "the next preparation gives other files" * (files(data_dir / "x") != right)


def prepare(part: Part, place: Path) -> int:
    """Each operation of a preparation, of one file and of shards, new and replacing another."""
    older, data_dir, cases, results = place / "older", place / "data", [], []
    for i, change in enumerate(CHANGES):
        for folder, texts in zip((older / str(i), place / "new" / str(i)), change):
            folder.mkdir(parents=True)
            if texts:
                prepare_texts(folder, texts)
        shutil.rmtree(data_dir, ignore_errors=True)
        shutil.copytree(older / str(i), data_dir)
        before = ["", *operations(data_dir, change[1])]
        cases += [(i, n, before[n - 1]) for n in range(1, len(before))]
        results.append([opened(older / str(i) / "x"), opened(place / "new" / str(i) / "x")])
    for number in part.choose([name in ("replace", "unlink") for *_, name in cases], few=100):
        i, n, name = cases[number]
        shutil.rmtree(data_dir)
        shutil.copytree(older / str(i), data_dir)
        problem = killed(data_dir, CHANGES[i][1], n, part.dice(number),
                         files(place / "new" / str(i) / "x"), results[i])
        part.count(number, problem and f"change {i}, after {name}: {problem}")
    return part.end(f"of {len(cases):,} operations of {len(CHANGES)} preparations")
