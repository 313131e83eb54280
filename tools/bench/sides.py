"""The sides of the comparisons, each for its own process. See common.Side."""
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import model as model_module
from keepgpt.checkpoint import Saver
from keepgpt.config import TrainConfig
from keepgpt.distributed import pick_device, pick_dtype, use_deterministic_algorithms
from keepgpt.optim import make_optimizer
from model import generate
from sample import prepare_model
from tools.bench.common import SHAPES, new_run, seconds
from train import Run, compute_gradient, update


def steps(step: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Return a function that takes about a second of steps and returns the seconds per step."""
    def some(count: int) -> None:
        for _ in range(count):
            step()

    some(2)
    count = max(1, round(1 / seconds(lambda: some(1), device)))
    return lambda: seconds(lambda: some(count), device) / count


def steps_of(run: Run) -> Callable[[], float]:
    """Return `steps` of train.py: loader, gradient and update."""
    saver = Saver(None, 2, 0.0, lambda: None, run.ranks.device)
    return steps(lambda: update(run, saver, compute_gradient(run)), run.ranks.device)


def train_ours(name: str, device: str) -> Callable[[], float]:
    """Time steps of train.py."""
    return steps_of(new_run(SHAPES[name], pick_device(device)))


def attention_by(backend: str) -> None:
    """Allow only one attention kernel, so a step fails without it."""
    cuda = torch.backends.cuda
    for name, enable in {"flash": cuda.enable_flash_sdp, "cudnn": cuda.enable_cudnn_sdp,
                         "efficient": cuda.enable_mem_efficient_sdp,
                         "math": cuda.enable_math_sdp}.items():
        enable(name == backend)


def compile_by(mode: str) -> None:
    """Set the mode of torch.compile."""
    torch.compile = partial(torch.compile, mode=mode)


def reduce_once() -> None:
    """Let DDP reduce after the backward pass, which is then compiled in one graph."""
    torch._dynamo.config.optimize_ddp = False


WAYS = {  # name: function to call first
    "as train.py does it": lambda: None,
    "deterministic=True": use_deterministic_algorithms,
    "attention by cuDNN": partial(attention_by, "cudnn"),
    "attention by flash": partial(attention_by, "flash"),
    "compile: max-autotune": partial(compile_by, "max-autotune-no-cudagraphs"),
    "compile: reduce-overhead": partial(compile_by, "reduce-overhead"),
    "DDP, of one rank": lambda: None,
    "DDP, optimize_ddp=False": reduce_once,
}


def train_in_a_way(way: str, name: str, device: str) -> Callable[[], float]:
    """Time steps of train.py with one thing changed."""
    WAYS[way]()
    run = new_run(SHAPES[name], pick_device(device))
    if way.startswith("DDP"):
        dist.init_process_group("nccl" if run.ranks.device.type == "cuda" else "gloo",
                                store=dist.HashStore(), rank=0, world_size=1)
        run.train_model = DistributedDataParallel(run.compiled_model)
    return steps_of(run)


def train_peer(network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
               parameters: Iterable[nn.Parameter], name: str, device: torch.device,
               optimizer: torch.optim.Optimizer | None = None) -> Callable[[], float]:
    """Time steps of another program: `network(x, y)` returns the loss of a micro-batch of random
    tokens, already on the device."""
    shape, parameters = SHAPES[name], list(parameters)
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-3)
    batch = torch.randint(shape.args.vocab_size, (2, shape.batch_size, shape.args.block_size),
                          device=device)
    # float32 on a CPU, the default
    autocast = torch.autocast(device.type, pick_dtype("auto", device), device.type == "cuda")

    def step() -> None:
        with autocast:
            loss = network(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return steps(step, device)


def train_plain(name: str, device: str) -> Callable[[], float]:
    """Time steps of the same model in plain PyTorch, as in nanoGPT: float32 on a CPU; on CUDA
    bfloat16, compiled, with all logits in float32."""
    model_module.dropout = F.dropout
    model_module.attend = lambda q, k, v, p: F.scaled_dot_product_attention(
        q, k, v, dropout_p=p, is_causal=True)
    where, args = pick_device(device), SHAPES[name].args
    torch.set_float32_matmul_precision("high")
    optimizer = None
    if where.type == "cuda":  # nanoGPT has 50,304 rows for GPT-2's 50,257 tokens
        args = replace(args, vocab_size=-(-args.vocab_size // 64) * 64)
    network = model_module.GPT(args).to(where)
    if where.type == "cuda":
        optimizer = make_optimizer(network, TrainConfig())  # fused, as nanoGPT's

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = network(x)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), y.reshape(-1))

    if where.type == "cuda":
        loss = torch.compile(loss, dynamic=False)
    return train_peer(loss, network.parameters(), name, where, optimizer)


def gpt2_of_transformers(name: str) -> torch.nn.Module:
    """Return Transformers' GPT-2 of a shape."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2Config, GPT2LMHeadModel
    a = SHAPES[name].args
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=a.vocab_size, n_positions=a.block_size, n_embd=a.n_embd, n_layer=a.n_layer,
        n_head=a.n_head, resid_pdrop=a.dropout, embd_pdrop=a.dropout, attn_pdrop=a.dropout,
        bos_token_id=0, eos_token_id=None))


def train_transformers(name: str, device: str) -> Callable[[], float]:
    """Time steps of Transformers' GPT-2 with its defaults."""
    where = pick_device(device)
    torch.set_float32_matmul_precision("high")
    network = gpt2_of_transformers(name).to(where).train()
    return train_peer(lambda x, y: network(x, labels=x).loss, network.parameters(), name, where)


def new_tokens(name: str, device: torch.device) -> int:
    """Return the number of tokens to sample: more on CUDA, which is fast."""
    return 48 if device.type == "cpu" else min(500, SHAPES[name].args.block_size - 16)


def sample_ours(name: str, device: str, compile: bool = False) -> Callable[[], float]:
    """Time sample.py's tokens of one sequence; return the seconds per token."""
    where = pick_device(device)
    count = new_tokens(name, where)
    network = model_module.GPT(SHAPES[name].args).eval()
    prepare_model(network, where, compile=compile)

    def work() -> float:
        start = time.perf_counter()
        list(generate(network, [[0]], count, temperature=0.8, top_k=50,
                      compile=compile))
        return (time.perf_counter() - start) / count

    return work


def sample_transformers(name: str, device: str) -> Callable[[], float]:
    """Time Transformers' `generate` with its cache; on CUDA in the same dtype."""
    where = pick_device(device)
    dtype = pick_dtype("auto", where) if where.type == "cuda" else torch.float32
    network, count = gpt2_of_transformers(name).to(where, dtype).eval(), new_tokens(name, where)
    prompt = torch.zeros(1, 1, dtype=torch.long, device=where)

    def work() -> float:
        start = time.perf_counter()
        network.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True,
                         temperature=0.8, top_k=50, max_new_tokens=count,
                         min_new_tokens=count, pad_token_id=0)
        return (time.perf_counter() - start) / count

    return work
