"""tools.plot reads logs exactly, draws them, and answers mistakes with a line."""

import json
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import PROGRAMS, read_error, run

from tools.plot import draw, read_run

STEPS = [
    {
        "step": 2,
        "tokens": 200,
        "loss": 4.0,
        "lr": 0.1,
        "grad_norm": 9.0,
        "tokens_per_s": 100,
    },
    {
        "step": 4,
        "tokens": 400,
        "loss": 3.0,
        "lr": 0.2,
        "grad_norm": 8.0,
        "tokens_per_s": 50,
    },
    {
        "step": 8,
        "tokens": 800,
        "loss": 2.0,
        "lr": 0.3,
        "grad_norm": 7.0,
        "tokens_per_s": 400,
        "mfu": 0.5,
    },
]
# 200 tokens at 100 a second, 200 at 50, 400 at 400
SECONDS = [2, 6, 7]
EVALUATIONS = [
    {"step": 0, "train_loss": 5.0, "val_loss": 5.5},
    {"step": 4, "train_loss": 2.5, "val_loss": 2.6},
    {"step": 8, "train_loss": 2.0, "val_loss": 2.7},
]
# in the order of a log
ROWS = [
    EVALUATIONS[0],
    STEPS[0],
    STEPS[1],
    EVALUATIONS[1],
    STEPS[2],
    EVALUATIONS[2],
]


def write_run(folder: Path, rows: list, more: str = "") -> Path:
    """Write a run's log of these rows and then `more`. Return its folder."""
    folder.mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    text = "".join(lines) + more
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def run_plot(
    *args: object, code: int | None = None, **flags: object
) -> subprocess.CompletedProcess:
    """Run `python -m tools.plot`."""
    return run("tools.plot", *args, code=code, **flags)


def list_points(line) -> list:
    """Return the points of a drawn line as [x, y]."""
    return line.get_xydata().tolist()


def read_size(path: Path) -> tuple[int, int]:
    """Return width and height from the header of a PNG."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", header[16:])


def test_a_log_is_read_exactly(tmp_path):
    folder = write_run(tmp_path / "run", ROWS)
    logged, evaluated, _ = read_run(folder, "minutes")
    for key in STEPS[0]:
        assert logged[key].tolist() == [row[key] for row in STEPS]
    assert evaluated["step"].tolist() == [0, 4, 8]
    assert evaluated["val_loss"].tolist() == [5.5, 2.6, 2.7]
    assert np.allclose(logged["x"] * 60, SECONDS)
    # an evaluation takes no time
    assert np.allclose(evaluated["x"] * 60, [0, 6, 7])


def test_the_minutes_of_a_branch_start_at_its_trunk(tmp_path):
    folder = write_run(tmp_path / "run", ROWS[1:])
    (folder / "README.md").write_text(CARD)
    # step 1 is the trunk's: the first row, of step 2, has 100 tokens of this run
    logged, evaluated, marks = read_run(folder, "minutes")
    assert np.allclose(logged["x"] * 60, [1, 5, 6])
    assert np.allclose(evaluated["x"] * 60, [5, 6])
    assert marks["branch"].tolist() == [0]


def test_a_truncated_last_line_is_skipped(tmp_path):
    intact_folder = write_run(tmp_path / "intact", ROWS)
    cut_folder = write_run(tmp_path / "cut", ROWS, '{"step": 9, "tok')
    intact, _, _ = read_run(intact_folder, "minutes")
    cut, _, _ = read_run(cut_folder, "minutes")
    assert cut["x"].tolist() == intact["x"].tolist()


def test_the_curves_show_the_logged_values(tmp_path):
    folder = write_run(tmp_path / "run", ROWS)
    figure = draw([folder], "tokens")
    loss, _, lr, norm, speed = figure.axes
    every, mean, val = loss.lines
    expected = [[200, 4], [400, 3], [800, 2]]
    assert list_points(every) == expected
    # three values are too few for a mean
    assert list_points(mean) == expected
    assert list_points(val) == [[0, 5.5], [400, 2.6], [800, 2.7]]
    text = figure.legends[0].get_texts()[0].get_text()
    assert "best 2.6000" in text
    for panel, key in (
        (lr, "lr"),
        (norm, "grad_norm"),
        (speed, "tokens_per_s"),
    ):
        values = panel.lines[0].get_ydata().tolist()
        assert values == [row[key] for row in STEPS]

    # nothing is cut off
    bottom, top = loss.get_ylim()
    assert bottom < 2
    assert top > 5.5


CARD = """# A run of keepGPT

```python
max_iters = 8
```

Data: name x

Branched from `out/step-00000001.pt`, step 1 (sha256 12ab).

## Starts

- 2026-11-28 16:55:10 UTC, step 1, 1 x cpu, float32: `train.py`; commit 1; Python 3
- 2026-11-28 16:56:10 UTC, step 4: `train.py "`; x"`; commit 1; Python 3
- 2026-11-28 16:57:10 UTC, step 6, 1 x cpu, float32: `train.py`; commit 1; Python 3
"""


def list_positions(mark) -> list:
    """Return the x of each vertical line."""
    return [x for (x, _), _ in mark.get_segments()]


def test_events_restarts_and_branches_are_marked(tmp_path):
    skip = {"step": 3, "event": "skip", "text": "loss nan"}
    replay = {"step": 6, "event": "replay", "text": "loss nan, and then 2"}
    # before the first logged step, between two, and after all
    rows = [skip | {"step": 1}, ROWS[1], skip, *ROWS[2:5], replay]
    folder = write_run(tmp_path / "run", rows)
    (folder / "README.md").write_text(CARD)
    loss = draw([folder], "tokens").axes[0]
    # by their names in the legend
    marks = {}
    for mark in loss.collections:
        label = mark.get_label().removeprefix(f"{folder}: ")
        marks[label] = mark
    assert marks.keys() == {"restart (2)", "branch (1)", "skip (2)", "replay (1)"}

    # vertical lines at the tokens of steps 4, 6 and 1
    assert list_positions(marks["restart (2)"]) == [400, 600]
    assert list_positions(marks["branch (1)"]) == [100]
    # on the line between the logged losses around it
    assert marks["skip (2)"].get_offsets().tolist() == [[100, 4], [300, 3.5]]
    assert marks["replay (1)"].get_offsets().tolist() == [[600, 2.5]]

    # the curves are those without the events
    plain_folder = write_run(tmp_path / "plain", ROWS[1:5])
    plain = draw([plain_folder], "tokens").axes[0]
    for line, plain_line in zip(loss.lines, plain.lines, strict=True):
        assert list_points(line) == list_points(plain_line)
    bottom, _ = loss.get_ylim()
    assert bottom > 1


def test_bits_per_byte_and_the_sources_of_a_mixture_are_drawn(tmp_path):
    more = {"val_bpb": 1.5, "val_loss/web": 2.5, "val_loss/code": 2.8}
    more |= {"val_bpb/web": 1.4, "val_bpb/code": 1.6, "text_bpb": 1.7}
    evaluation = EVALUATIONS[1] | more
    folder = write_run(tmp_path / "run", [STEPS[0], evaluation, *STEPS[1:]])
    loss, bpb = draw([folder], "steps").axes[:2]
    # all, the text, the sources in the order of their names
    points = [list_points(line) for line in bpb.lines]
    values = [1.5, 1.7, 1.6, 1.4]
    assert points == [[[4, value]] for value in values]
    # the first two lines are the training loss and its mean
    drawn = {line.get_label(): list_points(line) for line in loss.lines[2:]}
    assert drawn == {
        f"{folder}: val loss, best 2.6000 (1.5000 bits per byte)": [[4, 2.6]],
        f"{folder}: val loss of code": [[4, 2.8]],
        f"{folder}: val loss of web": [[4, 2.5]],
    }


def test_a_long_curve_is_smoothed(tmp_path):
    rows = []
    for i in range(100):
        rows.append(STEPS[0] | {"step": i + 1, "loss": i**2})
    folder = write_run(tmp_path / "run", rows)
    loss = draw([folder], "steps").axes[0]
    mean = loss.lines[1].get_xydata()
    # over three values, drawn at the last one
    assert np.allclose(mean[0], [3, (0 + 1 + 4) / 3])
    assert np.allclose(mean[1], [4, (1 + 4 + 9) / 3])
    assert len(mean) == 98


@pytest.mark.slow
def test_long_and_short_runs_are_drawn(tmp_path):
    runs = [
        write_run(tmp_path / "run", ROWS),
        write_run(tmp_path / "step", STEPS[:1]),
        write_run(tmp_path / "evaluation", EVALUATIONS[:1]),
    ]
    # together, and the two that have a single row
    for folders in (runs, runs[1:2], runs[2:]):
        target = tmp_path / f"{len(folders)}{folders[0].name}.png"
        done = run_plot(*folders, x="minutes", to=target, code=0)
        assert done.stdout == f"{target}\n"
        assert done.stderr == ""
        assert read_size(target) == (1400, 900)


def test_a_mistake_exits_2_with_one_line(tmp_path):
    folder = write_run(tmp_path / "run", ROWS)
    to = f"--to={tmp_path}/a.png"
    # no folder, and a missing one
    read_error(run_plot(to))
    read_error(run_plot(tmp_path / "nothing", to))
    # no JSON, a row without values, no object, an event without its step, a word for a number
    lines = [
        "}",
        '{"step": 1}',
        "7",
        '{"event": "skip"}',
        json.dumps(STEPS[0] | {"lr": "x"}),
    ]
    for i, line in enumerate(lines):
        corrupt = write_run(tmp_path / f"corrupt{i}", ROWS, f"{line}\n")
        # a long line is quoted from its start
        assert line[:40] in read_error(run_plot(corrupt, to))
    # an unknown flag, an unknown axis, a missing folder, an unknown format
    for flag in (
        "--too=a.png",
        "--x=miles",
        f"--to={tmp_path}/no/a.png",
        f"--to={tmp_path}/a.x",
    ):
        read_error(run_plot(folder, flag))
    assert not (tmp_path / "a.png").exists()


def test_drawing_without_matplotlib_exits_2(tmp_path):
    folder = write_run(tmp_path / "run", ROWS)
    done = run(PROGRAMS / "plot_without_matplotlib.py", folder, code=2)
    assert "pip install matplotlib" in read_error(done)
