"""Signals, and the settings of a process at its start."""

import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from keepgpt.errors import EXIT_INTERRUPTED, Stopped, in_notebook

# a keyboard, a batch system or a closed terminal asks a run to end
ENDINGS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)

# from linux/prctl.h and malloc.h
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


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
    # torchrun's rank: if that is killed, the rank would keep the GPU and the lock
    if "RANK" in os.environ:
        die_with_parent()


def raise_interrupts(*numbers: int) -> None:
    """Let signals that are not ignored raise KeyboardInterrupt. A notebook's kernel keeps its own
    handlers, where an interrupt does so already."""
    for number in numbers:
        if not in_notebook() and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


class Signals:
    """Let signals ask the run to save and exit, and another Ctrl-C exit at once. Before the first
    `interrupt` call nothing is new: a signal raises Stopped."""

    def __init__(self) -> None:
        # when the first one came
        self.received = 0.0
        self.interruptible = True
        # the handlers before
        self.replaced = {}
        for number in ENDINGS:
            # nohup ignores a SIGHUP. torchrun passes on what ends it, nohup or not
            ignored = number == signal.SIGHUP and "RANK" not in os.environ
            if not ignored or signal.getsignal(number) != signal.SIG_IGN:
                self.replaced[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Restore the former handlers in a notebook. Elsewhere the process ends: a late signal
        must not change its exit code."""
        if in_notebook():
            for number, handler in self.replaced.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        # torchrun sends the terminal's Ctrl-C again, at once: that is not another one
        if self.received and now < self.received + 1:
            return
        another = self.received > 0
        self.received = self.received or now
        # raised once: the run is ending then, and must not be interrupted on its way
        if self.interruptible:
            self.interruptible = False
            raise Stopped
        # a second Ctrl-C gives up the last save
        if another and number == signal.SIGINT:
            if in_notebook():
                raise KeyboardInterrupt
            os._exit(EXIT_INTERRUPTED)

    def interrupt(
        self, work: Callable[[], Any], alone: bool, saved: bool = False
    ) -> Any:
        """Return what `work` returns, or None if a signal came. One rank `alone` is interrupted
        even while it waits, reads or compiles; several must leave a step together. Once all is
        `saved`, a signal after the first one interrupts, too."""
        # `_handle` raises only inside the inner block
        try:
            try:
                self.interruptible = alone and (saved or not self.received)
                return work()
            finally:
                self.interruptible = False
        except Stopped:
            return None
