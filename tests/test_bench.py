"""The tools that measure: what they say of mistakes, and of sides that fail."""
import ast
import json
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from conftest import REPO, complaint

import tools.gpu as gpu
from model import KVCache
from tools.bench import sides
from tools.bench.common import SHAPES, Ended, Side, start_sides, take_turns

torch.set_num_threads(1)  # models this small are slower on two


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def tool(*words: str) -> subprocess.CompletedProcess:
    """`python -m` with these words."""
    return subprocess.run([sys.executable, "-m", *words], cwd=REPO, capture_output=True, text=True)


@pytest.mark.parametrize("words, says", [
    (["tools.bench"], "expected one or more of train"),
    (["tools.bench", "startup", "--only=x"], "only train, sample, checkpoint have named rows"),
    (["tools.bench", "prepare", "--folder=/none"], "--folder=/none: no such folder"),
    (["tools.bench", "startup", "--json=/none/x"], "--json=/none/x: no such file or directory"),
    (["tools.gpu", "now"], "expected --key=value"),
    (["tools.gpu", "--rounds=2"], "unknown key 'rounds'"),
    (["tools.gpu", "--parts=trian"], "--parts=trian: expected names out of machine,checks"),
    (["tools.gpu"], "no CUDA device")])
def test_a_mistake_is_answered_with_a_line(words, says):
    assert says in complaint(tool(*words))


def test_a_peer_that_cannot_be_had_is_left_out():
    work = "(lambda: 0.5)"
    sides = start_sides(Side(work, as_script=False), one=work, other="1 / 0")
    assert take_turns(sides, rounds=1) == {"ours": 0.5, "one": 0.5}
    with pytest.raises(Ended, match="1 / 0 has ended with exit code 1"):
        Side("1 / 0", as_script=False)


def row(call: str) -> dict[str, str]:
    """A row of tools.gpu, its steps not repeated for a second."""
    sides.steps = lambda step, device: (step(), lambda: 0.001)[1]
    compile = torch.compile  # without waiting for a compiler
    torch.compile = lambda function, **_: compile(function, backend="eager")
    return eval(call, vars(gpu))


def test_every_measurement_of_the_gpu_tool_runs_in_small_on_a_cpu():
    rows = gpu.rows_of("cpu")
    calls = [call for part in ("machine", "train", "sample", "ways")
             for call in rows[part].values()]
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # ways change their process
        made = pool.map(row, calls, chunksize=1)
    assert len(made) == 15 and all(isinstance(value, str) for one in made for value in one.values())
    assert "TFLOP/s" in made[0]["matrix product"] and "tokens/s" in made[1]


def test_the_calls_for_a_gpu_are_those_that_a_cpu_tries():
    for part, calls in gpu.rows_of("cuda").items():
        tried = {call.split("(")[0] for call in gpu.rows_of("cpu")[part].values()}
        for call in calls.values():
            names = {node.id for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Name)}
            assert names <= vars(gpu).keys() and call.split("(")[0] in tried
            shapes = {node.value for node in ast.walk(ast.parse(call))
                      if isinstance(node, ast.Constant) and "layers" in str(node.value)}
            assert shapes <= SHAPES.keys()


def test_a_save_is_measured():
    with get_context("fork").Pool(1) as pool:
        stall = pool.apply(gpu.stall, ("4 layers, 128 wide", "cpu"))
    assert stall["keepGPT's save adds"].split()[1] == "ms" and stall["bundle"] == "10 MB"


@pytest.mark.parametrize("check", ["compare_decode", "branches", "blow_up", "snapshots"])
def test_a_check_of_the_gpu_tool_passes_on_a_cpu(check, monkeypatch):
    compile = torch.compile  # without waiting for a compiler
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, backend="eager"))
    with get_context("fork").Pool(1) as pool:  # it may set what only its process should have
        assert pool.apply(getattr(gpu, check), ("cpu",))["result"]


def test_a_decode_step_at_another_position_does_not_pass(monkeypatch):
    def late(model, cache):
        return lambda tokens: model(tokens, cache=KVCache(cache.layers, torch.tensor([12])))

    monkeypatch.setattr(gpu, "compile_decode", late)
    with pytest.raises(SystemExit, match="of the largest"):
        gpu.compare_decode("cpu")


def test_runs_that_differ_or_fail_do_not_pass(monkeypatch):
    ends = iter(range(9))
    monkeypatch.setattr(gpu, "ends", lambda _: next(ends))
    monkeypatch.setattr(gpu, "TINY", gpu.TINY | {"max_iters": 2, "eval_iters": 1})
    with pytest.raises(SystemExit, match="OTHER BITS"):
        gpu.resume("cpu")
    monkeypatch.setattr(gpu, "TINY", gpu.TINY | {"learning_rate": 1e38, "max_iters": 4})
    with pytest.raises(SystemExit, match="expected exit code 0, got 3"):
        gpu.resume("cpu")


def test_a_row_that_fails_leaves_the_others(monkeypatch, capsys, tmp_path):
    parts = {"checks": {"bad": "1 / 0", "good": "{'result': 'same bits'}"}, "ways": {"one": "{}"}}
    monkeypatch.setattr(gpu, "rows_of", lambda _: parts)
    file = tmp_path / "rows.jsonl"
    config = gpu.GpuConfig("checks,ways", device="cpu", json=str(file))
    assert gpu.main(config) == 1
    results = {row.get("checks"): row.get("result") for row in
               map(json.loads, file.read_text().splitlines())}
    assert results == {"bad": "FAILED: ZeroDivisionError: division by zero", "good": "same bits",
                       None: None}
    assert gpu.main(replace(config, only="good")) == 0
    assert gpu.main(replace(config, minutes=0)) == 0
    assert capsys.readouterr().out.count("no time is left") == 3
