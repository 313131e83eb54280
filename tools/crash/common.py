"""What the parts share: counting, real training processes, and states compared to the bit."""
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401  an optimizer imports it: here once, not in each forked process

import train
from keepgpt import checkpoint
from keepgpt.checkpoint import CorruptCheckpoint
from keepgpt.config import TrainConfig, parse, setting
from keepgpt.process import fail

REPO = Path(__file__).resolve().parents[2]
KEEP, INTERVAL = 2, 2  # generations that are kept; steps between two saves
RUN = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.1,
       "batch_size": 4, "gradient_accumulation_steps": 2,
       "learning_rate": 3.0, "warmup_iters": 60, "max_iters": 60,  # it climbs until the loss does
       "eval_interval": 10, "eval_iters": 2, "log_interval": 1,
       "checkpoint_interval": INTERVAL, "keep_checkpoints": KEEP,
       "device": "cpu", "compile": False, "init_from": "auto"}
PAGE = 1 << 12  # bytes
HANGS = 300  # seconds; no process here takes so long


@dataclass(frozen=True)
class CrashConfig:
    """The settings of tools.crash."""
    cases: int = setting(0, "of each part; 0 = a few, 1e9 = all there are (nth, power, full)", least=0)
    torchrun_cases: int = setting(2, "kill: kills of a rank or torchrun, in two-rank runs", least=0)
    seed: int = setting(1, "repeats the cases; a kill falls on the same instant, as far as clocks go")
    only: int = setting(-1, "the number of the one case (kill: run) to try", least=-1)
    exec: bool = setting(False, "kill: start python anew each time, not a fork that has torch loaded")
    folder: str = setting("", "work there, to test that file system, not in the temporary folder")


class Part:
    """Counts the cases of a part and its failures, and prints what repeats a failure."""

    def __init__(self, name: str, settings: CrashConfig) -> None:
        self.name, self.settings, self.clock = name, settings, time.perf_counter()
        self.cases = self.failures = 0

    def dice(self, case: int) -> random.Random:
        """The random numbers of a case, whichever cases are tried before it."""
        return random.Random(f"{self.settings.seed} {self.name} {case}")

    def choose(self, rare: list[bool], few: int) -> list[int]:
        """The numbers of the cases to try, out of len(rare): the rare ones, then random others."""
        if self.settings.only >= 0:
            return [self.settings.only]
        dice = self.dice(-1)
        order = sorted(range(len(rare)), key=lambda case: (not rare[case], dice.random()))
        return sorted(order[:self.settings.cases or few])

    def count(self, case: int, problem: str, cases: int = 1) -> None:
        self.cases += cases
        self.failures += bool(problem)
        if problem and self.failures <= 5:
            again = f"; again with --seed={self.settings.seed} --only={case}" * (case >= 0)
            print(f"{self.name}: FAILURE: {problem}{again}", flush=True)

    def end(self, of_what: str) -> int:
        print(f"{self.name:5} {self.cases:6,} {of_what}: {self.failures} failures, "
              f"{time.perf_counter() - self.clock:.0f} s, seed {self.settings.seed}", flush=True)
        return self.failures


def prepare(place: Path) -> Path:
    """A small real text, the source of this program, as a dataset of characters."""
    subprocess.run([sys.executable, REPO / "prepare.py", REPO / "train.py", REPO / "model.py",
                    "--name=source", "--tokenizer=char", f"--data_dir={place}"],
                   check=True, stdout=subprocess.DEVNULL)
    return place / "source"


def start(settings: dict[str, Any], ranks: int = 0, limit: int = 0) -> int:
    """Start training with `ranks` real commands, or with a fork of this process; return its id.

    A fork is a process like any other; it only finds torch loaded. `limit` is the most bytes that
    a file of it may have.
    """
    pid = os.fork()
    if pid:
        return pid
    flags, code = [f"--{key}={value}" for key, value in settings.items()], 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                "--max-restarts=20"] if ranks > 1 else []
    try:
        log = os.open(f"{settings['out_dir']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if ranks:
            os.execv(sys.executable, [sys.executable, *torchrun, str(REPO / "train.py"), *flags])
        code = train.main(*parse(TrainConfig, "", flags)[:2])
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid: int, seconds: float = HANGS) -> int | None:
    """The exit code of a child, or None if it still runs after so many seconds."""
    file = os.pidfd_open(pid)
    ended = select.select([file], [], [], seconds)[0]
    os.close(file)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if ended else None


def undisturbed(settings: dict[str, Any], ranks: int) -> tuple[dict[str, Any], float]:
    """What a run ends in that nobody disturbs, and the seconds it takes."""
    clock, pid = time.perf_counter(), start(settings, ranks)
    code = exit_code(pid)
    if code is None:
        os.kill(pid, signal.SIGKILL)  # the ranks of a torchrun die with it
        fail(f"even an uninterrupted run hangs; see {settings['out_dir']}.log")
    if code:
        fail(f"even an uninterrupted run ends with exit code {code}; see "
             f"{settings['out_dir']}.log")
    return ends(settings["out_dir"]), time.perf_counter() - clock


def real_bundles(place: Path) -> list[dict[str, Any]]:
    """Four bundles of a small run, in the order of their steps."""
    settings, bundles = RUN | {"dataset": prepare(place), "out_dir": place / "run"}, []
    for step in (2, 4, 6, 8):
        undisturbed(settings | {"max_iters": step}, 0)
        bundles.append(checkpoint.read_bundle(place / "run" / "ckpt.pt"))
    return bundles


def clone(source: Path, target: Path) -> Path:
    """Make `target` a copy of a folder; what was a second name of a file is one again."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(exist_ok=True)  # a mounted one is still there
    subprocess.run(["cp", "-a", f"{source}/.", target], check=True)
    return target


def digest(value: Any) -> str:
    """sha256 of a nest of tensors and plain values."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            add([item for key in sorted(value, key=str) for item in (key, value[key])])
        elif isinstance(value, (list, tuple)):
            sha.update(f"{len(value)}:".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{value!r},".encode())

    add(value)
    return sha.hexdigest()


def state(bundle: dict[str, Any]) -> str:
    """The digest of a bundle without what names the run and its folder; of an elastic run without
    the generators, of which each rank has some."""
    without = ("run", "config", *["rng"] * bundle["config"]["elastic"])
    return digest({key: value for key, value in bundle.items() if key not in without})


def state_at(path: Path, known: dict[str, str]) -> str:
    """The state in a file, "damaged", or "" for no file. `known` remembers what was read."""
    if not path.exists():
        return ""
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    if content not in known:
        try:
            known[content] = state(checkpoint.read_bundle(path))
        except CorruptCheckpoint:
            known[content] = "damaged"
        except Exception as e:  # a run would end with it, and not try an older bundle
            known[content] = repr(e)
    return known[content]


def newest(folder: Path) -> str:
    """The state that a run would go on from, or ""."""
    try:
        return state(checkpoint.read_newest(folder))
    except CorruptCheckpoint:
        return ""
    except Exception as e:
        return repr(e)


def half_written(folder: Path) -> str:
    """The names of temporary files."""
    return ", ".join(path.name for path in folder.glob("*.tmp"))


def ends(out: Path) -> dict[str, Any]:
    """What a run has left, without what depends on the clock."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {"ckpt.pt": state_at(out / "ckpt.pt", {}), "best.pt": state_at(out / "best.pt", {}),
            "metrics.jsonl": [row | {"tokens_per_s": 0, "mfu": 0} for row in rows],
            "the half-written": half_written(out)}


def difference(code: int | None, out: Path, whole: dict[str, Any]) -> str:
    """How the end of a run differs from the undisturbed one's, or ""."""
    if code != 0:
        return f"exit code {code}, see {out}.log"
    names = [name for name, value in ends(out).items() if value != whole[name]]
    return f"{', '.join(names)}: not as in the undisturbed run" * bool(names)


def wrong(folder: Path, allowed: dict[str, set[str]], new: tuple[str, str], least: int,
          known: dict[str, str]) -> str:
    """What is wrong in a folder, or "".

    `allowed` says in which states a name may be ("": it may be missing), `new` which state of
    ckpt.pt must not be without which one of best.pt, `least` how many generations there must be.
    """
    for path in sorted(folder.glob("*.pt")):
        if state_at(path, known) == "damaged":
            return f"{path.name} is not whole"
    for name, states in allowed.items():
        if state_at(folder / name, known) not in states:
            return f"{name} is neither the old nor the new one, or missing"
    if (state_at(folder / "ckpt.pt", known) == new[0]
            and state_at(folder / "best.pt", known) != new[1]):
        return "ckpt.pt is the new one, but best.pt is not"
    if newest(folder) not in allowed["ckpt.pt"]:
        return "read_newest gives neither the old nor the new one"
    few = len(checkpoint.numbered(folder)) < least
    return f"fewer than {least} generations are left" * few
