"""tools.bench and tools.gpu measure, compare and record; tools.demo answers --help."""

import json
import os
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from conftest import read_error, run

from keepgpt.errors import UserError
from model import build_model
from tools import gpu, measure
from tools.bench import __main__ as bench
from tools.bench import parts, sides
from tools.crash.checks import CHECKS

# models this small are slower on two threads
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Give the processes that a test starts one thread each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    "args",
    [
        ["tools.bench"],
        ["tools.bench", "nosuch"],
        ["tools.bench", "checks"],
        ["tools.bench", "train", "--only=nosuch"],
        ["tools.bench", "tables", "--rows=2"],
        ["tools.gpu", "now"],
        ["tools.gpu", "--row=2"],
        ["tools.gpu", "--parts=trian"],
        ["tools.gpu", "--parts=checks"],
        ["tools.demo", "--fast"],
    ],
    ids=" ".join,
)
def test_a_mistake_exits_2_with_one_line(args):
    read_error(run(*args, code=2))


def test_demo_help_exits_0():
    done = run("tools.demo", "--help")
    assert "usage" in done.stdout


@pytest.mark.parametrize("page", measure.PAGES, ids=lambda page: page.name)
def test_tables_match_the_records(page):
    text = page.read_text(encoding="utf-8")
    # without a place for a table the test would show nothing
    assert "<!-- measured: " in text
    records = measure.read_records()
    assert measure.update_page(text, records) == text


def test_every_record_is_of_a_row():
    for part, rows in measure.read_records().items():
        # tools.gpu has rows of its own
        if not part.startswith("gpu "):
            assert rows.keys() <= parts.PARTS[part].keys()
        for row in rows.values():
            assert row.keys() == {"date", "torch", "machine", "numbers"}


def test_a_record_replaces_its_row_only(tmp_path):
    file = tmp_path / "measured.json"
    machine = {"machine": "a CPU"}
    measure.record(file, "train", "a", {"x, ms": 1.23456, "y": 2}, machine)
    measure.record(file, "train", "b", {"x, ms": 1000.4}, machine)
    measure.record(file, "train", "a", {"x, ms": 3.0}, machine)
    # four digits are kept
    records = measure.read_records(file)
    assert records == {
        "train": {
            "a": {"machine": "a CPU", "numbers": {"x, ms": 3.0}},
            "b": {"machine": "a CPU", "numbers": {"x, ms": 1000.0}},
        }
    }

    text = "a\n<!-- measured: train -->\nold\n<!-- end -->\nb\n"
    page = measure.update_page(text, records)
    # before them are the line "a" and the comment
    assert page.split("\n")[2:6] == [
        "| train | machine | x, ms |",
        "|---|---|---|",
        "| a | a CPU | 3 |",
        "| b | a CPU | 1,000 |",
    ]


def fail():
    """Fail as a side does whose package is missing."""
    raise UserError("not installed")


def test_a_side_that_fails_is_left_out():
    half = partial(float, 0.5)
    quarter = partial(float, 0.25)
    # each side returns the seconds that it took
    row = measure.compare(2, {"ours": half, "one": quarter, "other": fail})
    assert row == {"ours, ms": 500, "one, ms": 250, "one / ours": 0.5}

    # without the first side there is nothing to compare with
    with pytest.raises(UserError):
        measure.compare(1, {"ours": fail, "one": quarter})


def test_work_in_a_new_process_returns_or_fails():
    # a result travels as JSON, which has no tuples
    assert measure.call(partial(divmod, 7, 2)) == [3, 1]
    with pytest.raises(UserError, match="ZeroDivisionError"):
        measure.call(partial(divmod, 7, 0))


def count_parameters(model):
    """Return the number of parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def test_transformers_qwen3_has_as_many_parameters():
    name = "Qwen3 and Muon, 4 layers, width 128"
    _, args = sides.make_settings(name)
    transformers_model = sides.make_transformers(name)
    assert count_parameters(transformers_model) == count_parameters(build_model(args))


def time_one_step(step, device):
    """Replace sides.time_steps: make one step, and say that it took a millisecond."""
    step()
    return 0.001


def call_in_small(work):
    """Do work with steps that are not repeated."""
    sides.time_steps = time_one_step
    return work()


def call_in_fork(work, time_limit=None):
    """Replace measure.call."""
    # a side may change its process
    with get_context("fork").Pool(1) as pool:
        return pool.apply(call_in_small, (work,))


SIX_LAYERS = "6 layers, width 384"
FOUR_LAYERS = "4 layers, width 128"
WORK = {
    "train": partial(parts.measure_step, SIX_LAYERS),
    "sample": partial(parts.measure_sampling, FOUR_LAYERS),
    "checkpoint": partial(parts.measure_save, SIX_LAYERS),
    "elastic": partial(parts.measure_elastic, 1),
}
# the titles of the numbers of each part, without their units
TITLES = {
    "train": {
        "keepGPT",
        "plain PyTorch",
        "Transformers",
        "optimizer's share",
        "tokens/s",
    },
    "sample": {"keepGPT", "Transformers", "tokens/s"},
    "checkpoint": {"checkpoint", "plain `torch.save` adds", "its write"},
    "elastic": {"DDP", "elastic"},
}


@pytest.mark.slow
@pytest.mark.parametrize("part", WORK)
def test_a_part_gives_numbers(part, monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "call", call_in_fork)
    # the six layers would take minutes
    tiny = sides.shape(1, 2, 128, 16, 4, 65, **sides.MODERN)
    monkeypatch.setitem(sides.SHAPES, SIX_LAYERS, tiny)
    row = WORK[part](1, "cpu", tmp_path)
    titles = {title.split(",")[0] for title in row}
    assert titles >= TITLES[part]
    for value in row.values():
        assert isinstance(value, float)


@pytest.mark.slow
def test_an_avx2_row_limits_all_its_processes(monkeypatch, tmp_path):
    # set here, so they are restored after the test
    for name in parts.AVX2:
        monkeypatch.setenv(name, "")
    capability = partial(torch.backends.cpu.get_cpu_capability)
    monkeypatch.setattr(parts, "measure_step", lambda *_: measure.call(capability))
    row = parts.PARTS["train"]["4 layers, width 128, AVX2"]
    # DEFAULT: a processor that lacks AVX2
    assert row(1, "cpu", tmp_path) in ("AVX2", "DEFAULT")
    for name, value in parts.AVX2.items():
        assert os.environ[name] == value


@pytest.fixture
def measured(monkeypatch):
    """Run tools.gpu on a CPU and on a GPU without measuring. Return the rows of each part."""
    rows_of_parts = {}

    def record_rows(part, rows, *args, **kwargs):
        rows_of_parts[part] = rows
        return True

    monkeypatch.setattr(bench, "pick_device", torch.device)
    monkeypatch.setattr(measure, "describe_machine", lambda _: {})
    monkeypatch.setattr(measure, "run_rows", record_rows)
    # the names of a GPU's parts start with "gpu "
    for device in ("cpu", "cuda:0"):
        config = gpu.GpuConfig(device=device)
        assert gpu.main(config, []) == 0
    return rows_of_parts


def test_rows_for_a_gpu_are_shapes(measured):
    assert measured["gpu train"].keys() == sides.SHAPES.keys()
    # only a GPU is fast enough for the larger batches
    assert any("batch 64" in name for name in measured["gpu train"])
    assert not any("batch 64" in name for name in measured["train"])


def test_checks_of_a_gpu_run_on_its_device(measured):
    checks = measured["gpu checks"]
    assert checks.keys() == CHECKS.keys()
    for check in checks.values():
        assert check.args[2] == "cuda:0"


def test_a_row_that_fails_leaves_the_others(tmp_path):
    path = tmp_path / "rows.json"
    good = {"good": dict}
    work = {"bad": partial(divmod, 7, 0)} | good
    # one minute, and two rows at a time
    assert not measure.run_rows("checks", work, path, {}, 1, workers=2)
    rows = {"checks": {"good": {"numbers": {}}}}
    assert json.loads(path.read_text()) == rows

    # without time a row fails, with a minute it passes
    assert not measure.run_rows("checks", good, path, {}, 0, workers=1)
    assert measure.run_rows("checks", good, path, {}, 1, workers=1)
    assert json.loads(path.read_text()) == rows
