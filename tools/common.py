"""What all tools share: the command line, how far a run is, and the facts in its README.md."""

import ast
import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepgpt.config import Settings, TrainConfig, check, command_line
from keepgpt.errors import UserError, run_or_exit
from keepgpt.signals import raise_interrupts

REPO = Path(__file__).resolve().parents[1]
# lines of a run's README.md, as keepgpt/card.py and train.py write them
SETTINGS = re.compile(r"```python\n(.*?)\n```", re.DOTALL)
TRUNK = re.compile(r"^Branched from `(.*)`, step (\d+) \(", re.MULTILINE)
START = re.compile(r"^- (\S+ \S+) UTC, step (\d+)[^`]*: `(.*)`; ", re.MULTILINE)


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
    # an event may be about a step that is not made yet
    rows = [row for row in read_log(out) if "event" not in row]
    # rows are in the order of their steps, also after a resume
    return rows[-1]["step"] if rows else 0


@dataclass
class Start:
    """A start of a run: when, at which step, by which command."""

    time: str
    step: int
    command: str


@dataclass
class Card:
    """The facts in a run's README.md: its settings, its starts, and the trunk of a branch."""

    settings: Settings = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    trunk: dict[str, Any] = field(default_factory=dict)


def read_card(out: Path) -> Card:
    """Return the facts in README.md: none if it does not exist or someone else wrote it."""
    card = Card()
    path = out / "README.md"
    if not path.is_file():
        return card
    # a path in it may hold bytes that are not UTF-8
    about, _, starts = path.read_text("utf-8", "replace").partition("## Starts\n")
    # one line for each start
    for time, step, command in START.findall(starts):
        card.starts.append(Start(time, int(step), command))
    for trunk, step in TRUNK.findall(about):
        card.trunk = {"path": trunk, "step": int(step)}
    # the first block; notes below it may hold others
    for block in SETTINGS.findall(about)[:1]:
        card.settings = parse_settings(block)
    return card


def parse_settings(block: str) -> Settings:
    """Return the settings of a README.md; {} if someone has changed them."""
    settings = {}
    try:
        for line in block.splitlines():
            key, _, value = line.partition(" = ")
            value = ast.literal_eval(value)
            settings[key] = check(TrainConfig, key, value, "README.md")
    except (ValueError, SyntaxError, UserError):
        return {}
    return settings
