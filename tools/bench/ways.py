"""ways: a training step on CUDA with one thing changed: what deterministic=True costs, which
attention and which compiler mode is fast."""
from collections.abc import Iterator

from configurator import fail
from runtime import pick_device
from tools.bench.common import BenchConfig, Ended, Side, take_turns
from tools.bench.sides import WAYS

NAME = "GPT-2 124M, batch 16"


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """A row a way; all of them are held by the GPU at once."""
    device = pick_device(config.device)
    if device.type != "cuda":
        fail("ways compares what there is on CUDA alone")
    sides, (first, *_) = {}, WAYS
    for way in WAYS:
        if config.only in ("", way) or way == first:
            try:
                sides[way] = Side(f"train_in_a_way({way!r}, {NAME!r}, {str(device)!r})", True)
            except Ended:
                yield {"way": way, "step": "fails", "ratio": "-"}
    t = take_turns(sides, config.rounds)
    for way, took in t.items():
        yield {"way": way, "step": f"{took * 1e3:,.1f} ms",
               "ratio": f"{took / t[first]:.2f} x" if first in t else "-"}
