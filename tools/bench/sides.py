"""The models of the benchmarks, and the sides of the comparisons: each returns the seconds of a
training step, or of a token, and runs in a process of its own."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keepgpt import kernels
from keepgpt.config import ARCHITECTURE, TrainConfig
from keepgpt.device import pick_device, pick_dtype
from keepgpt.optim import make_optimizer
from keepgpt.signals import prepare_process
from model import ModelArgs, build_model, generate
from sample import prepare_model
from tools.export import make_config
from tools.measure import seconds

TOKENS = 48  # of a sample
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "vocab_size")


def shape(*sizes: int, **settings: Any) -> dict:
    """Return the SIZES and other settings of a model and its micro-batch."""
    # sizes are given by place, as in a table
    return {"dropout": 0.0, **dict(zip(SIZES, sizes)), **settings}


# what config/train_plays_modern_cpu.py changes
MODERN = {
    "architecture": "qwen3",
    "tie_embeddings": False,
    "optimizer": "muon",
    "lr_schedule": "linear",
}
# each is a row of `bench train`, those with a batch in their name on CUDA only
SHAPES = {
    "4 layers, width 128": shape(4, 4, 128, 64, 12, 65),
    "6 layers, width 384": shape(6, 6, 384, 256, 16, 65),
    "6 layers, dropout 0.2": shape(6, 6, 384, 256, 16, 65, dropout=0.2),
    "GPT-2 124M": shape(12, 12, 768, 1024, 1, 50257),
    "Qwen3 and Muon, 4 layers, width 128": shape(4, 4, 128, 192, 12, 65, **MODERN),
    "Qwen3 and Muon, 124M": shape(12, 6, 768, 1024, 1, 50257, **MODERN),
}
# the largest that fits is the fastest, and depends on the GPU
for n in (16, 32, 64):
    SHAPES[f"GPT-2 124M, batch {n}"] = SHAPES["GPT-2 124M"] | {"batch_size": n}
    SHAPES[f"Qwen3 and Muon, 124M, batch {n}"] = SHAPES["Qwen3 and Muon, 124M"] | {
        "batch_size": n
    }
    SHAPES[f"GPT-2 350M, batch {n // 2}"] = shape(24, 16, 1024, 1024, n // 2, 50257)


def make_settings(name: str) -> tuple[TrainConfig, ModelArgs]:
    """Return the settings of a shape, with one micro-batch per step, and its architecture."""
    settings = SHAPES[name] | {"gradient_accumulation_steps": 1}
    vocab_size = settings.pop("vocab_size")
    config = TrainConfig(**settings)
    sizes = {key: getattr(config, key) for key in ARCHITECTURE}
    return config, ModelArgs(vocab_size=vocab_size, dropout=config.dropout, **sizes)


def time_steps(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds per step, over about three seconds after two steps to warm up."""
    # the first steps compile and allocate
    step()
    step()
    # as many as fit into three seconds, timed together
    count = max(1, round(3 / seconds(step, device)))

    def repeat() -> None:
        for _ in range(count):
            step()

    return seconds(repeat, device) / count


def time_optimizer(name: str, device: str) -> float:
    """Time the updates of train.py's optimizer."""
    where = pick_device(device)
    config, args = make_settings(name)
    network = build_model(args).to(where)
    optimizer = make_optimizer(network, config, pick_dtype("auto", where))
    # the time of an update does not depend on the numbers
    grads = [torch.randn_like(p) for p in network.parameters()]

    def step() -> None:
        # Muon takes the gradients away
        for p, grad in zip(network.parameters(), grads):
            p.grad = grad
        optimizer.step()

    return time_steps(step, where)


def make_peer_optimizers(
    network: nn.Module, config: TrainConfig, fused: bool
) -> list[torch.optim.Optimizer]:
    """Return PyTorch's own AdamW, and its Muon for the matrices of the blocks if the shape has
    it."""
    # torch's Muon takes matrices only, and one rate for all of them
    adamw = []
    muon = []
    for name, p in network.named_parameters():
        in_block = p.dim() == 2 and ".layers." in name
        group = muon if in_block and config.optimizer == "muon" else adamw
        group.append(p)
    optimizers = [torch.optim.AdamW(adamw, lr=1e-3, fused=fused)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=config.muon_lr))
    return optimizers


def train_peer(
    network: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    name: str,
    device: torch.device,
) -> float:
    """Time steps of another program: `loss_of(x, y)` is the loss of a micro-batch of random tokens,
    already on the device. Float32 on a CPU, the default; the autocast of train.py on CUDA."""
    config, args = make_settings(name)
    cuda = device.type == "cuda"
    # inputs and targets of one micro-batch, again and again: no loader is measured
    size = (2, config.batch_size, args.block_size)
    x, y = torch.randint(args.vocab_size, size, device=device)
    # nanoGPT trains in float32 on a CPU
    autocast = torch.autocast(device.type, pick_dtype("auto", device), enabled=cuda)
    optimizers = make_peer_optimizers(network, config, fused=cuda)

    def step() -> None:
        with autocast:
            loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return time_steps(step, device)


def train_plain(name: str, device: str) -> float:
    """Time steps of the same model in plain PyTorch, as in nanoGPT: float32 on a CPU; on CUDA
    compiled, in bfloat16, with all logits in float32."""
    # without our kernels; this process has no other use
    kernels.has_fast_norm = lambda x: False
    kernels.has_fast_attention = lambda q: False
    # nanoGPT allows TF32 too
    torch.set_float32_matmul_precision("high")
    where = pick_device(device)
    cuda = where.type == "cuda"
    _, args = make_settings(name)
    if cuda:
        # nanoGPT has 50,304 rows for GPT-2's 50,257 tokens
        args = replace(args, vocab_size=64 * math.ceil(args.vocab_size / 64))
    network = build_model(args).to(where)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        logits = network(x)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    # nanoGPT compiles by default, but compiling for a CPU takes a minute
    if cuda:
        loss_of = torch.compile(loss_of, dynamic=False)
    return train_peer(network, loss_of, name, where)


def make_transformers(name: str) -> nn.Module:
    """Return Transformers' model of a shape, with its defaults."""
    # nothing is downloaded; without this it tries to for seconds
    os.environ["HF_HUB_OFFLINE"] = "1"
    # not needed for anything else, and may not be installed
    from transformers import AutoConfig, AutoModelForCausalLM

    _, args = make_settings(name)
    sizes = make_config(args)
    config = AutoConfig.for_model(**sizes, bos_token_id=0, eos_token_id=None)
    return AutoModelForCausalLM.from_config(config)


def train_transformers(name: str, device: str) -> float:
    """Time steps of Transformers' model."""
    torch.set_float32_matmul_precision("high")
    where = pick_device(device)
    network = make_transformers(name).to(where).train()

    def loss_of(x: Tensor, _y: Tensor) -> Tensor:
        # it shifts the labels itself
        return network(x, labels=x).loss

    return train_peer(network, loss_of, name, where)


def sample_ours(name: str, device: str) -> float:
    """Time the tokens of one sequence by sample.py."""
    # as sample.py does at its start: memory and threads
    prepare_process()
    where = pick_device(device)
    _, args = make_settings(name)
    network = build_model(args).eval()
    # the dtype and layout of the weights that sample.py chooses
    prepare_model(network, where)

    def sample() -> list:
        return list(generate(network, [[0]], TOKENS, temperature=0.8, top_k=50))

    return time_steps(sample, where) / TOKENS


def sample_transformers(name: str, device: str) -> float:
    """Time Transformers' `generate` with its cache; on CUDA in the dtype of sample.py."""
    where = pick_device(device)
    # its default on a CPU
    dtype = torch.float32
    if where.type == "cuda":
        dtype = pick_dtype("auto", where)
    network = make_transformers(name).to(where, dtype).eval()
    prompt = torch.zeros(1, 1, dtype=torch.long, device=where)
    how = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
        # as many tokens as ours, also after an end of text
        "max_new_tokens": TOKENS,
        "min_new_tokens": TOKENS,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(prompt),
    }
    return time_steps(lambda: network.generate(prompt, **how), where) / TOKENS
