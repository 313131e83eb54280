"""Batches as a function of (seed, step): nothing to save, nothing to restore, the same for any
number of ranks.

A split of T tokens is cut into windows of block_size tokens (and the one that follows, as target).
Every epoch visits every window once, in an order that arithmetic gives, and cuts at another offset.
"""
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

META_KEYS = {"name", "tokenizer", "vocab_size", "dtype", "tokens", "fingerprint"}
DATA = Path(__file__).parent / "data"


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_of(*numbers: int) -> int:
    """One seed below 2**63 out of several non-negative numbers."""
    seed = np.zeros(1, np.uint64)
    for number in numbers:
        seed = mix(seed ^ np.uint64(number))
    return int(seed[0] >> np.uint64(1))


def shuffled(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where position `index` of [0, n) goes in the permutation that `key` names; uint64 arrays of
    one shape.

    A Feistel network permutes the smallest power of four that holds n; what falls outside [0, n) is
    sent through again until it falls inside (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains").
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    index, walking = index.copy(), np.ones(index.shape, bool)
    while walking.any():
        left, right = index[walking] >> half, index[walking] & low
        for r in range(6):
            left, right = right, left ^ (mix(right ^ mix(key[walking] + np.uint64(r))) & low)
        index[walking] = left << half | right
        walking &= index >= n
    return index


def read_meta(dataset: str) -> dict[str, Any]:
    """What prepare.py wrote about data/<dataset>. Raises ValueError, with the mend, if it is not
    there."""
    folder = DATA / dataset
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or not META_KEYS <= meta.keys():
            raise ValueError("it lacks keys")
        return meta
    except OSError:
        if (folder / "train.bin").exists() and not (folder / "meta.pkl").exists():
            return nanogpt_meta(folder)
        raise ValueError(f"no prepared dataset in {folder}; "
                         f"make it with: python prepare.py {dataset}") from None
    except ValueError as e:
        raise ValueError(f"{folder}/meta.json is damaged ({e}); "
                         "make the dataset again with prepare.py") from None


def split_files(meta: dict[str, Any], split: str) -> dict[str, int]:
    """The .bin files of a split, in order, and how many tokens each has."""
    return meta["files"][split] if "files" in meta else {f"{split}.bin": meta["tokens"][split]}


def nanogpt_meta(folder: Path) -> dict[str, Any]:
    """The description of a set that nanoGPT prepared: GPT-2's tokens, unless a meta.pkl says
    otherwise."""
    fingerprint, tokens = hashlib.sha256(), {}
    for split in ("train", "val"):
        with open(folder / f"{split}.bin", "rb") as f:
            size = os.fstat(f.fileno()).st_size
            fingerprint.update(f"{split} {size}".encode() + f.read(1 << 20))  # to know it again
        tokens[split] = size // 2
    return {"format": 1, "name": folder.name, "tokenizer": {"kind": "gpt2"}, "vocab_size": 50257,
            "dtype": "uint16", "tokens": tokens, "fingerprint": fingerprint.hexdigest()}


class Split:
    """One or several .bin files of tokens, as one run of them, cut into windows and read by
    position: no mapping that grows as it is read."""

    def __init__(self, dataset: str, split: str, dtype: str, block_size: int, seed: int,
                 shift: bool, files: dict[str, int] | None = None) -> None:
        """`files` says how many tokens each file has, in order; without it <split>.bin is taken as
        it is. With `shift` each epoch cuts at another offset, else the windows are the same in
        every epoch.

        Raises ValueError if a file can't be read or has not the tokens that it should have, or if
        all of them hold no window of block_size tokens and their targets.
        """
        self.dtype, self.block_size = np.dtype(dtype), block_size
        self.files, self.ends = [], []  # a file's end is the start of the next
        tokens = 0
        for name, expected in (files or {f"{split}.bin": None}).items():
            path = DATA / dataset / name
            try:
                self.files.append(os.open(path, os.O_RDONLY))
            except OSError as e:
                raise ValueError(f"{path}: {e.strerror.lower()}; make it with prepare.py") from None
            found = os.fstat(self.files[-1]).st_size // self.dtype.itemsize
            if expected not in (found, None):
                raise ValueError(f"{path} has {found:,} tokens, and not {expected:,}, as meta.json "
                                 "says; make the dataset again with prepare.py")
            tokens += found
            self.ends.append(tokens)
        if tokens <= block_size:
            raise ValueError(f"{path} has {tokens:,} tokens, but block_size={block_size} "
                             f"needs {block_size + 1:,}; lower block_size or prepare more text")
        self.windows = max(1, tokens // block_size - 1) if shift else (tokens - 1) // block_size
        self.offsets = tokens - self.windows * block_size if shift else 1
        self.key = np.uint64(seed_of(seed))

    def read(self, start: int, count: int) -> bytes:
        """Tokens number start ... start + count - 1 of all the files'."""
        size, parts = self.dtype.itemsize, []
        file = bisect_right(self.ends, start)
        while count:
            first = self.ends[file - 1] if file else 0
            here = min(count, self.ends[file] - start)
            parts.append(os.pread(self.files[file], here * size, (start - first) * size))
            start, count, file = start + here, count - here, file + 1
        return b"".join(parts)

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows number first ... first + count - 1 of the endless row of epochs: inputs, targets,
        (count, T) int64."""
        epoch, index = np.divmod(np.arange(first, first + count, dtype=np.uint64),
                                 np.uint64(self.windows))
        key = mix(epoch ^ self.key)
        start = (shuffled(index, self.windows, key) * np.uint64(self.block_size)
                 + key % np.uint64(self.offsets))
        rows = np.stack([np.frombuffer(self.read(int(s), self.block_size + 1), self.dtype)
                         for s in start])
        window = torch.from_numpy(rows.astype(np.int64))  # (count, T + 1)
        return window[:, :-1], window[:, 1:]


class Loader:
    """A rank's share of each step's micro-batches; the next one is read while this one is computed
    on."""

    def __init__(self, split: Split, batch_size: int, micro_batches: int, mine: range,
                 device: torch.device) -> None:
        """A step draws `micro_batches` of `batch_size` windows in all; this rank computes those
        numbered in `mine`."""
        self.split, self.batch_size, self.micro_batches, self.mine = (
            split, batch_size, micro_batches, mine)
        self.device, self.thread, self.ahead = device, ThreadPoolExecutor(1), {}

    def read(self, step: int, m: int) -> tuple[Tensor, Tensor]:
        """Micro-batch m of `step`, (B, T) each, in memory that the device can fetch by itself."""
        x, y = self.split.rows((step * self.micro_batches + m) * self.batch_size, self.batch_size)
        if self.device.type == "cuda":  # of what is not contiguous it would fetch a copy
            x, y = x.contiguous().pin_memory(), y.contiguous().pin_memory()
        return x, y

    def step(self, step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(m, inputs, targets) for each micro-batch of `step` that is this rank's."""
        for m in self.mine:
            following = (step, m + 1) if m + 1 in self.mine else (step + 1, self.mine[0])
            ready = self.ahead.pop((step, m), None) or self.thread.submit(self.read, step, m)
            self.ahead = {following: self.thread.submit(self.read, *following)}
            x, y = ready.result()
            yield m, x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
