"""Text -> data/<name>/{train,val}.bin, raw little-endian token ids, and meta.json about them.

    python prepare.py plays_char
    python prepare.py novels/ notes.md 'logs/*.jsonl' --name=mine --tokenizer=bpe:4096
    python prepare.py fineweb-edu

The text is read twice, in blocks: to measure its documents, and to encode them on all cores.
Several Parquet files are read once: each is a shard, which becomes a file of train and one of val,
and an interrupted preparation continues with the next shard.
"""
from dataclasses import dataclass

from keepgpt.config import command_line, setting
from keepgpt.text import DATASETS, HUB

KNOWN = (*DATASETS, *HUB)


@dataclass(frozen=True)
class PrepareConfig:
    """The settings of prepare.py."""
    name: str = setting("", "the dataset goes to data/<name>; a known dataset has its own name")
    tokenizer: str = setting("gpt2",
        "gpt2 | char: every character is a token | bpe:N: at most N tokens, trained on the text "
        "itself | a folder with a tokenizer.json | the name of one of tiktoken's encodings")
    val_fraction: float = setting(0.1, "the share of the text for validation", least=1e-9, below=1)
    text_key: str = setting("text", "the field of a .jsonl line or a .parquet row with the text")
    data_dir: str = setting("data", "the folder of all datasets, as in train.py")
    workers: int = setting(0, "threads that encode; 0 = one per core", least=0)


if __name__ == "__main__":  # before the packages are imported
    CONFIG, GIVEN, PATHS = command_line(
        PrepareConfig,
        f"python prepare.py {' | '.join(KNOWN)} | PATH... --name=NAME [--key=value ...]")

import hashlib
import io
import json
import os
import re
import signal
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from keepgpt import text
from keepgpt.dataset import dataset_folder, split_files
from keepgpt.process import (
    UserError,
    describe,
    exit_with,
    lock_out_dir,
    sync,
    write_atomically,
)
from keepgpt.tokenizer import GPT2_CUT, Tokenizer, describe_tokenizer, from_meta, learn_tokenizer

BLOCK = 1 << 19  # characters read, and encoded, at a time
BPE_TEXT = 10**9  # characters of the train text that a BPE is trained on
MANY = 100  # documents: from this many on, complete ones go to val
LONG = 1 << 20  # characters: a longer document is split in any case
DAY = 86_400  # seconds to wait for another preparation
SPLITS = ("train", "val")
OURS = re.compile(r"((train|val)(-\d{5,})?\.bin|meta\.json)(\.tmp)?")
Chunk = tuple[int, bool, str]  # (0 for train or 1 for val, a document starts here, text)


@dataclass(frozen=True)
class Shard:
    """Describe the text of one train and one val file."""
    read: Callable[[], Iterator[TextIO]]
    val_fraction: float
    documents: int = 0  # 0: not known before they are measured


def describe_source(known: str, paths: list[str], text_key: str) -> dict[str, Any]:
    """Return what meta.json says about the text: it changes if the text does."""
    if known in HUB:
        hub = HUB[known]
        return {"hub": hub.repo, "revision": hub.revision, "files": [hub.train, hub.val]}
    if known:
        name = DATASETS[known][0]
        return {"text": name, "sha256": text.SHA256[name]}
    stats = [(path, os.stat(path)) for path in text.find_files(paths)]
    state = "".join(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats)
    return {"paths": paths, "text_key": text_key, "files": len(stats),
            "bytes": sum(stat.st_size for _, stat in stats),
            "state": hashlib.sha256(os.fsencode(state)).hexdigest()}


def open_shards(known: str, paths: list[str], config: PrepareConfig, val_fraction: float
                ) -> list[Shard]:
    """Return the shards of the text: each of several Parquet files is one, else all of it is."""
    def open_shard(path: str, val_fraction: float, text_key: str = "text") -> Shard:
        with text.open_parquet(path, text_key) as file:
            return Shard(partial(text.read_documents, [path], text_key), val_fraction,
                         file.metadata.num_rows)

    data_dir = dataset_folder(config.data_dir, "")
    if known in HUB:
        train, val = text.find_hub_files(known, data_dir / "hub" / known)
        return ([open_shard(path, val_fraction) for path in train]
                + [open_shard(path, 1.0) for path in val])
    if known:
        content = (text.read_plays() if DATASETS[known][0] == "plays" else
                   text.read_tinyshakespeare(data_dir / "tinyshakespeare" / "input.txt"))
        return [Shard(lambda: iter([io.StringIO(content)]), val_fraction)]
    files = text.find_files(paths)
    if len(files) > 1 and all(path.lower().endswith(".parquet") for path in files):
        return [open_shard(path, val_fraction, config.text_key) for path in files]
    return [Shard(partial(text.read_documents, files, config.text_key), val_fraction)]


def measure(shards: list[Shard], alphabet: set[str] | None) -> array:
    """Return each document's length in characters; add its characters to `alphabet`, if given.
    Eight bytes per document are all that grows with the text."""
    lengths = array("q")
    for shard in shards:
        for document in shard.read():
            lengths.append(0)
            while block := text.read_block(document, BLOCK):
                lengths[-1] += len(block)
                if alphabet is not None:
                    alphabet.update(block)
    return lengths


def split_documents(shards: list[Shard], k: int, lengths: array | None, cut: Callable[[str], int]
                    ) -> Iterator[Chunk]:
    """Yield the texts of shard k to encode, those of long documents cut where `cut` allows it.

    Few or long documents are split, each at the same point; of many short ones some go to val as a
    whole. Without `lengths`, the documents are in memory.
    """
    total, first = (sum(shard.documents for shard in part) for part in (shards, shards[:k]))
    share = shards[k].val_fraction
    for i, document in enumerate(shards[k].read(), first):
        length = lengths[i] if lengths else len(document.getvalue())
        at = int(length * (1 - share))
        if total >= MANY and length <= LONG:
            at = 0 if int((i + 1) * share) > int(i * share) else length
        for split, left in ((0, at), (1, length - at)):
            starts, rest = True, ""
            while block := text.read_block(document, min(BLOCK, left)):
                left -= len(block)
                rest += block
                end = cut(rest) if left else len(rest)
                if end:
                    yield split, starts, rest[:end]
                    starts, rest = False, rest[end:]


def read_train_text(shards: list[Shard], lengths: array | None) -> Iterator[str]:
    """Yield the first gigabyte of characters of the text that goes to train; no word is torn."""
    left = BPE_TEXT
    for k in range(len(shards)):
        for split, _, part in split_documents(shards, k, lengths,
                                              lambda part: GPT2_CUT.match(part).end()):
            if split == 0:
                yield part
                left -= len(part)
            if left <= 0:
                return


def encode_in_order(chunks: Iterable[Chunk], encode: Callable, workers: int) -> Iterator:
    """Yield encode(batch) for batches of chunks of a block in all, computed by threads: encoders
    release the GIL. Two batches per thread are pending: memory is flat."""
    pending, batch, size = deque(), [], 0
    with ThreadPoolExecutor(workers) as pool:
        for chunk in chunks:
            batch.append(chunk)
            size += len(chunk[2])
            if size >= BLOCK:
                pending.append(pool.submit(encode, batch))
                batch, size = [], 0
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        pending.append(pool.submit(encode, batch))
        while pending:
            yield pending.popleft().result()


def write_tokens(paths: list[Path], before: list[int], chunks: Iterable[Chunk],
                 tokenizer: Tokenizer, characters: int | None, workers: int) -> list[int]:
    """Encode `chunks`, of `characters` in all, to a train and a val file. Return how many tokens
    each has. Earlier shards have `before`."""
    dtype = token_type(tokenizer)

    def encode(batch: list[Chunk]) -> list[tuple[int, bool, int, np.ndarray]]:
        return [(split, starts, len(part), tokenizer.encode_to_numpy(part).astype(dtype))
                for split, starts, part in batch]

    with (open(paths[0], "wb") as train, open(paths[1], "wb") as val,
          tqdm(total=characters, unit="char", unit_scale=True, disable=None) as bar):
        for batch in encode_in_order(chunks, encode, workers):
            for split, starts, length, tokens in batch:
                file = (train, val)[split]
                if starts and before[split] + file.tell() > 0:
                    separator = tokenizer.encode("\n") if tokenizer.eot is None else [tokenizer.eot]
                    file.write(np.array(separator, dtype))
                file.write(tokens)
                bar.update(length)
    for path in paths:
        sync(path)
    return [path.stat().st_size // dtype.itemsize for path in paths]


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """Return the type of the ids in .bin files."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def read_previous(folder: Path, request: dict[str, Any], wanted: dict[str, Any]
                  ) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """Return the meta.json that a preparation of this request has left, {} if none, and its intact
    shards, each as {file: tokens}. If a shard is missing, the meta has no fingerprint."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if not (request.items() <= meta.items() and wanted.items() <= meta["tokenizer"].items()):
            return {}, []
        shards = [dict(pair) for pair in zip(*(split_files(meta, split).items()
                                               for split in SPLITS))]
        size = np.dtype(meta["dtype"]).itemsize
        intact = list(takewhile(lambda files: all(
            (folder / file).exists() and (folder / file).stat().st_size == size * tokens
            for file, tokens in files.items()), shards))
        if intact != shards:
            meta.pop("fingerprint", None)
        return meta, intact
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}, []


def write_dataset(folder: Path, request: dict[str, Any], wanted: dict[str, Any],
                  previous: tuple[dict[str, Any], list[dict[str, int]]], shards: list[Shard],
                  check_text: Callable[[], None], workers: int) -> dict[str, Any]:
    """Write a dataset, or the rest of an interrupted one, the `previous` of `read_previous`. Return
    its meta.

    meta.json without a fingerprint lists the complete shards of an unfinished dataset. It is there
    before the first file is replaced: a kill leaves the old dataset, an unfinished one, or the new.
    """
    meta, done = previous
    if not meta and (folder / "meta.json").exists():
        print(f"{folder}: its text or settings differ; replacing it", flush=True)
    name, single, lengths = request["name"], len(shards) == 1, None
    if done:
        print(f"{folder}: {len(done)} of {len(shards)} shards are complete; continuing", flush=True)
        description = meta["tokenizer"]
    else:
        alphabet = set() if wanted["kind"] == "char" else None
        if single or wanted["kind"] == "char":
            lengths = measure(shards, alphabet)
            if not sum(lengths):
                raise UserError(f"{name}: expected some text, got none: all of it is empty")
            if single:
                shards = [replace(shards[0], documents=len(lengths))]
            if alphabet and len(lengths) > 1:  # a newline ends a document, for lack of a token
                alphabet.add("\n")
        description = learn_tokenizer(wanted, alphabet, read_train_text(shards, lengths))
    tokenizer = from_meta({"tokenizer": description})
    dtype = token_type(tokenizer)
    known = request | {"tokenizer": description, "vocab_size": tokenizer.vocab_size,
                       "dtype": dtype.name}

    def counts() -> list[int]:
        return [sum(tokens) for tokens in zip((0, 0), *(files.values() for files in done))]

    def list_files() -> dict[str, dict[str, int]]:
        pairs = [list(files.items()) for files in done]
        return {split: dict(pair[i] for pair in pairs) for i, split in enumerate(SPLITS)}

    def write_meta(meta: dict[str, Any]) -> None:
        write_atomically(folder / "meta.json", json.dumps(meta, indent=1).encode())

    for k in range(len(done), len(shards)):
        names = [f"{split}.bin" if single else f"{split}-{k:05}.bin" for split in SPLITS]
        chunks = split_documents(shards, k, lengths, tokenizer.cut)
        written = write_tokens([folder / f"{file}.tmp" for file in names], counts(), chunks,
                               tokenizer, sum(lengths) if single else None, workers)
        check_text()
        tokens = [a + b for a, b in zip(counts(), written)]
        if k + 1 == len(shards) and min(tokens) < 2:
            raise UserError(f"{name}: too short, with {tokens[0]} train and {tokens[1]} val tokens."
                            " Try: more text, or another --val_fraction")
        write_meta(known | {"files": list_files()})
        for file in names:
            os.replace(folder / f"{file}.tmp", folder / file)
        sync(folder)
        done.append(dict(zip(names, written)))
        write_meta(known | {"files": list_files()})
    tokens = dict(zip(SPLITS, counts()))
    digest = hashlib.sha256(json.dumps([description, list(tokens.values())],
                                       sort_keys=True).encode())
    files = list_files()
    for file in [*files["train"], *files["val"]]:
        with open(folder / file, "rb") as f:
            hashlib.file_digest(f, lambda: digest)
    meta = known | {"tokens": tokens, "fingerprint": digest.hexdigest()}
    if not single:
        meta["files"] = files
    remove_ours(folder, keep=["meta.json", *files["train"], *files["val"]])
    write_meta(meta)
    return meta


def remove_ours(folder: Path, keep: Iterable[str] = (), ending: str = "") -> None:
    """Remove the files of preparations with that ending, except the files to keep."""
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) and path.name.endswith(ending) and path.name not in keep:
            path.unlink()


def check_folder(folder: Path) -> None:
    """Raise UserError where the files of another program would be replaced."""
    meta = folder / "meta.json"
    foreign = [file for split in SPLITS for file in folder.glob(f"{split}*.bin")
               if OURS.fullmatch(file.name)]
    if foreign and not meta.exists():
        raise UserError(f"{foreign[0]} has no meta.json: it was not made by prepare.py, or "
                        f"meta.json was lost. Try: another --name, or rm -r {folder}")


def check_request(config: PrepareConfig, given: dict[str, Any], known: str) -> str:
    """Return the name of the dataset. Raises UserError if a command line makes no sense."""
    name = config.name or known
    if not name:
        raise UserError("--name=NAME is missing: the dataset goes to data/NAME")
    if os.path.basename(name) != name or name.startswith("."):
        raise UserError(f"--name={name}: expected a folder's name, without a slash or a dot in "
                        "front")
    if name in KNOWN and name != known:
        raise UserError(f"--name={name}: expected a name for your own text, got a known dataset's")
    if name in KNOWN and given.keys() & {"tokenizer", "val_fraction"}:
        raise UserError(f"{name} has its own tokenizer and split. Try: --name=NAME for another "
                        "dataset of its text")
    return name


def prepare(config: PrepareConfig, given: dict[str, Any], paths: list[str]) -> None:
    """Prepare the dataset that a command line asks for, unless it exists. Raises UserError."""
    started = time.perf_counter()
    if not paths:
        raise UserError(f"expected a dataset ({', '.join(KNOWN)}), or files and folders. "
                        "Try: --help")
    known = paths[0] if len(paths) == 1 and paths[0] in KNOWN else ""
    source = describe_source(known, paths, config.text_key)
    name = check_request(config, given, known)
    val_fraction = config.val_fraction
    if known in HUB:
        val_fraction = given.get("val_fraction", HUB[known].val_fraction)
    wanted = describe_tokenizer(given.get(
        "tokenizer", DATASETS[known][1] if known in DATASETS else "gpt2"))
    request = {"format": 1, "name": name, "source": source, "val_fraction": val_fraction}
    folder = dataset_folder(config.data_dir, name)
    folder = Path(min(str(folder), os.path.relpath(folder), key=len))

    def check_text() -> None:
        if describe_source(known, paths, config.text_key) != source:
            raise UserError(f"{name}: the text changed while it was read. Try: the same command on "
                            "files that no program writes to")

    meta, done = read_previous(folder, request, wanted)
    if "fingerprint" not in meta:
        lock_out_dir(folder, DAY)
        meta, done = read_previous(folder, request, wanted)  # another preparation had the lock
    exists = "fingerprint" in meta
    if not exists:
        check_folder(folder)
        try:
            shards = open_shards(known, paths, config, val_fraction)
            meta = write_dataset(folder, request, wanted, (meta, done), shards, check_text,
                                 config.workers or os.cpu_count() or 1)
        except (OSError, ValueError, IndexError):
            check_text()  # a text that changes may cause these
            raise
        finally:
            remove_ours(folder, ending=".tmp")
    tokens, label = meta["tokens"], wanted.get("name", wanted["kind"])
    took = "exists already" if exists else f"took {time.perf_counter() - started:.1f} s"
    print(f"{folder}: {tokens['train']:,} train and {tokens['val']:,} val tokens of {label}, "
          f"{meta['vocab_size']:,} in the vocabulary: {took}", flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a kill cleans up as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    try:
        prepare(CONFIG, GIVEN, PATHS)
    except UserError as e:
        exit_with(e)
    except OSError as e:
        reason, code = describe(e)
        exit_with(UserError(f"{e.filename or CONFIG.data_dir}: {reason}. Try: --data_dir=FOLDER "
                            "elsewhere, or the same command, which keeps complete shards", code))
    except KeyboardInterrupt:
        exit_with(UserError("stopped. Try: the same command, which keeps complete shards", 130))
