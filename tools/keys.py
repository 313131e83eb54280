"""Write the tables of docs/KEYS.md from the settings in keepgpt/config.py: `python -m tools.keys`.

The text above the first table is kept.
"""

from dataclasses import dataclass, fields

from keepgpt.config import TrainConfig, setting
from keepgpt.errors import UserError
from keepgpt.files import write_atomically
from tools.common import REPO, run_tool

PAGE = REPO / "docs" / "KEYS.md"
START = "<!-- the rest is written by python -m tools.keys -->\n"
# the first key of each section
SECTIONS = {
    "out_dir": "The run",
    "dataset": "The data",
    "n_layer": "The model",
    "optimizer": "The optimizer and its schedule",
    "eval_interval": "Evaluating, logging and saving",
    "device": "The machine",
}


# a copy, for a test, leaves the page as it is
@dataclass(frozen=True)
class KeysConfig:
    """The settings of tools.keys."""

    to: str = setting("docs/KEYS.md", "the file to write")


def format_tables() -> str:
    """Return a heading and a table for each section."""
    lines = []
    # in the order of the settings, which --help has too
    for f in fields(TrainConfig):
        if f.name in SECTIONS:
            lines += [
                "",
                f"## {SECTIONS[f.name]}",
                "",
                "| key | default | |",
                "|---|---|---|",
            ]
        # a bar would end the cell
        why = f.metadata["why"].replace("|", "\\|")
        lines.append(f"| `{f.name}` | `{f.default}` | {why} |")
    return "\n".join(lines) + "\n"


def main(config: KeysConfig, args: list[str]) -> None:
    """Write the page. Raises UserError and OSError."""
    if args:
        raise UserError(f"expected no arguments, got {' '.join(args)}")
    # the text above the tables is written by hand
    text, start, _ = PAGE.read_text(encoding="utf-8").partition(START)
    write_atomically(REPO / config.to, (text + start + format_tables()).encode())


if __name__ == "__main__":
    run_tool(KeysConfig, "python -m tools.keys [--to=docs/KEYS.md]", main)
