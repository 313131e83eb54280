"""Compute the batch of a step from (seed, step): no state is saved, and any number of ranks
draws the same batches.

A split is cut into windows of block_size tokens, each with the next token as the last target. Every
epoch visits every window once, in a permutation computed by arithmetic, and cuts at another offset.
"""
import hashlib
import json
import os
import pickle
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepgpt.process import UserError, warn

META_TYPES = {"name": str, "tokenizer": dict, "vocab_size": int, "dtype": str, "tokens": dict,
              "fingerprint": str}
FIRST = 1 << 20  # bytes of a .bin file without meta.json that identify it


class BadData(UserError):
    """A dataset that is missing, corrupt or too small; the text says how to fix it."""


class BadToken(BadData):
    """An id outside the vocabulary, which one rank of several may read."""

    def __init__(self, message: str) -> None:
        super().__init__(message, local=True)


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_of(*numbers: int) -> int:
    """Return a seed below 2**63 that mixes several non-negative numbers."""
    seed = np.zeros(1, np.uint64)
    for number in numbers:
        seed = mix(seed ^ np.uint64(number))
    return int(seed[0] >> np.uint64(1))


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Return the place of each `index` in the permutation of [0, n) that `key` selects. Arrays are
    uint64, of one shape.

    A Feistel network permutes the smallest power of four that holds n. Results outside [0, n) pass
    through it again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    index, outside = index.copy(), np.ones(index.shape, bool)
    while outside.any():
        left, right = index[outside] >> half, index[outside] & low
        for r in range(6):
            left, right = right, left ^ (mix(right ^ mix(key[outside] + np.uint64(r))) & low)
        index[outside] = left << half | right
        outside &= index >= n
    return index


def dataset_folder(data_dir: str, dataset: str) -> Path:
    """Return a dataset's folder; a relative data_dir starts at the folder of the scripts."""
    return Path(__file__).parents[1] / data_dir / dataset


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the description of the dataset in `folder`: prepare.py's meta.json, or one made for
    a dataset that nanoGPT prepared. Raises BadData."""
    path = folder / "meta.json"
    try:
        text = path.read_text(encoding="utf-8")
        if not text:
            raise BadData(f"{path} is empty: the preparation was interrupted. Try: prepare.py "
                          "again, with the same command")
        meta = json.loads(text)
        check_meta(meta)
        return meta
    except OSError as e:
        if path.exists():
            raise BadData(f"{path}: {(e.strerror or str(e)).lower()}") from None
        if (folder / "train.bin").exists():
            return describe_nanogpt_data(folder)
        raise BadData(f"no prepared dataset in {folder}. Try: python prepare.py {folder.name}"
                      ) from None
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise BadData(f"{path} is corrupt or incomplete ({type(e).__name__}: {e}). Try: prepare.py "
                      "again, with the command that made this dataset") from None


def check_meta(meta: Any) -> None:
    """Raise ValueError unless `meta` has every key of a dataset's description, of its type."""
    if not isinstance(meta, dict):
        raise ValueError("expected a JSON object")
    for key, kind in META_TYPES.items():
        if type(meta.get(key)) is not kind:
            raise ValueError(f"expected {key!r} to be of type {kind.__name__}, "
                             f"got {meta.get(key)!r:.40}")
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"expected dtype uint16 or uint32, got {meta['dtype']!r}")
    chars = meta["tokenizer"].get("chars", "")
    if meta["tokenizer"].get("kind") == "char" and len(chars) != meta["vocab_size"]:
        raise ValueError(f"expected {meta['vocab_size']} characters, got {len(chars)}")
    for split in ("train", "val"):
        counts = meta["tokens"].get(split), *split_files(meta, split).values()
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"expected a number of {split} tokens, got {counts!r:.40}")


def split_files(meta: dict[str, Any], split: str) -> dict[str, int]:
    """Return the .bin files of a split, in order, with the number of tokens in each."""
    return meta["files"][split] if "files" in meta else {f"{split}.bin": meta["tokens"][split]}


def describe_nanogpt_data(folder: Path) -> dict[str, Any]:
    """Return the description of a dataset that nanoGPT prepared: characters if it has a meta.pkl,
    else GPT-2's tokens. Raises BadData."""
    digest, tokens, ids = hashlib.sha256(), {}, []
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        try:
            with open(path, "rb") as f:
                size, head = os.fstat(f.fileno()).st_size, f.read(FIRST)
        except OSError as e:
            raise BadData(f"{path}: {e.strerror.lower()}; a dataset is train.bin and val.bin"
                          ) from None
        digest.update(f"{split} {size}".encode() + head)
        tokens[split] = size // 2
        ids.append(np.frombuffer(head[:len(head) // 2 * 2], "<u2"))
    tokenizer, vocab_size = {"kind": "gpt2"}, 50257
    if (folder / "meta.pkl").exists():
        chars = read_meta_pkl(folder / "meta.pkl")
        tokenizer, vocab_size = {"kind": "char", "chars": chars}, len(chars)
        digest.update(chars.encode())
    elif np.concatenate(ids).max(initial=0) < 256:
        raise BadData(f"{folder} has neither meta.json nor meta.pkl, and its token ids are all "
                      "below 256: these are not GPT-2's tokens. Try: prepare it again")
    else:
        warn(f"{folder} has neither meta.json nor meta.pkl: reading its tokens as GPT-2's")
    return {"format": 1, "name": folder.name, "tokenizer": tokenizer, "vocab_size": vocab_size,
            "dtype": "uint16", "tokens": tokens, "fingerprint": digest.hexdigest()}


class PlainUnpickler(pickle.Unpickler):
    """Unpickle dicts, lists, strings and numbers, and refuse to import anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it imports {module}.{name}")


def read_meta_pkl(path: Path) -> str:
    """Return the characters of nanoGPT's meta.pkl in the order of their ids. Raises BadData."""
    try:
        with open(path, "rb") as f:
            meta = PlainUnpickler(f).load()
        chars = [meta["itos"][i] for i in range(len(meta["itos"]))]
        if any(len(char) != 1 for char in chars) or len(set(chars)) < len(chars):
            raise ValueError("its itos does not map ids to different characters")
        return "".join(chars)
    except Exception as e:  # malformed pickles raise nearly anything
        raise BadData(f"{path} is not nanoGPT's vocabulary of characters ({type(e).__name__}: {e})"
                      ". Try: prepare.py with the text") from None


class Split:
    """The .bin files of a split, read by position as one sequence of tokens and cut into windows.
    Nothing is mapped into memory."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any], block_size: int, seed: int,
                 shift: bool) -> None:
        """Open the files of `split` that `meta` names. With `shift`, each epoch cuts at another
        offset; otherwise the windows are the same in each.

        Raises BadData if a file can't be read or has another number of tokens, or if all of them
        hold no window of block_size tokens and their targets.
        """
        self.paths, self.files, self.ends = [], [], []  # a file ends where the next one starts
        self.dtype, self.block_size = np.dtype(meta["dtype"]), block_size
        self.vocab_size = meta["vocab_size"]
        tokens = 0
        for name, expected in split_files(meta, split).items():
            path = folder / name
            try:
                self.files.append(os.open(path, os.O_RDONLY))
            except OSError as e:
                raise BadData(f"{path}: {e.strerror.lower()}. Try: prepare.py again") from None
            found = os.fstat(self.files[-1]).st_size // self.dtype.itemsize
            if found != expected:
                raise BadData(f"{path}: expected {expected:,} tokens as in meta.json, got "
                              f"{found:,}. Try: prepare.py again")
            tokens += found
            self.paths.append(path)
            self.ends.append(tokens)
        if tokens <= block_size:
            raise BadData(f"{folder}: expected at least {block_size + 1:,} {split} tokens for "
                          f"block_size={block_size}, got {tokens:,}. Try: a smaller --block_size, "
                          "or more text")
        self.windows = max(1, tokens // block_size - 1) if shift else (tokens - 1) // block_size
        self.offsets = tokens - self.windows * block_size if shift else 1
        self.key = np.uint64(seed_of(seed))

    def __del__(self) -> None:
        for file in self.files:
            os.close(file)

    def read(self, start: int, count: int) -> bytes:
        """Return tokens start ... start + count - 1 of the sequence."""
        size, parts = self.dtype.itemsize, []
        file = bisect_right(self.ends, start)
        while count:
            first = self.ends[file - 1] if file else 0
            n = min(count, self.ends[file] - start)
            parts.append(os.pread(self.files[file], n * size, (start - first) * size))
            start, count, file = start + n, count - n, file + 1
        return b"".join(parts)

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return windows first ... first + count - 1 of the endless sequence of epochs: inputs and
        targets, (count, T) int64 each. Raises BadToken for an id outside the vocabulary."""
        epoch, index = np.divmod(np.arange(first, first + count, dtype=np.uint64),
                                 np.uint64(self.windows))
        key = mix(epoch ^ self.key)
        start = (permute(index, self.windows, key) * np.uint64(self.block_size)
                 + key % np.uint64(self.offsets))
        rows = np.stack([np.frombuffer(self.read(int(s), self.block_size + 1), self.dtype)
                         for s in start])
        if rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            path = self.paths[bisect_right(self.ends, int(start[row]) + int(column))]
            raise BadToken(f"{path}: expected token ids below {self.vocab_size}, got "
                           f"{rows[row, column]}: the file is corrupt. Try: prepare.py again")
        window = torch.from_numpy(rows.astype(np.int64))  # (count, T + 1)
        return window[:, :-1], window[:, 1:]


class Loader:
    """This rank's micro-batches of each step. A thread reads the next one during training."""

    def __init__(self, split: Split, batch_size: int, micro_batches: int, mine: range,
                 device: torch.device) -> None:
        """Draw `micro_batches` of `batch_size` windows per step; those numbered in `mine` are this
        rank's."""
        self.split, self.batch_size, self.micro_batches, self.mine = (
            split, batch_size, micro_batches, mine)
        self.device, self.thread, self.prefetched = device, ThreadPoolExecutor(1), {}

    def read(self, step: int, m: int) -> tuple[Tensor, Tensor]:
        """Return micro-batch m of `step`, (B, T) each, for CUDA in pinned memory."""
        x, y = self.split.rows((step * self.micro_batches + m) * self.batch_size, self.batch_size)
        if self.device.type == "cuda":  # contiguous: otherwise the GPU would fetch a copy
            x, y = x.contiguous().pin_memory(), y.contiguous().pin_memory()
        return x, y

    def step(self, step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (m, inputs, targets) for each of this rank's micro-batches of `step`."""
        for m in self.mine:
            following = (step, m + 1) if m + 1 in self.mine else (step + 1, self.mine[0])
            batch = self.prefetched.pop((step, m), None) or self.thread.submit(self.read, step, m)
            self.prefetched = {following: self.thread.submit(self.read, *following)}
            pinned = self.device.type == "cuda"  # a copy of other memory would be waited for
            x, y = (t.to(self.device, non_blocking=pinned) for t in batch.result())
            yield m, x, y
