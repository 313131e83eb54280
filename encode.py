"""Documents -> the tokens of train and val: dealt out, cut into pieces, encoded on all cores, in
memory that does not grow with the text."""
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

from corpora import BLOCK
from tokenizer import GPT2_CUT, Tokenizer

MANY = 100  # documents: from so many on, whole ones go to val
LONG = 1 << 20  # characters: a document that is longer is split in any case
BPE_TEXT = 10**9  # characters of the train text that a BPE is trained on

Documents = Iterable[Iterable[str]]  # each in blocks of text
Piece = tuple[int, bool, str]  # (0 for train or 1 for val, a separator comes first, text)


@dataclass(frozen=True)
class Unit:
    """Text that is encoded in one go; several of them make a set of several parts."""
    read: Callable[[], Documents]
    val_fraction: float  # the share of its text for validation
    documents: int = MANY  # if known


def train_share(i: int, length: int, documents: int, val_fraction: float) -> int:
    """How many of the first of document i's `length` characters go to train; the rest go to val.

    Few or long documents are split, each at the same point; of many short ones some go whole.
    """
    if documents < MANY or length > LONG:
        return int(length * (1 - val_fraction))
    return 0 if int((i + 1) * val_fraction) > int(i * val_fraction) else length


def split_blocks(blocks: Iterable[str], share: int) -> Iterator[tuple[int, str]]:
    """(0, text) for the first `share` characters, (1, text) for the rest; no text is empty."""
    at = 0
    for block in blocks:
        head = min(max(share - at, 0), len(block))
        at += len(block)
        if head > 0:
            yield 0, block[:head]
        if head < len(block):
            yield 1, block[head:]


@dataclass
class Deal:
    """How far the documents of a set, in order, have been dealt out to train and val."""
    documents: int  # in all
    lengths: array | None = None  # in characters; None where each document is a list in memory
    dealt: int = 0
    begun: list[bool] = field(default_factory=lambda: [False, False])

    def pieces(self, documents: Documents, val_fraction: float,
               cut: Callable[[str], int]) -> Iterator[Piece]:
        """The next documents' text, in pieces of a block or less, cut only where `cut` says."""
        for blocks in documents:
            length = self.lengths[self.dealt] if self.lengths else sum(map(len, blocks))
            share = train_share(self.dealt, length, self.documents, val_fraction)
            self.dealt += 1
            for split, group in groupby(split_blocks(blocks, share), key=itemgetter(0)):
                separate, rest = self.begun[split], ""
                self.begun[split] = True
                for _, text in group:
                    rest += text
                    at = cut(rest) if len(rest) >= BLOCK else 0
                    if at:
                        yield split, separate, rest[:at]
                        separate, rest = False, rest[at:]
                yield split, separate, rest


def batches(items: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces by the block: many short documents are one thread's job, too."""
    batch, size = [], 0
    for piece in items:
        batch.append(piece)
        size += len(piece[2])
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    yield batch


def map_in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """map(function, items) on threads, with two items a thread in hand, so that memory is flat.

    Threads are enough: tiktoken lets go of the GIL while it works.
    """
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def count(documents: Documents, alphabet: set[str] | None) -> array:
    """Every document's length in characters; their characters are added to `alphabet`, if any.

    Eight bytes a document are all that grows with the text.
    """
    from tqdm import tqdm
    lengths = array("q")
    with tqdm(desc="reading", unit="char", unit_scale=True, disable=None) as bar:
        for blocks in documents:
            lengths.append(0)
            for block in blocks:
                lengths[-1] += len(block)
                bar.update(len(block))
                if alphabet is not None:
                    alphabet.update(block)
    return lengths


def write_tokens(paths: list[str], jobs: Iterable[list[Piece]], tokenizer: Tokenizer, dtype,
                 characters: int | None, workers: int) -> list[int]:
    """Encode `jobs`, so many characters in all, to two files. Returns how many tokens each has."""
    import numpy as np
    from tqdm import tqdm

    def encode(batch: list[Piece]) -> tuple[int, list[bytes]]:
        tokens: list[list[bytes]] = [[], []]
        for split, separate, text in batch:
            if separate:
                eot = tokenizer.encode("\n") if tokenizer.eot is None else [tokenizer.eot]
                tokens[split].append(np.array(eot, dtype).tobytes())
            tokens[split].append(tokenizer.encode_to_numpy(text).astype(dtype).tobytes())
        return sum(len(text) for _, _, text in batch), [b"".join(split) for split in tokens]

    with (open(paths[0], "wb") as train, open(paths[1], "wb") as val,
          tqdm(desc="encoding", total=characters, unit="char", unit_scale=True,
               disable=None) as bar):
        for done, tokens in map_in_order(encode, jobs, workers):
            train.write(tokens[0])
            val.write(tokens[1])
            bar.update(done)
    return [os.path.getsize(path) // dtype.itemsize for path in paths]


def last_space(text: str) -> int:
    """The last place to cut `text` at without tearing a word that a BPE learns from, or 0."""
    match = GPT2_CUT.match(text)
    return match.end() if match else 0


def train_text(units: list[Unit], deal: Deal) -> Iterator[str]:
    """The first gigabyte of characters of the text that goes to train; no word is torn."""
    left = BPE_TEXT
    for unit in units:
        for split, _, text in deal.pieces(unit.read(), unit.val_fraction, last_space):
            if split == 0:
                yield text
                left -= len(text)
            if left <= 0:
                return


def token_type(tokenizer: Tokenizer):
    """The numpy.dtype of the .bin files."""
    import numpy as np
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
