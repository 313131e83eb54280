"""Compute the batch of a step from (seed, step): no state is saved, and any number of ranks
draws the same batches.

A split is cut into windows of block_size tokens, each with the next token as the last target. Every
epoch visits every window once, in a permutation computed by arithmetic, and cuts at another offset.
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


class Split:
    """The .bin files of a split, read by position as one sequence of tokens and cut into windows.
    Nothing is mapped into memory."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any], block_size: int, seed: int,
                 shift: bool) -> None:
        """Open the files of `split` that `meta` names. With `shift`, each epoch cuts at another
        offset. Raises BadData if a file can't be read or has another number of tokens, or if all
        of them hold no window of block_size tokens and their targets."""
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
        targets, (count, T) int64 each. Raises BadData for an id outside the vocabulary."""
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
            raise BadData(f"{path}: expected token ids below {self.vocab_size}, got "
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
