"""Batches as a function of (seed, step): nothing to save, nothing to restore, the same for any
number of ranks.

A split of T tokens is cut into windows of block_size tokens (and the one that follows, as target).
Every epoch visits every window once, in an order that arithmetic gives, and cuts at another offset.
"""
import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepgpt.dataset import BadData, split_files


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


class Split:
    """One or several .bin files of tokens, as one run of them, cut into windows and read by
    position: no mapping that grows as it is read."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any], block_size: int, seed: int,
                 shift: bool) -> None:
        """Open the files of `split` that `meta` names. With `shift` each epoch cuts at another
        offset, else the windows are the same in every epoch.

        Raises BadData if a file can't be read or has another number of tokens, or if all of them
        hold no window of block_size tokens and their targets.
        """
        self.paths, self.files, self.ends = [], [], []  # a file's end is the start of the next
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
        """Return windows number first ... first + count - 1 of the endless row of epochs: inputs
        and targets, (count, T) int64 each. Raises BadToken for an id outside the vocabulary."""
        epoch, index = np.divmod(np.arange(first, first + count, dtype=np.uint64),
                                 np.uint64(self.windows))
        key = mix(epoch ^ self.key)
        start = (shuffled(index, self.windows, key) * np.uint64(self.block_size)
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
            pinned = self.device.type == "cuda"  # from other memory a copy must be waited for
            x, y = (t.to(self.device, non_blocking=pinned) for t in ready.result())
            yield m, x, y



