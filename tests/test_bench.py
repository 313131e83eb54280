"""The tools that measure: what they say of mistakes, and of sides that fail."""
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, complaint

import tools.gpu as gpu
from tools.bench.common import Ended, Side, started, take_turns


def tool(*words: str) -> subprocess.CompletedProcess:
    """`python -m` with these words."""
    return subprocess.run([sys.executable, "-m", *words], cwd=REPO, capture_output=True, text=True)


@pytest.mark.parametrize("words, says", [
    (["tools.bench"], "name what to measure"),
    (["tools.bench", "startup", "--only=x"], "only train, sample, checkpoint, ways have rows"),
    (["tools.bench", "prepare", "--folder=/none"], "--folder=/none is no folder"),
    (["tools.bench", "startup", "--json=/none/x"], "--json=/none/x: no such file or directory"),
    (["tools.gpu", "now"], "a flag is written --key=value"),
    (["tools.gpu", "--rounds=2"], "unknown key 'rounds'")])
def test_a_mistake_is_answered_with_a_line(words, says):
    assert says in complaint(tool(*words))


def test_a_peer_that_cannot_be_had_is_left_out():
    work = "(lambda: 0.5)"
    sides = started(Side(work, as_a_script=False), one=work, other="1 / 0")
    assert take_turns(sides, rounds=1) == {"ours": 0.5, "one": 0.5}
    with pytest.raises(Ended, match="1 / 0 has ended with exit code 1"):
        Side("1 / 0", as_a_script=False)


def test_a_run_that_fails_on_the_gpu_does_not_count_as_exact(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "CASES", ({"dtype": "float32", "compile": False},))
    monkeypatch.setattr(gpu, "TINY", gpu.TINY | {"device": "cpu"})
    real = gpu.train

    def train(out: Path, **flags: object) -> None:
        real(out, **flags | {"learning_rate": 1e38 if flags["deterministic"] else 1e-3})

    monkeypatch.setattr(gpu, "train", train)
    gpu.exactness()
    lines = capsys.readouterr().out
    assert lines.count("FAILED: exit code 3") == 1 and lines.count("same bits") == 1


def test_a_tree_has_the_bits_of_its_branches(capsys):
    gpu.branches("cpu")
    assert "same bits" in capsys.readouterr().out
