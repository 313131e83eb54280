"""train: a training step, beside the same model by PyTorch's own functions and beside Transformers'
GPT-2; on a CPU both in float32, as they come."""
from collections.abc import Iterator

import torch

from keepgpt.distributed import peak_flops, pick_device
from model import GPT
from tools.bench.common import SHAPES, BenchConfig, Side, started, take_turns


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """A row a model."""
    device = pick_device(config.device)
    peak = peak_flops(device)
    for name, shape in SHAPES.items():
        if config.only not in ("", name) or shape.cuda and device.type != "cuda":
            continue
        where = f"({name!r}, {str(device)!r})"
        peers = {"plain": f"train_plain{where}"}
        if not shape.cuda:  # a GPU would not hold the float32 logits of all
            peers["peer"] = f"train_transformers{where}"
        t = take_turns(started(Side(f"train_ours{where}", as_a_script=True), **peers),
                       config.rounds)
        rate = shape.batch_size * shape.args.block_size / t["ours"]
        row = {"model": name, "micro-batch": f"{shape.batch_size} x {shape.args.block_size}",
               "keepGPT": f"{t['ours'] * 1e3:,.1f} ms", "tokens/s": f"{rate:,.0f}",
               **{title: f"{t[side] * 1e3:,.1f} ms ({t[side] / t['ours']:.2f} x)"
                  if side in t else "-"
                  for title, side in (("plain PyTorch", "plain"), ("Transformers", "peer"))}}
        if peak:
            with torch.device("meta"):
                row["MFU"] = f"{GPT(shape.args).flops_per_token() * rate / peak:.1%}"
        yield row
