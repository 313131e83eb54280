"""Run a script and write its peak memory in bytes to FILE<rank>: `python -m tools.bench.peak FILE
SCRIPT [ARGS ...]`. (getrusage would include the memory of the process that started it.)"""
import atexit
import os
import re
import runpy
import sys
from pathlib import Path


def write_peak(file: str) -> None:
    """Write this process's peak memory; on CUDA the device's."""
    peak = 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    Path(file + os.environ.get("RANK", "0")).write_text(str(peak))


if __name__ == "__main__":
    atexit.register(write_peak, sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
