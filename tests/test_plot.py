"""tools.plot: logs are read exactly, pictures show them, mistakes are refused, `pieces` runs."""
import json
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, complaint, run

from tools.plot.curves import draw, read_run, smooth

STEPS = [{"step": 2, "tokens": 200, "loss": 4.0, "lr": 0.1, "grad_norm": 9.0, "tokens_per_s": 100},
         {"step": 4, "tokens": 400, "loss": 3.0, "lr": 0.2, "grad_norm": 8.0, "tokens_per_s": 50},
         {"step": 8, "tokens": 800, "loss": 2.0, "lr": 0.3, "grad_norm": 7.0, "tokens_per_s": 400,
          "mfu": 0.5}]
SECONDS = [2, 6, 7]  # 200 tokens at 100 a second, 200 at 50, 400 at 400
EVALUATIONS = [{"step": 0, "train_loss": 5.0, "val_loss": 5.5},
               {"step": 4, "train_loss": 2.5, "val_loss": 2.6},
               {"step": 8, "train_loss": 2.0, "val_loss": 2.7}]
ROWS = [EVALUATIONS[0], *STEPS[:2], EVALUATIONS[1], STEPS[2], EVALUATIONS[2]]


def written(folder: Path, rows: list, more: str = "") -> Path:
    """Return a run's folder whose log has those rows and then `more`."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + more
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def old(rows: list[dict]) -> list[dict]:
    """Return rows without `tokens`."""
    return [{key: value for key, value in row.items() if key != "tokens"} for row in rows]


def plot(*args: object, code: int | None = None, **flags: object) -> subprocess.CompletedProcess:
    """Run `python -m tools.plot`."""
    return run("tools.plot", *args, code=code, **flags)


def size(path: Path) -> tuple[int, int]:
    """Return width and height from the header of a PNG."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:])


def test_a_log_is_read_exactly(tmp_path):
    run = read_run(written(tmp_path / "run", ROWS))
    for key in STEPS[0]:
        assert getattr(run, key).tolist() == [row[key] for row in STEPS]
    assert np.allclose(run.hours * 3600, SECONDS)
    assert run.val_step.tolist() == [0, 4, 8] and run.val_loss.tolist() == [5.5, 2.6, 2.7]
    at, val_at = run.x("hours")
    assert np.allclose(val_at * 3600, [0, 6, 7])  # an evaluation takes none of the hours


def test_a_truncated_last_line_is_skipped(tmp_path):
    whole = read_run(written(tmp_path / "whole", ROWS))
    cut = read_run(written(tmp_path / "cut", ROWS, '{"step": 9, "tok'))
    assert cut.step.tolist() == whole.step.tolist() and cut.hours.tolist() == whole.hours.tolist()


def test_logs_without_tokens_plot_by_steps(tmp_path):
    mixed = read_run(written(tmp_path / "mixed", [*old(STEPS[:2]), STEPS[2]]))
    assert mixed.tokens.tolist() == [200, 400, 800] and np.allclose(mixed.hours * 3600, SECONDS)
    none = written(tmp_path / "none", old(ROWS))
    plot(none, to=tmp_path / "a.png", code=0)
    for axis in ("tokens", "hours"):
        assert "--x=steps" in complaint(plot(none, f"--x={axis}", f"--to={tmp_path}/a.png"))


def test_smooth_averages_neighbours():
    assert np.allclose(smooth(np.array([0, 3, 6, 0.]), 3), [1.5, 3, 3, 3])
    assert np.allclose(smooth(np.array([4, 8.]), 1), [4, 8])


def test_the_curves_show_the_logged_values(tmp_path):
    figure = draw([read_run(written(tmp_path / "run", ROWS))], "tokens")
    loss, lr, norm, speed = figure.axes
    every, mean, val, star = [line.get_xydata().tolist() for line in loss.lines[:4]]
    assert every == mean == [[200, 4], [400, 3], [800, 2]]
    assert val == [[0, 5.5], [400, 2.6], [800, 2.7]] and star == [[400, 2.6]]
    assert "best val loss 2.6000 at step 4" in figure.legends[0].get_texts()[0].get_text()
    for panel, key in ((lr, "lr"), (norm, "grad_norm"), (speed, "tokens_per_s")):
        assert panel.lines[0].get_ydata().tolist() == [row[key] for row in STEPS]
        assert panel.get_ylim()[0] == 0
    assert loss.get_ylim()[0] < 2 and loss.get_ylim()[1] > 5.5  # nothing is cut off


def test_long_and_short_runs_are_drawn(tmp_path):
    runs = [written(tmp_path / "run", ROWS), written(tmp_path / "step", STEPS[:1]),
            written(tmp_path / "evaluation", EVALUATIONS[:1])]
    for folders in (runs, runs[1:2], runs[2:]):
        target = tmp_path / f"{len(folders)}{folders[0].name}.png"
        done = plot(*folders, x="hours", to=target, code=0)
        assert (done.stdout, done.stderr) == (f"{target}\n", "")
        assert size(target) == (1400, 900)


def test_a_mistake_exits_2_with_one_line(tmp_path):
    folder, to = written(tmp_path / "run", ROWS), f"--to={tmp_path}/a.png"
    assert "out_dir" in complaint(plot(to))
    assert "metrics.jsonl: no such file" in complaint(plot(tmp_path / "nothing", to))
    assert "no row yet" in complaint(plot(written(tmp_path / "empty", []), to))
    for number, line in enumerate(("}", '{"step": 1}', "7", json.dumps(STEPS[0] | {"lr": "x"}))):
        damaged = written(tmp_path / f"damaged{number}", ROWS, f"{line}\n")
        assert "metrics.jsonl:7 " in complaint(plot(damaged, to))
    assert "did you mean to" in complaint(plot(folder, "--too=a.png"))
    assert "--x=miles" in complaint(plot(folder, "--x=miles"))
    assert "no such file" in complaint(plot(folder, f"--to={tmp_path}/no/a.png"))
    assert ".png" in complaint(plot(folder, f"--to={tmp_path}/a.svg"))
    assert "prepare.py nowhere" in complaint(plot("pieces", "--dataset=nowhere", to))
    assert not (tmp_path / "a.png").exists()


def test_drawing_without_matplotlib_exits_2(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(REPO)!r})\n"
                       "sys.modules['matplotlib'] = None\n"
                       "from tools.plot.__main__ import main\nmain(sys.argv[1:])\n")
    folder = written(tmp_path / "run", ROWS)
    assert "pip install matplotlib" in complaint(run(program, folder, code=2))


@pytest.fixture(scope="module")
def pieces(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Return the picture of a tiny run of `pieces` and its table as {piece: [val loss, difference,
    end]}."""
    target = tmp_path_factory.mktemp("pieces") / "pieces.png"
    done = plot("pieces", steps=4, dataset=dataset, to=target, code=0)
    assert done.stderr == ""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    return target, {name: rest for name, *rest in cells[2:-1]}


@pytest.mark.slow
def test_a_run_resumed_without_a_piece_differs(pieces):
    target, table = pieces
    assert size(target) == (1400, 950)
    never = table.pop("never stopped")
    val_loss, difference, end = table.pop("whole")
    assert (val_loss, float(difference), end) == (never[0], 0, "the same bits")
    assert list(table) == ["without the moments", "without the step", "without the RNG",
                           "without the data position"]
    for _, difference, end in table.values():
        assert float(difference) > 0 and end == "other bits"
