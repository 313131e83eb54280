"""The chunked loss, and CPU kernels of attention, RMSNorm and linear layers.

Each kernel equals a plain form in PyTorch, is tested against it, and takes 10% or more off a step
or a token of a shipped config (docs/LOG.md). Letters for shapes are those of model.py.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# held in memory at a time; eight times as many on a GPU
MAX_LOGITS = 1 << 25
# of the attention weights, computed at a time: they stay in the CPU's cache
ATTENTION_ROWS = 256


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: autocast's, if it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def has_fast_attention(q: Tensor) -> bool:
    """Return True where `attend` is faster than PyTorch's function: in bfloat16 on a CPU."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Return causal attention, (B, H, T, D), of q to k and v, (B, H, T, D) each. Attention weights
    are dropped with probability `p`. The plain form is model.attend's."""
    T, D = q.shape[2:]
    # before the product, which has T times as many elements
    q = q * D**-0.5
    blocks = []
    for start in range(0, T, ATTENTION_ROWS):
        end = min(start + ATTENTION_ROWS, T)
        # skip the columns after a block's last row: the mask zeroes them
        weights = q[:, :, start:end] @ k[:, :, :end].mT  # (B, H, end - start, end)
        mask = torch.full(weights.shape[2:], -math.inf, dtype=q.dtype)
        weights += mask.triu(start + 1)
        weights = F.dropout(weights.softmax(-1), p)
        blocks.append(weights @ v[:, :, :end])  # (B, H, end - start, D)
    return torch.cat(blocks, 2)


def has_fast_norm(x: Tensor) -> bool:
    """Return True where RMSNormFunction is faster than F.rms_norm: in eager training on a CPU."""
    training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return x.device.type == "cpu" and training


class RMSNormFunction(torch.autograd.Function):
    """F.rms_norm over the last dimension, in a third of its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the norm of x (..., C) times weight (C,)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
        scale = norm.square_().div_(len(weight)).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        """Return the gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        # LayerNorm's, with a mean of 0, has a fast kernel. It takes off the mean of dy * weight,
        # which is added again
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy,
            x,
            weight.shape,
            torch.zeros_like(scale),
            scale,
            weight,
            None,
            [True, True, False],
        )
        mean = (dy @ weight).unsqueeze(-1) / len(weight)  # (..., 1)
        return dx.addcmul_(mean, scale), dweight, None


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(F.linear(x, weight[:V]), targets), MAX_LOGITS logits at a time. The forward
    pass computes the gradients as well, so the logits of all tokens are never in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, V: int) -> Tensor:
        """Return the mean loss in nats for x (N, C), weight (V or more, C) and targets (N,)."""
        device = x.device.type
        dtype = compute_dtype(x)
        # sums over a vocabulary need float32
        wide_dtype = torch.promote_types(dtype, torch.float32)
        # that of x: that of a parameter is True also without gradients
        needs_grad = ctx.needs_input_grad[0]

        # rows of logits in memory at a time
        max_logits = MAX_LOGITS if device == "cpu" else 8 * MAX_LOGITS
        rows = max(1, max_logits // weight.size(0))
        # more rows could overflow the gradient of a frequent token
        if dtype == torch.float16:
            rows = min(rows, 2048)

        # every dtype is chosen here
        with torch.autocast(device, enabled=False):
            x_cast = x.to(dtype)
            weight_cast = weight.to(dtype)
            loss = torch.zeros((), dtype=wide_dtype, device=x.device)
            dx = []
            dweight = torch.zeros_like(weight) if needs_grad else None
            for chunk, target in zip(x_cast.split(rows), targets.split(rows)):
                logits = (chunk @ weight_cast.T).to(wide_dtype)  # (R, V or more)
                # ignore the padding of the vocabulary
                logits[:, V:] = -math.inf
                target = target.unsqueeze(1)  # (R, 1)
                total = logits.logsumexp(1, keepdim=True)  # (R, 1)
                loss += (total - logits.gather(1, target)).sum()
                if needs_grad:
                    dlogits = softmax_minus_one_hot(logits, total, target).to(dtype)
                    dx.append(dlogits @ weight_cast)  # (R, C)
                    dweight += dlogits.T @ chunk
        if needs_grad:
            ctx.save_for_backward(torch.cat(dx), dweight)
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        """Return the gradients of x and weight."""
        # dloss is the factor that the loss was multiplied by, such as a scale for float16
        dx, dweight = ctx.saved_tensors
        scale = dloss / len(dx)
        return dx * scale, dweight * scale, None, None


def softmax_minus_one_hot(logits: Tensor, total: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the cross-entropy, softmax(logits) - one_hot(target), (R, V). `total`
    is the logsumexp of the logits; it and `target` are (R, 1). Overwrites the logits."""
    probs = logits.sub_(total).exp_()
    # in compiled code scatter_ would keep all of them in memory
    if torch.compiler.is_compiling():
        is_target = torch.arange(probs.size(1), device=probs.device) == target  # (R, V)
        return torch.where(is_target, probs - 1, probs)
    return probs.scatter_(1, target, probs.gather(1, target) - 1)


def pack_linear_layers(model: nn.Module) -> None:
    """Keep the weights of a bfloat16 GPT's linear layers in oneDNN's own layout, on a CPU: sampling
    gets 1.5x faster, and it can't be trained any more."""

    def pack(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        return lambda x: torch.ops.mkldnn._linear_pointwise(
            x, packed, bias, "none", [], ""
        )

    # the original weights go, or memory would hold both
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = pack(layer.weight, layer.bias)
            layer.weight = None
    # a tied output layer is one more copy: the embedding needs its rows
    if model.lm_head is None:
        model.lm_head = pack(model.embedding.weight, None)
