"""The process of a run: exit codes, signals, the lock on out_dir, files that are safe."""
import atexit
import ctypes
import errno
import fcntl
import importlib
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

EXIT_FAILED = 1  # a crash, a full disk or a failed last save: trying again may help
EXIT_MISTAKE = 2  # the command, a file or the machine must be changed first
EXIT_NOT_FINITE = 3  # trying again would meet the same numbers
EXIT_STOPPED = 75  # by a signal, everything saved: the same command with init_from=auto resumes
EXIT_INTERRUPTED = 130  # by a second Ctrl-C
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h


class UserError(Exception):
    """A mistake in the command, a file or the machine; the text is one line that says how to fix
    it. `local`: on this rank alone, not on all of them."""

    def __init__(self, message: str, code: int = EXIT_MISTAKE, local: bool = False) -> None:
        super().__init__(message, code, local)
        self.message, self.code, self.local = message, code, local

    def __str__(self) -> str:
        return self.message


def exit_with(error: UserError) -> NoReturn:
    """Print an error in one line and exit with its code."""
    if error.local or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # torchrun kills all ranks as soon as one ends: let the first one print
    sys.exit(error.code)


def fail(message: str) -> NoReturn:
    """Print a mistake in one line and exit."""
    exit_with(UserError(message))


def describe(error: OSError) -> tuple[str, int]:
    """Return the reason and the exit code of a failed file operation: a full disk may have room
    later."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (error.strerror or str(error)).lower(), EXIT_FAILED if full else EXIT_MISTAKE


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


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file durably: after a crash it holds the old or the new content. Raises
    OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def lock_out_dir(out_dir: Path, patience: float) -> None:
    """Make out_dir and lock it until this process ends; wait up to `patience` seconds for another
    process that is ending.

    Folders made here are removed at exit if nothing was written to them. Raises UserError.
    """
    try:
        new = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
        out_dir.mkdir(parents=True, exist_ok=True)
        for folder in new:  # what is saved in it must not be lost with it
            sync(folder.parent)
        if new:
            atexit.register(remove_unused, new)
        lock_file(out_dir / ".lock", patience)
    except BlockingIOError:
        raise UserError(f"another run is writing to {out_dir}. Try: wait for its end, or another "
                        "--out_dir") from None
    except OSError as e:
        reason, code = describe(e)
        raise UserError(f"{out_dir} can't be used: {reason}", code) from None


def lock_file(path: Path, patience: float) -> None:
    """Lock a file, which is made if need be, until this process ends. Raises BlockingIOError if
    another process still holds it after `patience` seconds."""
    deadline, waiting = time.monotonic() + patience, False
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # stays open: closing it unlocks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return
        except (BlockingIOError, FileNotFoundError):  # held, or removed by a run that has ended
            if time.monotonic() > deadline:
                raise BlockingIOError from None
            if not waiting:
                print(f"another run is still writing to {path.parent}; waiting up to {patience} s "
                      "for its end", flush=True)
            waiting = True
            time.sleep(0.1)
        os.close(file)


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
    """A signal has come during work that can be interrupted."""


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 ask the run to save and end; a second Ctrl-C ends it at once.

    Until the first `unless_one_comes` has ended there is nothing to save: they raise Stopped.
    """

    def __init__(self) -> None:
        self.came, self.interruptible = False, True
        numbers, wake = os.pipe()
        os.set_blocking(wake, False)
        threading.Thread(target=self._exit_at_second, args=(numbers,), daemon=True).start()
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _exit_at_second(self, numbers: int) -> None:
        """Exit at a second Ctrl-C. A thread does it, because Python calls `_handle` only once it
        is back from a collective or a kernel."""
        first_at = None
        while True:
            number = os.read(numbers, 1)[0]
            if first_at is None:
                first_at = time.monotonic()
            # torchrun passes on the Ctrl-C that the terminal has sent already: not a second one
            elif number == signal.SIGINT and ("RANK" not in os.environ
                                              or time.monotonic() - first_at > 1):
                os._exit(EXIT_INTERRUPTED)

    def _handle(self, _number: int, _frame: Any) -> None:
        self.came = True
        if self.interruptible:
            self.interruptible = False
            raise Stopped

    def unless_one_comes(self, work: Callable[[], Any], world_size: int, nothing_new: bool) -> Any:
        """Return what `work` returns, or None if a signal came. With one rank the signal interrupts
        it, even where it waits, reads or compiles.

        One rank of several can't leave a step alone; with `nothing_new` since the last save it can
        leave the run.
        """
        alone = world_size == 1
        if self.came and nothing_new and not alone:
            os._exit(EXIT_STOPPED)
        try:
            try:  # whenever the signal comes, it is caught below: it raises once, and only here
                self.interruptible = (alone or nothing_new) and not self.came
                return work()
            finally:
                self.interruptible = False
        except Stopped:
            if not alone:
                os._exit(EXIT_STOPPED)
            return None
