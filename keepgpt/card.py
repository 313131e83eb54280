"""Write out_dir/README.md, which says how the weights beside it were made."""

import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from keepgpt.config import TrainConfig
from keepgpt.dataset import Meta
from keepgpt.errors import warn
from keepgpt.files import FolderLock, write_atomically

# everything after this line is kept
STARTS = "## Starts\n\n"
CARD = """# A run of keepGPT

`ckpt.pt` is the newest checkpoint and `best.pt` the one with the lowest validation loss. The
settings of the last start, saved as a config file with another `out_dir`, repeat the run.

```python
{settings}
```

Data: {data}

{notes}{starts}"""
START = "- {now:%Y-%m-%d %H:%M:%S} UTC, {start}: `{command}`; {code}; {versions}\n"


def write_card(
    config: TrainConfig, data: Meta, notes: list[str], start: str, lock: FolderLock
) -> None:
    """Write out_dir/README.md, with `notes` on the run, and with one more line about this `start`
    unless that is "". Raises OSError and FolderLost."""
    path = Path(config.out_dir) / "README.md"
    starts = STARTS
    if path.exists():
        _, found, before = path.read_text("utf-8", "surrogateescape").partition(STARTS)
        # someone's own text
        if not found:
            warn(f"{path} is not about a run, and is not replaced")
            return
        starts += before

    # the description of a tokenizer may hold its whole vocabulary
    tokenizer = data["tokenizer"].get("name", data["tokenizer"]["kind"])
    facts = {**data, "tokenizer": tokenizer}
    # checksums of files say nothing to a reader
    for key in ("files", "crc32", "sources"):
        facts.pop(key, None)
    settings = [f"{key} = {value!r}" for key, value in asdict(config).items()]
    if start:
        # one line, whatever the arguments hold
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        starts += START.format(
            now=datetime.now(UTC),
            start=start,
            command=" ".join(command.splitlines()),
            code=describe_code(),
            versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"numpy {np.__version__}",
        )
    text = CARD.format(
        settings="\n".join(settings),
        data=", ".join(f"{key} {value}" for key, value in facts.items()),
        notes="".join(f"{note}\n\n" for note in notes),
        starts=starts,
    )
    # a path may hold bytes that are not UTF-8
    write_atomically(path, text.encode(errors="surrogateescape"), lock)


def describe_code() -> str:
    """Return the commit of this program, and whether it was changed since."""
    command = "git describe --always --abbrev=40 --exclude=* '--dirty=, changed'"
    # a copy of the program may be without git, and git may be absent or hang
    try:
        commit = subprocess.check_output(
            shlex.split(command),
            cwd=Path(__file__).parent,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "not in git"
    return f"commit {commit.strip()}"
