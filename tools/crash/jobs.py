"""The parts with real runs: kill, elastic, full and hosts. Each fault must leave what an
uninterrupted run leaves, bit for bit."""
import os
import random
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from keepgpt.checkpoint import numbered
from keepgpt.errors import EXIT_FAILED, UserError
from tools import runs
from tools.common import last_step
from tools.crash.common import RUN, Part, clone

WIDE = RUN | {"n_embd": 64, "eval_interval": 6, "max_iters": 42}  # a checkpoint over a megabyte
ROOM = 1 << 16  # bytes between two limits
HOSTS = RUN | {"elastic": True, "gradient_accumulation_steps": 4, "max_iters": 2500,
               "warmup_iters": 2500, "checkpoint_interval": 20, "eval_interval": 200,
               "rank_timeout": 20}  # a rank notices a cut cable only by waiting


def finish_killed_run(settings: dict[str, Any], lives: dict[int, float], kills: int,
                      rng: random.Random, seen: Counter) -> int | None:
    """Start a run again until it ends, each time on one of the numbers of ranks in `lives`, and
    kill it up to `kills` times, at instants that are uniform over the seconds `lives` gives for an
    uninterrupted run. Return its exit code, or None if it hangs."""
    out, step = settings["out_dir"], -1
    while True:
        ranks = rng.choice(list(lives))
        pid = runs.start(settings, ranks)
        seen[ranks] += 1
        code = runs.wait_for_exit(pid, rng.uniform(0, lives[ranks]) if kills else None)
        if code is not None or not kills:
            return code
        ranks_of_job = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        victim = int(rng.choice([pid, *ranks_of_job])) if ranks else pid
        with suppress(ProcessLookupError):  # a rank that has just ended
            os.kill(victim, signal.SIGKILL)  # the ranks of a torchrun die with it
        kills -= 1
        seen["kills"] += 1
        if victim != pid:
            seen["a rank"] += 1
            return runs.wait_for_exit(pid)  # torchrun starts all ranks again
        runs.wait_for_exit(pid)
        seen["in a save"] += bool(runs.list_temporary(out))
        if last_step(out) == step:  # this start made no step
            lives[ranks] *= 1.1
        step = last_step(out)
        saved = [int(path.stem[len("ckpt-"):]) for path in numbered(out)]
        seen["lost"] = max(seen["lost"], step - max(saved, default=0))


def kill_runs(part: Part, settings: dict[str, Any], place: Path, choices: tuple[int, ...],
              kills: int) -> str:
    """Kill run after run, `kills` times in all, each start on one of the numbers of ranks in
    `choices` (0 is a fork). Each must end as an uninterrupted run does, on whichever of them."""
    lives = {ranks: runs.run(settings | {"out_dir": place / f"whole{ranks}"}, ranks)
             for ranks in choices}
    expected, *others = (runs.read_end(place / f"whole{ranks}") for ranks in choices)
    if any(other != expected for other in others):
        part.count(-1, "uninterrupted runs differ", 0)
    if expected["best.pt"] == expected["ckpt.pt"]:
        part.count(-1, "the last checkpoint is the best one: best.pt is not tested", 0)
    seen, only = Counter(), part.config.only
    while seen["kills"] < kills and not (seen["runs"] and only >= 0):
        number, before = only if only >= 0 else seen["runs"], seen["kills"]
        out = place / f"run{number}"
        code = finish_killed_run(settings | {"out_dir": out}, lives, kills - before,
                                 part.rng(number), seen)
        problem = runs.compare_end(code, out, expected)
        # since the last save, and while that was written: here, that takes longer than a step
        if seen["lost"] > 2 * settings["checkpoint_interval"] and choices == (0,):
            problem = problem or f"{seen['lost']} steps were lost"
        part.count(number, problem, seen["kills"] - before)
        seen["runs"] += 1
    starts = ", ".join(f"{seen[ranks]} on {max(1, ranks)}" for ranks in choices)
    return (f"kills, {seen['a rank']} of a rank, {seen['in a save']} during a write; starts by "
            f"ranks: {starts}; {seen['runs']} ends compared")


def kill(part: Part, place: Path) -> str:
    """Kill runs of one process."""
    settings = part.run | {"dataset": runs.prepare_source(place)}
    return kill_runs(part, settings, place, (0,), part.config.cases or 20)


def elastic(part: Part, place: Path) -> str:
    """Kill jobs, or one of their ranks, that come back on 1, 2 or 4 ranks at random."""
    settings = part.run | {"dataset": runs.prepare_source(place), "elastic": True,
                           "gradient_accumulation_steps": 4, "max_iters": 160, "warmup_iters": 160}
    return kill_runs(part, settings, place, (0, 2, 4), part.config.cases or 6)


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
    expected = runs.read_end(place / "whole")
    for number in part.choose([False] * len(limits), few=8):
        part.count(number, check_full_disk(base | {"out_dir": place / f"limit{number}"}, older,
                                           limits[number], expected))
    return f"of {len(limits)} limits of a file's size, in steps of 64 KiB"


def wait_until(reached: Callable[[], bool]) -> None:
    """Return when `reached()` is true. Raises UserError if that takes minutes."""
    deadline = time.monotonic() + runs.TIME_LIMIT
    while not reached():
        if time.monotonic() > deadline:
            raise UserError("hosts: the run hangs")
        time.sleep(0.05)


def hosts(part: Part, place: Path) -> str:
    """Compare a run with three faults with an uninterrupted one on one rank."""
    settings = HOSTS | {"dataset": runs.prepare_source(place)}
    whole, first, second = place / "whole", place / "first", place / "second"
    runs.run(settings | {"out_dir": whole})
    # torch 2.13 shares torchrun's store with the ranks, and a host that comes back finds none
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, rng = free.getsockname()[1], part.rng(0)

    def start(out: Path) -> int:
        # addresses in this order: the first host has rank 0
        return runs.start(settings | {"out_dir": out}, ranks=1, torchrun=(
            "--nnodes=1:2", "--nproc_per_node=1", "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{port}", f"--local_addr=127.0.0.{1 + (out == second)}",
            f"--rdzv_conf=last_call_timeout=5,is_host={int(out == first)}"))

    def wait_for_steps() -> None:
        goal = last_step(first) + rng.randint(100, 300)
        wait_until(lambda: last_step(first) >= goal)

    def count_starts() -> int:
        return (first / "README.md").read_text().count("\n- 20")

    torchruns = [start(first), start(second)]
    wait_for_steps()
    os.kill(torchruns[1], signal.SIGKILL)
    wait_for_steps()
    before, back = count_starts(), start(second)
    wait_until(lambda: count_starts() > before)
    wait_for_steps()
    # to the first host, processes that stop are a cut cable
    subprocess.run(["pkill", "-STOP", "-f", f"out_dir={second}"], check=True)
    code = runs.wait_for_exit(torchruns[0])
    os.kill(back, signal.SIGKILL)
    part.count(0, runs.compare_end(code, first, runs.read_end(whole)), cases=3)
    if any(second.glob("*.pt")):
        part.count(0, "the second host has checkpoints of its own", 0)
    return f"faults of two hosts without a common disk in {count_starts()} starts; 1 end compared"
