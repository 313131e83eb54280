"""Settings of the crash tests, their counting, and the checkpoints they damage."""

import random
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from keepgpt import checkpoint
from keepgpt.config import setting
from tools.runs import Bundle, newest_state, prepare_source, read_state, run

# checkpoints
KEEP = 2
# a run of a second: kills must fall into its saves as often as into its steps
RUN = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "dropout": 0.1,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    # the rate climbs until the loss does, so the last checkpoint is not the best one
    "learning_rate": 3.0,
    "warmup_iters": 60,
    "max_iters": 60,
    "eval_interval": 10,
    "eval_iters": 2,
    "log_interval": 1,
    "checkpoint_interval": 2,
    "keep_checkpoints": KEEP,
    "device": "cpu",
    "compile": False,
    "init_from": "auto",
}
# the other architecture and optimizer, for --modern=True
MODERN = {
    "architecture": "qwen3",
    "optimizer": "muon",
    "lr_schedule": "linear",
    "muon_lr": 1.0,
}
# bytes
PAGE = 1 << 12


@dataclass(frozen=True)
class CrashConfig:
    """The settings of tools.crash."""

    cases: int = setting(0, "cases of each part; 0 = a few, 1e9 = all")
    modern: bool = setting(
        False, "kill, nth, power, rot, elastic: train a Qwen3 with Muon"
    )
    seed: int = setting(1, "seed of the cases")
    only: int = setting(-1, "the number of the one case (kill: run) to try", least=-1)
    torchrun: bool = setting(
        False, "elastic, skip: ranks started by torchrun, which takes seconds"
    )
    device: str = setting("auto", "checks: auto | cpu | cuda")


class Part:
    """The cases of one part and its failures."""

    def __init__(self, name: str, config: CrashConfig) -> None:
        self.name = name
        self.config = config
        self.started = time.perf_counter()
        self.cases = 0
        self.failures = 0
        # of either model and optimizer
        self.run = RUN | MODERN if config.modern else RUN

    def rng(self, case: int) -> random.Random:
        """Return the random numbers of a case; they do not depend on the cases before it."""
        # so --only repeats a case alone
        return random.Random(f"{self.config.seed} {self.name} {case}")

    def choose(self, rare: list[bool], few: int) -> list[int]:
        """Return the numbers of the cases to try, out of len(rare): rare ones first."""
        if self.config.only >= 0:
            return [self.config.only]
        # shuffled, then the rare ones in front: sorting keeps the order of equals
        rng = self.rng(-1)
        order = sorted(range(len(rare)), key=lambda case: rng.random())
        order.sort(key=lambda case: not rare[case])
        return sorted(order[: self.config.cases or few])

    def count(self, case: int, problem: str, where: str = "", cases: int = 1) -> None:
        """Count a case; print how to repeat it if there is a problem, and `where` it is."""
        self.cases += cases
        if not problem:
            return
        self.failures += 1
        # one broken line of code fails thousands of cases
        if self.failures > 5:
            return
        again = ""
        # -1: a failure of the whole part
        if case >= 0:
            again = f"; again with --seed={self.config.seed} --only={case}"
        print(f"{self.name}: FAILURE: {where}{problem}{again}", flush=True)


def make_bundles(part: Part, place: Path) -> list[Bundle]:
    """Return five checkpoints of a small run, in the order of their steps."""
    out = place / "run"
    settings = part.run | {"out_dir": out, "dataset": prepare_source(place)}
    bundles = []
    # each call resumes the run, so these are the checkpoints of one run
    for step in (2, 4, 6, 8, 10):
        run(settings | {"max_iters": step})
        bundles.append(checkpoint.read_bundle(out / "ckpt.pt"))
    return bundles


def clone(source: Path, target: Path) -> Path:
    """Make `target` a copy of a folder, hard links included, and return it."""
    shutil.rmtree(target, ignore_errors=True)
    # shutil would turn hard links into copies, and ckpt.pt is one
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def check_folder(folder: Path, allowed: set[tuple[str, str]], least: int) -> str:
    """Return how a folder breaks the promise "old or new, never neither", or "". `allowed` are the
    states that ckpt.pt and best.pt may have together ("": it may be missing). `least` checkpoints
    must be left."""
    # every file by its own name, whether a run would choose it or not
    found = {path.name: read_state(path) for path in folder.glob("*.pt")}
    if "corrupt" in found.values():
        return f"corrupt: {found}"
    pair = (found.get("ckpt.pt", ""), found.get("best.pt", ""))
    if pair not in allowed:
        return "ckpt.pt and best.pt are missing, or in other states than before or after the save"
    # an intact file is not enough: a resume must choose it
    if newest_state(folder) not in {state for state, _ in allowed}:
        return "a run would resume from another state"
    left = len(checkpoint.list_numbered(folder))
    if left < least:
        return f"{left} checkpoints are left, expected {least}"
    return ""
