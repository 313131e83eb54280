"""Text -> data/<name>/{train,val}.bin, raw little-endian token ids, and meta.json about them.

    python prepare.py plays_char
    python prepare.py novels/ notes.md 'logs/*.jsonl' --name=mine --tokenizer=bpe:4096
    python prepare.py fineweb-edu

The text is read twice, in blocks: to check and count it, and to encode it on all cores. A dataset
of several Parquet files is read once, a file at a time: each becomes a shard of train and one of
val, and an interrupted preparation continues with the next.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of loading in silence

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from keepgpt import text
from keepgpt.config import parse, setting
from keepgpt.process import fail, leave_closed_output, sync
from keepgpt.text import DATASETS, HUB, Shard, Splitter, count, token_type, write_tokens
from keepgpt.tokenizer import Tokenizer, describe_named, from_meta, train_bpe

KNOWN = (*DATASETS, *HUB)
USAGE = f"python prepare.py {' | '.join(KNOWN)} | PATH... --name=NAME [--key=value ...]"
STATE = "parts.json"  # in a folder whose shards are being written: which are complete, and of what
OURS = re.compile(r"((train|val)(-\d{5,})?\.bin|(meta|parts)\.json)(\.tmp)?")


@dataclass(frozen=True)
class PrepareConfig:
    """The settings of prepare.py."""
    name: str = setting("", "the dataset goes to data/<name>; a known dataset has its own name")
    tokenizer: str = setting("gpt2",
        "gpt2 | char: every character is a token | bpe:N: at most N tokens, trained on the text "
        "itself | the name of one of tiktoken's encodings")
    val_fraction: float = setting(0.1, "the share of the text for validation", least=0, below=1)
    text_key: str = setting("text", "the field of a .jsonl line, or a .parquet row, with the text")
    data_dir: str = setting("data", "the folder of all datasets, as seen from prepare.py's folder")
    workers: int = setting(0, "threads that encode; 0 = one per core; the result is the same", least=0)


@dataclass(frozen=True)
class Source:
    """Describe where the text of a dataset comes from."""
    identify: Callable[[], dict[str, Any]]  # what goes to meta.json; changes if the text does
    val_fraction: float
    shards: Callable[[], list[Shard]]


def find_hub_source(name: str, folder: str, val_fraction: float) -> Source:
    """Return a dataset of the hub, or its files in `folder`, whose content is not checked."""
    hub = HUB[name]

    def shards() -> list[Shard]:
        train, val = text.find_hub_files(name, folder)
        if folder:
            for path in train + val:
                text.open_parquet(path, "text").close()
        return [Shard(partial(text.read_documents, [path], "text"), share)
                for files, share in ((train, val_fraction), (val, 1.0)) for path in files]
    identity = {"hub": hub.repo, "revision": hub.revision, "files": [hub.train, hub.val]}
    return Source(lambda: identity, val_fraction, shards)


def find_own_source(config: PrepareConfig, paths: list[str]) -> Source:
    """Return your own files. Several Parquet files, and no others, are a shard each."""
    files = text.find_files(paths)

    def identify() -> dict[str, Any]:
        stats = [(path, os.stat(path)) for path in files]
        state = "".join(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats)
        return {"paths": paths, "text_key": config.text_key, "files": len(files),
                "bytes": sum(stat.st_size for _, stat in stats),
                "state": hashlib.sha256(os.fsencode(state)).hexdigest()}

    def shards() -> list[Shard]:
        if len(files) > 1 and all(path.lower().endswith(".parquet") for path in files):
            found = []
            for path in files:
                with text.open_parquet(path, config.text_key) as file:
                    found.append(Shard(partial(text.read_documents, [path], config.text_key),
                                       config.val_fraction, file.metadata.num_rows))
            return found
        return [Shard(partial(text.read_documents, files, config.text_key), config.val_fraction)]
    return Source(identify, config.val_fraction, shards)


def find_source(config: PrepareConfig, given: dict, paths: list[str], data_dir: str) -> Source:
    """Return the source of the text that a command line asks for."""
    known = paths[0] if len(paths) == 1 and paths[0] in KNOWN else ""
    if known in HUB or config.name in HUB:
        name, folder = (known, "") if known in HUB else (config.name, paths[0])
        return find_hub_source(name, folder, given.get("val_fraction", HUB[name].val_fraction))
    if known:
        name = DATASETS[known][0]
        return Source(lambda: {"text": name, "sha256": text.SHA256[name]}, config.val_fraction,
                      lambda: [Shard(lambda: [text.known_text(name, data_dir)],
                                     config.val_fraction)])
    return find_own_source(config, paths)


def check_names(config: PrepareConfig, given: dict, paths: list[str]) -> tuple[str, str]:
    """Return the names of the dataset and of its tokenizer. End the program if they don't fit."""
    known = paths[0] if len(paths) == 1 and paths[0] in KNOWN else ""
    name = config.name or known
    if not paths:
        fail(f"expected a dataset ({', '.join(KNOWN)}), or files and folders. Try: --help")
    if not name:
        fail("--name=NAME is missing: the dataset goes to data/NAME")
    if os.path.basename(name) != name or name.startswith("."):
        fail(f"--name={name}: expected a folder's name, without a slash or a dot in front")
    from_folder = name in HUB and len(paths) == 1 and os.path.isdir(paths[0])
    if name in KNOWN and name != known and not from_folder:
        fail(f"--name={name} is the name of a known dataset. Try: another name for your own text"
             + (f", or the folder that holds {HUB[name].train}" if name in HUB else ""))
    if name in KNOWN and given.keys() & {"tokenizer", "val_fraction"}:
        fail(f"{name} has its own tokenizer and split. Try: --name=NAME for another dataset of its "
             "text")
    if config.val_fraction == 0:
        fail("--val_fraction=0: expected more than 0, as training evaluates on val.bin to keep "
             "best.pt. Try: --val_fraction=0.01")
    tokenizer = given.get("tokenizer", DATASETS[known][1] if known in DATASETS else "gpt2")
    if tokenizer.startswith("bpe:"):
        size = re.fullmatch("bpe:0*([0-9]{3,7})", tokenizer)
        if not size or int(size[1]) < 257:
            fail(f"--tokenizer={tokenizer}: expected bpe:N with N from 257 to 9999999: 256 bytes, "
                 "the end-of-text token and what is learned from the text. Try: bpe:4096")
        tokenizer = f"bpe:{size[1]}"
    return name, tokenizer


def tokenizer_name(description: dict) -> str:
    """Return what --tokenizer calls the tokenizer of a description."""
    return description.get("name", description["kind"])


def mark_incomplete(folder: str) -> None:
    """Sync an empty meta.json: the files here are ours, and not a complete dataset."""
    meta = os.path.join(folder, "meta.json")
    open(meta, "w").close()
    sync(meta)
    sync(folder)


def put_in_place(folder: str, files: Iterable[str]) -> None:
    """Sync temporary files, then give them their names, one by one."""
    for file in files:
        sync(os.path.join(folder, file + ".tmp"))
    for file in files:
        os.replace(os.path.join(folder, file + ".tmp"), os.path.join(folder, file))
        sync(folder)


def write_temporary(folder: str, file: str, value: dict) -> None:
    """Write `value` as JSON to the temporary file that `put_in_place` renames to `file`."""
    with open(os.path.join(folder, file + ".tmp"), "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=1))


def remove_ours(folder: str, keep: Iterable[str] = (), ending: str = "") -> None:
    """Remove the files of preparations that have that ending, except the files to keep."""
    for file in sorted(os.listdir(folder), reverse=True):  # meta.json, which marks them, last
        if OURS.fullmatch(file) and file.endswith(ending) and file not in keep:
            os.remove(os.path.join(folder, file))


def shard_files(k: int) -> list[str]:
    """Return the names of shard k's train and val file."""
    return [f"train-{k:05}.bin", f"val-{k:05}.bin"]


def read_state(folder: str, request: dict, name: str) -> dict:
    """Return what an interrupted preparation of this request has left, else {}: the "tokenizer",
    and for each complete shard its tokens and the number of documents up to its end."""
    try:
        with open(os.path.join(folder, STATE), encoding="utf-8") as f:
            state = json.load(f)
        if not request.items() <= state.items() or tokenizer_name(state["tokenizer"]) != name:
            return {}
        size = token_type(from_meta(state)).itemsize
        for k, shard in enumerate(state["shards"]):
            paths = [os.path.join(folder, file) for file in shard_files(k)]
            if ([os.path.getsize(path) for path in paths if os.path.exists(path)]
                    != [tokens * size for tokens in shard["tokens"]]):
                del state["shards"][k:]
        return state
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def start_state(request: dict, name: str, shards: list[Shard]) -> tuple[dict, Splitter]:
    """Return the state without a shard, with a tokenizer learned from the text if need be, and the
    splitter of the documents. A single shard's documents are counted first."""
    single, alphabet = len(shards) == 1, set()
    learned = name == "char" or name.startswith("bpe:")
    description = {} if learned else describe_named(name)
    splitter = Splitter(sum(shard.documents for shard in shards))
    if single or name == "char":
        lengths = count(chain.from_iterable(shard.read() for shard in shards),
                        alphabet if name == "char" else None)
        if not sum(lengths):
            fail(f"{request['name']}: no text to learn from: all of it is empty")
        if single:
            splitter = Splitter(len(lengths), lengths)
    if name == "char":
        if splitter.documents > 1:  # a newline stands between them: there is no end-of-text token
            alphabet.add("\n")
        description = {"kind": "char", "chars": "".join(sorted(alphabet))}
    elif name.startswith("bpe:"):
        description = train_bpe(text.train_text(shards, replace(splitter, started=[False, False])),
                                int(name.removeprefix("bpe:")))
    return request | {"tokenizer": description, "shards": []}, splitter


def write_dataset(folder: str, request: dict, name: str, source: Source, workers: int) -> dict:
    """Write a dataset, or the rest of it. Return its meta, which begins with `request`.

    A single shard replaces an existing dataset at the end, both splits at once; of several, each
    is in place as soon as it is complete.
    """
    shards = source.shards()
    single = len(shards) == 1
    state = {} if single else read_state(folder, request, name)
    if state:
        done = state["shards"]
        splitter = Splitter(sum(shard.documents for shard in shards))
        print(f"{folder}: {len(done)} of {len(shards)} shards are complete; continuing", flush=True)
        if done:
            splitter.index = done[-1]["documents"]
            splitter.started = [any(split) for split in zip(*(shard["tokens"] for shard in done))]
    else:
        state, splitter = start_state(request, name, shards)
        done = state["shards"]
    if not single:
        mark_incomplete(folder)
        write_temporary(folder, STATE, state)
        put_in_place(folder, [STATE])
        complete = chain.from_iterable(map(shard_files, range(len(done))))
        remove_ours(folder, keep=["meta.json", STATE, *complete])
    tokenizer = from_meta(state)
    characters = sum(splitter.lengths) if single else None
    for k, shard in list(enumerate(shards))[len(done):]:
        files = ["train.bin", "val.bin"] if single else shard_files(k)
        chunks = splitter.chunks(shard.read(), shard.val_fraction, tokenizer.cut)
        tokens = write_tokens([os.path.join(folder, file + ".tmp") for file in files], chunks,
                              tokenizer, characters, workers)
        check_unchanged(source, request)
        done.append({"tokens": tokens, "documents": splitter.index})
        if not single:
            write_temporary(folder, STATE, state)
            put_in_place(folder, [*files, STATE])
    return finish_dataset(folder, request, tokenizer, [shard["tokens"] for shard in done], single)


def finish_dataset(folder: str, request: dict, tokenizer: Tokenizer, counts: list[list[int]],
                   single: bool) -> dict:
    """Complete a dataset whose shards have [train, val] tokens each. Return its meta.

    Its fingerprint is the same however the tokens are spread over files.
    """
    tokens = [sum(split) for split in zip(*counts)]
    if min(tokens) < 2:
        remove_ours(folder, ending=".tmp" if single else "")
        fail(f"{request['name']}: too short, with {tokens[0]} train and {tokens[1]} val tokens. "
             "Try: more text, or another --val_fraction")
    names = [["train.bin", "val.bin"]] if single else map(shard_files, range(len(counts)))
    files = list(zip(*names))  # of train, of val
    digest = hashlib.sha256(json.dumps([tokenizer.description, tokens], sort_keys=True).encode())
    for file in chain.from_iterable(files):
        with open(os.path.join(folder, file + (".tmp" if single else "")), "rb") as f:
            hashlib.file_digest(f, lambda: digest)
    meta = request | {
        "tokenizer": tokenizer.description, "vocab_size": tokenizer.vocab_size,
        "dtype": token_type(tokenizer).name, "tokens": dict(zip(("train", "val"), tokens)),
        "fingerprint": digest.hexdigest()}
    if not single:
        meta["files"] = {split: dict(zip(names, sizes)) for split, names, sizes
                         in zip(("train", "val"), files, zip(*counts))}
    write_temporary(folder, "meta.json", meta)
    ready = ["train.bin", "val.bin", "meta.json"] if single else ["meta.json"]
    for file in ready:
        sync(os.path.join(folder, file + ".tmp"))
    ignore_stops()
    if single:
        mark_incomplete(folder)
    put_in_place(folder, ready)  # meta.json comes last: with it, the dataset is complete
    return meta


def check_unchanged(source: Source, request: dict) -> None:
    """End the program if the text has changed since it was found."""
    try:
        changed = source.identify() != request["source"]
    except OSError:
        changed = True
    if changed:
        fail(f"{request['name']}: the text changed while it was read. "
             "Try: the same command on files that no program writes to")


def files_of(meta: dict) -> dict[str, int]:
    """Return a dataset's .bin files, and how many tokens each has."""
    if "files" in meta:
        return meta["files"]["train"] | meta["files"]["val"]
    return {f"{split}.bin": tokens for split, tokens in meta["tokens"].items()}


def read_meta(folder: str) -> dict:
    """Return the meta.json of a complete dataset, else {}."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        size = {"uint16": 2, "uint32": 4}[meta["dtype"]]
        complete = all(os.path.getsize(os.path.join(folder, file)) == tokens * size
                       for file, tokens in files_of(meta).items())
        return meta if complete else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def refuse_foreign(folder: str) -> None:
    """End the program where another program's .bin files would be overwritten."""
    ours = [file for file in os.listdir(folder) if OURS.fullmatch(file)]
    if ours and all(file.endswith(".bin") for file in ours):
        fail(f"{folder}: its {min(ours)} has no meta.json: it was not made by prepare.py, or "
             f"meta.json was lost. Try: another --name, or rm -r {folder}")


@contextmanager
def lock_folder(folder: str) -> Iterator[None]:
    """Make `folder` and lock it, so that a second prepare.py waits."""
    import fcntl
    os.makedirs(folder, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: another prepare.py is running; waiting", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # a network file system that cannot lock a folder
    try:
        yield
    finally:
        os.close(lock)


def prepare(config: PrepareConfig, given: dict, paths: list[str]) -> None:
    """Prepare the dataset that a command line asks for, unless it exists."""
    started = time.perf_counter()
    data_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), config.data_dir)
    name, tokenizer = check_names(config, given, paths)
    source = find_source(config, given, paths, data_dir)
    folder = os.path.join(data_dir, name)
    folder = min(folder, os.path.relpath(folder), key=len)
    request = {"format": 1, "name": name, "source": source.identify(),
               "val_fraction": source.val_fraction}
    with lock_folder(folder):
        meta = read_meta(folder)
        exists = request.items() <= meta.items() and tokenizer_name(meta["tokenizer"]) == tokenizer
        refuse_foreign(folder)
        if meta and not exists:
            print(f"{folder}: its text or settings differ; replacing it", flush=True)
        if not exists:
            try:
                meta = write_dataset(folder, request, tokenizer, source,
                                     config.workers or os.cpu_count() or 1)
            except (OSError, ValueError, IndexError):
                check_unchanged(source, request)  # a text that changes may cause these
                raise
            finally:
                remove_ours(folder, ending=".tmp")
        remove_ours(folder, keep=["meta.json", *files_of(meta)])  # of killed preparations
    tokens, size = meta["tokens"], meta["vocab_size"]
    short = tokenizer.startswith("bpe:") and size < int(tokenizer.removeprefix("bpe:"))
    learned = f"{size:,} in the vocabulary{', all that this little text gives' if short else ''}"
    took = "exists already" if exists else f"took {time.perf_counter() - started:.1f} s"
    try:
        print(f"{folder}: {tokens['train']:,} train and {tokens['val']:,} val tokens of "
              f"{tokenizer}, {learned}: {took}", flush=True)
    except OSError as e:
        leave_closed_output(e)


def ignore_stops() -> None:
    """Ignore Ctrl-C and SIGTERM from here on, where all that is left takes an instant."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a kill cleans up as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a locale may lack a character
    settings, given, args = parse(PrepareConfig, USAGE, sys.argv[1:])
    try:
        prepare(settings, given, args)
    except OSError as e:
        fail(f"{e.filename or settings.data_dir}: {(e.strerror or str(e)).lower()}; no incomplete "
             "file is left. Try: --data_dir=FOLDER elsewhere, or the same command, which keeps "
             "complete shards")
    except KeyboardInterrupt:
        ignore_stops()
        print("\nstopped; no incomplete file is left. The same command continues with the shards "
              "that are complete", file=sys.stderr)
        sys.exit(130)
