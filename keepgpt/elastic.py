"""Gradients that are bit-identical on 1, 2, 4, ... ranks, for runs with elastic=True.

DDP adds gradients in an order that depends on the number of ranks. Here the gradients of a step's
micro-batches are the leaves of one binary tree. Each rank adds up its branch, and the ranks then
add their branches in pairs, so every addition is the same on any number of ranks.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keepgpt.checkpoint import Bundle
from keepgpt.config import Settings, TrainConfig
from keepgpt.errors import UserError
from keepgpt.ranks import Ranks

# add_gradient(m, count) adds the gradient of micro-batch m, divided by `count`, to .grad
AddGradient = Callable[[int, int], None]


def check_elastic(config: TrainConfig, ranks: Ranks) -> None:
    """Raise UserError if an elastic run can't have this number of ranks or this backend."""
    if not config.elastic:
        return
    # a power of two has one bit
    if ranks.world_size & (ranks.world_size - 1):
        raise UserError(
            f"elastic=True: expected 1, 2, 4, 8, ... ranks, got {ranks.world_size}"
        )
    if config.backend == "gloo" and ranks.device.type == "cuda":
        raise UserError("elastic=True needs backend=nccl on CUDA. Try: --backend=auto")


def read_threads(config: TrainConfig, bundle: Bundle | None) -> int | None:
    """Return the number of CPU threads that an elastic run keeps, as sums over threads round
    differently, or None."""
    return bundle.get("threads") if bundle and config.elastic else None


def keeps_bits(config: TrainConfig, saved_config: Settings, on_cpu: bool) -> bool:
    """Return True if a resumed run has the same sums on another number of ranks."""
    was_elastic = config.elastic and saved_config.get("elastic")
    return was_elastic and (on_cpu or config.deterministic)


def accumulate_in_tree(
    model: nn.Module,
    ranks: Ranks,
    micro_batches: range,
    add_gradient: AddGradient,
) -> None:
    """Set .grad to the mean gradient of all ranks' micro-batches; `micro_batches` are this
    rank's."""
    # this rank's branch, then those of all ranks
    count = len(micro_batches) * ranks.world_size
    total = sum_as_tree(model, lambda m: add_gradient(m, count), micro_batches)
    add_in_pairs(ranks, total)
    for p, grad in zip(model.parameters(), total):
        p.grad = grad


def sum_as_tree(
    model: nn.Module, add_gradient: Callable[[int], None], micro_batches: range
) -> list[Tensor]:
    """Return the gradient of each parameter, summed over `micro_batches` in a binary tree."""
    # add the sums of both halves
    if len(micro_batches) > 2:
        middle = len(micro_batches) // 2
        total = sum_as_tree(model, add_gradient, micro_batches[:middle])
        rest = sum_as_tree(model, add_gradient, micro_batches[middle:])
        torch._foreach_add_(total, rest)
        return total

    # backward itself adds the second of two gradients to the first
    for m in micro_batches:
        add_gradient(m)
    total = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return total


def add_in_pairs(ranks: Ranks, tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, bit-identical on each of them.

    The number of ranks is a power of two: neighbours add theirs, then neighbouring pairs, and so
    on. Both of a pair get the same sum, because a + b = b + a.
    """
    if ranks.world_size == 1:
        return
    # one message per pair instead of one per parameter
    total = torch.cat([tensor.flatten() for tensor in tensors])
    received = torch.empty_like(total)
    distance = 1
    while distance < ranks.world_size:
        partner = ranks.rank ^ distance
        transfers = [
            dist.P2POp(dist.isend, total, partner),
            dist.P2POp(dist.irecv, received, partner),
        ]
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
        total += received
        distance *= 2

    # copy them back: a tensor's alignment in memory may change a kernel's order of additions
    sums = total.split([tensor.numel() for tensor in tensors])
    sums = [flat.view_as(tensor) for flat, tensor in zip(sums, tensors)]
    torch._foreach_copy_(tensors, sums)
