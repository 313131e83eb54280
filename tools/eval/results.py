"""Compute the results of a model on documents, and keep them in a file: after an interruption only
the missing ones are computed, with the same numbers."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from keepgpt.errors import name_path, warn
from tools.eval.models import Model, Sequence, Window, cut_document, score_windows

# of documents whose windows are sorted by length: a kill loses one such group
BATCHES = 8


def make_key(document: list[Sequence], dtype: torch.dtype) -> str:
    """Return what identifies the result of a document by a model: its tokens, and the dtype."""
    content = [[sequence.first, sequence.ids] for sequence in document]
    return hashlib.sha256(f"{dtype} {content}".encode()).hexdigest()[:16]


def read_rows(path: Path) -> dict[str, list[float]]:
    """Return the results in a file by their keys. A row that a kill has cut short, or another
    program has written, does not count."""
    rows: dict[str, list[float]] = {}
    if not path.exists():
        return rows
    for line in path.read_bytes().splitlines():
        with suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            rows[row["key"]] = row["nats"]
    return rows


def append_rows(path: Path, rows: list[dict]) -> None:
    """Append results to a file. Raises OSError."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with name_path(path), open(path, "a+b") as file:
        # end a row that a kill has cut short
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                text = "\n" + text
        file.write(text.encode())


def make_batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Yield batches of windows that share as many inputs with others, the longest first, with at
    most `batch_tokens` tokens and padding each, or one window."""
    batch: list[Window] = []
    for window in sorted(windows, key=order_of, reverse=True):
        # all are padded to the first, which is the longest
        is_full = batch and (len(batch) + 1) * len(batch[0]) > batch_tokens
        if is_full or (batch and window.shared != batch[0].shared):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def order_of(window: Window) -> tuple[int, int]:
    """Return what windows of one batch have in common: the shared inputs, then the length."""
    return window.shared, len(window)


def make_groups(
    documents: list[list[Sequence]], block_size: int, batch_tokens: int
) -> Iterator[list[Window]]:
    """Yield the windows of some similar documents at a time, about BATCHES batches. They do not
    depend on existing results: after an interruption the same windows are computed together."""
    cut = [cut_document(i, row, block_size) for i, row in enumerate(documents)]
    # a document with one token has no window
    cut = [windows for windows in cut if windows]
    cut.sort(key=lambda windows: max(map(order_of, windows)), reverse=True)
    group: list[Window] = []
    size = 0
    for windows in cut:
        group += windows
        size += sum(map(len, windows))
        if size >= BATCHES * batch_tokens:
            yield group
            group = []
            size = 0
    if group:
        yield group


def score_group(
    model: Model,
    documents: list[list[Sequence]],
    group: list[Window],
    batch_tokens: int,
    dtype: torch.dtype,
) -> dict[int, list[float]]:
    """Return the nats of each sequence of the documents whose windows are in a group, by the places
    of the documents."""
    nats = {window.i: [0.0] * len(documents[window.i]) for window in group}
    for batch in make_batches(group, batch_tokens):
        sequences = [documents[window.i][window.j] for window in batch]
        scores = score_windows(model.network, batch, sequences, dtype)
        for window, score in zip(batch, scores):
            nats[window.i][window.j] += score
    return nats


def evaluate(
    model: Model,
    documents: list[list[Sequence]],
    path: Path,
    batch_tokens: int,
    dtype: torch.dtype,
) -> list[list[float]]:
    """Return the nats of each sequence of each document. Results that `path` has are not computed
    again, and new ones are appended to it. Raises OSError."""
    keys = [make_key(document, dtype) for document in documents]
    rows = read_rows(path)
    done = sum(key in rows for key in keys)
    if 0 < done < len(keys):
        warn(f"continuing: {path} has {done:,} of {len(keys):,} documents")
    groups = make_groups(documents, model.network.args.block_size, batch_tokens)
    with tqdm(desc=model.name, total=len(keys), initial=done, disable=None) as bar:
        for group in groups:
            places = sorted({window.i for window in group})
            missing = [i for i in places if keys[i] not in rows]
            if not missing:
                continue
            nats = score_group(model, documents, group, batch_tokens, dtype)
            # one write for a group
            new = []
            for i in missing:
                rows[keys[i]] = nats[i]
                sizes = [sequence.size for sequence in documents[i]]
                row = {"key": keys[i], "i": i, "nats": nats[i], "bytes": sizes}
                new.append(row)
            append_rows(path, new)
            bar.update(len(missing))

    # a document without a window has nothing to predict
    nothing = [0.0]
    return [rows.get(key, nothing) for key in keys]
