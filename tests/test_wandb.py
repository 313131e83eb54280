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
from conftest import TINY, command, rows, start

pytestmark = pytest.mark.slow

# a package `wandb` that writes its rows to the file $SENT; each test breaks a part of it
FAKE = """
import json, os, threading
class Run:
    id, dir, summary, starting_step = "fake", "wandb/run-1/files", {{}}, {first_step}
    def log(self, row, step):
        {log}
        with open(os.environ["SENT"], "a") as file:
            print(json.dumps(row), file=file)
    def finish(self):
        {finish}
def Settings(**_): pass
def init(mode="online", **_):
    {init}
    return Run()
"""
HANG = "threading.Event().wait()"
# the end of the run is interruptible from here on
MARK_AND_HANG = "open(os.environ['SENT'] + '.end', 'w').close(); " + HANG


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Install a fake wandb: fake(finish=HANG). Return the file of the rows that it got."""

    def fake(log="pass", finish="pass", init="pass", first_step=0) -> Path:
        parts = {"log": log, "finish": finish, "init": init, "first_step": first_step}
        (tmp_path / "wandb.py").write_text(FAKE.format(**parts))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("SENT", str(tmp_path / "sent"))
        return tmp_path / "sent"

    return fake


def sent_steps(path: Path) -> list[int]:
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
    sent = fake(finish=MARK_AND_HANG)
    process = start_run(dataset=dataset, out_dir=tmp_path / "out")
    read_until(process, "done at step 20")
    while not sent.with_name("sent.end").exists():
        time.sleep(0.05)
    assert terminate_until_exit(process) == 0


def test_a_stopped_run_with_a_hanging_finish_exits_75(fake, dataset, tmp_path):
    fake(finish=HANG)
    process = start_run(dataset=dataset, out_dir=tmp_path / "out", max_iters=10**6)
    read_until(process, "step 5/")
    process.terminate()
    read_until(process, "stopped at step")
    assert (tmp_path / "out/ckpt.pt").exists()
    assert terminate_until_exit(process) == 75


def test_a_hanging_finish_has_a_limit(fake, train):
    # the real one takes ten seconds
    limit = "import keepgpt.metrics; keepgpt.metrics.CLOSE_SECONDS = 1"
    fake(init=limit, finish=HANG)
    done = train(wandb_log=True, code=3, learning_rate=1e30, grad_clip=0)
    assert "wandb sync wandb/run-1" in done.stdout.splitlines()[-1]


def test_a_failing_log_is_one_warning(fake, train, tmp_path):
    fake(log="raise SystemExit(1)")
    done = train(wandb_log=True)
    assert done.stdout.count("warning: ") == 1 and done.stderr == ""
    assert rows(tmp_path / "out")[-1]["step"] == 20


def test_a_hanging_log_does_not_stop_training(fake, dataset, tmp_path):
    fake(log=HANG)
    process = start_run(dataset=dataset, out_dir=tmp_path / "out")
    read_until(process, "done at step 20")
    assert terminate_until_exit(process) == 0


def test_without_its_server_wandb_logs_offline(fake, train, tmp_path):
    sent = fake(init="assert mode == 'offline', 'no route to host'")
    done = train(wandb_log=True)
    assert done.stdout.count("warning: ") == 1 and "no route to host" in done.stdout
    assert sent_steps(sent) == [row["step"] for row in rows(tmp_path / "out")]


def test_rows_that_wandb_has_are_not_sent_again(fake, half, train):
    sent = fake(first_step=12)
    train(wandb_log=True, init_from="resume")
    assert sent_steps(sent) == [15, 20, 20]


def test_training_continues_when_wandb_fails(fake, train, tmp_path):
    fake(init="raise RuntimeError('no key')")
    assert "no key" in train(wandb_log=True).stdout
    assert rows(tmp_path / "out")[-1]["step"] == 20


def test_a_signal_while_wandb_starts_exits_75(fake, dataset, tmp_path):
    fake(init=f"print('starting', flush=True); {HANG}")
    process = start_run(dataset=dataset, out_dir=tmp_path / "out")
    read_until(process, "starting")
    process.terminate()
    assert process.wait(timeout=120) == 75


def test_no_menu_waits_for_a_login(dataset, tmp_path):
    """The real wandb, on a terminal, without an account."""
    terminal, its_side = pty.openpty()
    env = {
        key: value for key, value in os.environ.items() if not key.startswith("WANDB")
    }
    env |= {
        "HOME": str(tmp_path),
        "WANDB_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    process = subprocess.Popen(
        command(
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
        try:
            while os.read(terminal, 1 << 16):
                pass
        except OSError:  # Linux: the other side is closed
            pass

    threading.Thread(target=read_all, daemon=True).start()
    try:
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
