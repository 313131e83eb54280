"""The bundle: snapshot, write, verify, choose, prune. After a crash at any instant the folder holds
the old or the new one.

A save is: copy the live tensors; write them to a temporary file; fsync it; read it again and
check it; rename it to ckpt-<step>.pt; let best.pt, if it is the best, and then ckpt.pt name the
same file, an fsync of the folder after each; only then remove generations that are too old.
"""
import errno
import math
import os
import pickle
import re
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepgpt.distributed import map_tensors
from keepgpt.process import UserError, sync

FORMAT = 1
# ends each bundle, with the CRC32 of all before it: torch.load does not look at the zip's own
MAGIC = b"keepGPT\n"
ALIGNMENT = 64  # bytes, a line of the cache
# what a checkpoint holds: every key with its type
SCHEMA = {"format": int, "run": str, "step": int, "model": dict, "optimizer": dict, "scaler": dict,
          "rng": list, "config": dict, "model_args": dict, "data": dict, "evaluation": dict,
          "best_val_loss": float, "wandb_run_id": str | None}


class BadBundle(UserError):
    """A checkpoint that is not intact; the text says what is wrong with it."""


class Disk:
    """Every operation that a save performs on the disk, so that a test can make each of them
    fail."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, file: int, data: memoryview) -> int:
        return os.write(file, data)

    def fsync(self, file: int) -> None:
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def fsync_folder(self, folder: Path) -> None:
        sync(folder)


class ChecksummedFile:
    """What torch.save writes into: passes the bytes on to the disk and keeps their CRC32."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self.disk, self.crc, self.file, self.error = disk, 0, disk.create(path), None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        self.crc = zlib.crc32(left, self.crc)
        try:
            while left and not self.error:
                # a disk may take less than it was given
                left = left[self.disk.write(self.file, left):]
        except OSError as e:  # torch.save would hide it behind an error of its own
            self.error = e
        return size

    def flush(self) -> None:
        """torch.save calls it; nothing is held back."""


def write_bundle(bundle: dict[str, Any], path: Path, disk: Disk) -> None:
    """Write a new file and fsync it. Raises OSError, and leaves the file to be removed."""
    out = ChecksummedFile(disk, path)
    try:
        torch.save(bundle, out)
        out.write(MAGIC + out.crc.to_bytes(4, "little"))
        if out.error:
            raise out.error
        disk.fsync(out.file)
    finally:
        disk.close(out.file)


def point(name: Path, target: Path, disk: Disk) -> None:
    """Let `name` be another name of the file `target`, or a copy of it where the file system has
    no links."""
    temporary = name.with_suffix(".pt.tmp")
    try:
        disk.link(target, temporary)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        write_bundle(torch.load(target, map_location="cpu", weights_only=True), temporary, disk)
    disk.rename(temporary, name)


def commit(bundle: dict[str, Any], folder: Path, keep: int, best: bool, disk: Disk) -> None:
    """Make `bundle` the newest of `folder`, durably.

    Raises OSError or BadBundle; the older bundles are then as they were.
    """
    generation = generation_of(folder, bundle["step"])
    temporary = generation.with_suffix(".pt.tmp")
    try:
        remove_leftovers(folder, disk)  # of a process that died
        write_bundle(bundle, temporary, disk)
        check_crc(temporary)  # so that what is pruned is never the last that was verified
        disk.rename(temporary, generation)
        if best:  # before ckpt.pt: a run that goes on from there does not look at this step again
            point(folder / "best.pt", generation, disk)
            disk.fsync_folder(folder)
        point(folder / "ckpt.pt", generation, disk)
        disk.fsync_folder(folder)
    except BaseException:
        remove_leftovers(folder, disk)
        raise
    # a generation of a later step is damaged, or of a future that this run has left
    later = [path for path in generations(folder) if path.name > generation.name]
    try:
        for old in later + generations(folder)[len(later) + keep:]:
            disk.remove(old)
    except OSError as e:  # the bundle is safe all the same
        print(f"\nan old bundle can't be removed: {e}", file=sys.stderr, flush=True)


def generation_of(folder: Path, step: int) -> Path:
    """The numbered bundle of a step."""
    return folder / f"ckpt-{step:08d}.pt"


def generations(folder: Path) -> list[Path]:
    """The numbered bundles of a folder, newest first."""
    return sorted((p for p in folder.glob("ckpt-*.pt") if re.fullmatch(r"ckpt-\d+\.pt", p.name)),
                  reverse=True)


def remove_leftovers(folder: Path, disk: Disk) -> None:
    """Remove what a save that failed, or died, has left half-written."""
    for path in folder.glob("*.pt.tmp"):
        disk.remove(path)


def is_best(folder: Path, step: int) -> bool:
    """Whether best.pt is the bundle of that step."""
    try:
        return (folder / "best.pt").samefile(generation_of(folder, step))
    except OSError:
        return False


def has_run(folder: Path) -> bool:
    """Whether a folder holds a bundle, whole or not."""
    return any((folder / name).exists() for name in ("ckpt.pt", "best.pt")) or bool(
        generations(folder))


def find_foreign(folder: Path) -> Path | None:
    """Return the ckpt.pt of a folder that another program wrote, as nanoGPT does; None if there is
    none, or anything by keepGPT beside it."""
    path = folder / "ckpt.pt"
    if (folder / "best.pt").exists() or generations(folder) or not zipfile.is_zipfile(path):
        return None
    with open(path, "rb") as f:
        f.seek(-len(MAGIC) - 4, os.SEEK_END)
        return None if f.read(len(MAGIC)) == MAGIC else path


def check_crc(path: Path) -> None:
    """Raises BadBundle for a file that is not, to the bit, what was written, and OSError if it
    can't be read."""
    with open(path, "rb") as f:
        size, crc = os.fstat(f.fileno()).st_size - len(MAGIC) - 4, 0
        if size <= 0:
            raise BadBundle("it is empty" if size == -len(MAGIC) - 4 else "it is cut short")
        while left := size - f.tell():
            crc = zlib.crc32(f.read(min(left, 1 << 24)), crc)
        end = f.read()
    if end[:-4] != MAGIC:
        raise BadBundle("it is cut short, or was not written by keepGPT")
    if end[-4:] != crc.to_bytes(4, "little"):
        raise BadBundle("its checksum is wrong: the file is damaged")


def read_bundle(path: Path) -> dict[str, Any]:
    """Read and verify a bundle. Raises BadBundle for anything that is not, to the bit, what was
    saved."""
    try:
        check_crc(path)
        bundle = torch.load(path, map_location="cpu", weights_only=True)
    except BadBundle:
        raise
    except OSError as e:
        raise BadBundle(e.strerror) from None
    except pickle.UnpicklingError:
        raise BadBundle("it holds more than plain values and tensors") from None
    except Exception as e:  # whatever torch.load makes of bytes that someone has put together
        raise BadBundle(f"torch cannot load it: {(str(e) or repr(e)).splitlines()[0]}") from None
    if not isinstance(bundle, dict) or bundle.get("format") != FORMAT:
        raise BadBundle(f"expected a bundle of format {FORMAT}")
    for key, kind in SCHEMA.items():
        if key not in bundle or not isinstance(bundle[key], kind):
            raise BadBundle(f"expected {key} to be of type {kind}, got {bundle.get(key)!r:.40}")
    return bundle


def newest_bundle(folder: Path) -> dict[str, Any]:
    """Return the newest intact checkpoint; print which ones are skipped. Raises BadBundle if none
    is left."""
    return first_intact([folder / "ckpt.pt", *generations(folder), folder / "best.pt"])


def best_bundle(folder: Path) -> dict[str, Any]:
    """Return the checkpoint with the lowest validation loss, or the newest one if that is corrupt.
    Raises BadBundle if none is left."""
    return first_intact([folder / "best.pt", folder / "ckpt.pt", *generations(folder)])


def first_intact(paths: list[Path]) -> dict[str, Any]:
    """Return the first of several checkpoints, one at least, that is intact."""
    tried, seen = [], set()
    for path in paths:
        if not path.exists() or (file := path.stat().st_ino) in seen:
            continue
        seen.add(file)  # ckpt.pt is another name of a numbered checkpoint
        try:
            return read_bundle(path)
        except BadBundle as e:
            tried.append(f"{path.name}: {e}")
            print(f"skipping {path}: {e}", file=sys.stderr)
    raise BadBundle(f"no intact checkpoint in {paths[0].parent} "
                    f"({'; '.join(tried) or 'there is none at all'})")


def check_finite(bundle: dict[str, Any]) -> None:
    """Raises ArithmeticError for weights or moments that are not finite: they must not replace
    good ones."""
    moments = {f"{key} of parameter {i}": tensor
               for i, state in bundle["optimizer"]["state"].items()
               for key, tensor in state.items()}
    for name, tensor in (bundle["model"] | moments).items():
        if not all(math.isfinite(x) for x in torch.aminmax(tensor)):
            raise ArithmeticError(f"{name} is not finite")


class Saver:
    """Saves in the background, one checkpoint at a time, while training continues.

    The copy that is written is reused by each save: a save costs one more copy of the bundle on
    the host and none on the GPU. From CUDA a stream of its own makes the copy, into pinned memory;
    elsewhere the thread does.
    """

    def __init__(self, folder: Path | None, keep: int, best_val_loss: float,
                 before_commit: Callable[[], None], device: torch.device,
                 disk: Disk | None = None) -> None:
        """Without a folder, on all ranks but the first, nothing is saved. `best_val_loss` is that
        of best.pt; `before_commit` is called once the copy is made, before anything is written."""
        self.folder, self.keep, self.best_val_loss, self.before_commit = (
            folder, keep, best_val_loss, before_commit)
        self.disk, self.copies, self.copied = disk or Disk(), {}, threading.Event()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread, self.failed = None, False

    def save(self, live: dict[str, Any], best: bool) -> None:
        """Start to save the live tensors of a bundle, as best.pt too if it is the `best`. They must
        not change before `wait_for_copy` returns."""
        if not self.folder:
            return
        self.wait()
        self.copied.clear()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())  # the last update comes first
        self.thread = threading.Thread(target=self._run, args=(live, best))
        self.thread.start()

    def wait_for_copy(self) -> None:
        """Return once the live tensors may change: the loop calls it before each update."""
        if self.thread:
            self.copied.wait()
            if self.stream:  # the GPU waits for the end of the copy, the host does not
                torch.cuda.current_stream().wait_stream(self.stream)

    def wait(self) -> bool:
        """Return once nothing is being saved: True if the last save succeeded. After it,
        best_val_loss is that of best.pt."""
        if self.thread:
            self.thread.join()
            self.thread = None
        return not self.failed

    def _run(self, live: dict[str, Any], best: bool) -> None:
        """Save, in the thread. A failure is printed and does not end the training."""
        try:
            with torch.cuda.stream(self.stream):
                bundle = self._copy(live)
            self.copied.set()
            if self.stream:
                self.stream.synchronize()
            if sys.platform == "linux":  # the rest is in no hurry: training goes first
                with suppress(OSError):  # it is lower already
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            check_finite(bundle)
            self.before_commit()
            commit(bundle, self.folder, self.keep, best, self.disk)
            self.failed = False
        except Exception as e:
            self.failed = True
            best = best and is_best(self.folder, live["step"])
            print(f"\nSAVING STEP {live['step']} FAILED: {e}. The older checkpoints are kept.",
                  file=sys.stderr, flush=True)
        finally:
            if best:
                self.best_val_loss = live["best_val_loss"]
            self.copied.set()

    def _copy(self, live: dict[str, Any]) -> dict[str, Any]:
        """Return the bundle with its tensors on the host; from CUDA, once the stream is done."""
        tensors = {}
        map_tensors(lambda path, tensor: tensors.setdefault(path, tensor.detach()), live)
        if self.copies.keys() != tensors.keys():
            self.copies = allocate(tensors, pinned=self.stream is not None)
        for path, tensor in tensors.items():
            # from MPS such a copy would not be waited for
            self.copies[path].copy_(tensor, non_blocking=tensor.is_cuda)
        return map_tensors(lambda path, _: self.copies[path], live)


def allocate(tensors: dict[str, Tensor], pinned: bool) -> dict[str, Tensor]:
    """Return an empty tensor on the host for each of `tensors`, all in one block of memory, each
    with a storage of its own, which torch.save writes whole."""
    starts = [0, *accumulate(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors.values())]
    block = torch.empty(starts[-1], dtype=torch.uint8)
    if pinned:
        # pin_memory=True would round each size up to a power of two. Where this fails, copies
        # only take longer.
        torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)
    memory = block.numpy()
    return {path: torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=at).view(t.shape)
            for (path, t), at in zip(tensors.items(), starts)}



