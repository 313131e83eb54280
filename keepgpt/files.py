"""Atomic and durable file writes, and the lock on a folder."""

import errno
import fcntl
import os
import time
from pathlib import Path

from keepgpt.errors import UNSUPPORTED, UserError, name_path, say, warn, warn_once


class FolderLost(UserError):
    """The path of a locked folder leads to another folder or lock, or to none."""


def sync(path: str | os.PathLike) -> None:
    """Fsync a file or a folder. Raises OSError."""
    # the kernel fsyncs what any descriptor has written
    handle = os.open(path, os.O_RDONLY)
    try:
        with name_path(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Only print a note if the drive can't. Raises OSError."""
    try:
        sync(folder)
    except OSError as e:
        if e.errno not in UNSUPPORTED:
            raise
        # at each save, so only the first time
        message = (
            f"this drive can't fsync a folder ({e}): after a power cut, the newest "
            "names in it may be missing"
        )
        warn_once("fsync", message)


class FolderLock:
    """The lock that lets one process write in a folder.

    The lock is on the file .lock, but writes go by the folder's path. `check` compares the two, and
    comes before each change of a name in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # the descriptor of .lock, while it is locked
        self.file = -1
        self.lost = False

    def acquire(self, patience: float) -> None:
        """Make the folder durably and lock it until `release`, or until this process ends; wait up
        to `patience` seconds for another process that is ending. Raises UserError and OSError."""
        make_folder(self.folder)
        # flock itself would wait without an end and without a line
        deadline = time.monotonic() + patience
        while not self._try_to_acquire():
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process is writing to {self.folder}. Try: wait for its "
                    "end, or another folder"
                )
            # said once
            if patience:
                say(f"another process is writing to {self.folder}; waiting")
                patience = 0
            time.sleep(0.1)

    def check(self) -> None:
        """Raise FolderLost if the folder was moved, removed or replaced, or its .lock was, now or
        at an earlier check. Raises OSError if that can't be found out."""
        # for good: who moves a folder back may have started another process on it
        self.lost = self.lost or not self._is_in_place()
        if self.lost:
            raise FolderLost(
                f"{self.folder}: the folder or its .lock was moved, removed or replaced while this "
                "process was writing there; it writes no more, because another one may. Try: move "
                "the folder back, then the same command again"
            )

    def release(self) -> None:
        """Unlock the folder, if it is locked."""
        if self.file >= 0:
            os.close(self.file)
        self.file = -1

    def _try_to_acquire(self) -> bool:
        """Lock the file .lock of the folder. Return False if another process has locked it."""
        self.file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            # over SMB, EACCES says that another process has the lock
            if e.errno in (errno.EAGAIN, errno.EACCES):
                self.release()
                return False
            # others are named by the descriptor, which says nothing
            e.filename = str(self.folder / ".lock")
            if e.errno not in UNSUPPORTED:
                raise
            warn(
                f"this drive has no locks ({e}): it goes unnoticed if two processes write to "
                f"{self.folder}. Start only one"
            )
        # another process may have replaced it before it was locked, and locked the new one
        if self._is_in_place():
            return True
        self.release()
        return False

    def _is_in_place(self) -> bool:
        """Return True if the folder's path leads to the locked file."""
        try:
            found = os.stat(self.folder / ".lock")
        except OSError as e:
            # a network drive that is away does not show that the folder is
            if e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return False
        return os.path.samestat(found, os.fstat(self.file))


def make_folder(folder: Path) -> None:
    """Make a folder and its parents durably, unless they exist. Raises UserError and OSError."""
    # before they are made
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:
        raise UserError(
            f"{e.filename}: expected a folder, got a file or a link to nothing. Try: "
            "another name"
        ) from None
    # a new name is in the folder above it
    for path in new:
        sync_folder(path.parent)


def check_lock(lock: FolderLock | None) -> None:
    """Check a lock, if there is one. Raises FolderLost and OSError."""
    if lock:
        lock.check()


def write_atomically(
    path: Path, content: bytes, lock: FolderLock | None = None
) -> None:
    """Replace a file durably: after a crash it holds the old or the new content. `lock` is that on
    its folder. Raises OSError and FolderLost."""
    # on the same drive: a rename is atomic only there
    temporary = path.with_name(f"{path.name}.tmp")
    check_lock(lock)
    try:
        with name_path(temporary):
            temporary.write_bytes(content)
        # the content first, then its name: a power cut may come in between
        sync(temporary)
        check_lock(lock)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError:
        # the temporary file may be another process's
        check_lock(lock)
        temporary.unlink(missing_ok=True)
        raise
