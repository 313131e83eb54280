"""GPT-2, Llama and Qwen3 in one file: the networks, their loss, sampling with a key-value cache.

GPT-2 (Radford et al. 2019): LayerNorm, learned positions, tanh GELU. Llama (Touvron et al. 2023):
RMSNorm, rotary positions, SwiGLU. Qwen3 (Yang et al. 2025, arXiv 2505.09388) is a Llama with
normalized queries and keys. All are pre-norm and have the parameter names of Hugging Face's.

Letters for shapes: B sequences, T tokens, C width, H heads of queries, K heads of keys and values,
D the width of a head, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keepgpt import kernels
from keepgpt.errors import UserError

INIT_STD = 0.02  # of the initial weights (GPT-2)


@dataclass(frozen=True)
class ModelArgs:
    """The architecture, saved with the weights: all that is needed to build the network again."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool = False  # of gpt2
    dropout: float = 0.0
    architecture: str = "gpt2"
    # GPT.settings says which architecture has these; 0 = the size that follows from the others
    n_kv_head: int = 0
    head_dim: int = 0
    n_ff: int = 0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        """Raise UserError for impossible sizes, and for settings that the architecture lacks."""
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"architecture: expected {' or '.join(ARCHITECTURES)}, "
                f"got {self.architecture!r}"
            )
        # sizes come from settings, checkpoints and Hugging Face's config.json
        for name, least in SIZES.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(
                    f"{name}: expected a whole number of at least {least}, "
                    f"got {value!r}"
                )
        self.check_settings()

        # heads share the width, and queries share keys
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}"
            )
        if self.n_head % self.K:
            raise UserError(
                f"n_head={self.n_head} is not a multiple of n_kv_head={self.K}"
            )
        # RoPE rotates pairs of elements
        if "rope_theta" in ARCHITECTURES[self.architecture].settings and self.D % 2:
            raise UserError(f"head_dim={self.D}: expected an even number")

    def check_settings(self) -> None:
        """Raise UserError if a setting that the architecture lacks has another value than its
        default."""
        existing = ARCHITECTURES[self.architecture].settings
        every = {name for kind in ARCHITECTURES.values() for name in kind.settings}
        for name in sorted(every.difference(existing)):
            value = getattr(self, name)
            if value != getattr(ModelArgs, name):
                raise UserError(
                    f"{name}={value}: {self.architecture} has no such setting. "
                    f"Try: leave --{name} out"
                )

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
        """Return the width inside a SwiGLU. By default its three matrices have about as many
        parameters as GPT-2's two."""
        # a multiple of 64, for fast matrix products
        return self.n_ff or 64 * math.ceil(8 * self.n_embd / (3 * 64))


# the least value of each size in ModelArgs
SIZES = {
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 1,
    "block_size": 1,
    "vocab_size": 1,
    "n_kv_head": 0,
    "head_dim": 0,
    "n_ff": 0,
}


@dataclass
class KVCache:
    """Keys and values of the first `length` tokens: a tensor (2, B, K, size, D) per layer."""

    layers: list[Tensor]
    length: int = 0


def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Return causal attention, softmax(q k^T / sqrt(D)) v, (B, H, T, D), of q (B, H, T, D) to k and
    v (B, K, T, D): Vaswani et al. 2017, section 3.2.1. Each head of keys and values serves H / K
    heads of queries (Ainslie et al. 2023). Attention weights are dropped with probability `p`."""
    # some kernels need as many heads of keys as of queries
    queries_per_key = q.size(1) // k.size(1)
    if queries_per_key > 1:
        k = k.repeat_interleave(queries_per_key, 1)  # (B, H, T, D)
        v = v.repeat_interleave(queries_per_key, 1)  # (B, H, T, D)
    if kernels.has_fast_attention(q):
        return kernels.attend(q, k, v, p)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)


def attend_to_cache(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return attention, (B, H, N, D), of the last N tokens' q (B, H, N, D) to all tokens of keys
    and values (B, K, T, D)."""
    B, H, N, D = q.shape
    K = keys.size(1)
    T = keys.size(2)
    # the last token attends to all, those before it not to the ones after them
    mask = None
    if N > 1:
        mask = torch.ones(N, T, dtype=torch.bool, device=q.device).tril(T - N)
        mask = mask.repeat(H // K, 1)  # (H / K * N, T)
    # the queries that share a key become rows of one product
    q = q.to(keys.dtype).reshape(B, K, H // K * N, D)
    y = F.scaled_dot_product_attention(q, keys, values, mask)  # (B, K, H / K * N, D)
    return y.view(B, H, N, D)


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor | None, past: int, p: float
) -> Tensor:
    """Return causal attention, (B, T, H * D), of q (B, H, T, D) to k and v (B, K, T, D) and to the
    `past` tokens in the cache `kv` (2, B, K, size, D), to which k and v are added."""
    end = past + q.size(2)
    # add the new tokens to the cache, if there is one
    if kv is not None:
        kv[0, :, :, past:end] = k
        kv[1, :, :, past:end] = v

    if past:
        keys, values = kv[:, :, :, :end]  # (B, K, end, D) each
        y = attend_to_cache(q, keys, values).to(v.dtype)  # (B, H, T, D)
    else:
        y = attend(q, k, v, p)  # (B, H, T, D)
    return y.transpose(1, 2).flatten(2)  # (B, T, H * D)


class GPT2Block(nn.Module):
    """Causal multi-head self-attention, then an MLP with a GELU. Each has a norm before it, and
    adds to the residual stream x."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        C = args.n_embd
        self.n_head = args.n_head
        self.ln_1 = nn.LayerNorm(C, bias=args.bias)
        self.attn = nn.ModuleDict(
            {
                # queries, keys and values in one product
                "c_attn": nn.Linear(C, 3 * C, args.bias),
                "c_proj": nn.Linear(C, C, args.bias),
            }
        )
        self.ln_2 = nn.LayerNorm(C, bias=args.bias)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(C, 4 * C, args.bias),
                "c_proj": nn.Linear(4 * C, C, args.bias),
            }
        )

    def forward(self, x: Tensor, p: float, kv: Tensor | None, past: int) -> Tensor:
        """Return the residual stream (B, T, C) after this block; see `attend_cached`."""
        # attention: tokens read from the tokens before them
        qkv = self.attn.c_attn(self.ln_1(x))  # (B, T, 3C)
        qkv = qkv.unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = attend_cached(q, k, v, kv, past, p)  # (B, T, C)
        x = x + F.dropout(self.attn.c_proj(y), p)

        # the MLP: each token alone
        y = self.mlp.c_fc(self.ln_2(x))  # (B, T, 4C)
        y = F.gelu(y, approximate="tanh")
        return x + F.dropout(self.mlp.c_proj(y), p)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019). It is
    computed in the dtype of the weight and returned in that of the matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x (..., C)."""
        # in bfloat16 the mean of squares would lose digits
        wide_x = x.to(self.weight.dtype)
        if kernels.has_fast_norm(x):
            y = kernels.RMSNormFunction.apply(wide_x, self.weight, self.eps)
        else:
            y = super().forward(wide_x)
        return y.to(kernels.compute_dtype(x))


def rotary_angles(positions: Tensor, D: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines, (T, D / 2), by which RoPE rotates a head at `positions`,
    (T,): Su et al. 2021, section 3.4.2. Always float32, as in Hugging Face's."""
    # pair i turns by theta^(-2 i / D) per position
    exponents = torch.arange(0, D, 2, device=positions.device).float() / D  # (D / 2,)
    frequencies = 1 / theta**exponents
    angles = positions.unsqueeze(1) * frequencies  # (T, D / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (B, H, T, D) with the elements i and i + D / 2 of each head rotated by an angle,
    whose `cos` and `sin` are (T, D / 2) (Su et al. 2021, as in Hugging Face's)."""
    a, b = x.chunk(2, -1)  # (B, H, T, D / 2) each
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    return torch.cat((rotated_a, rotated_b), -1).to(x.dtype)  # (B, H, T, D)


class LlamaBlock(nn.Module):
    """Causal self-attention with rotary positions, whose heads of keys and values each serve
    several heads of queries, then a SwiGLU (Shazeer 2020): one linear layer gates the output of
    another. Each has a norm before it, and adds to the residual stream x."""

    # of each head of queries and keys; Identity ignores its arguments
    head_norm = nn.Identity

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        C = args.n_embd
        self.D = args.D
        # no biases
        linear = partial(nn.Linear, bias=False)
        q_width = args.n_head * args.D
        kv_width = args.K * args.D
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(C, q_width),
                "k_proj": linear(C, kv_width),
                "v_proj": linear(C, kv_width),
                "o_proj": linear(q_width, C),
                "q_norm": self.head_norm(args.D, args.norm_eps),
                "k_norm": self.head_norm(args.D, args.norm_eps),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": linear(C, args.ff_width),
                "up_proj": linear(C, args.ff_width),
                "down_proj": linear(args.ff_width, C),
            }
        )
        self.input_layernorm = RMSNorm(C, args.norm_eps)
        self.post_attention_layernorm = RMSNorm(C, args.norm_eps)

    def forward(
        self,
        x: Tensor,
        p: float,
        kv: Tensor | None,
        past: int,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Return the residual stream (B, T, C) after this block; see `attend_cached` and
        `rotary_angles`."""
        # attention: tokens read from the tokens before them
        attn = self.self_attn
        y = self.input_layernorm(x)
        q = attn.q_proj(y).unflatten(-1, (-1, self.D))  # (B, T, H, D)
        k = attn.k_proj(y).unflatten(-1, (-1, self.D))  # (B, T, K, D)
        v = attn.v_proj(y).unflatten(-1, (-1, self.D))  # (B, T, K, D)
        q = rotate(attn.q_norm(q).transpose(1, 2), cos, sin)  # (B, H, T, D)
        k = rotate(attn.k_norm(k).transpose(1, 2), cos, sin)  # (B, K, T, D)
        y = attend_cached(q, k, v.transpose(1, 2), kv, past, p)  # (B, T, H * D)
        x = x + F.dropout(attn.o_proj(y), p)

        # the SwiGLU: each token alone
        y = self.post_attention_layernorm(x)
        y = F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y)  # (B, T, n_ff)
        return x + F.dropout(self.mlp.down_proj(y), p)


class Qwen3Block(LlamaBlock):
    """A LlamaBlock that normalizes each head of its queries and keys (Henry et al. 2020)."""

    head_norm = RMSNorm


# embedded tokens, and what each block needs to know about their positions
Embedded = tuple[Tensor, tuple[Tensor, ...]]


class GPT(nn.Module):
    """The base of all architectures: `model(idx)` returns logits, `model(idx, targets)` the loss.

    A subclass builds the modules and names them in its class attributes.
    """

    # the fields of ModelArgs that only some architectures have
    settings: tuple[str, ...]
    # names of modules: the token embedding, the list of blocks, the norm after the last block, and
    # the embedding of positions, if there is one
    tokens: str
    layers: str
    final_norm: str
    positions = ""
    # endings of names of parameters -> how many matrices lie below one another; Muon separates them
    stacked: dict[str, int] = {}
    # endings of names of matrices that start at 0: each block is then the identity, and the first
    # prediction uniform
    zeroed: tuple[str, ...] = ()

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.lm_head = None  # the output layer is the token embedding

    @property
    def embedding(self) -> nn.Embedding:
        """Return the token embedding, whose weight is (V, C)."""
        return self.get_submodule(self.tokens)

    def embed(self, idx: Tensor, positions: Tensor) -> Embedded:
        """Return the embedded tokens `idx` (B, T) at `positions` (T,), as (B, T, C), and what each
        block needs to know about the positions."""
        raise NotImplementedError

    def init_parameter(self, name: str, p: Tensor) -> None:
        """Set the initial values of a parameter. The weights of norms keep their 1."""
        if name.endswith(("bias", *self.zeroed)):
            nn.init.zeros_(p)
        elif p.dim() == 2:
            nn.init.normal_(p, std=INIT_STD)

    def init_parameters(self) -> None:
        """Set the initial values of all parameters."""
        for name, p in self.named_parameters():
            self.init_parameter(name, p)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return logits (B, T, V) for the tokens `idx` (B, T), or with `targets` (B, T) the mean
        cross-entropy in nats.

        With a `cache`, idx continues the tokens in it, and the result is the last token's logits,
        (B, 1, V).
        """
        past = cache.length if cache else 0
        p = self.args.dropout if self.training else 0.0
        positions = torch.arange(past, past + idx.size(1), device=idx.device)  # (T,)

        # tokens to vectors, then block after block
        x, about_positions = self.embed(idx, positions)  # (B, T, C)
        x = F.dropout(x, p)
        for i, block in enumerate(self.get_submodule(self.layers)):
            kv = cache.layers[i] if cache else None
            x = block(x, p, kv, past, *about_positions)
        # sampling needs the last token's logits only
        if cache:
            cache.length = past + idx.size(1)
            x = x[:, -1:]  # (B, 1, C)
        x = self.get_submodule(self.final_norm)(x)

        # the output layer is the token embedding, unless there is one of its own
        if targets is None:
            if self.lm_head:
                return self.lm_head(x)  # (B, T, V)
            return F.linear(x, self.embedding.weight)  # (B, T, V)
        # cross_entropy(linear(x, weight), targets), without holding the logits of all tokens
        weight = self.output_weight()
        return kernels.LinearCrossEntropy.apply(
            x.flatten(0, 1), weight, targets.flatten(), self.args.vocab_size
        )

    def output_weight(self) -> Tensor:
        """Return the output layer, (V, C); on CUDA padded with zero rows to a multiple of 64, for
        fast matrix products."""
        weight = (self.lm_head or self.embedding).weight
        if not weight.is_cuda:
            return weight
        missing_rows = -weight.size(0) % 64
        return F.pad(weight, (0, 0, 0, missing_rows))

    def flops_per_token(self) -> int:
        """Return the FLOPs of forward and backward per token of a full block (Chowdhery et al.
        2022, PaLM, appendix B)."""
        args = self.args
        n = sum(p.numel() for p in self.parameters())
        # embeddings are looked up, in no matrix product, unless they are the output layer as well
        if self.positions:
            n -= self.get_parameter(f"{self.positions}.weight").numel()
        if self.lm_head:
            n -= self.embedding.weight.numel()
        # 2 for each product forward and 4 backward; attention has two such products per layer
        return 6 * n + 12 * args.n_layer * args.n_head * args.D * args.block_size

    def make_cache(self, batch_size: int, size: int | None = None) -> KVCache:
        """Return an empty cache for sequences of up to `size` tokens, by default block_size. On a
        CPU it is float32: attention of one query over 512 keys is nine times slower in bfloat16."""
        args = self.args
        weight = self.embedding.weight
        dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        # keys and values in one tensor
        shape = (2, batch_size, args.K, size or args.block_size, args.D)
        layers = [weight.new_zeros(shape, dtype=dtype) for _ in range(args.n_layer)]
        return KVCache(layers)


class GPT2(GPT):
    """GPT-2, with the parameter names of Hugging Face's GPT2LMHeadModel."""

    settings = ("bias",)
    stacked = {"attn.c_attn.weight": 3}
    tokens = "transformer.wte"
    layers = "transformer.h"
    final_norm = "transformer.ln_f"
    positions = "transformer.wpe"

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args.vocab_size, args.n_embd),
                "wpe": nn.Embedding(args.block_size, args.n_embd),
                "h": nn.ModuleList(GPT2Block(args) for _ in range(args.n_layer)),
                "ln_f": nn.LayerNorm(args.n_embd, bias=args.bias),
            }
        )
        self.init_parameters()

    def embed(self, idx: Tensor, positions: Tensor) -> Embedded:
        # positions are learned: the blocks need to know nothing about them
        return self.transformer.wte(idx) + self.transformer.wpe(positions), ()

    def init_parameter(self, name: str, p: Tensor) -> None:
        if name.endswith("c_proj.weight"):
            # the residual stream is a sum of 2 * n_layer of these (GPT-2, section 2.3)
            nn.init.normal_(p, std=INIT_STD / math.sqrt(2 * self.args.n_layer))
        else:
            super().init_parameter(name, p)


class Llama(GPT):
    """Llama, with the parameter names of Hugging Face's LlamaForCausalLM."""

    settings = (
        "n_kv_head",
        "head_dim",
        "n_ff",
        "rope_theta",
        "norm_eps",
        "tie_embeddings",
    )
    tokens = "model.embed_tokens"
    layers = "model.layers"
    final_norm = "model.norm"
    zeroed = ("o_proj.weight", "down_proj.weight", "lm_head.weight")
    block = LlamaBlock

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(args.vocab_size, args.n_embd),
                "layers": nn.ModuleList(self.block(args) for _ in range(args.n_layer)),
                "norm": RMSNorm(args.n_embd, args.norm_eps),
            }
        )
        if not args.tie_embeddings:
            self.lm_head = nn.Linear(args.n_embd, args.vocab_size, bias=False)
        self.init_parameters()

    def embed(self, idx: Tensor, positions: Tensor) -> Embedded:
        # each block rotates its queries and keys by these angles
        angles = rotary_angles(positions, self.args.D, self.args.rope_theta)
        return self.model.embed_tokens(idx), angles


class Qwen3(Llama):
    """Qwen3, with the parameter names of Hugging Face's Qwen3ForCausalLM."""

    block = Qwen3Block


# by the name in config.architecture
ARCHITECTURES: dict[str, type[GPT]] = {"gpt2": GPT2, "llama": Llama, "qwen3": Qwen3}


def build_model(args: ModelArgs) -> GPT:
    """Return a GPT of the architecture that `args` names, with random weights in float32."""
    return ARCHITECTURES[args.architecture](args)


def load_model(
    args: dict, state: dict[str, Tensor], source: str = "the weights"
) -> GPT:
    """Return the GPT of these ModelArgs with these weights, in float32. Raises UserError if they
    do not fit; it names their `source`."""
    # the meta device would build it faster, but loads the compiler, which takes a second
    model = build_model(ModelArgs(**args))

    # a tied output layer may be stored as well, or instead of the embedding
    state = dict(state)
    if model.lm_head is None and "lm_head.weight" in state:
        name = f"{model.tokens}.weight"
        head = state.pop("lm_head.weight")
        if not torch.equal(state.setdefault(name, head), head):
            raise UserError(
                f"{source}: expected lm_head.weight equal to {name}, as they are tied, "
                "got other weights"
            )
    # names and shapes must be the network's
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        reason = str(e).splitlines()[1].strip()
        raise UserError(f"{source}: do not fit the network: {reason}") from None
    return model


def crop_weights(
    args: dict, state: dict[str, Tensor], vocab_size: int, block_size: int
) -> tuple[dict, dict[str, Tensor]]:
    """Return the ModelArgs and the weights of the same network with a smaller vocabulary and a
    shorter block."""
    # the names of the matrices with a row for each token or position, and the rows to keep
    kind = ARCHITECTURES[args.get("architecture", "gpt2")]
    rows = {f"{kind.tokens}.weight": vocab_size, "lm_head.weight": vocab_size}
    if kind.positions:
        rows[f"{kind.positions}.weight"] = block_size
    cropped = {
        name: tensor[: rows[name]].clone() if name in rows else tensor
        for name, tensor in state.items()
    }
    return args | {"vocab_size": vocab_size, "block_size": block_size}, cropped


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: int | None = None,
    seed: int = 1337,
) -> Iterator[list[int | None]]:
    """Continue each prompt (token ids, at least one). Yield each sequence's next token per step.

    None stands for a sequence without a new token: its prompt is longer than another's and still
    being read, or it has finished, by the `stop` token (not yielded) or after `max_new_tokens`.
    Past block_size the window slides by a quarter of it.
    """
    device = model.embedding.weight.device
    block_size = model.args.block_size
    rng = torch.Generator().manual_seed(seed)

    # the tokens of all sequences, with room for the new ones
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    rows = [torch.tensor(prompt) for prompt in prompts]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, longest prompt)
    tokens = F.pad(tokens, (0, max_new_tokens)).to(device)
    finished = torch.zeros_like(lengths, dtype=torch.bool)  # (B,)

    # read the shortest prompt at once; longer ones are in `tokens`, and read token by token
    end = int(lengths.min())  # the position of the next token
    cache = model.make_cache(len(prompts), min(block_size, tokens.size(1)))
    new = tokens[:, max(0, end - block_size) : end]
    while end < tokens.size(1) and not finished.all():
        # the block is full: read the last three quarters of it again
        if cache.length + new.size(1) > block_size:
            cache.length = 0
            new = tokens[:, end - (block_size - block_size // 4) : end]
        logits = model(new, cache=cache)  # (B, 1, V)
        sampled = sample_token(logits[:, -1], temperature, top_k, top_p, rng)  # (B,)

        # keep the tokens of longer prompts, and find the sequences that end here
        in_prompt = end < lengths
        tokens[:, end] = torch.where(in_prompt, tokens[:, end], sampled)
        if stop is not None:
            finished |= ~in_prompt & (sampled == stop)
        finished |= end >= lengths + max_new_tokens
        new = tokens[:, end : end + 1]  # (B, 1)
        end += 1
        is_silent = finished | in_prompt
        pairs = zip(is_silent.tolist(), sampled.tolist())
        yield [None if silent else token for silent, token in pairs]


def sample_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, rng: torch.Generator
) -> Tensor:
    """Sample a token (B,) from logits (B, V): among the `top_k` likeliest (0 = all), then among the
    likeliest that hold `top_p` of the probability (Holtzman et al. 2020). Temperature 0 takes the
    likeliest. `rng` is a CPU generator."""
    V = logits.size(-1)
    device = logits.device
    # the inverse of a smaller temperature could overflow in float32
    if temperature < 1e-9:
        return logits.argmax(-1)

    # the candidates, the likeliest first if only some of them count; `ids` are their tokens
    if 0 < top_k < V or top_p < 1:
        logits, ids = logits.topk(min(top_k or V, V))  # (B, N) each
    else:
        ids = torch.arange(V, device=device).expand_as(logits)  # (B, V)

    # on the CPU: cumsum is not reproducible on CUDA
    logits = logits.float().cpu()
    # subtract the maximum before dividing: the quotient could overflow
    logits = logits - logits.amax(-1, keepdim=True)
    probs = (logits / temperature).softmax(-1)  # (B, N)
    if top_p < 1:
        # zero the tokens after the first ones that hold top_p
        probs[:, 1:] *= probs.cumsum(-1)[:, :-1] < top_p

    # inverse transform sampling: torch.multinomial would draw V random numbers
    cumulative = probs.cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=rng) * cumulative[:, -1:]  # (B, 1)
    index = torch.searchsorted(cumulative, drawn, right=True)  # (B, 1)
    return ids.gather(-1, index.to(device)).squeeze(-1)  # (B,)
