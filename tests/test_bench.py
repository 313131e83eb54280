"""tools.bench and tools.gpu measure, compare and record; tools.demo answers --help."""

import json
import os
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from conftest import complaint, run

from keepgpt.errors import UserError
from model import build_model
from tools import gpu, measure
from tools.bench import __main__ as bench
from tools.bench import parts, sides
from tools.crash.checks import CHECKS

torch.set_num_threads(1)  # models this small are slower on two


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
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
)
def test_a_mistake_exits_2_with_one_line(args):
    complaint(run(*args, code=2))


def test_demo_help_exits_0():
    assert "usage" in run("tools.demo", "--help").stdout


@pytest.mark.parametrize("page", measure.PAGES, ids=lambda page: page.name)
def test_tables_match_the_records(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- measured: " in text
    assert measure.update_page(text, measure.read_records()) == text


def test_every_record_is_of_a_row():
    for part, rows in measure.read_records().items():
        assert part.startswith("gpu ") or rows.keys() <= parts.PARTS[part].keys()
        for row in rows.values():
            assert row.keys() == {"date", "torch", "machine", "numbers"}


def test_a_record_replaces_its_row_only(tmp_path):
    file, machine = tmp_path / "measured.json", {"machine": "a CPU"}
    measure.record(file, "train", "a", {"x, ms": 1.23456, "y": 2}, machine)
    measure.record(file, "train", "b", {"x, ms": 1000.4}, machine)
    measure.record(file, "train", "a", {"x, ms": 3.0}, machine)
    records = measure.read_records(file)
    assert records == {
        "train": {
            "a": {"machine": "a CPU", "numbers": {"x, ms": 3.0}},
            "b": {"machine": "a CPU", "numbers": {"x, ms": 1000.0}},
        }
    }
    page = measure.update_page(
        "a\n<!-- measured: train -->\nold\n<!-- end -->\nb\n", records
    )
    assert page.split("\n")[2:6] == [
        "| train | machine | x, ms |",
        "|---|---|---|",
        "| a | a CPU | 3 |",
        "| b | a CPU | 1,000 |",
    ]


def fail():
    raise UserError("not installed")


def test_a_side_that_fails_is_left_out():
    row = measure.compare(2, {"ours": lambda: 0.5, "one": lambda: 0.25, "other": fail})
    assert row == {"ours, ms": 500, "one, ms": 250, "one / ours": 0.5}
    with pytest.raises(UserError):
        measure.compare(1, {"ours": fail, "one": lambda: 0.25})


def test_work_in_a_new_process_returns_or_fails():
    assert measure.call(partial(divmod, 7, 2)) == [3, 1]
    with pytest.raises(UserError, match="ZeroDivisionError"):
        measure.call(partial(divmod, 7, 0))


def test_transformers_qwen3_has_as_many_parameters():
    name = "Qwen3 and Muon, 4 layers, width 128"
    sizes = [
        sum(p.numel() for p in network.parameters())
        for network in (
            sides.make_transformers(name),
            build_model(sides.make_settings(name)[1]),
        )
    ]
    assert sizes[0] == sizes[1]


def call_in_small(work):
    """Do work with steps that are not repeated."""
    sides.time_steps = lambda step, device: (step(), 0.001)[1]
    return work()


def call_in_fork(work, time_limit=None):
    """Replace measure.call."""
    with get_context("fork").Pool(1) as pool:  # a side may change its process
        return pool.apply(call_in_small, (work,))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "sample", "checkpoint", "elastic"])
def test_a_part_gives_numbers(part, monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "call", call_in_fork)
    tiny = sides.shape(1, 2, 128, 16, 4, 65, **sides.MODERN)
    monkeypatch.setitem(sides.SHAPES, "6 layers, width 384", tiny)
    work = {
        "train": partial(parts.measure_step, "6 layers, width 384"),
        "sample": partial(parts.measure_sampling, "4 layers, width 128"),
        "checkpoint": partial(parts.measure_save, "6 layers, width 384"),
        "elastic": partial(parts.measure_elastic, 1),
    }[part]
    row = work(1, "cpu", tmp_path)
    assert {title.split(",")[0] for title in row} >= {
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
    }[part]
    assert all(isinstance(value, float) for value in row.values())


def test_an_avx2_row_limits_all_its_processes(monkeypatch, tmp_path):
    for name in parts.AVX2:
        monkeypatch.setenv(name, "")  # restored after the test
    capability = partial(torch.backends.cpu.get_cpu_capability)
    monkeypatch.setattr(parts, "measure_step", lambda *_: measure.call(capability))
    row = parts.PARTS["train"]["4 layers, width 128, AVX2"]
    assert row(1, "cpu", tmp_path) in ("AVX2", "DEFAULT")
    assert all(os.environ[name] == value for name, value in parts.AVX2.items())


def test_rows_for_a_gpu_are_shapes(monkeypatch):
    measured = {}
    monkeypatch.setattr(bench, "pick_device", torch.device)
    monkeypatch.setattr(measure, "describe_machine", lambda _: {})
    monkeypatch.setattr(
        measure,
        "run_rows",
        lambda part, rows, *args, **how: measured.update({part: rows}) or True,
    )
    for device in ("cpu", "cuda:0"):
        assert gpu.main(gpu.GpuConfig(device=device), []) == 0
    assert measured["gpu train"].keys() == sides.SHAPES.keys()
    assert any("batch 64" in name for name in measured["gpu train"])
    assert not any("batch 64" in name for name in measured["train"])
    assert measured["gpu checks"].keys() == CHECKS.keys()
    assert all(work.args[2] == "cuda:0" for work in measured["gpu checks"].values())


def test_a_row_that_fails_leaves_the_others(tmp_path):
    path, work = tmp_path / "rows.json", {"bad": partial(divmod, 7, 0), "good": dict}
    assert not measure.run_rows("checks", work, path, {}, 1, workers=2)
    rows = {"checks": {"good": {"numbers": {}}}}
    assert json.loads(path.read_text()) == rows
    assert not measure.run_rows("checks", {"good": dict}, path, {}, 0, workers=1)
    assert measure.run_rows("checks", {"good": dict}, path, {}, 1, workers=1)
    assert json.loads(path.read_text()) == rows
