"""Measure the rows of each part of the benchmarks: bare numbers by the titles of their columns."""

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from keepgpt.checkpoint import Disk, commit
from keepgpt.config import TrainConfig
from keepgpt.device import peak_flops, pick_device
from keepgpt.files import write_atomically
from model import build_model
from tools import runs
from tools.bench import sides
from tools.common import read_log
from tools.measure import Row, call, compare, seconds

# a run without an evaluation or a save in between
TRAIN = {"gradient_accumulation_steps": 1, "eval_interval": 10**6, "eval_iters": 1}
# limits of PyTorch and of its library for matrix products
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
Measure = Callable[[int, str, Path], Row]  # (rounds, device, folder)
Parts = dict[str, dict[str, Measure]]


def write_random_dataset(folder: Path, vocab_size: int) -> None:
    """Write a dataset of 2**20 random tokens into a folder."""
    # speed does not depend on the text, and this needs no network
    tokens = np.random.default_rng(0).integers(vocab_size, size=2**20, dtype=np.uint16)
    for split in ("train", "val"):
        tokens.tofile(folder / f"{split}.bin")
    # as prepare.py writes it; nothing here decodes a token
    meta = {
        "name": "random",
        "tokenizer": {"kind": "gpt2"},
        "vocab_size": vocab_size,
        "dtype": "uint16",
        "tokens": {"train": len(tokens), "val": len(tokens)},
        "fingerprint": "",
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def train(
    name: str, device: str, folder: Path, ranks: int = 1, **settings: Any
) -> list[float]:
    """Run train.py with a shape on random tokens. Return the seconds per step of each log line."""
    out = folder / "out"
    # a run that resumed would measure fewer steps
    shutil.rmtree(out, ignore_errors=True)
    flags = sides.SHAPES[name] | TRAIN | settings
    flags |= {"device": device, "dataset": folder, "out_dir": out}
    write_random_dataset(folder, flags.pop("vocab_size"))
    runs.run(flags, ranks)

    # the log has tokens per second; rows of evaluations have none
    tokens = TrainConfig(**flags).tokens_per_step
    return [tokens / row["tokens_per_s"] for row in read_log(out) if "loss" in row]


def train_ours(name: str, device: str, folder: Path) -> float:
    """Return the seconds per step of train.py: the median of the last three quarters of a run."""
    steps = 40_000 // sides.SHAPES[name]["n_embd"]
    # the larger the model, the fewer steps; the first quarter warms up
    times = train(name, device, folder, max_iters=steps, log_interval=steps // 4)
    return median(times[1:4])


def measure_step(name: str, rounds: int, device: str, folder: Path) -> Row:
    """Time a training step, against plain PyTorch and Transformers. MFU counts our model's
    FLOPs."""
    # our side is train.py itself, the others are steps without a loader and a log
    row = compare(
        rounds,
        {
            "keepGPT": partial(train_ours, name, device, folder),
            "plain PyTorch": partial(call, partial(sides.train_plain, name, device)),
            "Transformers": partial(
                call, partial(sides.train_transformers, name, device)
            ),
        },
    )
    # each further column is ours alone
    step = row["keepGPT, ms"] / 1e3
    config, model_args = sides.make_settings(name)
    if config.optimizer == "muon":
        # Muon's update has matrix products of its own
        row["optimizer's share"] = (
            call(partial(sides.time_optimizer, name, device)) / step
        )
    row["tokens/s"] = config.tokens_per_step / step

    # the model on the meta device has shapes, and no memory
    peak = peak_flops(pick_device(device))
    if peak:
        with torch.device("meta"):
            flops = build_model(model_args).flops_per_token()
        row["MFU"] = flops * row["tokens/s"] / peak
    return row


def measure_avx2_step(name: str, rounds: int, device: str, folder: Path) -> Row:
    """Time a training step as on a CPU without AVX-512, where every side computes in float32."""
    # for the processes of all sides, which read them before their first operation
    os.environ |= AVX2
    return measure_step(name, rounds, device, folder)


def measure_sampling(name: str, rounds: int, device: str, _folder: Path) -> Row:
    """Time a token of one sequence, against Transformers."""
    works = {
        "keepGPT": partial(sides.sample_ours, name, device),
        "Transformers": partial(sides.sample_transformers, name, device),
    }
    row = compare(rounds, {side: partial(call, work) for side, work in works.items()})
    row["tokens/s"] = 1e3 / row["keepGPT, ms"]
    return row


def measure_save(name: str, rounds: int, device: str, folder: Path) -> Row:
    """Time a run that saves, by what its steps take beyond their median; and for the same
    checkpoint torch.save, our write, and one write and fsync of its bytes."""
    where = pick_device(device)
    # longer than a write takes, or saves would wait for each other
    interval = 10 if where.type == "cpu" else 400
    path = folder / "out" / "ckpt.pt"
    times = defaultdict(list)
    # each round has its own run, so all sides see the same state of the machine
    for _ in range(rounds):
        steps = train(
            name, device, folder, max_iters=4 * interval, checkpoint_interval=interval
        )
        # three saves start in these
        steps = steps[interval:]
        step = median(steps)
        times["step"].append(step)
        # the median step is one without a save; what exceeds it is the cost of saving
        times["save"].append((sum(steps) - len(steps) * step) / 3)

        # alternatives to that save, without a run beside them
        bundle = torch.load(path, map_location=where, weights_only=True)
        content = path.read_bytes()
        alternatives = {
            "plain": partial(torch.save, bundle, folder / "plain.pt"),
            "write": partial(commit, bundle, folder, 2, False, Disk()),
            "disk": partial(write_atomically, folder / "raw", content),
        }
        for kind, work in alternatives.items():
            times[kind].append(seconds(work, torch.device("cpu")))

    # titles are those in the tables of docs/BENCHMARKS.md
    medians = {kind: median(values) for kind, values in times.items()}
    return {
        "checkpoint, MB": len(content) / 1e6,
        "step, ms": 1e3 * medians["step"],
        "plain `torch.save` adds, s": medians["plain"],
        "keepGPT's save adds, s": medians["save"],
        "of training, saving every 100 steps, %": medians["save"] / medians["step"],
        "its write, s": medians["write"],
        "the disk alone, s": medians["disk"],
    }


def measure_elastic(ranks: int, rounds: int, _device: str, folder: Path) -> Row:
    """Time steps of DDP and of elastic=True on CPU ranks of one thread each."""
    # several ranks with a thread for each core would fight for the cores
    os.environ["OMP_NUM_THREADS"] = "1"

    def time_steps(elastic: bool) -> float:
        times = train(
            "6 layers, width 384",
            "cpu",
            folder,
            ranks,
            max_iters=6,
            batch_size=2,
            gradient_accumulation_steps=8,
            elastic=elastic,
        )
        # the first step has the costs of the start
        return median(times[1:])

    return compare(
        rounds,
        {
            "DDP": partial(time_steps, False),
            "elastic": partial(time_steps, True),
        },
    )


# the rows; a shape that has no place here is one that takes too long
SAMPLED = ("4 layers, width 128", "6 layers, width 384", "GPT-2 124M")
SAVED = ("6 layers, width 384", "GPT-2 124M")
# on a CPU only
LIMITED = ("4 layers, width 128", "6 layers, width 384")
PARTS: Parts = {
    "train": {
        **{name: partial(measure_step, name) for name in sides.SHAPES},
        **{f"{name}, AVX2": partial(measure_avx2_step, name) for name in LIMITED},
    },
    "sample": {name: partial(measure_sampling, name) for name in SAMPLED},
    "checkpoint": {name: partial(measure_save, name) for name in SAVED},
    "elastic": {
        f"ranks: {ranks}": partial(measure_elastic, ranks) for ranks in (1, 2, 4)
    },
}


def measure_row(work: Measure, rounds: int, device: str) -> Row:
    """Measure a row in a temporary folder of its own."""
    # runs and checkpoints of a row are gone with it
    with tempfile.TemporaryDirectory() as folder:
        return work(rounds, device, Path(folder))
