"""The scripts run in a notebook: several times in one kernel, which survives them."""

import pytest
from conftest import REPO, TINY, bits
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.slow


@pytest.fixture
def execute(monkeypatch):
    """Run code in a kernel: execute("%run train.py") returns its output."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = new_notebook()
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        # the end of a kernel takes seconds, and is not tested here
        shutdown_kernel="immediate",
        resources={"metadata": {"path": str(REPO)}},
    )

    def execute(code: str) -> str:
        notebook.cells.append(new_code_cell(code))
        cell = client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
        return "".join(output.get("text", "") for output in cell.outputs)

    with client.setup_kernel():
        yield execute


def to_line(script: str, *args: object, **flags: object) -> str:
    """Return the line that runs a script in a notebook."""
    return " ".join(
        [
            "%run",
            script,
            *map(str, args),
            *(f"--{key}={value}" for key, value in flags.items()),
        ]
    )


def test_one_kernel_prepares_trains_resumes_and_samples(
    execute, play, dataset, whole, tmp_path
):
    for _ in range(2):  # the lock is free again
        execute(
            to_line(
                "prepare.py", play, name="mine", tokenizer="char", data_dir=tmp_path
            )
        )
        (tmp_path / "mine/meta.json").unlink()
        (tmp_path / "mine/train.bin").unlink()
        (tmp_path / "mine/val.bin").unlink()
    flags = TINY | {
        "dataset": dataset,
        "out_dir": tmp_path / "out",
        "init_from": "auto",
    }
    assert "done at step 10" in execute(
        to_line("train.py", **flags | {"max_iters": 10})
    )
    assert "n_layer" in execute(
        to_line("train.py", **flags | {"n_layer": 3})
    )  # refused
    assert "done at step 20" in execute(to_line("train.py", **flags))
    text = execute(to_line("sample.py", out_dir=tmp_path / "out", max_new_tokens=5))
    assert text.count("\n---------------\n") == 2  # between three samples
    assert bits(tmp_path / "out/ckpt.pt") == bits(whole / "ckpt.pt")


def test_an_interrupt_saves_and_gives_the_prompt_back(
    execute, dataset, whole, tmp_path
):
    flags = TINY | {
        "dataset": dataset,
        "out_dir": tmp_path / "out",
        "init_from": "auto",
        "log_interval": 1,
    }
    handlers = "print([signal.getsignal(n) for n in range(1, 30) if n not in (9, 19)])"
    # the kernel's interrupt is a SIGINT to its process
    before = execute(f"""import os, signal, threading, time
from pathlib import Path
def interrupt(step):
    path = Path({str(tmp_path / "out/metrics.jsonl")!r})
    while not path.exists() or f'"step": {{step}},' not in path.read_text():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
{handlers}""")
    for step in (5, 10):
        execute(f"threading.Thread(target=interrupt, args=({step},)).start()")
        assert "saved in" in execute(
            to_line("train.py", **flags | {"max_iters": 10**6})
        )
    assert execute(handlers) == before
    assert "done at step 20" in execute(to_line("train.py", **flags))
    assert bits(tmp_path / "out/ckpt.pt") == bits(whole / "ckpt.pt")
