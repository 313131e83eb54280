"""The works that are compared, each to be run in a process of its own. See common.Side."""
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional as F

import model as model_module
from model import generate
from runtime import be_deterministic, pick_device
from sample import make_fast
from tools.bench.common import SHAPES, Training, seconds


def steps(training: Training) -> Callable[[], float]:
    """Some steps, enough for a second or so; returns the seconds of one."""
    def some(count: int) -> None:
        for _ in range(count):
            training.step()

    some(2)
    count = max(1, round(1 / seconds(lambda: some(1), training.device)))
    return lambda: seconds(lambda: some(count), training.device) / count


def train_ours(name: str, device: str) -> Callable[[], float]:
    """A step as train.py computes it, without the loader."""
    return steps(Training(SHAPES[name], pick_device(device)))


def attention_by(backend: str) -> None:
    """Let no other kernel do it, so that it fails where this one can't."""
    cuda = torch.backends.cuda
    for name, enable in {"flash": cuda.enable_flash_sdp, "cudnn": cuda.enable_cudnn_sdp,
                         "efficient": cuda.enable_mem_efficient_sdp,
                         "math": cuda.enable_math_sdp}.items():
        enable(name == backend)


WAYS = {  # what is called before, and the compiler's mode
    "as train.py does it": (lambda: None, "default"),
    "deterministic=True": (be_deterministic, "default"),
    "attention by cuDNN": (partial(attention_by, "cudnn"), "default"),
    "attention by flash": (partial(attention_by, "flash"), "default"),
    "compile: max-autotune": (lambda: None, "max-autotune-no-cudagraphs"),
    "compile: reduce-overhead": (lambda: None, "reduce-overhead"),
}


def train_in_a_way(way: str, name: str, device: str) -> Callable[[], float]:
    """A step of train.py, but for one thing."""
    prepare, mode = WAYS[way]
    prepare()
    return steps(Training(SHAPES[name], pick_device(device), mode))


class Plain(Training):
    """The same model, float32 on a CPU, by PyTorch's own functions; on CUDA compiled, loss and all,
    and bfloat16, with all logits in float32: what nanoGPT does."""

    def __init__(self, name: str, device: torch.device) -> None:
        model_module.dropout = F.dropout
        model_module.attend = lambda q, k, v, p: F.scaled_dot_product_attention(
            q, k, v, dropout_p=p, is_causal=True)
        shape = SHAPES[name]
        if device.type == "cuda":  # nanoGPT has 50,304 rows for GPT-2's 50,257 tokens
            rows = -(-shape.args.vocab_size // 64) * 64
            shape = replace(shape, args=replace(shape.args, vocab_size=rows))
        super().__init__(shape, device)
        if device.type == "cpu":
            self.autocast = torch.autocast("cpu", enabled=False)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

        def fast(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            logits = self.model(x)
            return F.cross_entropy(logits.view(-1, logits.size(-1)), y.reshape(-1))

        self.fast = torch.compile(fast) if device.type == "cuda" else fast


def train_plain(name: str, device: str) -> Callable[[], float]:
    """A step of that."""
    return steps(Plain(name, pick_device(device)))


def gpt2_of_transformers(name: str) -> torch.nn.Module:
    """Transformers' GPT-2 of a shape."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2Config, GPT2LMHeadModel
    a = SHAPES[name].args
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=a.vocab_size, n_positions=a.block_size, n_embd=a.n_embd, n_layer=a.n_layer,
        n_head=a.n_head, resid_pdrop=a.dropout, embd_pdrop=a.dropout, attn_pdrop=a.dropout,
        bos_token_id=0, eos_token_id=None))


class OfTransformers(Training):
    """Transformers' GPT-2 in training, as it comes."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__(SHAPES[name], device)
        self.model = gpt2_of_transformers(name).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def loss(self) -> torch.Tensor:
        return self.model(self.batch[0], labels=self.batch[0]).loss


def train_transformers(name: str, device: str) -> Callable[[], float]:
    """A step of that."""
    return steps(OfTransformers(name, pick_device(device)))


def new_tokens(name: str, device: torch.device) -> int:
    """How many are drawn: on CUDA more, for they are fast, and recording a step is in the time."""
    return 48 if device.type == "cpu" else min(500, SHAPES[name].args.block_size - 16)


def sample_ours(name: str, device: str) -> Callable[[], float]:
    """Tokens of one sequence, as sample.py draws them; the seconds of one."""
    where = pick_device(device)
    count = new_tokens(name, where)
    network = model_module.GPT(SHAPES[name].args).eval()
    make_fast(network, "auto", where)

    def work() -> float:
        start = time.perf_counter()
        list(generate(network, [[0]], count, temperature=0.8, top_k=50,
                      record=where.type == "cuda"))
        return (time.perf_counter() - start) / count

    return work


def sample_transformers(name: str, device: str) -> Callable[[], float]:
    """The same by Transformers' `generate`, with its cache."""
    where = pick_device(device)
    network, count = gpt2_of_transformers(name).to(where).eval(), new_tokens(name, where)
    prompt = torch.zeros(1, 1, dtype=torch.long, device=where)

    def work() -> float:
        start = time.perf_counter()
        network.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True,
                         temperature=0.8, top_k=50, max_new_tokens=count,
                         min_new_tokens=count, pad_token_id=0)
        return (time.perf_counter() - start) / count

    return work
