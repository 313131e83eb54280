"""Tell whether weights and a dataset have the same tokens."""

from typing import Any

from keepgpt.dataset import Meta
from keepgpt.errors import UserError, warn
from keepgpt.tokenizer import (
    BPETokenizer,
    HFTokenizer,
    Tokenizer,
    from_meta,
    read_parts,
    split_by,
    to_tokenizers,
)

# The parts of a tokenizer.json that decide the ids of a text. The post-processor adds tokens that
# prepare.py leaves out, and the decoder only reads ids.
PARTS = ("normalizer", "pre_tokenizer", "added_tokens", "model")


def check_tokenizer(source: str, vocab_size: int, data: Meta, meta: Meta) -> None:
    """Raise UserError if the weights of `source`, with `vocab_size` rows, were trained on other
    tokens than the dataset of `meta`. `data` has the "tokenizer" of `source`; warn if it has none.
    """
    tokenizer = meta["tokenizer"]
    trained_on = data.get("tokenizer")
    # rows of no token: nanoGPT has 50304 for GPT-2's 50257, Qwen3 151936 for 151669
    padding = 0
    if tokenizer["kind"] == "gpt2":
        padding = 63
    elif tokenizer["kind"] == "hf" and trained_on:
        padding = vocab_size
    # without a tokenizer, the size is all there is to compare
    got = ""
    if not 0 <= vocab_size - meta["vocab_size"] <= padding:
        got = f"{vocab_size:,} instead of {meta['vocab_size']:,}"
    elif not trained_on:
        warn(
            f"{source} does not say which tokens it was trained on; only their number was "
            f"compared with {meta['name']}"
        )
    elif trained_on != tokenizer:
        got = find_difference(from_meta(meta), from_meta(data))
    if got:
        raise UserError(
            f"{source}: expected the tokens of {meta['name']}, got {got}. "
            "Try: --dataset=<one with their tokens>"
        )


def find_difference(expected: Tokenizer, other: Tokenizer) -> str:
    """Return what makes `other` give other ids for a text than `expected`, "" for nothing."""
    # of two kinds, `other` is the one of Hugging Face
    if isinstance(expected, HFTokenizer) and not isinstance(other, HFTokenizer):
        return find_difference(other, expected)
    if not isinstance(other, HFTokenizer):
        unnamed = other.description | {"name": ""}
        same = expected.description | {"name": ""} == unnamed
        return "" if same else "another vocabulary of that size"
    # every token of ours has the same id there; it may have others
    names = {i: token for token, i in other.ids.items()}
    for token, i in expected.ids.items():
        if names.get(i) != token:
            return f"{names.get(i)!r} as token {i} instead of {token!r}"
    if isinstance(expected, BPETokenizer):
        return find_difference_to_bpe(expected, other.tokenizer)
    parts = read_parts(to_tokenizers(expected))
    other_parts = read_parts(other.tokenizer)
    for name in PARTS:
        if other_parts[name] != parts[name]:
            return f"another {name}"
    return ""


def find_difference_to_bpe(expected: BPETokenizer, other: Any) -> str:
    """Return what makes a tokenizers.Tokenizer with the vocabulary of `expected` give other ids
    than tiktoken, "" for nothing."""
    parts = read_parts(other)
    model = parts["model"]
    if parts["normalizer"] is not None:
        return "another normalizer"
    # tiktoken has no options, such as a dropout of merges
    options = {key for key in model if model[key]} - {"type", "vocab", "merges"}
    if model["type"] != "BPE" or options:
        return "another model"
    if parts["pre_tokenizer"] != split_by(expected.pattern):
        return "another pre_tokenizer"
    # only the names of special tokens are plain text
    if not all(token["special"] for token in parts["added_tokens"]):
        return "another added_tokens"
    # tiktoken joins the pair with the lowest rank. Merges in this order do the same, if they join
    # the characters of each token to that token.
    ranks = [model["vocab"][a + b] for a, b in model["merges"]]
    tokens = expected.ids.keys() - expected.special_tokens.keys()
    sizes = {len(other.model.tokenize(token)) for token in tokens}
    return "" if ranks == sorted(ranks) and sizes == {1} else "other merges"
