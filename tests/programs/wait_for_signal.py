"""Work that a signal interrupts: prints its result and whether a signal came. The argument is
`uninterruptible`, or the seconds that the work takes."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from keepgpt.signals import Signals

signals = Signals()


def work() -> str:
    print("ready", flush=True)
    time.sleep(float(sys.argv[1]))
    return "uninterrupted"


if sys.argv[1:] == ["uninterruptible"]:
    signals.interruptible = False
    print("ready", flush=True)
    time.sleep(60)
print(signals.interrupt(work, True), signals.received > 0)
