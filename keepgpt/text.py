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

# of a Parquet file, in memory at a time
ROWS = 1000
# the endings of the files that a folder is searched for
SUFFIXES = (
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
# files that are not text, by their first bytes: a name, and a command that gets text from them
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
    digest = hashlib.sha256()
    files = find_files(paths)
    size = 0
    # names, sizes and times instead of the content, which may be large
    for path in files:
        stat = os.stat(path)
        size += stat.st_size
        line = f"{path} {stat.st_size} {stat.st_mtime_ns}\n"
        digest.update(os.fsencode(line))
    return {
        "paths": paths,
        "text_key": text_key,
        "files": len(files),
        "bytes": size,
        "state": digest.hexdigest(),
    }


def find_files(paths: list[str]) -> list[str]:
    """Return the files that paths, folders and globs name, sorted within each of `paths`. A file
    counts once, however many links lead to it. Raises UserError and OSError."""
    # real path -> path
    files = {}
    for path in paths:
        # a name may hold signs of a glob
        if os.path.isdir(path):
            found = list_folder(path)
        elif os.path.exists(path):
            found = [path] if os.path.isfile(path) else []
        else:
            found = filter(os.path.isfile, glob.glob(path, recursive=True))
        found = sorted(found)
        if not found:
            raise UserError(
                f"{path}: expected a file, a folder with files of text ({SUFFIXES}), a "
                "glob, or a name that prepare.py --list shows"
            )
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def list_folder(path: str) -> list[str]:
    """Return the files of text in a folder and its subfolders, except hidden ones. Raises
    OSError."""

    def stop(error: OSError) -> None:
        raise error

    files = []
    visited = set()
    suffixes = tuple(SUFFIXES.split())
    for folder, subfolders, names in os.walk(path, onerror=stop, followlinks=True):
        # a link may lead back
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        # os.walk enters the folders that stay in this list
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        for name in names:
            if name[0] != "." and name.lower().endswith(suffixes):
                files.append(os.path.join(folder, name))
    return files


@dataclass
class Skipped:
    """Count the rows without a text, and collect the keys that they have."""

    # of all rows
    total: int = 0
    rows: int = 0
    # the place of the first one
    first: str = ""
    # a dict, as a set has no order
    keys: dict[str, None] = field(default_factory=dict)

    def add(self, place: str, keys: Iterable[str]) -> None:
        """Count the row of that place, which has these keys."""
        self.rows += 1
        self.first = self.first or place
        self.keys |= dict.fromkeys(keys)

    def __str__(self) -> str:
        # a few, as rows may have thousands
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
    the next. `source` describes the text; raises UserError if it has changed."""
    text_key = source.get("text_key", "text")
    for path in files:
        if ROW_FILES.search(path):
            for text in read_rows(path, text_key, skipped):
                # as open_text reads a file
                yield io.StringIO(text.removeprefix("\ufeff"), newline=None)
        else:
            with open_text(path) as file:
                yield file
    # files of the hub can't change
    if "paths" in source and describe_files(source["paths"], text_key) != source:
        raise UserError(
            "the text changed while it was read. Try: the same command on files that "
            "no program writes to"
        )


def open_bytes(path: str) -> BinaryIO:
    """Open a file, decompressed if gzip, bzip2 or xz has compressed it, whatever its name."""
    # a name says little: .txt may be compressed, and .gz may not be
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
    # for errors: a compressed file has no name
    document.path = path
    return document


def read_block(document: TextIO, size: int) -> str:
    """Return the next `size` characters of a document, fewer at its end; -1 for all. Raises
    UserError, and OSError for an error of the disk."""
    try:
        block = document.read(size)
        # a row of JSON may have one
        if "\0" in block and isinstance(document, io.TextIOWrapper):
            raise ValueError("a NUL byte, as in a binary file")
        return block
    except (ValueError, EOFError, OSError, zlib.error, lzma.LZMAError) as e:
        # gzip's and bz2's own have no number
        if isinstance(e, OSError) and e.errno:
            e.filename = document.path
            raise
        got = str(e)
        if isinstance(e, UnicodeDecodeError):
            # the object holds the last bytes that were read
            start = document.buffer.tell() - len(e.object)
            got = f"byte {start + e.start} of the file"
        hint = "convert the file or leave it out"
        got, hint = describe_format(document.path, got, hint)
        raise UserError(
            f"{document.path}: expected text in UTF-8, got {got}. Try: {hint}"
        ) from None


def describe_format(path: str, got: str, hint: str) -> tuple[str, str]:
    """Return the format of a file that is not text, and a command that gets text from it; `got` and
    `hint` if none of FORMATS fits."""
    try:
        with open_bytes(path) as file:
            first = file.read(512)
    # compressed, and corrupt
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return got, hint
    for pattern, (name, command) in FORMATS.items():
        if re.match(pattern, first):
            return name, command.replace("FILE", path)
    return got, hint


def read_rows(path: str, text_key: str, skipped: Skipped) -> Iterator[str]:
    """Yield the texts of a .parquet file, or of JSON; other rows go to `skipped`. Raises UserError
    for a corrupt file, and for one with rows but no text."""
    is_parquet = path.lower().endswith(".parquet")
    read = read_parquet if is_parquet else read_json
    rows = 0
    texts = 0
    try:
        for text, keys in read(path, text_key):
            rows += 1
            skipped.total += 1
            if isinstance(text, str):
                texts += 1
                # JSON can spell half a surrogate pair: it becomes a "?"
                yield text.encode(errors="replace").decode()
            else:
                skipped.add(f"row {rows:,} of {path}", keys)
    # a package is missing
    except UserError:
        raise
    # of several packages
    except Exception as e:
        got = f"{rows:,} rows, then {e!r}"
        if is_parquet:
            expected = "Parquet"
            hint = "another copy of the file"
        else:
            expected = "JSON, an object on each line or an array of objects"
            hint = "correct the file, or name it .txt if all of it is the text"
            got, hint = describe_format(path, got, hint)
        raise UserError(
            f"{path}: expected {expected}, got {got}. Try: {hint}"
        ) from None
    # a wrong key, most likely
    if rows and not texts:
        raise UserError(
            f"{path}: no text under {text_key!r} in {skipped}. Try: --text_key=KEY"
        )


def read_parquet(path: str, text_key: str) -> Iterator[tuple[Any, Iterable[str]]]:
    """Yield the value of `text_key`, None if there is none, and the keys of each row."""
    with import_package("pyarrow.parquet").ParquetFile(path) as file:
        # a file may be larger than memory, and have columns that are
        keys = file.schema_arrow.names
        for batch in file.iter_batches(ROWS, columns=[text_key]):
            for row in batch.to_pylist():
                yield row.get(text_key), keys


def read_json(path: str, text_key: str) -> Iterator[tuple[Any, Iterable[str]]]:
    """Yield the value of `text_key`, None if there is none, and the keys of each element of an
    array, which is read whole, or of the value on each line. A blank line is an empty text."""
    blank = {text_key: ""}
    with open_bytes(path) as file:
        rows = (json.loads(line) if line.strip() else blank for line in file)
        # an array; a byte-order mark may stand before it
        if file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            rows = json.load(file)
        for row in rows:
            # a line may hold any value
            if not isinstance(row, dict):
                row = {}
            yield row.get(text_key), row
