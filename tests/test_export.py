"""What tools.export writes is the same model and tokenizer in Transformers and llama.cpp."""

import copy
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

# before Transformers is loaded: else it asks the hub, and waits
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tiktoken_ext.openai_public
import torch
from conftest import PROGRAMS, REPO, make_command, read_error, run
from small_tokenizers import (
    QWEN,
    save,
    train_byte_level,
    train_sentencepiece,
    train_unigram,
    train_wordpiece,
)
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from keepgpt.dataset import read_meta
from keepgpt.errors import UserError
from keepgpt.huggingface import read_weights
from keepgpt.tokenizer import (
    Tokenizer,
    describe_encoding,
    describe_tokenizer,
    from_meta,
    to_tokenizers,
    train_bpe,
)
from model import GPT, ModelArgs, build_model, generate, load_model
from tools.export import to_gguf_tokenizer

# no size is a default: each must be in the files
QWEN3 = {
    "architecture": "qwen3",
    "n_kv_head": 1,
    "head_dim": 32,
    "n_ff": 40,
    "rope_theta": 1000.0,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
}
# the same sizes: what differs is the norm of queries and keys
LLAMA = QWEN3 | {"architecture": "llama"}
# letters that tokenizers split in different ways: a long s, spaces of many kinds, joined emoji,
# marks
PIECES = [
    "abcdefgh ſstredml'’",
    "0123456789 ab",
    "日本語漢字 かな",
    "\n\t \r\x0b\x1c\x85\u00a0\u2003a",
    "😀👨‍👩‍👧é̀",
    " aA!?.,/\n",
    "ааяжб Ж",
    "aAßŉ'S",
    ".\n/_a1 ",
]


def make_texts(alphabet: str | None) -> list[str]:
    """Return texts of many scripts, or of `alphabet`."""
    rng = random.Random(1)
    texts = []
    # two kinds of letters in a text: what matters is how a tokenizer cuts between them
    for _ in range(400):
        letters = alphabet or rng.choice(PIECES) + rng.choice(PIECES)
        text = rng.choices(letters, k=rng.randint(1, 60))
        texts.append("".join(text))
    return texts


# -I: a process that finds nothing of this repository
ELSEWHERE = [sys.executable, "-I"]


# it imports Transformers once for all tests
@functools.cache
def start_transformers_server() -> subprocess.Popen:
    """Start a process with Transformers, which ends with this one."""
    return subprocess.Popen(
        [*ELSEWHERE, PROGRAMS / "read_folder.py"],
        text=True,
        cwd=tempfile.gettempdir(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def read_with_transformers(folder: Path, work: dict, tmp_path: Path) -> dict:
    """Return what Transformers makes of an exported folder."""
    work_file = tmp_path / "work.json"
    work_file.write_text(json.dumps(work))
    result = tmp_path / "read.pt"
    server = start_transformers_server()
    print(folder, work_file, result, sep="\t", file=server.stdin, flush=True)
    assert server.stdout.readline() == "done\n"
    return torch.load(result)


def read_with_llama_cpp(file: Path, work: dict, tmp_path: Path) -> dict:
    """Return what llama.cpp makes of an exported file."""
    pytest.importorskip("xllamacpp", reason="it has wheels for Linux on x86-64 only")
    work_file = tmp_path / "work.json"
    work_file.write_text(json.dumps({"ignore_eos": True} | work))
    result = tmp_path / "read.json"
    args = [*ELSEWHERE, PROGRAMS / "read_gguf.py", file, work_file, result]
    subprocess.run(args, cwd=tmp_path, check=True, capture_output=True)
    return json.loads(result.read_text())


def save_random(path: Path, args: ModelArgs, description: dict) -> GPT:
    """Save a model whose next token depends on the text and the place."""
    torch.manual_seed(0)
    model = build_model(args).eval()
    # an untrained model's logits are all alike
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=3 if "wpe" in name else 0.3)
    bundle = {
        "model": model.state_dict(),
        "model_args": vars(model.args),
        "data": {"tokenizer": description},
    }
    torch.save(bundle, path)
    return model


@pytest.fixture(scope="module")
def text(play: Path) -> str:
    # Hamlet has few digits, which tokenizers split in different ways
    cubes = [f" {i * i * i}" for i in range(2000)]
    return play.read_text(encoding="utf-8") + "".join(cubes)


def describe_cl100k(text: str) -> dict:
    """Return the description of tiktoken's cl100k_base with the ranks of a small BPE."""
    openai = tiktoken_ext.openai_public
    # the real ranks are a download
    ranks = from_meta({"tokenizer": train_bpe([text], 1000)}).ranks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai, "load_tiktoken_bpe", lambda *_, **__: ranks)
        parts = openai.cl100k_base()
    return describe_encoding(
        "cl100k_base",
        parts["pat_str"],
        ranks,
        parts["special_tokens"],
    )


def describe(kind: str, text: str) -> dict:
    """Return the description of a tokenizer for the text."""
    if kind == "char":
        return {"kind": "char", "chars": "".join(sorted(set(text)))}
    if kind == "bpe":
        return train_bpe([text], 1000)
    if kind == "cl100k":
        return describe_cl100k(text)
    return {"kind": "gpt2"}


@dataclass
class Exported:
    """A model of this repository, its export, and what another program makes of that."""

    path: Path
    model: GPT
    description: dict
    vocabulary: Tokenizer
    # the input of the other program, and its results
    texts: list[str]
    prompt: list[int]
    result: dict


@pytest.fixture(
    scope="module",
    params=[
        ("gpt2", {"bias": True}),
        ("cl100k", {"bias": True}),
        ("bpe", {"bias": False} | QWEN3),
        ("char", {"bias": False, "architecture": "qwen3"}),
        ("bpe", {"bias": False} | LLAMA),
    ],
    ids=["gpt2", "cl100k", "qwen3 bpe", "qwen3 tied char", "llama bpe"],
)
def folder_in_transformers(request, text, tmp_path_factory) -> Exported:
    """Export a model to a folder and read it with Transformers."""
    kind, settings = request.param
    place = tmp_path_factory.mktemp("transformers")
    description = describe(kind, text)
    vocabulary = from_meta({"tokenizer": description})
    args = ModelArgs(2, 2, 16, 64, vocabulary.vocab_size, dropout=0.1, **settings)
    model = save_random(place / "random.pt", args, description)
    folder = place / "exported"
    run("tools.export", init_from=place / "random.pt", to=folder)

    # a tokenizer of characters refuses others
    texts = make_texts(description.get("chars"))
    prompt = vocabulary.encode(text[1000:1040])
    work = {"texts": texts, "prompt": text[1000:1040], "ids": prompt}
    result = read_with_transformers(folder, work, place)
    return Exported(folder, model, description, vocabulary, texts, prompt, result)


def compute_logits(model: GPT, ids: list[int]) -> Tensor:
    """Return the logits after each token, (T, V), in float64."""
    return copy.deepcopy(model).double()(torch.tensor([ids]))[0]


@pytest.mark.slow
def test_transformers_reads_the_same_tokenizer(folder_in_transformers):
    exported = folder_in_transformers
    vocabulary = exported.vocabulary
    result = exported.result
    assert result["ids"] == [vocabulary.encode(text) for text in exported.texts]
    assert result["back"] == exported.texts
    # it ends a text where this repository does
    assert result["eot"] == vocabulary.eot
    # else Transformers 4 hands token_type_ids to the model, which adds them to its embeddings
    config = json.loads((exported.path / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.slow
def test_transformers_reads_the_same_model(folder_in_transformers):
    exported = folder_in_transformers
    logits = compute_logits(exported.model, exported.prompt)
    # Transformers computes RMSNorm in float32
    is_gpt2 = exported.model.args.architecture == "gpt2"
    tolerance = 1e-12 if is_gpt2 else 1e-5
    error = (exported.result["logits"] - logits).abs().max()
    assert error < tolerance * logits.abs().max()
    # the model says more than that all tokens are alike
    assert logits.std() > 0.1


@pytest.mark.slow
def test_an_exported_folder_comes_back_in(folder_in_transformers):
    exported = folder_in_transformers
    args, state, data = read_weights(str(exported.path))
    assert data["tokenizer"] == exported.description
    loaded = load_model(args, state).eval()
    logits = compute_logits(exported.model, exported.prompt)
    assert torch.equal(compute_logits(loaded, exported.prompt), logits)


@pytest.mark.slow
def test_exported_weights_come_back_in(folder_in_transformers):
    exported = folder_in_transformers
    args, state, data = read_weights(str(exported.path / "weights.pt"))
    assert args == vars(exported.model.args)
    assert data["tokenizer"] == exported.description
    for name, p in exported.model.state_dict().items():
        assert torch.equal(state[name], p)


@pytest.fixture(
    scope="module",
    params=[
        ("bpe", {"bias": False}, "float32"),
        ("gpt2", {"bias": True}, "bfloat16"),
        ("bpe", {"bias": False} | QWEN3, "float32"),
        ("char", {"bias": False, "architecture": "qwen3"}, "bfloat16"),
        ("bpe", {"bias": False} | LLAMA, "float32"),
        ("char", {"bias": False, "architecture": "llama"}, "float16"),
    ],
    ids=["gpt2 bpe", "gpt2", "qwen3", "qwen3 tied", "llama", "llama tied"],
)
def file_in_llama_cpp(request, text, tmp_path_factory) -> Exported:
    """Export a model to a file in a dtype and read it with llama.cpp."""
    kind, settings, dtype = request.param
    place = tmp_path_factory.mktemp("llama_cpp")
    # characters that GGUF's vocabulary could confuse with its own signs
    text += " é日本語 \\ \t ★"
    description = describe(kind, text)
    vocabulary = from_meta({"tokenizer": description})
    args = ModelArgs(2, 2, 32, 64, vocabulary.vocab_size, dropout=0.0, **settings)
    checkpoint = place / "random.pt"
    file = place / "model.gguf"
    model = save_random(checkpoint, args, description)
    run("tools.export", init_from=checkpoint, to=file, format="gguf", dtype=dtype)

    texts = make_texts(description.get("chars"))
    prompt = text[1000:1040]
    # characters have no end of text
    work = {"texts": texts, "prompt": prompt, "ignore_eos": kind != "char"}
    result = read_with_llama_cpp(file, work, place)
    # the weights as the file has them
    round_matrices(model, getattr(torch, dtype))
    ids = vocabulary.encode(prompt)
    return Exported(file, model, description, vocabulary, texts, ids, result)


def round_matrices(model: GPT, dtype: torch.dtype) -> None:
    """Round the weights that a GGUF file has in `dtype`: matrices, except those of positions."""
    for name, p in model.named_parameters():
        if p.dim() == 2 and "wpe" not in name:
            p.data = p.data.to(dtype).float()


@pytest.mark.slow
def test_llama_cpp_reads_the_same_tokenizer(file_in_llama_cpp):
    exported = file_in_llama_cpp
    expected = [exported.vocabulary.encode(text) for text in exported.texts]
    assert exported.result["ids"] == expected
    assert exported.result["back"] == exported.texts


@pytest.mark.slow
def test_llama_cpp_reads_the_same_model(file_in_llama_cpp):
    exported = file_in_llama_cpp
    model = exported.model
    tokens = [row[0] for row in generate(model, [exported.prompt], 20, temperature=0)]
    # instead of the end of text, llama.cpp takes the next likeliest
    if exported.vocabulary.eot in tokens:
        end = tokens.index(exported.vocabulary.eot)
        tokens = tokens[:end]
    assert exported.result["made"][: len(tokens)] == tokens
    # a model with tied embeddings mostly repeats a token
    fewest = 2 if model.args.tie_embeddings else 4
    assert len(set(tokens)) >= fewest


def add_tokens(content: dict, *tokens: str, **flags: bool) -> None:
    """Add tokens that are not special."""
    added = content["added_tokens"]
    for token in tokens:
        values = {"id": 500 + len(added), "content": token, "special": False}
        added.append(added[0] | values | flags)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [None, QWEN], ids=["gpt2", "qwen"])
def test_llama_cpp_reads_a_folder_s_tokenizer(pattern, text, tmp_path):
    # a step that puts a token before each text
    eot = "<|endoftext|>"
    template = {
        "type": "TemplateProcessing",
        "pair": [],
        "single": [
            {"SpecialToken": {"id": eot, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "special_tokens": {eot: {"id": eot, "ids": [499], "tokens": [eot]}},
    }

    def change(content: dict) -> None:
        add_tokens(content, "<think>", "king", " the ")
        content["post_processor"] = template

    folder = save(train_byte_level(text, pattern), tmp_path / "source", change)
    description = describe_tokenizer(str(folder))
    vocabulary = from_meta({"tokenizer": description})
    # the added tokens are used
    assert len(vocabulary.encode("the king and the <think>")) < 9
    args = ModelArgs(1, 2, 32, 64, vocabulary.vocab_size, True, 0.0)
    checkpoint = tmp_path / "random.pt"
    file = tmp_path / "model.gguf"
    save_random(checkpoint, args, description)
    run("tools.export", init_from=checkpoint, to=file, format="gguf")
    # also parts of the text that the tokenizer has learned from
    texts = make_texts(None)
    for start in range(0, len(text) - 200, 997):
        texts.append(text[start : start + 200])
    result = read_with_llama_cpp(file, {"texts": texts, "prompt": "To"}, tmp_path)
    assert result["ids"] == [vocabulary.encode(text) for text in texts]
    assert result["back"] == texts


# changes of a tokenizer.json that llama.cpp's vocabulary can't express
def set_part(part: str, **values) -> Callable[[dict], None]:
    """Return a function that replaces a part of a tokenizer.json, or removes it."""
    return lambda content: content.update({part: values or None})


def set_option(**values) -> Callable[[dict], None]:
    return lambda content: content["model"].update(values)


def set_split(**values) -> Callable[[dict], None]:
    return lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(values)


def set_bytes(**values) -> Callable[[dict], None]:
    return lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(values)


def add_step(content: dict) -> None:
    step = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"]["pretokenizers"].insert(0, step)


def drop_a_byte(content: dict) -> None:
    del content["model"]["vocab"]["~"]


@pytest.mark.parametrize(
    "change, part",
    [
        (set_part("normalizer", type="NFC"), "normalizer"),
        (set_part("normalizer", type="Lowercase"), "normalizer"),
        (
            set_part(
                "pre_tokenizer",
                type="ByteLevel",
                add_prefix_space=True,
                trim_offsets=True,
                use_regex=True,
            ),
            "add_prefix_space",
        ),
        (
            set_part(
                "pre_tokenizer",
                type="ByteLevel",
                add_prefix_space=False,
                trim_offsets=True,
                use_regex=False,
            ),
            "use_regex",
        ),
        (set_part("pre_tokenizer"), "pre_tokenizer"),
        (add_step, "Digits"),
        (set_split(behavior="MergedWithNext"), "MergedWithNext"),
        (set_split(pattern={"Regex": r"\w+"}), "pre_tokenizer"),
        (set_split(pattern={"String": " "}), "pre_tokenizer"),
        (set_split(invert=True), "invert"),
        (set_bytes(use_regex=True), "use_regex"),
        (set_bytes(add_prefix_space=True), "add_prefix_space"),
        (set_part("decoder"), "decoder"),
        (set_part("decoder", type="Fuse"), "decoder"),
        (set_option(byte_fallback=True), "byte_fallback"),
        (set_option(ignore_merges=True), "ignore_merges"),
        (set_option(dropout=0.1), "dropout"),
        (set_option(fuse_unk=True), "fuse_unk"),
        (set_option(unk_token="a"), "unk_token"),
        (drop_a_byte, "~"),
        (lambda content: add_tokens(content, "king", lstrip=True), "lstrip"),
        (lambda content: add_tokens(content, "king", rstrip=True), "rstrip"),
        (lambda content: add_tokens(content, "king", single_word=True), "single_word"),
        (lambda content: add_tokens(content, "the k", "king"), "overlap"),
        (lambda content: content["added_tokens"].clear(), "end-of-text"),
    ],
    ids=[
        "NFC",
        "lower case",
        "prefix space",
        "no regex",
        "no pre_tokenizer",
        "digits",
        "merged split",
        "another pattern",
        "a string as pattern",
        "inverted split",
        "regex of bytes",
        "prefix space of bytes",
        "no decoder",
        "another decoder",
        "byte_fallback",
        "ignore_merges",
        "dropout",
        "fuse_unk",
        "unk_token",
        "a byte less",
        "lstrip",
        "rstrip",
        "single_word",
        "overlap",
        "no end of text",
    ],
)
def test_gguf_refuses_a_tokenizer_with_another_part(change, part, text, tmp_path):
    # without the change it is accepted
    folder = save(train_byte_level(text, QWEN), tmp_path / "own")
    description = describe_tokenizer(str(folder))
    to_gguf_tokenizer(from_meta({"tokenizer": description}))
    save(train_byte_level(text, QWEN), folder, change)
    description = describe_tokenizer(str(folder))
    with pytest.raises(UserError) as error:
        to_gguf_tokenizer(from_meta({"tokenizer": description}))
    assert part in str(error.value)
    assert "--format=hf" in str(error.value)


# a GGUF file is written for BPEs over bytes and for characters alone
@pytest.mark.parametrize("make", [train_sentencepiece, train_wordpiece, train_unigram])
def test_gguf_refuses_other_kinds_and_writes_nothing(make, text, tmp_path):
    folder = save(make(text), tmp_path / "own")
    description = describe_tokenizer(str(folder))
    size = from_meta({"tokenizer": description}).vocab_size
    args = ModelArgs(1, 2, 16, 16, size, True, 0.0)
    checkpoint = tmp_path / "random.pt"
    file = tmp_path / "model.gguf"
    save_random(checkpoint, args, description)
    done = run("tools.export", init_from=checkpoint, to=file, format="gguf", code=2)
    # the format that keeps every tokenizer
    assert "--format=hf" in read_error(done)
    assert not list(tmp_path.glob("model*"))


@pytest.mark.slow
def test_an_exported_tokenizer_gives_the_ids_of_training(text, tmp_path):
    # SentencePiece writes a space as a letter of its own
    folder = save(train_sentencepiece(text), tmp_path / "own")
    description = describe_tokenizer(str(folder))
    vocabulary = from_meta({"tokenizer": description})
    args = ModelArgs(1, 2, 16, 64, vocabulary.vocab_size, True, 0.0)
    save_random(tmp_path / "random.pt", args, description)
    exported = tmp_path / "exported"
    run("tools.export", init_from=tmp_path / "random.pt", to=exported)
    texts = make_texts(None)
    work = {"texts": texts, "prompt": "The king", "ids": [5]}
    result = read_with_transformers(exported, work, tmp_path)
    assert result["ids"] == [vocabulary.encode(text) for text in texts]
    # the space between the prompt and its continuation
    done = run(
        "sample.py",
        init_from=exported,
        start="The king",
        temperature=0,
        num_samples=2,
        max_new_tokens=20,
        dtype="float32",
    )
    samples = [result["continued"]] * 2
    assert done.stdout == "\n---------------\n".join(samples) + "\n"


def save_qwen3(folder: Path, vocabulary: Tokenizer, padding: int = 0) -> None:
    """Save a random Qwen3 as Transformers does, with a tokenizer and rows for no token."""
    config = Qwen3Config(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        max_position_embeddings=128,
        vocab_size=vocabulary.vocab_size + padding,
        initializer_range=0.1,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    # bfloat16, as most published weights
    torch.manual_seed(0)
    network = Qwen3ForCausalLM(config)
    network.to(torch.bfloat16).save_pretrained(folder)
    to_tokenizers(vocabulary).save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def bpe_dataset(play, tmp_path_factory) -> Path:
    """Prepare a dataset with a BPE of its own. Return its folder."""
    place = tmp_path_factory.mktemp("bpe")
    run("prepare.py", play, name="bpe", tokenizer="bpe:600", data_dir=place)
    return place / "bpe"


@pytest.fixture(
    scope="module",
    params=[False, True],
    ids=["dataset's tokenizer", "its own tokenizer"],
)
def tuned(request, bpe_dataset, play, tmp_path_factory) -> SimpleNamespace:
    """Fine-tune a Qwen3 of Transformers and export it in both formats. Return its files."""
    own_tokenizer = request.param
    place = tmp_path_factory.mktemp("qwen3")
    source = place / "source"
    vocabulary = from_meta(read_meta(bpe_dataset))
    if own_tokenizer:
        # Qwen3 pads its vocabulary
        save_qwen3(source, vocabulary, padding=56)
        run("prepare.py", play, name="own", tokenizer=source, data_dir=place)
        dataset = place / "own"
    else:
        save_qwen3(source, vocabulary)
        dataset = bpe_dataset
    # a high rate: after twenty steps the weights are others than the source's
    done = run(
        "train.py",
        out_dir=place / "out",
        init_from=source,
        dataset=dataset,
        block_size=64,
        batch_size=4,
        gradient_accumulation_steps=1,
        max_iters=20,
        eval_interval=20,
        eval_iters=2,
        learning_rate=1e-2,
        warmup_iters=0,
        lr_decay_iters=20,
    )
    # no note: the settings and the tokenizers fit together
    assert not done.stderr
    run("tools.export", out_dir=place / "out", to=place / "exported")
    run("tools.export", out_dir=place / "out", to=place / "model.gguf", format="gguf")
    return SimpleNamespace(
        place=place,
        out=place / "out",
        folder=place / "exported",
        file=place / "model.gguf",
        vocabulary=vocabulary,
    )


@pytest.mark.slow
def test_a_qwen3_is_sampled_before_any_training(bpe_dataset, tmp_path):
    save_qwen3(tmp_path / "source", from_meta(read_meta(bpe_dataset)), padding=56)
    done = run(
        "sample.py",
        init_from=tmp_path / "source",
        start="The king",
        num_samples=1,
        max_new_tokens=5,
    )
    assert done.stdout.startswith("The king")
    # more than the prompt
    assert len(done.stdout) > len("The king\n")


@pytest.mark.slow
def test_a_tuned_qwen3_keeps_its_config(tuned):
    config = json.loads((tuned.folder / "config.json").read_text())
    expected = {
        "head_dim": 16,
        "num_key_value_heads": 2,
        # where Transformers 4 looks for it
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "eos_token_id": tuned.vocabulary.eot,
    }
    assert config.items() >= expected.items()
    # where Transformers 5 does
    assert config["rope_parameters"]["rope_theta"] == 1e6


@pytest.mark.slow
def test_a_tuned_qwen3_continues_a_text_alike_everywhere(tuned):
    prompt = "The king and the queen"
    done = run(
        "sample.py",
        out_dir=tuned.out,
        start=prompt,
        temperature=0,
        num_samples=1,
        max_new_tokens=20,
    )
    work = {"texts": [], "prompt": prompt, "ids": [0]}
    result = read_with_transformers(tuned.folder, work, tuned.place)
    assert result["continued"] + "\n" == done.stdout
    work = {"texts": [], "prompt": prompt}
    result = read_with_llama_cpp(tuned.file, work, tuned.place)
    assert prompt + result["continued"] + "\n" == done.stdout
    # not one token again and again, which a broken model would also do
    assert len(set(result["made"])) > 1


@pytest.mark.slow
def test_transformers_continues_a_text_as_sample_py_does(train, tmp_path):
    train(block_size=64)
    out = tmp_path / "out"
    folder = tmp_path / "exported"
    done = run("tools.export", out_dir=out, to=folder)
    assert "step 20" in done.stdout
    # a folder is written under another name, then renamed
    assert not list(tmp_path.glob("*.tmp"))
    # only the continuation counts here
    work = {"texts": [], "prompt": "HAMLET ", "ids": [0]}
    result = read_with_transformers(folder, work, tmp_path)
    # the run itself, and both files of the export
    for source in (
        {"out_dir": out},
        {"init_from": folder / "weights.pt"},
        {"init_from": folder},
    ):
        done = run(
            "sample.py",
            **source,
            start="HAMLET ",
            temperature=0,
            num_samples=1,
            max_new_tokens=20,
        )
        assert done.stdout == result["continued"] + "\n"


def test_dtype_is_that_of_the_weights(whole, tmp_path):
    # the run itself has float32
    folder = tmp_path / "half"
    run("tools.export", out_dir=whole, to=folder, dtype="bfloat16")
    weights = torch.load(folder / "weights.pt", weights_only=True)["model"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def save_weights(folder: Path) -> Path:
    """Write a file of random weights, of more than 15 KiB. Return its path."""
    args = ModelArgs(1, 1, 32, 32, 60, True, 0.0)
    chars = "".join(map(chr, range(40, 100)))
    bundle = {
        "model": build_model(args).state_dict(),
        "model_args": vars(args),
        "data": {"tokenizer": {"kind": "char", "chars": chars}},
    }
    path = folder / "weights.pt"
    torch.save(bundle, path)
    return path


def test_corrupt_weights_are_refused(tmp_path):
    path = save_weights(tmp_path)
    args, _, _ = read_weights(str(path))
    assert args["n_embd"] == 32
    # one bit, in the middle
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = run("tools.export", init_from=path, to=tmp_path / "to", code=2)
    assert "is corrupt" in read_error(done)


@pytest.mark.slow
def test_mistakes_are_answered_with_one_line(tmp_path):
    # each of these ends with 2 and one line
    def export(**flags):
        return read_error(run("tools.export", code=2, **flags))

    to = tmp_path / "to"
    assert "--to" in export(out_dir=tmp_path)
    assert "python train.py" in export(out_dir=tmp_path, to=to)
    # an existing file is kept
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert "expected a new or empty folder" in export(out_dir=tmp_path, to=full)
    error = export(out_dir=tmp_path, to=full / "file", format="gguf")
    assert "expected a new file" in error
    assert (full / "file").exists()
    # a limit of 15 KiB for any file: the weights are larger
    args = make_command("tools.export", init_from=save_weights(tmp_path), to=to)
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 30; exec "$@"', "bash", *args],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert f"--to={to}: [Errno 27]" in read_error(done)
    # a file of PyTorch that is not a checkpoint
    torch.save({"model": {}}, tmp_path / "no.pt")
    error = export(init_from=tmp_path / "no.pt", to=to)
    assert "expected a checkpoint" in error
    assert not to.exists()
