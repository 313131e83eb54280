"""pieces: what each piece of a checkpoint is for. A run, and from its middle the same run again:
with the whole bundle, and without each piece of it."""
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train
from keepgpt.checkpoint import generation_of, read_bundle
from keepgpt.config import TrainConfig, knob, parse
from keepgpt.dataset import BadData, dataset_folder, read_meta
from keepgpt.loader import Loader
from keepgpt.process import fail
from tools.crash.common import state
from tools.plot.curves import COLOURS, History, read_run

RUN = {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12,
       "gradient_accumulation_steps": 1,
       "dropout": 0.1,  # else its masks could not be missed
       "learning_rate": 4e-3, "min_lr": 2e-4, "beta2": 0.99, "eval_iters": 100, "log_interval": 1,
       "device": "cpu", "dtype": "float32", "compile": False}
NEAR = 50  # the table tells the largest difference in so many steps


@dataclass(frozen=True)
class PiecesConfig:
    """The settings of `tools.plot pieces`."""
    to: str = knob("pieces.png", "the picture's file")
    steps: int = knob(500, "the bundle is of this step; the runs have twice as many", least=2)
    dataset: str = knob("plays_char", "its folder in data_dir, made by prepare.py")
    data_dir: str = knob("data", "the folder of all datasets, as in train.py")


def no_moments(at: int) -> None:
    """AdamW begins anew: its moments and its count of updates are 0."""
    restore = train.Run.restore

    def restore_less(run: train.Run, bundle: dict) -> None:
        restore(run, bundle)
        for moments in run.optimizer.state.values():
            for tensor in moments.values():
                tensor.zero_()

    train.Run.restore = restore_less


def no_step(at: int) -> None:
    """The schedule begins anew."""
    schedule = train.get_lr
    train.get_lr = lambda step, config: schedule(step - at, config)


def no_rng(at: int) -> None:
    """The dropout masks are those from step 0 on."""
    seed_of = train.seed_of
    train.seed_of = lambda seed, step, m: seed_of(seed, step - at, m)


def no_position(at: int) -> None:
    """The batches are those from step 0 on."""
    batches = Loader.step
    Loader.step = lambda loader, step: batches(loader, step - at)


# what is left out of the bundle; how; what it is for
PIECES: tuple[tuple[str, Callable[[int], None] | None, str], ...] = (
    ("whole", None, "nothing is left out: the same run to the bit"),
    ("without the moments", no_moments,
     "AdamW knows no gradient's usual size: its first updates are too large"),
    ("without the step", no_step, "the schedule begins anew: warm-up, then the peak learning rate"),
    ("without the RNG", no_rng, "the dropout masks begin anew: no worse, but another run"),
    ("without the data position", no_position,
     "the batches begin anew: the curve looks well, but the text that was next is never read"))


def train_alone(out: Path, settings: dict, patch: Callable[[int], None] | None, at: int) -> None:
    """The target of a process: train.py's main with one thing changed."""
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if patch:
        patch(at)
    flags = [f"--{key}={value}" for key, value in (settings | {"out_dir": out}).items()]
    sys.exit(train.main(*parse(TrainConfig, "", flags)[:2]))


def trained(out: Path, settings: dict, patch: Callable[[int], None] | None = None, at: int = 0
            ) -> History:
    """What a run in a process of its own has logged."""
    # a server that has torch loaded, but no thread started, forks: safe, and seconds faster
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.plot.pieces"])
    process = context.Process(target=train_alone, args=(out, settings, patch, at))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
        process.join()
    if process.exitcode:
        said = Path(f"{out}.log").read_text(encoding="utf-8").splitlines() or ["nothing said"]
        fail(f"train.py ends with exit code {process.exitcode}: {said[-1]}")
    return read_run(out)


def measure(config: PiecesConfig, place: Path) -> tuple[History, dict[str, History], bool]:
    """Train; print a row of the table for each run. Returns the undisturbed run, the others by
    name, and whether the whole one has ended in the same bits."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices too small to share out
    at, end = config.steps, 2 * config.steps
    settings = RUN | {"dataset": config.dataset, "data_dir": config.data_dir, "max_iters": end,
                      "lr_decay_iters": end, "warmup_iters": at // 5, "eval_interval": at}
    print(f"| bundle of step {at} | val loss at {end} | largest difference of train loss, "
          f"{NEAR} steps | end |\n|---|---|---|---|")
    undisturbed, others = trained(place / "undisturbed", settings), {}
    print(f"| never stopped | {undisturbed.val_loss[-1]:.4f} | | |", flush=True)
    final = state(read_bundle(place / "undisturbed" / "ckpt.pt"))
    for name, patch, _ in PIECES:
        out = place / name.replace(" ", "-")
        out.mkdir()
        shutil.copy(generation_of(place / "undisturbed", at), out / "ckpt.pt")
        others[name] = run = trained(out, settings | {"init_from": "resume"}, patch, at)
        same = state(read_bundle(out / "ckpt.pt")) == final
        if name == "whole":
            whole = same
        print(f"| {name} | {run.val_loss[-1]:.4f} | {difference(run, undisturbed)[:NEAR].max():.2g}"
              f" | {'the same bits' if same else 'other bits'} |", flush=True)
    return undisturbed, others, whole


def difference(run: History, undisturbed: History) -> np.ndarray:
    """|train loss - the undisturbed run's|, of each step after the bundle's."""
    return np.abs(run.loss - undisturbed.loss[-len(run.loss):])


def trailing(losses: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and the width - 1 before it; so many fewer values."""
    return np.convolve(losses, np.ones(width) / width, "valid")


def draw(config: PiecesConfig):
    """Train, and draw the figure. Ends the program if the dataset is not prepared."""
    try:
        read_meta(dataset_folder(config.data_dir, config.dataset))
    except BadData as e:
        fail(str(e))
    with tempfile.TemporaryDirectory(prefix="keepgpt-pieces-") as place:
        undisturbed, others, same = measure(config, Path(place))
    from matplotlib import pyplot as plt
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(14, 9.5), dpi=100, sharex=True,
                                         layout="constrained")
    at, width = config.steps, max(1, config.steps // 25)
    top.plot(undisturbed.step[width - 1:], trailing(undisturbed.loss, width), color="#BBBBBB",
             linewidth=7, label="never stopped")
    for (name, _, why), colour in zip(PIECES, ("#000000", *COLOURS)):
        run, style = others[name], {"color": colour, "linewidth": 1.6}
        if name == "whole":
            style |= {"linestyle": (0, (4, 3)), "linewidth": 2.2, "zorder": 3}
        loss = np.concatenate([undisturbed.loss[at - width:at], run.loss])
        top.plot(np.arange(at, 2 * at + 1), trailing(loss, width), label=f"{name}: {why}", **style)
        thin = {} if name == "whole" else {"linewidth": 1}
        bottom.plot(run.step, difference(run, undisturbed), **style | thin)
    finish(top, bottom, config, width, same)
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower left", fontsize=12,
                  frameon=False)
    return figure


def finish(top, bottom, config: PiecesConfig, width: int, same: bool) -> None:
    """Scales, titles and words of the two panels."""
    at = config.steps
    top.set_xlim(at * 0.8, at * 2)
    shown = [line.get_ydata()[line.get_xdata() >= at * 0.8] for line in top.lines]
    low, high = min(map(np.min, shown)), max(map(np.max, shown))
    top.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    top.set_title(f"A run goes on from its bundle of step {at}: train loss, mean of the last "
                  f"{width} steps (nats per token)", fontsize=14, loc="left")
    bottom.set_title("The difference to the run that was never stopped, step by step: "
                     "|train loss - its train loss|", fontsize=14, loc="left")
    bottom.set_yscale("symlog", linthresh=1e-5)
    bottom.set_ylim(bottom=-3e-6)
    bottom.set_xlabel("steps", fontsize=12)
    bottom.annotate("whole: 0 in every bit" if same else "whole: NOT the same bits",
                    (at * 1.98, 0), (0, 6), textcoords="offset points", ha="right", fontsize=14,
                    weight="bold")
    for panel in (top, bottom):
        panel.axvline(at, color="grey", linewidth=1, linestyle=":")
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=11)
        panel.spines[["top", "right"]].set_visible(False)
