"""ways: a training step on CUDA with one thing changed: what deterministic=True and DDP cost, which
attention and which compiler mode is fast."""
from collections.abc import Iterator

from keepgpt.distributed import pick_device
from keepgpt.process import fail
from tools.bench.common import BenchConfig, Ended, Side, take_turns
from tools.bench.sides import WAYS

NAME = "GPT-2 124M, batch 16"


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """A row a way, one after the other: a GPU does not hold all of them."""
    device = pick_device(config.device)
    if device.type != "cuda":
        fail("ways compares what there is on CUDA alone")
    base, first, *_ = None, *WAYS
    for way in WAYS:
        if config.only not in ("", way) and way != first:
            continue
        try:
            side = Side(f"train_in_a_way({way!r}, {NAME!r}, {str(device)!r})", True)
            took = take_turns({way: side}, config.rounds)[way]
        except Ended:
            yield {"way": way, "step": "fails", "ratio": "-"}
            continue
        base = base or took
        yield {"way": way, "step": f"{took * 1e3:,.1f} ms", "ratio": f"{took / base:.2f} x"}
