"""The process of a run: exit codes, signals, the lock on out_dir, files that are safe."""
import atexit
import ctypes
import errno
import fcntl
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

# the command, a file or the machine must be changed first: trying again would not help
EXIT_MISTAKE = 2
EXIT_FAILED = 1  # a crash, a full disk or a failed last save: trying again may help
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h


def fail(message: str, code: int = EXIT_MISTAKE, any_rank: bool = False) -> NoReturn:
    """End the program with one line on stderr. Of several ranks on a host only the first one
    prints it, unless `any_rank`: then the error is this rank's alone."""
    if any_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    sys.exit(code)


def describe(error: OSError) -> tuple[str, int]:
    """Return the reason and the exit code of a failed file operation: a full disk may have room
    later."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (error.strerror or str(error)).lower(), EXIT_FAILED if full else EXIT_MISTAKE


def warn(message: str) -> None:
    """Say on stderr what is not as it was asked for; of several ranks on a host, the first one
    speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr, flush=True)


def sync(path: str | os.PathLike) -> None:
    """See a file's bytes, or a folder's names, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def leave_closed_output(error: OSError) -> NoReturn:
    """End the program after stdout took no more: in silence if its reader has left (`| head`)."""
    if not isinstance(error, BrokenPipeError):
        print(f"error: stdout: {describe(error)[0]}", file=sys.stderr, flush=True)
    os._exit(0 if isinstance(error, BrokenPipeError) else EXIT_FAILED)  # a flush would fail again


def prepare_process() -> None:
    """What helps this process and must come before torch is loaded."""
    # threads that wait spin for some microseconds and then sleep: at once costs an idle machine
    # half its speed on small models, and spinning on, the default, a busy one nine tenths
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if platform.libc_ver()[0] == "glibc":
        # keep freed memory for the next step: given back, it is zeroed page by page when it returns
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if "RANK" in os.environ and sys.platform == "linux":
        # a rank whose torchrun was killed dies too: it must hold neither GPU nor folder
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# stopped by a signal with everything saved: the same command, with init_from=auto, goes on
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130  # by a second Ctrl-C


def lock(out_dir: Path, patience: float) -> TextIO:
    """Lock out_dir for this process, until it ends; return the lock's file, at its beginning.

    Waits up to `patience` seconds for another process that is ending, then raises BlockingIOError.
    Folders made here are removed when the program ends if nothing was written to them.
    """
    deadline, waiting = time.monotonic() + patience, False
    new = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    out_dir.mkdir(parents=True, exist_ok=True)
    for folder in new:  # what is saved in it must not be lost with it
        sync(folder.parent)
    if new:
        atexit.register(remove_unused, new)
    while True:
        file = open(out_dir / ".lock", "a+")
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                return file
        except (BlockingIOError, FileNotFoundError):  # held, or removed by a run that has ended
            if time.monotonic() > deadline:
                raise BlockingIOError from None
            if not waiting:
                print(f"another run is still writing to {out_dir}; waiting up to {patience} s for "
                      "its end", flush=True)
            waiting = True
            time.sleep(0.1)
        file.close()


def remove_unused(folders: list[Path]) -> None:
    """Remove the first of `folders` if it holds nothing but a lock, then its parents among them."""
    with suppress(OSError):
        if os.listdir(folders[0]) == [".lock"]:
            (folders[0] / ".lock").unlink()
        for folder in folders:
            folder.rmdir()


def host_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Stopped(BaseException):
    """A signal has come while work was done that may be broken off."""


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 ask the run to save and end; a second Ctrl-C ends it at once.

    Until the first `unless_one_comes` has ended there is nothing to save: they raise Stopped.
    """

    def __init__(self) -> None:
        self.came, self.breakable = False, True
        numbers, wake = os.pipe()
        os.set_blocking(wake, False)
        threading.Thread(target=self._leave_at_second, args=(numbers,), daemon=True).start()
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _leave_at_second(self, numbers: int) -> None:
        """A thread, since `_note` is called only when Python is back from a collective or a
        kernel."""
        first_at = None
        while True:
            number = os.read(numbers, 1)[0]
            if first_at is None:
                first_at = time.monotonic()
            # torchrun passes on the Ctrl-C that the terminal has sent already: no second one
            elif number == signal.SIGINT and ("RANK" not in os.environ
                                              or time.monotonic() - first_at > 1):
                os._exit(EXIT_INTERRUPTED)

    def _note(self, _number: int, _frame: Any) -> None:
        self.came = True
        if self.breakable:
            self.breakable = False
            raise Stopped

    def unless_one_comes(self, work: Callable[[], Any], world_size: int, nothing_new: bool) -> Any:
        """What `work` returns; None if a signal came, which ends it at once, even where it waits,
        reads or compiles.

        One process among several can't leave a step by itself; but with `nothing_new` since the
        last save it can leave the run.
        """
        alone = world_size == 1
        if self.came and nothing_new and not alone:
            os._exit(EXIT_STOPPED)
        try:
            try:  # whenever the signal comes, it is caught below: it raises once, and only here
                self.breakable = (alone or nothing_new) and not self.came
                return work()
            finally:
                self.breakable = False
        except Stopped:
            if not alone:
                os._exit(EXIT_STOPPED)



