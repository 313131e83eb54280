"""The models of the benchmarks, and the sides of the comparisons: each returns the seconds of a
training step, or of a token, and runs in a process of its own."""
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model as model_module
from keepgpt import kernels
from keepgpt.config import ARCHITECTURE, TrainConfig
from keepgpt.device import pick_device, pick_dtype
from keepgpt.optim import make_optimizer
from keepgpt.signals import prepare_process
from model import ModelArgs, build_model, generate
from sample import prepare_model
from tools.export import to_config
from tools.measure import seconds

TOKENS = 48  # of a sample
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "vocab_size")


def shape(*sizes: int, **settings: Any) -> dict[str, Any]:
    """Return the SIZES and other settings of a model and its micro-batch."""
    return dict(zip(SIZES, sizes)) | {"dropout": 0.0} | settings


MODERN = {"architecture": "qwen3", "tie_embeddings": False, "optimizer": "muon",
          "lr_schedule": "linear"}
# each is a row of `bench train`, those with a batch in their name on CUDA only
SHAPES = {
    "4 layers, width 128": shape(4, 4, 128, 64, 12, 65),
    "6 layers, width 384": shape(6, 6, 384, 256, 16, 65),
    "6 layers, dropout 0.2": shape(6, 6, 384, 256, 16, 65, dropout=0.2),
    "GPT-2 124M": shape(12, 12, 768, 1024, 1, 50257),
    "Qwen3 and Muon, 4 layers, width 128": shape(4, 4, 128, 192, 12, 65, **MODERN),
    "Qwen3 and Muon, 124M": shape(12, 6, 768, 1024, 1, 50257, **MODERN),
    **{f"GPT-2 124M, batch {n}": shape(12, 12, 768, 1024, n, 50257) for n in (16, 32, 64)},
    **{f"Qwen3 and Muon, 124M, batch {n}": shape(12, 6, 768, 1024, n, 50257, **MODERN)
       for n in (16, 32, 64)},
    **{f"GPT-2 350M, batch {n}": shape(24, 16, 1024, 1024, n, 50257) for n in (8, 16, 32)}}


def make_settings(name: str) -> tuple[TrainConfig, ModelArgs]:
    """Return the settings of a shape, with one micro-batch per step, and its architecture."""
    settings = SHAPES[name] | {"gradient_accumulation_steps": 1}
    vocab_size = settings.pop("vocab_size")
    config = TrainConfig(**settings)
    return config, ModelArgs(vocab_size=vocab_size, dropout=config.dropout,
                             **{key: getattr(config, key) for key in ARCHITECTURE})


def time_steps(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds per step, over about three seconds after two steps to warm up."""
    step()
    step()
    count = max(1, round(3 / seconds(step, device)))
    return seconds(lambda: [step() for _ in range(count)], device) / count


def time_optimizer(name: str, device: str) -> float:
    """Time the updates of train.py's optimizer."""
    where, (config, args) = pick_device(device), make_settings(name)
    network = build_model(args).to(where)
    optimizer = make_optimizer(network, config, pick_dtype("auto", where))
    grads = [torch.randn_like(p) for p in network.parameters()]

    def step() -> None:
        for p, grad in zip(network.parameters(), grads):
            p.grad = grad  # Muon takes them away
        optimizer.step()

    return time_steps(step, where)


def train_peer(network: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], name: str,
               device: torch.device) -> float:
    """Time steps of another program, with PyTorch's own AdamW, or its Muon for the matrices of the
    blocks: `loss_of(x, y)` is the loss of a micro-batch of random tokens, already on the device.
    Float32 on a CPU, the default; the autocast of train.py on CUDA."""
    config, args = make_settings(name)
    batch = torch.randint(args.vocab_size, (2, config.batch_size, args.block_size), device=device)
    cuda = device.type == "cuda"
    autocast = torch.autocast(device.type, pick_dtype("auto", device), cuda)
    muon = [p for n, p in network.named_parameters() if config.optimizer == "muon"
            and p.dim() == 2 and ".layers." in n]
    rest = [p for p in network.parameters() if all(p is not matrix for matrix in muon)]
    optimizers = [torch.optim.AdamW(rest, lr=1e-3, fused=cuda)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=config.muon_lr))

    def step() -> None:
        with autocast:
            loss = loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return time_steps(step, device)


def train_plain(name: str, device: str) -> float:
    """Time steps of the same model in plain PyTorch, as in nanoGPT: float32 on a CPU; on CUDA
    compiled, in bfloat16, with all logits in float32."""
    kernels.has_own_backward = lambda x: False
    model_module.dropout = F.dropout
    model_module.attend = lambda q, k, v, p: F.scaled_dot_product_attention(
        q, k, v, dropout_p=p, is_causal=True)
    torch.set_float32_matmul_precision("high")
    where, args = pick_device(device), make_settings(name)[1]
    if where.type == "cuda":  # nanoGPT has 50,304 rows for GPT-2's 50,257 tokens
        args = replace(args, vocab_size=-(-args.vocab_size // 64) * 64)
    network = build_model(args).to(where)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(x).flatten(0, 1), y.flatten())

    compiled = torch.compile(loss_of, dynamic=False) if where.type == "cuda" else loss_of
    return train_peer(network, compiled, name, where)


def make_transformers(name: str) -> nn.Module:
    """Return Transformers' model of a shape, with its defaults."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoConfig, AutoModelForCausalLM
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        **to_config(make_settings(name)[1]), bos_token_id=0, eos_token_id=None))


def train_transformers(name: str, device: str) -> float:
    """Time steps of Transformers' model."""
    torch.set_float32_matmul_precision("high")
    where = pick_device(device)
    network = make_transformers(name).to(where).train()
    return train_peer(network, lambda x, y: network(x, labels=x).loss, name, where)


def sample_ours(name: str, device: str, compile: bool = False) -> float:
    """Time the tokens of one sequence by sample.py."""
    prepare_process()
    where, network = pick_device(device), build_model(make_settings(name)[1]).eval()
    prepare_model(network, where, compile=compile)
    return time_steps(lambda: list(generate(
        network, [[0]], TOKENS, temperature=0.8, top_k=50, compile=compile)), where) / TOKENS


def sample_transformers(name: str, device: str) -> float:
    """Time Transformers' `generate` with its cache; on CUDA in the dtype of sample.py."""
    where = pick_device(device)
    dtype = pick_dtype("auto", where) if where.type == "cuda" else torch.float32
    network = make_transformers(name).to(where, dtype).eval()
    prompt = torch.zeros(1, 1, dtype=torch.long, device=where)
    how = {"do_sample": True, "temperature": 0.8, "top_k": 50, "max_new_tokens": TOKENS,
           "min_new_tokens": TOKENS, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    return time_steps(lambda: network.generate(prompt, **how), where) / TOKENS
