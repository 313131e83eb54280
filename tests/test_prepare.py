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
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPO, TINY, command, complaint, run, start

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
    train, val = (
        np.fromfile(folder / f"{split}.bin", meta["dtype"]).tolist()
        for split in ("train", "val")
    )
    return meta, train, val


def files_in(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders, except locks."""
    return [
        path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    ]


def prepare(
    tmp_path: Path, *args: object, **flags: object
) -> tuple[dict, list[int], list[int]]:
    run(
        "prepare.py", *args, name="x", data_dir=tmp_path / "data", cwd=tmp_path, **flags
    )
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
        assert re.match(r"[A-Z][A-Za-z' -]+:\n\S", speech), speech
        assert not re.search(r"^ | $|  |\n\n", speech, re.MULTILINE), speech
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
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(
        TINYSHAKESPEARE.read_bytes()
    )
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
    expected = GPT2.encode(long_text[:at]), GPT2.encode(long_text[at:])
    _, train, val = prepare(tmp_path, "long.txt", val_fraction=0.2)
    assert (train, val) == expected


def test_text_without_a_place_to_cut(tmp_path):
    text = "abcdefg" * 100_000
    (tmp_path / "long.txt").write_text(text)
    _, train, val = prepare(tmp_path, "long.txt")
    assert train == GPT2.encode(text[:630_000]) and val == GPT2.encode(text[630_000:])


def test_few_documents_are_split_each(tmp_path):
    texts = ["one two three four five\n" * 5, "", "six seven eight nine ten\n" * 9]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    _, train, val = prepare(tmp_path, "2.txt", "1.txt", "0.txt", val_fraction=0.25)
    first, last = texts[2], texts[0]
    at, last_at = int(len(first) * 0.75), int(len(last) * 0.75)
    assert train == GPT2.encode(first[:at]) + [EOT] + GPT2.encode(last[:last_at])
    assert val == GPT2.encode(first[at:]) + [EOT] + GPT2.encode(last[last_at:])


def test_of_many_documents_every_tenth_is_for_validation(tmp_path):
    texts = [f"Document {i}.\n" + "word " * i for i in range(250)]
    texts[7] = "long " * 300_000
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts)
    )
    _, train, val = prepare(tmp_path, "docs.jsonl")
    at = int(len(texts[7]) * 0.9)
    to_val = {i: texts[i] for i in range(9, 250, 10)} | {7: texts[7][at:]}
    to_train = {i: texts[i] for i in range(250) if i not in to_val} | {7: texts[7][:at]}
    for tokens, split in ((train, to_train), (val, to_val)):
        expected = [
            token for i in sorted(split) for token in (EOT, *GPT2.encode(split[i]))
        ]
        assert tokens == expected[1:]


def test_characters_and_a_newline_between_documents(tmp_path):
    (tmp_path / "a.txt").write_text("abcdé" * 20)
    (tmp_path / "b.txt").write_text("dcba" * 20)
    meta, train, val = prepare(tmp_path, "a.txt", "b.txt", tokenizer="char")
    assert meta["tokenizer"] == {"kind": "char", "chars": "\nabcdé"}
    tokenizer = from_meta(meta)
    assert tokenizer.decode(train) == "abcdé" * 18 + "\n" + "dcba" * 18
    assert tokenizer.decode(val) == "abcdé" * 2 + "\n" + "dcba" * 2
    meta, train, val = prepare(tmp_path, "b.txt", tokenizer="char")
    assert meta["tokenizer"]["chars"] == "abcd" and len(train) == 72 and len(val) == 8


def test_more_than_65536_characters_take_four_bytes(tmp_path):
    chars = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    (tmp_path / "a.txt").write_text(chars, encoding="utf-8")
    meta, train, val = prepare(tmp_path, "a.txt", tokenizer="char")
    assert meta["dtype"] == "uint32" and train + val == list(range(70_000))


def test_folders_and_globs(tmp_path):
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
    _, train, _ = prepare(tmp_path, "b", "e.log", "*/?.log", "b/c.py", val_fraction=0.5)
    found = re.findall(r"(?:^|<\|endoftext\|>)text of (\S+)", GPT2.decode(train))
    assert found == [
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
    for name, end in (("unix", "\n"), ("dos", "\r\n"), ("mac", "\r")):
        (tmp_path / f"{name}.txt").write_bytes(end.join(lines).encode())
    unix, dos, mac = (
        prepare(tmp_path, f"{name}.txt", tokenizer=tokenizer)
        for name in ("unix", "dos", "mac")
    )
    assert (
        unix[1:] == dos[1:] == mac[1:] and unix[0]["tokenizer"] == dos[0]["tokenizer"]
    )


def test_lines_of_json(tmp_path):
    lines = [
        '{"body": "caf\\u00e9 au lait, please", "text": 1}',
        "",
        '{"body": "half a \\ud83d pair here"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    _, train, val = prepare(tmp_path, "a.jsonl", text_key="body", val_fraction=0.5)
    assert GPT2.decode(train) == "café au la<|endoftext|>half a ? "
    assert GPT2.decode(val) == "it, please<|endoftext|>pair here"


ROWS = [{"text": "one café\nfor all of us, " * 9, "id": 1}, {"text": "and two " * 22}]
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


@pytest.mark.parametrize(
    "name, content",
    WRAPPINGS.values(),
    ids=WRAPPINGS,
)
def test_json_in_any_wrapping_gives_its_texts(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    meta, train, val = prepare(tmp_path, name, val_fraction=0.5, tokenizer="char")
    halves = [
        (row["text"][: len(row["text"]) // 2], row["text"][len(row["text"]) // 2 :])
        for row in ROWS
    ]
    for tokens, split in ((train, 0), (val, 1)):
        assert from_meta(meta).decode(tokens) == "\n".join(
            half[split] for half in halves
        )


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
    (tmp_path / name).write_bytes(
        compress_with(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    )
    _, train, val = prepare(tmp_path, name)
    assert GPT2.decode(train) + GPT2.decode(val) == TEXT


def zip_of(text: bytes) -> bytes:
    """Return a zip archive with one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", text)
    return file.getvalue()


def tar_of(text: bytes) -> bytes:
    """Return a compressed tar archive with one file."""
    file, info = io.BytesIO(), tarfile.TarInfo("a.txt")
    info.size = len(text)
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.addfile(info, io.BytesIO(text))
    return file.getvalue()


ZSTD = b"\x28\xb5\x2f\xfd" + bytes(range(256))


# an id: the name of the file, its content, and a part of the error
OTHER_FORMATS = {
    "zip": ("a.zip", zip_of(TEXT.encode()), "unzip"),
    "docx": ("a.docx", zip_of(TEXT.encode()), "zip archive"),
    "zip in gzip": ("a.txt.gz", compress(zip_of(TEXT.encode())), "unzip"),
    "tar": ("a.tar.gz", tar_of(TEXT.encode()), "tar -xf"),
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
    line = complaint(
        run(
            "prepare.py",
            name,
            name="x",
            data_dir=tmp_path / "data",
            cwd=tmp_path,
            code=2,
        )
    )
    assert name in line and expected in line and files_in(tmp_path / "data") == []


def test_rows_without_a_text_are_skipped_with_a_note(tmp_path):
    texts = [f"Document {i}\n" * 9 for i in range(130)]
    rows = [{"text": text} for text in texts]
    holes = [
        *rows[:7],
        {"text": None, "id": 1},
        {"body": "x"},
        *rows[7:],
        {"text": 3},
        "text",
        [],
    ]
    write_jsonl(tmp_path / "intact.jsonl", texts)
    (tmp_path / "holes.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in holes)
    )
    write_parquet(tmp_path / "holes.parquet", [*texts[:7], None, *texts[7:], None])
    expected = prepare(tmp_path, "intact.jsonl")[1:]
    for name, counts, keys in (
        ("holes.jsonl", "5 of 135", "text, id, body"),
        ("holes.parquet", "2 of 132", "id, text"),
    ):
        done = run(
            "prepare.py", name, name="y", data_dir=tmp_path / "data", cwd=tmp_path
        )
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("note: ")
        assert f"{counts} rows" in done.stderr and f"row 8 of {name}" in done.stderr
        assert keys in done.stderr
        assert read_dataset(tmp_path / "data/y")[1:] == expected


def test_line_ends_in_rows_are_those_of_files(tmp_path):
    unix = ["first line\nsecond\n\nlast\n" * 9, "other\ntext\n" * 9]
    dos = ["\ufeff" + unix[0].replace("\n", "\r\n"), unix[1].replace("\n", "\r")]
    for name, texts in (("unix", unix), ("dos", dos)):
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
        write_parquet(tmp_path / f"{name}.parquet", texts)
    sets = [
        prepare(tmp_path, name)[1:]
        for name in ("unix.jsonl", "dos.jsonl", "dos.parquet")
    ]
    assert sets[0] == sets[1] == sets[2]


def peak_memory(tmp_path: Path, *args: object, name: str) -> int:
    """Return the bytes of memory that prepare.py takes for a dataset of characters."""
    flags = {"name": name, "tokenizer": "char", "data_dir": tmp_path / "data"}
    python, *script = command("prepare.py", *args, **flags)
    done = subprocess.run(
        [python, PROGRAMS / "peak_memory.py", *script],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak from /proc"
)
def test_memory_does_not_grow_with_the_text(shakespeare, tmp_path):
    peaks = []
    for times in (1, 7):
        (tmp_path / f"{times}.txt").write_text(shakespeare * times)
        peaks.append(peak_memory(tmp_path, tmp_path / f"{times}.txt", name=f"x{times}"))
    assert peaks[1] - peaks[0] < 15e6  # the text is 29 MB longer, and its tokens 57 MB


# --- tokenizers ----------------------------------------------------------------------------------

SCRIPTS = (
    "Fluß, naïve 東京は夜。 Привет мир! مرحبا नमस्ते 🎭🏴‍☠️👩‍👩‍👧 e\u0301 \r\n\t<|endoftext|>"
    "\xa0 1603\n"
)


def test_a_bpe_of_mixed_scripts(shakespeare, tmp_path):
    text = SCRIPTS * 300 + shakespeare[:300_000] + "quixotry " * 40_000
    (tmp_path / "a.txt").write_bytes(text.encode())
    text = text.replace("\r\n", "\n")
    sets = []
    for threads in (1, 3):
        done = run(
            "prepare.py",
            tmp_path / "a.txt",
            name="x",
            tokenizer="bpe:1000",
            val_fraction=0.6,
            data_dir=tmp_path / str(threads),
            env={"RAYON_NUM_THREADS": str(threads)},
        )
        assert "val tokens of bpe:1000, 1,000 in the vocabulary" in done.stdout
        sets.append(read_dataset(tmp_path / str(threads) / "x"))
    assert sets[0] == sets[1]
    meta, train, val = sets[0]
    tokenizer = from_meta(meta)
    at = int(len(text) * 0.4)
    assert "quixotry" not in text[:at]
    assert tokenizer.decode(train) == text[:at] and tokenizer.decode(val) == text[at:]
    assert train == tokenizer.encode(text[:at]) and val == tokenizer.encode(text[at:])
    assert len(train) < 0.5 * len(text[:at].encode())  # it has learned something
    tokens = [tokenizer.token_bytes(i) for i in range(1000)]
    assert b" the" in tokens and any("東京は夜".encode() in token for token in tokens)
    assert not any(b"uixot" in token for token in tokens)  # nothing of val


def write_tokenizer(folder: Path, text: str, **steps: object) -> Path:
    """Write the tokenizer.json of a BPE of this text without bytes. Return its folder."""
    import tokenizers

    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token=steps.pop("unk_token", None))
    )
    made.decoder = tokenizers.decoders.Fuse()
    for name, step in steps.items():
        setattr(made, name, step)
    made.train_from_iterator(
        [text],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, show_progress=False, special_tokens=["<unk>"]
        ),
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_that_loses_text_is_noted(play, tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    text = play.read_text(encoding="utf-8")
    late = tmp_path / "late.jsonl"  # the loss comes after 200 documents
    write_jsonl(
        late, [*[text[i * 200 : i * 200 + 200] for i in range(200)], "Ünique " * 20]
    )
    lossy = {
        "lower": write_tokenizer(
            tmp_path / "lower", text, normalizer=normalizers.Lowercase()
        ),
        "spaces": write_tokenizer(
            tmp_path / "spaces", text, pre_tokenizer=pre_tokenizers.Whitespace()
        ),
        "drops": write_tokenizer(tmp_path / "drops", text),
        "unknown": write_tokenizer(tmp_path / "unknown", text, unk_token="<unk>"),
    }
    said = {}
    for name, folder in lossy.items():
        file = late if name in ("drops", "unknown") else play
        done = run(
            "prepare.py", file, name=name, tokenizer=folder, data_dir=tmp_path / "data"
        )
        assert done.stderr.startswith("note: ") and done.stderr.count("\n") == 1, (
            done.stderr
        )
        said[name] = done.stderr
    assert " 0.00%" in said["drops"] and " 0.00%" in said["lower"]
    assert " 0.00%" not in said["unknown"] and "Ünique" in said["unknown"]
    for name in ("drops", "unknown"):
        done = run(
            "prepare.py",
            play,
            name="kept",
            tokenizer=lossy[name],
            data_dir=tmp_path / f"kept-{name}",
        )
        assert not done.stderr


def test_an_encoding_that_drops_text_is_noted(play, tmp_path):
    done = run(
        "prepare.py", play, name="x", tokenizer="lossy", data_dir=tmp_path, env=PLUGIN
    )
    assert (
        "loses text" in done.stderr
        and "!" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_a_bpe_of_one_long_word_takes_seconds():
    started = time.process_time()
    tokens = from_meta({"tokenizer": train_bpe(["a" * 1_000_000, " so", " so"], 300)})
    assert time.process_time() - started < 20  # 400,000 letters took 90 s
    assert (
        tokens.decode(tokens.encode("aaaa so")) == "aaaa so"
        and len(tokens.encode(" so")) == 1
    )


def test_long_words_change_no_merge_of_other_text(shakespeare):
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = shakespeare[:600_000]
    made.train_from_iterator(
        [text],
        tokenizers.trainers.BpeTrainer(
            vocab_size=999,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    ours = from_meta({"tokenizer": train_bpe([text], 1000)})
    assert {token: i for token, i in ours.ids.items() if i < 999} == made.get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_ends_the_training_of_a_bpe(tmp_path, how):
    words = np.random.default_rng(0).integers(
        97, 123, size=(400_000, 9), dtype=np.uint8
    )
    words[:, -1] = ord(" ")
    (tmp_path / "a.txt").write_bytes(words.tobytes())
    child = start(
        "prepare.py",
        tmp_path / "a.txt",
        name="x",
        tokenizer="bpe:60000",
        data_dir=tmp_path / "data",
    )
    while child.poll() is None and not (tmp_path / "data/x/.lock").exists():
        time.sleep(0.01)
    time.sleep(4)
    assert child.poll() is None and not (tmp_path / "data/x/train.bin.tmp").exists()
    sent = time.monotonic()
    child.send_signal(how)
    _, err = child.communicate()
    assert time.monotonic() - sent < 2 and child.returncode == -how and not err
    assert files_in(tmp_path / "data") == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_does_not_wait_for_an_encoder(shakespeare, tmp_path, how):
    folder = write_tokenizer(
        tmp_path / "whole", shakespeare[:20_000], unk_token="<unk>"
    )
    (tmp_path / "a.txt").write_text(shakespeare * 5)
    child = start(
        "prepare.py",
        tmp_path / "a.txt",
        name="x",
        tokenizer=folder,
        data_dir=tmp_path / "data",
    )
    while child.poll() is None and not (tmp_path / "data/x/train.bin.tmp").exists():
        time.sleep(0.01)
    time.sleep(1)
    sent = time.monotonic()
    child.send_signal(how)
    _, err = child.communicate()
    assert time.monotonic() - sent < 2 and child.returncode == 130 and not err
    assert files_in(tmp_path / "data") == []


def test_checkpoint_holds_an_encoding_of_tiktoken(play, tmp_path):
    flags = {"tokenizer": "wide", "data_dir": tmp_path}
    run("prepare.py", play, name="x", env=PLUGIN, **flags)
    meta, train, val = read_dataset(tmp_path / "x")
    assert (meta["vocab_size"], meta["dtype"]) == (10_000 + 65_536, "uint32")
    assert sum(token > 65_536 for token in train) > len(train) / 4  # pairs of letters
    assert from_meta(meta).decode(train + val) == play.read_text()
    # where the plugin is not installed
    complaint(run("prepare.py", play, name="y", code=2, **flags))
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
    assert done.stdout.startswith("To be") and len(done.stdout) > 9


# --- parquet, and datasets of several shards ------------------------------------------------------


def write_parquet(path: Path, texts: list, key: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(
        {
            "id": pyarrow.array(range(len(texts))),
            key: pyarrow.array(texts, pyarrow.string()),
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=40)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts_of(shakespeare: str, count: int, size: int) -> list[str]:
    """Return `count` texts of `size` characters, one of them empty."""
    return [
        shakespeare[i * size : (i + 1) * size] if i != 5 else "" for i in range(count)
    ]


def joined(folder: Path) -> tuple[dict, bytes, bytes]:
    """Return meta.json and the bytes of all files of train, and of val."""
    meta = json.loads((folder / "meta.json").read_text())
    files = meta.get("files", {"train": ["train.bin"], "val": ["val.bin"]})
    assert sorted(dataset_files(folder)) == sorted(
        ["meta.json", *files["train"], *files["val"]]
    )
    train, val = (
        b"".join((folder / file).read_bytes() for file in files[split])
        for split in ("train", "val")
    )
    return meta, train, val


@pytest.mark.parametrize(
    "tokenizer, count", [("gpt2", 250), ("gpt2", 60), ("char", 150), ("bpe:400", 130)]
)
def test_several_files_give_what_one_gives(shakespeare, tmp_path, tokenizer, count):
    texts = texts_of(shakespeare, count, 700)
    texts[9] = (
        shakespeare[:1_100_000] if count == 250 else ""
    )  # one that is split in any case
    write_jsonl(tmp_path / "all.jsonl", texts)
    for i, (at, to) in enumerate(((0, 47), (47, 47), (47, 120), (120, count))):
        write_parquet(tmp_path / "parts" / f"{i}.parquet", texts[at:to])
    write_parquet(tmp_path / "all.parquet", texts)
    sets = []
    for i, args in enumerate((["all.jsonl"], ["all.parquet"], ["parts"])):
        run(
            "prepare.py",
            *args,
            name=f"x{i}",
            tokenizer=tokenizer,
            data_dir=tmp_path / "data",
            cwd=tmp_path,
        )
        sets.append(joined(tmp_path / "data" / f"x{i}"))
    for meta, train, val in sets[1:]:
        assert (train, val) == sets[0][1:]
        for key in ("tokenizer", "tokens", "fingerprint", "dtype", "vocab_size"):
            assert meta[key] == sets[0][0][key]
    assert sum(sets[2][0]["files"]["train"].values()) == sets[2][0]["tokens"]["train"]
    assert [list(files) for files in sets[2][0]["files"].values()] == [
        [f"{split}-{k:05}.bin" for k in range(4)] for split in ("train", "val")
    ]
    assert "files" not in sets[0][0] and "files" not in sets[1][0]
    assert (
        "exists already"
        in run(
            "prepare.py",
            "parts",
            name="x2",
            tokenizer=tokenizer,
            data_dir=tmp_path / "data",
            cwd=tmp_path,
        ).stdout
    )


def test_text_and_jsonl_and_parquet_together(tmp_path):
    texts = [
        "one two three\n" * 4,
        "café au lait\n" * 5,
        "vier fünf 🎭\n" * 6,
        "seven 8\n" * 7,
    ]
    folder = tmp_path / "[d] a*b" / "__c"  # signs that mean something to a glob
    write_parquet(folder / "a#?.parquet", texts[:1], "body")
    (folder / "b.jsonl").write_text(json.dumps({"body": texts[1]}))
    write_parquet(folder / "c.PARQUET", texts[2:3], "body")
    (folder / "d.txt").write_text(texts[3])
    meta, train, val = prepare(
        tmp_path, folder, text_key="body", val_fraction=0.5, tokenizer="bpe:300"
    )
    tokenizer = from_meta(meta)
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    for tokens, split in ((train, 0), (val, 1)):
        expected = [
            token
            for half in halves
            for token in (tokenizer.eot, *tokenizer.encode(half[split]))
        ]
        assert tokens == expected[1:]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak from /proc"
)
def test_memory_does_not_grow_with_the_number_of_files(shakespeare, tmp_path):
    texts = [shakespeare[i : i + 1000] for i in range(0, 2_500_000, 1000)]
    for k in range(8):
        write_parquet(tmp_path / f"{k}.parquet", texts)
    peaks = [
        peak_memory(
            tmp_path, *(tmp_path / f"{k}.parquet" for k in range(files)), name=files
        )
        for files in (2, 8)
    ]
    assert peaks[1] - peaks[0] < 15e6  # the text is 15 MB longer, and its tokens 30 MB


def test_local_parquet_needs_no_server_and_no_cache(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["text " * 99])
    (tmp_path / "home").mkdir()
    flags = {"name": "x", "data_dir": tmp_path / "data"}
    python, *script = command("prepare.py", tmp_path / "a.parquet", **flags)
    done = subprocess.run(
        [python, PROGRAMS / "without_network.py", *script],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0 and not done.stderr and done.stdout.count("\n") == 1, (
        done.stderr
    )
    assert os.listdir(tmp_path / "home") == []


@pytest.fixture(scope="module")
def hub_folder(shakespeare, tmp_path_factory) -> Path:
    """Small stand-ins for the files of tinystories and fineweb-edu, as the hub has them."""
    folder = tmp_path_factory.mktemp("hub")
    texts = texts_of(shakespeare, 2800, 400)
    for i in range(4):
        write_parquet(
            folder / "data" / f"train-{i:05}-of-00004-abc.parquet",
            texts[i * 50 : i * 50 + 50],
        )
    write_parquet(
        folder / "data" / "validation-00000-of-00001-abc.parquet", texts[200:230]
    )
    for i in range(14):
        write_parquet(
            folder / "sample" / "10BT" / f"{i:03}_00000.parquet",
            texts[i * 200 : i * 200 + 200],
        )
    (folder / "README.md").write_text("not a text of this set")
    return folder


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that a download takes, about the files in `server.folder`."""

    def reply(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path, folder = (
            urllib.parse.unquote(self.path.partition("?")[0]),
            self.server.folder,
        )
        self.server.asked.append(path)
        if re.fullmatch(r"/api/datasets/[^/]+/[^/]+/tree/\w{40}", path):
            self.reply(
                json.dumps(
                    [
                        {
                            "path": str(file.relative_to(folder)),
                            "oid": "0" * 40,
                            "type": "file",
                            "size": file.stat().st_size,
                        }
                        for file in files_in(folder)
                    ]
                ).encode()
            )
        elif file := re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/(\w{40})/(.*)", path):
            self.reply(
                (folder / file[2]).read_bytes(),
                X_Repo_Commit=file[1],
                ETag=json.dumps(hashlib.sha256(file[2].encode()).hexdigest()),
            )
        else:
            self.reply(b"{}", 404)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(hub_folder, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.asked = hub_folder, []
        server.env = {
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        }
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_share_of_a_hub_dataset_is_for_validation(hub, hub_folder, tmp_path):
    run("prepare.py", "fineweb-edu", data_dir=tmp_path, env=hub.env)
    _, train, val = joined(tmp_path / "fineweb-edu")
    texts = [
        text
        for path in sorted((hub_folder / "sample/10BT").iterdir())
        for text in pyarrow.parquet.read_table(path)["text"].to_pylist()
    ]
    assert GPT2.decode(np.frombuffer(val, "<u2").tolist()) == texts[1999]
    run(
        "prepare.py",
        "fineweb-edu",
        name="other",
        tokenizer="char",
        val_fraction=0.5,
        data_dir=tmp_path,
        env=hub.env,
    )
    meta, _, val = joined(tmp_path / "other")
    assert from_meta(meta).decode(np.frombuffer(val, "<u2").tolist()) == "\n".join(
        filter(None, texts[1::2])
    )


# --- what goes wrong -----------------------------------------------------------------------------


def parquet_bytes() -> bytes:
    """Return a file of numbers and texts; one text is missing."""
    file = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": [1, 2, 3], "body": ["text " * 99, None, "text " * 77]})
    pyarrow.parquet.write_table(table, file)
    return file.getvalue().to_pybytes()


def corrupt(data: bytes) -> bytes:
    """Return a Parquet file with an intact footer and corrupt texts."""
    footer = pyarrow.parquet.read_metadata(pyarrow.BufferReader(data))
    at = footer.row_group(0).column(1).dictionary_page_offset
    return data[:at] + b"\xff" * 30 + data[at + 30 :]


PARQUET = parquet_bytes()


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


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text(TEXT)
    for name in (b"y\xff", "é".encode()):
        run(
            "prepare.py",
            os.fsdecode(b"\xff.txt"),
            name=os.fsdecode(name),
            cwd=tmp_path,
            data_dir=tmp_path / "data",
            env={"PYTHONIOENCODING": "ascii"},
        )
    assert sorted(os.listdir(os.fsencode(tmp_path / "data"))) == [
        b"y\xff",
        "é".encode(),
    ]


def dataset_files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in a folder, by name, except the lock."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name != ".lock"
    }


@pytest.mark.parametrize(
    "name, vocab_size, counts",
    [("plays_char", 70, (4_301_851, 477_984)), ("plays", 50_257, (1_305_687, 148_236))],
    ids=["characters", "gpt2"],
)
def test_plays(prepared_plays, shakespeare, name, vocab_size, counts):
    meta, train, val = read_dataset(prepared_plays / name)
    assert (meta["format"], meta["name"], meta["dtype"]) == (1, name, "uint16")
    assert meta["vocab_size"] == vocab_size and max(train + val) < vocab_size
    assert tuple(meta["tokens"].values()) == (len(train), len(val)) == counts
    tokenizer = from_meta(meta)
    at = int(len(shakespeare) * 0.9)
    assert train == tokenizer.encode(shakespeare[:at])
    assert val == tokenizer.encode(shakespeare[at:])
    described = [meta["tokenizer"], list(meta["tokens"].values())]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    files = dataset_files(prepared_plays / name)
    digest.update(files["train.bin"] + files["val.bin"])
    assert meta["fingerprint"] == digest.hexdigest()
    assert sorted(files) == ["meta.json", "train.bin", "val.bin"]


def test_existing_dataset_is_left_alone(prepared_plays):
    def stats() -> list:
        return [
            (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in sorted((prepared_plays / "plays").iterdir())
        ]

    before = stats()
    assert (
        "exists already" in run("prepare.py", "plays", data_dir=prepared_plays).stdout
    )
    assert stats() == before


def test_no_network_names_the_offline_dataset(tmp_path):
    line = complaint(
        run(
            "prepare.py",
            "shakespeare_char",
            data_dir=tmp_path,
            code=2,
            env={"https_proxy": "http://127.0.0.1:9"},
        )
    )
    assert line.endswith("python prepare.py plays_char") and files_in(tmp_path) == []


def test_another_text_as_tinyshakespeare_is_refused(tmp_path):
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("First Citizen:\n")
    line = complaint(run("prepare.py", "shakespeare", data_dir=tmp_path, code=2))
    assert "tinyshakespeare/input.txt" in line


def test_file_with_several_links_counts_once(tmp_path):
    for name in ("b", "c"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "text.txt").write_text(f"text of {name} " * 9)
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


@pytest.mark.slow
def test_changed_or_corrupt_dataset_is_prepared_again(tmp_path):
    text, folder = tmp_path / "a.txt", tmp_path / "data" / "x"
    text.write_text("something to learn\n" * 9)
    first = prepare(tmp_path, text, tokenizer="char")

    def again(**flags) -> bool:
        """Return whether the dataset existed already."""
        place = {"name": "x", "data_dir": tmp_path / "data"}
        done = run("prepare.py", text, **{"tokenizer": "char", **place, **flags})
        return "exists already" in done.stdout

    def reverse_tokens() -> None:
        tokens = (folder / "val.bin").read_bytes()
        (folder / "val.bin").write_bytes(tokens[::-1])

    def reverse_tokens_of_an_older_dataset() -> None:
        meta = {key: first[0][key] for key in first[0] if key != "crc32"}
        (folder / "meta.json").write_text(json.dumps(meta))
        reverse_tokens()

    def change_a_checksum() -> None:
        text = (folder / "meta.json").read_text()
        crc32 = first[0]["crc32"]["val.bin"]
        (folder / "meta.json").write_text(text.replace(crc32, crc32[::-1]))

    assert again()
    for damage in (
        lambda: os.truncate(folder / "val.bin", 6),
        (folder / "train.bin").unlink,
        reverse_tokens,
        reverse_tokens_of_an_older_dataset,
        change_a_checksum,
        lambda: (folder / "meta.json").write_text(""),
        lambda: (folder / "meta.json").write_text('{"tokens": 5}'),
    ):
        damage()
        (folder / "train-00003.bin").touch()
        (folder / "val.bin.tmp").touch()
        assert not again() and read_dataset(folder) == first
        assert sorted(dataset_files(folder)) == ["meta.json", "train.bin", "val.bin"]
    for flags in (
        {"val_fraction": 0.5},
        {"tokenizer": "gpt2"},
        {"tokenizer": "bpe:300"},
        {"tokenizer": "bpe:257"},
    ):
        assert not again(**flags) and again(**flags)
    text.write_text("Something to learn\n" * 9)  # as long as it was
    assert not again(**flags) and again(**flags)


def test_bin_files_of_another_program_are_kept(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    folder = tmp_path / "data" / "x"
    folder.mkdir(parents=True)
    (folder / "val.bin").write_bytes(b"foreign")
    complaint(
        run(
            "prepare.py",
            tmp_path / "a.txt",
            name="x",
            data_dir=tmp_path / "data",
            code=2,
        )
    )
    assert dataset_files(folder) == {"val.bin": b"foreign"}


def test_hub_dataset_is_downloaded_once(hub, hub_folder, tmp_path):
    texts = [
        pyarrow.parquet.read_table(path)["text"].to_pylist()
        for path in sorted((hub_folder / "data").iterdir())
    ]
    run("prepare.py", "tinystories", data_dir=tmp_path, env=hub.env)
    assert any(
        "/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/data/train-00003" in path
        for path in hub.asked
    )
    assert not any("README" in path for path in hub.asked)
    meta, *splits = joined(tmp_path / "tinystories")
    for tokens, split in zip(splits, (sum(texts[:4], []), texts[4])):
        expected = [
            token for text in split for token in (EOT, *GPT2.encode(text)) if text
        ]
        assert np.frombuffer(tokens, "<u2").tolist() == expected[1:]
    assert meta["files"]["val"]["val-00000.bin"] == 0  # all of val is in its own shard
    offline = hub.env | {"HF_HUB_OFFLINE": "1"}
    run("prepare.py", "tinystories", data_dir=tmp_path / "again", env=offline)
    assert joined(tmp_path / "again/tinystories") == (meta, *splits)
    next((tmp_path / "home").rglob("train-00002*")).unlink()
    run("prepare.py", "tinystories", data_dir=tmp_path / "less", env=offline, code=2)


@pytest.mark.slow
def test_ready_shards_are_downloaded_and_trained_on(hub, tmp_path):
    hub.folder = tmp_path / "shards"
    hub.folder.mkdir()
    rng = np.random.default_rng(0)
    content = {}
    for number in range(104):
        split = "val" if number == 0 else "train"
        name = f"fineweb_{split}_{number:06d}.bin"
        header = np.zeros(256, "<i4")
        header[:3] = (20240520, 1, 100)
        content[name] = (
            header.tobytes() + rng.integers(50257, size=100, dtype="<u2").tobytes()
        )
        (hub.folder / name).write_bytes(content[name])
    said = run("prepare.py", "fineweb10B", data_dir=tmp_path, env=hub.env).stdout
    assert "10,300 train and 100 val tokens of gpt2" in said
    shards = (tmp_path / "fineweb10B").glob("*.bin")
    assert {path.name: path.read_bytes() for path in shards} == content
    assert any("/resolve/889765ea1f903759787add" in path for path in hub.asked)
    # again, without a network
    offline = hub.env | {"HF_HUB_OFFLINE": "1"}
    again = run("prepare.py", "fineweb10B", data_dir=tmp_path, env=offline).stdout
    assert "exists already" in again
    flags = TINY | {"data_dir": tmp_path, "dataset": "fineweb10B", "max_iters": 2}
    run("train.py", out_dir=tmp_path / "out", **flags)
    # a download that was cut
    path = tmp_path / "fineweb10B/fineweb_train_000007.bin"
    path.write_bytes(content[path.name][:-2])
    done = run("prepare.py", "fineweb10B", data_dir=tmp_path, env=offline, code=2)
    assert "1,224 bytes" in complaint(done)
    # its hint works
    path.unlink()
    run("prepare.py", "fineweb10B", data_dir=tmp_path, env=hub.env)
    assert path.read_bytes() == content[path.name]
    flags = {"name": "other", "tokenizer": "char", "data_dir": tmp_path}
    assert "--tokenizer" in complaint(run("prepare.py", "fineweb10B", code=2, **flags))


@pytest.mark.slow
def test_climbmix_is_its_first_shards(hub, play, tmp_path):
    hub.folder = tmp_path / "shards"
    lines = play.read_text(encoding="utf-8").splitlines()
    numbers = [*range(100), 6542]
    for number in numbers:
        texts = [f"{line} {number}" for line in lines[number % 50 :: 50][:5]]
        write_parquet(hub.folder / f"shard_{number:05d}.parquet", texts)
    write_parquet(hub.folder / "shard_00100.parquet", ["not among the first"])
    said = run("prepare.py", "climbmix", data_dir=tmp_path, env=hub.env).stdout
    meta = json.loads((tmp_path / "climbmix/meta.json").read_text())
    assert len(meta["files"]["train"]) == 101 and " of gpt2" in said
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
    next((tmp_path / "cache/data").glob("train-*")).unlink()
    with pytest.raises(UserError, match="expected 5 files, got 4"):
        download_files(recipe)


def test_hub_without_a_network_is_one_line(tmp_path):
    line = complaint(
        run(
            "prepare.py",
            "tinystories",
            name="mine",
            tokenizer="char",
            code=2,
            data_dir=tmp_path / "data",
            env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        )
    )
    assert "roneneldan/TinyStories" in line and files_in(tmp_path / "data") == []


def test_corrupt_file_is_found_before_the_first_shard(hub_folder, tmp_path):
    shutil.copytree(hub_folder / "data", tmp_path / "less")
    third = tmp_path / "less" / "train-00002-of-00004-abc.parquet"
    third.write_bytes(corrupt(third.read_bytes()))
    assert str(third) in complaint(
        run("prepare.py", tmp_path / "less", name="x", data_dir=tmp_path, code=2)
    )
    assert dataset_files(tmp_path / "x") == {}


@pytest.mark.slow
def test_killed_preparation_continues(hub_folder, tmp_path):
    source, folder = hub_folder / "sample", tmp_path / "x"
    run("prepare.py", source, name="x", data_dir=tmp_path / "new")
    for file, how in (
        ("train-00002.bin", signal.SIGKILL),
        ("train-00006.bin.tmp", signal.SIGKILL),
        ("train-00009.bin", signal.SIGINT),
    ):
        child = start("prepare.py", source, name="x", data_dir=tmp_path)
        while child.poll() is None and not (folder / file).exists():
            time.sleep(0.001)
        child.send_signal(how)
        child.communicate()
        assert child.returncode == (130 if how == signal.SIGINT else -how)
        with pytest.raises(BadData):
            read_meta(folder)
    early = {path: path.stat().st_mtime_ns for path in folder.glob("*-0000[0-7].bin")}
    done = run("prepare.py", source, name="x", data_dir=tmp_path)
    assert re.search(r"(9|10) of 14 shards", done.stdout)
    assert dataset_files(folder) == dataset_files(tmp_path / "new/x")
    assert early and all(
        path.stat().st_mtime_ns == time for path, time in early.items()
    )


@pytest.mark.slow
def test_shards_of_another_request_are_not_used(hub_folder, play, tmp_path):
    source, folder = hub_folder / "data", tmp_path / "x"

    place = {"name": "x", "data_dir": tmp_path, "tokenizer": "char"}

    def prepare(*args: object, **flags: object) -> str:
        return run("prepare.py", *args, **place, **flags).stdout

    prepare(source)
    (folder / "train-00001.bin").unlink()
    assert "continuing" not in prepare(source) and (folder / "train-00001.bin").exists()
    assert "continuing" not in prepare(source, val_fraction=0.2)
    other = place | {"data_dir": tmp_path / "other"}
    run("prepare.py", source, val_fraction=0.2, **other)
    assert joined(folder) == joined(tmp_path / "other" / "x")
    prepare(play)
    assert sorted(dataset_files(folder)) == ["meta.json", "train.bin", "val.bin"]
    prepare(source, val_fraction=0.2)
    assert joined(folder) == joined(tmp_path / "other" / "x")


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
    line = complaint(
        run(
            "prepare.py",
            "--name=x",
            f"--data_dir={tmp_path}/data",
            *args,
            cwd=tmp_path,
            code=2,
        )
    )
    if files and args[0] in files and len(args) == 1:
        assert args[0] in line or "x: " in line  # the file, or the dataset
    if args[:1] == ["nosuch"]:
        assert "tinystories" in line and "shakespeare_char" in line
    assert files_in(tmp_path / "data" / "x") == []


def test_file_size_limit_keeps_the_existing_dataset(shakespeare, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("something to learn\n" * 9)
    before = prepare(tmp_path, text)
    text.write_text(shakespeare[:400_000])
    for name in ("x", "y"):
        done = subprocess.run(
            command("prepare.py", text, name=name, data_dir=tmp_path / "data"),
            capture_output=True,
            text=True,
            preexec_fn=limit_files,
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert read_dataset(tmp_path / "data" / "x") == before
    assert sorted(dataset_files(tmp_path / "data" / "x")) == [
        "meta.json",
        "train.bin",
        "val.bin",
    ]
    assert files_in(tmp_path / "data" / "y") == []


def test_full_disk_keeps_complete_shards(disk, hub_folder, tmp_path):
    flags = {"name": "x", "tokenizer": "char", "val_fraction": 0.1}
    run("prepare.py", hub_folder / "sample", data_dir=disk, **flags, code=1)
    complete = len(list((disk / "x").glob("val-*.bin")))
    assert 1 <= complete <= 5 and not list((disk / "x").glob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
    said = run("prepare.py", hub_folder / "sample", data_dir=disk, **flags).stdout
    assert f"{complete} of 14 shards" in said
    run("prepare.py", hub_folder / "sample", data_dir=tmp_path, **flags)
    assert joined(disk / "x") == joined(tmp_path / "x")


def test_read_only_disk(disk):
    run(
        "prepare.py",
        "plays",
        data_dir=disk,
        name="x",
        tokenizer="char",
        val_fraction=0.9,
        code=1,
    )
    (disk / "a.txt").write_text(TEXT)
    run("prepare.py", disk / "a.txt", data_dir=disk, name="y")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    complaint(run("prepare.py", "plays_char", data_dir=disk, code=2))
    done = run("prepare.py", disk / "a.txt", data_dir=disk, name="y")
    assert "exists already" in done.stdout  # which takes no lock


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_signal_leaves_no_files(shakespeare, tmp_path, how):
    (tmp_path / "a.txt").write_text(shakespeare * 10)
    folder = tmp_path / "data" / "x"
    child = start(
        "prepare.py", tmp_path / "a.txt", name="x", data_dir=tmp_path / "data"
    )
    while child.poll() is None and not (folder / "train.bin.tmp").exists():
        time.sleep(0.01)
    child.send_signal(how)
    _, err = child.communicate()
    assert child.returncode == 130 and not err and files_in(tmp_path / "data") == []


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

    file, encode = tmp_path / name, prepare.write_tokens
    file.write_text(TEXT if name == "a.txt" else json.dumps({"text": TEXT}) + "\n")

    def change_and_encode(*args):
        change(file)
        return encode(*args)

    monkeypatch.setattr(prepare, "write_tokens", change_and_encode)
    with pytest.raises((UserError, FileNotFoundError)):
        config = prepare.PrepareConfig("x", "char", data_dir=str(tmp_path / "data"))
        with ExitStack() as opened:
            prepare.prepare(config, {"tokenizer": "char"}, [str(file)], opened)
    assert files_in(tmp_path / "data") == []


def test_closed_stdout_keeps_the_dataset(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    args = command("prepare.py", tmp_path / "a.txt", name="x", data_dir=tmp_path)
    with open("/dev/full", "w") as full:
        done = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert read_dataset(tmp_path / "x")[0]["name"] == "x"


def test_two_preparations_at_once(shakespeare, tmp_path):
    (tmp_path / "a.txt").write_text(shakespeare)
    children = [
        start("prepare.py", tmp_path / "a.txt", name="x", data_dir=tmp_path / "data")
        for _ in range(2)
    ]
    said = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert sorted("exists already" in out for out, _ in said) == [False, True]
    _, train, val = read_dataset(tmp_path / "data" / "x")
    assert (len(train), len(val)) == (1_305_687, 148_236)
