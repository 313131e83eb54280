"""Exit codes, errors, and lines for the user."""

import builtins
import errno
import importlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

# a crash, a full disk or a failed last save: trying again may help
EXIT_FAILED = 1
# the command, a file or the machine must be changed first
EXIT_MISTAKE = 2
# a loss or gradient is not finite: trying again would meet the same numbers
EXIT_NOT_FINITE = 3
# by a signal, everything saved: the same command with init_from=auto resumes
EXIT_STOPPED = 75
# by another Ctrl-C
EXIT_INTERRUPTED = 130
# a drive that lacks an operation answers it with one of these
UNSUPPORTED = {
    errno.EACCES,
    errno.EBADF,
    errno.EINVAL,
    errno.EISDIR,
    errno.EMLINK,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EXDEV,
}
# errors of the operating system that another try would only repeat. The others may pass, as a full
# disk (ENOSPC), a lost connection (EIO, ESTALE, ETIMEDOUT) or too many files (EMFILE) do
MISTAKES = (UNSUPPORTED - {errno.ENOLCK}) | {
    errno.EEXIST,
    errno.EFBIG,
    errno.EILSEQ,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENODEV,
    errno.ENOENT,
    errno.ENOEXEC,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.ENXIO,
    errno.EROFS,
    errno.ESPIPE,
}
# of the notes that are printed once
TOPICS = set()


class UserError(Exception):
    """A mistake in the command, a file or the machine; the text is one line that says how to fix
    it."""


class NotFinite(UserError):
    """A loss or a gradient that is not finite."""


class Stopped(BaseException):
    """A signal came during work that can be interrupted."""


class Notes(io.TextIOWrapper):
    """A stderr that never fails, because a script must not end with its terminal."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def in_notebook() -> bool:
    """Return True in a process of IPython, such as a notebook's kernel. It outlives the script."""
    return hasattr(builtins, "__IPYTHON__")


def prepare_streams() -> None:
    """Let stdout and stderr take every character, and stderr lose what can't be written."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # a closed one gets its number back, or the next file, a checkpoint, would
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, mode, closefd=False))
    # a locale may lack a character
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = Notes(
        open(2, "wb", closefd=False),
        sys.stderr.encoding,
        "backslashreplace",
        line_buffering=True,
    )


def say(text: str, end: str = "\n") -> None:
    """Print on stdout. If that fails, because its reader has left (as `| head` does), its terminal
    is gone or its disk is full, print nothing there from now on."""
    try:
        print(text, end=end, flush=True)
    except (OSError, ValueError) as e:
        # a reader that left knows why
        if not isinstance(e, BrokenPipeError):
            warn(f"stdout: {e}; continuing without it")
        sys.stdout = open(os.devnull, "w")


def one_line(error: BaseException) -> str:
    """Return an error's text in one line."""
    return " ".join(str(error).splitlines()) or repr(error)


def exit_with(error: Exception, code: int = EXIT_MISTAKE) -> NoReturn:
    """Print an error in one line and exit. If other ranks have met it as well, only the first one
    prints it: torchrun ends the others as soon as one has ended."""
    # only after seconds: an error that this rank alone has met is printed, too
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(code)


def exit_code(error: BaseException | None) -> int:
    """Return EXIT_FAILED for an error of the operating system that may pass, EXIT_NOT_FINITE for a
    number that is not finite, else EXIT_MISTAKE."""
    if isinstance(error, NotFinite):
        return EXIT_NOT_FINITE
    may_pass = isinstance(error, OSError) and error.errno not in MISTAKES
    return EXIT_FAILED if may_pass else EXIT_MISTAKE


@contextmanager
def name_path(path: str | os.PathLike) -> Iterator[None]:
    """Let an OSError name the path that a block reads or writes: that of a descriptor does not."""
    try:
        yield
    except OSError as e:
        # that of a library may have only a text, which a file name would hide
        if e.errno:
            e.filename = e.filename or os.fspath(path)
        raise


def end_process(code: int) -> NoReturn:
    """Exit at once, without what libraries do at the interpreter's end, which may hang."""
    # os._exit drops buffered lines
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_or_exit(work: Callable[[], Any], hint: str = "") -> Any:
    """Return what `work` returns. End the process, with one line at most, at a mistake, a failed
    file operation, an interruption, or full memory, where `hint` says what to try."""
    try:
        # files are named where they are used; an error without a name is one of a stream
        with name_path("stdout or another stream"):
            result = work()
            # a failure here is one of `work`
            sys.stdout.flush()
            return result
    except UserError as e:
        exit_with(e, exit_code(e.__cause__ or e))
    except KeyboardInterrupt:
        # after the terminal's ^C
        say("")
        sys.exit(EXIT_INTERRUPTED)
    except Stopped:
        if os.environ.get("RANK", "0") == "0":
            say(
                "stopped while starting, with nothing new to save; continue with --init_from=auto"
            )
        sys.exit(EXIT_STOPPED)
    except OSError as e:
        exit_with_os_error(e)
    except (MemoryError, RuntimeError) as e:
        # PyTorch raises a RuntimeError for full memory, and for much else
        if isinstance(e, RuntimeError) and not re.search(
            "out of memory|allocate", str(e)
        ):
            raise
        exit_with(UserError(f"out of memory: {e}. Try: {hint}"), EXIT_FAILED)


def exit_with_os_error(error: OSError) -> NoReturn:
    """Print a failed file operation in one line and exit."""
    # the interpreter flushes stdout at its end; if that failed, it would change the code
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")
    # stdout's reader has left, as `| head` does
    if isinstance(error, BrokenPipeError):
        sys.exit(EXIT_FAILED)
    exit_with(error, exit_code(error))


def warn(message: str) -> None:
    """Print a note on stderr. Of several ranks on a host only the first one prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr, flush=True)


def warn_once(topic: str, message: str) -> None:
    """Print a note, unless this process has printed one on that topic."""
    if topic not in TOPICS:
        TOPICS.add(topic)
        warn(message)


def import_package(name: str) -> Any:
    """Return a module of a package that only some uses need. Raises UserError."""
    try:
        return importlib.import_module(name)
    except ImportError:
        # that of a module in it is what pip knows
        package = name.partition(".")[0]
        raise UserError(
            f"this needs the package {package}. Try: pip install {package}"
        ) from None
