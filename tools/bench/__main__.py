"""Measure: `python -m tools.bench PART ... [--only=ROW]`, or rewrite the tables of the pages:
`python -m tools.bench tables`; --help lists the settings.

    train       a training step, against plain PyTorch and Transformers
    sample      tokens of one sequence, against Transformers
    checkpoint  the cost of a save, against torch.save and the bare disk
    elastic     elastic=True against DDP, on several ranks

Each row has a process of its own and holds medians; if one fails, the others continue and the exit
code is 1. Numbers go to docs/measured.json, and `tables` writes them to docs/BENCHMARKS.md and
docs/DISTRIBUTED.md. Files are in the temporary folder: TMPDIR=/mnt/x measures another disk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from keepgpt.config import setting
from keepgpt.device import pick_device
from keepgpt.errors import UserError
from keepgpt.files import write_atomically
from tools import measure
from tools.bench.parts import PARTS, Parts, measure_row
from tools.common import REPO, run_tool


@dataclass(frozen=True)
class BenchConfig:
    """The settings of the benchmarks."""

    rounds: int = setting(5, "number of rounds; tables show medians", least=1)
    only: str = setting("", "only rows whose name contains this")
    device: str = setting("auto", "auto | cpu | cuda")
    minutes: float = setting(600, "time limit of each part", least=0)
    parts: str = setting("", "the parts, separated by commas, instead of arguments")
    json: str = setting("docs/measured.json", "the file to record the numbers in")


def write_tables(path: Path) -> None:
    """Rewrite the tables of the pages from the records. Raises OSError."""
    # numbers stand in one file, so a page can't disagree with its records
    records = measure.read_records(path)
    for page in measure.PAGES:
        text = page.read_text(encoding="utf-8")
        write_atomically(page, measure.update_page(text, records).encode())


def select_rows(
    config: BenchConfig, names: list[str], parts: Parts, cuda: bool
) -> dict[str, dict[str, Callable[[], measure.Row]]]:
    """Return the work of the rows to measure, by part and row. Raises UserError if there is
    none."""
    # a partial, because the work goes to another process
    selected = {}
    for part in names:
        selected[part] = {
            row: partial(measure_row, work, config.rounds, config.device)
            for row, work in parts[part].items()
            # larger batches are too slow without a GPU, which has no AVX2
            if config.only in row and (", AVX2" if cuda else ", batch ") not in row
        }
    if not any(selected.values()):
        raise UserError(
            f"--only={config.only}: no row of {', '.join(names)} has that in its name"
        )
    return selected


def main(config: BenchConfig, args: list[str], parts: Parts = PARTS) -> int:
    """Measure the parts, or rewrite the tables. Return the exit code. Raises UserError and
    OSError."""
    # tools.gpu gives the parts as a setting, a person as arguments
    path = REPO / config.json
    names = args or config.parts.split(",")
    if names == ["tables"]:
        write_tables(path)
        return 0
    # without any part, names is [""]
    if not parts.keys() >= set(names):
        raise UserError(
            f"expected tables, or some of {', '.join(parts)}; "
            f"got {' '.join(names) or 'none'}"
        )

    # before the first row: a mistake is answered at once
    device = pick_device(config.device)
    cuda = device.type == "cuda"
    rows = select_rows(config, names, parts, cuda)
    machine = measure.describe_machine(device)
    print(*machine.values(), sep=", ")
    code = 0
    for part in names:
        # numbers of a GPU do not replace those of a CPU
        title = f"gpu {part}" if cuda else part
        # checks wait for compilers, so they run in parallel; the others measure time
        workers = 6 if part == "checks" else 1
        if not measure.run_rows(
            title, rows[part], path, machine, config.minutes, workers
        ):
            code = 1
    return code


if __name__ == "__main__":
    run_tool(
        BenchConfig,
        f"python -m tools.bench {' | '.join(PARTS)} | tables [--key=value ...]",
        main,
    )
