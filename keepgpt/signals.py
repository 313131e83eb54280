"""Signals, and what a process tells the operating system at its start."""
import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from keepgpt.errors import EXIT_INTERRUPTED, Stopped

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h


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
