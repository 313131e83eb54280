"""Compute batch n from (seed, n): the same one on any number of ranks. `batch_number` gives the n
of a step: the step itself, unless batches were skipped or a branch starts other data.

A split is cut into windows of block_size tokens, each with the next token as the last target. Every
epoch visits every window once, in a permutation computed by arithmetic, and cuts at another offset.
"""

import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keepgpt.dataset import BLOCK, BadData, Meta, split_files
from keepgpt.errors import name_path


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def seed_of(*numbers: int) -> int:
    """Return a seed below 2**63 that mixes several non-negative numbers."""
    # an array: numpy's scalars would warn that products wrap around
    seed = np.zeros(1, np.uint64)
    for number in numbers:
        seed = mix(seed ^ number)
    return int(seed[0]) >> 1


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Return the place of each `index` in the permutation of [0, n) that `key` selects. Arrays are
    uint64, of one shape.

    A Feistel network permutes the smallest power of four that holds n. Results outside [0, n) pass
    through it again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    # a number has two halves of this many bits
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    index = index.copy()
    outside = np.ones(index.shape, bool)
    while outside.any():
        left = index[outside] >> half
        right = index[outside] & low
        for r in range(6):
            # a round XORs one half with a function of the other, then swaps them
            scrambled = mix(right ^ mix(key[outside] + r)) & low
            left, right = right, left ^ scrambled
        index[outside] = left << half | right
        outside &= index >= n
    return index


def batch_number(step: int, skips: dict[int, int], start: int = 0) -> int:
    """Return the number of the batch that the update after `step` reads: one for each step since
    `start`, the first step with this data, and the `skips`: numbers of skipped batches by step."""
    return step - start + sum(n for at, n in skips.items() if at <= step)


class Windows:
    """Windows of tokens in one sequence without an end, read by their numbers in it. A subclass
    says where they are: `locate(numbers)` returns a Split and the first token in it for each."""

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return windows first ... first + count - 1: inputs and targets, (count, T) int64 each.
        Raises BadData."""
        windows = []
        for split, start in self.locate(range(first, first + count)):
            content = split.read(start, split.block_size + 1)
            windows.append(np.frombuffer(content, split.dtype))
        # targets are the inputs one token later
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64))  # (count, T + 1)
        return tokens[:, :-1], tokens[:, 1:]


class Split(Windows):
    """The .bin files of a split, read by position as one sequence of tokens and cut into windows.
    Nothing is mapped into memory."""

    def __init__(
        self,
        folder: Path,
        split: str,
        meta: Meta,
        block_size: int,
        seed: int,
        shift: bool,
    ) -> None:
        """Open the files of `split` that `meta` names. With `shift`, each epoch cuts at another
        offset. With `crc32` in `meta`, each block is compared with its own when it is first read.
        Raises BadData for a missing or truncated file, and for too few tokens."""
        self.dtype = np.dtype(meta["dtype"])
        self.vocab_size = meta["vocab_size"]
        # bytes before the tokens of each file
        self.header = meta.get("header", 0)
        self.block_size = block_size
        self.key = seed_of(seed)

        # file i holds tokens ends[i] ... ends[i + 1] - 1
        self.files = []
        self.ends = [0]
        # for each file: the CRC32s of its blocks, and a byte per block: 1 after it was compared
        self.crc32 = []
        self.intact = []
        for name, expected in split_files(meta, split).items():
            path = folder / name
            file = open_tokens(path, expected, self.dtype.itemsize, self.header)
            self.files.append(file)
            self.ends.append(self.ends[-1] + expected)
            if "crc32" in meta:
                self.crc32.append(meta["crc32"].get(name, ""))
                size = self.header + expected * self.dtype.itemsize
                self.intact.append(bytearray(size // BLOCK + 1))

        tokens = self.ends[-1]
        if tokens <= block_size:
            raise BadData(
                f"{folder}: expected at least {block_size + 1:,} {split} tokens for "
                f"block_size={block_size}, got {tokens:,}. Try: a smaller --block_size, "
                "or more text"
            )
        # each window also needs the token that follows it
        self.windows = (tokens - 1) // block_size
        self.offsets = 1
        if shift:
            # leave room to cut at any of a window's offsets
            self.windows = max(1, tokens // block_size - 1)
            self.offsets = tokens - self.windows * block_size

    def read(self, start: int, count: int) -> bytes:
        """Return tokens start ... start + count - 1 of the sequence. Raises BadData for a file that
        was truncated or changed, and for an id outside the vocabulary."""
        chunks = []
        i = bisect_right(self.ends, start) - 1
        while count:
            # the tokens of file i; the next file may hold the rest
            n = min(count, self.ends[i + 1] - start)
            chunks.append(self.read_file(i, start - self.ends[i], n))
            start += n
            count -= n
            i += 1
        return b"".join(chunks)

    def read_file(self, i: int, start: int, count: int) -> bytes:
        """Return tokens start ... start + count - 1 of file i; see `read`."""
        file = self.files[i]
        first = self.header + start * self.dtype.itemsize
        size = count * self.dtype.itemsize
        # pread needs no position, so several threads may read one file
        with name_path(file.name):
            content = os.pread(file.fileno(), size, first)
        if len(content) < size:
            raise BadData(f"{file.name}: truncated. Try: prepare or download it again")
        if self.crc32:
            self.check_blocks(i, first, first + size)

        # an id outside the vocabulary would end in the middle of a GPU's kernel
        largest = np.frombuffer(content, self.dtype).max(initial=0)
        if largest >= self.vocab_size:
            raise BadData(
                f"{file.name}: expected token ids below {self.vocab_size}, "
                f"got {largest}: the file is corrupt. Try: prepare or download it again"
            )
        return content

    def check_blocks(self, i: int, start: int, end: int) -> None:
        """Compare the blocks of file i that hold the bytes start ... end - 1 with their CRC32s, if
        that was not done before. Raises BadData."""
        for block in range(start // BLOCK, (end - 1) // BLOCK + 1):
            if self.intact[i][block]:
                continue
            first = block * BLOCK
            content = os.pread(self.files[i].fileno(), BLOCK, first)
            # a CRC32 is eight hexadecimal digits
            expected = self.crc32[i][8 * block : 8 * block + 8]
            if f"{zlib.crc32(content):08x}" != expected:
                raise BadData(
                    f"{self.files[i].name}: block {block:,}, bytes {first:,} to "
                    f"{first + len(content) - 1:,}, has changed since the dataset was "
                    "prepared or the run was started. Try: prepare or download it again, or copy "
                    "the file again"
                )
            self.intact[i][block] = 1

    def locate(self, numbers: Sequence[int]) -> list[tuple["Split", int]]:
        """Return this split and the first token of each of the windows with these numbers in the
        endless sequence of epochs."""
        # each epoch has a permutation and an offset of its own
        epoch, index = np.divmod(np.array(numbers, np.uint64), self.windows)
        key = mix(epoch ^ self.key)
        window = permute(index, self.windows, key)
        starts = window * self.block_size + key % self.offsets
        return [(self, start) for start in starts.tolist()]


def open_tokens(path: Path, expected: int, itemsize: int, header: int) -> FileIO:
    """Open a file that must hold `expected` tokens of `itemsize` bytes behind a header of that many
    bytes. Raises BadData."""
    try:
        file = open(path, "rb", buffering=0)
    except OSError as e:
        raise BadData(
            f"{path}: {e.strerror.lower()}. Try: prepare or download it again"
        ) from e
    tokens = (os.fstat(file.fileno()).st_size - header) // itemsize
    if tokens != expected:
        raise BadData(
            f"{path}: expected {expected:,} tokens as in meta.json, got "
            f"{tokens:,}. Try: prepare or download it again"
        )
    return file


@dataclass
class Loader:
    """This rank's micro-batches of each batch: of `micro_batches` with `batch_size` windows, those
    numbered in `local`. A thread reads the next one during training."""

    split: Windows
    batch_size: int
    micro_batches: int
    local: range
    device: torch.device

    def __post_init__(self) -> None:
        self.executor = ThreadPoolExecutor(1)
        # (batch, m) -> the future of the next micro-batch
        self.prefetched = {}

    def get_batch(self, batch: int, m: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of micro-batch m of a batch, (B, T) each, on the device.
        Raises BadData."""
        # the one that was read ahead, unless this is the first step, or one that is computed again
        rows = self.prefetched.pop((batch, m), None)
        if rows is None:
            rows = self.executor.submit(self._read, batch, m)

        # read the next one in this rank's order while this one is computed
        next_batch = batch
        next_m = m + 1
        if next_m not in self.local:
            next_batch = batch + 1
            next_m = self.local[0]
        next_rows = self.executor.submit(self._read, next_batch, next_m)
        self.prefetched = {(next_batch, next_m): next_rows}

        x, y = rows.result()
        # the host would wait for a copy from memory that is not pinned
        is_pinned = self.device.type == "cuda"
        x = x.to(self.device, non_blocking=is_pinned)
        y = y.to(self.device, non_blocking=is_pinned)
        return x, y

    def first_window(self, batch: int, m: int) -> int:
        """Return the number of the first window of micro-batch m of a batch."""
        # all batches, and all ranks' micro-batches, follow one another in one sequence of windows
        return (batch * self.micro_batches + m) * self.batch_size

    def _read(self, batch: int, m: int) -> Sequence[Tensor]:
        """Return micro-batch m of a batch in host memory, for CUDA pinned."""
        rows = self.split.rows(self.first_window(batch, m), self.batch_size)
        # rows of x have gaps between them: a copy to the GPU would first close them, in memory
        # that is not pinned
        if self.device.type == "cuda":
            rows = [t.contiguous().pin_memory() for t in rows]
        return rows
