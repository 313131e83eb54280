"""GPT-2 and Qwen3 in one file: the networks, their loss, and sampling with a key-value cache.

GPT-2 (Radford et al. 2019): LayerNorm, learned positions, tanh GELU. Qwen3 (Yang et al. 2025,
arXiv 2505.09388): RMSNorm, rotary positions, normalized queries and keys, SwiGLU. Both are pre-norm
and have the parameter names of Hugging Face's. Letters for shapes: B sequences, T tokens, C width,
H heads of queries, K heads of keys and values, D the width of a head, V vocabulary.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keepgpt.errors import UserError
from keepgpt.kernels import (
    LinearCrossEntropy,
    attend,
    compute_dtype,
    dropout,
    norm_and_rotate,
    rms_norm,
)


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
    architecture: str = "gpt2"
    # of qwen3; 0 stands for the size that follows from the others
    n_kv_head: int = 0
    head_dim: int = 0
    n_ff: int = 0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        """Raise UserError for impossible sizes, and for settings that the architecture lacks."""
        if self.architecture not in ("gpt2", "qwen3"):
            raise UserError(f"architecture: expected gpt2 or qwen3, got {self.architecture!r}")
        gpt2 = self.architecture == "gpt2"
        lacks = {f.name: f.default for f in fields(self)[8:]} if gpt2 else {"bias": False}
        for f in fields(self):
            value, least = getattr(self, f.name), int(f.default != 0)
            if f.type is int and (type(value) is not int or value < least):
                raise UserError(f"{f.name}: expected a whole number of at least {least}, "
                                f"got {value!r}")
            if lacks.get(f.name, value) != value:
                raise UserError(f"{f.name}={value}: {self.architecture} has no such setting. "
                                f"Try: leave --{f.name} out")
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.n_head % self.K:
            raise UserError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.K}")
        if not gpt2 and self.D % 2:
            raise UserError(f"head_dim={self.D}: expected an even number")

    @property
    def D(self) -> int:
        """Return the width of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def K(self) -> int:
        """Return the number of heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def ff_width(self) -> int:
        """Return the width inside qwen3's MLP. By default its three matrices have about as many
        parameters as GPT-2's two."""
        return self.n_ff or -(-8 * self.n_embd // (3 * 64)) * 64


@dataclass
class KVCache:
    """Keys and values of the first `length` tokens: a (2, B, K, size, D) tensor per layer. A
    compiled step has `length` on the device, as a tensor (1,)."""
    layers: list[Tensor]
    length: int | Tensor = 0


def attend_cached(q: Tensor, k: Tensor, v: Tensor, kv: Tensor | None, past: int | Tensor,
                  p: float) -> Tensor:
    """Return causal attention, (B, T, H * D), of q (B, H, T, D) to k and v (B, K, T, D) and, if T
    is 1, to the `past` tokens in `kv`; add k and v to `kv`. Weights are dropped with probability
    p."""
    B, H, T, D = q.shape
    K, mask = k.size(1), None
    if torch.is_tensor(past):  # no shape may depend on its value
        kv.index_copy_(3, past, torch.stack((k, v)).to(kv.dtype))
        mask = torch.arange(kv.size(3), device=q.device) <= past.unsqueeze(1)  # (1, size)
    elif kv is not None:
        kv = kv[:, :, :, :past + T]  # (2, B, K, past + T, D)
        kv[0, :, :, past:], kv[1, :, :, past:] = k, v
    if kv is None or T > 1:
        y = attend(q, k, v, p)  # (B, H, T, D)
    else:
        q = q.to(kv.dtype).reshape(B, K, H // K, D)  # the queries that share a key are its rows
        y = F.scaled_dot_product_attention(q, *kv, attn_mask=mask).to(v.dtype).view(B, H, 1, D)
    return y.transpose(1, 2).flatten(2)


class GPT2Block(nn.Module):
    """Causal multi-head self-attention, then an MLP with a GELU. Each has a norm before it, and
    adds to the residual stream x."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        C, self.n_head = args.n_embd, args.n_head
        self.ln_1 = nn.LayerNorm(C, bias=args.bias)
        self.attn = nn.ModuleDict({
            "c_attn": nn.Linear(C, 3 * C, args.bias),  # queries, keys and values in one product
            "c_proj": nn.Linear(C, C, args.bias)})
        self.ln_2 = nn.LayerNorm(C, bias=args.bias)
        self.mlp = nn.ModuleDict({
            "c_fc": nn.Linear(C, 4 * C, args.bias),
            "c_proj": nn.Linear(4 * C, C, args.bias)})

    def forward(self, x: Tensor, p: float, kv: Tensor | None, past: int | Tensor) -> Tensor:
        qkv = self.attn.c_attn(self.ln_1(x)).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = attend_cached(q, k, v, kv, past, p)  # (B, T, C)
        x = x + dropout(self.attn.c_proj(y), p)
        y = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")  # (B, T, 4C)
        return x + dropout(self.mlp.c_proj(y), p)


class RMSNorm(nn.RMSNorm):
    """RMSNorm, with a faster backward pass on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Qwen3Block(nn.Module):
    """The same kind of block in Qwen3's parts. H / K heads of queries share a head of keys and
    values (Ainslie et al. 2023); queries and keys are normalized, then rotated by their position.
    The MLP is a SwiGLU (Shazeer 2020): one linear layer gates the output of another."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        C, H, K, D, eps = args.n_embd, args.n_head, args.K, args.D, args.norm_eps
        self.D = D
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(C, H * D, bias=False),
            "k_proj": nn.Linear(C, K * D, bias=False),
            "v_proj": nn.Linear(C, K * D, bias=False),
            "o_proj": nn.Linear(H * D, C, bias=False),
            "q_norm": RMSNorm(D, eps), "k_norm": RMSNorm(D, eps)})
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(C, args.ff_width, bias=False),
            "up_proj": nn.Linear(C, args.ff_width, bias=False),
            "down_proj": nn.Linear(args.ff_width, C, bias=False)})
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(C, eps), RMSNorm(C, eps)

    def forward(self, x: Tensor, p: float, kv: Tensor | None, past: int | Tensor, *rope: Tensor
                ) -> Tensor:
        attn, mlp, dtype = self.self_attn, self.mlp, compute_dtype(x)
        y = self.input_layernorm(x).to(dtype)  # once, not in each linear layer
        q, k, v = (linear(y).unflatten(-1, (-1, self.D))  # (B, T, H or K, D)
                   for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = (norm_and_rotate(t, norm.weight, norm.eps, *rope)  # (B, H or K, T, D)
                for t, norm in ((q, attn.q_norm), (k, attn.k_norm)))
        y = attend_cached(q, k, v.transpose(1, 2), kv, past, p)  # (B, T, H * D)
        x = x + dropout(attn.o_proj(y), p)
        y = self.post_attention_layernorm(x).to(dtype)
        y = F.silu(mlp.gate_proj(y)) * mlp.up_proj(y)  # (B, T, n_ff)
        return x + dropout(mlp.down_proj(y), p)


def rotary_angles(positions: Tensor, D: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines, (T, D / 2), by which RoPE rotates a head at `positions`,
    (T,): Su et al. 2021, section 3.4.2. Always float32, as in Hugging Face's."""
    frequencies = 1 / theta ** (torch.arange(0, D, 2, device=positions.device).float() / D)
    angles = positions.unsqueeze(1) * frequencies
    return angles.cos(), angles.sin()


class GPT(nn.Module):
    """The language model: `model(idx)` returns logits, `model(idx, targets)` the mean loss."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.lm_head = None  # the output layer is the token embedding
        if args.architecture == "gpt2":
            self.transformer = nn.ModuleDict({
                "wte": nn.Embedding(args.vocab_size, args.n_embd),
                "wpe": nn.Embedding(args.block_size, args.n_embd),
                "h": nn.ModuleList(GPT2Block(args) for _ in range(args.n_layer)),
                "ln_f": nn.LayerNorm(args.n_embd, bias=args.bias),
            })
        else:
            self.model = nn.ModuleDict({
                "embed_tokens": nn.Embedding(args.vocab_size, args.n_embd),
                "layers": nn.ModuleList(Qwen3Block(args) for _ in range(args.n_layer)),
                "norm": RMSNorm(args.n_embd, args.norm_eps),
            })
            if not args.tie_embeddings:
                self.lm_head = nn.Linear(args.n_embd, args.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # the residual stream is a sum of 2 * n_layer of these (GPT-2, section 2.3)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * args.n_layer))
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "bias")):
                nn.init.zeros_(p)  # qwen3's blocks start as the identity
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    @property
    def embedding(self) -> nn.Embedding:
        """Return the token embedding."""
        return (self.transformer.wte if self.args.architecture == "gpt2"
                else self.model.embed_tokens)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """Return logits (B, T, V) for the tokens `idx` (B, T), or with `targets` (B, T) the mean
        cross-entropy in nats.

        With a `cache`, idx continues the tokens in it (one token at a time unless it is empty), and
        the result is the last token's logits, (B, 1, V).
        """
        args, past = self.args, cache.length if cache else 0
        positions = torch.arange(idx.size(1), device=idx.device) + past  # (T,)
        if args.architecture == "gpt2":
            wte, wpe, blocks, norm = self.transformer.values()
            x, rope = wte(idx) + wpe(positions), ()  # (B, T, C)
        else:
            embed_tokens, blocks, norm = self.model.values()
            x, rope = embed_tokens(idx), rotary_angles(positions, args.D, args.rope_theta)
        p = args.dropout if self.training else 0.0
        x = dropout(x, p)
        for i, block in enumerate(blocks):
            x = block(x, p, cache.layers[i] if cache else None, past, *rope)
        if cache:
            cache.length = past + idx.size(1)
            x = x[:, -1:]  # (B, 1, C)
        x = norm(x)
        if targets is None:
            return self.lm_head(x) if self.lm_head else F.linear(x, self.embedding.weight)
        return LinearCrossEntropy.apply(x.flatten(0, 1), self.output_weight(),
                                        targets.flatten(), args.vocab_size)

    def output_weight(self) -> Tensor:
        """Return the output layer, (V, C); on CUDA padded with zero rows to a multiple of 64, for
        fast matrix products."""
        weight = (self.lm_head or self.embedding).weight
        return F.pad(weight, (0, 0, 0, -weight.size(0) % 64)) if weight.is_cuda else weight

    def flops_per_token(self) -> int:
        """Return the FLOPs of forward and backward per token of a full block (Chowdhery et al.
        2022, PaLM, appendix B)."""
        args, n = self.args, sum(p.numel() for p in self.parameters())
        if args.architecture == "gpt2":
            n -= self.transformer.wpe.weight.numel()
        elif self.lm_head:
            n -= self.embedding.weight.numel()  # looked up, in no matrix product
        return 6 * n + 12 * args.n_layer * args.n_head * args.D * args.block_size

    def make_cache(self, batch_size: int, size: int | None = None) -> KVCache:
        """Return an empty cache for sequences of up to `size` tokens, by default block_size. On a
        CPU it is float32: attention of one query over 512 keys is nine times slower in bfloat16."""
        args, weight = self.args, self.embedding.weight
        dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        shape = (2, batch_size, args.K, size or args.block_size, args.D)
        return KVCache([weight.new_zeros(shape, dtype=dtype) for _ in range(args.n_layer)])


def load_model(args: dict[str, Any], state: dict[str, Tensor]) -> GPT:
    """Return the network of these ModelArgs with these weights, in float32. Raises UserError if
    they do not fit."""
    model = GPT(ModelArgs(**args))  # the meta device would load the compiler, for a second
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise UserError("the weights do not fit the network: "
                        + str(e).splitlines()[1].strip()) from None
    return model


def compile_decode(model: GPT, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """Return a function that appends tokens (B, 1) to the cache and returns logits (B, 1, V), like
    `model(tokens, cache=cache)`. It is compiled; on CUDA each call replays one CUDA graph, as the
    launches of a small model's kernels take longer than the kernels."""
    compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
    for kv in cache.layers:
        torch._dynamo.mark_static_address(kv)  # otherwise a graph may not write to it

    def decode(tokens: Tensor) -> Tensor:
        past = torch.full((1,), cache.length, device=tokens.device)
        cache.length += 1
        return compiled(tokens, cache=KVCache(cache.layers, past))

    return decode


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, stop: int | None = None, seed: int = 1337,
             compile: bool = False) -> Iterator[list[int | None]]:
    """Continue each prompt (token ids, at least one). Yield each sequence's next token per step.

    None stands for a sequence without a new token: its prompt is longer than another's and still
    being read, or it has finished, by the `stop` token (not yielded) or after `max_new_tokens`.
    Past block_size the window slides by a quarter of it. `compile` compiles the step of one token.
    """
    device, block_size = model.embedding.weight.device, model.args.block_size
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    tokens = F.pad(tokens, (0, max_new_tokens)).to(device)  # (B, longest prompt + max_new_tokens)
    finished = torch.zeros_like(lengths, dtype=torch.bool)
    end = int(lengths.min())  # the position of the next token; longer prompts are in `tokens`
    cache = model.make_cache(len(prompts), min(block_size, tokens.size(1)))
    decode = compile_decode(model, cache) if compile else None
    new = tokens[:, max(0, end - block_size):end]
    while end < tokens.size(1) and not finished.all():
        if cache.length + new.size(1) > block_size:
            cache.length, new = 0, tokens[:, end - (block_size - block_size // 4):end]
        logits = decode(new) if decode and cache.length else model(new, cache=cache)  # (B, 1, V)
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
