"""The ranks of a run: how they find each other, exchange values, and add tensors."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from keepgpt.config import PER_HOST, TrainConfig
from keepgpt.device import pick_device, use_deterministic_algorithms
from keepgpt.errors import UserError

# numbers of 8 bytes that a checksum takes at a time
CHUNK = 1 << 18
SAME_START = "the same command, files and versions for all ranks"


def map_tensors(
    change: Callable[[str, Tensor], Tensor], nest: Any, path: str = ""
) -> Any:
    """Return a copy of a nest of dicts, lists and tuples with `change(path, tensor)` for each
    tensor."""
    if isinstance(nest, Tensor):
        return change(path, nest)
    if isinstance(nest, dict):
        return {k: map_tensors(change, v, f"{path}/{k}") for k, v in nest.items()}
    if isinstance(nest, (list, tuple)):
        values = [map_tensors(change, v, f"{path}/{i}") for i, v in enumerate(nest)]
        return type(nest)(values)
    return nest


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks, and its device."""

    rank: int
    world_size: int
    device: torch.device
    # a gloo group, for exchanges that must not wait for the GPU
    control: Any = None

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
        # first the plain values and the shapes
        outline = [map_tensors(lambda path, tensor: tensor.to("meta"), value)]
        dist.broadcast_object_list(outline, src=0, group=self.control)

        # then the tensors one by one, to save memory
        def broadcast(_: str, tensor: Tensor) -> Tensor:
            if self.rank == 0:
                tensor = tensor.contiguous()
            else:
                tensor = torch.empty_like(tensor, device="cpu")
            dist.broadcast(tensor, src=0, group=self.control)
            return tensor

        return map_tensors(broadcast, value if self.rank == 0 else outline[0])

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Return what `work` returns on rank 0, on every rank. An error there is raised on every
        rank."""
        return self.from_first(self.on_each(lambda: work() if self.rank == 0 else None))

    def on_each(self, work: Callable[[], Any]) -> Any:
        """Return what `work` returns on this rank. An error on any rank is raised on every
        rank."""
        value = None
        error = None
        try:
            value = work()
        except (UserError, OSError) as e:
            error = e
        # the first one that failed, also for those that wait for it
        for rank, failure in enumerate(self.gather(error)):
            if rank and isinstance(failure, UserError):
                raise UserError(f"rank {rank}: {failure}")
            if failure:
                raise failure
        return value

    def compare(self, facts: dict) -> str:
        """Return which of the `facts`, nested dicts of plain values and tensors, differs between
        ranks, or "", on every rank."""
        # tensors as checksums: nothing large is sent
        if self.world_size == 1:
            return ""
        return find_difference(self.gather(describe(facts, self.device)))

    def check_equal(self, facts: dict, hint: str) -> None:
        """Raise UserError, on every rank, unless each has the same `facts`."""
        difference = self.compare(facts)
        if difference:
            raise UserError(f"{difference}. Try: {hint}")

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set on any rank."""
        if self.world_size == 1:
            return bool(flag)
        # a tensor: in each step, and faster than objects
        count = torch.tensor([float(flag)])
        dist.all_reduce(count, group=self.control)
        return bool(count)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all ranks, computed in place."""
        # over the main group: the tensor may be on a GPU
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def agree_on_threads(self, threads: int | None) -> None:
        """Use `threads` CPU threads on every rank, or as many as rank 0 does: their number decides
        the order of a sum, and each rank computes the update itself."""
        if threads or self.world_size > 1:
            torch.set_num_threads(threads or self.from_first(torch.get_num_threads()))

    def agree_on_weights(self, model: nn.Module, is_read: bool) -> None:
        """Give every rank rank 0's weights: another kind of processor draws other random numbers.
        Raises UserError if weights that were read, from init_from or a checkpoint, differ."""
        difference = self.compare({"weights": model.state_dict()})
        # two files of one name
        if difference and is_read:
            raise UserError(
                f"init_from: {difference}. Try: the same file for all ranks"
            )
        # computed ones, which differ in their last bits
        if difference:
            model.load_state_dict(self.from_first(model.state_dict()))


def describe(facts: dict, device: torch.device) -> dict[str, str]:
    """Return each plain value in nested dicts as a short text, and each tensor's checksum, under
    the keys that lead to it. Waits for the device once."""
    weights = torch.arange(1, 2 * CHUNK, 2, device=device)
    sums = {}

    def add_checksum(path: str, tensor: Tensor) -> str:
        sums[path] = checksum(tensor, weights.to(tensor.device)).to(device)
        return ""

    texts = flatten(map_tensors(add_checksum, facts))
    # all numbers in one transfer
    if sums:
        numbers = torch.stack(list(sums.values())).tolist()
        for path, number in zip(sums, numbers):
            texts[path] = f"checksum {number:x}"
    return texts


def flatten(nest: Any, path: str = "") -> dict[str, str]:
    """Return the text of each value in nested dicts, or the hash of a long one, by its path."""
    if isinstance(nest, dict):
        texts = {}
        # the keys on the way to a value become its path
        for key, value in nest.items():
            texts |= flatten(value, f"{path}/{key}")
        return texts
    # a vocabulary is long, and ranks send each other all of it
    text = repr(nest)
    if len(text) > 40:
        text = f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return {path: text}


def checksum(tensor: Tensor, weights: Tensor) -> Tensor:
    """Return a number, int64 on the tensor's device, that depends on its bits and their order. It
    takes one pass over the memory; `weights` are CHUNK odd numbers."""
    tensor = tensor.detach().flatten()
    # as integers: NaN is not equal to itself
    bits = tensor.view(torch.int64 if tensor.nbytes % 8 == 0 else torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    # odd factors: a change of any bit changes the sum, which wraps around
    for part in bits.split(CHUNK):
        total = total * 31 + (part * weights[: len(part)]).sum()
    return total


def find_difference(everyone: list[dict[str, str]]) -> str:
    """Return how the first rank that differs from rank 0 does, or ""."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        names = [name for name in first | other if first.get(name) != other.get(name)]
        if not names:
            continue
        # one is enough to look for, the others often follow from it
        name = names[0]
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        return (
            f"{name.lstrip('/')}: rank 0 has {first.get(name, 'none')}, "
            f"rank {rank} has {other.get(name, 'none')}{more}"
        )
    return ""


def shared_settings(config: TrainConfig) -> dict:
    """Return the settings that must be equal on all ranks."""
    return {key: value for key, value in asdict(config).items() if key not in PER_HOST}


def hash_source() -> dict[str, str]:
    """Return the sha256 of each source file of a run, by its path."""
    # the files that decide the numbers of a run
    root = Path(__file__).parents[1]
    files = [root / "train.py", root / "model.py", *sorted(root.glob("keepgpt/*.py"))]
    hashes = {}
    for path in files:
        content = path.read_bytes()
        hashes[str(path.relative_to(root))] = hashlib.sha256(content).hexdigest()
    return hashes


def check_start(store: dist.Store, rank: int, world_size: int, facts: dict) -> None:
    """Raise UserError, on every rank, unless all were started with the same `facts`. It needs no
    process group: other versions or backends could hang while they make one."""
    store.set(f"start/{rank}", json.dumps(flatten(facts)))
    # `get` waits for what another rank sets
    if rank == 0:
        everyone = [json.loads(store.get(f"start/{r}")) for r in range(world_size)]
        store.set("start/difference", find_difference(everyone))
    difference = store.get("start/difference").decode()
    if not difference:
        return
    # the store may end with rank 0, which therefore waits for the others, but not long
    store.set(f"start/read/{rank}", "")
    if rank == 0:
        keys = [f"start/read/{r}" for r in range(world_size)]
        with suppress(RuntimeError):
            store.wait(keys, timedelta(seconds=5))
    raise UserError(f"{difference}. Try: {SAME_START}")


def join_ranks(config: TrainConfig) -> Ranks:
    """Pick the device, and join the other ranks if torchrun started this process. Raises
    UserError."""
    device = pick_device(config.device)
    # keepGPT draws from neither; code that a user adds may
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    # TF32 where there is any
    torch.set_float32_matmul_precision("high")
    # on a CPU only compiled code needs this call, which takes a second
    if config.deterministic or device.type == "cpu" and config.compile is True:
        use_deterministic_algorithms()
    # not under torchrun
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)

    # gloo also works on a CPU
    cuda = device.type == "cuda"
    backend = config.backend
    if backend == "auto":
        backend = "nccl" if cuda else "gloo"
    if backend == "nccl" and not cuda:
        raise UserError(
            f"backend=nccl needs CUDA, got device {device.type}. Try: --backend=auto"
        )
    timeout = timedelta(seconds=config.rank_timeout)
    # the addresses of the others
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps this store for all its restarts, with the addresses of killed ranks in it
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    store.set_timeout(timeout)
    # before a process group is made, which may hang
    facts = {
        "torch": str(torch.__version__),
        **hash_source(),
        "device": device.type,
        **shared_settings(config),
    }
    check_start(store, rank, world_size, facts)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(rank, world_size, device, control)
