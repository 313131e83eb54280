"""Read a dataset's recipe, data/NAME.py: where its text comes from, its tokenizer and its split.

A recipe assigns settings, as a file in config/ does; its first line is a comment that describes it.
The text has one source: `files`, a function read_text(), `url` or `hub`.
"""

import glob
import hashlib
import inspect
import io
import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from keepgpt.config import Settings, check, read_source, run_source, setting
from keepgpt.errors import UserError, import_package, warn
from keepgpt.text import Shard, Skipped, describe_files, find_files, read_documents

REPO = Path(__file__).parents[1]
RECIPES = REPO / "data"
# the settings that each source needs
SOURCES = {
    "files": (),
    "read_text": ("text", "sha256"),
    "url": ("text", "sha256"),
    "hub": ("revision", "train_files", "file_count"),
}


@dataclass(frozen=True)
class Recipe:
    """The settings of a recipe."""

    # another recipe, for the settings that this one leaves out
    base: str = ""

    # files, folders and globs; relative paths start at the folder of prepare.py
    files: list[str] = field(default_factory=list)
    # a function that returns the text
    read_text: Callable[[], str] | None = None
    # the address of a text in UTF-8; the file data/<text>/input.txt replaces it
    url: str = ""
    # OWNER/NAME of a dataset on the Hugging Face hub
    hub: str = ""

    # files, hub: the field with the text, of a row of JSON or Parquet
    text_key: str = "text"
    # read_text, url: a name for the text, its sha256 in UTF-8, and what to try if it can't be read
    text: str = ""
    sha256: str = ""
    hint: str = "the same command again"
    # hub: the commit, globs of files, and their number
    revision: str = ""
    train_files: str = ""
    val_files: str = ""
    file_count: int = setting(0, "", least=1)

    # as --tokenizer and --val_fraction of prepare.py; val_files are for validation in any case
    tokenizer: str = "gpt2"
    val_fraction: float = setting(0.1, "", least=0, below=1)

    @property
    def is_ready(self) -> bool:
        """Return True if the files on the hub are shards of tokens, see dataset.describe_shards."""
        return self.train_files.endswith(".bin")


def list_recipes() -> dict[str, str]:
    """Return the name of each recipe in data/, and its description."""
    recipes = {}
    for path in sorted(RECIPES.glob("*.py")):
        # its first line; nothing runs, so a faulty recipe hides no other
        with open(path, encoding="utf-8", errors="replace") as file:
            recipes[path.stem] = file.readline().strip("# \n")
    return recipes


def read_recipe(name: str) -> Recipe:
    """Return the recipe data/NAME.py. Raises UserError."""
    path = RECIPES / f"{name}.py"
    names = run_recipe(name)
    # the recipe's own settings override those of its base
    if "base" in names:
        names = run_recipe(names["base"]) | names
    settings = {}
    for key, value in names.items():
        # imports, functions and constants are the recipe's own business
        is_own = inspect.ismodule(value) or callable(value) or key.isupper()
        if key == "read_text" or not is_own:
            settings[key] = check_setting(key, value, str(path))
    sources = [key for key in SOURCES if settings.get(key)]
    if len(sources) != 1:
        raise UserError(
            f"{path}: expected one of {', '.join(SOURCES)}, "
            f"got {' and '.join(sources) or 'none'}"
        )
    # no default could be right
    for key in SOURCES[sources[0]]:
        if key not in settings:
            raise UserError(f"{path}: missing setting {key!r}")
    return Recipe(**settings)


def check_setting(key: str, value: Any, where: str) -> Any:
    """Return `value` as the type of that setting. Raises UserError, which names `where`."""
    # a function; the text that it returns is compared with the sha256
    if key == "read_text":
        return value
    if key != "files":
        return check(Recipe, key, value, where)
    # a text has characters, which could be names of files
    if not isinstance(value, list):
        raise UserError(f"{where}: files: expected a list, got {value!r}")
    return [str(REPO / check(Recipe, key, file, where)) for file in value]


def run_recipe(name: str) -> Settings:
    """Run the recipe of that name. Return the names that it defines. Raises UserError."""
    path = str(RECIPES / f"{name}.py")
    _, names = run_source(read_source(path), path, {})
    return {key: value for key, value in names.items() if key[0] != "_"}


def describe_source(recipe: Recipe) -> dict[str, Any]:
    """Return what meta.json says about a recipe's text: it changes if the text does."""
    if recipe.files:
        return describe_files(recipe.files, recipe.text_key)
    if recipe.text:
        return {"text": recipe.text, "sha256": recipe.sha256}
    source = {
        "hub": recipe.hub,
        "files": [recipe.train_files, recipe.val_files],
        "revision": recipe.revision,
    }
    # only if it differs: prepared datasets must stay those of the same source
    if recipe.text_key != "text":
        source["text_key"] = recipe.text_key
    return source


def open_shards(recipe: Recipe, source: dict[str, Any], data_dir: Path) -> list[Shard]:
    """Return the shards of a recipe's text, which `source` describes: each of several Parquet files
    is one, else all of it is. Raises UserError."""
    # a text is one document, in memory
    if recipe.text:
        text = read_pinned_text(recipe, data_dir / recipe.text / "input.txt")
        return [Shard(lambda: iter([io.StringIO(text)]), 1, recipe.val_fraction)]
    val_files = []
    if recipe.hub:
        train_files, val_files = download_files(recipe)
    else:
        train_files = find_files(recipe.files)
    # rows of a text file are read in one go; a Parquet file may be gigabytes
    files = train_files + val_files
    groups = [files]
    if all(path.lower().endswith(".parquet") for path in files):
        groups = [[path] for path in files]
    skipped = Skipped()
    shards = []
    for group in groups:
        # read all of it once: a corrupt file is found before the first shard
        read = partial(read_documents, group, source, Skipped())
        documents = sum(1 for _ in read_documents(group, source, skipped))
        val_fraction = 1.0 if group[0] in val_files else recipe.val_fraction
        shards.append(Shard(read, documents, val_fraction))
    if skipped.rows:
        warn(f"no text in {skipped}. They are left out")
    return shards


def download_files(
    recipe: Recipe, folder: Path | None = None
) -> tuple[list[str], list[str]]:
    """Download a dataset of the hub, into its cache or into `folder`. Return its files of train and
    of val. Raises UserError."""
    patterns = [recipe.train_files, recipe.val_files]
    download = import_package("huggingface_hub").snapshot_download
    try:
        folder = download(
            recipe.hub,
            repo_type="dataset",
            revision=recipe.revision,
            allow_patterns=patterns,
            local_dir=folder,
        )
    except Exception as e:  # of several packages
        raise UserError(
            f"{recipe.hub}: cannot be downloaded ({e}). Try: the same command again"
        ) from None
    train_files, val_files = [
        sorted(glob.glob(os.path.join(glob.escape(folder), pattern))) if pattern else []
        for pattern in patterns
    ]
    # without a network, a cache may lack some
    count = len(train_files) + len(val_files)
    if count != recipe.file_count:
        raise UserError(
            f"{folder}: expected {recipe.file_count} files, got {count}. Try: the same command "
            "again, with a network, or copy the files there"
        )
    return train_files, val_files


def read_pinned_text(recipe: Recipe, path: Path) -> str:
    """Return the text of read_text(), of `path` if it exists, or of the url. Raises UserError."""
    # a file is the way out without a network
    hint = recipe.hint
    if recipe.url:
        hint = f"put {recipe.url} at {path}, or {hint}"
    try:
        if recipe.read_text:
            data = recipe.read_text().encode()
        elif path.exists():
            data = path.read_bytes()
        else:
            data = urllib.request.urlopen(recipe.url, timeout=20).read()
    except Exception as e:  # a connection breaks in many ways
        raise UserError(f"{recipe.text}: {e}. Try: {hint}") from None
    # the same text on every machine
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != recipe.sha256:
        raise UserError(
            f"{recipe.text}: expected the sha256 {recipe.sha256}, got {sha256}. Try: {hint}"
        )
    return data.decode()
