"""A run's README.md records how it was made, well enough to reproduce it."""
import re
import subprocess

import pytest
import torch
from conftest import REPO, bits, run

START = r"- 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC, step (\d+): `(.*)`; (.*); (1 x cpu.*); (Python .*)"


def test_the_card_lists_each_start_and_reproduces_the_run(train, tmp_path):
    train(max_iters=20, init_from="auto")
    train(init_from="resume", learning_rate=1e-3)
    card = (tmp_path / "out/README.md").read_text()
    first, second = [re.fullmatch(START, line).groups()
                     for line in card.split("## Starts")[1].strip().splitlines()]
    assert [first[0], second[0]] == ["0", "20"]
    assert "--max_iters=20" in first[1] and "--learning_rate=0.001" in second[1]
    for _, _, commit, _, packages in (first, second):
        assert f"torch {torch.__version__}" in packages
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True)
        assert (git.stdout.strip() if git.returncode == 0 else "not in git") in commit
    bundle = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert bundle["data"]["fingerprint"] in card and bundle["config"]["init_from"] == "auto"

    (tmp_path / "again.py").write_text(re.search("```python\n(.*?)```", card, re.DOTALL)[1])
    train(out="whole", learning_rate=1e-3)
    run("train.py", tmp_path / "again.py", out_dir=tmp_path / "again")
    assert bits(tmp_path / "again/ckpt.pt") == bits(tmp_path / "whole/ckpt.pt")


@pytest.mark.parametrize("content", [b"# My notes\n", b"\xff"])
def test_a_foreign_readme_is_kept(train, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_bytes(content)
    done = train(max_iters=10)
    assert "README.md" in done.stderr
    assert (tmp_path / "out/README.md").read_bytes() == content
