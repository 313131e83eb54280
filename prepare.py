"""Text -> data/<name>/{train,val}.bin, raw little-endian token ids, and meta.json about them.

    python prepare.py shakespeare_char
    python prepare.py novels/ notes.md 'logs/*.jsonl' --name=mine --tokenizer=gpt2

The text is read twice, in blocks: to check and count it, and to encode it on all cores.
"""
import hashlib
import json
import os
import signal
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Literal

import corpora
from configurator import fail, knob, parse, sync
from corpora import BLOCK, DATASETS
from tokenizer import Tokenizer, from_meta

USAGE = f"python prepare.py {' | '.join(DATASETS)} | PATH... --name=NAME [--key=value ...]"
FILES = ("train.bin", "val.bin", "meta.json")
MANY = 100  # documents: from so many on, whole ones go to val
LONG = 1 << 20  # characters: a document that is longer is split in any case


@dataclass(frozen=True)
class PrepareConfig:
    """The settings of prepare.py."""
    name: str = knob("", "the set goes to data/<name>; a known set has its own name")
    tokenizer: Literal["gpt2", "char"] = knob("gpt2", "gpt2 | char: every character is a token")
    val_fraction: float = knob(0.1, "the share of the text for validation", least=0, below=1)
    text_key: str = knob("text", "the field of a .jsonl line that holds the text")
    data_dir: str = knob("data", "the folder of all sets, as seen from prepare.py's folder")
    workers: int = knob(0, "threads that encode; 0 = one a core; all give the same set", least=0)


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


Piece = tuple[int, bool, str]  # (0 for train or 1 for val, a separator comes first, text)


def pieces(documents: Iterable[Iterable[str]], lengths: array, val_fraction: float,
           cut: Callable[[str], int]) -> Iterator[Piece]:
    """The text of both splits in order, in pieces of a block or less, cut only where `cut` says."""
    begun = [False, False]
    for i, blocks in enumerate(documents):
        share = train_share(i, lengths[i], len(lengths), val_fraction)
        for split, group in groupby(split_blocks(blocks, share), key=itemgetter(0)):
            separate, rest = begun[split], ""
            begun[split] = True
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


def count(documents: Iterable[Iterable[str]], alphabet: set[str] | None) -> array:
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
                 characters: int, workers: int) -> list[int]:
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


def put_in_place(folder: str) -> None:
    """Rename a set's temporary files. meta.json is emptied first and comes last: with it, the set
    is whole."""
    for file in FILES:
        sync(os.path.join(folder, file + ".tmp"))
    meta = os.path.join(folder, "meta.json")
    if os.path.exists(meta):
        open(meta, "w").close()  # an empty one says that the set is ours, and not whole
        sync(meta)
    for file in FILES:
        os.replace(os.path.join(folder, file + ".tmp"), os.path.join(folder, file))
        sync(folder)


def write_set(folder: str, request: dict, kind: str,
              open_documents: Callable[[], Iterable[Iterable[str]]], workers: int) -> dict:
    """Make the files of a set, all of them or none. Returns its meta, which `request` begins."""
    import numpy as np
    name = request["name"]
    alphabet: set[str] | None = set() if kind == "char" else None
    lengths = count(open_documents(), alphabet)
    if not sum(lengths):
        fail(f"{name}: no text to learn from: all of it is empty")
    description = {"kind": kind}
    if alphabet is not None:
        # a newline stands between documents where there is no end-of-text token
        description["chars"] = "".join(sorted(alphabet | set("\n" if len(lengths) > 1 else "")))
    tokenizer = from_meta({"tokenizer": description})
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

    temporary = [os.path.join(folder, file + ".tmp") for file in FILES]
    try:
        jobs = batches(pieces(open_documents(), lengths, request["val_fraction"], tokenizer.cut))
        tokens = write_tokens(temporary[:2], jobs, tokenizer, dtype, sum(lengths), workers)
        if min(tokens) < 2:
            fail(f"{name}: too short, with {tokens[0]} train and {tokens[1]} val tokens: give more "
                 "text, or another --val_fraction")
        digest = hashlib.sha256(json.dumps([description, tokens], sort_keys=True).encode())
        for path in temporary[:2]:
            with open(path, "rb") as f:
                hashlib.file_digest(f, lambda: digest)
        meta = request | {
            "tokenizer": description, "vocab_size": tokenizer.vocab_size, "dtype": dtype.name,
            "tokens": dict(zip(("train", "val"), tokens)), "fingerprint": digest.hexdigest()}
        with open(temporary[2], "w", encoding="utf-8") as f:
            json.dump(meta, f, indent=1)
        put_in_place(folder)
        return meta
    finally:
        for path in filter(os.path.exists, temporary):
            os.remove(path)


def read_meta(folder: str) -> dict:
    """What is in the meta.json of a set that is whole; else {}."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        for split, tokens in meta["tokens"].items():
            size = os.path.getsize(os.path.join(folder, f"{split}.bin"))
            if size != tokens * {"uint16": 2, "uint32": 4}[meta["dtype"]]:
                return {}
        return meta
    except (OSError, ValueError, KeyError):
        return {}


@contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Make `folder` and hold its lock, so that a second prepare.py waits; leave no empty one."""
    import fcntl
    os.makedirs(folder, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: another prepare.py is at it; waiting", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # a network file system that cannot lock a folder
    try:
        yield
    finally:
        if not os.listdir(folder):
            os.rmdir(folder)
        os.close(lock)


def find_source(config: PrepareConfig, known: str, words: list[str], data_dir: str
                ) -> tuple[dict, Callable[[], Iterable[Iterable[str]]]]:
    """What identifies the text that the command line asks for, and how to open its documents."""
    if known:
        text = DATASETS[known][0]
        source = {"text": text, "sha256": corpora.SHA256[text]}
        return source, lambda: [corpora.known_text(text, data_dir)]
    files = corpora.find_files(words)
    stats = [(path, os.stat(path)) for path in files]
    state = "".join(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats)
    source = {"paths": words, "text_key": config.text_key, "files": len(files),
              "bytes": sum(stat.st_size for _, stat in stats),
              "state": hashlib.sha256(state.encode()).hexdigest()}
    return source, lambda: corpora.read_documents(files, config.text_key)


def prepare(config: PrepareConfig, given: dict, words: list[str]) -> None:
    """Make the set that a command line asks for, unless it is there."""
    started = time.perf_counter()
    data_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), config.data_dir)
    if not words:
        fail(f"name a dataset ({', '.join(DATASETS)}) or give files and folders; --help says more")
    known = words[0] if len(words) == 1 and words[0] in DATASETS else ""
    kind = given.get("tokenizer", DATASETS[known][1]) if known else config.tokenizer
    source, open_documents = find_source(config, known, words, data_dir)
    name = config.name or known
    if not name:
        fail("--name=NAME is missing: the set goes to data/NAME")
    if os.path.basename(name) != name or name.startswith("."):
        fail(f"--name={name}: not a folder's name: it has a slash in it or a dot in front")
    if name == known and given.keys() & {"tokenizer", "val_fraction"}:
        fail(f"{known} has its own tokenizer and split; --name=NAME makes another set of its text")

    if name in DATASETS and name != known:
        fail(f"--name={name} is the name of a known set; take another for your own text")
    folder = os.path.join(data_dir, name)
    folder = min(folder, os.path.relpath(folder), key=len)
    request = {"format": 1, "name": name, "source": source, "val_fraction": config.val_fraction}
    with alone_in(folder):
        meta = read_meta(folder)
        there = request.items() <= meta.items() and meta["tokenizer"]["kind"] == kind
        found = os.listdir(folder)
        if "train.bin" in found and "meta.json" not in found:
            fail(f"{folder}: its train.bin was not made by prepare.py; train on it as it is, "
                 "take another --name, or move it away")
        if meta and not there:
            print(f"{folder}: of another text or made otherwise; making it anew", flush=True)
        if not there:
            workers = config.workers or os.cpu_count() or 1
            meta = write_set(folder, request, kind, open_documents, workers)
    tokens = meta["tokens"]
    print(f"{folder}: {tokens['train']:,} train and {tokens['val']:,} val tokens of {kind}, "
          f"{meta['vocab_size']:,} in the vocabulary: "
          + ("there already" if there else f"made in {time.perf_counter() - started:.1f} s"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill tidies up as Ctrl-C does
    settings, given, words = parse(PrepareConfig, USAGE, sys.argv[1:])
    try:
        prepare(settings, given, words)
    except OSError as e:
        fail(f"{e.filename or settings.data_dir}: {(e.strerror or str(e)).lower()}; nothing "
             "half-written is left; --data_dir=FOLDER puts the set elsewhere")
    except KeyboardInterrupt:
        print("\nstopped; nothing half-written is left", file=sys.stderr)
        sys.exit(130)
