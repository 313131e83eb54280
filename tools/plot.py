"""Draw the curves of one run, or of several in one picture:
`python -m tools.plot out [out2 ...] [--x=tokens] [--to=curves.png]`."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keepgpt.config import parse, setting
from keepgpt.process import UserError, exit_with

LOGGED = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s")  # keys of a logged step
EVALUATED = ("step", "val_loss")
LABELS = {"steps": "steps", "tokens": "tokens", "minutes": "minutes, without evaluations"}


@dataclass(frozen=True)
class PlotConfig:
    """The settings of tools.plot."""
    x: Literal["steps", "tokens", "minutes"] = setting("steps", "the horizontal axis")
    to: str = setting("curves.png", "the picture's file")


@dataclass(frozen=True)
class History:
    """A run's log: an array per key, of one length for the logged steps and another one for the
    evaluations."""
    name: str
    logged: dict[str, np.ndarray]
    evaluated: dict[str, np.ndarray]

    def x(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of logged steps and of evaluations on an axis."""
        step, tokens = self.logged["step"], self.logged["tokens"]
        if axis == "steps":
            return step, self.evaluated["step"]
        seconds = np.diff(tokens, prepend=0) / self.logged["tokens_per_s"]
        x = tokens if axis == "tokens" else np.cumsum(seconds) / 60
        return x, np.interp(self.evaluated["step"], [0, *step], [0, *x])


def read_run(folder: str | Path) -> History:
    """Read a run's metrics.jsonl. Raises UserError if it is missing or corrupt."""
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # an incomplete last line is being written
    except OSError as e:
        raise UserError(f"{e}. Try: the out_dir of a run") from None
    logged, evaluated = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            keys, rows = (EVALUATED, evaluated) if "val_loss" in row else (LOGGED, logged)
            rows.append([float(row[key]) for key in keys])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: expected a row of a run. "
                            "Try: remove that line") from None
    if not lines:
        raise UserError(f"{path}: no row yet; the first evaluation writes one")
    columns = [dict(zip(keys, np.array(rows).reshape(-1, len(keys)).T))
               for keys, rows in ((LOGGED, logged), (EVALUATED, evaluated))]
    return History(str(folder), *columns)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean over a fiftieth of the values around each one; over fewer at the ends."""
    width, n = len(values) // 50 // 2 * 2 + 1, len(values)
    total, count = (np.convolve([*x, 0], np.ones(width))[width // 2:][:n]
                    for x in (values, np.ones(n)))
    return total / count


def draw(histories: list[History], axis: str) -> Any:
    """Return a figure: losses above; learning rate, gradient norm and speed below."""
    from matplotlib import pyplot as plt
    figure = plt.figure(figsize=(14, 9), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(2, 1))
    loss = figure.add_subplot(grid[0, :])
    below = [figure.add_subplot(grid[1, i], sharex=loss) for i in range(3)]
    for i, history in enumerate(histories):
        x, val_x = history.x(axis)
        style = {"color": f"C{i}", "marker": "o" if len(x) == 1 else ""}  # a point is not a line
        draw_loss(loss, history, x, val_x, style)
        for panel, key in zip(below, ("lr", "grad_norm", "tokens_per_s")):
            panel.plot(x, history.logged[key], alpha=0.4, linewidth=0.8, **style)
            panel.plot(x, smooth(history.logged[key]), **style)
    loss.set_yscale("log")  # shows the fall of the first steps and the last hundredths
    loss.yaxis.set_major_locator(plt.MaxNLocator(8))
    loss.yaxis.set_minor_locator(plt.NullLocator())
    loss.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:.3g}"))
    titles = ("loss (nats per token, log scale)", "learning rate",
              "gradient norm, before clipping", "tokens per second")
    for panel, title in zip((loss, *below), titles):
        panel.set_title(title, loc="left")
        panel.set_xlabel(LABELS[axis])
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        if panel is not loss:
            panel.set_ylim(bottom=0)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def draw_loss(panel: Any, history: History, x: np.ndarray, val_x: np.ndarray, style: dict) -> None:
    """Draw a run's train and val loss; the best evaluation is a star."""
    name = history.name.replace("$", r"\$")  # not a formula
    loss, val_loss = history.logged["loss"], history.evaluated["val_loss"]
    panel.plot(x, loss, alpha=0.25, linewidth=0.8, **style)
    panel.plot(x, smooth(loss), linewidth=1.3, label=f"{name}: train loss, smoothed", **style)
    if len(val_loss):
        best, color = int(val_loss.argmin()), style["color"]
        panel.plot(val_x, val_loss, color=color, marker="o", linewidth=2.2,
                   label=f"{name}: val loss, best {val_loss[best]:.4f} at step "
                         f"{history.evaluated['step'][best]:,.0f}")
        panel.plot(val_x[best], val_loss[best], "*", color=color, markersize=20,
                   markeredgecolor="white", zorder=3)


def main(config: PlotConfig, folders: list[str]) -> None:
    """Draw the runs and print the picture's file. Raises UserError."""
    if not folders:
        raise UserError("expected the out_dir of a run, or of several")
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib. Try: pip install matplotlib") from None
    matplotlib.use("Agg")  # needs no display
    figure = draw([read_run(folder) for folder in folders], config.x)
    try:
        figure.savefig(config.to)
    except (OSError, ValueError) as e:
        raise UserError(f"--to={config.to}: {e}") from None
    print(config.to)


if __name__ == "__main__":
    try:
        CONFIG, _, FOLDERS = parse(PlotConfig, "python -m tools.plot FOLDER ... [--key=value ...]",
                                   sys.argv[1:])
        main(CONFIG, FOLDERS)
    except UserError as e:
        exit_with(e)
