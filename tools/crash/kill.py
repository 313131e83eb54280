"""kill: kill -9 at random instants of real runs, from the start of a process to its end; elastic:
the same, each time on another number of ranks."""
import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from keepgpt import checkpoint
from tools.crash.common import (
    HANGS,
    INTERVAL,
    KEEP,
    RUN,
    Part,
    difference,
    exit_code,
    prepare,
    start,
    undisturbed,
)

LONG = {"max_iters": 400, "warmup_iters": 400}


def processes(out: Path) -> list[int]:
    """torchrun and its ranks: the processes whose command line names `out`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if f"--out_dir={out}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def outlived(out: Path) -> int:
    """How many ranks outlive their torchrun; they are killed as well."""
    deadline = time.monotonic() + 10
    while (left := processes(out)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    while processes(out):
        time.sleep(0.01)
    return len(left)


def traces(out: Path) -> set:
    """What shows that a save is under way, from its first operation on the disk to its last."""
    there, newest = checkpoint.numbered(out), out / "ckpt.pt"
    unlinked = [p for p in there[:1] if not (newest.exists() and p.samefile(newest))]
    return {*there[KEEP:], *unlinked,
            *((path, path.stat().st_mtime_ns) for path in out.glob("*.pt.tmp"))}


def steps_again(out: Path) -> int:
    """How many of the steps that were logged are in no bundle."""
    path = out / "metrics.jsonl"
    rows = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    saved = max((int(p.stem.removeprefix("ckpt-")) for p in checkpoint.numbered(out)), default=0)
    return json.loads(rows[-1])["step"] - saved if rows else 0


def killed_run(settings: dict[str, Any], lives: dict[int, float], budget: int,
               dice: random.Random, seen: Counter) -> int | None:
    """A run that is killed and started again until it ends; its exit code, None if it hangs.

    It is started on any number of ranks that `lives` names. Each kill falls on an instant that is
    uniform over such an undisturbed life in seconds; after `budget` kills there are no more.
    """
    out, pid, kills = settings["out_dir"], 0, 0
    while True:
        if not pid:
            ranks = dice.choice(list(lives)) if len(lives) > 1 else [*lives][0]
            before, pid = traces(out), start(settings, ranks)
            seen[f"on {ranks}"] += 1
        code = exit_code(pid, dice.uniform(0, lives[ranks]) if kills < budget else HANGS)
        if code is not None or kills == budget:
            break
        victim = pid if len(lives) > 1 else dice.choice(processes(out) or [pid])
        with suppress(ProcessLookupError):  # a rank that has just ended
            os.kill(victim, signal.SIGKILL)
        kills += 1
        if victim == pid:  # else it is a rank, and torchrun starts all ranks again
            exit_code(pid)
            seen["outlived"] += outlived(out)
            seen["inside"] += bool(traces(out) - before)
            seen["again"] = max(seen["again"], steps_again(out))
            pid = 0
    if code is None:
        os.kill(pid, signal.SIGKILL)
        outlived(out)
    seen["kills"] += kills
    return code


def kill_runs(part: Part, settings: dict[str, Any], place: Path, ranks: int, kills: int) -> Counter:
    """Run after run until so many kills are spent; the end of each is compared."""
    seen, only = Counter(), part.settings.only
    whole, life = undisturbed(settings | {"out_dir": place / f"whole{ranks}"}, max(ranks, 1))
    if ranks == 0:  # a fork lives shorter, and must do the same
        forked, life = undisturbed(settings | {"out_dir": place / "forked"}, 0)
        part.count(-1, "a fork does not end as a real command does" * (forked != whole), 0)
    part.count(-1, "the last bundle is the best one" * (whole["best.pt"] == whole["ckpt.pt"]), 0)
    while seen["kills"] < kills and not (seen["runs"] and only >= 0):
        run, before = only if only >= 0 else seen["runs"], seen["kills"]
        out = place / f"run{ranks}-{run}"
        code = killed_run(settings | {"out_dir": out}, {ranks: life}, kills - before,
                          part.dice(run), seen)
        # what was not yet saved, and what was made while that was written: a step takes less time
        # than a save here, so that up to an interval
        too_many = seen["again"] > 2 * INTERVAL
        problem = difference(code, out, whole) or f"{seen['again']} steps made again" * too_many
        part.count(run, problem, seen["kills"] - before)
        seen["runs"] += 1
    return seen


def elastic(part: Part, place: Path) -> int:
    """kill -9 of a whole job, again and again, and each time it comes back on 1, 2 or 4 ranks."""
    settings = RUN | {"dataset": prepare(place), "elastic": True, "gradient_accumulation_steps": 4,
                      "max_iters": 160, "warmup_iters": 160}
    lives, ends_alike, seen, only = {}, [], Counter(), part.settings.only
    for ranks in (0, 2, 4):  # 0 is one rank, forked
        end, lives[ranks] = undisturbed(settings | {"out_dir": place / f"whole{ranks}"}, ranks)
        ends_alike.append(end)
    whole = ends_alike[0]
    part.count(-1, "the undisturbed runs do not end alike" * (ends_alike != [whole] * 3), 0)
    kills = part.settings.cases or 6
    while seen["kills"] < kills and not (seen["runs"] and only >= 0):
        run, before = only if only >= 0 else seen["runs"], seen["kills"]
        out = place / f"run{run}"
        code = killed_run(settings | {"out_dir": out}, lives, kills - before, part.dice(run), seen)
        part.count(run, difference(code, out, whole), seen["kills"] - before)
        seen["runs"] += 1
    return part.end(f"kills; {seen['on 0']}, {seen['on 2']} and {seen['on 4']} starts on 1, 2 and "
                    f"4 ranks; {seen['runs']} ends compared")


def kill(part: Part, place: Path) -> int:
    """kill -9, from the start of a process to its end."""
    settings, data = part.settings, {"dataset": prepare(place)}
    seen = kill_runs(part, RUN | data, place, int(settings.exec), settings.cases or 20)
    failures = part.end(
        f"kills of one process ({'started anew' if settings.exec else 'forked'}), "
        f"{seen['inside']} inside a save, at most {seen['again']} steps made again; "
        f"{seen['runs']} ends compared")
    if settings.torchrun_cases:
        part = Part("kill", settings)
        seen = kill_runs(part, RUN | data | LONG, place, 2, settings.torchrun_cases)
        failures += part.end(f"kills of a rank or of torchrun, {seen['outlived']} ranks outlived "
                             f"it; {seen['runs']} ends compared")
    return failures
