"""Measure: `python -m tools.bench PART ... [--only=ROW]`, or rewrite the tables of the pages:
`python -m tools.bench tables`; --help lists the settings.

    train       a training step, against plain PyTorch and Transformers
    sample      tokens of one sequence, against Transformers
    checkpoint  the cost of a save, against torch.save and the bare disk
    loader      batches from a file of 10 GB
    prepare     text to tokens, against tiktoken alone
    startup     time to the first step, to --help and to an error message
    memory      peak host memory of GPT-2 124M
    elastic     elastic=True against DDP, on several ranks

Sides alternate, and a row holds medians. Its numbers go to docs/measured.json, and
`tables` writes them to docs/BENCHMARKS.md and docs/DISTRIBUTED.md.
"""
import sys
from pathlib import Path

from keepgpt.config import parse
from keepgpt.distributed import pick_device
from keepgpt.process import UserError, exit_with, write_atomically
from tools import measure
from tools.bench import parts as bench


def main(config: bench.BenchConfig, parts: list[str]) -> int:
    """Measure the parts, or rewrite the tables. Return the exit code. Raises UserError and
    OSError."""
    path = measure.REPO / config.json
    if parts == ["tables"]:
        records = measure.read_records(path)
        for page in measure.PAGES:
            text = measure.update_page(page.read_text(encoding="utf-8"), records)
            write_atomically(page, text.encode())
        return 0
    if not parts or set(parts) - set(bench.PARTS):
        raise UserError(f"expected tables, or some of {', '.join(bench.PARTS)}; "
                        f"got {' '.join(parts) or 'none'}")
    if config.folder and not Path(config.folder).is_dir():
        raise UserError(f"--folder={config.folder}: no such folder")
    calls = {part: bench.list_calls(part, config) for part in parts}
    machine = measure.describe_machine(pick_device(config.device))
    print(*machine.values(), sep=", ")
    passed = [measure.run_rows(part, calls[part], path, machine, minutes=10_000) for part in parts]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    try:
        usage = f"python -m tools.bench {' | '.join(bench.PARTS)} | tables [--key=value ...]"
        CONFIG, _, ARGS = parse(bench.BenchConfig, usage, sys.argv[1:])
        sys.exit(main(CONFIG, ARGS))
    except UserError as e:
        exit_with(e)
    except OSError as e:
        exit_with(UserError(str(e)))
