"""runs/loop.sh, runs/slurm.sh and torchrun's restarts lose nothing while nobody watches."""

import fcntl
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import (
    PROGRAMS,
    REPO,
    TINY,
    hash_state,
    load,
    make_command,
    read_rows,
    run,
)

from tools.common import last_step
from tools.runs import list_descendants

pytestmark = pytest.mark.slow
# steps for several kills or signals, at evaluations, saves and between them
FLAGS = TINY | {
    "max_iters": 80,
    "lr_decay_iters": 80,
    "eval_interval": 15,
    "log_interval": 1,
    "init_from": "auto",
}
# where torchrun is the subject and DDP is not: DDP imports the compiler, which takes seconds
ELASTIC = FLAGS | {"elastic": True}
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run("train.py", out_dir=folder, dataset=dataset, **FLAGS)
    return folder


def is_rank(pid: int) -> bool:
    """Return True if a process belongs to a run and has not ended. A loop also starts `sleep`."""
    with suppress(OSError):
        return b"--out_dir=" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def list_ranks(process: subprocess.Popen) -> list[int]:
    """Return the process ids of the ranks that a loop or a torchrun has started."""
    return sorted(filter(is_rank, list_descendants(process.pid)))


def wait_until(reached, process: subprocess.Popen) -> None:
    """Wait for `reached()`; fail if the process ends before."""
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_loop_finishes_a_killed_run(dataset, tmp_path, whole):
    out = tmp_path / "out"
    loop = subprocess.Popen(
        [
            REPO / "runs/loop.sh",
            *make_command("train.py", out_dir=out, dataset=dataset, **FLAGS),
        ],
        env=ONE_THREAD,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    # SIGKILL hits train.py, not the loop. Between the starts a loop has no rank.
    for step in (20, 50):
        wait_until(lambda step=step: last_step(out) >= step and list_ranks(loop), loop)
        os.kill(list_ranks(loop)[0], signal.SIGKILL)
    assert loop.wait(timeout=300) == 0
    # the shell's exit code of a killed process: 128 + 9
    assert " 137" in loop.stderr.read()
    assert hash_state(out / "ckpt.pt") == hash_state(whole / "ckpt.pt")
    assert read_rows(out) == read_rows(whole)


def test_the_loop_ends_on_a_signal_and_on_a_mistake(dataset, tmp_path):
    out = tmp_path / "out"
    flags = FLAGS | {"max_iters": 10**6, "out_dir": out, "dataset": dataset}
    loop = [REPO / "runs/loop.sh", *make_command("train.py", **flags)]

    # endless: only a signal ends the run. First to the loop alone, as a batch system sends it
    process = subprocess.Popen(loop, env=ONE_THREAD)
    wait_until(lambda: last_step(out) >= 10, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == 75
    stopped = last_step(out)

    # a signal to the loop and the run, as a terminal sends it
    process = subprocess.Popen(loop, env=ONE_THREAD, start_new_session=True)
    wait_until(lambda: last_step(out) >= stopped + 2, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=180) == 75
    assert (out / "ckpt.pt").exists()

    # a mistake would only come again
    done = subprocess.run([*loop, "--n_layer=3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "again" not in done.stderr


@pytest.mark.parametrize(
    "number", [signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU], ids=lambda n: n.name
)
def test_the_loop_passes_a_signal_on(number):
    process = subprocess.Popen(
        [REPO / "runs/loop.sh", "bash", PROGRAMS / "exit_75.sh"],
        stdout=subprocess.PIPE,
    )
    # before this line the command would die of SIGTERM
    process.stdout.readline()
    process.send_signal(number)
    assert process.wait(timeout=180) == 75


@pytest.mark.parametrize(
    "prefix, ranks, code",
    [([], 1, 75), (["nohup"], 2, 1)],
    ids=["alone", "torchrun with nohup"],
)
def test_a_closed_terminal_saves_the_run(dataset, tmp_path, prefix, ranks, code):
    """torchrun ends at a SIGHUP, with nohup, too. It passes it on to its ranks."""
    out = tmp_path / "out"
    terminal, its_side = pty.openpty()

    # the kernel sends SIGHUP only to the session whose terminal it is
    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(its_side, termios.TIOCSCTTY, 0)

    # no evaluation, so only the signal saves
    flags = FLAGS | {"max_iters": 10**6, "eval_interval": 10**5}
    process = subprocess.Popen(
        [
            *prefix,
            *make_command(
                "train.py", ranks=ranks, out_dir=out, dataset=dataset, **flags
            ),
        ],
        env=ONE_THREAD,
        cwd=tmp_path,
        stdin=its_side,
        stdout=its_side,
        stderr=its_side,
        preexec_fn=take_terminal,
    )
    os.close(its_side)
    wait_until(lambda: last_step(out) >= 10, process)
    # the window is closed: the kernel sends SIGHUP
    os.close(terminal)
    assert process.wait(timeout=180) == code
    assert load(out / "ckpt.pt")["step"] == last_step(out)


def test_a_run_needs_no_streams(dataset, tmp_path):
    """A closed stream's number must not become a checkpoint's: C code would write to it."""
    out = tmp_path / "out"
    line = shlex.join(make_command("train.py", out_dir=out, dataset=dataset, **TINY))
    closed = f"exec {line} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", closed], env=ONE_THREAD).returncode == 0
    assert load(out / "ckpt.pt")["step"] == read_rows(out)[-1]["step"] == 20


def test_the_loop_without_a_command_exits_2():
    done = subprocess.run([REPO / "runs/loop.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_torchrun_restarts_a_killed_rank(dataset, tmp_path):
    out = tmp_path / "out"
    flags = ELASTIC | {"dataset": dataset}
    run("train.py", ranks=2, out_dir=tmp_path / "whole", **flags)
    args = make_command("train.py", ranks=2, out_dir=out, **flags)
    args.insert(args.index("--standalone"), "--max-restarts=3")
    process = subprocess.Popen(args, env=ONE_THREAD, stderr=subprocess.DEVNULL)
    # one rank dies; torchrun ends the other one and starts both again
    wait_until(lambda: last_step(out) >= 20 and len(list_ranks(process)) == 2, process)
    os.kill(list_ranks(process)[0], signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    assert hash_state(out / "ckpt.pt") == hash_state(tmp_path / "whole/ckpt.pt")
    assert read_rows(out) == read_rows(tmp_path / "whole")


def test_ranks_do_not_outlive_torchrun(dataset, tmp_path):
    out = tmp_path / "out"
    flags = ELASTIC | {"dataset": dataset, "max_iters": 10**6}
    process = subprocess.Popen(
        make_command("train.py", ranks=2, out_dir=out, **flags), env=ONE_THREAD
    )
    wait_until(lambda: last_step(out) >= 10, process)
    ranks = list_ranks(process)
    assert len(ranks) == 2
    # SIGKILL gives torchrun no time to end its ranks
    process.kill()
    process.wait()
    # nobody waits for the ranks now: they must notice it themselves
    deadline = time.monotonic() + 120
    while any(map(is_rank, ranks)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_rank, ranks))
    # the folder is free again
    run("train.py", ranks=2, out_dir=out, **flags | {"max_iters": last_step(out) + 1})


def test_a_signalled_rank_waits_for_the_last_save(dataset, tmp_path):
    """torchrun kills the other ranks half a minute after the first one ends."""
    out = tmp_path / "out"
    flags = ELASTIC | {
        "dataset": dataset,
        "out_dir": out,
        "max_iters": 10**6,
        "eval_interval": 10**5,
    }
    process = subprocess.Popen(
        make_command(PROGRAMS / "slow_fsync.py", ranks=2, **flags),
        stderr=subprocess.DEVNULL,
        env=ONE_THREAD,
    )
    wait_until(lambda: last_step(out) >= 10 and len(list_ranks(process)) == 2, process)
    os.kill(list_ranks(process)[1], signal.SIGUSR1)
    # the save takes seconds, in which both ranks must live
    while not (out / "ckpt.pt").exists():
        assert process.poll() is None
        assert len(list_ranks(process)) == 2
        time.sleep(0.02)
    assert process.wait(timeout=180) == 1
    assert load(out / "ckpt.pt")["step"] == last_step(out)


def test_usr1_to_torchrun_and_ranks_saves(dataset, tmp_path):
    """As in runs/slurm.sh, torchrun ignores the signal and its ranks save."""
    out = tmp_path / "out"
    args = make_command(
        "train.py",
        ranks=2,
        out_dir=out,
        dataset=dataset,
        **ELASTIC | {"max_iters": 10**6, "eval_interval": 10**5},
    )
    script = (REPO / "runs/slurm.sh").read_text()
    assert "srun env --ignore-signal=USR1,USR2,XCPU torchrun" in script
    # Slurm sends the signal to every process of a step
    process = subprocess.Popen(
        ["env", "--ignore-signal=USR1", *args],
        env=ONE_THREAD,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: last_step(out) >= 10, process)
    for pid in [process.pid, *list_ranks(process)]:
        os.kill(pid, signal.SIGUSR1)
    assert process.wait(timeout=180) == 1  # torchrun's answer to ranks that end with 75
    assert load(out / "ckpt.pt")["step"] == last_step(out) >= 10


def test_a_rank_ends_without_destroying_its_groups(dataset, tmp_path):
    out = tmp_path / "out"
    flags = FLAGS | {"dataset": dataset, "max_iters": 2}
    done = run(PROGRAMS / "hanging_groups.py", ranks=2, out_dir=out, **flags)
    assert "done at step 2" in done.stdout
    assert (out / "ckpt.pt").exists()


def test_the_slurm_script_saves_and_requeues(dataset, tmp_path, whole):
    """Stubs replace Slurm's programs."""
    out = tmp_path / "out"
    flags = FLAGS | {"dataset": dataset, "out_dir": out}
    # the script gives this one itself
    del flags["init_from"]
    job = [
        REPO / "runs/slurm.sh",
        *(f"--{key}={value}" for key, value in flags.items()),
    ]
    env = ONE_THREAD | {
        "PATH": f"{PROGRAMS / 'slurm'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "STUBS": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "32",
    }
    process = subprocess.Popen(
        job,
        cwd=REPO,
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Slurm's signal before the time limit
    wait_until(lambda: last_step(out) >= 20, process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=180) == 0
    assert "requeue 17" in (tmp_path / "scontrol").read_text()
    assert (tmp_path / "cores").read_text() == "32\n"
    # it saved where it was, between the signal and the run's end
    stopped = read_rows(out)[-1]["step"]
    assert 20 <= stopped < 80
    assert load(out / "ckpt.pt")["step"] == stopped

    # the job that was queued again finishes the run
    subprocess.run(job, cwd=REPO, env=env, capture_output=True, check=True)
    assert hash_state(out / "ckpt.pt") == hash_state(whole / "ckpt.pt")
    assert read_rows(out) == read_rows(whole)
