"""GPT-2 as one file: the network, its optimizer groups, generation with a key-value cache, and
weights from elsewhere.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-norm blocks, learned
positions, tanh GELU, token embedding tied to the output layer. Parameter names are GPT-2's.
Letters for shapes: B sequences, T tokens, C width, H heads, D = C / H, V vocabulary.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keepgpt.kernels import LinearCrossEntropy, attend, dropout


@dataclass(frozen=True)
class ModelArgs:
    """What fixes the network: saved with the weights, and enough to build it again."""
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    dropout: float

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no network has."""
        for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            size = getattr(self, key)
            if type(size) is not int or size < 1:
                raise ValueError(f"{key}: expected a whole number of at least 1, got {size!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")


@dataclass
class Cache:
    """Keys and values of the tokens seen so far: one (2, B, H, block_size, D) tensor a layer,
    `length` of it filled; a recorded step has that number on the device, (1,)."""
    layers: list[Tensor]
    length: int | Tensor = 0


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, under the names that GPT-2 gives them."""

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
        # queries, keys, values in one product
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd, bias=args.bias)
        self.n_head, self.dropout = args.n_head, args.dropout

    def forward(self, x: Tensor, kv: Tensor | None, seen: int | Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # each (B, H, T, D)
        if torch.is_tensor(seen):  # no shape may depend on it
            kv.index_copy_(3, seen, qkv[1:].to(kv.dtype))
            mask = torch.arange(kv.size(3), device=x.device) <= seen.unsqueeze(1)  # (1, block_size)
            y = F.scaled_dot_product_attention(q.to(kv.dtype), *kv, attn_mask=mask)
        else:
            if kv is not None:
                kv[:, :, :, seen:seen + T] = qkv[1:]
                if T == 1:
                    q, (k, v) = q.to(kv.dtype), kv[:, :, :, :seen + 1]  # k, v: (B, H, seen + 1, D)
            y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)
        return dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two layers, four times as wide in between."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd, bias=args.bias)
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd, bias=args.bias)
        self.dropout = args.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """One transformer block: each half adds to the residual stream."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(args.n_embd, args.bias)
        self.attn = Attention(args)
        self.ln_2 = LayerNorm(args.n_embd, args.bias)
        self.mlp = MLP(args)

    def forward(self, x: Tensor, kv: Tensor | None, seen: int | Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), kv, seen)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model. `model(idx)` gives logits, `model(idx, targets)` the mean loss."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.head = None  # the output layer, where it is not the token embedding as it lies
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(args.vocab_size, args.n_embd),
            "wpe": nn.Embedding(args.block_size, args.n_embd),
            "h": nn.ModuleList(Block(args) for _ in range(args.n_layer)),
            "ln_f": LayerNorm(args.n_embd, args.bias),
        })
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # 2 n_layer of these add up on the residual stream (GPT-2, section 2.3)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * args.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) after each of the tokens `idx` (B, T), or their mean cross-entropy in
        nats with `targets`.

        With a `cache`, idx continues what the cache holds (one token at a time once it is not
        empty), and only the logits after the last token come back, (B, 1, V).
        """
        seen = cache.length if cache else 0
        wte, wpe, blocks, ln_f = self.transformer.values()
        positions = torch.arange(idx.size(1), device=idx.device) + seen
        x = wte(idx) + wpe(positions)  # (B, T, C)
        x = dropout(x, self.args.dropout, self.training)
        for i, block in enumerate(blocks):
            x = block(x, cache.layers[i] if cache else None, seen)
        if cache:
            cache.length = seen + idx.size(1)
            x = x[:, -1:]
        x = ln_f(x)
        if targets is None:
            return self.head(x) if self.head else F.linear(x, wte.weight)
        weight = self.output_weight()
        if not torch.is_grad_enabled():
            weight = weight.detach()  # else its gradient would be made as well
        return LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.reshape(-1),
                                        self.args.vocab_size)

    def output_weight(self) -> Tensor:
        """The tied output layer, (V, C); on CUDA with zero rows up to a multiple of 64, which its
        kernels want."""
        wte = self.transformer.wte.weight
        return F.pad(wte, (0, 0, 0, -wte.size(0) % 64)) if wte.is_cuda else wte

    def flops_per_token(self) -> int:
        """Forward and backward for one token of a full block: Chowdhery et al. 2022 (PaLM),
        appendix B."""
        n = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * n + 12 * self.args.n_layer * self.args.n_embd * self.args.block_size

    def new_cache(self, batch: int) -> Cache:
        """An empty cache for `batch` sequences of up to block_size tokens.

        On a CPU it is float32: attention of one query over 512 keys is nine times as slow in
        bfloat16.
        """
        wte = self.transformer.wte.weight
        dtype = torch.float32 if wte.device.type == "cpu" else wte.dtype
        shape = (2, batch, self.args.n_head, self.args.block_size,
                 self.args.n_embd // self.args.n_head)
        return Cache([wte.new_empty(shape, dtype=dtype) for _ in range(self.args.n_layer)])


def load_model(args: dict[str, Any], state: dict[str, Tensor]) -> GPT:
    """Return the network of these sizes with these weights. Raises ValueError if they do not
    fit."""
    args = ModelArgs(**args)
    # an absurd size is found here, before a network of that size is built
    blocks = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
    expected = {"n_layer": args.n_layer, "wte": (args.vocab_size, args.n_embd),
                "wpe": (args.block_size, args.n_embd)}
    found = {"n_layer": len(blocks)} | {
        key: tuple(getattr(state.get(f"transformer.{key}.weight"), "shape", ()))
        for key in ("wte", "wpe")}
    for key, size in expected.items():
        if found[key] != size:
            raise ValueError(f"the weights do not fit the network: {key}: expected {size}, "
                             f"got {found[key]}")
    model = GPT(args)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError("the weights do not fit the network: "
                         f"{str(e).splitlines()[1].strip()}") from None
    return model


class RecordedStep:
    """One more token for each sequence on CUDA, as a CUDA graph: one launch in place of hundreds,
    which take the host longer than the GPU needs for a small model."""

    def __init__(self, model: GPT, cache: Cache) -> None:
        self.cache, device = cache, cache.layers[0].device
        self.tokens = torch.zeros(cache.layers[0].size(1), 1, dtype=torch.long, device=device)
        self.at = torch.full((1,), cache.length, device=device)
        for kv in cache.layers:
            kv[:, :, :, cache.length:] = 0  # the mask would not stop a NaN in what is not filled
        side = torch.cuda.Stream(device)  # libraries allocate at their first calls
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                model(self.tokens, cache=Cache(cache.layers, self.at))
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = model(self.tokens, cache=Cache(cache.layers, self.at))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, 1, V) after `tokens` (B, 1), which continue the cache; good until the next
        call."""
        self.tokens.copy_(tokens)
        self.at.fill_(self.cache.length)
        self.graph.replay()
        self.cache.length += 1
        return self.logits


@contextmanager
def disable_cudnn_attention() -> Iterator[None]:
    """Leave attention to the other kernels: cuDNN's plans anew for each key length, which takes
    tens of milliseconds a token."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, stop: int | None = None, seed: int = 1337,
             record: bool = False) -> Iterator[list[int | None]]:
    """Continue each prompt (token ids, at least one); yields each sequence's next token as it is
    made.

    None stands for a sequence that has nothing new: its prompt is longer than another's and still
    being read, or it has ended, by the `stop` token (not yielded) or after `max_new_tokens`. Past
    block_size the window slides by a quarter of it at a time, so that the cache is filled anew only
    once in so many tokens. With `record`, on CUDA, a step is recorded once and played again.
    """
    device, block_size = model.transformer.wte.weight.device, model.args.block_size
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.zeros(len(prompts), int(lengths.max()) + max_new_tokens, dtype=torch.long,
                         device=device)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt, device=device)
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    # every sequence has so many tokens; prompts that are longer wait in `tokens`
    known = int(lengths.min())
    cache, recorded = model.new_cache(len(prompts)), None
    new = tokens[:, max(0, known - block_size):known]
    while known < tokens.size(1) and not ended.all():
        if cache.length + new.size(1) > block_size:
            cache.length, new = 0, tokens[:, known - (block_size - block_size // 4):known]
        with disable_cudnn_attention():
            if record and cache.length > 0:
                recorded = recorded or RecordedStep(model, cache)
                logits = recorded(new)
            else:
                logits = model(new, cache=cache)
        picked = pick(logits[:, -1], temperature, top_k, top_p, rng)  # (B,)
        in_prompt = known < lengths
        tokens[:, known] = torch.where(in_prompt, tokens[:, known], picked)
        ended |= (~in_prompt & (picked == (-1 if stop is None else stop))
                  | (known >= lengths + max_new_tokens))
        new = tokens[:, known:known + 1]
        known += 1
        yield [None if silent else token
               for silent, token in zip((ended | in_prompt).tolist(), picked.tolist())]


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float,
         rng: torch.Generator) -> Tensor:
    """Draw a token, (B,), from logits, (B, V), among the `top_k` likeliest (0 = all) that hold
    `top_p` of the probability (Holtzman et al. 2020); temperature 0 takes the likeliest. `rng` is a
    generator of the CPU, which draws."""
    if temperature < 1e-9:  # in float32 its inverse could overflow
        return logits.argmax(-1)
    ids, device = None, logits.device
    if 0 < top_k < logits.size(-1) or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # likeliest first
    logits = logits.float().cpu()  # cumsum does not repeat on CUDA
    # at most 0: it can't overflow
    chances = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        # what the likelier ones hold suffices without these
        chances[:, 1:] *= (chances.cumsum(-1)[:, :-1] < top_p)
    # inverse transform sampling: torch.multinomial draws a number for each of the tokens
    reached = chances.cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=rng) * reached[:, -1:]
    place = torch.searchsorted(reached, drawn, right=True)
    return (place if ids is None else ids.cpu().gather(-1, place)).squeeze(-1).to(device)



