"""loader: batches for GPT-2 124M from a sparse .bin file of 10 GB, at distant steps."""
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from keepgpt.distributed import pick_device
from keepgpt.loader import Loader, Split
from tools.bench.common import SHAPES, BenchConfig, host_memory, seconds
from tools.bench.sides import train_ours

SIZE = 10 * 10**9  # bytes


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """Yield a row per step to resume at."""
    device = pick_device(config.device)
    shape = SHAPES["GPT-2 124M"]
    work = train_ours("GPT-2 124M", str(device))
    step = median(work() for _ in range(config.rounds))
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        path = Path(folder) / "train.bin"
        path.touch()
        os.truncate(path, SIZE)
        meta = {"dtype": "uint16", "vocab_size": 50257, "tokens": {"train": SIZE // 2}}
        for at in (0, 10**4, 10**6):
            def first(at: int = at) -> Loader:
                split = Split(Path(folder), "train", meta, shape.args.block_size, 1337, shift=True)
                loader = Loader(split, shape.batch_size, 40, range(40), device)
                next(loader.step(at))
                return loader
            opened = seconds(first, device)
            loader = first()
            read = median(seconds(partial(loader.read, at, m), device) for m in range(40))
            before = host_memory()
            for some in range(at + 1, at + 26):
                for _ in loader.step(some):
                    pass
            yield {"resumed at step": f"{at:,}", "first batch": f"{opened * 1e3:.1f} ms",
                          "a micro-batch": f"{read * 1e6:.0f} us",
                          "of a training step": f"{read / step:.3%}",
                          "memory grown after 1,000": f"{(host_memory() - before) / 1e6:.1f} MB"}
