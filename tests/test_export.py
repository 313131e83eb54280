"""What tools.export writes is the same model and tokenizer in Transformers and llama.cpp."""

import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before Transformers is loaded: else it asks the hub, and waits
)

import pytest
import tiktoken_ext.openai_public
import torch
from conftest import PROGRAMS, REPO, command, complaint, run
from small_tokenizers import QWEN, byte_level, save, sentencepiece, unigram, wordpiece
from transformers import Qwen3Config, Qwen3ForCausalLM

from keepgpt.dataset import read_meta
from keepgpt.errors import UserError
from keepgpt.huggingface import read_weights
from keepgpt.tokenizer import (
    describe_encoding,
    describe_tokenizer,
    from_meta,
    to_tokenizers,
    train_bpe,
)
from model import GPT, ModelArgs, build_model, generate, load_model
from tools.export import to_gguf_tokenizer

QWEN3 = {
    "architecture": "qwen3",
    "n_kv_head": 1,
    "head_dim": 32,
    "n_ff": 40,
    "rope_theta": 1000.0,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
}
LLAMA = QWEN3 | {"architecture": "llama"}
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


def strings(alphabet: str | None) -> list[str]:
    """Texts of many scripts, or of `alphabet`."""
    draw = random.Random(1)
    texts = []
    for _ in range(400):
        letters = alphabet or draw.choice(PIECES) + draw.choice(PIECES)
        texts.append("".join(draw.choices(letters, k=draw.randint(1, 60))))
    return texts


# -I: a process that finds nothing of this repository
ELSEWHERE = [sys.executable, "-I"]


@functools.cache
def transformers_server() -> subprocess.Popen:
    """Start a process with Transformers, which ends with this one."""
    return subprocess.Popen(
        [*ELSEWHERE, PROGRAMS / "read_folder.py"],
        text=True,
        cwd=tempfile.gettempdir(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def by_transformers(folder: Path, work: dict, tmp_path: Path) -> dict:
    """Return what Transformers makes of an exported folder."""
    work_file = tmp_path / "work.json"
    work_file.write_text(json.dumps(work))
    result = tmp_path / "read.pt"
    server = transformers_server()
    print(folder, work_file, result, sep="\t", file=server.stdin, flush=True)
    assert server.stdout.readline() == "done\n"
    return torch.load(result)


def by_llama_cpp(file: Path, work: dict, tmp_path: Path) -> dict:
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
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=3 if "wpe" in name else 0.3)
    torch.save(
        {
            "model": model.state_dict(),
            "model_args": vars(model.args),
            "data": {"tokenizer": description},
        },
        path,
    )
    return model


@pytest.fixture(scope="module")
def text(play: Path) -> str:
    return play.read_text(encoding="utf-8") + "".join(
        f" {i * i * i}" for i in range(2000)
    )


def cl100k(monkeypatch, text: str) -> dict:
    """Return the description of tiktoken's cl100k_base with the ranks of a small BPE."""
    ranks = from_meta({"tokenizer": train_bpe([text], 1000)}).ranks
    monkeypatch.setattr(
        tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks
    )
    parts = tiktoken_ext.openai_public.cl100k_base()
    return describe_encoding(
        "cl100k_base", parts["pat_str"], ranks, parts["special_tokens"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, bias, qwen3",
    [
        ("gpt2", True, {}),
        ("cl100k", True, {}),
        ("bpe", False, QWEN3),
        ("char", False, {"architecture": "qwen3"}),
        ("bpe", False, LLAMA),
    ],
    ids=["gpt2", "cl100k", "qwen3 bpe", "qwen3 tied char", "llama bpe"],
)
def test_transformers_reads_the_same_model_and_tokenizer(
    kind, bias, qwen3, text, tmp_path, monkeypatch
):
    description = {
        "char": lambda: {"kind": "char", "chars": "".join(sorted(set(text)))},
        "gpt2": lambda: {"kind": "gpt2"},
        "bpe": lambda: train_bpe([text], 1000),
        "cl100k": lambda: cl100k(monkeypatch, text),
    }[kind]()
    vocabulary = from_meta({"tokenizer": description})
    checkpoint, folder = tmp_path / "random.pt", tmp_path / "exported"
    args = ModelArgs(2, 2, 16, 64, vocabulary.vocab_size, bias, 0.1, **qwen3)
    model = save_random(checkpoint, args, description)
    run("tools.export", init_from=checkpoint, to=folder)

    alphabet = description["chars"] if kind == "char" else None
    prompt = text[1000:1040]
    work = {
        "texts": strings(alphabet),
        "prompt": prompt,
        "ids": vocabulary.encode(prompt),
    }
    theirs = by_transformers(folder, work, tmp_path)
    assert theirs["ids"] == [vocabulary.encode(t) for t in work["texts"]]
    assert theirs["back"] == work["texts"]
    assert theirs["eot"] == vocabulary.eot
    # else Transformers 4 hands token_type_ids to the model, which adds them to its embeddings
    assert json.loads((folder / "tokenizer_config.json").read_text())[
        "model_input_names"
    ] == ["input_ids", "attention_mask"]
    ours = model.double()(torch.tensor([work["ids"]]))[0]
    # Transformers computes RMSNorm in float32
    most = 1e-5 if qwen3 else 1e-12
    assert (theirs["logits"] - ours).abs().max() < most * ours.abs().max()
    assert ours.std() > 0.1
    # and back, into this repository
    args, state, data = read_weights(str(folder))
    assert data["tokenizer"] == description
    again = load_model(args, state).eval()
    assert torch.equal(again.double()(torch.tensor([work["ids"]]))[0], ours)
    args, state, data = read_weights(str(folder / "weights.pt"))
    assert args == vars(model.args) and data["tokenizer"] == description
    assert all(
        torch.equal(state[name], p.float()) for name, p in model.state_dict().items()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, settings, dtype",
    [
        ("bpe", {"bias": False}, "float32"),
        ("gpt2", {}, "bfloat16"),
        ("bpe", QWEN3, "float32"),
        ("char", {"architecture": "qwen3"}, "bfloat16"),
        ("bpe", LLAMA, "float32"),
        ("char", {"architecture": "llama"}, "float16"),
    ],
    ids=["gpt2 bpe", "gpt2", "qwen3", "qwen3 tied", "llama", "llama tied"],
)
def test_llama_cpp_reads_the_same_model_and_tokenizer(
    kind, settings, dtype, text, tmp_path
):
    text += " é日本語 \\ \t ★"
    description = {
        "char": lambda: {"kind": "char", "chars": "".join(sorted(set(text)))},
        "gpt2": lambda: {"kind": "gpt2"},
        "bpe": lambda: train_bpe([text], 1000),
    }[kind]()
    vocabulary = from_meta({"tokenizer": description})
    args = ModelArgs(
        2,
        2,
        32,
        64,
        vocabulary.vocab_size,
        **{"bias": "architecture" not in settings, "dropout": 0.0} | settings,
    )
    model = save_random(tmp_path / "random.pt", args, description)
    run(
        "tools.export",
        init_from=tmp_path / "random.pt",
        to=tmp_path / "model.gguf",
        format="gguf",
        dtype=dtype,
    )
    alphabet = description["chars"] if kind == "char" else None
    work = {
        "texts": strings(alphabet),
        "prompt": text[1000:1040],
        "ignore_eos": kind != "char",
    }
    theirs = by_llama_cpp(tmp_path / "model.gguf", work, tmp_path)
    assert theirs["ids"] == [vocabulary.encode(t) for t in work["texts"]]
    assert theirs["back"] == work["texts"]
    for name, p in model.named_parameters():
        if p.dim() == 2 and "wpe" not in name:
            p.data = p.data.to(getattr(torch, dtype)).float()
    made = [
        row[0]
        for row in generate(
            model, [vocabulary.encode(work["prompt"])], 20, temperature=0
        )
    ]
    if vocabulary.eot in made:
        made = made[: made.index(vocabulary.eot)]  # llama.cpp takes the next likeliest
    assert theirs["made"][: len(made)] == made
    assert len(set(made)) > 1 + 2 * (not settings.get("tie_embeddings", True))


def add_tokens(content: dict, *tokens: str, **flags: bool) -> None:
    """Add tokens that are not special."""
    for token in tokens:
        content["added_tokens"].append(
            content["added_tokens"][0]
            | {
                "id": 500 + len(content["added_tokens"]),
                "content": token,
                "special": False,
            }
            | flags
        )


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [None, QWEN], ids=["gpt2", "qwen"])
def test_llama_cpp_reads_a_folder_s_tokenizer(pattern, text, tmp_path):
    def change(content: dict) -> None:
        add_tokens(content, "<think>", "king", " the ")
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "pair": [],
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "special_tokens": {
                "<|endoftext|>": {
                    "id": "<|endoftext|>",
                    "ids": [499],
                    "tokens": ["<|endoftext|>"],
                }
            },
        }

    folder = save(byte_level(text, pattern), tmp_path / "theirs", change)
    description = describe_tokenizer(str(folder))
    vocabulary = from_meta({"tokenizer": description})
    assert len(vocabulary.encode("the king and the <think>")) < 9
    args = ModelArgs(1, 2, 32, 64, vocabulary.vocab_size, True, 0.0)
    save_random(tmp_path / "random.pt", args, description)
    run(
        "tools.export",
        init_from=tmp_path / "random.pt",
        to=tmp_path / "model.gguf",
        format="gguf",
    )
    places = range(0, len(text) - 200, 997)
    work = {
        "texts": [*strings(None), *(text[at : at + 200] for at in places)],
        "prompt": "To",
    }
    theirs = by_llama_cpp(tmp_path / "model.gguf", work, tmp_path)
    assert theirs["ids"] == [vocabulary.encode(t) for t in work["texts"]]
    assert theirs["back"] == work["texts"]


def set_part(part: str, **values) -> Callable[[dict], None]:
    return lambda content: content.update({part: values or None})


def set_option(**values) -> Callable[[dict], None]:
    return lambda content: content["model"].update(values)


def set_split(**values) -> Callable[[dict], None]:
    return lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(values)


def set_bytes(**values) -> Callable[[dict], None]:
    return lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(values)


def add_step(content: dict) -> None:
    content["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Digits", "individual_digits": True}
    )


def drop_a_byte(content: dict) -> None:
    del content["model"]["vocab"]["~"]


@pytest.mark.parametrize(
    "change, told",
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
)
def test_gguf_refuses_a_tokenizer_with_another_part(change, told, text, tmp_path):
    folder = save(byte_level(text, QWEN), tmp_path / "own")
    to_gguf_tokenizer(from_meta({"tokenizer": describe_tokenizer(str(folder))}))
    save(byte_level(text, QWEN), folder, change)
    with pytest.raises(UserError) as e:
        to_gguf_tokenizer(from_meta({"tokenizer": describe_tokenizer(str(folder))}))
    assert told in str(e.value) and "--format=hf" in str(e.value)


@pytest.mark.parametrize("make", [sentencepiece, wordpiece, unigram])
def test_gguf_refuses_other_kinds_and_writes_nothing(make, text, tmp_path):
    description = describe_tokenizer(str(save(make(text), tmp_path / "own")))
    size = from_meta({"tokenizer": description}).vocab_size
    save_random(
        tmp_path / "random.pt", ModelArgs(1, 2, 16, 16, size, True, 0.0), description
    )
    done = run(
        "tools.export",
        init_from=tmp_path / "random.pt",
        to=tmp_path / "model.gguf",
        format="gguf",
        code=2,
    )
    assert "--format=hf" in complaint(done)
    assert not list(tmp_path.glob("model*"))


@pytest.mark.slow
def test_an_exported_tokenizer_gives_the_ids_of_training(text, tmp_path):
    description = describe_tokenizer(str(save(sentencepiece(text), tmp_path / "own")))
    vocabulary = from_meta({"tokenizer": description})
    args = ModelArgs(1, 2, 16, 64, vocabulary.vocab_size, True, 0.0)
    save_random(tmp_path / "random.pt", args, description)
    run("tools.export", init_from=tmp_path / "random.pt", to=tmp_path / "exported")
    work = {"texts": strings(None), "prompt": "The king", "ids": [5]}
    theirs = by_transformers(tmp_path / "exported", work, tmp_path)
    assert theirs["ids"] == [vocabulary.encode(t) for t in work["texts"]]
    # the space between the prompt and its continuation
    ours = run(
        "sample.py",
        init_from=tmp_path / "exported",
        start="The king",
        temperature=0,
        num_samples=2,
        max_new_tokens=20,
        dtype="float32",
    ).stdout
    assert ours == "\n---------------\n".join([theirs["continued"]] * 2) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "own_tokenizer", [False, True], ids=["dataset's tokenizer", "its own tokenizer"]
)
def test_a_qwen3_goes_in_is_fine_tuned_and_comes_out(own_tokenizer, play, tmp_path):
    run("prepare.py", play, name="bpe", tokenizer="bpe:600", data_dir=tmp_path)
    vocabulary = from_meta(read_meta(tmp_path / "bpe"))
    torch.manual_seed(0)
    source = Qwen3ForCausalLM(
        Qwen3Config(
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            hidden_size=32,
            intermediate_size=64,
            max_position_embeddings=128,
            vocab_size=vocabulary.vocab_size
            + 56 * own_tokenizer,  # Qwen3 pads its vocabulary
            initializer_range=0.1,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    source.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    to_tokenizers(vocabulary).save(str(tmp_path / "source/tokenizer.json"))
    if own_tokenizer:
        sampled = run(
            "sample.py",
            init_from=tmp_path / "source",
            start="The king",
            num_samples=1,
            max_new_tokens=5,
        ).stdout
        assert sampled.startswith("The king") and len(sampled) > 9
        run(
            "prepare.py",
            play,
            name="own",
            tokenizer=tmp_path / "source",
            data_dir=tmp_path,
        )
    dataset = tmp_path / ("own" if own_tokenizer else "bpe")
    out, folder, file = tmp_path / "out", tmp_path / "exported", tmp_path / "model.gguf"
    done = run(
        "train.py",
        out_dir=out,
        init_from=tmp_path / "source",
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
    assert not done.stderr
    run("tools.export", out_dir=out, to=folder)
    run("tools.export", out_dir=out, to=file, format="gguf")
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == 16 and config["num_key_value_heads"] == 2
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert (
        config["tie_word_embeddings"] is False
        and config["eos_token_id"] == vocabulary.eot
    )
    prompt = "The king and the queen"
    ours = run(
        "sample.py",
        out_dir=out,
        start=prompt,
        temperature=0,
        num_samples=1,
        max_new_tokens=20,
    ).stdout
    theirs = by_transformers(
        folder, {"texts": [], "prompt": prompt, "ids": [0]}, tmp_path
    )
    assert theirs["continued"] + "\n" == ours
    theirs = by_llama_cpp(file, {"texts": [], "prompt": prompt}, tmp_path)
    assert prompt + theirs["continued"] + "\n" == ours and len(set(theirs["made"])) > 1


@pytest.mark.slow
def test_transformers_continues_a_text_as_sample_py_does(train, tmp_path):
    train(block_size=64)
    out, folder = tmp_path / "out", tmp_path / "exported"
    told = run("tools.export", out_dir=out, to=folder).stdout
    assert "step 20" in told and not list(tmp_path.glob("*.tmp"))
    theirs = by_transformers(
        folder, {"texts": [], "prompt": "HAMLET ", "ids": [0]}, tmp_path
    )
    ours = [
        run(
            "sample.py",
            **source,
            start="HAMLET ",
            temperature=0,
            num_samples=1,
            max_new_tokens=20,
        ).stdout
        for source in (
            {"out_dir": out},
            {"init_from": folder / "weights.pt"},
            {"init_from": folder},
        )
    ]
    assert ours == [theirs["continued"] + "\n"] * 3


def test_dtype_is_that_of_the_weights(whole, tmp_path):
    run("tools.export", out_dir=whole, to=tmp_path / "half", dtype="bfloat16")
    weights = torch.load(tmp_path / "half/weights.pt", weights_only=True)["model"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert (
        json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    )


def weights(place: Path) -> Path:
    """A file of random weights, of more than 15 KiB."""
    args, path = ModelArgs(1, 1, 32, 32, 60, True, 0.0), place / "weights.pt"
    torch.save(
        {
            "model": build_model(args).state_dict(),
            "model_args": vars(args),
            "data": {
                "tokenizer": {
                    "kind": "char",
                    "chars": "".join(map(chr, range(40, 100))),
                }
            },
        },
        path,
    )
    return path


def test_corrupt_weights_are_refused(tmp_path):
    path = weights(tmp_path)
    assert read_weights(str(path))[0]["n_embd"] == 32
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = run("tools.export", init_from=path, to=tmp_path / "to", code=2)
    assert "is corrupt" in complaint(done)


def test_mistakes_are_answered_with_one_line(tmp_path):
    def told(**flags):
        return complaint(run("tools.export", code=2, **flags))

    assert "--to" in told(out_dir=tmp_path)
    assert "python train.py" in told(out_dir=tmp_path, to=tmp_path / "to")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "expected a new or empty folder" in told(
        out_dir=tmp_path, to=tmp_path / "full"
    )
    assert (tmp_path / "full/file").exists()
    args = command("tools.export", init_from=weights(tmp_path), to=tmp_path / "to")
    full = subprocess.run(
        ["bash", "-c", 'ulimit -f 30; exec "$@"', "bash", *args],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert f"--to={tmp_path / 'to'}: [Errno 27]" in complaint(full)
    assert "expected a new file" in told(
        out_dir=tmp_path, to=tmp_path / "full/file", format="gguf"
    )
    torch.save({"model": {}}, tmp_path / "no.pt")
    assert "expected a checkpoint" in told(
        init_from=tmp_path / "no.pt", to=tmp_path / "to"
    )
    assert not (tmp_path / "to").exists()
