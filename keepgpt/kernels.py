"""The chunked loss and the CPU kernels of attention, dropout, RMSNorm, RoPE and linear layers, each
with the plain PyTorch form that it equals. Letters for shapes are those of model.py."""
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_LOGITS = 1 << 25  # held in memory at a time; eight times as many on a GPU


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: autocast's, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Return causal attention, (B, H, T, D), of q (B, H, T, D) to k and v (B, K, T, D). Attention
    weights are dropped with probability `p`."""
    H, T, D = q.shape[1:]
    if k.size(1) < H:  # some kernels want as many heads
        k, v = (t.repeat_interleave(H // k.size(1), 1) for t in (k, v))  # (B, H, T, D)
    if q.device.type != "cpu" or not p and q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    # On a CPU that function is slow in bfloat16, and slower with dropout. Take 256 rows at a time,
    # and skip the columns after a block's last row.
    blocks, q = [], q * D ** -0.5
    for start in range(0, T, 256):
        end = min(start + 256, T)
        weights = q[:, :, start:end] @ k[:, :, :end].mT  # (B, H, end - start, end)
        weights += torch.full(weights.shape[2:], -math.inf, dtype=q.dtype).triu(start + 1)
        weights = weights.softmax(-1)
        blocks.append((weights * dropout_mask(weights, p) if p else weights) @ v[:, :, :end])
    y = torch.cat(blocks, 2)  # (B, H, T, D)
    return y * (1 / (1 - p)) if p else y


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability `p` and scale the others by 1 / (1 - p) (Srivastava et al.
    2014), as F.dropout does."""
    if not p:
        return x
    return F.dropout(x, p) if x.device.type != "cpu" else x * dropout_mask(x, p) * (1 / (1 - p))


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """Return a mask of x's shape and dtype, on a CPU: 0 with probability `p`, else 1."""
    if torch.compiler.is_compiling():
        return (F.dropout(torch.ones_like(x), p) > 0).to(x.dtype)
    # 16 random bits per element take a fourteenth of bernoulli_'s time
    seed = torch.empty((), dtype=torch.int64).random_().item()
    bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16)
    drawn = torch.from_numpy(bits)[:x.numel()].view(x.shape)
    return torch.ge(drawn, round(p * 2**16) - 2**15, out=torch.empty_like(x, requires_grad=False))


def has_own_backward(x: Tensor) -> bool:
    """Return True where our autograd functions are faster than PyTorch's: while training on a CPU,
    uncompiled."""
    return (x.device.type == "cpu" and torch.is_grad_enabled()
            and not torch.compiler.is_compiling())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019),
    computed in the dtype of `weight`."""
    norm = RMSNormFunction.apply if has_own_backward(x) else F.rms_norm
    return norm(x.to(weight.dtype), weight.shape, weight, eps)


class RMSNormFunction(torch.autograd.Function):
    """F.rms_norm on a CPU, in a third of its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, weight: Tensor, eps: float) -> Tensor:
        """Return the norm of x (..., C) times weight (C,)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
        scale = norm.square_().div_(shape[0]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        """Return the gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        # LayerNorm's with a mean of 0, plus the mean of dy * weight that it takes off
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, weight.shape, torch.zeros_like(scale), scale, weight, None, [True, True, False])
        mean = (dy @ weight).unsqueeze(-1) / len(weight)  # (..., 1)
        return dx.addcmul_(mean, scale), None, dweight, None


def norm_and_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (B, T, H, D) as (B, H, T, D), each head normalized by `rms_norm`, then its elements
    i and i + D / 2 rotated by the angles whose cos and sin, (T, D / 2), are given (Su et al. 2021).
    """
    if has_own_backward(x):
        return NormAndRotate.apply(x, weight, eps, cos, sin)
    a, b = rms_norm(x, weight, eps).transpose(1, 2).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class NormAndRotate(torch.autograd.Function):
    """`norm_and_rotate` on a CPU, with fewer passes over the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
                ) -> Tensor:
        """Return the rotated norm of x."""
        B, T, H, D = x.shape
        cos, sin = cos.to(weight.dtype), sin.to(weight.dtype)
        unit = torch.empty(B, H, T, D, dtype=weight.dtype).copy_(x.transpose(1, 2))
        norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)  # (B, H, T, 1)
        scale = norm.square_().div_(D).add_(eps).rsqrt_()
        (a, b), (u, v) = unit.mul_(scale).chunk(2, -1), weight.chunk(2)
        y = x.new_empty(B, H, T, D)
        half = torch.mul(a, cos * u).addcmul_(b, sin * v, value=-1)
        y[..., :D // 2] = half
        y[..., D // 2:] = torch.mul(b, cos * v, out=half).addcmul_(a, sin * u)
        ctx.save_for_backward(unit, scale, weight, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        """Return the gradients of x and weight."""
        unit, scale, weight, cos, sin = ctx.saved_tensors
        B, H, T, D = unit.shape
        dy = dy.to(unit.dtype)
        (a, b), dx = dy.chunk(2, -1), torch.empty_like(unit)
        torch.mul(a, cos, out=dx[..., :D // 2]).addcmul_(b, sin)  # rotate back
        torch.mul(b, cos, out=dx[..., D // 2:]).addcmul_(a, sin, value=-1)
        product = (dx * unit).view(-1, D)
        dweight = product.sum(0)
        mean = (product @ weight).view(B, H, T, 1).div_(-D)
        dx.mul_(weight).addcmul_(unit, mean).mul_(scale)
        return dx.transpose(1, 2), dweight, None, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(F.linear(x, weight[:V]), targets), MAX_LOGITS logits at a time. The forward
    pass computes the gradients as well, so the logits of all tokens are never in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, V: int) -> Tensor:
        """Return the mean loss in nats for x (N, C), weight (V or more, C) and targets (N,)."""
        device, dtype = x.device.type, compute_dtype(x)
        wide = torch.promote_types(dtype, torch.float32)
        rows = max(1, MAX_LOGITS * (1 if device == "cpu" else 8) // weight.size(0))
        if dtype == torch.float16:
            rows = min(rows, 2048)  # more rows could overflow the gradient of a frequent token
        needs_grad = ctx.needs_input_grad[0]  # that of a parameter is True also without gradients
        with torch.autocast(device, enabled=False):
            x_cast, weight_cast = x.to(dtype), weight.to(dtype)
            loss = torch.zeros((), dtype=wide, device=x.device)
            dx, dweight = [], torch.zeros_like(weight) if needs_grad else None
            for chunk, target in zip(x_cast.split(rows), targets.split(rows)):
                logits = (chunk @ weight_cast.T).to(wide)  # (R, V or more)
                logits[:, V:] = -math.inf  # ignore the padding of the vocabulary
                total, target = logits.logsumexp(1, keepdim=True), target.unsqueeze(1)  # (R, 1)
                loss += (total - logits.gather(1, target)).sum()
                if needs_grad:
                    logits.sub_(total).exp_()  # now probabilities
                    if torch.compiler.is_compiling():  # scatter_ would keep all of them in memory
                        hit = torch.arange(logits.size(1), device=x.device) == target  # (R, V)
                        logits = torch.where(hit, logits - 1, logits)
                    else:
                        logits.scatter_(1, target, logits.gather(1, target) - 1)
                    dlogits = logits.to(dtype)
                    dx.append(dlogits @ weight_cast)  # (R, C)
                    dweight += dlogits.T @ chunk
        if needs_grad:
            ctx.save_for_backward(torch.cat(dx), dweight)
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        """Return the gradients of x and weight."""
        dx, dweight = ctx.saved_tensors
        scale = dloss / len(dx)
        return dx * scale, dweight * scale, None, None


def pack_linear_layers(model: nn.Module) -> None:
    """Keep the weights of a bfloat16 GPT's linear layers in oneDNN's own layout, on a CPU: sampling
    gets 1.5x faster, and it can't be trained any more."""
    def pack(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = pack(layer.weight, layer.bias)
            layer.weight = None
    if model.lm_head is None:
        model.lm_head = pack(model.embedding.weight, None)
