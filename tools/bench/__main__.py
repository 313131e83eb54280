"""Measure: `python -m tools.bench PART ... [--only=ROW]`, or rewrite the tables of the pages:
`python -m tools.bench tables`; --help lists the settings.

    train       a training step, against plain PyTorch and Transformers
    sample      tokens of one sequence, against Transformers
    checkpoint  the cost of a save, against torch.save and the bare disk
    elastic     elastic=True against DDP, on several ranks
    checks      not a measurement: is a killed run bit-identical on this device? See tools.gpu

Each row has a process of its own and holds medians; if one fails, the others continue and the exit
code is 1. Numbers go to docs/measured.json, and `tables` writes them to docs/BENCHMARKS.md and
docs/DISTRIBUTED.md. Files are in the temporary folder: TMPDIR=/mnt/x measures another disk.
"""
from dataclasses import dataclass
from functools import partial

from keepgpt.config import setting
from keepgpt.device import pick_device
from keepgpt.errors import UserError
from keepgpt.files import write_atomically
from tools import measure
from tools.bench.parts import PARTS, measure_row
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


def main(config: BenchConfig, args: list[str]) -> int:
    """Measure the parts, or rewrite the tables. Return the exit code. Raises UserError and
    OSError."""
    path, parts = REPO / config.json, args or config.parts.split(",")
    if parts == ["tables"]:
        for page in measure.PAGES:
            text = page.read_text(encoding="utf-8")
            write_atomically(page, measure.update_page(text, measure.read_records(path)).encode())
        return 0
    if not parts or set(parts) - set(PARTS):
        raise UserError(f"expected tables, or some of {', '.join(PARTS)}; "
                        f"got {' '.join(parts) or 'none'}")
    device = pick_device(config.device)
    cuda = device.type == "cuda"
    rows = {part: {name: partial(measure_row, part, name, config.rounds, config.device)
                   for name in PARTS[part]
                   if config.only in name and (cuda or ", batch " not in name)} for part in parts}
    if not any(rows.values()):
        raise UserError(f"--only={config.only}: no row of {', '.join(parts)} has that in its name")
    machine, passed = measure.describe_machine(device), True
    print(*machine.values(), sep=", ")
    for part in parts:
        # checks run in parallel, as they wait for compilers
        passed &= measure.run_rows(f"gpu {part}" if cuda else part, rows[part], path, machine,
                                   config.minutes, workers=6 if part == "checks" else 1)
    return 0 if passed else 1


if __name__ == "__main__":
    run_tool(BenchConfig, f"python -m tools.bench {' | '.join(PARTS)} | tables [--key=value ...]",
             main)
