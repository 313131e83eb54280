"""What tools.export writes is the same model and the same tokenizer in Transformers' hands."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken_ext.openai_public
import torch
from conftest import REPO, command, complaint, run

from keepgpt.pretrained import read_weights
from keepgpt.tokenizer import describe_encoding, from_meta, train_bpe
from model import GPT, ModelArgs, load_model

PIECES = ["abcdefgh ſstredml'’", "0123456789 ab", "日本語漢字 かな",
          "\n\t \r\x0b\x1c\x85\u00a0\u2003a",
          "😀👨‍👩‍👧é̀", " aA!?.,/\n", "ааяжб Ж", "aAßŉ'S", ".\n/_a1 "]
# in a process and a folder where nothing of this repository is to be found
READ = """
import json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, work = sys.argv[1], json.load(open(sys.argv[2]))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
ids = [tokenizer(text)["input_ids"] for text in work["texts"]]
prompt = tokenizer(work["prompt"], return_tensors="pt")
made = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
logits = model(torch.tensor([work["ids"]])).logits[0]
torch.save({"ids": ids, "back": [tokenizer.decode(row) for row in ids], "made": made,
            "continued": tokenizer.decode(made), "logits": logits,
            "eot": tokenizer.eos_token_id}, sys.argv[3])
"""


def strings(alphabet: str | None) -> list[str]:
    """Texts of many scripts, or of `alphabet`."""
    draw = random.Random(1)
    texts = []
    for _ in range(400):
        letters = alphabet or draw.choice(PIECES) + draw.choice(PIECES)
        texts.append("".join(draw.choices(letters, k=draw.randint(1, 60))))
    return texts


def by_transformers(folder: Path, work: dict, tmp_path: Path) -> dict:
    """What Transformers makes of an exported folder."""
    (tmp_path / "work.json").write_text(json.dumps(work))
    subprocess.run([sys.executable, "-I", "-c", READ, folder, tmp_path / "work.json",
                    tmp_path / "read.pt"], cwd=tmp_path, check=True, capture_output=True)
    return torch.load(tmp_path / "read.pt")


@pytest.fixture(scope="module")
def text(play: Path) -> str:
    return play.read_text(encoding="utf-8") + "".join(f" {i * i * i}" for i in range(2000))


def cl100k(monkeypatch, text: str) -> dict:
    """tiktoken's cl100k_base with the ranks of a small BPE in the place of its own."""
    ranks = from_meta({"tokenizer": train_bpe([text], 1000)}).ranks
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    parts = tiktoken_ext.openai_public.cl100k_base()
    return describe_encoding("cl100k_base", parts["pat_str"], ranks, parts["special_tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("kind, bias", [("char", False), ("gpt2", True), ("bpe", False),
                                        ("cl100k", True)])
def test_transformers_reads_the_same_model_and_tokenizer(kind, bias, text, tmp_path, monkeypatch):
    description = {"char": lambda: {"kind": "char", "chars": "".join(sorted(set(text)))},
                   "gpt2": lambda: {"kind": "gpt2"}, "bpe": lambda: train_bpe([text], 1000),
                   "cl100k": lambda: cl100k(monkeypatch, text)}[kind]()
    vocabulary = from_meta({"tokenizer": description})
    torch.manual_seed(0)
    model = GPT(ModelArgs(2, 2, 16, 64, vocabulary.vocab_size, bias, 0.1)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    checkpoint, folder = tmp_path / "random.pt", tmp_path / "exported"
    torch.save({"model": model.state_dict(), "model_args": vars(model.args),
                "data": {"tokenizer": description}}, checkpoint)
    run("tools.export", init_from=checkpoint, to=folder)

    alphabet = description["chars"] if kind == "char" else None
    prompt = text[1000:1040]
    work = {"texts": strings(alphabet), "prompt": prompt, "ids": vocabulary.encode(prompt)}
    theirs = by_transformers(folder, work, tmp_path)
    assert theirs["ids"] == [vocabulary.encode(t) for t in work["texts"]]
    assert theirs["back"] == work["texts"]
    assert theirs["eot"] == vocabulary.eot
    # else Transformers 4 hands token_type_ids to the model, which adds them to its embeddings
    assert (json.loads((folder / "tokenizer_config.json").read_text())["model_input_names"]
            == ["input_ids", "attention_mask"])
    ours = model.double()(torch.tensor([work["ids"]]))[0]
    assert (theirs["logits"] - ours).abs().max() < 1e-12 * ours.abs().max()
    assert ours.std() > 0.1
    # and back, into this repository
    args, state, data = read_weights(str(folder))
    assert data["tokenizer"] == description
    again = load_model(args, state).eval()
    assert torch.equal(again.double()(torch.tensor([work["ids"]]))[0], ours)
    args, state, data = read_weights(str(folder / "weights.pt"))
    assert args == vars(model.args) and data["tokenizer"] == description
    assert all(torch.equal(state[name], p.float()) for name, p in model.state_dict().items())


@pytest.mark.slow
def test_transformers_continues_a_trained_model_as_sample_py_does(train, tmp_path):
    train(max_iters=40, block_size=64)
    out, folder = tmp_path / "out", tmp_path / "exported"
    told = run("tools.export", out_dir=out, to=folder).stdout
    assert "step 40" in told and "model.safetensors" in told and not list(tmp_path.glob("*.tmp"))
    theirs = by_transformers(folder, {"texts": [], "prompt": "HAMLET ", "ids": [0]}, tmp_path)
    ours = [run("sample.py", **source, start="HAMLET ", temperature=0, num_samples=1,
                max_new_tokens=20).stdout
            for source in ({"out_dir": out}, {"init_from": folder / "weights.pt"},
                           {"init_from": folder})]
    assert ours == [theirs["continued"] + "\n"] * 3


def test_dtype_is_that_of_the_weights(train, tmp_path):
    train(max_iters=20)
    run("tools.export", out_dir=tmp_path / "out", to=tmp_path / "half", dtype="bfloat16")
    weights = torch.load(tmp_path / "half/weights.pt", weights_only=True)["model"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def weights(place: Path) -> Path:
    """A file of random weights, of more than 15 KiB."""
    args, path = ModelArgs(1, 1, 32, 32, 60, True, 0.0), place / "weights.pt"
    torch.save({"model": GPT(args).state_dict(), "model_args": vars(args), "data": {
        "tokenizer": {"kind": "char", "chars": "".join(map(chr, range(40, 100)))}}}, path)
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

    assert "--to=FOLDER" in told(out_dir=tmp_path)
    assert "python train.py" in told(out_dir=tmp_path, to=tmp_path / "to")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "expected a new or empty folder" in told(out_dir=tmp_path, to=tmp_path / "full")
    assert (tmp_path / "full/file").exists()
    words = command("tools.export", init_from=weights(tmp_path), to=tmp_path / "to")
    full = subprocess.run(["bash", "-c", 'ulimit -f 30; exec "$@"', "bash", *words],
                          capture_output=True, text=True, cwd=REPO)
    assert f"--to={tmp_path / 'to'} can't be written: file too large" in complaint(full)
    torch.save({"model": {}}, tmp_path / "no.pt")
    assert "expected a checkpoint" in told(init_from=tmp_path / "no.pt", to=tmp_path / "to")
    assert not (tmp_path / "to").exists()
