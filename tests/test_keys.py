"""docs/KEYS.md is what tools.keys writes from the settings."""

import re
from dataclasses import fields

import pytest
from conftest import REPO, read_error, run

from keepgpt.config import TrainConfig
from keepgpt.optim import OPTIMIZERS, SCHEDULES
from model import ARCHITECTURES
from tools.keys import SECTIONS

PAGE = REPO / "docs" / "KEYS.md"


def test_keys_md_is_what_tools_keys_writes(tmp_path):
    run("tools.keys", to=tmp_path / "KEYS.md")
    written = (tmp_path / "KEYS.md").read_text(encoding="utf-8")
    assert written == PAGE.read_text(encoding="utf-8")


def test_keys_md_lists_every_key_once_with_its_default():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    # a row is: | `key` | `default` | description |
    cells = [line.split("`")[1:4:2] for line in lines if line.startswith("| `")]
    assert cells == [[f.name, str(f.default)] for f in fields(TrainConfig)]


@pytest.mark.parametrize(
    "key, names",
    [
        ("architecture", ARCHITECTURES),
        ("optimizer", OPTIMIZERS),
        ("lr_schedule", SCHEDULES),
    ],
    ids=["architecture", "optimizer", "lr_schedule"],
)
def test_a_choice_is_in_the_help_of_its_key(key, names):
    whys = {f.name: f.metadata["why"] for f in fields(TrainConfig)}
    words = set(re.findall(r"\w+", whys[key]))
    assert set(names) <= words


def test_every_section_starts_at_a_key():
    assert SECTIONS.keys() <= {f.name for f in fields(TrainConfig)}
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    titles = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert titles == list(SECTIONS.values())


def test_a_mistake_exits_2_with_one_line(tmp_path):
    # an argument that is not a flag, and a missing folder
    read_error(run("tools.keys", "README.md", code=2))
    read_error(run("tools.keys", to=tmp_path / "nothing" / "KEYS.md", code=None))
