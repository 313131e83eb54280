"""Exit codes, errors, signals, the lock on out_dir, and atomic file writes."""
import ctypes
import errno
import fcntl
import importlib
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

EXIT_FAILED = 1  # a crash, a full disk or a failed last save: trying again may help
EXIT_MISTAKE = 2  # the command, a file or the machine must be changed first
EXIT_NOT_FINITE = 3  # trying again would meet the same numbers
EXIT_STOPPED = 75  # by a signal, everything saved: the same command with init_from=auto resumes
EXIT_INTERRUPTED = 130  # by another Ctrl-C
MISTAKES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS,
            errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h


class UserError(Exception):
    """A mistake in the command, a file or the machine; the text is one line that says how to fix
    it."""


def exit_with(error: Exception, code: int = EXIT_MISTAKE) -> NoReturn:
    """Print an error in one line and exit. If other ranks have met it as well, only the first one
    prints it: torchrun ends the others as soon as one has ended."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1)
    print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
    sys.exit(code)


def run_or_exit(work: Callable[[], Any], hint: str = "") -> Any:
    """Return what `work` returns. End the process, with one line at most, at a mistake, a failed
    file operation, an interruption, or full memory, where `hint` says what to try."""
    try:
        return work()
    except UserError as e:
        exit_with(e)
    except KeyboardInterrupt:
        print()  # after the terminal's ^C
        sys.exit(EXIT_INTERRUPTED)
    except Stopped:
        if os.environ.get("RANK", "0") == "0":
            print("stopped while starting, with nothing new to save; "
                  "continue with --init_from=auto")
        sys.exit(EXIT_STOPPED)
    except BrokenPipeError:  # stdout's reader has left, as `| head` does
        os._exit(EXIT_FAILED)
    except OSError as e:
        with suppress(OSError):  # of stdout
            sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a flush at the end would fail again
        exit_with(e, EXIT_MISTAKE if e.errno in MISTAKES else EXIT_FAILED)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("out of memory|allocate", str(e)):
            raise
        exit_with(UserError(f"out of memory: {e}. Try: {hint}"), EXIT_FAILED)


def warn(message: str) -> None:
    """Print a note on stderr. Of several ranks on a host only the first one prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr, flush=True)


def import_package(name: str) -> Any:
    """Return a module of a package that only some uses need. Raises UserError."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"this needs the package {package}. Try: pip install {package}") from None


def sync(path: str | os.PathLike) -> None:
    """Fsync a file or a folder. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def die_with_parent() -> None:
    """Let Linux kill this process when the one that started it ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def prepare_process() -> None:
    """Set what makes this process faster and safer, before it loads torch."""
    # waiting threads spin for some microseconds, then sleep. Sleeping at once halves an idle
    # machine's speed on small models; spinning forever, the default, takes nine tenths of a busy
    # machine's.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if platform.libc_ver()[0] == "glibc":
        # keep freed memory for the next step: the kernel zeroes each page that it hands out
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if "RANK" in os.environ:
        die_with_parent()  # that is torchrun: else a rank would keep the GPU and the lock


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


class Stopped(BaseException):
    """A signal came during work that can be interrupted."""


class Signals:
    """Let SIGINT, SIGTERM and SIGUSR1 ask the run to save and exit, and another Ctrl-C exit at
    once. Before the first `interrupt` call nothing is new: a signal raises Stopped."""

    def __init__(self) -> None:
        self.received, self.interruptible = 0.0, True  # when the first one came
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: Any) -> None:
        # torchrun sends the terminal's Ctrl-C again, at once: that is not another one
        if number == signal.SIGINT and self.received and time.monotonic() > self.received + 1:
            os._exit(EXIT_INTERRUPTED)
        self.received = self.received or time.monotonic()
        if self.interruptible:
            self.interruptible = False
            raise Stopped

    def interrupt(self, work: Callable[[], Any], alone: bool) -> Any:
        """Return what `work` returns, or None if a signal came. One rank `alone` is interrupted
        even while it waits, reads or compiles; several must leave a step together."""
        try:
            try:  # `_handle` raises once, and only inside this block
                self.interruptible = alone and not self.received
                return work()
            finally:
                self.interruptible = False
        except Stopped:
            return None
