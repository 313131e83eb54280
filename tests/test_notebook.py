"""The scripts run in a notebook: several times in one kernel, which survives them."""

import pytest
from conftest import PROGRAMS, REPO, TINY, hash_state
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


def make_line(script: str, *args: object, **flags: object) -> str:
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
    prepare = make_line(
        "prepare.py", play, name="mine", tokenizer="char", data_dir=tmp_path
    )
    # the second time shows that the first one has released its lock
    for _ in range(2):
        execute(prepare)
        (tmp_path / "mine/meta.json").unlink()
        (tmp_path / "mine/train.bin").unlink()
        (tmp_path / "mine/val.bin").unlink()

    out = tmp_path / "out"
    flags = TINY | {"dataset": dataset, "out_dir": out, "init_from": "auto"}
    half = execute(make_line("train.py", **flags | {"max_iters": 10}))
    assert "done at step 10" in half
    # the kernel also survives a mistake: the checkpoint has one layer
    assert "n_layer" in execute(make_line("train.py", **flags | {"n_layer": 3}))
    assert "done at step 20" in execute(make_line("train.py", **flags))
    text = execute(make_line("sample.py", out_dir=out, max_new_tokens=5))
    # between three samples
    assert text.count("\n---------------\n") == 2
    # the reference was trained in one process per run, and without a stop
    assert hash_state(out / "ckpt.pt") == hash_state(whole / "ckpt.pt")


def test_an_interrupt_saves_and_gives_the_prompt_back(
    execute, dataset, whole, tmp_path
):
    out = tmp_path / "out"
    flags = TINY | {"dataset": dataset, "out_dir": out, "init_from": "auto"}
    # the interrupts wait for a row of their step
    flags["log_interval"] = 1
    execute(f"%run {PROGRAMS / 'interrupt_kernel.py'}")
    handlers = execute("print(list_handlers())")
    # only an interrupt ends these runs
    endless = make_line("train.py", **flags | {"max_iters": 10**6})
    for step in (5, 10):
        execute(f"interrupt_at({str(out / 'metrics.jsonl')!r}, {step})")
        assert "saved in" in execute(endless)
    assert execute("print(list_handlers())") == handlers
    assert "done at step 20" in execute(make_line("train.py", **flags))
    assert hash_state(out / "ckpt.pt") == hash_state(whole / "ckpt.pt")
