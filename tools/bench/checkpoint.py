"""checkpoint: what a save adds to training, beside a plain torch.save; the write beside the
disk."""
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

from keepgpt import checkpoint
from keepgpt.distributed import pick_device
from tools.bench.common import SHAPES, BenchConfig, host_memory, new_run, seconds
from train import Run, compute_gradient, update

# how many times the rounds: what a small save adds is a few per cent of the block it is measured in
ROWS = {"6 layers, 384 wide": 4, "GPT-2 124M": 1}


def raw_write(path: Path, content: memoryview) -> None:
    """What the disk takes for these bytes, with fsync."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for start in range(0, len(content), 1 << 24):
        os.write(file, content[start:start + (1 << 24)])
    os.fsync(file)
    os.close(file)


def measure(name: str, run: Run, folder: Path, rounds: int) -> dict[str, str]:
    """A row of the table, for one model."""
    device = run.ranks.device
    saver = checkpoint.Saver(folder, 2, 0.0, lambda: None, device)

    def steps(count: int) -> None:
        for _ in range(count):
            update(run, saver, compute_gradient(run))

    def save() -> None:
        saver.save(run.bundle(9.0), best=False)

    def save_and_wait() -> None:
        save()
        saver.wait()

    def block(begin: Callable[[], None]) -> None:
        begin()
        steps(count)
        saver.wait()

    steps(3)
    memory = host_memory()
    save_and_wait()  # the first makes the memory that all use again
    memory = host_memory() - memory
    step = median(seconds(lambda: steps(1), device) for _ in range(5))
    count = 2 + round(1.5 * seconds(save_and_wait, device) / step)
    kinds = {"none": lambda: None, "keepGPT": save,
             "plain": lambda: torch.save(run.bundle(9.0), folder / "plain.pt")}
    times: dict[str, list[float]] = {kind: [] for kind in (*kinds, "write", "disk")}
    for _ in range(rounds):
        for kind, begin in kinds.items():
            times[kind].append(seconds(lambda: block(begin), device))
        content = memoryview((folder / "plain.pt").read_bytes())
        times["write"].append(seconds(save_and_wait, device))
        (folder / "raw").unlink(missing_ok=True)
        times["disk"].append(seconds(lambda: raw_write(folder / "raw", content), device))
    t = {kind: median(values) for kind, values in times.items()}
    step, plain, ours = t["none"] / count, t["plain"] - t["none"], t["keepGPT"] - t["none"]
    assert not saver.failed
    size = len(content)
    return {"model": name, "bundle": f"{size / 1e6:,.0f} MB", "step": f"{step * 1e3:,.0f} ms",
            "plain torch.save adds": f"{plain:.2f} s",
            "keepGPT's save adds": f"{ours * 1e3:,.0f} ms ({ours / plain:.2f} x)",
            "of training, at a save every 100 steps": f"{ours / (100 * step):.2%}",
            "its write": f"{t['write']:.2f} s",
            "the disk alone": f"{t['disk']:.2f} s ({t['write'] / t['disk']:.2f} x)",
            "host memory it takes": f"{memory / size:.2f} x the bundle"}


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """Blocks of steps without a save, with one of ours and with a plain torch.save, in turn."""
    for name, times in ROWS.items():
        if config.only in ("", name):
            with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
                yield measure(name, new_run(SHAPES[name], pick_device(config.device)),
                              Path(folder), config.rounds * times)
