"""train: a training step, beside the same model by PyTorch's own functions and beside Transformers'
GPT-2; on a CPU both in float32, as they come."""
from collections.abc import Iterator

from runtime import pick_device
from tools.bench.common import SHAPES, BenchConfig, Side, take_turns


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """A row a model."""
    device = pick_device(config.device).type
    for name, shape in SHAPES.items():
        if config.only not in ("", name):
            continue
        t = take_turns({
            "ours": Side(f"train_ours({name!r}, {device!r})", as_a_script=True),
            "plain": Side(f"train_plain({name!r}, {device!r})", as_a_script=False),
            "peer": Side(f"train_transformers({name!r}, {device!r})", as_a_script=False)},
            config.rounds)
        tokens = shape.batch_size * shape.args.block_size
        yield {
            "model": name, "micro-batch": f"{shape.batch_size} x {shape.args.block_size}",
            "keepGPT": f"{t['ours'] * 1e3:,.0f} ms", "tokens/s": f"{tokens / t['ours']:,.0f}",
            "plain PyTorch": f"{t['plain'] * 1e3:,.0f} ms ({t['plain'] / t['ours']:.2f} x)",
            "Transformers": f"{t['peer'] * 1e3:,.0f} ms ({t['peer'] / t['ours']:.2f} x)"}
