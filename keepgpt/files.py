"""Atomic and durable file writes, and the lock on out_dir."""
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from keepgpt.errors import UserError, say


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


def lock_out_dir(out_dir: Path, patience: float) -> IO[str]:
    """Make out_dir durably and lock it until the returned file is closed; wait up to `patience`
    seconds for another process that is ending. Raises UserError and OSError."""
    new = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    out_dir.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)
    file = open(out_dir / ".lock", "a")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"another process is writing to {out_dir}. Try: wait for its end, "
                                "or another folder") from None
        if patience:
            say(f"another process is writing to {out_dir}; waiting")
            patience = 0
        time.sleep(0.1)
