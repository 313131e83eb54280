"""The card of a run: out_dir/README.md says how the weights beside it were made, for someone who
finds them a year later."""
import errno
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from keepgpt.config import TrainConfig
from keepgpt.process import write_atomically

REPO = Path(__file__).parents[1]
STARTS = """| when (UTC) | from step | command | commit | on | with |
|---|---|---|---|---|---|
"""
CARD = """# {name}: a run of keepGPT

A GPT of {parameters:,} parameters ({n_layer} layers, {n_embd} wide, {n_head} heads, blocks of
{block_size} tokens), trained on {tokens:,} tokens of `{data}`. `metrics.jsonl` holds the curves,
`ckpt.pt` the newest bundle, `best.pt` the one with the lowest validation loss; from the
repository's folder

    python sample.py --out_dir={quoted}
    python train.py --init_from=resume --out_dir={quoted}

continue a text and the run.

## Settings

As of the last start; what a resume has changed stands in its command below. As a config file,
with an `--out_dir` of its own, they begin the run anew.

```python
{settings}
```

## Data

`{data}`: {tokens:,} train and {val_tokens:,} val tokens of {tokenizer}, {vocab_size:,} in the
vocabulary. Fingerprint of its files: `{fingerprint}`.
{source}

## Starts

"""


def commit() -> str:
    """The commit of this code, and whether it was changed since."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=, changed", "--exclude=*", "--abbrev=40"],
            cwd=REPO, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not in git"


def packages() -> str:
    """The versions of what computes."""
    # torch's own version also names its build (+cpu, +cu124), which its package's does not always
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("numpy", "tiktoken"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def command() -> str:
    """The command of this process, as one line; behind torchrun with what that was told."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if "LOCAL_WORLD_SIZE" in os.environ:
        words = ["torchrun", f"--nnodes={os.environ['GROUP_WORLD_SIZE']}",
                 f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", *words]
    return " ".join(shlex.join(words).split("\n"))


def write_card(config: TrainConfig, data: dict[str, Any], parameters: int, step: int,
               machine: str) -> None:
    """Write out_dir/README.md anew, with one more line about this start. Raises OSError, also for
    a README.md that is not a run's."""
    path, before = Path(config.out_dir) / "README.md", ""
    if path.exists():
        _, ours, before = path.read_text(encoding="utf-8", errors="replace").partition(STARTS)
        if not ours:
            raise FileExistsError(errno.EEXIST, "it is not about a run")
    start = [f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}", str(step),
             f"`{command()}`", commit(), machine, packages()]
    settings = asdict(config)
    source = data.get("source", {})
    text = CARD.format_map(settings | {
        "name": " ".join(config.out_dir.split("\n")), "quoted": shlex.quote(config.out_dir),
        "parameters": parameters, "data": data["name"],
        "settings": "\n".join(f"{key} = {value!r}" for key, value in settings.items()),
        "tokens": data["tokens"]["train"], "val_tokens": data["tokens"]["val"],
        "tokenizer": data["tokenizer"].get("name", data["tokenizer"]["kind"]),
        "vocab_size": data["vocab_size"], "fingerprint": data["fingerprint"],
        "source": "".join(f"\n- {key}: {value}" for key, value in source.items())})
    row = " | ".join(cell.replace("|", "\\|") for cell in start)
    content = f"{text}{STARTS}{before}| {row} |\n"
    # a path may hold bytes that are not UTF-8
    write_atomically(path, content.encode(errors="surrogateescape"))



