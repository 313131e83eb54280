"""A model to evaluate: its weights and tokenizer, and the log-likelihoods of texts."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from keepgpt.checkpoint import find_newest, find_step, has_run
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
    """Tokens of which those from place `first` on are scored; these stand for `size` bytes."""

    ids: list[int]
    first: int
    size: int


@dataclass
class Window:
    """A part of sequence j of document i that fits the network: the inputs ids[start:end], whose
    targets are one place later. Those from place `first` on are scored."""

    i: int
    j: int
    start: int
    end: int
    first: int

    def __len__(self) -> int:
        return self.end - self.start


def load_model(name: str, step: int, data_dir: str) -> Model:
    """Return the model called `name`: the best checkpoint of a run's folder, or that of `step`,
    else whatever --init_from reads. Raises UserError."""
    folder = Path(name)
    path = folder
    if has_run(folder):
        found = find_step(folder, step) if step else find_newest(folder, True)
        path = found[0]
    elif step:
        raise UserError(f"step={step}: expected the folder of a run, got {name}")
    network, vocabulary, origin = load(
        SampleConfig(init_from=str(path), data_dir=data_dir)
    )

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
    """Return the sha256 of the names and the bytes of all weights, in the order of the names."""
    digest = hashlib.sha256()
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


def compute_hidden(network: GPT, idx: Tensor) -> Tensor:
    """Return what the output layer reads, (B, T, C), for tokens (B, T): GPT.forward without the
    logits, of which only those of scored tokens are needed."""
    positions = torch.arange(idx.size(1), device=idx.device)  # (T,)
    x, about_positions = network.embed(idx, positions)  # (B, T, C)
    for block in network.get_submodule(network.layers):
        x = block(x, 0.0, None, 0, *about_positions)
    return network.get_submodule(network.final_norm)(x)


@torch.inference_mode()
def score_windows(
    network: GPT, windows: list[Window], sequences: list[Sequence], dtype: torch.dtype
) -> list[float]:
    """Return the negative log-likelihood of each window's scored tokens, in nats. Matrix products
    are in `dtype`."""
    weight = (network.lm_head or network.embedding).weight  # (V, C)
    device = weight.device
    # padding stands behind the text, where attention does not look
    longest = max(map(len, windows))
    idx = torch.zeros(len(windows), longest, dtype=torch.long)
    is_scored = torch.zeros(len(windows), longest, dtype=torch.bool)
    targets = []
    counts = []
    for row, (window, sequence) in enumerate(zip(windows, sequences)):
        inputs = sequence.ids[window.start : window.end]
        idx[row, : len(window)] = torch.tensor(inputs)
        is_scored[row, window.first - 1 - window.start : len(window)] = True
        scored = sequence.ids[window.first : window.end + 1]
        targets += scored
        counts.append(len(scored))

    losses = []
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        x = compute_hidden(network, idx.to(device))[is_scored.to(device)]  # (N, C)
        # a few rows at a time: all logits may not fit in memory
        rows = max(1, MAX_LOGITS // len(weight))
        pairs = zip(x.split(rows), torch.tensor(targets, device=device).split(rows))
        for chunk, target in pairs:
            logits = F.linear(chunk, weight).float()  # (R, V)
            losses.append(F.cross_entropy(logits, target, reduction="none"))
    # in float64 the order of the sum changes nothing that anyone reads
    parts = torch.cat(losses).double().cpu().split(counts)
    return [float(part.sum()) for part in parts]
