"""checks: is a killed run bit-identical on this device? Each check is also a row of tools.gpu; it
raises UserError if it fails."""

import os
import signal
from functools import partial
from pathlib import Path

from keepgpt.checkpoint import read_bundle
from keepgpt.errors import EXIT_NOT_FINITE, UserError
from tools import runs
from tools.crash.common import Part
from tools.measure import Row

# a run of seconds with two evaluations and many saves
RUN = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 64,
    "block_size": 64,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "learning_rate": 3e-3,
    "warmup_iters": 4,
    "lr_decay_iters": 400,
    "max_iters": 400,
    "eval_interval": 200,
    # all windows, so an evaluation's last batch is smaller
    "eval_iters": 100,
    "checkpoint_interval": 10,
    "log_interval": 5,
    "deterministic": True,
    "init_from": "auto",
}


def resume(
    _rounds: int, device: str, folder: Path, ranks: int = 1, **flags: object
) -> Row:
    """Compare an uninterrupted run with one that is killed after a save and resumed. The first
    evaluates before it trains, the resumed one trains first."""
    whole = folder / "whole"
    killed = folder / "killed"
    # the uninterrupted run, in a folder of its own
    flags = RUN | flags | {"device": device, "dataset": runs.prepare_source(folder)}
    runs.run(flags | {"out_dir": whole}, ranks)

    # kill it as soon as it has saved, wherever it is then
    flags["out_dir"] = killed
    pid = runs.start(flags, ranks)
    code = None
    while code is None:
        code = runs.wait_for_exit(pid, 0.01)
        if code is None and (killed / "ckpt.pt").exists():
            os.kill(pid, signal.SIGKILL)
    # a run that ended by itself shows nothing
    if code != -signal.SIGKILL:
        raise UserError(f"exit code {code} before it was killed")

    # the same command again: it resumes
    runs.run(flags, ranks)
    if runs.read_end(whole) != runs.read_end(killed):
        raise UserError("an uninterrupted and a resumed run differ")
    return {"result": "bit-identical to an uninterrupted run"}


def blow_up(_rounds: int, device: str, folder: Path) -> Row:
    """Check that a learning rate of 1e30 gives exit code 3 and leaves finite checkpoints."""
    out = folder / "out"
    flags = RUN | {
        "device": device,
        "dataset": runs.prepare_source(folder),
        "out_dir": out,
    }
    # a good start, so there is something to lose
    runs.run(flags | {"max_iters": 20}, ranks=1)
    # then weights that overflow, and a save at each step that could store them
    flags |= {"learning_rate": 1e30, "grad_clip": 0, "checkpoint_interval": 1}
    runs.run(flags, ranks=1, code=EXIT_NOT_FINITE)
    bundle = read_bundle(out / "ckpt.pt")
    if not all(tensor.isfinite().all() for tensor in bundle["model"].values()):
        raise UserError("ckpt.pt is not finite")
    return {"result": f"exit code 3, ckpt.pt of step {bundle['step']} is finite"}


# a large checkpoint and small steps: a save is always in progress
ALWAYS_SAVING = {
    "checkpoint_interval": 1,
    "max_iters": 20,
    "eval_iters": 1,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "compile": False,
    "n_layer": 8,
    "n_embd": 512,
}
# by kind of fault, dtype and number of ranks
CHECKS = {
    "kill -9": partial(resume, dtype="bfloat16"),
    "kill -9, a save at each step": partial(resume, **ALWAYS_SAVING),
    "kill -9, two ranks": partial(resume, ranks=2, backend="gloo"),
    "kill -9, elastic": partial(resume, elastic=True),
    "kill -9, float16": partial(resume, dtype="float16"),
    "kill -9, float32, not compiled": partial(resume, dtype="float32", compile=False),
    "a loss that is not finite": blow_up,
}


def checks(part: Part, place: Path) -> str:
    """Run the checks one after another on --device."""
    names = list(CHECKS)
    for number in part.choose([False] * len(names), few=len(names)):
        name = names[number]
        folder = place / str(number)
        folder.mkdir()
        # a check that fails is counted, and the others continue
        problem = ""
        try:
            CHECKS[name](1, part.config.device, folder)
        except UserError as e:
            problem = str(e)
        part.count(number, problem, f"{name}: ")
    return f"of {len(names)} checks of device={part.config.device}"
