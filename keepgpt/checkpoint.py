"""Save a run's checkpoint, verify it, and choose one to resume from. After a crash at any instant
the folder holds the old or the new one.

A save copies the live tensors, writes them to a temporary file, fsyncs it, reads it again to check
it, and renames it to ckpt-<step>.pt. Then step-<step>.pt for a milestone, best.pt if it is the
best, and ckpt.pt become names of the same file, with an fsync of the folder after each. Only then
are old checkpoints removed.
"""

import hashlib
import io
import math
import os
import pickle
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from mmap import MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepgpt.errors import UNSUPPORTED, UserError, name_path, warn, warn_once
from keepgpt.files import FolderLock, FolderLost, check_lock, sync_folder
from keepgpt.ranks import map_tensors

# The content of a checkpoint: plain values and tensors. The keys are those of train.make_bundle,
# State.state_dict and describe_machine. train.find_checkpoint adds "start", and for a branch
# "branch", which say how this process starts.
Bundle = dict[str, Any]
FORMAT = 1
# ends each file, with the CRC32 of everything before it: torch.load does not check the zip's own
MAGIC = b"keepGPT\n"
CRC_BYTES = 4
CHUNK = 1 << 24  # bytes to read at a time


class CorruptCheckpoint(UserError):
    """A checkpoint that is not intact; the text says why."""


class Disk:
    """The disk operations of a save; tests make each of them fail. Those that change a name in the
    folder first check the lock on it."""

    # these do not depend on the lock
    write = staticmethod(os.write)
    fsync = staticmethod(os.fsync)
    close = staticmethod(os.close)
    fsync_folder = staticmethod(sync_folder)
    _lock: FolderLock | None = None

    def __init__(self, lock: FolderLock | None = None) -> None:
        self._lock = lock

    def check(self, _folder: Path) -> None:
        check_lock(self._lock)

    def create(self, path: Path) -> int:
        check_lock(self._lock)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def rename(self, path: Path, target: Path) -> None:
        check_lock(self._lock)
        os.replace(path, target)

    def link(self, target: Path, path: Path) -> None:
        check_lock(self._lock)
        os.link(target, path)

    def remove(self, path: Path) -> None:
        check_lock(self._lock)
        os.unlink(path)


class ChecksummedFile(io.RawIOBase):
    """A file for torch.save to write to, which computes the CRC32 of its bytes."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self.disk = disk
        self.crc = 0
        self.error: OSError | None = None
        self.file = disk.create(path)

    def write(self, data: Any) -> int:
        """Write all bytes of `data` and return their number. An error is stored in `error`:
        torch.save would hide it behind one of its own."""
        left = memoryview(data).cast("B")
        size = len(left)
        self.crc = zlib.crc32(left, self.crc)
        try:
            # one call may write only a part; after an error, nothing more is written
            while left and not self.error:
                written = self.disk.write(self.file, left)
                left = left[written:]
        except OSError as e:
            self.error = e
        return size


def write_bundle(bundle: Bundle, path: Path, disk: Disk) -> None:
    """Write a new checkpoint file and fsync it. Raises OSError; a part of the file may be left."""
    with name_path(path):
        out = ChecksummedFile(disk, path)
        try:
            torch.save(bundle, out)
            # torch.load ignores what follows the zip file
            out.write(MAGIC + out.crc.to_bytes(CRC_BYTES, "little"))
            if out.error:
                raise out.error
            disk.fsync(out.file)
        finally:
            disk.close(out.file)


def link(target: Path, name: Path, disk: Disk) -> None:
    """Make `name` another name of the file `target`; a copy where there are no hard links."""
    temporary = name.with_suffix(".pt.tmp")
    try:
        disk.link(target, temporary)
    except OSError as e:
        # another error may come after the link was made: a copy would overwrite the target
        if e.errno not in UNSUPPORTED:
            raise
        warn_once(
            "link",
            f"this drive has no hard links ({e}): each save also writes copies, "
            "which takes more time and space",
        )
        bundle = torch.load(target, map_location="cpu", weights_only=True)
        write_bundle(bundle, temporary, disk)
    # a rename replaces the name at once; a link can't
    disk.rename(temporary, name)


def commit(
    bundle: Bundle,
    folder: Path,
    keep: int,
    best: bool,
    disk: Disk,
    keep_every: int = 0,
) -> None:
    """Save `bundle` durably as the newest checkpoint of `folder`, as best.pt if it is the `best`,
    and each `keep_every` steps as a milestone. Raises OSError or CorruptCheckpoint; the older
    numbered checkpoints are then as they were, but best.pt may already be the new one."""
    path = path_of(folder, bundle["step"])
    temporary = path.with_suffix(".pt.tmp")
    try:
        # write it under a temporary name, and read it again before older ones are removed
        remove_leftovers(folder, disk)
        write_bundle(bundle, temporary, disk)
        check_crc(temporary)
        disk.rename(temporary, path)

        # ckpt.pt comes last: a run resumed from it does not evaluate or save this step again
        names = [folder / "ckpt.pt"]
        if best:
            names.insert(0, folder / "best.pt")
        if keep_every and bundle["step"] % keep_every == 0:
            names.insert(0, path_of(folder, bundle["step"], "step"))
        for name in names:
            link(path, name, disk)
            disk.fsync_folder(folder)
    except BaseException:
        remove_leftovers(folder, disk)
        raise

    # the new checkpoint is safe, also if an old one stays
    try:
        prune(folder, bundle["step"], keep, disk)
    except OSError as e:
        warn(f"an old checkpoint can't be removed: {e}")


def prune(folder: Path, step: int, keep: int, disk: Disk) -> None:
    """Remove the numbered checkpoints but for that of `step` and the newest before it, `keep` in
    all. Raises OSError."""
    # a later one is corrupt, or this run was resumed from before it
    paths = list_numbered(folder)
    later = [path for path in paths if step_of(path) > step]
    others = [path for path in paths if step_of(path) <= step]
    for path in later + others[keep:]:
        disk.remove(path)


def path_of(folder: Path, step: int, prefix: str = "ckpt") -> Path:
    """Return the numbered checkpoint of a step; with the prefix "step" its milestone, which is kept
    for good."""
    return folder / f"{prefix}-{step:08d}.pt"


def step_of(path: Path) -> int:
    """Return the step in the name of a numbered checkpoint or a milestone."""
    return int(path.stem.partition("-")[2])


def list_numbered(folder: Path, prefix_pattern: str = "ckpt") -> list[Path]:
    """Return the numbered checkpoints of a folder, newest first."""
    # only names that path_of gives
    name = re.compile(prefix_pattern + r"-([0-9]{8}|[1-9][0-9]{8,})\.pt")
    paths = [path for path in folder.glob("*-*.pt") if name.fullmatch(path.name)]
    # a step may have two names, in a fixed order
    return sorted(paths, key=lambda path: (-step_of(path), path.name))


def list_by_step(folder: Path) -> list[Path]:
    """Return the numbered checkpoints and the milestones of a folder, newest first."""
    return list_numbered(folder, "(ckpt|step)")


def mention_renamed(folder: Path) -> None:
    """Print a note about the checkpoints in a folder that are not used because of their names."""
    used = {folder / "ckpt.pt", folder / "best.pt"}
    used |= set(list_by_step(folder))
    others = [path for path in sorted(folder.glob("*")) if path not in used]
    # the next save removes temporary files
    renamed = [
        str(path) for path in others if path.suffix != ".tmp" and is_checkpoint(path)
    ]
    if renamed:
        warn(
            f"not used because of the name: {', '.join(renamed)}. To sample from such a "
            "checkpoint: --init_from=FILE. To resume from it: copy it to <new folder>/ckpt.pt, "
            "then --init_from=resume --out_dir=<new folder>"
        )


def is_checkpoint(path: Path) -> bool:
    """Return True if a file ends as a checkpoint does, False also if it can't be read."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(MAGIC) - CRC_BYTES, os.SEEK_END)
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def remove_leftovers(folder: Path, disk: Disk) -> None:
    """Remove the temporary files of a save that failed or was killed. Raises FolderLost if they may
    be another process's."""
    disk.check(folder)
    for path in folder.glob("*.pt.tmp"):
        disk.remove(path)


def step_of_best(folder: Path) -> int | None:
    """Return the step of best.pt, None if that is not intact."""
    try:
        return read_bundle(folder / "best.pt")["step"]
    except (CorruptCheckpoint, OSError):
        return None


def progress_of(bundle: Bundle) -> tuple[int, int | None]:
    """Return a bundle's step and that of its last evaluation: a step may be saved again after it
    was evaluated."""
    return bundle["step"], bundle["evaluation"].get("step")


def has_run(folder: Path) -> bool:
    """Return True if a folder holds a checkpoint, intact or not."""
    # a crash may leave one of them alone
    names = (folder / "ckpt.pt", folder / "best.pt")
    return any(path.exists() for path in names) or bool(list_by_step(folder))


def check_crc(path: Path) -> None:
    """Raise CorruptCheckpoint unless the file has the checksum it was written with, and OSError if
    it can't be read."""
    with name_path(path), open(path, "rb") as file:
        # the checksum is of all bytes before MAGIC
        size = os.fstat(file.fileno()).st_size
        left = max(0, size - len(MAGIC) - CRC_BYTES)
        crc = 0
        while left:
            chunk = file.read(min(left, CHUNK))
            crc = zlib.crc32(chunk, crc)
            left -= len(chunk)
        end = file.read()

    # a file that was cut short ends in other bytes
    if end[:-CRC_BYTES] != MAGIC:
        raise CorruptCheckpoint("truncated, or not a checkpoint of keepGPT")
    if end[-CRC_BYTES:] != crc.to_bytes(CRC_BYTES, "little"):
        raise CorruptCheckpoint("wrong checksum")


def read_bundle(path: Path) -> Bundle:
    """Return the bundle of a checkpoint. Raises CorruptCheckpoint unless it is bit-identical to
    the saved one, and OSError if it can't be read."""
    check_crc(path)
    try:
        bundle = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # its own text advises to load the file unsafely
        raise CorruptCheckpoint("expected only plain values and tensors") from None
    except Exception as e:
        # torch.load raises errors of many types
        reason = str(e) or repr(e)
        raise CorruptCheckpoint(f"can't be read: {reason.splitlines()[0]}") from None
    if not isinstance(bundle, dict) or bundle.get("format") != FORMAT:
        raise CorruptCheckpoint(f"expected a bundle of format {FORMAT}")
    return bundle


def read_intact(
    paths: list[Path], errors: list[Exception]
) -> Iterator[tuple[Path, Bundle]]:
    """Yield the path and the bundle of each intact checkpoint among `paths`; several may be names
    of one file, and some not exist. Print which ones are skipped, and append why to `errors`."""
    tried = []
    for path in paths:
        if not path.exists() or any(path.samefile(other) for other in tried):
            continue
        tried.append(path)
        try:
            bundle = read_bundle(path)
        except (CorruptCheckpoint, OSError) as e:
            warn(f"skipping {path}: {e}")
            errors.append(e)
        else:
            yield path, bundle


def find_bundle(
    folder: Path, step: int = 0, prefer_best: bool = False
) -> tuple[Path, Bundle]:
    """Return the checkpoint of `step` and its bundle; if that is 0 the newest intact one, or with
    `prefer_best` best.pt if that is intact. Raises UserError if there is none."""
    if step:
        return find_step(folder, step)
    newest = [folder / "ckpt.pt", *list_by_step(folder)]
    # otherwise it comes last: it may be far behind
    best = [folder / "best.pt"]
    candidates = best + newest if prefer_best else newest + best
    errors = []
    found = next(read_intact(candidates, errors), None)
    if found:
        return found

    # a folder with nothing but a ckpt.pt may be nanoGPT's
    hint = "another --out_dir"
    if [path for path in candidates if path.exists()] == newest[:1]:
        hint += f", or if another program wrote it --init_from={newest[0]} --out_dir=<new folder>"
    # the cause decides the exit code: an error of the disk may pass
    unreadable = [e for e in errors if isinstance(e, OSError)]
    message = f"no intact checkpoint of keepGPT in {folder}. Try: {hint}"
    raise CorruptCheckpoint(message) from (unreadable[-1] if unreadable else None)


def find_step(folder: Path, step: int) -> tuple[Path, Bundle]:
    """Return the checkpoint of a step and its bundle. Raises UserError if no intact one is left."""
    # a step may have several names, or only best.pt
    paths = [path_of(folder, step), path_of(folder, step, "step")]
    paths += [folder / "best.pt", folder / "ckpt.pt"]
    for path, bundle in read_intact(paths, []):
        if bundle["step"] == step:
            return path, bundle
    steps = {step_of(path) for path in list_by_step(folder)} - {step}
    others = ", ".join(map(str, sorted(steps))) or "none"
    raise UserError(
        f"{folder}: no intact checkpoint of step {step}. Steps of the others: {others}"
    )


def go_back(folder: Path, step: int, lock: FolderLock) -> Bundle:
    """Return the bundle to resume from: the newest one, or that of `step` unless it is 0; then
    later files are moved aside. A run goes back to a step only once, as a restart loop repeats the
    command. Raises UserError."""
    _, newest = find_bundle(folder)
    if not step:
        return newest
    if step == newest.get("went_back_to"):
        warn(
            f"this run went back to step {step} already, and continues from its newest step. To "
            f"start there again: --init_from=branch:{folder} --step={step} --out_dir=<new folder>"
        )
        return newest
    bundle = newest
    if step != newest["step"]:
        path, bundle = find_step(folder, step)
        later = [other for other in list_by_step(folder) if step_of(other) > step]
        # a later best.pt is not of this history
        best_step = step_of_best(folder)
        if best_step is None or best_step > step:
            bundle["best_val_loss"] = math.inf
            if (folder / "best.pt").exists():
                later.append(folder / "best.pt")
        aside = folder / f"aside-{newest['step']:08d}"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        move_aside(folder, aside, path, later, Disk(lock))
        warn(f"going back to step {step}: the files of later steps are in {aside}")
    return bundle | {"went_back_to": step}


def move_aside(
    folder: Path, aside: Path, path: Path, later: list[Path], disk: Disk
) -> None:
    """Make `path` the newest checkpoint of a folder: move the `later` ones, and a copy of the log,
    to the folder `aside`. After a crash on the way, the newest checkpoint is the old or the new
    one. Raises OSError and FolderLost."""
    disk.check(folder)
    aside.mkdir()
    # a copy: the run continues the log
    log = folder / "metrics.jsonl"
    if log.exists():
        shutil.copyfile(log, aside / log.name)
    for other in later:
        disk.rename(other, aside / other.name)
    disk.fsync_folder(aside)
    # last: until then ckpt.pt names the file that was the newest
    link(path, folder / "ckpt.pt", disk)
    disk.fsync_folder(folder)


def read_trunk(path: Path, step: int) -> Bundle:
    """Return the bundle that a branch starts from: that of a checkpoint file, or in a run's folder
    that of `step`, or if that is 0 of the newest one. Its "trunk" names the file. Raises
    UserError."""
    # a run's folder, or one checkpoint
    if path.is_dir() and not has_run(path):
        raise UserError(
            f"init_from=branch:{path}: no checkpoint in this folder. Try: the folder of a run"
        )
    if path.is_dir():
        path, bundle = find_bundle(path, step)
    elif step:
        raise UserError(f"step={step} needs a run's folder, and {path} is none")
    else:
        try:
            bundle = read_bundle(path)
        except (CorruptCheckpoint, OSError) as e:
            reason = getattr(e, "strerror", None) or e
            raise UserError(
                f"init_from=branch:{path}: {reason}. Try: the folder of a run"
            ) from None
    # the branch's README names them
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    trunk = {"path": str(path), "step": bundle["step"], "sha256": sha256}
    return bundle | {"trunk": trunk, "went_back_to": 0, "wandb_run_id": None}


def check_finite(bundle: Bundle) -> None:
    """Raise ArithmeticError for weights or moments that are not finite. An optimizer may keep any
    nest of tensors and plain values."""

    def check(path: str, tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        # aminmax has no kernels for float8
        if tensor.element_size() == 1:
            tensor = tensor.float()
        # a NaN anywhere makes both of them NaN
        if not all(math.isfinite(x) for x in torch.aminmax(tensor)):
            raise ArithmeticError(f"{path} is not finite")
        return tensor

    map_tensors(check, bundle["model"], "model")
    map_tensors(check, bundle["optimizer"]["state"], "optimizer")


def allocate_like(tensor: Tensor) -> Tensor:
    """Return a tensor on the host for copies of `tensor`; from CUDA, in pinned memory."""
    # pages of its own: a page can be pinned only once
    memory = mmap(-1, tensor.nbytes, flags=MAP_PRIVATE)
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    if tensor.is_cuda:
        # pin_memory=True would round up to a power of two; a failure only costs speed
        torch.cuda.cudart().cudaHostRegister(copy.data_ptr(), copy.nbytes, 0)
    return copy


class Saver:
    """Save checkpoints in a background thread, one at a time, and own best_val_loss. All saves
    reuse one copy of the bundle on the host, made from CUDA on a stream of its own.

    `started` is the progress (see `progress_of`) of the last save that was started, on every rank;
    `saved` that of the last one that succeeded, on rank 0.
    """

    def __init__(
        self,
        folder: Path | None,
        keep: int,
        bundle: Bundle | None,
        before_commit: Callable[[], None],
        device: torch.device,
        disk: Disk | None = None,
        keep_every: int = 0,
    ) -> None:
        """Save into `folder`; None, on other ranks than the first, saves nothing. `bundle` is what
        the run was resumed from; `before_commit` is called before anything is written."""
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self.before_commit = before_commit
        self.disk = disk or Disk()
        self.best_val_loss = bundle["best_val_loss"] if bundle else math.inf
        self.started = progress_of(bundle) if bundle else None
        self.saved = self.started
        # copies of tensors on the host, by their path in the bundle
        self.copies = {}
        # set unless a copy is being made
        self.copied = threading.Event()
        self.copied.set()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread: threading.Thread | None = None

    def save(self, live: Bundle, best: bool) -> None:
        """Start to save a bundle of live tensors, also as best.pt if it is the `best`. They must
        not change before `wait_for_copy` returns."""
        self.started = progress_of(live)
        if not self.folder:
            return
        # one save at a time: there is one copy
        self.wait()
        self.copied.clear()
        # on the GPU, the last update comes first
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        self.thread = threading.Thread(target=self._run, args=(live, best))
        self.thread.start()

    def wait_for_copy(self) -> None:
        """Wait until the live tensors may change: before each update."""
        self.copied.wait()
        # the GPU waits for the end of the copy, the host does not
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)

    def wait(self) -> bool:
        """Wait until nothing is being saved. Return True unless the last save failed. best_val_loss
        is then that of best.pt."""
        if self.thread:
            self.thread.join()
        return not self.folder or self.saved == self.started

    def _run(self, live: Bundle, best: bool) -> None:
        """Save, in the thread. A failure is printed; training continues."""
        is_best = best
        try:
            self._copy_and_commit(live, best)
        except FolderLost:
            # the loop sees it at its next step, and ends the run with a line
            is_best = False
        except Exception as e:
            print(
                f"\nSAVING STEP {live['step']} FAILED: {e}. The older checkpoints are kept.",
                file=sys.stderr,
                flush=True,
            )
            # a save may fail after best.pt was replaced
            is_best = best and step_of_best(self.folder) == live["step"]
        finally:
            self.copied.set()
        if is_best:
            self.best_val_loss = live["best_val_loss"]

    def _copy_and_commit(self, live: Bundle, best: bool) -> None:
        """Copy a bundle to the host, check it, and save it."""
        # from here on training may change the live tensors
        with torch.cuda.stream(self.stream):
            bundle = map_tensors(self._copy, live)
        self.copied.set()
        if self.stream:
            self.stream.synchronize()

        # training gets the CPU first; the priority may be lower already
        if sys.platform == "linux":
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

        check_finite(bundle)
        self.before_commit()
        commit(bundle, self.folder, self.keep, best, self.disk, self.keep_every)
        self.saved = progress_of(bundle)

    def _copy(self, path: str, tensor: Tensor) -> Tensor:
        """Copy a tensor to the host; from CUDA, the copy is valid once the stream is done."""
        if not tensor.numel():
            return tensor.detach().cpu()
        if path not in self.copies:
            self.copies[path] = allocate_like(tensor)
        copy = self.copies[path]
        # an optimizer may change a tensor's shape or dtype
        if copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            return tensor.detach().to("cpu", copy=True)
        # from MPS, nothing would wait for such a copy
        return copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
