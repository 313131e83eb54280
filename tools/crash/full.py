"""full: no room for a checkpoint, whatever part of it would still fit."""
from pathlib import Path
from typing import Any

from keepgpt.process import EXIT_FAILED
from tools import runs
from tools.common import last_step
from tools.crash.common import RUN, Part, clone

WIDE = RUN | {"n_embd": 64, "eval_interval": 6, "max_iters": 42}  # a checkpoint over a megabyte
ROOM = 1 << 16  # bytes between two limits


def check_full_disk(settings: dict[str, Any], older: Path, limit: int, expected: dict[str, Any]
                    ) -> str:
    """Resume a run while no file may have more than `limit` bytes, then with room. Return the
    problem, or ""."""
    out = clone(older, settings["out_dir"])
    code = runs.wait_for_exit(runs.start(settings, largest_file=limit))
    if code != EXIT_FAILED or last_step(out) != settings["max_iters"]:
        return f"training did not continue (exit code {code}), see {out}.log"
    if runs.newest_state(out) != runs.newest_state(older):
        return "the older checkpoint is lost"
    if runs.list_temporary(out):
        return f"{runs.list_temporary(out)} is left behind"
    return runs.compare_end(runs.wait_for_exit(runs.start(settings)), out, expected)


def full(part: Part, place: Path) -> str:
    """Leave no room: training must continue, the older checkpoint remain, and with room again the
    run must end bit-identical."""
    base, older = WIDE | {"dataset": runs.prepare_source(place)}, place / "older"
    runs.run(base | {"out_dir": place / "whole"})
    runs.run(base | {"out_dir": older, "max_iters": base["eval_interval"]})
    limits = range(ROOM, (older / "ckpt.pt").stat().st_size, ROOM)
    for number in part.choose([False] * len(limits), few=8):
        settings = base | {"out_dir": place / f"limit{number}"}
        part.count(number, check_full_disk(settings, older, limits[number],
                                           runs.read_end(place / "whole")))
    return f"of {len(limits)} limits of a file's size, in steps of 64 KiB"
