"""The parts with real runs: kill, elastic, skip, full and hosts. Each fault must leave what an
uninterrupted run leaves, bit for bit."""

import importlib
import itertools
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from keepgpt.checkpoint import list_numbered, read_bundle, step_of
from keepgpt.dataset import read_meta
from keepgpt.errors import EXIT_FAILED, UserError
from model import ModelArgs, build_model
from tools import runs
from tools.common import REPO, last_step
from tools.crash.common import RUN, Part, clone
from tools.runs import Settings

# a checkpoint over a megabyte
WIDE = RUN | {"n_embd": 64, "eval_interval": 6, "max_iters": 42}
# a character that no program holds, and how often a text gets it
POISON = "\u00a4"
POISONED = 16
# bytes between two limits
ROOM = 1 << 16
HOSTS = RUN | {
    "elastic": True,
    "gradient_accumulation_steps": 4,
    "max_iters": 2500,
    "warmup_iters": 2500,
    "checkpoint_interval": 20,
    "eval_interval": 200,
    # a rank notices a cut cable only by waiting
    "rank_timeout": 20,
}


def finish_killed_run(
    settings: Settings,
    lives: dict[int, float],
    kills: int,
    rng: random.Random,
    counts: Counter,
    forked: bool,
) -> int | None:
    """Start a run again until it ends, each time on one of the numbers of ranks in `lives`, and
    kill it up to `kills` times, at instants that are uniform over the seconds `lives` gives for an
    uninterrupted run. Return its exit code, or None if it hangs. Ranks are `forked`, or torchrun
    starts them."""
    # `step` is where the last start got to
    out = settings["out_dir"]
    step = -1
    while True:
        # the draws in this order: a seed and a number give the same kills again
        ranks = rng.choice(list(lives))
        pid = runs.start(settings, ranks, forked=forked)
        counts[ranks] += 1
        delay = rng.uniform(0, lives[ranks]) if kills else None
        code = runs.wait_for_exit(pid, delay)
        # it ended before the instant came, or has been killed often enough
        if code is not None or not kills:
            return code

        kills -= 1
        counts["kills"] += 1
        # the one that started the ranks, with which they die, or one of them
        victim = rng.choice([pid, *runs.list_descendants(pid)]) if ranks else pid
        # a rank may have just ended
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        counts["a rank"] += victim != pid
        code = runs.wait_for_exit(pid)
        # torchrun starts all ranks again
        if victim != pid and not forked:
            return code

        # a temporary file is left only by a kill inside a save
        if runs.list_temporary(out):
            counts["in a save"] += 1
        # a start that makes no step is killed too early: give the next one more time
        if last_step(out) == step:
            lives[ranks] *= 1.1
        step = last_step(out)
        # the cost of a kill: the steps since the newest checkpoint
        saved = [step_of(path) for path in list_numbered(out)]
        counts["lost"] = max(counts["lost"], step - max(saved, default=0))


def finish_whole_runs(
    part: Part, settings: Settings, place: Path, choices: tuple[int, ...]
) -> tuple[dict[int, float], dict]:
    """Finish an uninterrupted run on each number of ranks. Return their seconds by ranks, and how
    they end, which must be alike."""
    # seconds that a life takes decide when to kill
    lives = {}
    ends = []
    for ranks in choices:
        out = place / f"whole{ranks}"
        forked = not part.config.torchrun
        lives[ranks] = runs.run(settings | {"out_dir": out}, ranks, forked=forked)
        ends.append(runs.read_end(out))
    expected = ends[0]
    if any(end != expected for end in ends):
        part.count(-1, "uninterrupted runs differ", cases=0)
    # then a lost best.pt would not be noticed
    if expected["best.pt"] == expected["ckpt.pt"]:
        part.count(
            -1, "the last checkpoint is the best one: best.pt is not tested", cases=0
        )
    return lives, expected


def kill_runs(
    part: Part,
    settings: Settings,
    place: Path,
    choices: tuple[int, ...],
    kills: int,
) -> str:
    """Kill run after run, `kills` times in all, each start on one of the numbers of ranks in
    `choices` (0 is a fork). Each must end as an uninterrupted run does, on whichever of them."""
    lives, expected = finish_whole_runs(part, settings, place, choices)
    # since the last save, and while that was written: here, that takes longer than a step
    most_lost = 2 * settings["checkpoint_interval"]
    # --only repeats one run, whose draws depend on its number
    numbers = [part.config.only] if part.config.only >= 0 else itertools.count()
    counts = Counter()
    for number in numbers:
        before = counts["kills"]
        if before >= kills:
            break
        # a folder per run: the files of a failure stay
        out = place / f"run{number}"
        code = finish_killed_run(
            settings | {"out_dir": out},
            lives,
            kills - before,
            part.rng(number),
            counts,
            forked=not part.config.torchrun,
        )
        problem = runs.compare_end(code, out, expected)
        # several ranks may also lose the time that they need to start
        if not problem and counts["lost"] > most_lost and choices == (0,):
            problem = f"{counts['lost']} steps were lost"
        part.count(number, problem, cases=counts["kills"] - before)
        counts["runs"] += 1

    # how often each number of ranks was tried: chance could leave one out
    starts = ", ".join(f"{counts[ranks]} on {max(1, ranks)}" for ranks in choices)
    return (
        f"kills, {counts['a rank']} of a rank, {counts['in a save']} during a write; starts by "
        f"ranks: {starts}; {counts['runs']} ends compared"
    )


def kill(part: Part, place: Path) -> str:
    """Kill runs of one process."""
    settings = part.run | {"dataset": runs.prepare_source(place)}
    return kill_runs(part, settings, place, (0,), part.config.cases or 20)


def elastic(part: Part, place: Path) -> str:
    """Kill jobs on a mixture of three datasets, or one of their ranks, that come back on 1, 2 or 4
    ranks at random."""
    settings = part.run | {
        "dataset": runs.prepare_mixture(place),
        "elastic": True,
        "gradient_accumulation_steps": 4,
    }
    return kill_runs(part, settings, place, (0, 2, 4), part.config.cases or 6)


def poison(place: Path) -> Settings:
    """Prepare a text with a token in a few places that gives NaN. Return the settings of a run that
    trains on it. Its weights have an embedding of this token that nearly overflows: dropout, which
    multiplies it by 1 / 0.9, makes it infinite."""
    rng = random.Random(1)
    text = "".join((REPO / name).read_text() for name in ("train.py", "model.py"))
    for _ in range(POISONED):
        at = rng.randrange(len(text))
        text = text[:at] + POISON + text[at:]
    source = place / "poisoned.txt"
    source.write_text(text)
    dataset = runs.prepare_source(place, [source])
    data = read_meta(dataset)

    # an embedding of its own, or the output layer would overflow for all tokens
    sizes = {key: RUN[key] for key in ("n_layer", "n_head", "n_embd", "block_size")}
    shape = {"architecture": "llama", "tie_embeddings": False}
    args = ModelArgs(vocab_size=data["vocab_size"], **sizes, **shape)
    torch.manual_seed(1)
    model = build_model(args)
    token = data["tokenizer"]["chars"].index(POISON)
    model.embedding.weight.data[token] = torch.finfo(torch.float32).max
    weights = place / "poisoned.pt"
    torch.save(
        {"model": model.state_dict(), "model_args": asdict(args), "data": data}, weights
    )
    # decay would make that embedding smaller
    return shape | {
        "dataset": dataset,
        "init_from": f"auto:{weights}",
        "weight_decay": 0.0,
        "spike_factor": 20.0,
    }


def skip(part: Part, place: Path) -> str:
    """Kill runs whose data has batches that give NaN: all must skip the same. Three kills of four
    are of elastic runs on 1, 2 or 4 ranks, the others of runs on two ranks with DDP."""
    # DDP imports it, which takes longer than such a run
    importlib.import_module("torch._dynamo")

    settings = RUN | {"gradient_accumulation_steps": 4, "keep_every": 20}
    settings |= poison(place)
    # DDP adds in another order on each number of ranks
    kinds = {"elastic": (0, 2, 4), "ddp": (2,)}
    kills = part.config.cases or 8
    shares = {"elastic": kills - kills // 4, "ddp": kills // 4}
    lines = []
    for kind, choices in kinds.items():
        folder = place / kind
        folder.mkdir()
        flags = settings | {"elastic": kind == "elastic"}
        done = kill_runs(part, flags, folder, choices, shares[kind])
        skips = read_bundle(folder / f"whole{choices[0]}/ckpt.pt")["skips"]
        if not skips:
            part.count(-1, "the uninterrupted run skipped nothing", cases=0)
        lines.append(f"{done}, {sum(skips.values())} batches skipped in each")
    return f"{lines[0]}; {shares['ddp']} of them with DDP: {lines[1]}"


def check_full_disk(settings: Settings, older: Path, limit: int, expected: dict) -> str:
    """Resume a run while no file may have more than `limit` bytes, then with room. Return the
    problem, or ""."""
    # the signal of a file that is too large is ignored by Python: a write raises
    out = clone(older, settings["out_dir"])
    code = runs.wait_for_exit(runs.start(settings, largest_file=limit))
    if code != EXIT_FAILED or last_step(out) != settings["max_iters"]:
        return f"training did not continue (exit code {code}), see {out}.log"
    if runs.newest_state(out) != runs.newest_state(older):
        return "the older checkpoint is lost"
    leftovers = runs.list_temporary(out)
    if leftovers:
        return f"{leftovers} is left behind"
    # with room again
    code = runs.wait_for_exit(runs.start(settings))
    return runs.compare_end(code, out, expected)


def full(part: Part, place: Path) -> str:
    """Leave no room: training must continue, the older checkpoint remain, and with room again the
    run must end bit-identical."""
    base = WIDE | {"dataset": runs.prepare_source(place)}
    whole = place / "whole"
    older = place / "older"
    runs.run(base | {"out_dir": whole})
    runs.run(base | {"out_dir": older, "max_iters": base["eval_interval"]})
    expected = runs.read_end(whole)
    # every limit that cuts a checkpoint somewhere
    limits = range(ROOM, (older / "ckpt.pt").stat().st_size, ROOM)
    for number in part.choose([False] * len(limits), few=8):
        settings = base | {"out_dir": place / f"limit{number}"}
        part.count(number, check_full_disk(settings, older, limits[number], expected))
    return f"of {len(limits)} limits of a file's size, in steps of 64 KiB"


def wait_until(reached: Callable[[], bool]) -> None:
    """Return when `reached()` is true. Raises UserError if that takes minutes."""
    deadline = time.monotonic() + runs.TIME_LIMIT
    # polling is enough: steps take milliseconds, starts seconds
    while not reached():
        if time.monotonic() > deadline:
            raise UserError("hosts: the run hangs")
        time.sleep(0.05)


def hosts(part: Part, place: Path) -> str:
    """Compare a run with three faults with an uninterrupted one on one rank."""
    settings = HOSTS | {"dataset": runs.prepare_source(place)}
    whole = place / "whole"
    first = place / "first"
    second = place / "second"
    runs.run(settings | {"out_dir": whole})
    # torch 2.13 shares torchrun's store with the ranks, and a host that comes back finds none
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # a port that is free, for the rendezvous
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rng = part.rng(0)

    def start(out: Path, number: int) -> int:
        return runs.start(
            settings | {"out_dir": out},
            ranks=1,
            torchrun=(
                "--nnodes=1:2",
                "--nproc_per_node=1",
                "--rdzv_backend=c10d",
                f"--rdzv_endpoint=127.0.0.1:{port}",
                # addresses in this order: the first host has rank 0
                f"--local_addr=127.0.0.{number}",
                f"--rdzv_conf=last_call_timeout=5,is_host={int(out == first)}",
            ),
        )

    def wait_for_steps() -> None:
        goal = last_step(first) + rng.randint(100, 300)
        wait_until(lambda: last_step(first) >= goal)

    # a run's README has a line for each start
    def count_starts() -> int:
        return (first / "README.md").read_text().count("\n- 20")

    # the first host stays, the second one gets all faults
    staying = start(first, 1)
    leaving = start(second, 2)
    wait_for_steps()

    # the second host dies: the first one continues alone
    os.kill(leaving, signal.SIGKILL)
    wait_for_steps()

    # it comes back: both start again from the newest checkpoint
    before = count_starts()
    back = start(second, 2)
    wait_until(lambda: count_starts() > before)
    wait_for_steps()

    # to the first host, processes that stop are a cut cable; torchrun first, or it would notice
    for pid in (back, *runs.list_descendants(back)):
        os.kill(pid, signal.SIGSTOP)
    code = runs.wait_for_exit(staying)
    os.kill(back, signal.SIGKILL)
    part.count(0, runs.compare_end(code, first, runs.read_end(whole)), cases=3)
    # only rank 0 saves, and that is on the first host
    if any(second.glob("*.pt")):
        part.count(0, "the second host has checkpoints of its own", cases=0)
    return f"faults of two hosts without a common disk in {count_starts()} starts; 1 end compared"
