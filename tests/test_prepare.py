"""prepare.py and keepgpt/text.py: the recipes' texts, your own, and what can go wrong."""

import bz2
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPO, TINY, make_command, read_error, run, start

from keepgpt.dataset import BadData, read_meta
from keepgpt.errors import UserError
from keepgpt.recipe import download_files, read_recipe
from keepgpt.tokenizer import from_meta, train_bpe

GPT2 = from_meta({"tokenizer": {"kind": "gpt2"}})
EOT = 50256
# without the time: workers must collect equal tests
compress = partial(gzip.compress, mtime=0)
TEXT = "something to learn, or not\n" * 30
PROGRAMS = REPO / "tests/programs"
PLUGIN = {"PYTHONPATH": str(PROGRAMS / "plugin")}
TINYSHAKESPEARE = REPO / "data" / "tinyshakespeare" / "input.txt"


def read_dataset(folder: Path) -> tuple[dict, list[int], list[int]]:
    """Return meta.json and the ids of train and val."""
    meta = json.loads((folder / "meta.json").read_text())
    train = np.fromfile(folder / "train.bin", meta["dtype"]).tolist()
    val = np.fromfile(folder / "val.bin", meta["dtype"]).tolist()
    return meta, train, val


def list_files(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders, except locks."""
    return [
        path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    ]


def prepare(
    tmp_path: Path, *args: object, **flags: object
) -> tuple[dict, list[int], list[int]]:
    """Prepare tmp_path/data/x and return its meta.json and the ids of train and val."""
    flags |= {"name": "x", "data_dir": tmp_path / "data"}
    run("prepare.py", *args, cwd=tmp_path, **flags)
    return read_dataset(tmp_path / "data" / "x")


@pytest.fixture(scope="module")
def shakespeare() -> str:
    return read_recipe("plays").read_text()


@pytest.fixture(scope="module")
def long_text(shakespeare: str) -> str:
    """Return 2 million characters: plays, paragraphs, and many ways to be white space."""
    paragraphs = shakespeare[:400_000].replace(",\n", ", ").replace("\n\n", "\r\n \n")
    other = (
        "Fluß -- 東京\u3000は\n　夜。\n\n\n\t\u2028 it's\xa0🎭\x1c \x85 don't \n .\n"
        * 4_000
    )
    return paragraphs + other + shakespeare[:1_000_000]


# --- the plays and tinyshakespeare ----------------------------------------------------------------


def test_plays_are_plain_dialogue(shakespeare):
    assert "".join(sorted(set(shakespeare))) == (
        "\n !\"$&',-.24568:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    )
    speeches = shakespeare.removesuffix("\n").split("\n\n")
    assert len(speeches) == 31_403
    for speech in speeches:
        # a name, a colon, and lines without spaces around them
        assert re.match(r"[A-Z][A-Za-z' -]+:\n\S", speech), speech
        assert not re.search(r"^ | $|  |\n\n", speech, re.MULTILINE), speech
    # stage directions and markup
    for left in ("Exeunt", "Re-enter", "ACT I", "SCENE", "&amp", "[", "_", "*", "#"):
        assert left not in shakespeare
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in shakespeare
    assert (
        "\n\nLord Chief-Justice:\nWhat's he that goes there?\n\nServant:\n"
        in shakespeare
    )


@pytest.fixture(scope="module")
def prepared_plays(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plays")
    for name in ("plays_char", "plays"):
        run("prepare.py", name, data_dir=folder)
    return folder


@pytest.mark.skipif(
    not TINYSHAKESPEARE.exists(), reason=f"needs {TINYSHAKESPEARE.name}, 1.1 MB"
)
def test_tinyshakespeare(tmp_path):
    # where a download would put it
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(
        TINYSHAKESPEARE.read_bytes()
    )
    # the numbers that nanoGPT's README gives
    for name, counts in (
        ("shakespeare", (301_966, 36_059)),
        ("shakespeare_char", (1_003_854, 111_540)),
    ):
        run("prepare.py", name, data_dir=tmp_path)
        assert tuple(read_dataset(tmp_path / name)[0]["tokens"].values()) == counts


# --- your own text -------------------------------------------------------------------------------


def test_blocks_give_the_tokens_of_the_whole_text(long_text, tmp_path):
    (tmp_path / "long.txt").write_bytes(long_text.encode())
    long_text = long_text.replace("\r\n", "\n")
    at = int(len(long_text) * 0.8)
    # the whole of each split encoded at once: the program does it in blocks
    expected = GPT2.encode(long_text[:at]), GPT2.encode(long_text[at:])
    _, train, val = prepare(tmp_path, "long.txt", val_fraction=0.2)
    assert (train, val) == expected


def test_text_without_a_place_to_cut(tmp_path):
    # no space, no line: a block can only end at the end
    text = "abcdefg" * 100_000
    (tmp_path / "long.txt").write_text(text)
    _, train, val = prepare(tmp_path, "long.txt")
    assert train == GPT2.encode(text[:630_000])
    assert val == GPT2.encode(text[630_000:])


def join_documents(tokenizer: Any, texts: Iterable[str]) -> list[int]:
    """Return the tokens of the texts, with an end of text between any two of them."""
    tokens = []
    for text in texts:
        tokens += [tokenizer.eot, *tokenizer.encode(text)]
    return tokens[1:]


def test_few_documents_are_split_each(tmp_path):
    texts = ["one two three four five\n" * 5, "", "six seven eight nine ten\n" * 9]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    # the order of the arguments is the order of the documents, and an empty one leaves no trace
    _, train, val = prepare(
        tmp_path,
        "2.txt",
        "1.txt",
        "0.txt",
        val_fraction=0.25,
    )
    first = texts[2]
    last = texts[0]
    first_at = int(len(first) * 0.75)
    last_at = int(len(last) * 0.75)
    assert train == join_documents(GPT2, [first[:first_at], last[:last_at]])
    assert val == join_documents(GPT2, [first[first_at:], last[last_at:]])


def test_of_many_documents_every_tenth_is_for_validation(tmp_path):
    texts = [f"Document {i}.\n" + "word " * i for i in range(250)]
    # over 2**20 characters: such a document is split, wherever it stands
    texts[7] = "long " * 300_000
    write_jsonl(tmp_path / "docs.jsonl", texts)
    _, train, val = prepare(tmp_path, "docs.jsonl")
    cut = int(len(texts[7]) * 0.9)
    train_texts = []
    val_texts = []
    for i, text in enumerate(texts):
        if i == 7:
            train_texts.append(text[:cut])
            val_texts.append(text[cut:])
        elif i % 10 == 9:
            val_texts.append(text)
        else:
            train_texts.append(text)
    assert train == join_documents(GPT2, train_texts)
    assert val == join_documents(GPT2, val_texts)


def test_characters_and_a_newline_between_documents(tmp_path):
    (tmp_path / "a.txt").write_text("abcdé" * 20)
    (tmp_path / "b.txt").write_text("dcba" * 20)
    meta, train, val = prepare(tmp_path, "a.txt", "b.txt", tokenizer="char")
    assert meta["tokenizer"] == {"kind": "char", "chars": "\nabcdé"}
    tokenizer = from_meta(meta)
    assert tokenizer.decode(train) == "abcdé" * 18 + "\n" + "dcba" * 18
    assert tokenizer.decode(val) == "abcdé" * 2 + "\n" + "dcba" * 2
    # a single document needs no newline in its vocabulary
    meta, train, val = prepare(tmp_path, "b.txt", tokenizer="char")
    assert meta["tokenizer"]["chars"] == "abcd"
    assert len(train) == 72
    assert len(val) == 8


def test_more_than_65536_characters_take_four_bytes(tmp_path):
    # without surrogates, which UTF-8 can't hold
    chars = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    (tmp_path / "a.txt").write_text(chars, encoding="utf-8")
    meta, train, val = prepare(tmp_path, "a.txt", tokenizer="char")
    assert meta["dtype"] == "uint32"
    assert train + val == list(range(70_000))


def test_folders_and_globs(tmp_path):
    # a folder gives its texts in order, without hidden files and other formats
    for path in (
        "b/c.py",
        "b/a.TXT",
        "b/deep/er.md",
        "b/.hidden.md",
        "b/.git/x.txt",
        "b/y.bin",
        "[d]/z.log",
        "[d]/y.log",
        "e.log",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"text of {path} " * 9)
    _, train, _ = prepare(
        tmp_path,
        "b",
        "e.log",
        "*/?.log",
        "b/c.py",
        val_fraction=0.5,
    )
    paths = re.findall(r"(?:^|<\|endoftext\|>)text of (\S+)", GPT2.decode(train))
    assert paths == [
        "b/a.TXT",
        "b/c.py",
        "b/deep/er.md",
        "e.log",
        "[d]/y.log",
        "[d]/z.log",
    ]


@pytest.mark.parametrize("tokenizer", ["char", "gpt2", "bpe:300"])
def test_every_line_ends_in_a_line_feed(tmp_path, tokenizer):
    lines = [f"line {i} is {'long ' * (i % 99)}" for i in range(2600)]
    line_ends = {"unix": "\n", "dos": "\r\n", "mac": "\r"}
    datasets = []
    for name, end in line_ends.items():
        (tmp_path / f"{name}.txt").write_bytes(end.join(lines).encode())
        datasets.append(prepare(tmp_path, f"{name}.txt", tokenizer=tokenizer))
    unix, dos, mac = datasets
    assert unix[1:] == dos[1:] == mac[1:]
    assert unix[0]["tokenizer"] == dos[0]["tokenizer"]


def test_lines_of_json(tmp_path):
    # an empty line, and half of a pair that UTF-8 can't hold
    lines = [
        '{"body": "caf\\u00e9 au lait, please", "text": 1}',
        "",
        '{"body": "half a \\ud83d pair here"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    _, train, val = prepare(
        tmp_path,
        "a.jsonl",
        text_key="body",
        val_fraction=0.5,
    )
    assert GPT2.decode(train) == "café au la<|endoftext|>half a ? "
    assert GPT2.decode(val) == "it, please<|endoftext|>pair here"


# rows with other keys, or without
ROWS = [
    {
        "text": "one café\nfor all of us, " * 9,
        "id": 1,
    },
    {"text": "and two " * 22},
]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


WRAPPINGS = {
    "array": ("a.json", json.dumps(ROWS, indent=1).encode()),
    "array in capitals": ("a.JSON", b"\n " + json.dumps(ROWS).encode()),
    "lines as json": ("a.json", JSON_LINES),
    "lines as ndjson": ("a.ndjson", JSON_LINES),
    "byte-order mark": ("a.jsonl", b"\xef\xbb\xbf" + JSON_LINES),
    "jsonl.gz": ("a.jsonl.gz", compress(JSON_LINES)),
    "json.gz": ("a.json.gz", compress(JSON_LINES)),
    "jsonl.bz2": ("a.jsonl.bz2", bz2.compress(JSON_LINES)),
    "jsonl.xz": ("a.jsonl.xz", lzma.compress(JSON_LINES)),
    "two gzip members": (
        "a.jsonl",
        compress(JSON_LINES[:40]) + compress(JSON_LINES[40:]),
    ),
}


@pytest.mark.parametrize("name, content", WRAPPINGS.values(), ids=WRAPPINGS)
def test_json_in_any_wrapping_gives_its_texts(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    meta, train, val = prepare(tmp_path, name, val_fraction=0.5, tokenizer="char")
    # few documents: each is split, here in the middle
    first_halves = []
    second_halves = []
    for row in ROWS:
        text = row["text"]
        middle = len(text) // 2
        first_halves.append(text[:middle])
        second_halves.append(text[middle:])
    tokenizer = from_meta(meta)
    assert tokenizer.decode(train) == "\n".join(first_halves)
    assert tokenizer.decode(val) == "\n".join(second_halves)


@pytest.mark.parametrize(
    "name, compress_with",
    [
        ("a.txt.gz", compress),
        ("a.txt", compress),
        ("a.bz2", bz2.compress),
        ("a.xz", lzma.compress),
    ],
    ids=["gz", "gz named txt", "bz2", "xz"],
)
def test_compressed_text_is_read(tmp_path, name, compress_with):
    # a byte-order mark and the line ends of Windows are no part of the text
    dos_text = TEXT.replace("\n", "\r\n")
    content = b"\xef\xbb\xbf" + dos_text.encode()
    (tmp_path / name).write_bytes(compress_with(content))
    _, train, val = prepare(tmp_path, name)
    assert GPT2.decode(train) + GPT2.decode(val) == TEXT


def make_zip(text: bytes) -> bytes:
    """Return a zip archive with one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", text)
    return file.getvalue()


def make_tar(text: bytes) -> bytes:
    """Return a compressed tar archive with one file."""
    file = io.BytesIO()
    info = tarfile.TarInfo("a.txt")
    info.size = len(text)
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.addfile(info, io.BytesIO(text))
    return file.getvalue()


# the signature of the format, and no text
ZSTD = b"\x28\xb5\x2f\xfd" + bytes(range(256))


# an id: the name of the file, its content, and a part of the error
OTHER_FORMATS = {
    "zip": ("a.zip", make_zip(TEXT.encode()), "unzip"),
    "docx": ("a.docx", make_zip(TEXT.encode()), "zip archive"),
    "zip in gzip": ("a.txt.gz", compress(make_zip(TEXT.encode())), "unzip"),
    "tar": ("a.tar.gz", make_tar(TEXT.encode()), "tar -xf"),
    "zstd": ("a.jsonl.zst", ZSTD, "zstd -d"),
    "zstd named jsonl": ("a.jsonl", ZSTD, "zstd -d"),
    "zstd named txt": ("a.txt", ZSTD, "zstd -d"),
    "utf-16": ("a.txt", TEXT.encode("utf-16"), "iconv"),
    "pdf": ("a.pdf", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3", "a PDF"),
    "truncated gzip": (
        "a.txt.gz",
        compress(random.Random(1).randbytes(999).hex().encode())[:-300],
        "end-of-stream",
    ),
    "truncated jsonl.gz": ("a.jsonl.gz", compress(JSON_LINES)[:-9], "end-of-stream"),
    "truncated xz": ("a.xz", lzma.compress(TEXT.encode())[:-20], "end-of-stream"),
    "corrupt gzip": ("a.gz", compress(TEXT.encode())[:30] + b"\xff" * 30, "UTF-8"),
    "one object": ("a.json", json.dumps(ROWS[0], indent=1).encode(), ".txt"),
    "nested rows": ("a.json", json.dumps({"data": ROWS}).encode(), "data"),
}


@pytest.mark.parametrize(
    "name, content, expected", OTHER_FORMATS.values(), ids=OTHER_FORMATS
)
def test_other_formats_are_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    flags = {"name": "x", "data_dir": tmp_path / "data"}
    line = read_error(
        run(
            "prepare.py",
            name,
            cwd=tmp_path,
            code=2,
            **flags,
        )
    )
    assert name in line
    assert expected in line
    assert list_files(tmp_path / "data") == []


@pytest.mark.slow
def test_rows_without_a_text_are_skipped_with_a_note(tmp_path):
    texts = [f"Document {i}\n" * 9 for i in range(130)]
    write_jsonl(tmp_path / "intact.jsonl", texts)
    rows = [{"text": text} for text in texts]
    # two such rows among the others, three at the end
    rows[7:7] = [
        {
            "text": None,
            "id": 1,
        },
        {"body": "x"},
    ]
    rows += [{"text": 3}, "text", []]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "holes.jsonl").write_text("".join(lines))
    # a Parquet column of texts has no other types, but may have nulls
    write_parquet(
        tmp_path / "holes.parquet",
        [
            *texts[:7],
            None,
            *texts[7:],
            None,
        ],
    )
    _, *expected = prepare(tmp_path, "intact.jsonl")
    notes = {
        "holes.jsonl": ["5 of 135 rows", "text, id, body"],
        "holes.parquet": ["2 of 132 rows", "id, text"],
    }
    flags = {"name": "y", "data_dir": tmp_path / "data"}
    for name, parts in notes.items():
        note = run("prepare.py", name, cwd=tmp_path, **flags).stderr
        assert note.count("\n") == 1
        assert note.startswith("note: ")
        for part in [*parts, f"row 8 of {name}"]:
            assert part in note
        _, *tokens = read_dataset(tmp_path / "data/y")
        assert tokens == expected


def test_line_ends_in_rows_are_those_of_files(tmp_path):
    unix = ["first line\nsecond\n\nlast\n" * 9, "other\ntext\n" * 9]
    dos = [unix[0].replace("\n", "\r\n"), unix[1].replace("\n", "\r")]
    dos[0] = "\ufeff" + dos[0]
    for name, texts in (("unix", unix), ("dos", dos)):
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
        write_parquet(tmp_path / f"{name}.parquet", texts)
    _, *expected = prepare(tmp_path, "unix.jsonl")
    for name in ("dos.jsonl", "dos.parquet"):
        _, *tokens = prepare(tmp_path, name)
        assert tokens == expected


def measure_peak_memory(tmp_path: Path, *args: object, name: str) -> int:
    """Return the bytes of memory that prepare.py takes for a dataset of characters."""
    flags = {"name": name, "tokenizer": "char", "data_dir": tmp_path / "data"}
    python, *script = make_command("prepare.py", *args, **flags)
    done = subprocess.run(
        [python, PROGRAMS / "peak_memory.py", *script],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak from /proc"
)
def test_memory_does_not_grow_with_the_text(shakespeare, tmp_path):
    # 1.4 and 10 million characters; both are read in blocks
    peaks = []
    for times in (1, 7):
        (tmp_path / f"{times}.txt").write_text(shakespeare * times)
        peaks.append(
            measure_peak_memory(tmp_path, tmp_path / f"{times}.txt", name=f"x{times}")
        )
    # the text is 29 MB longer, and its tokens 57 MB
    assert peaks[1] - peaks[0] < 15e6


# --- tokenizers ----------------------------------------------------------------------------------

# letters of several bytes, joined emoji, white space, and the name of a special token
SCRIPTS = (
    "Fluß, naïve 東京は夜。 Привет мир! مرحبا नमस्ते 🎭🏴‍☠️👩‍👩‍👧 e\u0301 \r\n\t<|endoftext|>"
    "\xa0 1603\n"
)


@dataclass
class PreparedBPE:
    """A text, cut in two, that was prepared with one and with three threads."""

    train_text: str
    val_text: str
    datasets: list[tuple[dict, list[int], list[int]]]


@pytest.fixture(scope="module")
def mixed_scripts(shakespeare, tmp_path_factory) -> PreparedBPE:
    folder = tmp_path_factory.mktemp("scripts")
    # "quixotry" occurs only in the part for validation
    text = SCRIPTS * 300 + shakespeare[:300_000] + "quixotry " * 40_000
    (folder / "a.txt").write_bytes(text.encode())
    # RAYON_NUM_THREADS: the threads of the library that trains the BPE
    datasets = []
    for threads in ("1", "3"):
        done = run(
            "prepare.py",
            folder / "a.txt",
            name="x",
            tokenizer="bpe:1000",
            val_fraction=0.6,
            data_dir=folder / threads,
            env={"RAYON_NUM_THREADS": threads},
        )
        assert "val tokens of bpe:1000, 1,000 in the vocabulary" in done.stdout
        datasets.append(read_dataset(folder / threads / "x"))
    text = text.replace("\r\n", "\n")
    cut = int(len(text) * 0.4)
    assert "quixotry" not in text[:cut]
    return PreparedBPE(text[:cut], text[cut:], datasets)


def test_a_bpe_is_the_same_with_any_number_of_threads(mixed_scripts):
    one, three = mixed_scripts.datasets
    assert one == three


def test_a_bpe_of_mixed_scripts_gives_its_text(mixed_scripts):
    meta, train, val = mixed_scripts.datasets[0]
    tokenizer = from_meta(meta)
    for ids, text in (
        (train, mixed_scripts.train_text),
        (val, mixed_scripts.val_text),
    ):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids


def test_a_bpe_learns_from_the_part_for_training(mixed_scripts):
    meta, train, _ = mixed_scripts.datasets[0]
    assert len(train) < 0.5 * len(mixed_scripts.train_text.encode())
    tokenizer = from_meta(meta)
    tokens = [tokenizer.token_bytes(i) for i in range(1000)]
    assert b" the" in tokens
    assert any("東京は夜".encode() in token for token in tokens)
    assert not any(b"uixot" in token for token in tokens)


def write_tokenizer(folder: Path, text: str, **steps: object) -> Path:
    """Write the tokenizer.json of a BPE of this text without bytes. Return its folder."""
    import tokenizers

    # it has no token for a letter that the text lacks
    model = tokenizers.models.BPE(unk_token=steps.pop("unk_token", None))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    for name, step in steps.items():
        setattr(tokenizer, name, step)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<unk>"]
    )
    tokenizer.train_from_iterator([text], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def read_note(tmp_path: Path, file: Path, tokenizer: Path) -> str:
    """Prepare a file with a tokenizer. Return the only line on stderr."""
    flags = {"name": tokenizer.name, "data_dir": tmp_path / "data"}
    note = run("prepare.py", file, tokenizer=tokenizer, **flags).stderr
    assert note.startswith("note: "), note
    assert note.count("\n") == 1, note
    return note


@pytest.fixture(scope="module")
def letters(play) -> str:
    """Return a text with all letters of the play, but short: it is one word, whose merges take ever
    longer."""
    text = play.read_text(encoding="utf-8")
    return text[:20_000] + "".join(sorted(set(text)))


@pytest.mark.slow
def test_a_tokenizer_that_loses_some_of_any_text_is_noted(play, letters, tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    lowercase = normalizers.Lowercase()
    lower = write_tokenizer(tmp_path / "lower", letters, normalizer=lowercase)
    # no token stands for unknown text
    assert " 0.00%" in read_note(tmp_path, play, lower)
    whitespace = pre_tokenizers.Whitespace()
    spaces = write_tokenizer(tmp_path / "spaces", letters, pre_tokenizer=whitespace)
    read_note(tmp_path, play, spaces)


@pytest.mark.slow
@pytest.mark.parametrize("unk_token", [None, "<unk>"], ids=["drops", "unknown"])
def test_a_tokenizer_that_lacks_a_letter_is_noted(play, letters, tmp_path, unk_token):
    text = play.read_text(encoding="utf-8")
    # the first letter that the play lacks comes late
    late = tmp_path / "late.jsonl"
    documents = [text[start : start + 200] for start in range(0, 40_000, 200)]
    write_jsonl(late, [*documents, "Ünique " * 20])
    tokenizer = write_tokenizer(tmp_path / "own", letters, unk_token=unk_token)
    note = read_note(tmp_path, late, tokenizer)
    # the share of tokens that stand for unknown text: a letter that is dropped leaves none
    if unk_token:
        assert " 0.00%" not in note
        assert "Ünique" in note
    else:
        assert " 0.00%" in note
    # the play itself loses nothing
    flags = {"name": "kept", "data_dir": tmp_path / "kept"}
    assert not run("prepare.py", play, tokenizer=tokenizer, **flags).stderr


def test_an_encoding_that_drops_text_is_noted(play, tmp_path):
    flags = {"name": "x", "tokenizer": "lossy", "data_dir": tmp_path}
    note = run("prepare.py", play, env=PLUGIN, **flags).stderr
    assert "loses text" in note
    assert "!" in note
    assert note.count("\n") == 1


def test_a_bpe_of_one_long_word_takes_seconds():
    # merging a word pair by pair takes a time that grows with its square: 400,000 letters took 90 s
    started = time.process_time()
    tokenizer = train_bpe(["a" * 1_000_000, " so", " so"], 300)
    tokens = from_meta({"tokenizer": tokenizer})
    assert time.process_time() - started < 20
    assert tokens.decode(tokens.encode("aaaa so")) == "aaaa so"
    assert len(tokens.encode(" so")) == 1


def test_long_words_change_no_merge_of_other_text(shakespeare):
    import tokenizers

    # the library's own training, without the split of long words
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    expected = tokenizers.Tokenizer(tokenizers.models.BPE())
    expected.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=999,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=byte_level.alphabet(),
    )
    text = shakespeare[:600_000]
    expected.train_from_iterator([text], trainer)
    actual = from_meta({"tokenizer": train_bpe([text], 1000)})
    # the last token is <|endoftext|>
    vocabulary = {token: i for token, i in actual.ids.items() if i < 999}
    assert vocabulary == expected.get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop_signal", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"]
)
def test_a_signal_ends_the_training_of_a_bpe(tmp_path, stop_signal):
    # random words: the training finds merges for a long time
    rng = np.random.default_rng(0)
    words = rng.integers(
        97,
        123,
        size=(400_000, 9),
        dtype=np.uint8,
    )
    words[:, -1] = ord(" ")
    (tmp_path / "a.txt").write_bytes(words.tobytes())
    flags = {"name": "x", "tokenizer": "bpe:60000", "data_dir": tmp_path / "data"}
    child = start("prepare.py", tmp_path / "a.txt", **flags)
    folder = tmp_path / "data" / "x"
    while child.poll() is None and not (folder / ".lock").exists():
        time.sleep(0.01)
    # the reading takes less than that, the training more
    time.sleep(2)
    assert child.poll() is None
    assert not (folder / "train.bin.tmp").exists()
    sent = time.monotonic()
    child.send_signal(stop_signal)
    _, err = child.communicate()
    assert time.monotonic() - sent < 2
    assert child.returncode == -stop_signal
    assert not err
    assert list_files(tmp_path / "data") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop_signal", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"]
)
def test_a_signal_does_not_wait_for_an_encoder(shakespeare, tmp_path, stop_signal):
    # a tokenizer without a pre-tokenizer takes the text as one word, which is slow
    whole = tmp_path / "whole"
    write_tokenizer(whole, shakespeare[:20_000], unk_token="<unk>")
    (tmp_path / "a.txt").write_text(shakespeare * 5)
    flags = {"name": "x", "tokenizer": whole, "data_dir": tmp_path / "data"}
    child = start("prepare.py", tmp_path / "a.txt", **flags)
    folder = tmp_path / "data" / "x"
    while child.poll() is None and not (folder / "train.bin.tmp").exists():
        time.sleep(0.01)
    # in the middle of the encoding
    time.sleep(1)
    sent = time.monotonic()
    child.send_signal(stop_signal)
    _, err = child.communicate()
    assert time.monotonic() - sent < 2
    assert child.returncode == 130
    assert not err
    assert list_files(tmp_path / "data") == []


def test_checkpoint_holds_an_encoding_of_tiktoken(play, tmp_path):
    flags = {"tokenizer": "wide", "data_dir": tmp_path}
    run("prepare.py", play, name="x", env=PLUGIN, **flags)
    meta, train, val = read_dataset(tmp_path / "x")
    assert (meta["vocab_size"], meta["dtype"]) == (10_000 + 65_536, "uint32")
    # pairs of letters have numbers that only uint32 holds
    assert sum(token > 65_536 for token in train) > len(train) / 4
    assert from_meta(meta).decode(train + val) == play.read_text()
    # where the plugin is not installed
    read_error(run("prepare.py", play, name="y", code=2, **flags))
    # the checkpoint has the encoding itself, so it needs neither the dataset nor the plugin
    run(
        "train.py",
        dataset=tmp_path / "x",
        out_dir=tmp_path / "out",
        n_layer=1,
        n_head=1,
        n_embd=8,
        block_size=16,
        batch_size=2,
        gradient_accumulation_steps=1,
        max_iters=4,
        eval_iters=1,
    )
    for file in ("train.bin", "val.bin", "meta.json"):
        (tmp_path / "x" / file).unlink()
    done = run(
        "sample.py",
        out_dir=tmp_path / "out",
        start="To be",
        num_samples=1,
        max_new_tokens=5,
    )
    assert done.stdout.startswith("To be")
    assert len(done.stdout) > 9


# --- parquet, and datasets of several shards ------------------------------------------------------


def write_parquet(path: Path, texts: list, key: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(
        {
            "id": pyarrow.array(range(len(texts))),
            key: pyarrow.array(texts, pyarrow.string()),
        }
    )
    # several groups in a file, as large files have
    pyarrow.parquet.write_table(table, path, row_group_size=40)


def write_jsonl(path: Path, texts: list[str]) -> None:
    """Write a file of rows with a text each."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines))


def cut_texts(shakespeare: str, count: int, size: int) -> list[str]:
    """Return `count` texts of `size` characters, one of them empty."""
    starts = range(0, count * size, size)
    texts = [shakespeare[start : start + size] for start in starts]
    texts[5] = ""
    return texts


def join_files(folder: Path) -> tuple[dict, bytes, bytes]:
    """Return meta.json and the bytes of all files of train, and of val."""
    meta = json.loads((folder / "meta.json").read_text())
    files = meta.get(
        "files",
        {
            "train": ["train.bin"],
            "val": ["val.bin"],
        },
    )
    expected = ["meta.json", *files["train"], *files["val"]]
    assert sorted(read_files(folder)) == sorted(expected)
    train = b"".join((folder / file).read_bytes() for file in files["train"])
    val = b"".join((folder / file).read_bytes() for file in files["val"])
    return meta, train, val


@pytest.fixture(
    scope="module",
    params=[
        ("gpt2", 250),
        ("gpt2", 60),
        ("char", 150),
        ("bpe:400", 130),
    ],
    ids=["gpt2 250", "gpt2 60", "char 150", "bpe 130"],
)
def sources(request, shakespeare, tmp_path_factory) -> SimpleNamespace:
    """Prepare the same texts from a file of JSON, a Parquet file, and a folder of several."""
    tokenizer, count = request.param
    folder = tmp_path_factory.mktemp("sources")
    texts = cut_texts(shakespeare, count, 700)
    texts[9] = ""
    if count == 250:
        # over 2**20 characters: this one is split
        texts[9] = shakespeare[:1_100_000]
    write_jsonl(folder / "all.jsonl", texts)
    write_parquet(folder / "all.parquet", texts)
    # four files, one of them without rows. The number of a document decides its split, and
    # continues from one file to the next.
    parts = [
        texts[:47],
        [],
        texts[47:120],
        texts[120:],
    ]
    for i, part in enumerate(parts):
        write_parquet(folder / "parts" / f"{i}.parquet", part)
    flags = {"tokenizer": tokenizer, "data_dir": folder / "data", "cwd": folder}
    datasets = {}
    for source in ("all.jsonl", "all.parquet", "parts"):
        run("prepare.py", source, name=source, **flags)
        datasets[source] = join_files(folder / "data" / source)
    return SimpleNamespace(flags=flags, datasets=datasets)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["all.parquet", "parts"])
def test_several_files_give_what_one_gives(sources, source):
    meta, *tokens = sources.datasets["all.jsonl"]
    other_meta, *other_tokens = sources.datasets[source]
    assert other_tokens == tokens
    for key in ("tokenizer", "tokens", "fingerprint", "dtype", "vocab_size"):
        assert other_meta[key] == meta[key]


@pytest.mark.slow
def test_each_file_of_a_folder_has_its_own_shards(sources):
    one_meta, *_ = sources.datasets["all.jsonl"]
    parquet_meta, *_ = sources.datasets["all.parquet"]
    folder_meta, *_ = sources.datasets["parts"]
    files = folder_meta["files"]
    assert sum(files["train"].values()) == one_meta["tokens"]["train"]
    assert list(files) == ["train", "val"]
    for split, shards in files.items():
        assert list(shards) == [f"{split}-{i:05}.bin" for i in range(4)]
    # one file, one shard
    assert "files" not in one_meta
    assert "files" not in parquet_meta


def test_a_renamed_dataset_is_prepared_already(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 50)
    flags = {"tokenizer": "char", "data_dir": tmp_path / "data"}
    run("prepare.py", tmp_path / "text.txt", name="old", **flags)
    (tmp_path / "data/old").rename(tmp_path / "data/new")
    done = run("prepare.py", tmp_path / "text.txt", name="new", **flags)
    assert "exists already" in done.stdout


@pytest.mark.slow
def test_a_folder_of_shards_is_prepared_once(sources):
    done = run("prepare.py", "parts", name="parts", **sources.flags)
    assert "exists already" in done.stdout


def test_text_and_jsonl_and_parquet_together(tmp_path):
    texts = [
        "one two three\n" * 4,
        "café au lait\n" * 5,
        "vier fünf 🎭\n" * 6,
        "seven 8\n" * 7,
    ]
    # signs that mean something to a glob
    folder = tmp_path / "[d] a*b" / "__c"
    write_parquet(folder / "a#?.parquet", texts[:1], "body")
    (folder / "b.jsonl").write_text(json.dumps({"body": texts[1]}))
    write_parquet(folder / "c.PARQUET", texts[2:3], "body")
    (folder / "d.txt").write_text(texts[3])
    flags = {"text_key": "body", "val_fraction": 0.5, "tokenizer": "bpe:300"}
    meta, train, val = prepare(tmp_path, folder, **flags)
    tokenizer = from_meta(meta)
    # fewer than 100 documents: each is split
    first_halves = [text[: len(text) // 2] for text in texts]
    second_halves = [text[len(text) // 2 :] for text in texts]
    assert train == join_documents(tokenizer, first_halves)
    assert val == join_documents(tokenizer, second_halves)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak from /proc"
)
def test_memory_does_not_grow_with_the_number_of_files(shakespeare, tmp_path):
    # 2.5 million characters a file
    texts = [shakespeare[i : i + 1000] for i in range(0, 2_500_000, 1000)]
    files = [tmp_path / f"{i}.parquet" for i in range(8)]
    for file in files:
        write_parquet(file, texts)
    peaks = [
        measure_peak_memory(
            tmp_path,
            *files[:count],
            name=count,
        )
        for count in (2, 8)
    ]
    # the text is 15 MB longer, and its tokens 30 MB
    assert peaks[1] - peaks[0] < 15e6


def test_local_parquet_needs_no_server_and_no_cache(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["text " * 99])
    (tmp_path / "home").mkdir()
    flags = {"name": "x", "data_dir": tmp_path / "data"}
    python, *script = make_command("prepare.py", tmp_path / "a.parquet", **flags)
    # any connection ends this program
    done = subprocess.run(
        [python, PROGRAMS / "without_network.py", *script],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    assert done.stdout.count("\n") == 1, done.stderr
    # no cache was made there
    assert os.listdir(tmp_path / "home") == []


@pytest.fixture(scope="module")
def hub_folder(shakespeare, tmp_path_factory) -> Path:
    """Write small stand-ins for the files of tinystories and fineweb-edu. Return their folder."""
    folder = tmp_path_factory.mktemp("hub")
    texts = cut_texts(shakespeare, 2800, 400)
    # tinystories
    for i in range(4):
        path = folder / "data" / f"train-{i:05}-of-00004-abc.parquet"
        write_parquet(path, texts[i * 50 : i * 50 + 50])
    path = folder / "data" / "validation-00000-of-00001-abc.parquet"
    write_parquet(path, texts[200:230])
    # fineweb-edu
    for i in range(14):
        path = folder / "sample" / "10BT" / f"{i:03}_00000.parquet"
        write_parquet(path, texts[i * 200 : i * 200 + 200])
    (folder / "README.md").write_text("not a text of this set")
    return folder


class Hub(http.server.BaseHTTPRequestHandler):
    """Answer the few requests of a download from the hub, about the files in `server.folder`."""

    def reply(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        folder = self.server.folder
        self.server.asked.append(path)
        file = re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/(\w{40})/(.*)", path)
        if re.fullmatch(r"/api/datasets/[^/]+/[^/]+/tree/\w{40}", path):
            # the list of the files
            entries = []
            for entry in list_files(folder):
                name = str(entry.relative_to(folder))
                size = entry.stat().st_size
                entries.append(
                    {"path": name, "oid": "0" * 40, "type": "file", "size": size}
                )
            self.reply(json.dumps(entries).encode())
        elif file:
            # the client stores a file under its ETag, so each file needs its own
            content = (folder / file[2]).read_bytes()
            digest = hashlib.sha256(file[2].encode()).hexdigest()
            self.reply(
                content,
                X_Repo_Commit=file[1],
                ETag=json.dumps(digest),
            )
        else:
            self.reply(b"{}", 404)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serve_hub(folder: Path, home: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    """Serve the files of a folder as the Hugging Face Hub, with its cache in `home`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder = folder
        server.asked = []
        server.env = {
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        }
        # shutdown waits for the next look at it, by default every half second
        serve = partial(server.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(hub_folder, tmp_path):
    with serve_hub(hub_folder, tmp_path / "home") as server:
        yield server


@pytest.mark.slow
def test_share_of_a_hub_dataset_is_for_validation(hub, hub_folder, tmp_path):
    run("prepare.py", "fineweb-edu", data_dir=tmp_path, env=hub.env)
    _, _, val = join_files(tmp_path / "fineweb-edu")
    texts = []
    for path in sorted((hub_folder / "sample/10BT").iterdir()):
        texts += pyarrow.parquet.read_table(path)["text"].to_pylist()
    # the recipe's own split: every 2,000th document, so one of these 2,800
    assert GPT2.decode(np.frombuffer(val, "<u2").tolist()) == texts[1999]
    # and a split by flags: every second one
    flags = {"name": "other", "tokenizer": "char", "val_fraction": 0.5}
    run("prepare.py", "fineweb-edu", data_dir=tmp_path, env=hub.env, **flags)
    meta, _, val = join_files(tmp_path / "other")
    val_text = from_meta(meta).decode(np.frombuffer(val, "<u2").tolist())
    assert val_text == "\n".join(filter(None, texts[1::2]))


# --- what goes wrong -----------------------------------------------------------------------------


def make_parquet() -> bytes:
    """Return a file of numbers and texts; one text is missing."""
    file = pyarrow.BufferOutputStream()
    table = pyarrow.table(
        {
            "id": [1, 2, 3],
            "body": ["text " * 99, None, "text " * 77],
        }
    )
    pyarrow.parquet.write_table(table, file)
    return file.getvalue().to_pybytes()


def corrupt(data: bytes) -> bytes:
    """Return a Parquet file with an intact footer and corrupt texts."""
    footer = pyarrow.parquet.read_metadata(pyarrow.BufferReader(data))
    # where the texts are, of the two columns
    at = footer.row_group(0).column(1).dictionary_page_offset
    return data[:at] + b"\xff" * 30 + data[at + 30 :]


PARQUET = make_parquet()


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Return a file system of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_names_that_are_not_utf8(tmp_path):
    file = os.fsdecode(b"\xff.txt")
    (tmp_path / file).write_text(TEXT)
    # the second name is UTF-8, but the program can't print it
    names = [b"y\xff", "é".encode()]
    for name in names:
        run(
            "prepare.py",
            file,
            name=os.fsdecode(name),
            cwd=tmp_path,
            data_dir=tmp_path / "data",
            env={"PYTHONIOENCODING": "ascii"},
        )
    assert sorted(os.listdir(os.fsencode(tmp_path / "data"))) == names


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in a folder, by name, except the lock."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name != ".lock"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, vocab_size, counts",
    [("plays_char", 70, (4_301_851, 477_984)), ("plays", 50_257, (1_305_687, 148_236))],
    ids=["characters", "gpt2"],
)
def test_plays(prepared_plays, shakespeare, name, vocab_size, counts):
    meta, train, val = read_dataset(prepared_plays / name)
    assert (meta["format"], meta["name"], meta["dtype"]) == (1, name, "uint16")
    assert meta["vocab_size"] == vocab_size
    assert max(train + val) < vocab_size
    assert tuple(meta["tokens"].values()) == (len(train), len(val)) == counts
    tokenizer = from_meta(meta)
    at = int(len(shakespeare) * 0.9)
    assert train == tokenizer.encode(shakespeare[:at])
    assert val == tokenizer.encode(shakespeare[at:])
    # the fingerprint covers the tokenizer and every token
    described = [meta["tokenizer"], list(meta["tokens"].values())]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    # a run compares this sum with the one in its checkpoint
    files = read_files(prepared_plays / name)
    digest.update(files["train.bin"] + files["val.bin"])
    assert meta["fingerprint"] == digest.hexdigest()
    assert sorted(files) == ["meta.json", "train.bin", "val.bin"]


def test_existing_dataset_is_left_alone(tmp_path):
    # a file that is written again is another one, or has another time
    def list_stats() -> list:
        files = sorted((tmp_path / "plays_char").iterdir())
        return [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]

    run("prepare.py", "plays_char", data_dir=tmp_path)
    before = list_stats()
    done = run("prepare.py", "plays_char", data_dir=tmp_path)
    assert "exists already" in done.stdout
    assert list_stats() == before


def test_no_network_names_the_offline_dataset(tmp_path):
    # nothing listens there
    env = {"https_proxy": "http://127.0.0.1:9"}
    done = run(
        "prepare.py",
        "shakespeare_char",
        data_dir=tmp_path,
        code=2,
        env=env,
    )
    assert read_error(done).endswith("python prepare.py plays_char")
    assert list_files(tmp_path) == []


def test_another_text_as_tinyshakespeare_is_refused(tmp_path):
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("First Citizen:\n")
    # the recipe knows the sha256 of its text
    line = read_error(run("prepare.py", "shakespeare", data_dir=tmp_path, code=2))
    assert "tinyshakespeare/input.txt" in line


def test_file_with_several_links_counts_once(tmp_path):
    for name in ("b", "c"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "text.txt").write_text(f"text of {name} " * 9)
        # a link to a folder above: a search must end
        (tmp_path / "d" / name / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "d/c/other.txt").symlink_to("text.txt")
    (tmp_path / "linked").symlink_to("d/c")
    meta, train, _ = prepare(
        tmp_path, "d", "./d/b/text.txt", "linked", "d/b/../b/*.txt", val_fraction=0.5
    )
    assert re.findall(r"text of (\S+)", GPT2.decode(train)) == 4 * ["b"] + 4 * ["c"]
    assert meta["source"]["files"] == 2


def test_folders_behind_links_are_searched(tmp_path):
    for name in ("d", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"text of {name} " * 9)
    (tmp_path / "d/link").symlink_to(tmp_path / "elsewhere")
    assert prepare(tmp_path, "d")[0]["source"]["files"] == 2


@pytest.fixture
def learned(tmp_path) -> Path:
    """Prepare tmp_path/data/x, characters of tmp_path/a.txt. Return its folder."""
    (tmp_path / "a.txt").write_text("something to learn\n" * 9)
    prepare(tmp_path, tmp_path / "a.txt", tokenizer="char")
    return tmp_path / "data/x"


def prepare_again(folder: Path, **flags: object) -> bool:
    """Prepare the dataset of `learned` again. Return False if it existed already."""
    text = folder.parent.parent / "a.txt"
    flags = {"tokenizer": "char"} | flags
    done = run("prepare.py", text, name="x", data_dir=folder.parent, **flags)
    return "exists already" not in done.stdout


# each of these makes a dataset corrupt in a way of its own
def cut_val(folder: Path) -> None:
    os.truncate(folder / "val.bin", 6)


def lose_train(folder: Path) -> None:
    (folder / "train.bin").unlink()


def reverse_val(folder: Path) -> None:
    tokens = (folder / "val.bin").read_bytes()
    (folder / "val.bin").write_bytes(tokens[::-1])


def reverse_val_without_checksums(folder: Path) -> None:
    """Do so in a dataset of an older version."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["crc32"]
    (folder / "meta.json").write_text(json.dumps(meta))
    reverse_val(folder)


def change_a_checksum(folder: Path) -> None:
    text = (folder / "meta.json").read_text()
    crc32 = json.loads(text)["crc32"]["val.bin"]
    (folder / "meta.json").write_text(text.replace(crc32, crc32[::-1]))


def empty_meta(folder: Path) -> None:
    (folder / "meta.json").write_text("")


def replace_meta(folder: Path) -> None:
    (folder / "meta.json").write_text('{"tokens": 5}')


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        cut_val,
        lose_train,
        reverse_val,
        reverse_val_without_checksums,
        change_a_checksum,
        empty_meta,
        replace_meta,
    ],
)
def test_a_corrupt_dataset_is_prepared_again(learned, damage):
    first = read_dataset(learned)
    assert not prepare_again(learned)
    damage(learned)
    # files of a larger dataset and of a killed preparation go, too
    (learned / "train-00003.bin").touch()
    (learned / "val.bin.tmp").touch()
    assert prepare_again(learned)
    assert read_dataset(learned) == first
    assert sorted(read_files(learned)) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.slow
def test_a_dataset_with_other_settings_is_prepared_again(learned):
    # each differs from the one before
    for flags in (
        {"val_fraction": 0.5},
        {"tokenizer": "gpt2"},
        {"tokenizer": "bpe:300"},
        {"tokenizer": "bpe:257"},
    ):
        assert prepare_again(learned, **flags)
        assert not prepare_again(learned, **flags)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["char", "bpe:257"])
def test_a_dataset_of_a_changed_text_is_prepared_again(learned, tokenizer):
    prepare_again(learned, tokenizer=tokenizer)
    # a text of the same length
    text = learned.parent.parent / "a.txt"
    text.write_text("Something to learn\n" * 9)
    assert prepare_again(learned, tokenizer=tokenizer)
    assert not prepare_again(learned, tokenizer=tokenizer)


def test_bin_files_of_another_program_are_kept(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    folder = tmp_path / "data" / "x"
    folder.mkdir(parents=True)
    (folder / "val.bin").write_bytes(b"foreign")
    flags = {"name": "x", "data_dir": tmp_path / "data"}
    read_error(run("prepare.py", tmp_path / "a.txt", code=2, **flags))
    assert read_files(folder) == {"val.bin": b"foreign"}


@pytest.mark.slow
def test_hub_dataset_is_downloaded_once(hub, hub_folder, tmp_path):
    texts = []
    for path in sorted((hub_folder / "data").iterdir()):
        texts.append(pyarrow.parquet.read_table(path)["text"].to_pylist())
    *train_texts, val_texts = texts
    run("prepare.py", "tinystories", data_dir=tmp_path, env=hub.env)
    # the commit that the recipe names, and only the files of texts
    commit = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
    train_file = f"/resolve/{commit}/data/train-00003"
    assert any(train_file in path for path in hub.asked)
    assert not any("README" in path for path in hub.asked)
    meta, train, val = join_files(tmp_path / "tinystories")
    train_documents = filter(None, sum(train_texts, []))
    val_documents = filter(None, val_texts)
    train_ids = np.frombuffer(train, "<u2").tolist()
    val_ids = np.frombuffer(val, "<u2").tolist()
    # empty texts leave no trace
    assert train_ids == join_documents(GPT2, train_documents)
    assert val_ids == join_documents(GPT2, val_documents)
    # all of val is in its own shard
    assert meta["files"]["val"]["val-00000.bin"] == 0
    # a second time, the files come from the cache
    offline = hub.env | {"HF_HUB_OFFLINE": "1"}
    run("prepare.py", "tinystories", data_dir=tmp_path / "again", env=offline)
    assert join_files(tmp_path / "again/tinystories") == (meta, train, val)
    # unless it lacks one
    next((tmp_path / "home").rglob("train-00002*")).unlink()
    run(
        "prepare.py",
        "tinystories",
        data_dir=tmp_path / "less",
        env=offline,
        code=2,
    )


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Serve and prepare shards of 100 tokens in the format of llm.c: a header of 256 numbers (magic
    number, version, count), then the tokens."""
    place = tmp_path_factory.mktemp("fineweb")
    shards = place / "shards"
    shards.mkdir()
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, 100)
    names = ["fineweb_val_000000.bin"]
    names += [f"fineweb_train_{number:06d}.bin" for number in range(1, 104)]
    rng = np.random.default_rng(0)
    content = {}
    for name in names:
        tokens = rng.integers(50257, size=100, dtype="<u2")
        content[name] = header.tobytes() + tokens.tobytes()
        (shards / name).write_bytes(content[name])
    with serve_hub(shards, place / "home") as hub:
        done = run("prepare.py", "fineweb10B", data_dir=place, env=hub.env)
        yield SimpleNamespace(
            place=place,
            folder=place / "fineweb10B",
            content=content,
            printed=done.stdout,
            hub=hub,
            offline=hub.env | {"HF_HUB_OFFLINE": "1"},
        )


@pytest.mark.slow
def test_ready_shards_are_downloaded(fineweb):
    assert "10,300 train and 100 val tokens of gpt2" in fineweb.printed
    shards = fineweb.folder.glob("*.bin")
    assert {path.name: path.read_bytes() for path in shards} == fineweb.content
    # the commit that the recipe names
    commit = "/resolve/889765ea1f903759787add"
    assert any(commit in path for path in fineweb.hub.asked)


@pytest.mark.slow
def test_ready_shards_are_found_without_a_network(fineweb):
    flags = {"data_dir": fineweb.place, "env": fineweb.offline}
    done = run("prepare.py", "fineweb10B", **flags)
    assert "exists already" in done.stdout


@pytest.mark.slow
def test_ready_shards_are_trained_on(fineweb, tmp_path):
    flags = TINY | {"data_dir": fineweb.place, "dataset": "fineweb10B"}
    run("train.py", out_dir=tmp_path / "out", **flags | {"max_iters": 2})


@pytest.mark.slow
def test_a_truncated_ready_shard_is_refused(fineweb):
    # a download that was cut
    path = fineweb.folder / "fineweb_train_000007.bin"
    path.write_bytes(fineweb.content[path.name][:-2])
    flags = {"data_dir": fineweb.place}
    done = run("prepare.py", "fineweb10B", env=fineweb.offline, code=2, **flags)
    assert "1,224 bytes" in read_error(done)
    # its hint works
    path.unlink()
    run("prepare.py", "fineweb10B", env=fineweb.hub.env, **flags)
    assert path.read_bytes() == fineweb.content[path.name]


def test_ready_shards_have_a_tokenizer_already(tmp_path):
    flags = {"name": "other", "tokenizer": "char", "data_dir": tmp_path}
    assert "--tokenizer" in read_error(run("prepare.py", "fineweb10B", code=2, **flags))


@pytest.mark.slow
def test_climbmix_is_its_first_shards(hub, play, tmp_path):
    hub.folder = tmp_path / "shards"
    lines = play.read_text(encoding="utf-8").splitlines()
    # the last shard is for validation
    for number in [*range(100), 6542]:
        some_lines = lines[number % 50 :: 50][:5]
        texts = [f"{line} {number}" for line in some_lines]
        write_parquet(hub.folder / f"shard_{number:05d}.parquet", texts)
    # the recipe takes the first hundred and the last
    write_parquet(hub.folder / "shard_00100.parquet", ["not among the first"])
    done = run("prepare.py", "climbmix", data_dir=tmp_path, env=hub.env)
    meta = json.loads((tmp_path / "climbmix/meta.json").read_text())
    assert len(meta["files"]["train"]) == 101
    assert " of gpt2" in done.stdout
    sizes = [count for count in meta["files"]["val"].values() if count]
    assert len(sizes) == 1
    assert any("/resolve/915333b4f8b8684f39ae" in path for path in hub.asked)


def test_an_incomplete_download_is_refused(hub_folder, tmp_path, monkeypatch):
    shutil.copytree(hub_folder, tmp_path / "cache")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: f"{tmp_path}/cache"
    )
    recipe = read_recipe("tinystories")
    assert list(map(len, download_files(recipe))) == [4, 1]
    # as after an interrupted download
    next((tmp_path / "cache/data").glob("train-*")).unlink()
    with pytest.raises(UserError, match="expected 5 files, got 4"):
        download_files(recipe)


def test_hub_without_a_network_is_one_line(tmp_path):
    # an empty cache
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    flags = {"name": "mine", "tokenizer": "char", "data_dir": tmp_path / "data"}
    line = read_error(
        run(
            "prepare.py",
            "tinystories",
            code=2,
            env=env,
            **flags,
        )
    )
    assert "roneneldan/TinyStories" in line
    assert list_files(tmp_path / "data") == []


def test_corrupt_file_is_found_before_the_first_shard(hub_folder, tmp_path):
    folder = tmp_path / "less"
    shutil.copytree(hub_folder / "data", folder)
    # the first two files are intact, but no shard of them is written
    third = folder / "train-00002-of-00004-abc.parquet"
    third.write_bytes(corrupt(third.read_bytes()))
    done = run("prepare.py", folder, name="x", data_dir=tmp_path, code=2)
    assert str(third) in read_error(done)
    assert read_files(tmp_path / "x") == {}


def stop_at_file(child: Any, path: Path, stop_signal: int) -> None:
    """Send a signal to a preparation as soon as a file exists. Wait until it ends."""
    while child.poll() is None and not path.exists():
        time.sleep(0.001)
    child.send_signal(stop_signal)
    child.communicate()


def list_times(paths: Iterable[Path]) -> dict[Path, int]:
    """Return when each file was last written."""
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.slow
def test_killed_preparation_continues(hub_folder, tmp_path):
    source = hub_folder / "sample"
    folder = tmp_path / "x"
    run("prepare.py", source, name="x", data_dir=tmp_path / "new")
    # between two shards, in the middle of one, and by Ctrl-C
    for file, stop_signal, code in (
        ("train-00002.bin", signal.SIGKILL, -signal.SIGKILL),
        ("train-00006.bin.tmp", signal.SIGKILL, -signal.SIGKILL),
        ("train-00009.bin", signal.SIGINT, 130),
    ):
        child = start("prepare.py", source, name="x", data_dir=tmp_path)
        stop_at_file(child, folder / file, stop_signal)
        assert child.returncode == code
        # the shards of an incomplete dataset can't be trained on
        with pytest.raises(BadData):
            read_meta(folder)
    early = list_times(folder.glob("*-0000[0-7].bin"))
    done = run("prepare.py", source, name="x", data_dir=tmp_path)
    assert re.search(r"(9|10) of 14 shards", done.stdout)
    assert read_files(folder) == read_files(tmp_path / "new/x")
    # complete shards were not written again
    assert early
    assert list_times(early) == early


@pytest.mark.slow
def test_shards_of_another_request_are_not_used(hub_folder, play, tmp_path):
    source = hub_folder / "data"
    folder = tmp_path / "x"
    other_folder = tmp_path / "other" / "x"
    flags = {"name": "x", "tokenizer": "char"}

    def prepare(*args: object, **more: object) -> str:
        return run("prepare.py", *args, data_dir=tmp_path, **flags, **more).stdout

    prepare(source)
    # a dataset that was complete and lacks a shard is made again from the start
    (folder / "train-00001.bin").unlink()
    assert "continuing" not in prepare(source)
    assert (folder / "train-00001.bin").exists()
    # another split
    assert "continuing" not in prepare(source, val_fraction=0.2)
    run("prepare.py", source, val_fraction=0.2, data_dir=tmp_path / "other", **flags)
    assert join_files(folder) == join_files(other_folder)
    # one file, then again several: the files of the other kind go
    prepare(play)
    assert sorted(read_files(folder)) == ["meta.json", "train.bin", "val.bin"]
    prepare(source, val_fraction=0.2)
    assert join_files(folder) == join_files(other_folder)


# a text without a fault, for faults of the flags
TEXT_FILE = {"a.txt": b"text " * 99}
# an id: the arguments and the files
MISTAKES = {
    "unknown name": (["nosuch", "--name="], {}),
    "no text": ([], {}),
    "folder without text": (["d"], {"d/a.bin": b"x"}),
    "empty file": (["a.txt"], {"a.txt": b""}),
    "two characters": (["a.txt"], {"a.txt": b"Hi"}),
    "latin-1": (["a.txt"], {"a.txt": b"x" * 600_000 + b"\xe9t\xe9"}),
    "half a character": (["a.txt"], {"a.txt": "é".encode() * 400_000 + b"\xc3"}),
    "utf-16": (["a.txt"], {"a.txt": "text ".encode("utf-16-le") * 99}),
    "utf-16 with a mark": (
        ["a.txt"],
        {"a.txt": b"\xff\xfe" + "text ".encode("utf-16-le") * 99},
    ),
    "latin-1 in json": (["a.jsonl"], {"a.jsonl": b'{"text": "a"}\n{"text": "\xe9"}'}),
    "broken json": (["a.jsonl"], {"a.jsonl": b'{"text": "a"}\n\n{"text": "b"\n'}),
    "no text in rows": (["a.jsonl"], {"a.jsonl": b'{"text": null}\n{"txt": "b"}\n'}),
    "numbers in rows": (["a.jsonl"], {"a.jsonl": b'{"text": 3}\n'}),
    "no name": (["a.txt", "--name="], TEXT_FILE),
    "name in a folder": (["a.txt", "--name=y/z"], TEXT_FILE),
    "hidden name": (["a.txt", "--name=.y"], TEXT_FILE),
    "name of a recipe": (["a.txt", "--name=openwebtext"], TEXT_FILE),
    "stdin": (["/dev/stdin"], {}),
    "no val": (["a.txt", "--val_fraction=0"], TEXT_FILE),
    "no train": (["a.txt", "--val_fraction=1"], TEXT_FILE),
    "too little val": (["a.txt", "--val_fraction=1e-8"], TEXT_FILE),
    "unknown tokenizer": (["a.txt", "--tokenizer=morse"], TEXT_FILE),
    "bpe without N": (["a.txt", "--tokenizer=bpe:"], TEXT_FILE),
    "bpe too small": (["a.txt", "--tokenizer=bpe:256"], TEXT_FILE),
    "bpe too large": (["a.txt", "--tokenizer=bpe:10000000"], TEXT_FILE),
    "wide digits": (["a.txt", "--tokenizer=bpe:４００"], TEXT_FILE),
    "bpe in capitals": (["a.txt", "--tokenizer=BPE:300"], TEXT_FILE),
    "folder without tokenizer": (["a.txt", "--tokenizer=."], TEXT_FILE),
    "recipe's tokenizer": (["plays", "--name=", "--tokenizer=char"], {}),
    "recipe's split": (["tinystories", "--name=", "--val_fraction=0.1"], {}),
    "recipe's key": (["tinystories", "--name=", "--text_key=story"], {}),
    "text named parquet": (["a.parquet"], {"a.parquet": b"text"}),
    "truncated parquet": (
        ["b.parquet", "a.parquet"],
        {"a.parquet": PARQUET, "b.parquet": PARQUET[:-9]},
    ),
    "no such column": (["a.parquet"], {"a.parquet": PARQUET}),
    "corrupt parquet": (
        ["a.parquet", "--text_key=body"],
        {"a.parquet": corrupt(PARQUET)},
    ),
}


@pytest.mark.parametrize("args, files", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line(tmp_path, args, files):
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    # a mistake's own --name comes last and wins
    all_args = ["--name=x", f"--data_dir={tmp_path}/data", *args]
    line = read_error(run("prepare.py", *all_args, cwd=tmp_path, code=2))
    if len(args) == 1 and args[0] in files:
        # the file, or the dataset
        assert args[0] in line or "x: " in line
    if args[:1] == ["nosuch"]:
        # the existing names
        assert "tinystories" in line
        assert "shakespeare_char" in line
    assert list_files(tmp_path / "data" / "x") == []


@pytest.mark.slow
def test_file_size_limit_keeps_the_existing_dataset(shakespeare, tmp_path):
    text = tmp_path / "a.txt"
    data_dir = tmp_path / "data"
    # a new name, and one whose dataset must stay as it is
    text.write_text("something to learn\n" * 9)
    before = prepare(tmp_path, text)
    # its tokens are larger than the limit
    text.write_text(shakespeare[:400_000])
    for name in ("x", "y"):
        done = subprocess.run(
            make_command("prepare.py", text, name=name, data_dir=data_dir),
            capture_output=True,
            text=True,
            preexec_fn=limit_files,
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
    assert read_dataset(data_dir / "x") == before
    expected = ["meta.json", "train.bin", "val.bin"]
    assert sorted(read_files(data_dir / "x")) == expected
    assert list_files(data_dir / "y") == []


@pytest.mark.slow
def test_full_disk_keeps_complete_shards(disk, hub_folder, tmp_path):
    flags = {"name": "x", "tokenizer": "char", "val_fraction": 0.1}
    run("prepare.py", hub_folder / "sample", data_dir=disk, **flags, code=1)
    # the shards that fit; a disk may get more room, so they are worth keeping
    complete = len(list((disk / "x").glob("val-*.bin")))
    assert 1 <= complete <= 5
    assert not list((disk / "x").glob("*.tmp"))
    # with more room, it continues
    subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
    done = run("prepare.py", hub_folder / "sample", data_dir=disk, **flags)
    assert f"{complete} of 14 shards" in done.stdout
    run("prepare.py", hub_folder / "sample", data_dir=tmp_path, **flags)
    assert join_files(disk / "x") == join_files(tmp_path / "x")


@pytest.mark.slow
def test_read_only_disk(disk):
    # too large for this disk
    flags = {"name": "x", "tokenizer": "char", "val_fraction": 0.9}
    run("prepare.py", "plays", data_dir=disk, code=1, **flags)
    (disk / "a.txt").write_text(TEXT)
    run("prepare.py", disk / "a.txt", data_dir=disk, name="y")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    read_error(run("prepare.py", "plays_char", data_dir=disk, code=2))
    # an existing dataset takes no lock, which would be a file
    done = run("prepare.py", disk / "a.txt", data_dir=disk, name="y")
    assert "exists already" in done.stdout


@pytest.mark.parametrize(
    "stop_signal", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"]
)
def test_signal_leaves_no_files(shakespeare, tmp_path, stop_signal):
    text = tmp_path / "a.txt"
    data_dir = tmp_path / "data"
    # long enough to be caught while it is encoded
    text.write_text(shakespeare * 10)
    child = start("prepare.py", text, name="x", data_dir=data_dir)
    while child.poll() is None and not (data_dir / "x/train.bin.tmp").exists():
        time.sleep(0.01)
    child.send_signal(stop_signal)
    _, err = child.communicate()
    assert child.returncode == 130
    assert not err
    assert list_files(data_dir) == []


CHANGES = {
    "longer": ("a.txt", lambda file: file.write_text(TEXT + "é")),
    "other letters": ("a.txt", lambda file: file.write_text(TEXT.upper())),
    "empty": ("a.txt", lambda file: file.write_text("")),
    "removed": ("a.txt", lambda file: file.unlink()),
    "more rows": ("a.jsonl", lambda file: file.write_text(file.read_text() * 2)),
    "no rows": ("a.jsonl", lambda file: file.write_text("")),
}


@pytest.mark.parametrize("name, change", CHANGES.values(), ids=CHANGES)
def test_text_that_changes_during_reading_is_refused(
    tmp_path, monkeypatch, name, change
):
    import prepare

    file = tmp_path / name
    content = {
        "a.txt": TEXT,
        "a.jsonl": json.dumps({"text": TEXT}) + "\n",
    }
    file.write_text(content[name])
    write_tokens = prepare.write_tokens

    def change_and_write(*args):
        change(file)
        return write_tokens(*args)

    # the text is read twice: to count it, then to encode it
    monkeypatch.setattr(prepare, "write_tokens", change_and_write)
    config = prepare.PrepareConfig("x", "char", data_dir=str(tmp_path / "data"))
    with pytest.raises((UserError, FileNotFoundError)), ExitStack() as opened:
        prepare.prepare(
            config,
            {"tokenizer": "char"},
            [str(file)],
            opened,
        )
    assert list_files(tmp_path / "data") == []


def test_closed_stdout_keeps_the_dataset(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    args = make_command("prepare.py", tmp_path / "a.txt", name="x", data_dir=tmp_path)
    # every write to it fails as on a full disk
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            args,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert read_dataset(tmp_path / "x")[0]["name"] == "x"


@pytest.mark.slow
def test_two_preparations_at_once(shakespeare, tmp_path):
    # both start before one of them ends
    text = tmp_path / "a.txt"
    text.write_text(shakespeare)
    flags = {"name": "x", "data_dir": tmp_path / "data"}
    children = [start("prepare.py", text, **flags) for _ in range(2)]
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    # one waits for the other and finds its dataset
    existed = ["exists already" in stdout for stdout, _ in outputs]
    assert sorted(existed) == [False, True]
    _, train, val = read_dataset(tmp_path / "data" / "x")
    assert (len(train), len(val)) == (1_305_687, 148_236)
