"""GPT-2 in one file: the network, its loss, and sampling with a key-value cache.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-norm blocks, learned
positions, tanh GELU, token embedding tied to the output layer. Parameter names are GPT-2's.
Letters for shapes: B sequences, T tokens, C width, H heads, D = C / H, V vocabulary.
"""
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keepgpt.kernels import LinearCrossEntropy, attend, dropout


@dataclass(frozen=True)
class ModelArgs:
    """The architecture, saved with the weights: all that is needed to build the network again."""
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    dropout: float

    def __post_init__(self) -> None:
        """Raise ValueError for impossible sizes."""
        for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            size = getattr(self, key)
            if type(size) is not int or size < 1:
                raise ValueError(f"{key}: expected a whole number of at least 1, got {size!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")


@dataclass
class KVCache:
    """Keys and values of the first `length` tokens: a (2, B, H, block_size, D) tensor per layer.
    A compiled step has `length` on the device, as a tensor (1,)."""
    layers: list[Tensor]
    length: int | Tensor = 0


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        # queries, keys and values in one matrix product
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd, bias=args.bias)
        self.n_head, self.dropout = args.n_head, args.dropout

    def forward(self, x: Tensor, kv: Tensor | None, past: int | Tensor) -> Tensor:
        """Attend from x (B, T, C) to itself and, if T is 1, to the `past` tokens in `kv`."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, k, v = qkv  # each (B, H, T, D)
        if torch.is_tensor(past):  # no shape may depend on its value
            kv.index_copy_(3, past, qkv[1:].to(kv.dtype))
            mask = torch.arange(kv.size(3), device=x.device) <= past.unsqueeze(1)  # (1, block_size)
            y = F.scaled_dot_product_attention(q.to(kv.dtype), *kv, attn_mask=mask)  # (B, H, T, D)
        else:
            if kv is not None:
                kv[:, :, :, past:past + T] = qkv[1:]
                if T == 1:
                    q, (k, v) = q.to(kv.dtype), kv[:, :, :, :past + 1]  # k, v: (B, H, past + 1, D)
            y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)  # (B, T, C)
        return dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, 4C wide inside."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd, bias=args.bias)
        self.dropout = args.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP both add to the residual stream."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(args.n_embd, args.bias)
        self.attn = Attention(args)
        self.ln_2 = LayerNorm(args.n_embd, args.bias)
        self.mlp = MLP(args)

    def forward(self, x: Tensor, kv: Tensor | None, past: int | Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), kv, past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model: `model(idx)` returns logits, `model(idx, targets)` the mean loss."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.head = None  # a packed copy of the output layer, for sampling on a CPU
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(args.vocab_size, args.n_embd),
            "wpe": nn.Embedding(args.block_size, args.n_embd),
            "h": nn.ModuleList(Block(args) for _ in range(args.n_layer)),
            "ln_f": LayerNorm(args.n_embd, args.bias),
        })
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # the residual stream is a sum of 2 * n_layer of these (GPT-2, section 2.3)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * args.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """Return logits (B, T, V) for the tokens `idx` (B, T), or with `targets` (B, T) the mean
        cross-entropy in nats.

        With a `cache`, idx continues the tokens in it (one token at a time unless it is empty), and
        the result is the last token's logits, (B, 1, V).
        """
        past = cache.length if cache else 0
        wte, wpe, blocks, ln_f = self.transformer.values()
        positions = torch.arange(idx.size(1), device=idx.device) + past  # (T,)
        x = wte(idx) + wpe(positions)  # (B, T, C)
        x = dropout(x, self.args.dropout, self.training)
        for i, block in enumerate(blocks):
            x = block(x, cache.layers[i] if cache else None, past)
        if cache:
            cache.length = past + idx.size(1)
            x = x[:, -1:]  # (B, 1, C)
        x = ln_f(x)
        if targets is None:
            return self.head(x) if self.head else F.linear(x, wte.weight)
        weight = self.output_weight()
        if not torch.is_grad_enabled():
            weight = weight.detach()  # otherwise the loss computes gradients as well
        return LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.reshape(-1),
                                        self.args.vocab_size)

    def output_weight(self) -> Tensor:
        """Return the tied output layer, (V, C); on CUDA padded with zero rows to a multiple of 64,
        for fast matrix products."""
        wte = self.transformer.wte.weight
        return F.pad(wte, (0, 0, 0, -wte.size(0) % 64)) if wte.is_cuda else wte

    def flops_per_token(self) -> int:
        """Return the FLOPs of forward and backward per token of a full block (Chowdhery et al.
        2022, PaLM, appendix B)."""
        n = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * n + 12 * self.args.n_layer * self.args.n_embd * self.args.block_size

    def make_cache(self, batch_size: int) -> KVCache:
        """Return an empty cache for sequences of up to block_size tokens. On a CPU it is float32:
        attention of one query over 512 keys is nine times slower in bfloat16."""
        wte = self.transformer.wte.weight
        dtype = torch.float32 if wte.device.type == "cpu" else wte.dtype
        shape = (2, batch_size, self.args.n_head, self.args.block_size,
                 self.args.n_embd // self.args.n_head)
        return KVCache([wte.new_empty(shape, dtype=dtype) for _ in range(self.args.n_layer)])


def load_model(args: dict[str, Any], state: dict[str, Tensor]) -> GPT:
    """Return the network of these ModelArgs with these weights. Raises ValueError if they do not
    fit."""
    args = ModelArgs(**args)
    # compare sizes first: an absurd one must not allocate a network
    shapes = {key: tuple(state[name].shape) for key in ("wte", "wpe")
              if (name := f"transformer.{key}.weight") in state}
    blocks = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
    found = {"n_layer": len(blocks), **shapes}
    expected = {"n_layer": args.n_layer, "wte": (args.vocab_size, args.n_embd),
                "wpe": (args.block_size, args.n_embd)}
    for key, size in expected.items():
        if found.get(key) != size:
            raise ValueError(f"the weights do not fit the network: {key}: expected {size}, "
                             f"got {found.get(key)}")
    model = GPT(args)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError("the weights do not fit the network: "
                         f"{str(e).splitlines()[1].strip()}") from None
    return model


def compile_decode(model: GPT, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """Return a function that appends tokens (B, 1) to the cache and returns logits (B, 1, V), like
    `model(tokens, cache=cache)`. It is compiled; on CUDA each call replays one CUDA graph, as the
    launches of a small model's kernels take longer than the kernels."""
    compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
    for kv in cache.layers:
        kv[:, :, :, cache.length:] = 0  # the mask would let NaN pass
        torch._dynamo.mark_static_address(kv)  # otherwise a graph may not write to it

    def decode(tokens: Tensor) -> Tensor:
        past = torch.full((1,), cache.length, device=tokens.device)
        cache.length += 1
        return compiled(tokens, cache=KVCache(cache.layers, past))

    return decode


@contextmanager
def disable_cudnn_attention() -> Iterator[None]:
    """Disable cuDNN's attention: it builds a plan for each new key length, which takes tens of
    milliseconds per token."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, stop: int | None = None, seed: int = 1337,
             compile: bool = False) -> Iterator[list[int | None]]:
    """Continue each prompt (token ids, at least one). Yield each sequence's next token per step.

    None stands for a sequence without a new token: its prompt is longer than another's and still
    being read, or it has finished, by the `stop` token (not yielded) or after `max_new_tokens`.
    Past block_size the window slides by a quarter of it, so the cache is refilled once in
    block_size / 4 tokens. `compile` compiles the step of one token, which pays for long texts.
    """
    device, block_size = model.transformer.wte.weight.device, model.args.block_size
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
    tokens = torch.zeros(len(prompts), int(lengths.max()) + max_new_tokens, dtype=torch.long,
                         device=device)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt, device=device)
    finished = torch.zeros_like(lengths, dtype=torch.bool)
    end = int(lengths.min())  # the position of the next token; longer prompts are in `tokens`
    cache, decode = model.make_cache(len(prompts)), None
    new = tokens[:, max(0, end - block_size):end]
    while end < tokens.size(1) and not finished.all():
        if cache.length + new.size(1) > block_size:
            cache.length, new = 0, tokens[:, end - (block_size - block_size // 4):end]
        with disable_cudnn_attention():
            if compile and cache.length > 0:
                decode = decode or compile_decode(model, cache)
                logits = decode(new)  # (B, 1, V)
            else:
                logits = model(new, cache=cache)  # (B, 1, V)
        sampled = sample_token(logits[:, -1], temperature, top_k, top_p, rng)  # (B,)
        in_prompt = end < lengths
        tokens[:, end] = torch.where(in_prompt, tokens[:, end], sampled)
        if stop is not None:
            finished |= ~in_prompt & (sampled == stop)
        finished |= end >= lengths + max_new_tokens
        new = tokens[:, end:end + 1]  # (B, 1)
        end += 1
        yield [None if silent else token
               for silent, token in zip((finished | in_prompt).tolist(), sampled.tolist())]


def sample_token(logits: Tensor, temperature: float, top_k: int, top_p: float,
                 rng: torch.Generator) -> Tensor:
    """Sample a token (B,) from logits (B, V): among the `top_k` likeliest (0 = all), then among the
    likeliest that hold `top_p` of the probability (Holtzman et al. 2020). Temperature 0 takes the
    likeliest. `rng` is a CPU generator."""
    if temperature < 1e-9:  # its inverse could overflow in float32
        return logits.argmax(-1)
    ids, device = None, logits.device
    if 0 < top_k < logits.size(-1) or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # in order
    logits = logits.float().cpu()  # cumsum is not reproducible on CUDA
    # subtract the maximum before dividing: the quotient could overflow
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # (B, K)
    if top_p < 1:
        # zero the tokens after the first ones that hold top_p
        probs[:, 1:] *= (probs.cumsum(-1)[:, :-1] < top_p)
    # inverse transform sampling: torch.multinomial would draw V random numbers
    cumulative = probs.cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=rng) * cumulative[:, -1:]  # (B, 1)
    index = torch.searchsorted(cumulative, drawn, right=True)  # (B, 1)
    return (index if ids is None else ids.cpu().gather(-1, index)).squeeze(-1).to(device)  # (B,)
