"""Functions for a notebook that interrupts its own kernel during a run."""

import os
import signal
import threading
import time
from pathlib import Path


def list_handlers():
    """Return the handlers of all signals that can have one."""
    fixed = (signal.SIGKILL, signal.SIGSTOP)
    return [signal.getsignal(number) for number in range(1, 30) if number not in fixed]


def wait_and_interrupt(log, step):
    """Wait until a log has a row of this step, then interrupt."""
    path = Path(log)
    while not path.exists() or f'"step": {step},' not in path.read_text():
        time.sleep(0.02)
    # a notebook's button sends the same signal to the kernel's process
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_at(log, step):
    """Do so in a thread, while the next cell runs."""
    threading.Thread(target=wait_and_interrupt, args=(log, step)).start()
