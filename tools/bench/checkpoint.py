"""checkpoint: what a save adds to training, beside a plain torch.save; the write beside the
disk."""
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

import checkpoint
from runtime import pick_device
from tools.bench.common import SHAPES, BenchConfig, Training, host_memory, seconds

# how many times the rounds: what a small save adds is a few per cent of the block it is measured in
ROWS = {"6 layers, 384 wide": 4, "GPT-2 124M": 1}


def live(training: Training, step: int) -> dict:
    """What a bundle is made of."""
    return {"format": checkpoint.FORMAT, "run": "", "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(), "step": step, "config": {},
            "model_args": vars(training.model.args), "best_val_loss": 0.0, "evaluation": {},
            "rng": [], "scaler": {}, "data": {}, "wandb_run_id": None}


def raw_write(path: Path, content: memoryview) -> None:
    """What the disk takes for these bytes, with fsync."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for start in range(0, len(content), 1 << 24):
        os.write(file, content[start:start + (1 << 24)])
    os.fsync(file)
    os.close(file)


def measure(name: str, training: Training, folder: Path, rounds: int) -> dict[str, str]:
    """A row of the table, for one model."""
    device = training.device
    saver = checkpoint.Saver(folder, 2, 0.0, lambda: None, device)
    for i in range(3):
        training.step()
    memory = host_memory()
    saver.save(live(training, 2), best=False)  # the first makes the memory that all use again
    saver.wait()
    memory = host_memory() - memory
    step = median(seconds(training.step, device) for _ in range(5))
    steps = 2 + round(
        1.5 * seconds(lambda: (saver.save(live(training, 3), False), saver.wait()), device) / step)

    def block(save: Callable[[], None]) -> Callable[[], None]:
        def work() -> None:
            save()
            for _ in range(steps):
                training.step(saver.wait_for_copy)
            saver.wait()
        return work

    kinds = {"none": lambda: None, "keepGPT": lambda: saver.save(live(training, 4), False),
             "plain": lambda: torch.save(live(training, 4), folder / "plain.pt")}
    times: dict[str, list[float]] = {kind: [] for kind in (*kinds, "write", "disk")}
    for _ in range(rounds):
        for kind, save in kinds.items():
            times[kind].append(seconds(block(save), device))
        content = memoryview((folder / "plain.pt").read_bytes())
        times["write"].append(
            seconds(lambda: (saver.save(live(training, 5), False), saver.wait()), device))
        (folder / "raw").unlink(missing_ok=True)
        times["disk"].append(seconds(lambda: raw_write(folder / "raw", content), device))
    t = {kind: median(values) for kind, values in times.items()}
    step, plain, ours = t["none"] / steps, t["plain"] - t["none"], t["keepGPT"] - t["none"]
    assert not saver.failed
    size = len(content)
    return {"model": name, "bundle": f"{size / 1e6:,.0f} MB", "step": f"{step * 1e3:,.0f} ms",
            "plain torch.save adds": f"{plain:.2f} s",
            "keepGPT's save adds": f"{ours:.2f} s ({ours / plain:.2f} x)",
            "of training, at a save every 100 steps": f"{ours / (100 * step):.2%}",
            "its write": f"{t['write']:.2f} s",
            "the disk alone": f"{t['disk']:.2f} s ({t['write'] / t['disk']:.2f} x)",
            "host memory it takes": f"{memory / size:.2f} x the bundle"}


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """Blocks of steps without a save, with one of ours and with a plain torch.save, in turn."""
    for name, times in ROWS.items():
        if config.only in ("", name):
            with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
                yield measure(name, Training(SHAPES[name], pick_device(config.device)),
                              Path(folder), config.rounds * times)
