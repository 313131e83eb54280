"""Measurements, both sides in one run: `python -m tools.bench PART ...`; --help lists the keys.

    train       a training step, beside plain PyTorch and Transformers
    sample      tokens of one sequence, beside Transformers
    checkpoint  what a save adds to training, beside a plain torch.save and the bare disk
    loader      batches out of a file of 10 GB
    prepare     text to tokens, beside tiktoken alone
    startup     to the first step, and to the first answer
    memory      the most that GPT-2 124M takes
    elastic     elastic=True beside DDP, on several ranks
    ways        a training step on CUDA with one thing changed

Prints a table for each, medians of interleaved rounds.
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

PARTS = ("train", "sample", "checkpoint", "loader", "prepare", "startup", "memory",
         "elastic", "ways")
WITH_ROWS = ("train", "sample", "checkpoint", "ways")  # of which --only names one


def main(config: BenchConfig, words: list[str]) -> None:
    """Measure the parts that are named, and print each row as it comes."""
    if not words or set(words) - set(PARTS):
        fail(f"name what to measure: {' | '.join(PARTS)}")
    if config.only and set(words) - set(WITH_ROWS):
        fail(f"--only={config.only}: only {', '.join(WITH_ROWS)} have rows with names")
    if config.folder and not Path(config.folder).is_dir():
        fail(f"--folder={config.folder} is no folder")
    try:
        if config.json:
            open(config.json, "a", encoding="utf-8").close()
    except OSError as e:
        fail(f"--json={config.json}: {e.strerror.lower()}")
    on = machine(pick_device(config.device))
    print(on)
    for part in words:
        rows = import_module(f"tools.bench.{part}").bench(config)
        if not list(report(part, rows, on, config.json)):
            fail(f"--only={config.only}: {part} has no such row on this device")


if __name__ == "__main__":
    CONFIG, _, WORDS = parse(BenchConfig, f"python -m tools.bench {' | '.join(PARTS)} "
                                          "[--key=value ...]", sys.argv[1:])
    try:
        main(CONFIG, WORDS)
    except Ended as e:
        fail(str(e))
