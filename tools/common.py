"""What all tools share: the command line, and how far a run is."""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepgpt.config import command_line
from keepgpt.errors import run_or_exit
from keepgpt.signals import raise_interrupts

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class NoSettings:
    """The settings of a tool that takes only arguments."""


def run_tool(
    settings: type, usage: str, main: Callable[[Any, list[str]], int | None]
) -> None:
    """Call `main` with the settings and the arguments of the command line. Exit with the code that
    it returns, or with one line for a mistake."""
    config, _, args = command_line(settings, usage)
    # during the seconds of loading Ctrl-C ended the process; now tools clean up after it
    raise_interrupts(signal.SIGINT)
    sys.exit(run_or_exit(lambda: main(config, args)))


def read_log(out: Path) -> list[dict]:
    """Return the complete rows of metrics.jsonl; [] if there is none."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    # a row that is being written has no newline yet
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def last_step(out: Path) -> int:
    """Return the last step in metrics.jsonl; 0 for none."""
    rows = read_log(out)
    # rows are in the order of their steps, also after a resume
    return rows[-1]["step"] if rows else 0
