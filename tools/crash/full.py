"""full: no room for a bundle, whatever part of it would still have fitted."""
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import train
from keepgpt import checkpoint
from tools.crash.common import (
    HANGS,
    PAGE,
    RUN,
    Part,
    clone,
    difference,
    exit_code,
    half_written,
    newest,
    prepare,
    start,
    state_at,
    undisturbed,
)

WIDE = RUN | {"n_embd": 64, "eval_interval": 6, "max_iters": 42}  # a bundle of over a megabyte
ROOM = 1 << 16  # bytes


def no_room(settings: dict[str, Any], older: Path, limit: int, instant: float, expected: set[str],
            whole: dict[str, Any]) -> str:
    """Go on with a run while no file may have more than `limit` bytes, or on a file system that is
    full from some instant on; then with room. What is wrong, or ""."""
    out, problem = clone(older, settings["out_dir"]), ""
    log = Path(f"{out}.log")
    log.unlink(missing_ok=True)
    code = exit_code(pid := start(settings, limit=limit), instant)
    if code is None:
        with open(out / "filler", "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(PAGE)):
                pass
        code = exit_code(pid)
        (out / "filler").unlink()
    if limit or code != 0:  # 0: the end was saved before there was no room
        end = f"done at step {settings['max_iters']}"
        if code != train.EXIT_FAILED or end not in log.read_text():
            problem = f"training did not go on (exit code {code}), see {log}"
        elif newest(out) not in expected:
            problem = "the older bundle is lost"
        elif half_written(out):
            problem = f"{half_written(out)} left behind"
    return problem or difference(exit_code(start(settings)), out, whole)


def mount(folder: Path) -> bool:
    """Mount 16 MiB of memory as a file system, if that is allowed here."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    return os.geteuid() == 0 and not subprocess.run(command, stderr=subprocess.DEVNULL).returncode


def full(part: Part, place: Path) -> int:
    """No room: training goes on, older bundles stay, and with room again all is well."""
    base, older, small = WIDE | {"dataset": prepare(place)}, place / "older", place / "small"
    whole, life = undisturbed(base | {"out_dir": place / "whole", "keep_checkpoints": 99}, 0)
    states = {state_at(path, {}) for path in checkpoint.numbered(place / "whole")}
    undisturbed(base | {"out_dir": older, "max_iters": base["eval_interval"]}, 0)
    limits = range(ROOM, (older / "ckpt.pt").stat().st_size, ROOM)
    mounted, real = mount(small), 0
    try:
        for number in part.choose([False] * len(limits) * (1 + mounted), few=8):
            if number < len(limits):
                case = {"out_dir": place / f"limit{number}"}, limits[number], HANGS, {newest(older)}
            else:
                real += 1
                case = {"out_dir": small}, 0, part.dice(number).uniform(0, life), states
            part.count(number, no_room(base | case[0], older, *case[1:], whole))
    finally:
        if mounted:
            subprocess.run(["umount", small], check=True)
    return part.end(f"disks without room: {part.cases - real} of the {len(limits)} file sizes by "
                    + (f"64 KiB, {real} small file systems" if mounted else
                       "64 KiB; a small file system can be mounted only by root"))
