"""What an evaluation reads beside the dataset, and how its losses become bits per byte."""

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from keepgpt.dataset import Meta
from keepgpt.errors import UserError, warn
from keepgpt.text import open_text, read_block
from keepgpt.tokenizer import from_meta


class Text:
    """The windows of a text. They have one length of at most block_size and cover the text: at its
    end fewer tokens are left out than there are windows."""

    def __init__(self, path: str, data: Meta, block_size: int) -> None:
        """Encode the file `path` with the tokenizer of the description `data`. Raises UserError."""
        try:
            text = read_block(open_text(path), -1)
            tokens = from_meta(data).encode_to_numpy(text)
        # no file, not UTF-8, or a character without a token
        except (OSError, ValueError, UserError) as e:
            reason = str(getattr(e, "strerror", None) or e).removeprefix(f"{path}: ")
            raise UserError(f"eval_text={path}: {reason}") from None
        # each token but the first is a target
        targets = len(tokens) - 1
        if targets < 1:
            raise UserError(
                f"eval_text={path}: expected two tokens, got {len(tokens)}. Try: more text"
            )
        self.windows = math.ceil(targets / block_size)
        self.length = targets // self.windows
        self.tokens = torch.from_numpy(tokens.astype(np.int64))

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return windows first ... first + count - 1: inputs and targets, (count, length) int64
        each."""
        start = first * self.length
        shape = (count, self.length)
        x = self.tokens[start : start + count * self.length].view(shape)
        y = self.tokens[start + 1 : start + 1 + count * self.length].view(shape)
        return x, y


def count_token_bytes(data: Meta) -> Tensor | None:
    """Return the bytes of text that each id stands for, (vocab_size,) float32; None, with a
    warning, if the tokenizer can't be loaded."""
    try:
        counts = from_meta(data).count_bytes()[: data["vocab_size"]]
    except UserError as e:
        warn(f"no bits per byte: {e}")
        return None
    # a vocabulary may be padded
    table = torch.zeros(data["vocab_size"])
    table[: len(counts)] = torch.from_numpy(counts)
    return table


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Return a loss in nats per token as bits per byte of text."""
    return loss / math.log(2) / bytes_per_token


def combine_losses(
    losses: dict[str, float], bytes_per_token: dict[str, float], data: Meta
) -> dict[str, float]:
    """Return the numbers of an evaluation for the log: those of each split, and of a mixture's
    sources together, at their shares. `losses` are nats per token by the names of train.open_data;
    `bytes_per_token` are 0 where the tokenizer is unknown."""
    # one dataset, or the sources of a mixture
    shares = {"val": 1.0}
    if "sources" in data:
        shares = {
            f"val/{part['name']}": float(Fraction(part["share"]))
            for part in data["sources"]
        }
    numbers = {"train_loss": losses["train"]}
    numbers["val_loss"] = sum(shares[name] * losses[name] for name in shares)
    # bits and bytes are summed before they are divided
    mean_bytes = sum(shares[name] * bytes_per_token[name] for name in shares)
    if mean_bytes:
        numbers["val_bpb"] = bits_per_byte(numbers["val_loss"], mean_bytes)
    # each part, and a text of the user's own
    for name in losses:
        if name in ("train", "val"):
            continue
        kind, slash, source = name.partition("/")
        numbers[f"{kind}_loss{slash}{source}"] = losses[name]
        if bytes_per_token[name]:
            bpb = bits_per_byte(losses[name], bytes_per_token[name])
            numbers[f"{kind}_bpb{slash}{source}"] = bpb
    return numbers


def describe_evaluation(numbers: dict[str, float]) -> str:
    """Return the numbers of an evaluation as text."""
    text = "train loss {train_loss:.4f}, val loss {val_loss:.4f}".format(**numbers)
    if "val_bpb" in numbers:
        text += f" ({numbers['val_bpb']:.4f} bits per byte)"
    parts = []
    for key, loss in numbers.items():
        if key.startswith("val_loss/"):
            parts.append(f"{key.removeprefix('val_loss/')} {loss:.4f}")
            bpb = numbers.get(key.replace("loss", "bpb", 1))
            if bpb:
                parts[-1] += f" ({bpb:.4f})"
    if parts:
        text += f": {', '.join(parts)}"
    if "text_bpb" in numbers:
        text += f"; eval_text {numbers['text_bpb']:.4f} bits per byte"
    return text
