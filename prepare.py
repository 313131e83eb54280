"""Text -> data/<name>/{train,val}.bin, raw little-endian token ids, and meta.json about them.

    python prepare.py novels/ notes.md 'logs/*.jsonl' --name=mine --tokenizer=bpe:4096

Of several Parquet files each is a shard, which becomes a file of train and one of val: an
interrupted preparation continues with the next shard. Any other text is one shard.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

from keepgpt.config import Settings, command_line, setting
from keepgpt.dataset import (
    SPLITS,
    Meta,
    compute_crc32,
    compute_fingerprint,
    dataset_folder,
    read_meta,
)
from keepgpt.errors import (
    EXIT_INTERRUPTED,
    UserError,
    in_notebook,
    name_path,
    run_or_exit,
    warn,
)
from keepgpt.files import FolderLock, FolderLost, sync_folder, write_atomically
from keepgpt.recipe import (
    Recipe,
    describe_source,
    download_files,
    list_recipes,
    open_shards,
    read_recipe,
)
from keepgpt.text import Shard, read_block
from keepgpt.tokenizer import (
    Description,
    HFTokenizer,
    Tokenizer,
    describe_tokenizer,
    from_meta,
    train_bpe,
)

# characters read, and encoded, at a time
BLOCK = 1 << 19
# characters of the train text that a BPE is trained on: more change few merges
BPE_TEXT = 10**9
# documents: from this many on, complete ones go to val
MANY = 100
# characters: a longer document is split in any case
LONG = 1 << 20
# the files that a preparation writes, and may remove
OURS = re.compile(r"((train|val)(-\d{5,})?\.bin|meta\.json)(\.tmp)?")
# a folder in data_dir, and not a hidden one
FOLDER_NAME = re.compile("[^./][^/]*")
# flags that change a recipe, and so need a --name
OVERRIDES = ("tokenizer", "val_fraction", "text_key")


@dataclass(frozen=True)
class PrepareConfig:
    """The settings of prepare.py."""

    name: str = setting(
        "", "the dataset goes to data/<name>; a recipe has its own name"
    )
    tokenizer: str = setting(
        "gpt2",
        "gpt2 | char: every character is a token | bpe:N: at most N tokens, trained on the text "
        "itself | a folder with a tokenizer.json, or of a prepared dataset | one of tiktoken's "
        "encodings",
    )
    val_fraction: float = setting(
        0.1, "the share of the text for validation", least=1e-9, below=1
    )
    text_key: str = setting(
        "text", "the field of a .jsonl line or a .parquet row with the text"
    )
    data_dir: str = setting("data", "the folder of all datasets, as in train.py")


class Chunk(NamedTuple):
    """A part of a document that is encoded at a time."""

    # 0 for train, 1 for val
    split: int
    # its part of the document starts here: tokens of another document may stand before it
    starts: bool
    text: str


def prepare(
    config: PrepareConfig,
    overrides: Settings,
    args: list[str],
    opened: ExitStack,
) -> None:
    """Prepare the dataset that a command line asks for, unless it exists. `opened` gets its lock.
    Raises UserError."""
    started = time.perf_counter()
    name, recipe = choose_recipe(config, overrides, args)
    folder = dataset_folder(config.data_dir, name)
    # for messages
    folder = Path(min(str(folder), os.path.relpath(folder), key=len))

    # the text may be encoded already
    if recipe.is_ready:
        meta, is_new = prepare_shards(recipe, folder, opened)
    else:
        meta, is_new = prepare_text(name, recipe, folder, opened)
    outcome = "exists already"
    if is_new:
        outcome = f"took {time.perf_counter() - started:.1f} s"
    tokens = meta["tokens"]
    label = meta["tokenizer"].get("name", meta["tokenizer"]["kind"])
    print(
        f"{folder}: {tokens['train']:,} train and {tokens['val']:,} val tokens of {label}, "
        f"{meta['vocab_size']:,} in the vocabulary: {outcome}",
        flush=True,
    )


def prepare_shards(
    recipe: Recipe, folder: Path, opened: ExitStack
) -> tuple[Meta, bool]:
    """Download the shards of a recipe whose text is encoded already, unless they are there. Return
    their description, and whether they are new. Raises UserError."""
    patterns = (recipe.train_files, recipe.val_files)
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    is_new = len(found) != recipe.file_count
    if is_new:
        lock = FolderLock(folder)
        opened.callback(lock.release)
        lock.acquire(patience=86_400)
        download_files(recipe, folder)
    # compares their sizes with their headers
    return read_meta(folder), is_new


def prepare_text(
    name: str, recipe: Recipe, folder: Path, opened: ExitStack
) -> tuple[Meta, bool]:
    """Encode the text of a recipe, unless that is done. Return the content of meta.json, and
    whether it is new. Raises UserError."""
    # the request, which meta.json records
    wanted = describe_tokenizer(recipe.tokenizer)
    request = {
        "format": 1,
        "name": name,
        "source": describe_source(recipe),
        "val_fraction": recipe.val_fraction,
    }

    # a complete dataset is left as it is, and takes no lock
    meta = read_previous(folder, request, wanted)
    if "fingerprint" not in meta:
        lock = FolderLock(folder)
        opened.callback(lock.release)
        lock.acquire(patience=86_400)
        # another preparation may have had the lock, and written it
        meta = read_previous(folder, request, wanted)

    is_new = "fingerprint" not in meta
    if is_new:
        check_foreign_files(folder)
        shards = open_shards(recipe, request["source"], folder.parent)
        if meta:
            complete = len(meta["files"]["val"])
            print(
                f"{folder}: {complete} of {len(shards)} shards are complete; continuing",
                flush=True,
            )
        # what fails up to here leaves an older dataset as it is
        else:
            meta = start_meta(request, complete_tokenizer(wanted, shards))
        # errors of the disk name the folder; nothing temporary is left
        with name_path(folder), clean_up_on_signals(lock):
            meta = write_dataset(lock, meta, shards)
    return meta, is_new


def choose_recipe(
    config: PrepareConfig, overrides: Settings, args: list[str]
) -> tuple[str, Recipe]:
    """Return the name of the dataset that a command line asks for, and its recipe: that of data/,
    or one for the files and folders `args`. Raises UserError."""
    recipes = list_recipes()
    # the text of a recipe may become another dataset, with a name of its own
    base = ""
    if len(args) == 1 and args[0] in recipes:
        base = args[0]
    name = config.name or base
    if not args or not FOLDER_NAME.fullmatch(name):
        raise UserError(
            f"expected {', '.join(recipes)}, or files and folders with --name=NAME, "
            f"a new folder in {config.data_dir}. Try: --help"
        )
    # a name stands for one text, tokenizer and split
    settings = {key: overrides[key] for key in overrides.keys() & OVERRIDES}
    recipe = Recipe(files=args)
    if base:
        recipe = read_recipe(base)
    if recipe.is_ready and settings:
        raise UserError(
            f"{base} is encoded already, with its own tokenizer and split. Try: without "
            f"--{min(settings)}"
        )
    if name in recipes and (name != base or settings):
        raise UserError(
            f"{name} has its own text, tokenizer and split. Try: --name=NAME for "
            "another dataset"
        )
    return name, replace(recipe, **settings)


def read_previous(folder: Path, request: Meta, wanted: Description) -> Meta:
    """Return the meta.json that a preparation of this request has left, {} if a file is missing or
    has changed since."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        # the folder may have been renamed
        meta["name"] = request["name"]
        # a tokenizer that the text completed has more than the wanted description
        same_tokenizer = wanted.items() <= meta["tokenizer"].items()
        if request.items() <= meta.items() and same_tokenizer:
            return meta if is_intact(folder, meta) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # it may hold anything
    return {}


def is_intact(folder: Path, meta: Meta) -> bool:
    """Return True if the .bin files that `meta` lists are those that were written. Raises OSError
    for a missing file, and LookupError for a description without a way to tell."""
    if "fingerprint" not in meta:
        crc32 = meta["crc32"]
    elif compute_fingerprint(folder, meta) == meta["fingerprint"]:
        # training compares them; an older dataset has none
        crc32 = meta.get("crc32", {})
    else:
        return False
    return all(compute_crc32(folder / file) == crc32[file] for file in crc32)


def check_foreign_files(folder: Path) -> None:
    """Raise UserError if the folder has .bin files that another program may have made."""
    files = [path for path in folder.glob("*.bin") if OURS.fullmatch(path.name)]
    if files and not (folder / "meta.json").exists():
        raise UserError(
            f"{files[0]} has no meta.json: it was not made by prepare.py, or "
            f"meta.json was lost. Try: another --name, or rm -r {folder}"
        )


def start_meta(request: Meta, tokenizer: Description) -> Meta:
    """Return the meta of a requested dataset that has no shard yet."""
    vocab_size = from_meta({"tokenizer": tokenizer}).vocab_size
    return request | {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32",
        "files": {split: {} for split in SPLITS},
        "crc32": {},
    }


def complete_tokenizer(wanted: Description, shards: list[Shard]) -> Description:
    """Return the description of the wanted tokenizer, with the characters of the text, or with a
    byte-pair encoding trained on the first gigabyte that goes to train."""
    # cut as tiktoken may: each kind that is completed here allows that
    numbers = range(len(shards))
    chunks = chain.from_iterable(
        split_documents(shards, k, Tokenizer.cut) for k in numbers
    )
    if wanted["kind"] == "char" and "chars" not in wanted:
        chars = set(chain.from_iterable(chunk.text for chunk in chunks))
        # it ends a document, for lack of a token
        if sum(shard.documents for shard in shards) > 1:
            chars.add("\n")
        return {"kind": "char", "chars": "".join(sorted(chars))}
    # any other tokenizer has its tokens
    if wanted["kind"] != "bpe" or "tokens" in wanted:
        return wanted
    # val must stay unseen
    vocab_size = int(wanted["name"].removeprefix("bpe:"))
    train_text = (chunk.text for chunk in chunks if chunk.split == 0)
    return train_bpe(take_text(train_text, BPE_TEXT), vocab_size)


def take_text(texts: Iterable[str], size: int) -> Iterator[str]:
    """Yield `texts` until they have `size` characters."""
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


@contextmanager
def clean_up_on_signals(lock: FolderLock) -> Iterator[None]:
    """Remove the temporary files of the locked folder at the end of a block, and let signals do so
    and exit at once: threads may be in a library's compiled code for minutes, and any other way to
    end waits for them. A notebook's kernel keeps its own handlers."""

    def stop(_number: int, _frame: Any) -> None:
        try:
            lock.check()
            remove_ours(lock, ending=".tmp")
        except (FolderLost, OSError) as e:
            print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if in_notebook():
        numbers = ()
    # an ignored signal stays ignored, as SIGHUP is under nohup
    before = {
        number: signal.signal(number, stop)
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        remove_ours(lock, ending=".tmp")
        for number, action in before.items():
            signal.signal(number, action)


def write_dataset(lock: FolderLock, meta: Meta, shards: list[Shard]) -> Meta:
    """Write the shards that `meta` lacks to the locked folder. Return the complete meta.

    meta.json without a fingerprint lists the complete shards of an unfinished dataset. It is there
    before the first file is replaced: a kill leaves the old dataset, an unfinished one, or the new.
    """
    folder = lock.folder
    tokenizer = from_meta(meta)
    dtype = np.dtype(meta["dtype"])
    loss = LossCheck(tokenizer)
    totals = [sum(meta["files"][split].values()) for split in SPLITS]
    # continue with the first incomplete shard
    for k in range(len(meta["files"]["val"]), len(shards)):
        number = f"-{k:05}" if len(shards) > 1 else ""
        names = [f"{split}{number}.bin" for split in SPLITS]
        paths = [folder / f"{name}.tmp" for name in names]
        chunks = split_documents(shards, k, tokenizer.cut)
        # another process may have the folder by now
        lock.check()
        write_tokens(paths, totals, chunks, tokenizer, dtype, loss)
        # before the last shard makes the dataset complete
        if k + 1 == len(shards):
            loss.warn(meta["name"])
            if min(totals) < 2:
                raise UserError(
                    f"{meta['name']}: too short, with {totals[0]} train and "
                    f"{totals[1]} val tokens. Try: more text, or another "
                    "--val_fraction"
                )
        commit_shard(lock, meta, names)
    # those of an older dataset
    remove_ours(lock, keep=["meta.json", *meta["crc32"]])
    # the fingerprint says that the dataset is complete
    meta["tokens"] = dict(zip(SPLITS, totals))
    meta["fingerprint"] = compute_fingerprint(folder, meta)
    # one shard is train.bin and val.bin
    if len(shards) == 1:
        del meta["files"]
    write_meta(lock, meta)
    return meta


def commit_shard(lock: FolderLock, meta: Meta, names: list[str]) -> None:
    """Rename the temporary files of a shard to `names`, and add them to `meta` and meta.json."""
    folder = lock.folder
    itemsize = np.dtype(meta["dtype"]).itemsize
    crc32 = {name: compute_crc32(folder / f"{name}.tmp") for name in names}
    # from here on an older dataset is unusable
    write_meta(lock, meta)
    for split, name in zip(SPLITS, names):
        lock.check()
        os.replace(folder / f"{name}.tmp", folder / name)
        meta["files"][split][name] = (folder / name).stat().st_size // itemsize
    # names first: meta.json must not list a file that a crash could lose
    sync_folder(folder)
    meta["crc32"] |= crc32
    write_meta(lock, meta)


def write_meta(lock: FolderLock, meta: Meta) -> None:
    """Write the locked folder's meta.json."""
    content = json.dumps(meta, indent=1).encode()
    write_atomically(lock.folder / "meta.json", content, lock)


def remove_ours(lock: FolderLock, keep: Iterable[str] = (), ending: str = "") -> None:
    """Remove the files of preparations with that ending from the locked folder, except the files
    to keep."""
    for path in lock.folder.glob("*"):
        if (
            OURS.fullmatch(path.name)
            and path.name.endswith(ending)
            and path.name not in keep
        ):
            lock.check()
            path.unlink()


def split_documents(
    shards: list[Shard], k: int, cut: Callable[[str], int]
) -> Iterator[Chunk]:
    """Yield the chunks of shard k. Those of long documents are cut where `cut` allows it."""
    # the number of a document decides its split: it counts those of earlier shards
    total = sum(shard.documents for shard in shards)
    first = sum(shard.documents for shard in shards[:k])
    for i, document in enumerate(shards[k].read(), first):
        length = count_characters(document)
        # train first: a document is read once more, in order
        at = find_split(i, total, length, shards[k].val_fraction)
        for split, size in enumerate((at, length - at)):
            for j, text in enumerate(read_chunks(document, size, cut)):
                yield Chunk(split, j == 0, text)


def count_characters(document: TextIO) -> int:
    """Return the length of a document, and go back to its start."""
    # in blocks: a document of any length fits into memory
    blocks = iter(lambda: read_block(document, BLOCK), "")
    length = sum(len(block) for block in blocks)
    document.seek(0)
    return length


def find_split(i: int, total: int, length: int, val_fraction: float) -> int:
    """Return how many characters of document i, of a `total`, go to train; the rest goes to val."""
    # few documents, and long ones, are split, each at the same share
    if total < MANY or length > LONG:
        return int(length * (1 - val_fraction))
    # of many short ones, each n-th goes to val as a whole
    is_val = int((i + 1) * val_fraction) > int(i * val_fraction)
    return 0 if is_val else length


def read_chunks(
    document: TextIO, size: int, cut: Callable[[str], int]
) -> Iterator[str]:
    """Yield the next `size` characters of a document, cut where `cut` allows it."""
    rest = ""
    while size > 0:
        block = read_block(document, min(BLOCK, size))
        # the file has become shorter
        if not block:
            return
        size -= len(block)
        # the rest has no place to cut, unless the block completes one at its end
        start = max(len(rest) - 2, 0)
        rest += block
        end = len(rest)
        if size > 0:
            place = cut(rest[start:])
            end = start + place if place else 0
        if end > 0:
            yield rest[:end]
            rest = rest[end:]


class LossCheck:
    """Decode the tokens of a text, to find out whether its tokenizer loses text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.difference = ""
        self.tokens = 0
        self.unknown = 0
        self.unknown_id = None
        self.lengths = None
        # a tokenizer of Hugging Face may normalize a text, or have a token for unknown parts
        if isinstance(tokenizer, HFTokenizer):
            self.unknown_id = tokenizer.unknown_id
        else:
            # the other kinds can only drop bytes: their number shows it, and takes no time
            self.lengths = tokenizer.count_bytes()

    def find_difference(self, text: str, tokens: np.ndarray) -> str:
        """Return where the decoded `tokens` first differ from `text`, or "". Threads call it."""
        # one difference is enough for a note
        if self.difference:
            return ""
        if self.lengths is None:
            # the one method that releases the GIL
            (decoded,) = self.tokenizer.tokenizer.decode_batch(
                [tokens.tolist()], skip_special_tokens=False
            )
        elif self.lengths[tokens].sum() == len(text.encode()):
            return ""
        else:
            decoded = self.tokenizer.decode(tokens.tolist())
        if decoded == text:
            return ""
        # a few characters around the first one that differs
        at = len(os.path.commonprefix([text, decoded]))
        part = slice(max(at - 10, 0), at + 20)
        return f"{text[part]!r} became {decoded[part]!r}"

    def add(self, difference: str, tokens: np.ndarray) -> None:
        """Count a chunk's tokens, and keep the first difference."""
        # chunks come in their order, so the first one is that of the text
        self.difference = self.difference or difference
        self.tokens += len(tokens)
        if self.unknown_id is not None:
            self.unknown += int((tokens == self.unknown_id).sum())

    def warn(self, name: str) -> None:
        """Print a note if text was lost."""
        if self.difference:
            share = self.unknown / max(self.tokens, 1)
            warn(
                f"{name}: this tokenizer loses text: encoded and decoded, {self.difference}; "
                f"{share:.2%} of the tokens stand for unknown text"
            )


def write_tokens(
    paths: list[Path],
    totals: list[int],
    chunks: Iterator[Chunk],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    loss: LossCheck,
) -> None:
    """Encode `chunks` to a train and a val file, by threads, as encoders release the GIL. `totals`
    are the tokens of train and val so far."""

    def encode(chunk: Chunk) -> tuple[np.ndarray, str]:
        # checked here, in the thread
        tokens = tokenizer.encode_to_numpy(chunk.text)
        return tokens.astype(dtype), loss.find_difference(chunk.text, tokens)

    threads = os.cpu_count() or 1
    with (
        open(paths[0], "wb") as train,
        open(paths[1], "wb") as val,
        ThreadPoolExecutor(threads) as pool,
        tqdm(unit="token", unit_scale=True, disable=None) as bar,
    ):
        files = (train, val)
        # a few chunks at a time, so memory is flat
        for batch in iter(lambda: list(islice(chunks, 2 * threads)), []):
            for chunk, (tokens, difference) in zip(batch, pool.map(encode, batch)):
                loss.add(difference, tokens)
                # between two documents
                if chunk.starts and totals[chunk.split] > 0:
                    end = [tokenizer.eot]
                    if tokenizer.eot is None:
                        end = tokenizer.encode("\n")
                    tokens = np.append(np.array(end, dtype), tokens)
                files[chunk.split].write(tokens)
                totals[chunk.split] += len(tokens)
                bar.update(len(tokens))
        # durable before they get their names
        for file in files:
            file.flush()
            os.fsync(file.fileno())


def print_recipes() -> None:
    """Print each recipe in data/ with its description."""
    for name, description in list_recipes().items():
        print(f"{name:<18}{description}")


if __name__ == "__main__":
    # no settings are needed for this
    if sys.argv[1:] == ["--list"]:
        run_or_exit(print_recipes)
        sys.exit()
    CONFIG, OVERRIDDEN, ARGS = command_line(
        PrepareConfig,
        "python prepare.py NAME | PATH... --name=NAME [--key=value ...]\n"
        f"NAME: {' | '.join(list_recipes())}\n"
        "--list describes them, and CONTRIBUTING.md says how to add one",
    )
    # the folder stays locked until the last line is printed
    with ExitStack() as OPENED:
        run_or_exit(lambda: prepare(CONFIG, OVERRIDDEN, ARGS, OPENED))
