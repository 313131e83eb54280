"""Run benchmarks: `python -m tools.bench PART ...`; --help lists the settings.

    train       a training step, against plain PyTorch and Transformers
    sample      tokens of one sequence, against Transformers
    checkpoint  the cost of a save, against torch.save and the bare disk
    loader      batches from a file of 10 GB
    prepare     text to tokens, against tiktoken alone
    startup     time to the first step and to the first error message
    memory      peak memory of GPT-2 124M
    elastic     elastic=True against DDP, on several ranks

Prints a table for each: medians of alternating rounds. On a GPU use tools.gpu.
"""
from keepgpt.process import prepare_process

if __name__ == "__main__":  # before torch is loaded
    prepare_process()

import sys
from importlib import import_module
from pathlib import Path

from keepgpt.config import parse
from keepgpt.distributed import pick_device
from keepgpt.process import fail
from tools.bench.common import BenchConfig, Ended, machine, report

PARTS = ("train", "sample", "checkpoint", "loader", "prepare", "startup", "memory", "elastic")
NAMED_ROWS = ("train", "sample", "checkpoint")  # --only selects one


def main(config: BenchConfig, parts: list[str]) -> None:
    """Run the benchmarks and print each row when it is ready."""
    if not parts or set(parts) - set(PARTS):
        fail(f"expected one or more of {' | '.join(PARTS)}, got {' '.join(parts) or 'none'}")
    if config.only and set(parts) - set(NAMED_ROWS):
        fail(f"--only={config.only}: only {', '.join(NAMED_ROWS)} have named rows")
    if config.folder and not Path(config.folder).is_dir():
        fail(f"--folder={config.folder}: no such folder")
    try:
        if config.json:
            open(config.json, "a", encoding="utf-8").close()
    except OSError as e:
        fail(f"--json={config.json}: {e.strerror.lower()}")
    on = machine(pick_device(config.device))
    print(on)
    for part in parts:
        rows = import_module(f"tools.bench.{part}").bench(config)
        if not list(report(part, rows, on, config.json)):
            fail(f"--only={config.only}: {part} has no such row")


if __name__ == "__main__":
    CONFIG, _, ARGS = parse(BenchConfig, f"python -m tools.bench {' | '.join(PARTS)} "
                                         "[--key=value ...]", sys.argv[1:])
    try:
        main(CONFIG, ARGS)
    except Ended as e:
        fail(str(e))
