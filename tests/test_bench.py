"""tools.bench and tools.gpu measure, compare and record; tools.demo answers --help."""
import json
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from conftest import complaint, run

import tools.gpu as gpu
from keepgpt.process import UserError
from model import GPT, KVCache
from tools import measure
from tools.bench import parts, sides

torch.set_num_threads(1)  # models this small are slower on two


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("args", [
    ["tools.bench"], ["tools.bench", "nosuch"], ["tools.bench", "startup", "--only=x"],
    ["tools.bench", "prepare", "--folder=/none"], ["tools.bench", "tables", "--rows=2"],
    ["tools.gpu", "now"], ["tools.gpu", "--row=2"], ["tools.gpu", "--parts=trian"],
    ["tools.gpu", "--parts=checks"], ["tools.demo", "--fast"]])
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
    file, machine = tmp_path / "measured.json", {"date": "today"}
    measure.record(file, "train", "a", {"x, ms": 1.23456, "y": 2}, machine)
    measure.record(file, "train", "b", {"x, ms": 1000.4}, machine)
    measure.record(file, "train", "a", {"x, ms": 3.0}, machine)
    records = measure.read_records(file)
    assert records == {"train": {"a": {"date": "today", "numbers": {"x, ms": 3.0}},
                                 "b": {"date": "today", "numbers": {"x, ms": 1000.0}}}}
    page = measure.update_page("a\n<!-- measured: train -->\nold\n<!-- end -->\nb\n", records)
    assert page.split("\n")[2:6] == ["| train | x, ms |", "|---|---|", "| a | 3 |", "| b | 1,000 |"]


def test_a_side_that_fails_is_left_out():
    assert measure.compare(2, "0.5", one="0.25", other="1 / 0") == {"ours": 0.5, "one": 0.25}
    with pytest.raises(UserError, match="ZeroDivisionError"):
        measure.compare(1, "1 / 0")


def test_transformers_qwen3_has_as_many_parameters():
    name = "Qwen3 and Muon, 4 layers, width 128"
    sizes = [sum(p.numel() for p in network.parameters()) for network in
             (sides.make_transformers(name), GPT(sides.make_settings(name)[1]))]
    assert sizes[0] == sizes[1]


def call_in_small(expression: str) -> object:
    """Evaluate an expression as measure.call does, with steps that are not repeated."""
    sides.time_steps = lambda step, device: (step(), 0.001)[1]
    compile = torch.compile  # without waiting for a compiler
    torch.compile = lambda f, **how: compile(f, backend="eager")
    return eval(expression, {"gpu": gpu, "parts": parts, "sides": sides})


def call_in_fork(expression: str, as_script: bool = True) -> object:
    """Replace measure.call."""
    with get_context("fork").Pool(1) as pool:  # a side may change its process
        return pool.apply(call_in_small, (expression,))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "sample", "checkpoint"])
def test_a_part_measures_each_side(part, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "call", call_in_fork)
    config = parts.BenchConfig(rounds=1, device="cpu", folder=str(tmp_path))
    monkeypatch.setitem(parts.PARTS, "checkpoint", {"4 layers, width 128": lambda *args:
                        parts.measure_save("4 layers, width 128", *args)})
    row = parts.measure(part, "4 layers, width 128", config)
    assert {title.split(",")[0] for title in row} >= {
        "train": {"keepGPT", "plain PyTorch", "Transformers", "tokens/s"},
        "sample": {"keepGPT", "Transformers"},
        "checkpoint": {"checkpoint", "plain `torch.save` adds", "its write"}}[part]
    assert all(isinstance(value, float) for value in row.values())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["loader", "startup", "elastic"])
def test_a_part_gives_numbers(part, tmp_path):
    row, config = [*parts.PARTS[part]][0], parts.BenchConfig(1, device="cpu", folder=str(tmp_path))
    assert all(value >= 0 for value in parts.measure(part, row, config).values())


def test_rows_for_a_gpu_are_shapes(monkeypatch):
    monkeypatch.setattr(parts, "pick_device", torch.device)
    for part in gpu.MEASURED:
        calls = gpu.list_calls(part, gpu.GpuConfig())
        assert calls.keys() <= sides.SHAPES.keys()
        assert all("device='cuda'" in call for call in calls.values())
    assert any("batch 64" in name for name in gpu.list_calls("train", gpu.GpuConfig()))
    assert not any("batch 64" in name for name in
                   gpu.list_calls("train", gpu.GpuConfig(device="cpu")))


def test_compiled_decode_steps_pass_on_a_cpu():
    assert call_in_fork("gpu.compare_decode('cpu')")


@pytest.mark.slow
@pytest.mark.parametrize("check", ["blow_up", "snapshots", "resume"])
def test_a_check_with_real_runs_passes_on_a_cpu(check):
    kill = ", kill=True" if check == "resume" else ""
    assert call_in_fork(f"gpu.{check}('cpu'{kill})")


def test_a_decode_step_at_another_position_fails(monkeypatch):
    def compile_late(model, cache):
        return lambda tokens: model(tokens, cache=KVCache(cache.layers, torch.tensor([12])))

    monkeypatch.setattr(gpu, "compile_decode", compile_late)
    with pytest.raises(UserError):
        gpu.compare_decode("cpu")


@pytest.mark.slow
def test_runs_that_differ_or_fail_are_noticed(monkeypatch):
    ends = iter(range(9))
    monkeypatch.setattr(gpu.runs, "read_end", lambda _: next(ends))
    monkeypatch.setattr(gpu, "TINY", gpu.TINY | {"max_iters": 2, "eval_iters": 1})
    with pytest.raises(UserError, match="differ"):
        gpu.resume("cpu")
    monkeypatch.setattr(gpu, "TINY", gpu.TINY | {"learning_rate": 1e38, "max_iters": 4})
    with pytest.raises(UserError, match="got 3"):
        gpu.resume("cpu")


def test_a_row_that_fails_leaves_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "CHECKS", {"bad": "nosuch()", "good": "Path().__dir__() and {}"})
    config = gpu.GpuConfig("checks", device="cpu", json=str(tmp_path / "rows.json"))
    assert gpu.main(config) == 1
    rows = json.loads((tmp_path / "rows.json").read_text())["gpu checks"]
    assert rows.keys() == {"good"} and rows["good"]["numbers"] == {}
    assert gpu.main(replace(config, only="good")) == 0
    assert gpu.main(replace(config, minutes=0)) == 0
    assert json.loads((tmp_path / "rows.json").read_text())["gpu checks"] == rows
