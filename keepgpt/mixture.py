"""Read several datasets in fixed proportions: `--dataset=web:0.7+code:0.3`.

Which source a window comes from, and which of its windows it is, are functions of the seed and the
window's number in the whole run. So a mixture survives a crash or another number of ranks as one
dataset does.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np

from keepgpt.dataset import (
    SPLITS,
    BadData,
    Meta,
    dataset_folder,
    read_crc32,
    read_meta,
)
from keepgpt.loader import Split, Windows, mix, permute, seed_of

# windows after which every source has had its share, but for a part of one window
CYCLE = 256


@dataclass
class Source:
    """A dataset, and its share of the windows: the shares of all sources add up to 1."""

    folder: Path
    meta: Meta
    share: Fraction


def find_sources(data_dir: str, dataset: str) -> list[Source]:
    """Return the datasets that a setting names: NAME, or NAME:WEIGHT+NAME:WEIGHT. Raises
    UserError."""
    # the name of one dataset may have such signs
    folder = dataset_folder(data_dir, dataset)
    if folder.exists() or not set("+:") & set(dataset):
        return [Source(folder, read_meta(folder), Fraction(1))]
    weights = parse_mixture(dataset)
    total = sum(weight for _, weight in weights)
    sources = []
    for name, weight in weights:
        folder = dataset_folder(data_dir, name)
        sources.append(Source(folder, read_meta(folder), weight / total))
    check_sources(sources)
    # whatever the order of the names, and wherever the folders lie
    return sorted(sources, key=lambda s: (-s.share, s.meta["fingerprint"]))


def parse_mixture(dataset: str) -> list[tuple[str, Fraction]]:
    """Return the name and the weight of each source. Raises BadData."""
    weights = []
    for part in dataset.split("+"):
        name, _, number = part.rpartition(":")
        try:
            # exactly, 7/10 for 0.7; an exponent of a billion would take forever
            weight = Fraction(number if "/" in number else repr(float(number)))
        except (ValueError, ZeroDivisionError):
            weight = 0
        if not name or weight <= 0:
            raise BadData(
                f"dataset={dataset}: expected a dataset, or NAME:WEIGHT+NAME:WEIGHT with weights "
                f"above 0, got {part!r}. Try: --dataset=web:0.7+code:0.3"
            )
        weights.append((name, weight))
    return weights


def check_sources(sources: list[Source]) -> None:
    """Raise BadData unless the sources have one tokenizer, and differ."""
    first = sources[0].meta
    for source in sources:
        keys = ("tokenizer", "vocab_size")
        if any(source.meta[key] != first[key] for key in keys):
            raise BadData(
                f"{sources[0].folder} and {source.folder} have different tokenizers. Try: "
                f"python prepare.py <its text> --name={source.meta['name']} "
                f"--tokenizer={sources[0].folder}"
            )
    names = {source.meta["name"] for source in sources}
    fingerprints = {source.meta["fingerprint"] for source in sources}
    if min(len(names), len(fingerprints)) < len(sources):
        folders = ", ".join(str(source.folder) for source in sources)
        raise BadData(
            f"expected each name and each text once, got {folders}. Try: one of them with the sum "
            "of the weights, or another name for a folder"
        )


def describe_sources(sources: list[Source], dataset: str) -> Meta:
    """Return the description of the `dataset` with these sources, as read_meta does; that of a
    mixture has its "sources", each with its "share"."""
    if len(sources) == 1:
        return sources[0].meta
    parts = [source.meta | {"share": str(source.share)} for source in sources]
    # one for all: it may hold a whole vocabulary
    tokenizers = [part.pop("tokenizer") for part in parts]
    # the same sources in other shares are other data
    identity = json.dumps([[part["fingerprint"], part["share"]] for part in parts])
    return {
        "name": dataset,
        "tokenizer": tokenizers[0],
        "vocab_size": parts[0]["vocab_size"],
        "dtype": parts[0]["dtype"],
        "tokens": {
            split: sum(part["tokens"][split] for part in parts) for split in SPLITS
        },
        "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        "sources": parts,
    }


class Mixture(Windows):
    """The windows of several splits in one sequence without an end, each split at its share."""

    def __init__(self, splits: list[Split], shares: list[Fraction], seed: int) -> None:
        """Mix `splits`, each at its share of the windows; the shares add up to 1."""
        self.splits = splits
        # the sum of the shares of the splits before each one, and 1
        self.bounds = [Fraction(0), *accumulate(shares)]
        self.key = seed_of(seed, len(splits))
        self.windows = sum(split.windows for split in splits)

    def count_windows(self, n: int) -> np.ndarray:
        """Return how many of the first n windows each split has: exactly if n is a multiple of
        CYCLE, otherwise to within about 20 windows."""
        return np.diff(self.count_before(n))

    def count_before(self, n: int) -> np.ndarray:
        """Return the first number of each split's windows if the first n were sorted by split, and
        n."""
        return np.array([int(n * bound) for bound in self.bounds])

    def locate(self, numbers: Sequence[int]) -> list[tuple[Split, int]]:
        """Return the split and the first token of each of the windows with these numbers."""
        # each cycle has the windows of split 0, then those of split 1, ..., in a permutation
        cycles, index = np.divmod(np.array(numbers, np.uint64), CYCLE)
        slots = permute(index, CYCLE, mix(cycles ^ self.key))
        # a batch has windows of few cycles
        cycles = cycles.tolist()
        ends = {*cycles, *(cycle + 1 for cycle in cycles)}
        counts = {cycle: self.count_before(cycle * CYCLE) for cycle in ends}
        # the split of each window, and the numbers of each split's windows
        order = []
        windows = [[] for _ in self.splits]
        for cycle, slot in zip(cycles, slots.tolist()):
            # the first slot of each split in this cycle
            before = counts[cycle]
            first_slots = counts[cycle + 1] - before
            k = bisect_right(first_slots, slot) - 1
            order.append(k)
            windows[k].append(before[k + 1] - before[k] + slot - first_slots[k])

        # the places of each split's windows, which are in their order
        places = [iter(s.locate(w)) for s, w in zip(self.splits, windows)]
        return [next(places[k]) for k in order]


def read_checksums(sources: list[Source], saved: Meta) -> None:
    """Give each source's description the checksums of its blocks, see dataset.read_crc32. `saved`
    is the description in a checkpoint, or {}. Raises BadData."""
    # a checkpoint that fits has the same sources in the same order
    parts = saved.get("sources", [saved] * len(sources))
    for source, part in zip(sources, parts):
        source.meta["crc32"] = read_crc32(source.folder, source.meta, part)


def open_split(
    sources: list[Source], split: str, block_size: int, seed: int, shift: bool
) -> Split | Mixture:
    """Open a split of the data, see Split; of several sources as a Mixture. Raises BadData."""
    splits = [
        Split(source.folder, split, source.meta, block_size, seed, shift)
        for source in sources
    ]
    if len(splits) == 1:
        return splits[0]
    return Mixture(splits, [source.share for source in sources], seed)
