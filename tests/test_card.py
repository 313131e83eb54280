"""A run's README.md records how it was made, well enough to reproduce it."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import PROGRAMS, REPO, TINY, hash_state, load, run

# of a line: the step, the command, the commit, and the versions of packages
TIME = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"
START = rf"- {TIME}, step (\d+), 1 x cpu, \w+: `(.*)`; (.*); (Python .*)"


@pytest.fixture(scope="module")
def resumed(dataset, tmp_path_factory) -> Path:
    """Return the folder of a run of ten steps that was resumed with another rate."""
    out = tmp_path_factory.mktemp("card") / "out"
    flags = TINY | {"out_dir": out, "dataset": dataset}
    run("train.py", **flags | {"max_iters": 10, "init_from": "auto"})
    run("train.py", **flags | {"init_from": "resume", "learning_rate": 1e-3})
    return out


def read_commit() -> str:
    """Return this repository's commit, or the text of a card outside of git."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True
    )
    return git.stdout.strip() if git.returncode == 0 else "not in git"


def test_the_card_lists_each_start(resumed):
    card = (resumed / "README.md").read_text()
    lines = card.split("## Starts")[1].strip().splitlines()
    first, second = [re.fullmatch(START, line).groups() for line in lines]
    steps, commands, commits, packages = zip(first, second)
    assert steps == ("0", "10")
    assert "--max_iters=10" in commands[0]
    assert "--learning_rate=0.001" in commands[1]
    for commit in commits:
        assert read_commit() in commit
    for versions in packages:
        assert f"torch {torch.__version__}" in versions


def test_the_card_names_the_data_of_the_checkpoint(resumed):
    bundle = load(resumed / "ckpt.pt")
    assert bundle["data"]["fingerprint"] in (resumed / "README.md").read_text()
    # the settings of the first start
    assert bundle["config"]["init_from"] == "auto"


def test_the_settings_of_a_card_reproduce_the_run(resumed, train, tmp_path):
    card = (resumed / "README.md").read_text()
    settings = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    (tmp_path / "again.py").write_text(settings)
    # they are those of the last start, here without a stop before it
    train(out="whole", learning_rate=1e-3)
    run("train.py", tmp_path / "again.py", out_dir=tmp_path / "again")
    assert hash_state(tmp_path / "again/ckpt.pt") == hash_state(
        tmp_path / "whole/ckpt.pt"
    )


@pytest.mark.parametrize(
    "content", [b"# My notes\n", b"\xff"], ids=["notes", "not utf-8"]
)
def test_a_foreign_readme_is_kept(train, tmp_path, content):
    # a person may have written it before the run started
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_bytes(content)
    done = train(max_iters=1)
    assert "README.md" in done.stderr
    assert (tmp_path / "out/README.md").read_bytes() == content


@pytest.mark.parametrize(
    "git", ["printf '\\xff'", "exit 128", "kill -9 $$"], ids=["bytes", "128", "killed"]
)
def test_an_odd_git_does_not_end_a_run(train, tmp_path, git):
    # a program that train.py finds before the real one
    path = tmp_path / "bin/git"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{git}\n")
    path.chmod(0o755)
    train(max_iters=1, env={"PATH": f"{path.parent}:{os.environ['PATH']}"})
    assert "step 0" in (tmp_path / "out/README.md").read_text()


def test_a_card_that_fails_is_one_warning(train, tmp_path):
    # can't be read as a file
    (tmp_path / "out/README.md").mkdir(parents=True)
    done = train(max_iters=1)
    assert done.stdout.count("warning: ") == 1
    assert "README.md" in done.stdout


def test_a_sample_that_fails_is_one_warning(dataset, tmp_path, whole):
    flags = TINY | {"dataset": dataset, "out_dir": tmp_path / "out"}
    done = run(PROGRAMS / "failing_sample.py", sample_tokens=5, **flags)
    assert done.stdout.count("no such token") == 1
    # training is as without samples
    assert hash_state(tmp_path / "out/ckpt.pt") == hash_state(whole / "ckpt.pt")
