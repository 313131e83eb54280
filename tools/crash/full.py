"""full: no room for a checkpoint, whatever part of it would still fit."""
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from keepgpt import checkpoint
from keepgpt.process import EXIT_FAILED
from tools import runs
from tools.crash.common import PAGE, RUN, Part, clone

WIDE = RUN | {"n_embd": 64, "eval_interval": 6, "max_iters": 42}  # a checkpoint over a megabyte
ROOM = 1 << 16  # bytes between two limits


def check_full_disk(settings: dict[str, Any], older: Path, limit: int, instant: float | None,
                    allowed: set[str], expected: dict[str, Any]) -> str:
    """Resume a run while no file may have more than `limit` bytes, or with 0 on a file system that
    is full from an instant on; then with room. Return the problem, or ""."""
    out = clone(older, settings["out_dir"])
    log = Path(f"{out}.log")
    log.unlink(missing_ok=True)
    pid = runs.start(settings, largest_file=limit)
    code = runs.wait_for_exit(pid, instant)
    if code is None:
        with open(out / "filler", "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(PAGE)):
                pass
        code = runs.wait_for_exit(pid)
        (out / "filler").unlink()
    if limit or code != 0:  # 0: the last checkpoint was saved before the disk was full
        # before the first step, a full disk ends the run with one line
        ends = (f"done at step {settings['max_iters']}", "error: ")
        if code != EXIT_FAILED or not any(end in log.read_text() for end in ends):
            return f"training did not continue (exit code {code}), see {log}"
        if runs.newest_state(out) not in allowed:
            return "the older checkpoint is lost"
        if runs.list_temporary(out):
            return f"{runs.list_temporary(out)} is left behind"
    return runs.compare_end(runs.wait_for_exit(runs.start(settings)), out, expected)


def mount(folder: Path) -> bool:
    """Mount 16 MiB of memory as a file system. Return False where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    return os.geteuid() == 0 and not subprocess.run(command, stderr=subprocess.DEVNULL).returncode


def full(part: Part, place: Path) -> str:
    """Leave no room: training must continue, older checkpoints remain, and with room again the run
    must end bit-identical."""
    base = WIDE | {"dataset": runs.prepare_source(place)}
    older, small = place / "older", place / "small"
    life = runs.run(base | {"out_dir": place / "whole", "keep_checkpoints": 99})
    expected = runs.read_end(place / "whole")
    states = {runs.read_state(path) for path in checkpoint.numbered(place / "whole")}
    runs.run(base | {"out_dir": older, "max_iters": base["eval_interval"]})
    limits = range(ROOM, (older / "ckpt.pt").stat().st_size, ROOM)
    mounted, filled = mount(small), 0
    try:
        for number in part.choose([False] * len(limits) * (1 + mounted), few=8):
            if number < len(limits):
                settings = base | {"out_dir": place / f"limit{number}"}
                problem = check_full_disk(settings, older, limits[number], None,
                                          {runs.newest_state(older)}, expected)
            else:
                filled += 1
                problem = check_full_disk(base | {"out_dir": small}, older, 0,
                                          part.rng(number).uniform(0, life), states, expected)
            part.count(number, problem)
    finally:
        if mounted:
            subprocess.run(["umount", small], check=True)
    return (f"full disks: {part.cases - filled} of {len(limits)} limits in steps of 64 KiB, "
            f"{filled} small file systems" + ("" if mounted else " (mounting one needs root)"))
