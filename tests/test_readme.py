"""README.md, CONTRIBUTING.md and docs/ match the program."""

import re
from dataclasses import fields

import pytest
from conftest import REPO

from keepgpt.config import TrainConfig

PAGES = [
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    *sorted((REPO / "docs").glob("*.md")),
]
README = PAGES[0].read_text(encoding="utf-8")


def list_anchors(page):
    """Return the anchors that GitHub makes from a page's headings."""
    text = page.read_text(encoding="utf-8")
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        # without punctuation
        words = re.sub(r"[^\w -]", "", heading)
        anchors.add(words.lower().replace(" ", "-"))
    return anchors


def test_readme_maps_every_script_and_module():
    table = README.split("## The files")[1]
    # not __init__.py, which holds nothing
    for path in [*REPO.glob("*.py"), *(REPO / "keepgpt").glob("[!_]*.py")]:
        assert f"| `{path.relative_to(REPO)}` |" in table


def test_readme_links_every_page():
    for path in (REPO / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in list_anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_use_existing_keys(page):
    # a backslash at the end of a line continues a command
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    keys = {f.name for f in fields(TrainConfig)}
    for arguments in re.findall(r" train\.py(.*)", text):
        # up to the end of the code or a comment
        code = arguments.split("`")[0].split("#")[0]
        flags = re.findall(r"--(\w+)=", code)
        assert set(flags) <= keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_said_to_be_in_a_file_are_in_it(page):
    text = page.read_text(encoding="utf-8")
    # `one`, `two` and `three` in `file.py`
    named = r"((?:`\w+`(?:, | and )?)+) in\s+`([\w/]+\.py)`"
    for names, file in re.findall(named, text):
        code = (REPO / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names.replace(" and ", " ")):
            # a function, a method, a class or a constant
            definition = rf"^ *(def|class) {name}\b|^{name} = "
            assert re.search(definition, code, re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:config|docs|keepgpt|runs|tests|tools)/\w+\.\w+", text)
    # config/x.py stands for a user's own
    for name in set(named) - {"config/x.py"}:
        assert (REPO / name).exists(), name
