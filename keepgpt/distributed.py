"""Ranks, device, dtype, random number generators and reductions."""
import importlib.util
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from keepgpt.config import TrainConfig
from keepgpt.process import UserError, warn

# dense bfloat16 (float16 before Ampere) from the data sheets; the longest name that the device's
# name contains counts
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "H200": 989, "H200 NVL": 835, "H100": 989, "H100 PCIe": 756,
    "H100 NVL": 835, "H20": 148, "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10": 125,
    "A10G": 70, "L40": 181, "L40S": 362, "L4": 121, "RTX 6000 Ada": 364, "RTX A6000": 155,
    "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65}


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


def pick_device(name: str) -> torch.device:
    """Return the device called `name`, or the best one for auto. On CUDA each rank of a host gets
    its own. Raises UserError."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = (torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda"
                  else torch.device(name))
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {name!r} on this machine. Try: --device=auto") from None
    return device


def use_deterministic_algorithms() -> None:
    """Use only algorithms whose results are bit-identical each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")  # NVLS adds in varying order
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


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


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products: the one called `name`, or the fastest safe one for
    auto."""
    if name == "float16" and device.type != "cuda":
        name = "auto"
        warn(f"float16 needs CUDA; using {pick_dtype(name, device)}")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    bf16_cpu = device.type == "cpu" and (torch.cpu._is_amx_tile_supported()
                                         or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if bf16_cpu else torch.float32


def can_compile(device: torch.device, deterministic: bool = False) -> bool:
    """Return True if torch.compile works on this machine, else print a note."""
    cuda, needs = device.type == "cuda", ""
    compilers = ([os.environ.get("CC", "cc"), "gcc", "clang"] if cuda else
                 [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")])
    if cuda and deterministic and torch.__version__ < (2, 10):  # chooses kernels by their times
        needs = "torch 2.10 or newer for deterministic=True"
    elif cuda and importlib.util.find_spec("triton") is None:
        needs = "the package triton"
    elif not any(map(shutil.which, compilers)):
        needs = f"a compiler ({compilers[-1]})"
    if needs:
        warn(f"torch.compile needs {needs}; continuing without it")
    return not needs


def device_name(device: torch.device) -> str:
    """Return the device's type, or on CUDA its model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak in FLOP/s, or None if it is not known."""
    matches = [gpu for gpu in PEAK_TFLOPS if gpu in device_name(device)]
    return 1e12 * PEAK_TFLOPS[max(matches, key=len)] if matches else None


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of this process's random number generators, as plain values."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Restore the states that `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
