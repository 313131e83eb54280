"""The ranks of a run: how they find each other, exchange values, and add tensors."""
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from keepgpt.config import TrainConfig
from keepgpt.device import pick_device, use_deterministic_algorithms
from keepgpt.errors import UserError


def map_tensors(change: Callable[[str, Tensor], Tensor], nest: Any, path: str = "") -> Any:
    """Return a copy of a nest of dicts, lists and tuples with `change(path, tensor)` for each
    tensor."""
    if isinstance(nest, dict):
        return {key: map_tensors(change, value, f"{path}/{key}") for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(map_tensors(change, value, f"{path}/{i}") for i, value in enumerate(nest))
    return change(path, nest) if isinstance(nest, Tensor) else nest


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks, and its device."""
    rank: int
    world_size: int
    device: torch.device
    control: Any = None  # a gloo group, for exchanges that must not wait for the GPU

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank, with its tensors in host memory."""
        if self.world_size == 1:
            return value
        outline = [map_tensors(lambda path, tensor: tensor.to("meta"), value)]
        dist.broadcast_object_list(outline, src=0, group=self.control)

        def broadcast(_: str, tensor: Tensor) -> Tensor:  # one by one, to save memory
            tensor = (tensor.contiguous() if self.rank == 0
                      else torch.empty_like(tensor, device="cpu"))
            dist.broadcast(tensor, src=0, group=self.control)
            return tensor

        return map_tensors(broadcast, value if self.rank == 0 else outline[0])

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Return what `work` returns on rank 0, on every rank. An error there is raised on every
        rank."""
        value, error = None, None
        if self.rank == 0:
            try:
                value = work()
            except (UserError, OSError) as e:
                error = e
        value, error = self.from_first((value, error))
        if error:
            raise error
        return value

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set on any rank."""
        if self.world_size == 1:
            return bool(flag)
        count = torch.tensor([float(flag)])
        dist.all_reduce(count, group=self.control)
        return bool(count)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all ranks, computed in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def add_in_pairs(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, bit-identical on each of them.

        The number of ranks is a power of two: neighbours add theirs, then neighbouring pairs, and
        so on. Both of a pair get the same sum, because a + b = b + a.
        """
        if self.world_size == 1:
            return
        mine = torch.cat([tensor.flatten() for tensor in tensors])
        theirs, distance = torch.empty_like(mine), 1
        while distance < self.world_size:
            partner = self.rank ^ distance
            for transfer in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, partner),
                                                    dist.P2POp(dist.irecv, theirs, partner)]):
                transfer.wait()
            mine += theirs
            distance *= 2
        sums = mine.split([tensor.numel() for tensor in tensors])
        # copy them back: a tensor's alignment in memory may change a kernel's order of additions
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(sums, tensors)])


def join_ranks(config: TrainConfig) -> Ranks:
    """Pick the device, and join the other ranks if torchrun started this process. Raises
    UserError."""
    device = pick_device(config.device)
    # keepGPT draws from neither; code that a user adds may
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    # on a CPU only compiled code needs this call, which takes a second
    if config.deterministic or device.type == "cpu" and config.compile is True:
        use_deterministic_algorithms()
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    cuda = device.type == "cuda"
    backend = config.backend if config.backend != "auto" else "nccl" if cuda else "gloo"
    if backend == "nccl" and not cuda:
        raise UserError(f"backend=nccl needs CUDA, got device {device.type}. Try: --backend=auto")
    timeout = timedelta(seconds=config.rank_timeout)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps this store for all its restarts, with the addresses of killed ranks in it
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                            timeout=timeout)
    return Ranks(rank, world_size, device, dist.new_group(backend="gloo", timeout=timeout))
