"""A run's README.md records how it was made, well enough to reproduce it."""
import re
import subprocess

import pytest
import torch
from conftest import REPO, bits, run


def starts(text: str) -> list[list[str]]:
    """Return the cells of the table of starts."""
    lines = text.split("## Starts")[1].strip().splitlines()[2:]
    return [line.strip("| ").split(" | ") for line in lines]


def test_the_card_lists_each_start_and_reproduces_the_run(train, tmp_path):
    train(max_iters=20, init_from="auto")
    train(init_from="resume", learning_rate=1e-3)
    card = (tmp_path / "out/README.md").read_text()
    first, second = starts(card)
    assert [first[1], second[1]] == ["0", "20"]
    assert "--max_iters=20" in first[2] and "--learning_rate=0.001" in second[2]
    for when, _, _, commit, machine, packages in (first, second):
        assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", when)
        assert machine.startswith("1 x cpu, ")
        assert f"torch {torch.__version__}" in packages
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True)
        assert commit.startswith(git.stdout.strip() if git.returncode == 0 else "not in git")
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
