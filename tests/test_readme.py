"""The README keeps up with the program."""
from dataclasses import fields

from conftest import REPO

from keepgpt.config import TrainConfig

README = (REPO / "README.md").read_text(encoding="utf-8")


def test_every_key_is_in_the_table_with_its_default_and_its_reason():
    table = (REPO / "docs" / "KEYS.md").read_text(encoding="utf-8")
    for f in fields(TrainConfig):
        why = f.metadata["why"].replace("|", "\\|")
        assert f"| `{f.name}` | `{f.default}` | {why} |" in table


def test_every_file_at_the_top_is_in_the_table_of_files():
    table = README.split("## The files")[1]
    assert all(f"`{path.name}`" in table for path in REPO.glob("*.py"))
