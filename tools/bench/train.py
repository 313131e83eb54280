"""train: a training step, against the same model in plain PyTorch and Transformers' GPT-2, both in
float32, their default."""
from collections.abc import Iterator

from keepgpt.distributed import pick_device
from tools.bench.common import SHAPES, BenchConfig, Side, start_sides, take_turns


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """Yield a row per model."""
    device = str(pick_device(config.device))
    for name, shape in SHAPES.items():
        if config.only not in ("", name) or shape.cuda:
            continue
        args = f"({name!r}, {device!r})"
        t = take_turns(start_sides(Side(f"train_ours{args}", as_script=True),
                                   plain=f"train_plain{args}", peer=f"train_transformers{args}"),
                       config.rounds)
        rate = shape.batch_size * shape.args.block_size / t["ours"]
        yield {"model": name, "micro-batch": f"{shape.batch_size} x {shape.args.block_size}",
               "keepGPT": f"{t['ours'] * 1e3:,.1f} ms", "tokens/s": f"{rate:,.0f}",
               **{title: f"{t[side] * 1e3:,.1f} ms ({t[side] / t['ours']:.2f} x)"
                  if side in t else "-"
                  for title, side in (("plain PyTorch", "plain"), ("Transformers", "peer"))}}
