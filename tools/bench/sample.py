"""sample: tokens of one sequence, against Transformers' `generate` with its cache."""
from collections.abc import Iterator

from keepgpt.distributed import pick_device
from tools.bench.common import SHAPES, BenchConfig, Side, start_sides, take_turns


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """Yield a row per model."""
    device = str(pick_device(config.device))
    for name, shape in SHAPES.items():
        if config.only not in ("", name) or shape.args.dropout or shape.cuda:
            continue
        args = f"({name!r}, {device!r})"
        t = take_turns(start_sides(Side(f"sample_ours{args}", as_script=True),
                                   peer=f"sample_transformers{args}"), config.rounds)
        row = {"model": name, "keepGPT": f"{1 / t['ours']:,.0f} tokens/s",
               "Transformers": "-", "ratio": "-"}
        if "peer" in t:
            row |= {"Transformers": f"{1 / t['peer']:,.0f} tokens/s",
                    "ratio": f"{t['peer'] / t['ours']:.1f} x"}
        yield row
