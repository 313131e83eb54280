"""Settings, models, timing and alternating processes for the benchmarks."""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from keepgpt.config import TrainConfig, setting
from keepgpt.distributed import Ranks, pick_dtype
from keepgpt.loader import Loader, Split
from model import GPT, ModelArgs
from train import Run, build_run

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class BenchConfig:
    """The settings of the benchmarks."""
    rounds: int = setting(5, "number of rounds; tables show medians", least=1)
    folder: str = setting("", "folder for files; empty = a temporary one")
    device: str = setting("auto", "auto | cpu | cuda")
    only: str = setting("", "only the row of this name")
    json: str = setting("", "append the rows to this file as JSON lines")


@dataclass(frozen=True)
class Shape:
    """A model and its micro-batch."""
    args: ModelArgs
    batch_size: int
    cuda: bool = False  # too large for a CPU


GPT2 = ModelArgs(12, 12, 768, 1024, 50257, False, 0.0)
GPT2_MEDIUM = ModelArgs(24, 16, 1024, 1024, 50257, False, 0.0)
SHAPES = {
    "4 layers, 128 wide": Shape(ModelArgs(4, 4, 128, 64, 65, False, 0.0), 12),
    "6 layers, 384 wide": Shape(ModelArgs(6, 6, 384, 256, 65, False, 0.0), 16),
    "6 layers, dropout 0.2": Shape(ModelArgs(6, 6, 384, 256, 65, False, 0.2), 16),
    "GPT-2 124M": Shape(GPT2, 1),
    **{f"GPT-2 124M, batch {batch}": Shape(GPT2, batch, cuda=True) for batch in (16, 32, 64)},
    **{f"GPT-2 350M, batch {batch}": Shape(GPT2_MEDIUM, batch, cuda=True) for batch in (8, 16, 32)},
}


def machine(device: torch.device) -> str:
    """Describe the machine."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                   if line.startswith("model name"))
    gpu = torch.cuda.get_device_name(device) + ", " if device.type == "cuda" else ""
    bf16 = ", bfloat16" if pick_dtype("auto", device) == torch.bfloat16 else ""
    return f"{gpu}{cpu}, {torch.get_num_threads()} threads{bf16}, torch {torch.__version__}"


def report(part: str, rows: Iterable[dict[str, str]], on: str, file: str
           ) -> Iterator[dict[str, str]]:
    """Print each row of a table when it is ready, append it to `file` unless empty, and yield
    it."""
    header = None
    for row in rows:
        if header != list(row):
            header = list(row)
            print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
        print("|", " | ".join(row.values()), "|", flush=True)
        if file:
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"part": part, "machine": on} | row) + "\n")
        yield row


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that `work` takes, including its work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def host_memory() -> int:
    """Return the bytes of host memory of this process."""
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PEAKS = """
import atexit, sys
def peaks():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    gpu = sys.modules["torch"].cuda.max_memory_allocated() if "torch" in sys.modules else 0
    print("peaks", int(status["VmHWM"].split()[0]) * 1024, gpu)
atexit.register(peaks)
"""


def peak_memory(program: str, *args: object) -> tuple[int, int]:
    """Run a Python program; return its peak bytes of host and of device memory. (Linux's ru_maxrss
    includes the parent's.)"""
    done = subprocess.run([sys.executable, "-c", PEAKS + program, *map(str, args)], cwd=REPO,
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    host, gpu = done.stdout.splitlines()[-1].split()[1:]
    return int(host), int(gpu)


def new_run(shape: Shape, device: torch.device, **settings: Any) -> Run:
    """Return a run of train.py on random tokens, with one micro-batch per step and no out_dir."""
    args = shape.args
    config = TrainConfig(batch_size=shape.batch_size, block_size=args.block_size,
                         gradient_accumulation_steps=1, **settings)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    tokens = np.random.default_rng(0).integers(args.vocab_size, size=2**20, dtype=np.uint16)
    meta = {"dtype": "uint16", "vocab_size": args.vocab_size, "tokens": {"train": len(tokens)}}
    with tempfile.TemporaryDirectory() as folder:  # the file stays open
        tokens.tofile(f"{folder}/train.bin")
        shifted, fixed = (Split(Path(folder), "train", meta, args.block_size, 0, shift)
                          for shift in (True, False))
    loader = Loader(shifted, shape.batch_size, 1, range(1), device)
    return build_run(config, Ranks(0, 1, device), {}, loader, {"train": fixed, "val": fixed},
                     GPT(args))


class Ended(Exception):
    """A side's process has ended with an error."""


class Side:
    """One side of a comparison, in its own process: `calls` is a Python expression that gives a
    function; that does the work once and returns its seconds."""

    def __init__(self, calls: str, as_script: bool) -> None:
        """Start the process, prepared like keepGPT's scripts if `as_script`."""
        prepare = "from keepgpt.process import prepare_process\nprepare_process()\n"
        program = ("import sys\n" + (prepare if as_script else "")
                   + f"from tools.bench.sides import *\nwork = {calls}\n"
                   "print(0.0, flush=True)\n"
                   "for _ in sys.stdin:\n    print(work(), flush=True)\n")
        self.calls = calls
        self.process = subprocess.Popen([sys.executable, "-c", program], cwd=REPO, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answer()

    def answer(self) -> float:
        """Return the next number it prints. Raises Ended."""
        if not (line := self.process.stdout.readline()):
            raise Ended(f"{self.calls} has ended with exit code {self.process.wait()}")
        return float(line)

    def turn(self) -> float:
        """Let it work once; return its seconds."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def start_sides(ours: Side, **peers: str) -> dict[str, Side]:
    """Return the sides by name: ours, and the peers that are installed."""
    sides = {"ours": ours}
    for name, calls in peers.items():
        with suppress(Ended):
            sides[name] = Side(calls, as_script=False)
    return sides


def take_turns(sides: dict[str, Side], rounds: int) -> dict[str, float]:
    """Return each side's median seconds; the sides alternate."""
    try:
        for side in sides.values():
            side.turn()  # to warm up
        times = [{name: side.turn() for name, side in sides.items()} for _ in range(rounds)]
    finally:
        for side in sides.values():
            side.end()
    return {name: median(row[name] for row in times) for name in sides}
