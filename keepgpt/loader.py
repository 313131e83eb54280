"""Compute the batch of a step from (seed, step): no state is saved, and any number of ranks
draws the same batches.

A split is cut into windows of block_size tokens, each with the next token as the last target. Every
epoch visits every window once, in a permutation computed by arithmetic, and cuts at another offset.
"""

import os
import zlib
from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepgpt.dataset import BLOCK, BadData, split_files


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
            left, right = (
                right,
                left ^ (mix(right ^ mix(key[outside] + np.uint64(r))) & low),
            )
        index[outside] = left << half | right
        outside &= index >= n
    return index


class Split:
    """The .bin files of a split, read by position as one sequence of tokens and cut into windows.
    Nothing is mapped into memory."""

    def __init__(
        self,
        folder: Path,
        split: str,
        meta: dict[str, Any],
        block_size: int,
        seed: int,
        shift: bool,
    ) -> None:
        """Open the files of `split` that `meta` names. With `shift`, each epoch cuts at another
        offset. With `crc32` in `meta`, each block is compared with its own when it is first read.
        Raises BadData for a missing or truncated file, and for too few tokens."""
        self.dtype, self.vocab_size = np.dtype(meta["dtype"]), meta["vocab_size"]
        self.block_size, self.key = block_size, np.uint64(seed_of(seed))
        self.files, self.ends = (
            [],
            [0],
        )  # file i holds tokens ends[i] ... ends[i + 1] - 1
        self.crc32 = (
            [meta["crc32"].get(name, "") for name in split_files(meta, split)]
            if "crc32" in meta
            else []
        )
        self.intact = []  # for each file: one byte for each block, 1 after it was compared
        for name, expected in split_files(meta, split).items():
            path = folder / name
            try:
                self.files.append(open(path, "rb", buffering=0))
            except OSError as e:
                raise BadData(
                    f"{path}: {e.strerror.lower()}. Try: prepare.py again"
                ) from e
            found = os.fstat(self.files[-1].fileno()).st_size // self.dtype.itemsize
            if found != expected:
                raise BadData(
                    f"{path}: expected {expected:,} tokens as in meta.json, got "
                    f"{found:,}. Try: prepare.py again"
                )
            self.ends.append(self.ends[-1] + found)
            self.intact.append(bytearray(found * self.dtype.itemsize // BLOCK + 1))
        tokens = self.ends[-1]
        if tokens <= block_size:
            raise BadData(
                f"{folder}: expected at least {block_size + 1:,} {split} tokens for "
                f"block_size={block_size}, got {tokens:,}. Try: a smaller --block_size, "
                "or more text"
            )
        self.windows = (
            max(1, tokens // block_size - 1) if shift else (tokens - 1) // block_size
        )
        self.offsets = tokens - self.windows * block_size if shift else 1

    def read(self, start: int, count: int) -> bytes:
        """Return tokens start ... start + count - 1 of the sequence. Raises BadData for a file that
        was truncated or changed, and for an id outside the vocabulary."""
        size, parts = self.dtype.itemsize, []
        i = bisect_right(self.ends, start) - 1
        while count:
            n, place = min(count, self.ends[i + 1] - start), start - self.ends[i]
            try:
                part = os.pread(self.files[i].fileno(), n * size, place * size)
            except OSError as e:
                e.filename = self.files[i].name
                raise
            if len(part) < n * size:
                raise BadData(f"{self.files[i].name}: truncated. Try: prepare.py again")
            if self.crc32:
                self.check_blocks(i, place * size, (place + n) * size)
            if (
                largest := np.frombuffer(part, self.dtype).max(initial=0)
            ) >= self.vocab_size:
                raise BadData(
                    f"{self.files[i].name}: expected token ids below {self.vocab_size}, "
                    f"got {largest}: the file is corrupt. Try: prepare.py again"
                )
            parts.append(part)
            start, count, i = start + n, count - n, i + 1
        return b"".join(parts)

    def check_blocks(self, i: int, start: int, end: int) -> None:
        """Compare the blocks of file i that hold the bytes start ... end - 1 with their CRC32s, if
        that was not done before. Raises BadData."""
        for block in range(start // BLOCK, (end - 1) // BLOCK + 1):
            if self.intact[i][block]:
                continue
            content = os.pread(self.files[i].fileno(), BLOCK, block * BLOCK)
            if f"{zlib.crc32(content):08x}" != self.crc32[i][8 * block : 8 * block + 8]:
                first = block * BLOCK
                raise BadData(
                    f"{self.files[i].name}: block {block:,}, bytes {first:,} to "
                    f"{first + len(content) - 1:,}, has changed since the dataset was "
                    "prepared or the run was started. Try: prepare.py again, or copy "
                    "the file again"
                )
            self.intact[i][block] = 1

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return windows first ... first + count - 1 of the endless sequence of epochs: inputs and
        targets, (count, T) int64 each."""
        epoch, index = np.divmod(
            np.arange(first, first + count, dtype=np.uint64), np.uint64(self.windows)
        )
        key = mix(epoch ^ self.key)
        start = permute(index, self.windows, key) * np.uint64(
            self.block_size
        ) + key % np.uint64(self.offsets)
        rows = b"".join(self.read(s, self.block_size + 1) for s in start.tolist())
        window = torch.from_numpy(np.frombuffer(rows, self.dtype).astype(np.int64))
        window = window.view(count, self.block_size + 1)  # (count, T + 1)
        return window[:, :-1], window[:, 1:]


@dataclass
class Loader:
    """This rank's micro-batches of each step: of `micro_batches` with `batch_size` windows, those
    numbered in `mine`. A thread reads the next one during training."""

    split: Split
    batch_size: int
    micro_batches: int
    mine: range
    device: torch.device

    def __post_init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.prefetched: dict[
            tuple[int, int], Future
        ] = {}  # (step, m) -> the next micro-batch

    def get_batch(self, step: int, m: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of micro-batch m of `step`, (B, T) each, on the device.
        Raises BadData."""
        batch = self.prefetched.pop((step, m), None) or self.thread.submit(
            self._read, step, m
        )
        # the next one in this rank's order is read while this one is computed
        following = (step, m + 1) if m + 1 in self.mine else (step + 1, self.mine[0])
        self.prefetched = {following: self.thread.submit(self._read, *following)}
        x, y = batch.result()
        is_pinned = (
            self.device.type == "cuda"
        )  # a copy of other memory would be waited for
        x = x.to(self.device, non_blocking=is_pinned)
        y = y.to(self.device, non_blocking=is_pinned)
        return x, y

    def _read(self, step: int, m: int) -> list[Tensor]:
        """Return micro-batch m of `step` in host memory, for CUDA pinned."""
        first = (step * self.micro_batches + m) * self.batch_size
        batch = self.split.rows(first, self.batch_size)
        if self.device.type != "cuda":
            return list(batch)
        # contiguous: otherwise the GPU would fetch a copy
        return [t.contiguous().pin_memory() for t in batch]
