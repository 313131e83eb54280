"""Weights & Biases only decorates a run: it can't end it, and can't keep it from ending."""

import json
import os
import pty
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PROGRAMS, TINY, make_command, read_rows, start

pytestmark = pytest.mark.slow


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Install a fake wandb: fake(finish="hang") names what it does wrong, functions of
    tests/programs/fake_wandb. Return the file of the rows that it got."""

    def fake(
        init: str = "nothing",
        log: str = "nothing",
        finish: str = "nothing",
        first_step: int = 0,
    ) -> Path:
        sent = tmp_path / "sent"
        monkeypatch.setenv("PYTHONPATH", str(PROGRAMS / "fake_wandb"))
        monkeypatch.setenv("SENT", str(sent))
        monkeypatch.setenv("INIT", init)
        monkeypatch.setenv("LOG", log)
        monkeypatch.setenv("FINISH", finish)
        monkeypatch.setenv("FIRST_STEP", str(first_step))
        return sent

    return fake


def read_sent_steps(path: Path) -> list[int]:
    """Return the steps of the rows that wandb got."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def start_run(**flags: object) -> subprocess.Popen:
    """Start a run that logs to wandb. It is killed after five minutes, so no test hangs."""
    process = start("train.py", **TINY | {"wandb_log": True, **flags})
    timer = threading.Timer(300, process.kill)
    timer.daemon = True
    timer.start()
    return process


def read_until(process: subprocess.Popen, text: str) -> None:
    """Read the process's lines until one contains `text`."""
    line = process.stdout.readline()
    while text not in line:
        assert line, process.stderr.read()
        line = process.stdout.readline()


def terminate_until_exit(process: subprocess.Popen) -> int:
    """Send SIGTERM every 1.5 seconds until the process ends, before wandb's own limit of 10
    seconds. Return its exit code."""
    for _ in range(20):
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.5)
    raise AssertionError("the signals did not end the process")


def test_a_signal_ends_a_hanging_finish(fake, dataset, tmp_path):
    sent = fake(finish="mark_and_hang")
    process = start_run(dataset=dataset, out_dir=tmp_path / "out")
    read_until(process, "done at step 20")
    # the end of the run is interruptible once it waits for wandb
    while not sent.with_name("sent.end").exists():
        time.sleep(0.05)
    assert terminate_until_exit(process) == 0


def test_a_stopped_run_with_a_hanging_finish_exits_75(fake, dataset, tmp_path):
    fake(finish="hang")
    # only the signal ends this run
    process = start_run(dataset=dataset, out_dir=tmp_path / "out", max_iters=10**6)
    read_until(process, "step 5/")
    process.terminate()
    # the save comes before the end of wandb
    read_until(process, "stopped at step")
    assert (tmp_path / "out/ckpt.pt").exists()
    assert terminate_until_exit(process) == 75


def test_a_hanging_finish_has_a_limit(fake, train):
    fake(init="limit_the_end", finish="hang")
    # a rate that makes the loss NaN: the end after an error waits, too
    done = train(wandb_log=True, code=3, learning_rate=1e30, grad_clip=0)
    assert "wandb sync wandb/run-1" in done.stdout.splitlines()[-1]


def test_a_failing_log_is_one_warning(fake, train, tmp_path):
    fake(log="exit_with_1")
    done = train(wandb_log=True)
    assert done.stdout.count("warning: ") == 1
    assert done.stderr == ""
    assert read_rows(tmp_path / "out")[-1]["step"] == 20


def test_a_hanging_log_does_not_stop_training(fake, dataset, tmp_path):
    # training goes on in its own thread
    fake(log="hang")
    process = start_run(dataset=dataset, out_dir=tmp_path / "out")
    read_until(process, "done at step 20")
    assert terminate_until_exit(process) == 0


def test_without_its_server_wandb_logs_offline(fake, train, tmp_path):
    # the second attempt is offline, which needs no server
    sent = fake(init="lack_a_network")
    done = train(wandb_log=True)
    assert done.stdout.count("warning: ") == 1
    assert "no route to host" in done.stdout
    assert read_sent_steps(sent) == [row["step"] for row in read_rows(tmp_path / "out")]


def test_rows_that_wandb_has_are_not_sent_again(fake, half, train):
    # the run went on to step 11 after the checkpoint of step 10 was saved
    sent = fake(first_step=12)
    train(wandb_log=True, init_from="resume")
    # a row every five steps, and an evaluation
    assert read_sent_steps(sent) == [15, 20, 20]


def test_training_continues_when_wandb_fails(fake, train, tmp_path):
    fake(init="lack_a_key")
    assert "no key" in train(wandb_log=True).stdout
    assert read_rows(tmp_path / "out")[-1]["step"] == 20


def test_a_signal_while_wandb_starts_exits_75(fake, dataset, tmp_path):
    # its start may wait for a server, and must not be waited for
    fake(init="print_and_hang")
    process = start_run(dataset=dataset, out_dir=tmp_path / "out")
    read_until(process, "starting")
    process.terminate()
    assert process.wait(timeout=120) == 75


def test_no_menu_waits_for_a_login(dataset, tmp_path):
    """The real wandb, on a terminal, without an account."""
    terminal, its_side = pty.openpty()
    env = dict(os.environ)
    for key in os.environ:
        if key.startswith("WANDB"):
            del env[key]
    env |= {
        # a folder without a key
        "HOME": str(tmp_path),
        "WANDB_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        # nothing listens there
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    process = subprocess.Popen(
        make_command(
            "train.py",
            out_dir=tmp_path / "out",
            dataset=dataset,
            wandb_log=True,
            **TINY,
        ),
        stdin=its_side,
        stdout=its_side,
        stderr=its_side,
        env=env,
    )
    os.close(its_side)

    def read_all() -> None:
        # Linux: an error tells that the other side is closed
        with suppress(OSError):
            while os.read(terminal, 1 << 16):
                pass

    # a terminal that nobody reads would fill up and stop the run
    threading.Thread(target=read_all, daemon=True).start()
    try:
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
