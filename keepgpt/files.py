"""Atomic and durable file writes, and the lock on out_dir."""
import fcntl
import os
import time
from pathlib import Path

from keepgpt.errors import UserError


def sync(path: str | os.PathLike) -> None:
    """Fsync a file or a folder. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file durably: after a crash it holds the old or the new content. Raises
    OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def lock_out_dir(out_dir: Path, patience: float) -> None:
    """Make out_dir durably and lock it until this process ends; wait up to `patience` seconds for
    another process that is ending. Raises UserError and OSError."""
    new = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    out_dir.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)
    file = os.open(out_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # closing it would unlock
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"another process is writing to {out_dir}. Try: wait for its end, "
                                "or another folder") from None
        if patience:
            print(f"another process is writing to {out_dir}; waiting", flush=True)
            patience = 0
        time.sleep(0.1)
