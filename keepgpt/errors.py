"""Exit codes, errors, and the one line that a mistake gets."""
import errno
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

EXIT_FAILED = 1  # a crash, a full disk or a failed last save: trying again may help
EXIT_MISTAKE = 2  # the command, a file or the machine must be changed first
EXIT_NOT_FINITE = 3  # trying again would meet the same numbers
EXIT_STOPPED = 75  # by a signal, everything saved: the same command with init_from=auto resumes
EXIT_INTERRUPTED = 130  # by another Ctrl-C
# a drive that lacks an operation answers it with one of these
UNSUPPORTED = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.EMLINK, errno.ENOLCK,
               errno.ENOSYS, errno.ENOTSUP, errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM,
               errno.EXDEV}
# errors of the operating system that another try would only repeat. The others may pass, as a full
# disk (ENOSPC), a lost connection (EIO, ESTALE, ETIMEDOUT) or too many files (EMFILE) do
MISTAKES = (UNSUPPORTED - {errno.ENOLCK}) | {
    errno.EEXIST, errno.EFBIG, errno.EILSEQ, errno.ELOOP, errno.ENAMETOOLONG, errno.ENODEV,
    errno.ENOENT, errno.ENOEXEC, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENXIO, errno.EROFS,
    errno.ESPIPE}
TOPICS: set[str] = set()  # of the notes that are printed once


class UserError(Exception):
    """A mistake in the command, a file or the machine; the text is one line that says how to fix
    it."""


class Stopped(BaseException):
    """A signal came during work that can be interrupted."""


def exit_with(error: Exception, code: int = EXIT_MISTAKE) -> NoReturn:
    """Print an error in one line and exit. If other ranks have met it as well, only the first one
    prints it: torchrun ends the others as soon as one has ended."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1)
    print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
    sys.exit(code)


def exit_code(error: BaseException | None) -> int:
    """Return EXIT_FAILED for an error of the operating system that may pass, else EXIT_MISTAKE."""
    may_pass = isinstance(error, OSError) and error.errno not in MISTAKES
    return EXIT_FAILED if may_pass else EXIT_MISTAKE


@contextmanager
def name_path(path: str | os.PathLike) -> Iterator[None]:
    """Let an OSError name the path that a block reads or writes: that of a descriptor does not."""
    try:
        yield
    except OSError as e:
        if e.errno:  # that of a library may have only a text
            e.filename = e.filename or os.fspath(path)
        raise


def run_or_exit(work: Callable[[], Any], hint: str = "") -> Any:
    """Return what `work` returns. End the process, with one line at most, at a mistake, a failed
    file operation, an interruption, or full memory, where `hint` says what to try."""
    try:
        with name_path("stdout or another stream"):  # files are named where they are used
            return work()
    except UserError as e:
        exit_with(e, exit_code(e.__cause__))
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
        exit_with(e, exit_code(e))
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("out of memory|allocate", str(e)):
            raise
        exit_with(UserError(f"out of memory: {e}. Try: {hint}"), EXIT_FAILED)


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
        package = name.partition(".")[0]
        raise UserError(f"this needs the package {package}. Try: pip install {package}") from None
