"""Measurements, both sides in one run: `python -m tools.bench checkpoint`; --help lists the keys.

checkpoint: what a save adds to training, beside a plain torch.save in the loop, and the write
beside the disk alone.
"""
from dataclasses import dataclass

from configurator import command_line, fail, knob


@dataclass(frozen=True)
class BenchConfig:
    """The settings of the benchmarks."""
    rounds: int = knob(5, "medians are taken over so many rounds", least=1)
    folder: str = knob("",
        "where bundles are written; empty = a temporary folder on the default disk")
    device: str = knob("auto", "auto | cpu | cuda")
    only: str = knob("", "measure the model of this name alone: small | gpt2")


if __name__ == "__main__":  # before torch is loaded
    CONFIG, _, WORDS = command_line(BenchConfig, "python -m tools.bench checkpoint [--key=value]")

import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch

import checkpoint
from model import GPT, ModelArgs
from runtime import pick_device, pick_dtype

# what a model is; its batch; how many times the rounds, for a difference that is a few per cent
MODELS = {"small": (ModelArgs(6, 6, 384, 256, 65, False, 0.0), 16, 4),
          "gpt2": (ModelArgs(12, 12, 768, 1024, 50257, False, 0.0), 1, 1)}


def machine(device: torch.device) -> str:
    """What was measured on."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                   if line.startswith("model name"))
    gpu = torch.cuda.get_device_name(device) + ", " if device.type == "cuda" else ""
    return f"{gpu}{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def wait_for(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Training:
    """A model in training, as train.py does it, on random tokens."""

    def __init__(self, args: ModelArgs, batch_size: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model, self.device = GPT(args).to(device), device
        self.optimizer = self.model.optimizer(1e-3, (0.9, 0.95), 0.1)
        self.batch = torch.randint(args.vocab_size, (2, batch_size, args.block_size), device=device)
        dtype = pick_dtype("auto", device)
        self.autocast = (torch.autocast(device.type, dtype) if dtype != torch.float32
                         else nullcontext())
        self.fast = torch.compile(self.model) if device.type == "cuda" else self.model

    def step(self, before_update: Callable[[], None] = lambda: None) -> None:
        """One update."""
        with self.autocast:
            loss = self.fast(*self.batch)
        loss.backward()
        before_update()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def live(self, step: int) -> dict:
        """What a bundle is made of."""
        return {"format": checkpoint.FORMAT, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": step, "config": {},
                "model_args": vars(self.model.args), "best_val_loss": 0.0, "evaluation": {},
                "rng": [], "scaler": {}, "data": {}, "wandb_run_id": None}


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long it takes, the device's part included."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def raw_write(path: Path, size: int, block: bytes) -> None:
    """What the disk takes for so many bytes, with fsync."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for start in range(0, size, len(block)):
        os.write(file, block[:size - start])
    os.fsync(file)
    os.close(file)
    path.unlink()


def host_memory() -> int:
    """Bytes of host memory that this process holds."""
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bench_checkpoint(config: BenchConfig) -> None:
    """Blocks of steps without a save, with one of ours and with a plain torch.save, in turn."""
    device = pick_device(config.device)
    print(f"{machine(device)}\n\n"
          "| model | bundle | step | plain torch.save adds | keepGPT's save adds | "
          "of training, at a save every 100 steps | its write | the disk alone | "
          "host memory it takes |\n|---|---|---|---|---|---|---|---|---|")
    for name, (args, batch_size, times) in MODELS.items():
        if config.only in ("", name):
            with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
                print(checkpoint_row(name, Training(args, batch_size, device), Path(folder),
                                     config.rounds * times), flush=True)


def checkpoint_row(name: str, training: Training, folder: Path, rounds: int) -> str:
    """A row of the table, for one model."""
    device = training.device
    saver = checkpoint.Saver(folder, 2, 0.0, lambda: None, device)
    for i in range(3):
        training.step()
    memory = host_memory()
    saver.save(training.live(2), best=False)  # the first makes the memory that all use again
    saver.wait()
    memory = host_memory() - memory
    step = median(seconds(training.step, device) for _ in range(5))
    steps = 2 + round(
        1.5 * seconds(lambda: (saver.save(training.live(3), False), saver.wait()), device) / step)

    def block(save: Callable[[], None]) -> Callable[[], None]:
        def work() -> None:
            save()
            for _ in range(steps):
                training.step(saver.wait_for_copy)
            saver.wait()
        return work

    kinds = {"none": lambda: None, "keepGPT": lambda: saver.save(training.live(4), False),
             "plain": lambda: torch.save(training.live(4), folder / "plain.pt")}
    noise = os.urandom(1 << 24)
    times: dict[str, list[float]] = {kind: [] for kind in (*kinds, "write", "disk")}
    for _ in range(rounds):
        for kind, save in kinds.items():
            times[kind].append(seconds(block(save), device))
        size = (folder / "plain.pt").stat().st_size
        times["write"].append(
            seconds(lambda: (saver.save(training.live(5), False), saver.wait()), device))
        times["disk"].append(seconds(lambda: raw_write(folder / "raw", size, noise), device))
    t = {kind: median(values) for kind, values in times.items()}
    step, plain, ours = t["none"] / steps, t["plain"] - t["none"], t["keepGPT"] - t["none"]
    assert not saver.failed
    return (f"| {name} | {size / 1e6:,.0f} MB | {step * 1e3:,.0f} ms | {plain:.2f} s | "
            f"{ours:.2f} s ({ours / plain:.2f} x) | {ours / (100 * step):.2%} | "
            f"{t['write']:.2f} s | {t['disk']:.2f} s ({t['write'] / t['disk']:.2f} x) | "
            f"{memory / size:.2f} x the bundle |")


PARTS = {"checkpoint": bench_checkpoint}

if __name__ == "__main__":
    if len(WORDS) != 1 or WORDS[0] not in PARTS:
        fail(f"name what to measure: {' | '.join(PARTS)}")
    PARTS[WORDS[0]](CONFIG)
