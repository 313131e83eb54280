"""Write out_dir/README.md, which says how the weights beside it were made."""
import errno
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from keepgpt.config import TrainConfig
from keepgpt.process import write_atomically

STARTS = """## Starts

| when (UTC) | from step | command | commit | on | with |
|---|---|---|---|---|---|
"""
CARD = """# {name}: a run of keepGPT

{parameters:,} parameters, trained on `{data}`. `ckpt.pt` is the newest checkpoint and `best.pt` the
one with the lowest validation loss. Sample from it, or continue it:

    python sample.py --out_dir={out_dir}
    python train.py --init_from=resume --out_dir={out_dir}

## Settings

As of the last start. Saved as a config file, with another `out_dir`, they repeat the run.

```python
{settings}
```

## Data

{meta}

"""


def describe_code() -> str:
    """Return the commit of this code, and whether the code differs from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=, changed", "--exclude=*", "--abbrev=40"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10,
            check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not in git"


def describe_command() -> str:
    """Return this process's command in one line, with torchrun's sizes if it was started by it."""
    args = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if "LOCAL_WORLD_SIZE" in os.environ:
        args = ["torchrun", f"--nnodes={os.environ['GROUP_WORLD_SIZE']}",
                f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", *args]
    return " ".join(shlex.join(args).splitlines())


def write_card(config: TrainConfig, data: dict[str, Any], parameters: int, step: int,
               machine: str) -> None:
    """Write out_dir/README.md, with one more line about this start. Raises OSError, also for a
    README.md that is not a run's."""
    path, before = Path(config.out_dir) / "README.md", ""
    if path.exists():
        _, found, before = path.read_text(encoding="utf-8", errors="replace").partition(STARTS)
        if not found:
            raise FileExistsError(errno.EEXIST, "it is not about a run")
    meta = data | {"tokenizer": data["tokenizer"].get("name", data["tokenizer"]["kind"])}
    text = CARD.format(
        name=" ".join(config.out_dir.splitlines()), out_dir=shlex.quote(config.out_dir),
        parameters=parameters, data=data["name"],
        settings="\n".join(f"{key} = {value!r}" for key, value in asdict(config).items()),
        meta="\n".join(f"- {key}: {value}" for key, value in meta.items() if key != "files"))
    packages = (f"Python {platform.python_version()}, torch {torch.__version__}, "
                f"numpy {version('numpy')}")
    start = [f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}", str(step), f"`{describe_command()}`",
             describe_code(), machine, packages]
    row = " | ".join(cell.replace("|", "\\|") for cell in start)
    content = f"{text}{STARTS}{before}| {row} |\n"
    # a path may hold bytes that are not UTF-8
    write_atomically(path, content.encode(errors="surrogateescape"))
