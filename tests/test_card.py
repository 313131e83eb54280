"""A run's README.md records how it was made, well enough to reproduce it."""

import os
import re
import subprocess

import pytest
import torch
from conftest import PROGRAMS, REPO, TINY, bits, load, run

TIME = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"
START = rf"- {TIME}, step (\d+), 1 x cpu, \w+: `(.*)`; (.*); (Python .*)"


def test_the_card_lists_each_start_and_reproduces_the_run(train, tmp_path):
    train(max_iters=10, init_from="auto")
    train(init_from="resume", learning_rate=1e-3)
    card = (tmp_path / "out/README.md").read_text()
    first, second = [
        re.fullmatch(START, line).groups()
        for line in card.split("## Starts")[1].strip().splitlines()
    ]
    assert [first[0], second[0]] == ["0", "10"]
    assert "--max_iters=10" in first[1] and "--learning_rate=0.001" in second[1]
    for _, _, commit, packages in (first, second):
        assert f"torch {torch.__version__}" in packages
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True
        )
        assert (git.stdout.strip() if git.returncode == 0 else "not in git") in commit
    bundle = load(tmp_path / "out/ckpt.pt")
    assert bundle["data"]["fingerprint"] in card
    assert bundle["config"]["init_from"] == "auto"

    (tmp_path / "again.py").write_text(
        re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    )
    train(out="whole", learning_rate=1e-3)
    run("train.py", tmp_path / "again.py", out_dir=tmp_path / "again")
    assert bits(tmp_path / "again/ckpt.pt") == bits(tmp_path / "whole/ckpt.pt")


@pytest.mark.parametrize(
    "content", [b"# My notes\n", b"\xff"], ids=["notes", "not utf-8"]
)
def test_a_foreign_readme_is_kept(train, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_bytes(content)
    done = train(max_iters=1)
    assert "README.md" in done.stderr
    assert (tmp_path / "out/README.md").read_bytes() == content


@pytest.mark.parametrize(
    "git", ["printf '\\xff'", "exit 128", "kill -9 $$"], ids=["bytes", "128", "killed"]
)
def test_an_odd_git_does_not_end_a_run(train, tmp_path, git):
    path = tmp_path / "bin/git"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{git}\n")
    path.chmod(0o755)
    train(max_iters=1, env={"PATH": f"{path.parent}:{os.environ['PATH']}"})
    assert "step 0" in (tmp_path / "out/README.md").read_text()


def test_a_card_that_fails_is_one_warning(train, tmp_path):
    (tmp_path / "out/README.md").mkdir(parents=True)  # can't be read as a file
    done = train(max_iters=1)
    assert done.stdout.count("warning: ") == 1 and "README.md" in done.stdout


def test_a_sample_that_fails_is_one_warning(dataset, tmp_path, whole):
    flags = TINY | {"dataset": dataset, "out_dir": tmp_path / "out"}
    done = run(PROGRAMS / "failing_sample.py", sample_tokens=5, **flags)
    assert done.stdout.count("no such token") == 1
    assert bits(tmp_path / "out/ckpt.pt") == bits(whole / "ckpt.pt")
