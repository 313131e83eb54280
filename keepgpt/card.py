"""Write out_dir/README.md, which says how the weights beside it were made."""

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepgpt.config import TrainConfig
from keepgpt.errors import warn
from keepgpt.files import FolderLock, write_atomically

STARTS = "## Starts\n\n"
CARD = """# A run of keepGPT

`ckpt.pt` is the newest checkpoint and `best.pt` the one with the lowest validation loss. The
settings of the last start, saved as a config file with another `out_dir`, repeat the run.

```python
{settings}
```

Data: {data}

{starts}- {now:%Y-%m-%d %H:%M:%S} UTC, step {step}: `{command}`; {code}; {machine}; {versions}
"""


def write_card(
    config: TrainConfig, data: dict[str, Any], step: int, machine: str, lock: FolderLock
) -> None:
    """Write out_dir/README.md, with one more line about this start. Raises OSError and
    FolderLost."""
    path, starts = Path(config.out_dir) / "README.md", STARTS
    if path.exists():
        _, found, before = path.read_text("utf-8", "surrogateescape").partition(STARTS)
        if not found:
            warn(f"{path} is not about a run, and is not replaced")
            return
        starts += before
    code = "not in git"
    with suppress(OSError, subprocess.SubprocessError):
        code = (
            "commit "
            + subprocess.run(
                [
                    "git",
                    "describe",
                    "--always",
                    "--dirty=, changed",
                    "--exclude=*",
                    "--abbrev=40",
                ],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=10,
                check=True,
            ).stdout.strip()
        )
    tokenizer = data["tokenizer"].get("name", data["tokenizer"]["kind"])
    text = CARD.format(
        settings="\n".join(
            f"{key} = {value!r}" for key, value in asdict(config).items()
        ),
        data=", ".join(
            f"{key} {value}"
            for key, value in (data | {"tokenizer": tokenizer}).items()
            if key not in ("files", "crc32")
        ),
        starts=starts,
        now=datetime.now(UTC),
        step=step,
        command=" ".join(
            shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).splitlines()
        ),
        code=code,
        machine=machine,
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}",
    )
    # a path may hold bytes that are not UTF-8
    write_atomically(path, text.encode(errors="surrogateescape"), lock)
