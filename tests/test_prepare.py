"""prepare.py and corpora.py: the known texts, one's own, and what can go wrong on the way."""
import hashlib
import http.server
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import corpora
from conftest import REPO, command, complaint, run
from tokenizer import from_meta

GPT2 = from_meta({"tokenizer": {"kind": "gpt2"}})
EOT = 50256
TINYSHAKESPEARE = REPO / "data" / "tinyshakespeare" / "input.txt"


def read_set(folder: Path) -> tuple[dict, list[int], list[int]]:
    """(meta, train tokens, val tokens)"""
    meta = json.loads((folder / "meta.json").read_text())
    train, val = (np.fromfile(folder / f"{split}.bin", meta["dtype"]).tolist()
                  for split in ("train", "val"))
    return meta, train, val


def prepare(tmp_path: Path, *words: object, **flags: object) -> tuple[dict, list[int], list[int]]:
    run("prepare.py", *words, name="x", data_dir=tmp_path / "data", cwd=tmp_path, **flags)
    return read_set(tmp_path / "data" / "x")


@pytest.fixture(scope="module")
def shakespeare() -> str:
    return corpora.read_shakespeare()


@pytest.fixture(scope="module")
def long_text(shakespeare: str) -> str:
    """3 million characters: plays, paragraphs, and many ways to be white space."""
    paragraphs = shakespeare[:700_000].replace(",\n", ", ").replace("\n\n", "\r\n \n")
    other = "Fluß -- 東京\u3000は\n　夜。\n\n\n\t\u2028 it's\xa0🎭\x1c \x85 don't \n .\n" * 8_000
    return paragraphs + other + shakespeare[:2_000_000]


# --- the known texts -----------------------------------------------------------------------------

def test_shakespeare_is_the_same_text_everywhere(shakespeare):
    assert hashlib.sha256(shakespeare.encode()).hexdigest() == (
        "2fa9ee3988474872359e735d6b3029e90967b18aee64e42befb662aacec1dce5")


def test_shakespeare_is_plain_dialogue(shakespeare):
    assert "".join(sorted(set(shakespeare))) == (
        "\n !\"&',-.24568:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    speeches = shakespeare.removesuffix("\n").split("\n\n")
    assert len(speeches) == 31_464
    for speech in speeches:
        assert re.match(r"[A-Z][A-Za-z' -]+:\n\S", speech), speech
        assert not re.search(r"^ | $|  |\n\n", speech, re.MULTILINE), speech
    for left in ("Exeunt", "Re-enter", "ACT I", "SCENE", "&amp", "[", "_", "*", "#"):
        assert left not in shakespeare
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in shakespeare
    assert "\n\nLord Chief-Justice:\nWhat's he that goes there?\n\nServant:\n" in shakespeare
    assert "\n\nFirst Varro" not in shakespeare and "\n\nVarro's First Servant:\n" in shakespeare


def test_plain_dialogue_on_a_page():
    page = ("# A Play\n\n### SCENE I. A wood.\nwith a light.\n\n_Enter ADA and\nBOB_\n\n"
            "**ADA**  \n_\\[Aside]_  \nWho's there?  \nNo--what - who?\n\n_Exit_\n\nStay — now.\n\n"
            "**ADA & BOB**  \n[Within]_  \nAy, 'tis\\--he.\n\n*Drums.*\n\n"
            "### SCENE II.\n\nA light.\n\n**Both**  \n_Silence_\n")
    assert corpora.plain_dialogue(page) == (
        "ADA:\nWho's there?\nNo--what - who?\nStay--now.\n\nADA and BOB:\nAy, 'tis--he.")


@pytest.fixture(scope="module")
def known_sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("known")
    for name in ("shakespeare_char", "shakespeare"):
        run("prepare.py", name, data_dir=folder)
    return folder


@pytest.mark.parametrize("name, vocab_size, counts", [
    ("shakespeare_char", 69, (4_306_374, 478_487)), ("shakespeare", 50_257, (1_306_917, 148_376))])
def test_known_sets(known_sets, shakespeare, name, vocab_size, counts):
    meta, train, val = read_set(known_sets / name)
    assert (meta["format"], meta["name"], meta["dtype"]) == (1, name, "uint16")
    assert meta["vocab_size"] == vocab_size and max(train + val) < vocab_size
    assert tuple(meta["tokens"].values()) == (len(train), len(val)) == counts
    tokenizer = from_meta(meta)
    at = int(len(shakespeare) * 0.9)
    assert tokenizer.decode(train) == shakespeare[:at]
    assert tokenizer.decode(val) == shakespeare[at:]
    described = [meta["tokenizer"], list(meta["tokens"].values())]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update((known_sets / name / "train.bin").read_bytes())
    digest.update((known_sets / name / "val.bin").read_bytes())
    assert meta["fingerprint"] == digest.hexdigest()
    assert sorted(os.listdir(known_sets / name)) == ["meta.json", "train.bin", "val.bin"]


def test_a_set_that_is_there_is_left_alone(known_sets):
    folder = known_sets / "shakespeare"
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    assert "there already" in run("prepare.py", "shakespeare", data_dir=known_sets).stdout
    after = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    assert after == before


@pytest.mark.skipif(not TINYSHAKESPEARE.exists(), reason=f"needs {TINYSHAKESPEARE.name}, 1.1 MB")
def test_tinyshakespeare(tmp_path):
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(TINYSHAKESPEARE.read_bytes())
    for name, counts in (("tinyshakespeare", (301_966, 36_059)),
                         ("tinyshakespeare_char", (1_003_854, 111_540))):
        run("prepare.py", name, data_dir=tmp_path)
        assert tuple(read_set(tmp_path / name)[0]["tokens"].values()) == counts


def test_another_text_in_the_place_of_tinyshakespeare_is_refused(tmp_path):
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("First Citizen:\n")
    line = complaint(run("prepare.py", "tinyshakespeare", data_dir=tmp_path, code=2))
    assert f"{tmp_path}/tinyshakespeare/input.txt is not tinyshakespeare" in line
    assert os.listdir(tmp_path / "tinyshakespeare") == ["input.txt"]


@pytest.fixture
def server():
    """A web server that gives `server.answers` in turn: (status, promised length, body)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, length, body = self.server.answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}/input.txt"
        yield server
        server.shutdown()


def test_a_download_is_tried_again(server, tmp_path):
    right = b"First Citizen:\n"
    server.answers = [(503, 0, b""), (200, 99, right[:5]), (200, len(right), right)]
    path = tmp_path / "new" / "input.txt"
    corpora.download(server.url, str(path), hashlib.sha256(right).hexdigest(), pause=0)
    assert path.read_bytes() == right
    assert os.listdir(path.parent) == ["input.txt"] and server.answers == []


def test_a_download_of_other_bytes_is_refused(server, tmp_path, capsys):
    server.answers = [(200, 5, b"login")] * 3
    with pytest.raises(SystemExit) as end:
        corpora.download(server.url, str(tmp_path / "input.txt"), 64 * "0", pause=0)
    assert end.value.code == 2 and not os.listdir(tmp_path)
    assert capsys.readouterr().err == (
        f"error: cannot download {server.url} (the 5 bytes that came are others); "
        f"put that file at {tmp_path}/input.txt by hand\n")


# --- one's own text ------------------------------------------------------------------------------

def test_blocks_give_the_tokens_of_the_whole_text(long_text, tmp_path):
    (tmp_path / "long.txt").write_bytes(long_text.encode())
    at = int(len(long_text) * 0.8)
    expected = GPT2.encode(long_text[:at]), GPT2.encode(long_text[at:])
    for workers in (1, 3):
        _, train, val = prepare(tmp_path, "long.txt", workers=workers, val_fraction=0.2)
        assert (train, val) == expected
        (tmp_path / "data" / "x" / "meta.json").write_text("")


def test_a_text_without_a_place_to_cut(tmp_path):
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
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    _, train, val = prepare(tmp_path, "docs.jsonl")
    at = int(len(texts[7]) * 0.9)
    to_val = {i: texts[i] for i in range(9, 250, 10)} | {7: texts[7][at:]}
    to_train = {i: texts[i] for i in range(250) if i not in to_val} | {7: texts[7][:at]}
    for tokens, split in ((train, to_train), (val, to_val)):
        expected = [token for i in sorted(split) for token in (EOT, *GPT2.encode(split[i]))]
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
    for path in ("b/c.py", "b/a.TXT", "b/deep/er.md", "b/.hidden.md", "b/.git/x.txt", "b/y.bin",
                 "[d]/z.log", "[d]/y.log", "e.log"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"text of {path} " * 9)
    _, train, _ = prepare(tmp_path, "b", "e.log", "*/?.log", "b/c.py", val_fraction=0.5)
    found = re.findall(r"(?:^|<\|endoftext\|>)text of (\S+)", GPT2.decode(train))
    assert found == ["b/a.TXT", "b/c.py", "b/deep/er.md", "e.log", "[d]/y.log", "[d]/z.log"]


def test_lines_of_json(tmp_path):
    lines = ['{"body": "caf\\u00e9 au lait, please", "text": 1}', "",
             '{"body": "half a \\ud83d pair here"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    _, train, val = prepare(tmp_path, "a.jsonl", text_key="body", val_fraction=0.5)
    assert GPT2.decode(train) == "café au la<|endoftext|>half a ? "
    assert GPT2.decode(val) == "it, please<|endoftext|>pair here"


def test_a_set_is_made_anew_when_it_must_be(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("something to learn\n" * 9)
    folder = tmp_path / "data" / "x"
    first = prepare(tmp_path, text)

    def again(**flags) -> str:
        return run("prepare.py", text, name="x", data_dir=tmp_path / "data", **flags).stdout

    assert "there already" in again()
    for damage in (lambda: os.truncate(folder / "val.bin", 6), (folder / "train.bin").unlink,
                   lambda: (folder / "meta.json").write_text("")):
        damage()
        assert "there already" not in again() and read_set(folder) == first
    assert "made anew" not in again() and "making it anew" in again(val_fraction=0.5)
    assert "making it anew" in again(tokenizer="char", val_fraction=0.5)
    text.write_text("Something to learn\n" * 9)  # as long as it was
    assert "making it anew" in again(tokenizer="char", val_fraction=0.5)
    assert "there already" in again(tokenizer="char", val_fraction=0.5)


def test_a_set_that_another_program_made_is_not_overwritten(tmp_path):
    (tmp_path / "a.txt").write_text("something to learn\n" * 9)
    prepare(tmp_path, tmp_path / "a.txt")
    folder = tmp_path / "data" / "x"
    (folder / "meta.json").unlink()
    before = (folder / "train.bin").read_bytes()
    done = run("prepare.py", tmp_path / "a.txt", name="x", data_dir=tmp_path / "data",
               tokenizer="char", code=None)
    assert "not made by prepare.py" in complaint(done)
    assert (folder / "train.bin").read_bytes() == before and len(os.listdir(folder)) == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_text(shakespeare, tmp_path):
    code = ("import runpy, sys; sys.argv = sys.argv[1:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "print(open('/proc/self/status').read())")
    peaks = []  # in bytes
    for times in (1, 7):
        (tmp_path / f"{times}.txt").write_text(shakespeare * times)
        words = command("prepare.py", tmp_path / f"{times}.txt", name=f"x{times}", tokenizer="char",
                        data_dir=tmp_path / "data")
        done = subprocess.run([sys.executable, "-c", code, *words[1:]], cwd=REPO,
                              capture_output=True, text=True, check=True)
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024)
    assert peaks[1] - peaks[0] < 15e6  # the text is 29 MB longer, and its tokens 57 MB


# --- what goes wrong -----------------------------------------------------------------------------

@pytest.mark.parametrize("words, files, needle", [
    (["nosuch"], {}, "nosuch: no such file, folder or dataset; the datasets are shakespeare_"),
    ([], {}, "name a dataset (shakespeare_char, shakespeare, tinyshakespeare_char, tinysh"),
    (["*.txt"], {"a.md": b"x"}, "*.txt: no such file"),
    (["d"], {"d/a.bin": b"x"}, "d: no text in this folder; looked for .txt .md"),
    (["a.txt"], {"a.txt": b""}, "no text to learn from"),
    (["a.txt"], {"a.txt": b"Hi"}, "too short, with 1 train and 1 val tokens"),
    (["a.txt"], {"a.txt": b"x" * 600_000 + b"\xe9t\xe9"}, "a.txt: byte 600000 is not UTF-8"),
    (["a.txt"], {"a.txt": "é".encode() * 400_000 + b"\xc3"}, "a.txt: byte 800000 is not UTF-8"),
    (["a.jsonl"], {"a.jsonl": b'{"text": "a"}\n{"text": "\xe9"}'}, "a.jsonl:2: byte 24 is not"),
    (["a.jsonl"], {"a.jsonl": b'{"text": "a"}\n\n{"text": "b"\n'}, "a.jsonl:3: not JSON: "),
    (["a.jsonl"], {"a.jsonl": b'{"text": "a"}\n{"txt": "b"}\n'}, "a.jsonl:2: no text under 'text'"),
    (["a.jsonl"], {"a.jsonl": b'["text"]\n'}, "a.jsonl:1: no text under 'text'"),
    (["a.jsonl"], {"a.jsonl": b'{"text": 3}\n'}, "a.jsonl:1: no text under 'text'"),
    (["a.txt", "--name="], {"a.txt": b"text " * 99}, "--name=NAME is missing"),
    (["a.txt", "--name=y/z"], {"a.txt": b"text " * 99}, "--name=y/z: not a folder's name"),
    (["a.txt", "--name=.."], {"a.txt": b"text " * 99}, "--name=..: not a folder's name"),
    (["a.txt", "--tokenizer=morse"], {"a.txt": b"text"}, "tokenizer takes gpt2 or char, not 'm"),
    (["a.txt", "--val_fraction=1"], {"a.txt": b"text"}, "val_fraction must be"),
    (["a.txt", "--val_fraction=0"], {"a.txt": b"text " * 99}, "and 0 val tokens"),
    (["shakespeare", "--name=", "--tokenizer=char"], {}, "shakespeare has its own tokenizer"),
])
def test_mistakes(tmp_path, words, files, needle):
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    flags = ["--name=x", f"--data_dir={tmp_path}/data", *words]
    done = subprocess.run([*command("prepare.py"), *flags], cwd=tmp_path,
                          capture_output=True, text=True)
    assert needle in complaint(done)
    assert not (tmp_path / "data").exists() or os.listdir(tmp_path / "data") == []


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_no_room_leaves_what_was_there(shakespeare, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("something to learn\n" * 9)
    before = prepare(tmp_path, text)
    text.write_text(shakespeare[:900_000])
    for name in ("x", "y"):
        done = subprocess.run(command("prepare.py", text, name=name, data_dir=tmp_path / "data"),
                              capture_output=True, text=True, preexec_fn=limit_files)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "data: file too large; nothing half-written is left" in done.stderr
    assert read_set(tmp_path / "data" / "x") == before
    assert sorted(os.listdir(tmp_path / "data" / "x")) == ["meta.json", "train.bin", "val.bin"]
    assert os.listdir(tmp_path / "data") == ["x"]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(disk):
    line = complaint(run("prepare.py", "shakespeare_char", data_dir=disk, code=2))
    assert f"{disk}: no space left on device; nothing half-written is left" in line
    assert os.listdir(disk) == []


def test_a_read_only_disk(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    line = complaint(run("prepare.py", "shakespeare_char", data_dir=disk, cwd=disk.parent, code=2))
    assert line.startswith("error: disk/shakespeare_char: read-only file system; nothing half-wri")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    os.chmod(tmp_path, 0o555)
    line = complaint(run("prepare.py", "shakespeare_char", data_dir=tmp_path, cwd=tmp_path, code=2))
    assert line.startswith("error: shakespeare_char: permission denied; nothing half")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_middle(shakespeare, tmp_path, how):
    (tmp_path / "a.txt").write_text(shakespeare * 10)
    folder = tmp_path / "data" / "x"
    child = subprocess.Popen(
        command("prepare.py", tmp_path / "a.txt", name="x", data_dir=tmp_path / "data"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not (folder / "train.bin.tmp").exists():
        time.sleep(0.01)
    child.send_signal(how)
    out, err = child.communicate()
    assert (child.returncode, out, err) == (130, "", "\nstopped; nothing half-written is left\n")
    assert not folder.exists()


def test_two_at_once(shakespeare, tmp_path):
    (tmp_path / "a.txt").write_text(shakespeare)
    children = [subprocess.Popen(
        command("prepare.py", tmp_path / "a.txt", name="x", data_dir=tmp_path / "data"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert sorted("there already" in out for out, _ in said) == [False, True]
    assert any("waiting" in out for out, _ in said)
    _, train, val = read_set(tmp_path / "data" / "x")
    assert (len(train), len(val)) == (1_306_917, 148_376)
    assert sorted(os.listdir(tmp_path / "data" / "x")) == ["meta.json", "train.bin", "val.bin"]


def test_help_and_the_second_look_are_light():
    code = ("import sys, prepare\n"
            "assert not {'numpy', 'tiktoken', 'torch', 'tqdm'} & sys.modules.keys()\n"
            "prepare.parse(prepare.PrepareConfig, prepare.USAGE, ['--help'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for key in ("usage: python prepare.py shakespeare_char | ", "--val_fraction=0.1"):
        assert key in done.stdout
