"""Measure the rows of each part of the benchmarks: bare numbers by the titles of their columns."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from keepgpt.checkpoint import Disk, commit, read_bundle
from keepgpt.config import TrainConfig
from keepgpt.device import peak_flops, pick_device
from keepgpt.errors import UserError
from keepgpt.files import write_atomically
from model import build_model
from tools import runs
from tools.bench import sides
from tools.common import REPO
from tools.measure import Row, call, compare, seconds

# a run without an evaluation or a save in between
TRAIN = {"gradient_accumulation_steps": 1, "eval_interval": 10**6, "eval_iters": 1}
RUN = {  # of the checks
    "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 8,
    "gradient_accumulation_steps": 2, "dropout": 0.1, "learning_rate": 3e-3, "warmup_iters": 4,
    "lr_decay_iters": 400, "max_iters": 400, "eval_interval": 200, "checkpoint_interval": 10,
    "eval_iters": 100,  # all windows, so an evaluation's last batch is smaller
    "log_interval": 5, "deterministic": True, "init_from": "auto"}


def train(name: str, device: str, folder: Path, ranks: int = 1, **settings: Any) -> list[float]:
    """Run train.py with a shape on random tokens. Return the seconds per step of each log line."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    settings = sides.SHAPES[name] | TRAIN | settings | {
        "device": device, "dataset": folder, "out_dir": out}
    vocab_size = settings.pop("vocab_size")
    tokens = np.random.default_rng(0).integers(vocab_size, size=2**20, dtype=np.uint16)
    for split in ("train", "val"):
        tokens.tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({
        "name": "random", "tokenizer": {"kind": "gpt2"}, "vocab_size": vocab_size,
        "dtype": "uint16", "tokens": {"train": len(tokens), "val": len(tokens)},
        "fingerprint": ""}))
    runs.run(settings, ranks)
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [TrainConfig(**settings).tokens_per_step / row["tokens_per_s"]
            for row in rows if "loss" in row]


def train_ours(name: str, device: str, folder: Path) -> float:
    """Return the seconds per step of train.py: the median of the last three quarters of a run."""
    steps = 40_000 // sides.SHAPES[name]["n_embd"]
    return median(train(name, device, folder, max_iters=steps, log_interval=steps // 4)[1:4])


def measure_step(name: str, rounds: int, device: str, folder: Path) -> Row:
    """Time a training step, against plain PyTorch and Transformers. MFU counts our model's
    FLOPs."""
    args = name, device
    row = compare(rounds, {
        "keepGPT": partial(train_ours, *args, folder),
        "plain PyTorch": partial(call, partial(sides.train_plain, *args)),
        "Transformers": partial(call, partial(sides.train_transformers, *args))})
    (settings, model_args), step = sides.make_settings(name), row["keepGPT, ms"] / 1e3
    if settings.optimizer == "muon":
        row["optimizer's share"] = call(partial(sides.time_optimizer, *args)) / step
    row["tokens/s"] = settings.tokens_per_step / step
    if peak := peak_flops(pick_device(device)):
        with torch.device("meta"):
            row["MFU"] = build_model(model_args).flops_per_token() * row["tokens/s"] / peak
    return row


def measure_sampling(name: str, rounds: int, device: str, _folder: Path) -> Row:
    """Time a token of one sequence, against Transformers; on CUDA also compiled."""
    works = {"keepGPT": sides.sample_ours, "Transformers": sides.sample_transformers}
    if pick_device(device).type == "cuda":
        works["keepGPT compiled"] = partial(sides.sample_ours, compile=True)
    row = compare(rounds, {side: partial(call, partial(work, name, device))
                           for side, work in works.items()})
    return row | {"tokens/s": 1e3 / row["keepGPT, ms"]}


def measure_save(name: str, rounds: int, device: str, folder: Path) -> Row:
    """Time a run that saves, by what its steps take beyond their median; and for the same
    checkpoint torch.save, our write, and one write and fsync of its bytes."""
    interval = 10 if pick_device(device).type == "cpu" else 400  # longer than a write
    times = defaultdict(list)
    for _ in range(rounds):
        steps = train(name, device, folder, max_iters=4 * interval, checkpoint_interval=interval)
        steps = steps[interval:]  # three saves start in these
        times["step"].append(median(steps))
        times["save"].append((sum(steps) - len(steps) * median(steps)) / 3)
        path = folder / "out" / "ckpt.pt"
        bundle = torch.load(path, map_location=pick_device(device), weights_only=True)
        content = path.read_bytes()
        for kind, work in (("plain", partial(torch.save, bundle, folder / "plain.pt")),
                           ("write", partial(commit, bundle, folder, 2, False, Disk())),
                           ("disk", partial(write_atomically, folder / "raw", content))):
            times[kind].append(seconds(work, torch.device("cpu")))
    t = {kind: median(values) for kind, values in times.items()}
    return {"checkpoint, MB": len(content) / 1e6, "step, ms": 1e3 * t["step"],
            "plain `torch.save` adds, s": t["plain"], "keepGPT's save adds, s": t["save"],
            "of training, saving every 100 steps, %": t["save"] / t["step"],
            "its write, s": t["write"], "the disk alone, s": t["disk"]}


def measure_elastic(ranks: int, rounds: int, _device: str, folder: Path) -> Row:
    """Time steps of DDP and of elastic=True on CPU ranks of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"

    def time_steps(elastic: bool) -> float:
        return median(train("6 layers, width 384", "cpu", folder, ranks, max_iters=6, batch_size=2,
                            gradient_accumulation_steps=8, elastic=elastic)[1:])

    return compare(rounds, {"DDP": partial(time_steps, False),
                            "elastic": partial(time_steps, True)})


def resume(_rounds: int, device: str, folder: Path, ranks: int = 1, **flags: object) -> Row:
    """Compare an uninterrupted run with one that is killed after a save and resumed. The first
    evaluates before it trains, the resumed one trains first."""
    whole, killed = folder / "whole", folder / "killed"
    flags = RUN | flags | {"device": device, "dataset": runs.prepare_source(folder)}
    runs.run(flags | {"out_dir": whole}, ranks)
    flags["out_dir"], code = killed, None
    pid = runs.start(flags, ranks)
    while code is None:
        code = runs.wait_for_exit(pid, 0.01)
        if code is None and (killed / "ckpt.pt").exists():
            os.kill(pid, signal.SIGKILL)
    if code != -signal.SIGKILL:
        raise UserError(f"exit code {code} before it was killed")
    runs.run(flags, ranks)
    if runs.read_end(whole) != runs.read_end(killed):
        raise UserError("an uninterrupted and a resumed run differ")
    return {"result": "bit-identical to an uninterrupted run"}


def blow_up(_rounds: int, device: str, folder: Path) -> Row:
    """Check that a learning rate of 1e30 gives exit code 3 and leaves finite checkpoints."""
    flags = RUN | {"device": device, "dataset": runs.prepare_source(folder),
                   "out_dir": folder / "out"}
    runs.run(flags | {"max_iters": 20}, ranks=1)
    runs.run(flags | {"learning_rate": 1e30, "grad_clip": 0, "checkpoint_interval": 1}, ranks=1,
             code=3)
    bundle = read_bundle(folder / "out" / "ckpt.pt")
    if not all(tensor.isfinite().all() for tensor in bundle["model"].values()):
        raise UserError("ckpt.pt is not finite")
    return {"result": f"exit code 3, ckpt.pt of step {bundle['step']} is finite"}


def compare_decode(_rounds: int, device: str, folder: Path) -> Row:
    """Compare a text by compiled decode steps with the text by plain ones."""
    flags = {"out_dir": folder / "out", "device": device}
    runs.run(RUN | flags | {"dataset": runs.prepare_source(folder)}, ranks=1)
    flags |= {"temperature": 0, "num_samples": 1, "max_new_tokens": 200, "dtype": "float32"}
    texts = [subprocess.run([sys.executable, "sample.py", f"--compile={compile}",
                             *runs.to_flags(flags)], cwd=REPO, capture_output=True, check=True
                            ).stdout for compile in (False, True)]
    if texts[0] != texts[1]:
        raise UserError("the texts of compiled and of plain decode steps differ")
    return {"result": "the same 200 tokens"}


PARTS: dict[str, dict[str, Callable[[int, str, Path], Row]]] = {
    "train": {name: partial(measure_step, name) for name in sides.SHAPES},
    "sample": {name: partial(measure_sampling, name) for name in
               ("4 layers, width 128", "6 layers, width 384", "GPT-2 124M")},
    "checkpoint": {name: partial(measure_save, name) for name in
                   ("6 layers, width 384", "GPT-2 124M")},
    "elastic": {f"ranks: {ranks}": partial(measure_elastic, ranks) for ranks in (1, 2, 4)},
    "checks": {
        "kill -9": partial(resume, dtype="bfloat16"),
        "kill -9, a save at each step": partial(
            resume, checkpoint_interval=1, max_iters=20, eval_iters=1, batch_size=1,
            gradient_accumulation_steps=1, compile=False, n_layer=8, n_embd=512),
        "kill -9, two ranks": partial(resume, ranks=2, backend="gloo"),
        "kill -9, elastic": partial(resume, elastic=True),
        "kill -9, float16": partial(resume, dtype="float16"),
        "kill -9, float32, not compiled": partial(resume, dtype="float32", compile=False),
        "a loss that is not finite": blow_up,
        "compiled decode steps": compare_decode}}


def measure_row(part: str, row: str, rounds: int, device: str) -> Row:
    """Measure a row in a temporary folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return PARTS[part][row](rounds, device, Path(folder))
