"""ways: a training step on CUDA with one thing changed: what deterministic=True costs, which attention
and which compiler mode is fast."""
from collections.abc import Iterator

from configurator import fail
from runtime import pick_device
from tools.bench.common import BenchConfig, Side, take_turns
from tools.bench.sides import WAYS

NAME = "GPT-2 124M, batch 16"


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """A row a way; all of them are held by the GPU at once."""
    if pick_device(config.device).type != "cuda":
        fail("ways compares what there is on CUDA alone")
    sides = {}
    for way in WAYS:
        if config.only in ("", way):
            try:
                sides[way] = Side(f"train_in_a_way({way!r}, {NAME!r}, 'cuda')", True)
            except ValueError:  # its process has ended, after its own words
                yield {"way": way, "step": "fails", "ratio": ""}
    t = take_turns(sides, config.rounds)
    for way, took in t.items():
        first = next(iter(t.values()))
        yield {"way": way, "step": f"{took * 1e3:,.1f} ms", "ratio": f"{took / first:.2f} x"}
