"""A model to evaluate: its weights and tokenizer, and the log-likelihoods of texts."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from keepgpt.checkpoint import find_bundle, has_run
from keepgpt.errors import UserError
from keepgpt.kernels import MAX_LOGITS
from keepgpt.tokenizer import Tokenizer
from model import GPT
from sample import SampleConfig, load


@dataclass
class Model:
    """A network with its tokenizer; `name` is how the command calls it, and `folder` the place for
    its results."""

    name: str
    network: GPT
    vocabulary: Tokenizer
    origin: str
    sha256: str
    folder: Path


@dataclass
class Sequence:
    """Tokens. Those from place `first` on are scored, and stand for `size` bytes."""

    ids: list[int]
    first: int
    size: int


@dataclass
class Window:
    """A part of sequence j of document i that fits the network: the inputs ids[start:end], whose
    targets are one place later. Those from place `first` on are scored. The first `shared` inputs
    are those of the document's other sequences."""

    i: int
    j: int
    start: int
    end: int
    first: int
    shared: int = 0

    def __len__(self) -> int:
        return self.end - self.start


def load_model(name: str, step: int, data_dir: str) -> Model:
    """Return the model called `name`: the best checkpoint of a run's folder, or that of `step`,
    else whatever --init_from reads. Raises UserError."""
    folder = Path(name)
    path = folder
    if has_run(folder):
        found = find_bundle(folder, step, prefer_best=True)
        path = found[0]
    elif step:
        raise UserError(f"step={step}: expected the folder of a run, got {name}")
    try:
        network, vocabulary, origin = load(
            SampleConfig(init_from=str(path), data_dir=data_dir)
        )
    # here a model is an argument, not a flag
    except UserError as e:
        message = str(e).removeprefix("init_from=").replace("--init_from=", "")
        raise UserError(message) from e.__cause__

    # that of a file is also what sha256sum prints
    if path.is_file():
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        folder = path.parent
    else:
        sha256 = hash_weights(network)
    # a model of the hub has no folder here
    if not folder.is_dir():
        folder = Path()
    return Model(name, network, vocabulary, origin, sha256, folder)


def hash_weights(network: GPT) -> str:
    """Return the sha256 of the architecture, and of the names and the bytes of all weights, in the
    order of the names."""
    digest = hashlib.sha256(repr(network.args).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def cut_windows(
    i: int, j: int, sequence: Sequence, block_size: int
) -> Iterator[Window]:
    """Yield windows of at most `block_size` inputs that score each token once. One window with as
    much context as fits is enough for most; a longer text continues after half a block of
    context."""
    first = sequence.first
    last = len(sequence.ids) - 1
    # one token without anything before it
    if first > last:
        return
    if last - first < block_size:
        yield Window(i, j, max(0, last - block_size), last, first)
        return
    while first <= last:
        start = max(0, first - 1 - block_size // 2)
        end = min(start + block_size, last)
        yield Window(i, j, start, end, first)
        first = end + 1


def cut_document(i: int, document: list[Sequence], block_size: int) -> list[Window]:
    """Return the windows of all sequences of document i."""
    windows = []
    for j, sequence in enumerate(document):
        windows += cut_windows(i, j, sequence, block_size)
    # the context of choices, unless one of them had to be cut
    if len(document) > 1 and not any(window.start for window in windows):
        shared = count_shared(document)
        for window in windows:
            window.shared = shared
    return windows


def count_shared(document: list[Sequence]) -> int:
    """Return how many inputs at the start of all sequences are the same. One is left to predict the
    first scored token from."""
    most = min(sequence.first for sequence in document) - 1
    columns = zip(*(sequence.ids[:most] for sequence in document))
    is_equal = [len(set(column)) == 1 for column in columns]
    return [*is_equal, False].index(False)


def compute_hidden(
    network: GPT, idx: Tensor, layers: list[Tensor] | None = None, past: int = 0
) -> Tensor:
    """Return the input of the output layer, (B, T, C), for tokens (B, T): GPT.forward without the
    logits, as only those of scored tokens are needed. The tokens are added to the cache `layers`,
    which holds `past` tokens; see KVCache."""
    device = network.embedding.weight.device
    idx = idx.to(device)
    positions = torch.arange(past, past + idx.size(1), device=device)  # (T,)
    x, about_positions = network.embed(idx, positions)  # (B, T, C)
    for number, block in enumerate(network.get_submodule(network.layers)):
        kv = layers[number] if layers else None
        x = block(x, 0.0, kv, past, *about_positions)
    return network.get_submodule(network.final_norm)(x)


def read_prefixes(
    network: GPT, prefixes: list[tuple[int, ...]], size: int
) -> list[Tensor]:
    """Return the cache of sequences of up to `size` tokens that start with `prefixes`, of one
    length. Equal ones are computed once."""
    place = {prefix: i for i, prefix in enumerate(dict.fromkeys(prefixes))}
    idx = torch.tensor(list(place))  # (U, T)
    layers = network.make_cache(*idx.shape).layers
    compute_hidden(network, idx, layers)
    rows = [place[prefix] for prefix in prefixes]
    # room for the tokens that follow
    room = (0, 0, 0, size - idx.size(1))
    return [F.pad(layer[:, rows], room) for layer in layers]  # (2, B, K, size, D) each


@torch.inference_mode()
def score_windows(
    network: GPT, windows: list[Window], sequences: list[Sequence], dtype: torch.dtype
) -> list[float]:
    """Return the negative log-likelihood of each window's scored tokens, in nats. All windows share
    as many inputs with others. Matrix products are in `dtype`."""
    weight = (network.lm_head or network.embedding).weight  # (V, C)
    device = weight.device
    # padding stands behind the text, where attention does not look
    shared = windows[0].shared
    longest = max(map(len, windows))
    idx = torch.zeros(len(windows), longest - shared, dtype=torch.long)  # (B, T)
    is_scored = torch.zeros(idx.shape, dtype=torch.bool)
    prefixes = []
    targets = []
    counts = []
    for row, (window, sequence) in enumerate(zip(windows, sequences)):
        start = window.start + shared
        size = window.end - start
        prefixes.append(tuple(sequence.ids[window.start : start]))
        idx[row, :size] = torch.tensor(sequence.ids[start : window.end])
        is_scored[row, window.first - 1 - start : size] = True
        scored = sequence.ids[window.first : window.end + 1]
        targets += scored
        counts.append(len(scored))

    losses = []
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        # the context of a question's choices is computed once
        layers = read_prefixes(network, prefixes, longest) if shared else None
        x = compute_hidden(network, idx, layers, shared)[is_scored.to(device)]  # (N, C)
        # a few rows at a time: all logits may not fit in memory
        rows = max(1, MAX_LOGITS // len(weight))
        pairs = zip(x.split(rows), torch.tensor(targets, device=device).split(rows))
        for chunk, target in pairs:
            logits = F.linear(chunk, weight).float()  # (R, V)
            losses.append(F.cross_entropy(logits, target, reduction="none"))
    # in float64 the order of the sum changes nothing that anyone reads
    parts = torch.cat(losses).cpu().double().split(counts)
    return [float(part.sum()) for part in parts]
