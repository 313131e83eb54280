"""sample: tokens of one sequence, beside Transformers' `generate` with its cache."""
from collections.abc import Iterator

from runtime import pick_device
from tools.bench.common import SHAPES, BenchConfig, Side, take_turns


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """A row a model."""
    device = pick_device(config.device).type
    for name, shape in SHAPES.items():
        if config.only not in ("", name) or shape.args.dropout or shape.cuda:
            continue
        t = take_turns({
            "ours": Side(f"sample_ours({name!r}, {device!r})", as_a_script=True),
            "peer": Side(f"sample_transformers({name!r}, {device!r})", as_a_script=False)},
            config.rounds)
        yield {"model": name, "keepGPT": f"{1 / t['ours']:,.0f} tokens/s",
                      "Transformers": f"{1 / t['peer']:,.0f} tokens/s",
                      "ratio": f"{t['peer'] / t['ours']:.1f} x"}
