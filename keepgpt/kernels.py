"""The chunked loss and the CPU kernels of attention, dropout and linear layers."""
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOGITS = 1 << 25  # so many logits are held at a time, on a GPU eight times as many


def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Causal attention of the last T positions, (B, H, T, D), over all S positions, (B, H, S, D);
    T is S or 1. Weights are dropped with probability `p`."""
    T, D = q.shape[2:]
    if T == 1 or q.device.type != "cpu" or not p and q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)
    # On a CPU the library's kernel is slow in bfloat16, and slower with dropout. Rows in blocks:
    # what lies behind a block's last row is never computed.
    blocks, q = [], q * D ** -0.5
    for start in range(0, T, 256):
        rows = q[:, :, start:start + 256]  # (B, H, R, D)
        end = k.size(2) - T + start + rows.size(2)
        weights = rows @ k[:, :, :end].transpose(2, 3)  # (B, H, R, end)
        weights += torch.full(weights.shape[2:], -math.inf, dtype=q.dtype).triu(start + 1)
        weights = weights.softmax(-1)
        blocks.append((weights * kept(weights, p) if p else weights) @ v[:, :, :end])
    y = torch.cat(blocks, 2) if len(blocks) > 1 else blocks[0]
    return y * (1 / (1 - p)) if p else y


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each element with probability `p`, scale the others by 1 / (1 - p) (Srivastava et al.
    2014); nothing unless `training`."""
    if not training or not p:
        return x
    return F.dropout(x, p) if x.device.type != "cpu" else x * kept(x, p) * (1 / (1 - p))


def kept(x: Tensor, p: float) -> Tensor:
    """What dropout keeps of x, on a CPU: 1 with probability 1 - p, else 0, for each element."""
    if torch.compiler.is_compiling():
        return (F.dropout(torch.ones_like(x), p) > 0).to(x.dtype)
    # 16 random bits an element: a fourteenth of the time that bernoulli_ takes
    seed = torch.empty((), dtype=torch.int64).random_().item()
    bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16)
    drawn = torch.from_numpy(bits)[:x.numel()].view(x.shape)
    return torch.ge(drawn, round(p * 2**16) - 2**15, out=torch.empty_like(x, requires_grad=False))


class LinearCrossEntropy(torch.autograd.Function):
    """The last layer and the loss in one, LOGITS of the logits at a time.

    The gradient of the logits is made while they are there, so that neither it nor they are ever
    held for all tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, V: int) -> Tensor:
        """The mean cross-entropy in nats of `targets` (N,) under the first V columns of x (N, C)
        times weight (V or more, C) transposed."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wide = torch.promote_types(dtype, torch.float32)
        rows = max(1, LOGITS * (1 if device == "cpu" else 8) // weight.size(0))
        if dtype == torch.float16:
            rows = min(rows, 2048)  # the gradient of a frequent token, a sum over them, must fit
        learning = any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            half, weight_half = x.to(dtype), weight.to(dtype)
            loss, dx = torch.zeros((), dtype=wide, device=x.device), []
            dweight = torch.zeros_like(weight) if learning else None
            for part, target in zip(half.split(rows), targets.split(rows)):
                logits = (part @ weight_half.T).to(wide)  # (R, V or more)
                logits[:, V:] = -math.inf  # the padding takes no part
                total, target = logits.logsumexp(1, keepdim=True), target.unsqueeze(1)  # (R, 1)
                loss += (total - logits.gather(1, target)).sum()
                if learning:
                    logits.sub_(total).exp_()  # now the probabilities
                    if torch.compiler.is_compiling():  # scatter_ would need all of them in memory
                        hit = torch.arange(logits.size(1), device=x.device) == target  # (R, V)
                        logits = torch.where(hit, logits - 1, logits)
                    else:
                        logits.scatter_(1, target, logits.gather(1, target) - 1)
                    dlogits = logits.to(dtype)
                    dx.append(dlogits @ weight_half)
                    dweight += dlogits.T @ part
        if learning:
            ctx.save_for_backward(torch.cat(dx), dweight)
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        """Gradients of x and weight."""
        dx, dweight = ctx.saved_tensors
        scale = dloss / len(dx)
        return dx * scale, dweight * scale, None, None


class PackedLinear(nn.Module):
    """A bfloat16 Linear for a CPU, its weights in the order in which oneDNN reads them."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Make a bfloat16 model on a CPU generate half as fast again; it can't be trained any more."""
    for block in model.transformer.h:
        for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"),
                           (block.mlp, "c_proj")):
            linear = getattr(part, name)
            setattr(part, name, PackedLinear(linear.weight, linear.bias))
    model.head = PackedLinear(model.transformer.wte.weight, None)



