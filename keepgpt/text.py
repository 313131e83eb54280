"""Read documents from files, folders and globs: text, JSON lines and Parquet, compressed or not.

A document is an open text: anything with the `read` and `seek` of a text file.
"""

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, TextIO

from keepgpt.errors import UserError, import_package

ROWS = 1000  # of a Parquet file, in memory at a time
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
                "glob, or a name that prepare.py --list shows"
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
