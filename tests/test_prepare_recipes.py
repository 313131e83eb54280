"""data/NAME.py and keepgpt/recipe.py: a dataset is one file."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import PROGRAMS, REPO, read_error, run

from keepgpt import recipe
from keepgpt.errors import UserError
from keepgpt.recipe import describe_source, list_recipes, open_shards, read_recipe

# two sources of a text: a file of the repository, and a port where nothing listens
FILES = 'files = ["README.md"]\n'
URL = 'url = "http://127.0.0.1:9/a.txt"\n'


@pytest.fixture
def write_recipe(tmp_path, monkeypatch):
    """Write data/x.py: write_recipe(content). Return a function that reads it."""
    monkeypatch.setattr(recipe, "RECIPES", tmp_path)

    def write(content: str, name: str = "x") -> None:
        (tmp_path / f"{name}.py").write_text(content)

    return write


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a copy of the files that prepare.py needs, for recipes that only a test has."""

    # data/ may have prepared datasets, in folders without a dot in their names
    def ignore(folder: str, names: list[str]) -> set[str]:
        if folder != str(REPO / "data"):
            return set()
        return {name for name in names if "." not in name}

    for name in ("keepgpt", "data", "docs"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=ignore)
    for name in ("prepare.py", "README.md"):
        shutil.copy(REPO / name, tmp_path)
    return tmp_path


def test_every_recipe_is_complete_and_described():
    recipes = list_recipes()
    assert recipes.keys() == {path.stem for path in (REPO / "data").glob("*.py")}
    for name, description in recipes.items():
        assert len(description) > 20
        assert describe_source(read_recipe(name))
    # the list shows them in the same order
    done = run("prepare.py", last="--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(recipes)


def test_the_recipe_in_contributing_is_a_dataset(repository):
    page = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    # the first block of code after a name of that kind
    example = r"`data/(\w+)\.py`.*?```python\n(.*?)```"
    name, content = re.search(example, page, re.DOTALL).groups()
    assert content.count("\n") <= 10
    (repository / f"data/{name}.py").write_text(content)
    script = repository / "prepare.py"
    assert f"\n{name} " in "\n" + run(script, last="--list", fresh=True).stdout
    run(script, name, fresh=True)
    meta = json.loads((repository / f"data/{name}/meta.json").read_text())
    assert meta["name"] == name
    assert meta["tokenizer"]["kind"] == "char"
    # README.md and the pages of docs/
    assert meta["source"]["files"] == 1 + len(list((REPO / "docs").glob("*.md")))
    # from anywhere, and not twice
    done = run(script, name, fresh=True, cwd=repository / "docs")
    assert "exists already" in done.stdout


def test_a_faulty_recipe_is_one_line(repository):
    # through the command; the cases below call the function
    (repository / "data/x.py").write_text("files = [\n")
    line = read_error(run(repository / "prepare.py", "x", fresh=True, code=2))
    assert "x.py:1: SyntaxError" in line


@pytest.mark.parametrize(
    "content, expected",
    [
        pytest.param("files = [\n", "x.py:1: SyntaxError", id="syntax"),
        pytest.param(FILES + "\nval_fraction = 1 / 0", "x.py:3: ZeroDiv", id="crash"),
        pytest.param("exit(3)", "x.py:1: SystemExit", id="exit"),
        pytest.param("\0", "null bytes", id="null"),
        pytest.param("tokenizer = 'char'", "expected one of files", id="no source"),
        pytest.param("files = []", "expected one of files", id="no files"),
        pytest.param(FILES + URL, "got files and url", id="two sources"),
        pytest.param(URL + "text = 'a'", "missing setting 'sha256'", id="no sha256"),
        pytest.param("hub = 'a/b'", "missing setting 'revision'", id="no revision"),
        pytest.param(
            FILES + "tokenzer = 'char'", "did you mean tokenizer?", id="unknown setting"
        ),
        pytest.param(FILES + "val_fraction = 2", "below 1, got 2", id="range"),
        pytest.param(FILES + "tokenizer = 5", "expected str, got 5", id="type"),
        pytest.param("files = 'a.txt'", "expected a list", id="files is a text"),
        pytest.param("files = [5]", "expected str, got 5", id="a file is a number"),
        pytest.param("base = 'nosuch'", "nosuch.py", id="unknown base"),
        pytest.param("base = 'x'", "expected one of files", id="own base"),
    ],
)
def test_faulty_recipe(write_recipe, content, expected):
    write_recipe(content)
    with pytest.raises(UserError, match="x.py|nosuch.py") as raised:
        read_recipe("x")
    assert expected in str(raised.value)


def test_a_recipe_may_compute_its_settings(write_recipe):
    write_recipe((PROGRAMS / "config/recipe.py").read_text())
    computed = read_recipe("x")
    assert computed.files == ["/a/b.txt"]
    assert computed.val_fraction == 0.125


def test_a_base_gives_the_settings_that_are_left_out(write_recipe):
    # the recipe's own settings win
    write_recipe(FILES + "val_fraction = 0.2\ntokenizer = 'gpt2'", "first")
    write_recipe("base = 'first'\ntokenizer = 'char'")
    second = read_recipe("x")
    assert (second.tokenizer, second.val_fraction) == ("char", 0.2)
    assert second.files == [str(REPO / "README.md")]


def test_a_text_that_is_not_pinned_is_refused(write_recipe, tmp_path):
    # the error says which sha256 to write: that of "one"
    write_recipe("text = 'a'\nsha256 = ''\ndef read_text(): return 'one'")
    unpinned = read_recipe("x")
    with pytest.raises(
        UserError, match="a: expected the sha256 , got 7692c3ad3540bb80"
    ):
        open_shards(unpinned, describe_source(unpinned), tmp_path)


def test_a_function_that_fails_is_one_line(write_recipe, tmp_path):
    write_recipe("text = 'a'\nsha256 = 'b'\ndef read_text(): raise OSError('gone')")
    failing = read_recipe("x")
    with pytest.raises(UserError, match="a: gone. Try: the same command again"):
        open_shards(failing, describe_source(failing), tmp_path)


def test_hub_rows_may_have_another_key(write_recipe):
    hub = "hub = 'a/b'\nrevision = 'c'\ntrain_files = '*.parquet'\nfile_count = 1\n"
    expected = {"hub": "a/b", "files": ["*.parquet", ""], "revision": "c"}
    write_recipe(hub)
    assert describe_source(read_recipe("x")) == expected
    # only a key other than the default is a part of the description
    write_recipe(hub + "text_key = 'body'")
    assert describe_source(read_recipe("x")) == expected | {"text_key": "body"}
