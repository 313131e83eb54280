"""Draw the curves of one run, or of several in one picture:
`python -m tools.plot out [out2 ...] [--x=tokens] [--to=curves.png]`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keepgpt.config import setting
from keepgpt.errors import UserError, import_package
from tools.common import read_card, run_tool

# a panel for each key of the log
TITLES = {
    "loss": "loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_s": "tokens per second",
}
STEP_KEYS = ("step", "tokens", *TITLES)
# an evaluation also has val_loss/NAME and val_bpb/NAME of each source of a mixture
EVALUATION_KEYS = ("step", "val_loss", "val_bpb", "text_bpb")
SOURCE = "val_loss/"
Columns = dict[str, np.ndarray]
# places on the axis by the kind of event there
Marks = dict[str, np.ndarray]
# how to mark what happened to a run
LINES = {"restart": "dotted", "branch": "dashdot"}
SYMBOLS = {"skip": "x", "replay": "^"}
# of the sources of a mixture
MARKERS = "svD^P*"


@dataclass(frozen=True)
class PlotConfig:
    """The settings of tools.plot."""

    x: Literal["steps", "tokens", "minutes"] = setting(
        "steps", "the horizontal axis; minutes without evaluations"
    )
    to: str = setting("curves.png", "the picture's file")


def to_columns(rows: list[list[float]], keys: tuple[str, ...]) -> Columns:
    """Return rows of numbers as one array per key, also without any row."""
    # reshaped, or a table without rows would have no columns
    table = np.array(rows, float).reshape(-1, len(keys))
    return dict(zip(keys, table.T))


def read_run(folder: str | Path, axis: str) -> tuple[Columns, Columns, Marks]:
    """Return the columns of a run's logged steps and of its evaluations, each with its place "x" on
    the axis, and the places of its events, restarts and branch. Raises UserError if metrics.jsonl
    is missing or corrupt."""
    path = Path(folder) / "metrics.jsonl"
    steps = []
    evaluations = []
    events: dict[str, list[float]] = {}
    line = b""
    try:
        # the last line may still be being written
        for line in path.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            # a row is a logged step, an evaluation or an event
            if "event" in row:
                events.setdefault(row["event"], []).append(float(row["step"]))
            elif "val_loss" in row:
                evaluations.append({key: float(row[key]) for key in row})
            else:
                steps.append([float(row[key]) for key in STEP_KEYS])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path}: expected a run's log, got {line!r:.60} ({e}). Try: the out_dir "
            "of a run"
        ) from None
    logged = to_columns(steps, STEP_KEYS)
    sources = {key for row in evaluations for key in row if "/" in key}
    keys = (*EVALUATION_KEYS, *sorted(sources))
    # an older log lacks some
    table = [[row.get(key, np.nan) for key in keys] for row in evaluations]
    evaluated = to_columns(table, keys)

    # README.md lists the starts (all but the first are restarts) and the trunk of a branch
    card = read_card(Path(folder))
    events["restart"] = [start.step for start in card.starts[1:]]
    events["branch"] = [card.trunk["step"]] if card.trunk else []

    # a branch's log begins at the step of its trunk
    first_step = sum(events["branch"])
    first_tokens = first_step * (logged["tokens"] / logged["step"])[:1].sum()
    # the log has speeds and no times, so a resumed run has no gap
    tokens = np.diff(logged["tokens"], prepend=first_tokens)
    minutes = np.cumsum(tokens / logged["tokens_per_s"]) / 60
    places = {
        "steps": (first_step, logged["step"]),
        "tokens": (first_tokens, logged["tokens"]),
        "minutes": (0, minutes),
    }
    first, logged["x"] = places[axis]

    # what else happened stands at its step's place, which may not be logged
    def find_places(steps: Any) -> np.ndarray:
        return np.interp(steps, [first_step, *logged["step"]], [first, *logged["x"]])

    evaluated["x"] = find_places(evaluated["step"])
    marks = {kind: find_places(steps) for kind, steps in events.items() if steps}
    return logged, evaluated, marks


def draw_marks(
    panel: Any, folder: str, logged: Columns, marks: Marks, color: str
) -> None:
    """Draw a vertical line for each branch and restart, and a symbol on the curve of the losses for
    each event."""
    for kind, x in marks.items():
        style = {"color": color, "label": f"{folder}: {kind} ({len(x)})"}
        if kind in LINES:
            # from the bottom to the top, whatever the losses are
            top = {"transform": panel.get_xaxis_transform()}
            panel.vlines(x, 0, 1, linestyle=LINES[kind], **top, **style)
        elif len(logged["x"]):
            losses = np.interp(x, logged["x"], logged["loss"])
            panel.scatter(x, losses, marker=SYMBOLS.get(kind, "o"), zorder=3, **style)


def draw_run(panels: dict, folder: str, axis: str, color: str) -> None:
    """Draw the curves of one run: each logged value faintly, their moving mean on top."""
    logged, evaluated, marks = read_run(folder, axis)
    # a fiftieth of the curve, so long runs are smoothed more
    width = len(logged["x"]) // 50 + 1
    for key in TITLES:
        panel = panels[key]
        panel.plot(logged["x"], logged[key], color=color, alpha=0.3, linewidth=0.8)
        # a mean is the difference of two sums
        total = np.cumsum([0, *logged[key]])
        mean = (total[width:] - total[:-width]) / width
        panel.plot(logged["x"][width - 1 :], mean, color=color)

    # a run that was not evaluated yet has no best one
    losses = evaluated["val_loss"]
    label = f"{folder}: val loss, best {min(losses, default=np.nan):.4f}"
    if np.isfinite(evaluated["val_bpb"]).any():
        label += f" ({np.nanmin(evaluated['val_bpb']):.4f} bits per byte)"
    style = {"color": color, "marker": "o"}
    x = evaluated["x"]
    panels["loss"].plot(x, losses, linewidth=2.2, label=label, **style)
    panels["bpb"].plot(x, evaluated["val_bpb"], linewidth=2.2, **style)
    # a text of the user's own
    if np.isfinite(evaluated["text_bpb"]).any():
        label = f"{folder}: eval_text, bits per byte"
        panels["bpb"].plot(x, evaluated["text_bpb"], "x:", color=color, label=label)
    # the sources of a mixture, each with another marker
    for number, key in enumerate(key for key in evaluated if key.startswith(SOURCE)):
        source = key.removeprefix(SOURCE)
        style["marker"] = MARKERS[number % len(MARKERS)]
        style["linestyle"] = "--"
        panels["loss"].plot(
            x, evaluated[key], label=f"{folder}: val loss of {source}", **style
        )
        # an older log, or an unknown tokenizer, has none
        nothing = np.full_like(x, np.nan)
        panels["bpb"].plot(x, evaluated.get(f"val_bpb/{source}", nothing), **style)
    draw_marks(panels["loss"], folder, logged, marks, color)


def draw(folders: list[str], axis: str) -> Any:
    """Return a figure: the losses and the bits per byte above; learning rate, gradient norm and
    speed below."""
    plt = import_package("matplotlib.pyplot")
    # needs no display
    plt.switch_backend("Agg")
    layout = [["loss", "loss", "bpb"], ["lr", "grad_norm", "tokens_per_s"]]
    figure, panels = plt.subplot_mosaic(
        layout, figsize=(14, 9), height_ratios=(2, 1), layout="constrained"
    )
    # one colour per run, in every panel
    for i, folder in enumerate(folders):
        draw_run(panels, folder, axis, color=f"C{i}")

    titles = TITLES | {"bpb": "validation loss (bits per byte)"}
    for key, panel in panels.items():
        panel.set(title=titles[key], xlabel=axis, xlim=(0, None))
        panel.grid(alpha=0.3)
    # a logarithm shows the fall of the first steps and the last hundredths
    panels["loss"].set_yscale("log")
    panels["loss"].yaxis.set_minor_formatter("{x:.3g}")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def main(config: PlotConfig, folders: list[str]) -> None:
    """Draw the runs and print the picture's file. Raises UserError."""
    if not folders:
        raise UserError("expected the out_dir of a run, or of several")
    # its own errors name a file; those below are about --to
    figure = draw(folders, config.x)
    try:
        figure.savefig(config.to)
    except (OSError, ValueError) as e:
        raise UserError(f"--to={config.to}: {e}") from None
    print(config.to)


if __name__ == "__main__":
    run_tool(PlotConfig, "python -m tools.plot FOLDER ... [--key=value ...]", main)
