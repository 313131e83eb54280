"""train: a training step, beside the same model by PyTorch's own functions and beside Transformers'
GPT-2; on a CPU both in float32, as they come."""
from collections.abc import Iterator

import torch

from model import GPT
from runtime import peak_flops, pick_device
from tools.bench.common import SHAPES, BenchConfig, Side, take_turns


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """A row a model."""
    device = pick_device(config.device)
    peak = peak_flops(device)
    for name, shape in SHAPES.items():
        if config.only not in ("", name) or shape.cuda and device.type != "cuda":
            continue
        works = {"ours": "train_ours", "plain": "train_plain"}
        if not shape.cuda:  # the others would fill a GPU with float32 logits
            works["peer"] = "train_transformers"
        t = take_turns({side: Side(f"{work}({name!r}, {device.type!r})", side == "ours")
                        for side, work in works.items()}, config.rounds)
        rate = shape.batch_size * shape.args.block_size / t["ours"]
        row = {"model": name, "micro-batch": f"{shape.batch_size} x {shape.args.block_size}",
               "keepGPT": f"{t['ours'] * 1e3:,.1f} ms", "tokens/s": f"{rate:,.0f}",
               "plain PyTorch": f"{t['plain'] * 1e3:,.1f} ms ({t['plain'] / t['ours']:.2f} x)",
               "Transformers": (f"{t['peer'] * 1e3:,.1f} ms ({t['peer'] / t['ours']:.2f} x)"
                                if "peer" in t else "")}
        if peak:
            with torch.device("meta"):
                row["MFU"] = f"{GPT(shape.args).flops_per_token() * rate / peak:.1%}"
        yield row
