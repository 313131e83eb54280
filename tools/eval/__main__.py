"""Evaluate models: `python -m tools.eval MODEL [MODEL ...] --text=FILE` prints bits per byte;
--dataset=NAME reads a validation split instead, and --tasks=hellaswag,arc_easy asks questions.

A MODEL is the folder of a run, a checkpoint, an average, a folder in Hugging Face's format or a
name on the hub. Several are compared document by document, with a standard error. Results are kept
beside the model: the same command continues after an interruption.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from keepgpt.config import setting
from keepgpt.device import pick_device, pick_dtype
from keepgpt.errors import UserError, warn
from keepgpt.files import make_folder, write_atomically
from keepgpt.mixture import find_sources
from tools.common import run_tool
from tools.eval.documents import (
    Task,
    Text,
    make_task,
    make_text,
    read_dataset,
    read_text,
)
from tools.eval.models import Model, Sequence, load_model
from tools.eval.results import evaluate
from tools.eval.stats import Estimate, is_decided, subtract

USAGE = "python -m tools.eval MODEL [MODEL ...] --text=FILE [--key=value ...]"


@dataclass(frozen=True)
class EvalConfig:
    """The settings of tools.eval."""

    # what to evaluate on
    text: str = setting(
        "", "a text file, or rows with a document each (.jsonl, .json, .parquet)"
    )
    text_key: str = setting("text", "the key of the document in such a row")
    dataset: str = setting("", "a prepared dataset: its val split")
    data_dir: str = setting("data", "folder of that dataset, as in train.py")
    tasks: str = setting(
        "", "tasks, e.g. hellaswag,arc_easy/rc_5shot, or .jsonl files of questions"
    )
    limit: int = setting(0, "only the first documents or questions; 0 = all")
    chars: int = setting(
        2000, "cut a text into documents of at least this many characters; 0 = don't"
    )
    # the models
    step: int = setting(0, "the checkpoint of this step of each run; 0 = the best")
    device: str = setting("auto", "auto | cpu | cuda | cuda:1 | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "dtype of matrix products; auto = the fastest"
    )
    batch_tokens: int = setting(8192, "tokens of a batch, with its padding", least=1)
    to: str = setting("", "folder for results; empty = beside each model")


@dataclass
class Result:
    """The metrics of a model on a corpus. It does not hold the model, which may fill the memory."""

    name: str
    origin: str
    sha256: str
    corpus: Text | Task
    tokens: int
    size: int
    metrics: dict[str, Estimate]


def find_corpora(config: EvalConfig) -> list[Text | Task]:
    """Return all that the command evaluates on. Raises UserError and OSError."""
    corpora: list[Text | Task] = []
    if config.text:
        texts = read_text(config.text, config.text_key)
        name = Path(config.text).name
        corpora.append(make_text(name, texts, config.chars, config.limit))
    if config.dataset:
        # each source of a mixture on its own
        for source in find_sources(config.data_dir, config.dataset):
            name = f"{source.folder.name}/val"
            texts = read_dataset(source.folder)
            corpora.append(make_text(name, texts, config.chars, config.limit))
    if config.tasks:
        # a name twice is once
        names = dict.fromkeys(filter(None, config.tasks.split(",")))
        corpora += [make_task(name, config.limit) for name in names]
    return corpora


def encode(model: Model, corpus: Text | Task) -> list[list[Sequence]]:
    """Return the sequences of a corpus in the tokens of a model. Raises UserError."""
    try:
        return corpus.encode(model.vocabulary)
    # a vocabulary of characters may lack some
    except UserError as e:
        raise UserError(
            f"{model.name} can't read {corpus.name}: {e}. Try: a model with other tokens, or "
            "another text"
        ) from None


def warn_of_long(
    model: Model, corpus: Text | Task, documents: list[list[Sequence]]
) -> None:
    """Print a note if sequences are longer than the model's block."""
    block_size = model.network.args.block_size
    long = sum(
        any(len(sequence.ids) - 1 > block_size for sequence in document)
        for document in documents
    )
    if not long:
        return
    continued = f"continue after {block_size // 2} tokens of context"
    consequence = f"they {continued}"
    if isinstance(corpus, Task):
        consequence = "their contexts are cut from the left"
        sequences = [sequence for document in documents for sequence in document]
        if any(len(s.ids) - 1 - s.first >= block_size for s in sequences):
            consequence += f"; choices that are longer themselves {continued}"
    warn(
        f"{corpus.name}: {long:,} of {len(documents):,} {corpus.kind} are longer than the "
        f"block_size={block_size} of {model.name}: {consequence}"
    )


def evaluate_model(
    name: str, corpora: list[Text | Task], device: torch.device, config: EvalConfig
) -> list[Result]:
    """Return the results of a model on all corpora, which are also written as JSON. Raises
    UserError and OSError."""
    model = load_model(name, config.step, config.data_dir)
    model.network.to(device)
    folder = Path(config.to) if config.to else model.folder
    make_folder(folder)
    encoded = [encode(model, corpus) for corpus in corpora]
    dtype = pick_dtype(config.dtype, device)
    results = []
    for corpus, documents in zip(corpora, encoded):
        warn_of_long(model, corpus, documents)
        stem = f"eval-{model.sha256[:12]}-{corpus.name.replace('/', '-')}"
        path = folder / f"{stem}.jsonl"
        try:
            nats = evaluate(model, documents, path, config.batch_tokens, dtype)
        except KeyboardInterrupt:
            warn(f"stopped; {path} has the results so far, the same command continues")
            raise
        result = make_result(model, corpus, documents, nats)
        about = describe_result(result) | {"dtype": str(dtype).removeprefix("torch.")}
        content = json.dumps(about, indent=2) + "\n"
        # those of a part, of another text of that name or of another dtype do not replace it
        stem += f"-{about['documents_sha256'][:8]}-{about['dtype']}"
        write_atomically(folder / f"{stem}.json", content.encode())
        results.append(result)
    return results


def make_result(
    model: Model,
    corpus: Text | Task,
    documents: list[list[Sequence]],
    nats: list[list[float]],
) -> Result:
    """Return the result of a model that needs `nats` for a corpus. Raises UserError if they are not
    finite, or nothing was scored."""
    if not all(math.isfinite(value) for row in nats for value in row):
        raise UserError(
            f"{model.name}: {corpus.name}: expected finite losses, got NaN or infinity. Try: "
            "--dtype=float32"
        )
    sequences = [sequence for document in documents for sequence in document]
    tokens = sum(len(sequence.ids) - sequence.first for sequence in sequences)
    size = sum(sequence.size for sequence in sequences)
    # a model of characters does not score the first one
    if not size:
        raise UserError(f"{corpus.name}: nothing to score. Try: a longer text")
    metrics = corpus.summarize(documents, nats)
    return Result(model.name, model.origin, model.sha256, corpus, tokens, size, metrics)


def describe_result(result: Result) -> dict:
    """Return a result as JSON has it."""
    documents = result.corpus.documents
    metrics = {}
    for name, value in result.metrics.items():
        # JSON has no NaN
        error = None if math.isnan(value.error) else value.error
        metrics[name] = {"value": value.value, "standard_error": error}
    return {
        "model": result.name,
        "origin": result.origin,
        "sha256": result.sha256,
        "on": result.corpus.name,
        "documents": len(documents),
        "documents_sha256": hashlib.sha256(repr(documents).encode()).hexdigest(),
        "tokens": result.tokens,
        "bytes": result.size,
        **metrics,
    }


def describe_corpus(results: list[Result]) -> Iterator[str]:
    """Yield lines about the results of all models on a corpus: a table, then the differences to the
    first model."""
    corpus = results[0].corpus
    count = len(corpus.documents)
    kind = corpus.kind if count > 1 else corpus.kind.removesuffix("s")
    yield f"{corpus.name}: {count:,} {kind}"
    rows = [["model", "sha256", "tokens", "bytes", *results[0].metrics]]
    for result in results:
        facts = [f"{result.tokens:,}", f"{result.size:,}"]
        values = map(str, result.metrics.values())
        rows.append([result.name, result.sha256[:12], *facts, *values])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        yield "  " + "  ".join(cells).rstrip()
    for result in results[1:]:
        yield from compare(results[0], result)


def compare(base: Result, result: Result) -> Iterator[str]:
    """Yield a sentence about the difference of each metric that can be compared."""
    for name, value in result.metrics.items():
        # tokens may differ
        if name == "nats per token":
            continue
        difference = subtract(value, base.metrics[name])
        error = f" ± {difference.error:.5f}"
        verdict = "less than two standard errors, not decided"
        if math.isnan(difference.error):
            error = ""
            verdict = "one document has no standard error, not decided"
        if is_decided(difference):
            is_lower = difference.value < 0
            word = "better" if is_lower == (name == "bits per byte") else "worse"
            verdict = f"more than two standard errors, {word}"
        yield (
            f"  {result.name} against {base.name}: {name} {difference.value:+.5f}{error}: "
            f"{verdict}"
        )


def main(config: EvalConfig, args: list[str]) -> None:
    """Evaluate and compare models. Raises UserError and OSError."""
    corpora = find_corpora(config) if args else []
    if not corpora:
        raise UserError(
            "expected a model, and --text=FILE, --dataset=NAME or --tasks=NAMES. Try: python -m "
            "tools.eval out --dataset=plays_char"
        )
    device = pick_device(config.device)
    # mistakes first: computing takes long. One model at a time: it may fill the memory
    for name in args[1:]:
        # its notes come when it is evaluated
        with redirect_stderr(io.StringIO()):
            model = load_model(name, config.step, config.data_dir)
        for corpus in corpora:
            encode(model, corpus)
        del model
    results = []
    for name in args:
        results.append(evaluate_model(name, corpora, device, config))
    for on_corpus in zip(*results):
        print("\n".join(describe_corpus(list(on_corpus))), flush=True)


if __name__ == "__main__":
    run_tool(EvalConfig, USAGE, main)
