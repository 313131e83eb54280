"""Draw the curves of one run, or of several in one picture:
`python -m tools.plot out [out2 ...] [--x=tokens] [--to=curves.png]`."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keepgpt.config import setting
from keepgpt.errors import UserError, import_package
from tools.common import run_tool

TITLES = {"loss": "loss (nats per token)", "lr": "learning rate",
          "grad_norm": "gradient norm, before clipping", "tokens_per_s": "tokens per second"}


@dataclass(frozen=True)
class PlotConfig:
    """The settings of tools.plot."""
    x: Literal["steps", "tokens", "minutes"] = setting("steps",
        "the horizontal axis; minutes without evaluations")
    to: str = setting("curves.png", "the picture's file")


def read_run(folder: str | Path, axis: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the columns of a run's logged steps and of its evaluations, each with its place "x" on
    the axis. Raises UserError if metrics.jsonl is missing or corrupt."""
    path, line = Path(folder) / "metrics.jsonl", b""
    columns = [{key: [] for key in ("step", "tokens", *TITLES)}, {"step": [], "val_loss": []}]
    try:
        for line in path.read_bytes().split(b"\n")[:-1]:  # the last one is being written
            row = json.loads(line)
            for key, values in columns["val_loss" in row].items():
                values.append(float(row[key]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: expected a run's log, got {line!r:.60} ({e}). Try: the out_dir "
                        "of a run") from None
    logged, evaluated = ({key: np.array(values) for key, values in table.items()}
                         for table in columns)
    seconds = np.diff(logged["tokens"], prepend=0) / logged["tokens_per_s"]
    logged["x"] = {"steps": logged["step"], "tokens": logged["tokens"],
                   "minutes": np.cumsum(seconds) / 60}[axis]
    evaluated["x"] = np.interp(evaluated["step"], [0, *logged["step"]], [0, *logged["x"]])
    return logged, evaluated


def draw(folders: list[str], axis: str) -> Any:
    """Return a figure: the losses above; learning rate, gradient norm and speed below."""
    plt = import_package("matplotlib.pyplot")
    plt.switch_backend("Agg")  # needs no display
    figure, panels = plt.subplot_mosaic([["loss"] * 3, ["lr", "grad_norm", "tokens_per_s"]],
                                        figsize=(14, 9), height_ratios=(2, 1), layout="constrained")
    for i, folder in enumerate(folders):
        logged, evaluated = read_run(folder, axis)
        width = len(logged["x"]) // 50 + 1
        for key, panel in panels.items():
            total = np.cumsum([0, *logged[key]])
            panel.plot(logged["x"], logged[key], color=f"C{i}", alpha=0.3, linewidth=0.8)
            panel.plot(logged["x"][width - 1:], (total[width:] - total[:-width]) / width,
                       color=f"C{i}")
        best = min(evaluated["val_loss"], default=np.nan)
        panels["loss"].plot(evaluated["x"], evaluated["val_loss"], color=f"C{i}", marker="o",
                            linewidth=2.2, label=f"{folder}: val loss, best {best:.4f}")
    for key, panel in panels.items():
        panel.set(title=TITLES[key], xlabel=axis, xlim=(0, None))
        panel.grid(alpha=0.3)
    panels["loss"].set_yscale("log")  # shows the fall of the first steps and the last hundredths
    panels["loss"].yaxis.set_minor_formatter("{x:.3g}")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def main(config: PlotConfig, folders: list[str]) -> None:
    """Draw the runs and print the picture's file. Raises UserError."""
    if not folders:
        raise UserError("expected the out_dir of a run, or of several")
    figure = draw(folders, config.x)
    try:
        figure.savefig(config.to)
    except (OSError, ValueError) as e:
        raise UserError(f"--to={config.to}: {e}") from None
    print(config.to)


if __name__ == "__main__":
    run_tool(PlotConfig, "python -m tools.plot FOLDER ... [--key=value ...]", main)
