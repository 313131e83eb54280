"""tools.plot reads logs exactly, draws them, and answers mistakes with a line."""

import json
import struct
import subprocess
from pathlib import Path

import numpy as np
from conftest import REPO, complaint, run

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
SECONDS = [2, 6, 7]  # 200 tokens at 100 a second, 200 at 50, 400 at 400
EVALUATIONS = [
    {"step": 0, "train_loss": 5.0, "val_loss": 5.5},
    {"step": 4, "train_loss": 2.5, "val_loss": 2.6},
    {"step": 8, "train_loss": 2.0, "val_loss": 2.7},
]
ROWS = [EVALUATIONS[0], *STEPS[:2], EVALUATIONS[1], STEPS[2], EVALUATIONS[2]]


def written(folder: Path, rows: list, more: str = "") -> Path:
    """Return a run's folder whose log has those rows and then `more`."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + more
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def plot(
    *args: object, code: int | None = None, **flags: object
) -> subprocess.CompletedProcess:
    """Run `python -m tools.plot`."""
    return run("tools.plot", *args, code=code, **flags)


def size(path: Path) -> tuple[int, int]:
    """Return width and height from the header of a PNG."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:])


def test_a_log_is_read_exactly(tmp_path):
    logged, evaluated, _ = read_run(written(tmp_path / "run", ROWS), "minutes")
    for key in STEPS[0]:
        assert logged[key].tolist() == [row[key] for row in STEPS]
    assert evaluated["step"].tolist() == [0, 4, 8]
    assert evaluated["val_loss"].tolist() == [5.5, 2.6, 2.7]
    assert np.allclose(logged["x"] * 60, SECONDS)
    assert np.allclose(evaluated["x"] * 60, [0, 6, 7])  # an evaluation takes no time


def test_the_minutes_of_a_branch_start_at_its_trunk(tmp_path):
    folder = written(tmp_path / "run", ROWS[1:])
    (folder / "README.md").write_text(CARD)
    # step 1 is the trunk's: the first row, of step 2, has 100 tokens of this run
    logged, evaluated, marks = read_run(folder, "minutes")
    assert np.allclose(logged["x"] * 60, [1, 5, 6])
    assert np.allclose(evaluated["x"] * 60, [5, 6])
    assert marks["branch"].tolist() == [0]


def test_a_truncated_last_line_is_skipped(tmp_path):
    whole, *_ = read_run(written(tmp_path / "whole", ROWS), "minutes")
    cut, *_ = read_run(written(tmp_path / "cut", ROWS, '{"step": 9, "tok'), "minutes")
    assert cut["x"].tolist() == whole["x"].tolist()


def test_the_curves_show_the_logged_values(tmp_path):
    figure = draw([written(tmp_path / "run", ROWS)], "tokens")
    loss, lr, norm, speed = figure.axes
    every, mean, val = [line.get_xydata().tolist() for line in loss.lines]
    assert every == mean == [[200, 4], [400, 3], [800, 2]]
    assert val == [[0, 5.5], [400, 2.6], [800, 2.7]]
    assert "best 2.6000" in figure.legends[0].get_texts()[0].get_text()
    for panel, key in ((lr, "lr"), (norm, "grad_norm"), (speed, "tokens_per_s")):
        assert panel.lines[0].get_ydata().tolist() == [row[key] for row in STEPS]
    assert loss.get_ylim()[0] < 2 and loss.get_ylim()[1] > 5.5  # nothing is cut off


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


def test_events_restarts_and_branches_are_marked(tmp_path):
    events = [
        {"step": 3, "event": "skip", "text": "loss nan"},
        {"step": 6, "event": "replay", "text": "loss nan, and then 2"},
    ]
    # before the first logged step, between two, and after all
    rows = [events[0] | {"step": 1}, ROWS[1], events[0], *ROWS[2:5], events[1]]
    folder = written(tmp_path / "run", rows)
    (folder / "README.md").write_text(CARD)
    loss = draw([folder], "tokens").axes[0]
    marks = {
        mark.get_label().removeprefix(f"{folder}: "): mark for mark in loss.collections
    }
    assert marks.keys() == {"restart (2)", "branch (1)", "skip (2)", "replay (1)"}
    for kind, places in (("restart (2)", [400, 600]), ("branch (1)", [100])):
        assert [x for (x, _), _ in marks[kind].get_segments()] == places
    # on the line between the logged losses around it
    assert marks["skip (2)"].get_offsets().tolist() == [[100, 4], [300, 3.5]]
    assert marks["replay (1)"].get_offsets().tolist() == [[600, 2.5]]
    # the curves are those without the events
    plain = draw([written(tmp_path / "plain", ROWS[1:5])], "tokens").axes[0]
    for line, other in zip(loss.lines, plain.lines, strict=True):
        assert line.get_xydata().tolist() == other.get_xydata().tolist()
    assert loss.get_ylim()[0] > 1


def test_bits_per_byte_and_the_sources_of_a_mixture_are_drawn(tmp_path):
    more = {"val_bpb": 1.5, "val_loss/web": 2.5, "val_loss/code": 2.8}
    folder = written(tmp_path / "run", [STEPS[0], EVALUATIONS[1] | more, *STEPS[1:]])
    loss = draw([folder], "steps").axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in loss.lines[2:]}
    assert drawn == {
        f"{folder}: val loss, best 2.6000 (1.5000 bits per byte)": [[4, 2.6]],
        f"{folder}: val loss of code": [[4, 2.8]],
        f"{folder}: val loss of web": [[4, 2.5]],
    }


def test_a_long_curve_is_smoothed(tmp_path):
    rows = [
        STEPS[0] | {"step": i + 1, "loss": i**2} for i in range(100)
    ]  # over three values
    mean = (
        draw([written(tmp_path / "run", rows)], "steps").axes[0].lines[1].get_xydata()
    )
    assert np.allclose(mean[:2], [[3, 5 / 3], [4, 14 / 3]]) and len(mean) == 98


def test_long_and_short_runs_are_drawn(tmp_path):
    runs = [
        written(tmp_path / "run", ROWS),
        written(tmp_path / "step", STEPS[:1]),
        written(tmp_path / "evaluation", EVALUATIONS[:1]),
    ]
    for folders in (runs, runs[1:2], runs[2:]):
        target = tmp_path / f"{len(folders)}{folders[0].name}.png"
        done = plot(*folders, x="minutes", to=target, code=0)
        assert (done.stdout, done.stderr) == (f"{target}\n", "")
        assert size(target) == (1400, 900)


def test_a_mistake_exits_2_with_one_line(tmp_path):
    folder, to = written(tmp_path / "run", ROWS), f"--to={tmp_path}/a.png"
    complaint(plot(to))
    complaint(plot(tmp_path / "nothing", to))
    for number, line in enumerate(
        (
            "}",
            '{"step": 1}',
            "7",
            '{"event": "skip"}',
            json.dumps(STEPS[0] | {"lr": "x"}),
        )
    ):
        corrupt = written(tmp_path / f"corrupt{number}", ROWS, f"{line}\n")
        assert line[:40] in complaint(plot(corrupt, to))
    for flag in (
        "--too=a.png",
        "--x=miles",
        f"--to={tmp_path}/no/a.png",
        f"--to={tmp_path}/a.x",
    ):
        complaint(plot(folder, flag))
    assert not (tmp_path / "a.png").exists()


def test_drawing_without_matplotlib_exits_2(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(REPO)!r})\n"
        "sys.modules['matplotlib.pyplot'] = None\n"
        f"runpy.run_path({str(REPO / 'tools/plot.py')!r}, run_name='__main__')\n"
    )
    folder = written(tmp_path / "run", ROWS)
    assert "pip install matplotlib" in complaint(run(program, folder, code=2))
