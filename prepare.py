"""Text -> data/<name>/{train,val}.bin, raw little-endian token ids, and meta.json about them.

    python prepare.py plays_char
    python prepare.py novels/ notes.md 'logs/*.jsonl' --name=mine --tokenizer=bpe:4096
    python prepare.py fineweb-edu

The text is read twice, in blocks: to check and count it, and to encode it on all cores. A set of
several parquet files is read once, a file at a time: each gives a part of train and one of val,
and a preparation that was stopped goes on with the next.
"""
import os
import sys

if __name__ == "__main__":  # Ctrl-C while the rest is loaded ends without a traceback
    sys.excepthook = lambda kind, *rest: (os._exit(130) if kind is KeyboardInterrupt
                                          else sys.__excepthook__(kind, *rest))

import hashlib
import json
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from keepgpt import text as corpora
from keepgpt.config import knob, parse
from keepgpt.process import fail, leave_closed_output, sync
from keepgpt.text import (
    DATASETS,
    HUB,
    KNOWN,
    Deal,
    Documents,
    Unit,
    batches,
    count,
    token_type,
    train_text,
    write_tokens,
)
from keepgpt.tokenizer import Tokenizer, from_meta, named, train_bpe

USAGE = f"python prepare.py {' | '.join(KNOWN)} | PATH... --name=NAME [--key=value ...]"
FILES = ("train.bin", "val.bin", "meta.json")
PARTS = "parts.json"  # in a folder whose parts are being made: what is there, and of what
OURS = re.compile(r"((train|val)(-\d{5,})?\.bin|(meta|parts)\.json)(\.tmp)?")


@dataclass(frozen=True)
class PrepareConfig:
    """The settings of prepare.py."""
    name: str = knob("", "the set goes to data/<name>; a known set has its own name")
    tokenizer: str = knob("gpt2",
        "gpt2 | char: every character is a token | bpe:N: at most N tokens, trained on the text "
        "itself | the name of one of tiktoken's encodings")
    val_fraction: float = knob(0.1, "the share of the text for validation", least=0, below=1)
    text_key: str = knob("text", "the field of a .jsonl line, or a .parquet row, with the text")
    data_dir: str = knob("data", "the folder of all sets, as seen from prepare.py's folder")
    workers: int = knob(0, "threads that encode; 0 = one a core; all give the same set", least=0)


def checked_name(tokenizer: str) -> str:
    """The name of a tokenizer as its description spells it. Ends the program at a bad bpe:N."""
    if not tokenizer.startswith("bpe:"):
        return tokenizer
    size = re.fullmatch("bpe:0*([0-9]{3,7})", tokenizer)
    if not size or int(size[1]) < 257:
        fail(f"--tokenizer={tokenizer}: of bpe:N, N is a whole number from 257 to 9999999: the 256 "
             "bytes, the end-of-text token and what is learned from the text, e.g. bpe:4096")
    return f"bpe:{size[1]}"


def name_of(description: dict) -> str:
    """What --tokenizer calls the tokenizer of a description."""
    return description.get("name", description["kind"])


def ready_tokenizer(name: str) -> dict | None:
    """The description of a tokenizer that does not depend on the text; else None."""
    if name == "char" or name.startswith("bpe:"):
        return None
    return {"kind": "gpt2"} if name == "gpt2" else named(name)


def learned_tokenizer(name: str, alphabet: set[str], units: list[Unit], deal: Deal) -> dict:
    """The description of char, of the characters that occur, or of bpe:N, of the train text."""
    if name == "char":
        # a newline stands between documents where there is no end-of-text token
        return {"kind": "char",
                "chars": "".join(sorted(alphabet | set("\n" if deal.documents > 1 else "")))}
    return train_bpe(train_text(units, deal), int(name.removeprefix("bpe:")))


def describe_set(request: dict, tokenizer: Tokenizer, tokens: list[int], paths: list[str]) -> dict:
    """A set's meta; `tokens` of train and val, `paths` of all of train's files, then val's.

    Its fingerprint is the same however the tokens are spread over files.
    """
    digest = hashlib.sha256(json.dumps([tokenizer.description, tokens], sort_keys=True).encode())
    for path in paths:
        with open(path, "rb") as f:
            hashlib.file_digest(f, lambda: digest)
    return request | {
        "tokenizer": tokenizer.description, "vocab_size": tokenizer.vocab_size,
        "dtype": token_type(tokenizer).name, "tokens": dict(zip(("train", "val"), tokens)),
        "fingerprint": digest.hexdigest()}


def mark_incomplete(folder: str) -> None:
    """Leave an empty meta.json on the disk: the files here are ours, and not a complete dataset."""
    meta = os.path.join(folder, "meta.json")
    open(meta, "w").close()
    sync(meta)
    sync(folder)


def ignore_stops() -> None:
    """Ignore Ctrl-C and SIGTERM from here on, where all that is left takes an instant."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def put_in_place(folder: str, files: Iterable[str]) -> None:
    """Give temporary files, once they are safe, their names, one by one."""
    for file in files:
        sync(os.path.join(folder, file + ".tmp"))
    for file in files:
        os.replace(os.path.join(folder, file + ".tmp"), os.path.join(folder, file))
        sync(folder)


def write_temporary(folder: str, file: str, value: dict) -> None:
    """Write `value` as JSON to the temporary file that `put_in_place` renames to `file`."""
    with open(os.path.join(folder, file + ".tmp"), "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=1))


def write_json(folder: str, file: str, value: dict) -> None:
    """Write a file, all of it or nothing."""
    write_temporary(folder, file, value)
    put_in_place(folder, [file])


def remove_ours(folder: str, keep: Iterable[str] = (), ending: str = "") -> None:
    """Remove the files of preparations, with that ending, except the files to keep."""
    for file in sorted(os.listdir(folder), reverse=True):  # meta.json, which marks them, last
        if OURS.fullmatch(file) and file.endswith(ending) and file not in keep:
            os.remove(os.path.join(folder, file))


TOO_SHORT = ("{}: too short, with {} train and {} val tokens: give more text, or another "
             "--val_fraction")


def write_set(folder: str, request: dict, name: str, unit: Unit, workers: int) -> dict:
    """Make the three files of a set, all of them or none. Returns its meta, which `request`
    begins."""
    description, alphabet = ready_tokenizer(name), set()
    lengths = count(unit.read(), alphabet if name == "char" else None)
    if not sum(lengths):
        fail(f"{request['name']}: no text to learn from: all of it is empty")
    deal = partial(Deal, len(lengths), lengths)
    tokenizer = from_meta(
        {"tokenizer": description or learned_tokenizer(name, alphabet, [unit], deal())})
    temporary = [os.path.join(folder, file + ".tmp") for file in FILES]
    try:
        jobs = batches(deal().pieces(unit.read(), unit.val_fraction, tokenizer.cut))
        tokens = write_tokens(temporary[:2], jobs, tokenizer, token_type(tokenizer), sum(lengths),
                              workers)
        if min(tokens) < 2:
            fail(TOO_SHORT.format(request["name"], *tokens))
        meta = describe_set(request, tokenizer, tokens, temporary[:2])
        write_temporary(folder, "meta.json", meta)
        for path in temporary:
            sync(path)
        ignore_stops()
        mark_incomplete(folder)
        put_in_place(folder, FILES)  # meta.json comes last: with it, the set is whole
        return meta
    finally:
        remove_ours(folder, ending=".tmp")


def part(k: int) -> list[str]:
    """The files of a set's part number k."""
    return [f"train-{k:05}.bin", f"val-{k:05}.bin"]


def read_parts(folder: str, request: dict, name: str) -> dict:
    """What an interrupted preparation of this request has left: {"tokenizer", "parts"}; else {}.

    A part says how many tokens its two files have and how far the documents were dealt out.
    """
    try:
        with open(os.path.join(folder, PARTS), encoding="utf-8") as f:
            left = json.load(f)
    except (OSError, ValueError):
        return {}
    if not request.items() <= left.items() or name_of(left["tokenizer"]) != name:
        return {}
    size = token_type(from_meta(left)).itemsize
    for k, done in enumerate(left["parts"]):
        paths = [os.path.join(folder, file) for file in part(k)]
        if ([os.path.getsize(path) for path in paths if os.path.exists(path)]
                != [tokens * size for tokens in done["tokens"]]):
            del left["parts"][k:]
            break
    return left


def begin_parts(folder: str, request: dict, name: str, units: list[Unit], deal: Deal) -> dict:
    """What a preparation of several parts begins with: a tokenizer, and no part."""
    description, alphabet = ready_tokenizer(name), set()
    if name == "char":
        count(chain.from_iterable(unit.read() for unit in units), alphabet)
    left = request | {"tokenizer": description or learned_tokenizer(name, alphabet, units, deal),
                      "parts": []}
    mark_incomplete(folder)
    write_json(folder, PARTS, left)
    return left


def write_parts(folder: str, request: dict, name: str, units: list[Unit], workers: int) -> dict:
    """Make a set of a train and a val file for each unit, or go on with it. Returns its meta.

    The documents are read once: they are lists in memory, so that their lengths are known.
    """
    documents = sum(unit.documents for unit in units)
    left = (read_parts(folder, request, name)
            or begin_parts(folder, request, name, units, Deal(documents)))
    done = left["parts"]
    remove_ours(folder, keep=["meta.json", PARTS,
                              *chain.from_iterable(map(part, range(len(done))))])
    if done:
        print(f"{folder}: {len(done)} of {len(units)} parts are there; going on", flush=True)
    tokenizer = from_meta(left)
    deal = Deal(documents, None, **done[-1]["deal"] if done else {})
    try:
        for k, unit in list(enumerate(units))[len(done):]:
            jobs = batches(deal.pieces(unit.read(), unit.val_fraction, tokenizer.cut))
            tokens = write_tokens([os.path.join(folder, file + ".tmp") for file in part(k)], jobs,
                                  tokenizer, token_type(tokenizer), None, workers)
            put_in_place(folder, part(k))
            done.append({"tokens": tokens, "deal": {"dealt": deal.dealt, "begun": deal.begun[:]}})
            write_json(folder, PARTS, left)
    except (OSError, KeyboardInterrupt) as e:
        e.add_note(f"{len(done)} of {len(units)} parts are whole: the same command goes on there")
        raise
    finally:
        remove_ours(folder, ending=".tmp")
    return finish_parts(folder, request, tokenizer, [made["tokens"] for made in done])


def finish_parts(folder: str, request: dict, tokenizer: Tokenizer, tokens: list[list[int]]) -> dict:
    """Make a set out of its parts, with so many [train, val] tokens each. Returns its meta."""
    total = [sum(split) for split in zip(*tokens)]
    if min(total) < 2:
        remove_ours(folder)
        fail(TOO_SHORT.format(request["name"], *total))
    files = [{part(k)[split]: tokens[k][split] for k in range(len(tokens))} for split in (0, 1)]
    meta = describe_set(request, tokenizer, total,
                        [os.path.join(folder, file) for split in files for file in split])
    meta["files"] = {"train": files[0], "val": files[1]}
    ignore_stops()
    write_json(folder, "meta.json", meta)
    return meta


def files_of(meta: dict) -> dict[str, int]:
    """Return a dataset's .bin files, and how many tokens each has."""
    if "files" in meta:
        return meta["files"]["train"] | meta["files"]["val"]
    return {f"{split}.bin": tokens for split, tokens in meta["tokens"].items()}


def read_meta(folder: str) -> dict:
    """What is in the meta.json of a set that is whole; else {}."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        for file, tokens in files_of(meta).items():
            size = os.path.getsize(os.path.join(folder, file))
            if size != tokens * {"uint16": 2, "uint32": 4}[meta["dtype"]]:
                return {}
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def refuse_foreign(folder: str) -> None:
    """End the program where another program's .bin files would be overwritten."""
    ours = [file for file in os.listdir(folder) if OURS.fullmatch(file)]
    if ours and all(file.endswith(".bin") for file in ours):
        fail(f"{folder}: its {min(ours)} has no meta.json: it was not made by prepare.py, or "
             f"meta.json was lost. Try: another --name, or rm -r {folder}")


@contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Make `folder` and hold its lock, so that a second prepare.py waits; leave no empty one."""
    import fcntl
    lock = None
    while lock is None:
        os.makedirs(folder, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another prepare.py is running; waiting", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a network file system that cannot lock a folder
        if not (os.path.exists(folder) and os.path.samestat(os.fstat(lock), os.stat(folder))):
            os.close(lock)  # that one was stopped and has removed the folder
            lock = None
    try:
        yield
    finally:
        if not os.listdir(folder):
            os.rmdir(folder)
        os.close(lock)


@dataclass(frozen=True)
class Source:
    """Text that a command line asks for: what identifies it, and how to find its units. `check`
    ends the program if the text has changed since."""
    identity: dict[str, Any]
    val_fraction: float
    units: Callable[[], list[Unit]]
    check: Callable[[], None] = lambda: None


def hub_source(name: str, folder: str, val_fraction: float) -> Source:
    """A set of the hub, or its files in `folder`, which are taken at their names."""
    hub = HUB[name]

    def units() -> list[Unit]:
        train, val = corpora.find_hub_files(name, folder)
        for path in filter(os.path.isfile, train + val):
            corpora.check_parquet(path, "text")
        return [Unit(partial(corpora.read_documents, [path], "text"), share)
                for files, share in ((train, val_fraction), (val, 1.0)) for path in files]
    identity = {"hub": hub.repo, "revision": hub.revision, "files": [hub.train, hub.val]}
    return Source(identity, val_fraction, units)


def own_source(config: PrepareConfig, words: list[str]) -> Source:
    """One's own files. Several in parquet, and no others, are a unit each."""
    files = corpora.find_files(words)

    def units() -> list[Unit]:
        if len(files) > 1 and all(path.lower().endswith(".parquet") for path in files):
            return [Unit(partial(read, [path]), config.val_fraction,
                         corpora.check_parquet(path, config.text_key)) for path in files]
        return [Unit(partial(read, files), config.val_fraction)]

    def read(files: list[str]) -> Documents:
        yield from corpora.read_documents(files, config.text_key)
        check()

    def identify() -> dict[str, Any]:
        stats = [(path, os.stat(path)) for path in files]
        state = "".join(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats)
        return {"paths": words, "text_key": config.text_key, "files": len(files),
                "bytes": sum(stat.st_size for _, stat in stats),
                "state": hashlib.sha256(os.fsencode(state)).hexdigest()}

    def check() -> None:
        try:
            changed = identify() != identity
        except OSError:
            changed = True
        if changed:
            fail(f"{config.name}: the text changed while it was read. "
                 "Try: the same command on files that no program writes to")
    identity = identify()
    return Source(identity, config.val_fraction, units, check)


def find_source(config: PrepareConfig, given: dict, words: list[str], data_dir: str) -> Source:
    """Where the text that the command line asks for comes from."""
    by_hand = config.name in HUB and words != [config.name]
    if by_hand or words[0] in HUB and len(words) == 1:
        hub = config.name if by_hand else words[0]
        return hub_source(hub, words[0] if by_hand else "",
                          given.get("val_fraction", HUB[hub].val_fraction))
    if words[0] in DATASETS and len(words) == 1:
        text = DATASETS[words[0]][0]
        return Source({"text": text, "sha256": corpora.SHA256[text]}, config.val_fraction,
                      lambda: [Unit(lambda: [corpora.known_text(text, data_dir)],
                                    config.val_fraction)])
    return own_source(config, words)


def check_names(config: PrepareConfig, given: dict, words: list[str]) -> tuple[str, str]:
    """The names of the set and of its tokenizer. Ends the program where they don't fit."""
    known = words[0] if len(words) == 1 and words[0] in KNOWN else ""
    name = config.name or known
    if not name:
        fail("--name=NAME is missing: the set goes to data/NAME")
    if config.val_fraction == 0:
        fail("--val_fraction=0: expected more than 0, as training evaluates on val.bin to keep "
             "best.pt. Try: --val_fraction=0.01")
    if os.path.basename(name) != name or name.startswith("."):
        fail(f"--name={name}: not a folder's name: it has a slash in it or a dot in front")
    by_hand = name in HUB and len(words) == 1 and os.path.isdir(words[0])
    if name in KNOWN and name != known and not by_hand:
        fail(f"--name={name} is the name of a known set; take another for your own text"
             + (f", or give the folder that holds {HUB[name].train}" if name in HUB else ""))
    if name in KNOWN and given.keys() & {"tokenizer", "val_fraction"}:
        fail(f"{name} has its own tokenizer and split; --name=NAME makes another set of its text")
    own = DATASETS[known][1] if known in DATASETS else "gpt2"
    return name, checked_name(given.get("tokenizer", own))


def make_set(folder: str, request: dict, name: str, source: Source, workers: int) -> dict:
    """Make the files of a set, in one or several parts. Returns its meta."""
    units = source.units()
    try:
        if len(units) == 1:
            return write_set(folder, request, name, units[0], workers)
        return write_parts(folder, request, name, units, workers)
    except (OSError, ValueError, IndexError):
        source.check()  # as a text that changes while it is read may cause these
        raise


def prepare(config: PrepareConfig, given: dict, words: list[str]) -> None:
    """Make the set that a command line asks for, unless it is there."""
    started = time.perf_counter()
    data_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), config.data_dir)
    if not words:
        fail(f"name a dataset ({', '.join(KNOWN)}) or give files and folders; --help says more")
    name, tokenizer = check_names(config, given, words)
    source = find_source(config, given, words, data_dir)
    folder = os.path.join(data_dir, name)
    folder = min(folder, os.path.relpath(folder), key=len)
    request = {"format": 1, "name": name, "source": source.identity,
               "val_fraction": source.val_fraction}
    with alone_in(folder):
        meta = read_meta(folder)
        there = request.items() <= meta.items() and name_of(meta["tokenizer"]) == tokenizer
        refuse_foreign(folder)
        if meta and not there:
            print(f"{folder}: of another text or made otherwise; making it anew", flush=True)
        if not there:
            workers = config.workers or os.cpu_count() or 1
            meta = make_set(folder, request, tokenizer, source, workers)
        remove_ours(folder, keep=["meta.json", *files_of(meta)])  # of preparations that were killed
    tokens, size = meta["tokens"], meta["vocab_size"]
    fewer = tokenizer.startswith("bpe:") and size < int(tokenizer.removeprefix("bpe:"))
    try:
        print(f"{folder}: {tokens['train']:,} train and {tokens['val']:,} val tokens of "
              f"{tokenizer}, {size:,} in the vocabulary"
              f"{', all that so little text gives' * fewer}: "
              + ("there already" if there else f"made in {time.perf_counter() - started:.1f} s"),
              flush=True)
    except OSError as e:
        leave_closed_output(e)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a locale may lack a character
    settings, given, words = parse(PrepareConfig, USAGE, sys.argv[1:])
    try:
        # a kill tidies up as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        prepare(settings, given, words)
    except OSError as e:
        kept = "".join(f"; {note}" for note in getattr(e, "__notes__", []))
        fail(f"{e.filename or settings.data_dir}: {(e.strerror or str(e)).lower()}; nothing "
             f"half-written is left{kept}; --data_dir=FOLDER puts the set elsewhere")
    except KeyboardInterrupt as e:
        ignore_stops()
        kept = "".join(f"; {note}" for note in getattr(e, "__notes__", []))
        print(f"\nstopped; nothing half-written is left{kept}", file=sys.stderr)
        sys.exit(130)
