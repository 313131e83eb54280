"""checkpoint: the cost of a save, against torch.save; the write, against the disk."""
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch

from keepgpt import checkpoint
from keepgpt.distributed import pick_device
from tools.bench.common import SHAPES, BenchConfig, host_memory, new_run, seconds
from train import Run, compute_gradient, update

# factors on the rounds: a small save adds only a few percent to the steps it is measured with
ROWS = {"6 layers, 384 wide": 4, "GPT-2 124M": 1}


def raw_write(path: Path, content: memoryview) -> None:
    """Write these bytes with one fsync."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for start in range(0, len(content), 1 << 24):
        os.write(file, content[start:start + (1 << 24)])
    os.fsync(file)
    os.close(file)


def measure(name: str, run: Run, folder: Path, rounds: int) -> dict[str, str]:
    """Return the row of one model."""
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

    def block(start_save: Callable[[], None]) -> None:
        start_save()
        steps(count)
        saver.wait()

    steps(3)
    memory = host_memory()
    save_and_wait()  # the first one allocates the memory for all
    memory = host_memory() - memory
    step = median(seconds(lambda: steps(1), device) for _ in range(5))
    count = 2 + round(1.5 * seconds(save_and_wait, device) / step)
    kinds = {"none": lambda: None, "keepGPT": save,
             "plain": lambda: torch.save(run.bundle(9.0), folder / "plain.pt")}
    times: dict[str, list[float]] = {kind: [] for kind in (*kinds, "write", "disk")}
    for _ in range(rounds):
        for kind, start_save in kinds.items():
            times[kind].append(seconds(partial(block, start_save), device))
        content = memoryview((folder / "plain.pt").read_bytes())
        times["write"].append(seconds(save_and_wait, device))
        (folder / "raw").unlink(missing_ok=True)
        times["disk"].append(seconds(partial(raw_write, folder / "raw", content),
                                     device))
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
    """Time blocks of steps without a save, with ours and with torch.save, alternating."""
    for name, times in ROWS.items():
        if config.only in ("", name):
            with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
                yield measure(name, new_run(SHAPES[name], pick_device(config.device)),
                              Path(folder), config.rounds * times)
