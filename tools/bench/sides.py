"""The models of the benchmarks, and the sides of the comparisons: each returns the seconds of a
training step, or of a token."""
import os
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import model as model_module
from keepgpt.checkpoint import Saver
from keepgpt.config import TrainConfig
from keepgpt.distributed import Ranks, pick_device, pick_dtype
from keepgpt.loader import Loader, Split
from keepgpt.optim import make_optimizer
from model import GPT, ModelArgs, generate
from sample import prepare_model
from tools.measure import seconds
from train import Run, build_run, compute_gradient, update

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


def make_settings(name: str, **more: Any) -> tuple[TrainConfig, ModelArgs]:
    """Return the settings of a shape, with one micro-batch per step, and its architecture."""
    settings = SHAPES[name] | more
    vocab_size = settings.pop("vocab_size")
    config = TrainConfig(gradient_accumulation_steps=1, **settings)
    args = {f.name: getattr(config, f.name) for f in fields(ModelArgs) if f.name != "vocab_size"}
    return config, ModelArgs(**args, vocab_size=vocab_size)


def new_run(name: str, device: torch.device, **settings: Any) -> Run:
    """Return a run of train.py on random tokens, without an out_dir."""
    config, args = make_settings(name, **settings)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    tokens = np.random.default_rng(0).integers(args.vocab_size, size=2**20, dtype=np.uint16)
    meta = {"dtype": "uint16", "vocab_size": args.vocab_size, "tokens": {"train": len(tokens)}}
    with tempfile.TemporaryDirectory() as folder:  # the file stays open
        tokens.tofile(f"{folder}/train.bin")
        shifted, fixed = (Split(Path(folder), "train", meta, args.block_size, 0, shift)
                          for shift in (True, False))
    loader = Loader(shifted, config.batch_size, 1, range(1), device)
    return build_run(config, Ranks(0, 1, device), {}, loader, {"train": fixed, "val": fixed},
                     GPT(args))


def time_steps(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds per step, over about three seconds after two steps to warm up."""
    step()
    step()
    count = max(1, round(3 / seconds(step, device)))
    return seconds(lambda: [step() for _ in range(count)], device) / count


def train_ours(name: str, device: str) -> float:
    """Time steps of train.py: loader, gradient and update."""
    run = new_run(name, pick_device(device))
    saver = Saver(None, 2, 0.0, lambda: None, run.ranks.device)
    return time_steps(lambda: update(run, saver, compute_gradient(run)), run.ranks.device)


def time_optimizer(name: str, device: str) -> float:
    """Time the optimizer's part of train_ours."""
    run = new_run(name, pick_device(device))
    compute_gradient(run)
    grads = [p.grad for p in run.model.parameters()]

    def step() -> None:
        for p, grad in zip(run.model.parameters(), grads):
            p.grad = grad
        run.optimizer.step()

    return time_steps(step, run.ranks.device)


def make_peer_optimizers(network: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """Return PyTorch's own AdamW, and its Muon for the matrices of the blocks if the shape has
    optimizer=muon."""
    config, muon = make_settings(name)[0], []
    if config.optimizer == "muon":
        muon = [p for n, p in network.named_parameters() if p.dim() == 2 and ".layers." in n]
    rest = [p for p in network.parameters() if all(p is not matrix for matrix in muon)]
    return ([torch.optim.AdamW(rest, lr=1e-3)]
            + ([torch.optim.Muon(muon, lr=config.muon_lr)] if muon else []))


def train_peer(loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], network: nn.Module,
               optimizers: list[torch.optim.Optimizer], name: str, device: torch.device
               ) -> float:
    """Time steps of another program: `loss_of(x, y)` is the loss of a micro-batch of random tokens,
    already on the device. Float32 on a CPU, the default; the autocast of train.py on CUDA."""
    config, args = make_settings(name)
    batch = torch.randint(args.vocab_size, (2, config.batch_size, args.block_size), device=device)
    autocast = torch.autocast(device.type, pick_dtype("auto", device), device.type == "cuda")

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
    model_module.dropout = F.dropout
    model_module.attend = lambda q, k, v, p: F.scaled_dot_product_attention(
        q, k, v, dropout_p=p, is_causal=True)
    model_module.rms_norm = lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)
    model_module.norm_and_rotate = norm_and_rotate_plain
    torch.set_float32_matmul_precision("high")
    where, (config, args) = pick_device(device), make_settings(name)
    cuda = where.type == "cuda"
    if cuda:  # nanoGPT has 50,304 rows for GPT-2's 50,257 tokens
        args = ModelArgs(**vars(args) | {"vocab_size": -(-args.vocab_size // 64) * 64})
    network = GPT(args).to(where)

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(network(x).flatten(0, 1), y.flatten())

    # on CUDA nanoGPT's AdamW is fused, as ours is
    optimizers = ([make_optimizer(network, config)] if cuda and config.optimizer == "adamw"
                  else make_peer_optimizers(network, name))
    return train_peer(torch.compile(loss_of, dynamic=False) if cuda else loss_of, network,
                      optimizers, name, where)


def norm_and_rotate_plain(x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor,
                          sin: torch.Tensor) -> torch.Tensor:
    """Normalize and rotate as Transformers does: with a concatenation of halves."""
    x = F.rms_norm(x, weight.shape, weight, eps).transpose(1, 2)
    cos, sin, half = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), x.size(-1) // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def make_transformers(name: str) -> nn.Module:
    """Return Transformers' model of a shape, with its defaults."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM
    args = make_settings(name)[1]
    if args.architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(
            vocab_size=args.vocab_size, max_position_embeddings=args.block_size,
            hidden_size=args.n_embd, num_hidden_layers=args.n_layer,
            num_attention_heads=args.n_head, num_key_value_heads=args.K, head_dim=args.D,
            intermediate_size=args.ff_width, tie_word_embeddings=args.tie_embeddings,
            attention_dropout=args.dropout, bos_token_id=0, eos_token_id=None))
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=args.vocab_size, n_positions=args.block_size, n_embd=args.n_embd,
        n_layer=args.n_layer, n_head=args.n_head, resid_pdrop=args.dropout,
        embd_pdrop=args.dropout, attn_pdrop=args.dropout, bos_token_id=0, eos_token_id=None))


def train_transformers(name: str, device: str) -> float:
    """Time steps of Transformers' model."""
    torch.set_float32_matmul_precision("high")
    where = pick_device(device)
    network = make_transformers(name).to(where).train()
    return train_peer(lambda x, y: network(x, labels=x).loss, network,
                      make_peer_optimizers(network, name), name, where)


def count_tokens(name: str, device: torch.device) -> int:
    """Return the number of tokens to sample: more on CUDA, which is fast."""
    return 48 if device.type == "cpu" else min(500, make_settings(name)[1].block_size - 16)


def sample_ours(name: str, device: str, compile: bool = False) -> float:
    """Time the tokens of one sequence by sample.py."""
    where = pick_device(device)
    network, count = GPT(make_settings(name)[1]).eval(), count_tokens(name, where)
    prepare_model(network, where, compile=compile)

    def sample() -> None:
        list(generate(network, [[0]], count, temperature=0.8, top_k=50, compile=compile))

    sample()  # to warm up
    return seconds(sample, where) / count


def sample_transformers(name: str, device: str) -> float:
    """Time Transformers' `generate` with its cache; on CUDA in the dtype of sample.py."""
    where = pick_device(device)
    dtype = pick_dtype("auto", where) if where.type == "cuda" else torch.float32
    network, count = make_transformers(name).to(where, dtype).eval(), count_tokens(name, where)
    prompt = torch.zeros(1, 1, dtype=torch.long, device=where)

    def sample() -> None:
        network.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True,
                         temperature=0.8, top_k=50, max_new_tokens=count, min_new_tokens=count,
                         pad_token_id=0)

    sample()
    return seconds(sample, where) / count
