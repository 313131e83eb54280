"""curves: what the metrics.jsonl of one run or several says, in one picture."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from keepgpt.config import setting
from keepgpt.process import fail

LOGGED = ("step", "loss", "lr", "grad_norm", "tokens_per_s")  # a logged step
EVALUATED = ("step", "val_loss")
AXES = {"steps": "steps", "tokens": "tokens trained on",
        "hours": "hours of training (evaluations and saves not in it)"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class CurvesConfig:
    """The settings of `tools.plot FOLDER ...`."""
    x: Literal["steps", "tokens", "hours"] = setting("steps",
        "steps | tokens | hours: what stands on the horizontal axis")
    to: str = setting("curves.png", "the picture's file")


@dataclass(frozen=True)
class History:
    """A run's log: arrays of one length for the logged steps, of another for the evaluations."""
    name: str
    step: np.ndarray
    tokens: np.ndarray  # NaN where an older run has not logged them
    hours: np.ndarray  # of training; NaN with them
    loss: np.ndarray
    lr: np.ndarray
    grad_norm: np.ndarray
    tokens_per_s: np.ndarray
    val_step: np.ndarray
    val_loss: np.ndarray

    def x(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """Where logged steps and evaluations stand on that axis."""
        at = {"steps": self.step, "tokens": self.tokens, "hours": self.hours}[axis]
        if np.isnan(at).any():
            fail(f"{self.name} was logged without tokens, by an older version; use --x=steps")
        if axis == "steps":
            return at, self.val_step
        return at, np.interp(self.val_step, [0, *self.step], [0, *at])


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; the program ends with a word if it is missing or damaged."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as e:
        fail(f"{path}: {e.strerror.lower()}; give the out_dir of a run")
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # a crash has cut it short, or it is being written
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            keys = EVALUATED if "val_loss" in row else LOGGED
            rows.append({key: float(row[key]) for key in (*keys, *({"tokens"} & row.keys()))})
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path}:{number} is no row of a run: the file is damaged; remove that line")
    if not rows:
        fail(f"{path} has no row yet; it gets one with the first evaluation or logged step")
    return rows


def read_run(folder: str | Path) -> History:
    """A run's metrics.jsonl as arrays, hours integrated from tokens and tokens_per_s. Ends the
    program as read_rows does."""
    rows = read_rows(Path(folder) / "metrics.jsonl")
    logged = [row for row in rows if "val_loss" not in row]
    evaluated = [row for row in rows if "val_loss" in row]
    known = [row["tokens"] / row["step"] for row in logged if "tokens" in row]
    column = {key: np.array([row[key] for row in logged]) for key in LOGGED}
    # a step has as many tokens throughout a run: the rows that tell help those that don't
    tokens = column["step"] * (known[0] if known else np.nan)
    seconds = np.diff(tokens, prepend=0) / column["tokens_per_s"]
    return History(str(folder), **column, tokens=tokens, hours=np.cumsum(seconds) / 3600,
                   **{f"val_{key.removeprefix('val_')}": np.array([row[key] for row in evaluated])
                      for key in EVALUATED})


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` neighbours, the value itself in their middle; fewer at the ends."""
    if not len(values):  # evaluated, and no step logged yet
        return values
    ones = np.ones(width)
    return (np.convolve(values, ones)[width // 2:][:len(values)]
            / np.convolve(np.ones(len(values)), ones)[width // 2:][:len(values)])


def width_for(history: History) -> int:
    """An odd number of logged steps to average over: a fiftieth of them."""
    return len(history.step) // 50 // 2 * 2 + 1


def draw(histories: list[History], axis: str):
    """The figure: loss above; learning rate, gradient norm and speed below."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator
    figure = plt.figure(figsize=(14, 9), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(2, 1))
    loss = figure.add_subplot(grid[0, :])
    lr, norm, speed = (figure.add_subplot(grid[1, i], sharex=loss) for i in range(3))
    many = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(histories)))
    for i, history in enumerate(histories):
        colour = COLOURS[i] if len(histories) <= len(COLOURS) else many[i]
        draw_loss(loss, history, axis, colour)
        x, width = history.x(axis)[0], width_for(history)
        marker = "o" if len(x) == 1 else ""  # a line of one point would not be seen
        lr.plot(x, history.lr, color=colour, marker=marker)
        for panel, values in ((norm, history.grad_norm), (speed, history.tokens_per_s)):
            panel.plot(x, values, color=colour, alpha=0.25, linewidth=0.8, marker=marker)
            panel.plot(x, smooth(values, width), color=colour)
    loss.set_yscale("log")  # the fall of the first steps and the last hundredths both show
    loss.yaxis.set_major_locator(MaxNLocator(8))
    loss.yaxis.set_minor_locator(NullLocator())
    loss.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    for panel, title in ((loss, "loss (nats per token, log scale)"), (lr, "learning rate"),
                         (norm, "gradient norm, before clipping"), (speed, "tokens per second")):
        panel.set_title(title, fontsize=13, loc="left")
        panel.set_xlabel(AXES[axis] if panel is loss or axis != "hours" else "hours of training",
                         fontsize=12)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=11)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(left=0)
        if panel is not loss:
            panel.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    if axis == "tokens":
        loss.xaxis.set_major_formatter(EngFormatter(sep=""))
    add_legend(figure, loss)
    return figure


def draw_loss(panel, history: History, axis: str, colour: str) -> None:
    """A run's train and val loss; the best evaluation is a star."""
    x, val_x = history.x(axis)
    marker = "o" if len(x) == 1 else ""
    panel.plot(x, history.loss, color=colour, alpha=0.25, linewidth=0.8, marker=marker)
    name = history.name.replace("$", r"\$")  # no formula
    panel.plot(x, smooth(history.loss, width_for(history)), color=colour, linewidth=1.3,
               label=name if not len(val_x) else None)
    if not len(val_x):
        return
    best = int(history.val_loss.argmin())
    panel.plot(val_x, history.val_loss, color=colour, marker="o", markersize=6, linewidth=2.2,
               label=f"{name}: best val loss {history.val_loss[best]:.4f} "
                     f"at step {history.val_step[best]:,.0f}")
    panel.plot(val_x[best], history.val_loss[best], "*", color=colour, markersize=20,
               markeredgecolor="white", zorder=3, clip_on=False)


def add_legend(figure, panel) -> None:
    """The runs by colour, and in grey what each kind of line is; below, where it hides nothing."""
    for words, style in (("train loss, mean over a fiftieth of the run", {"linewidth": 1.3}),
                         ("train loss, each logged step", {"linewidth": 0.8, "alpha": 0.5}),
                         ("val loss", {"linewidth": 2.2, "marker": "o"}),
                         ("best val loss", {"linestyle": "", "marker": "*", "markersize": 14})):
        panel.plot([], [], color="grey", label=words, **style)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower left", fontsize=12,
                  frameon=False, ncols=2)
