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
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from keepgpt.config import command_line, setting
from keepgpt.dataset import (
    SPLITS,
    compute_crc32,
    compute_fingerprint,
    dataset_folder,
    split_files,
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
    list_recipes,
    open_shards,
    read_recipe,
)
from keepgpt.text import Shard, read_block
from keepgpt.tokenizer import Tokenizer, describe_tokenizer, from_meta, train_bpe

BLOCK = 1 << 19  # characters read, and encoded, at a time
BPE_TEXT = 10**9  # characters of the train text that a BPE is trained on
MANY = 100  # documents: from this many on, complete ones go to val
LONG = 1 << 20  # characters: a longer document is split in any case
OURS = re.compile(r"((train|val)(-\d{5,})?\.bin|meta\.json)(\.tmp)?")
# flags that change a recipe
OVERRIDES = ("tokenizer", "val_fraction", "text_key")
Chunk = tuple[
    int, bool, str
]  # (0 for train or 1 for val, a document starts here, text)


@dataclass(frozen=True)
class PrepareConfig:
    """The settings of prepare.py."""

    name: str = setting(
        "", "the dataset goes to data/<name>; a known dataset has its own name"
    )
    tokenizer: str = setting(
        "gpt2",
        "gpt2 | char: every character is a token | bpe:N: at most N tokens, trained on the text "
        "itself | a folder with a tokenizer.json | the name of one of tiktoken's encodings",
    )
    val_fraction: float = setting(
        0.1, "the share of the text for validation", least=1e-9, below=1
    )
    text_key: str = setting(
        "text", "the field of a .jsonl line or a .parquet row with the text"
    )
    data_dir: str = setting("data", "the folder of all datasets, as in train.py")


class LossCheck:
    """Decode the tokens of a text, to find out whether its tokenizer loses text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.difference = tokenizer, ""
        self.tokens = self.unknown = 0
        self.unknown_id = self.lengths = None
        if tokenizer.description["kind"] == "hf":
            model = json.loads(tokenizer.description["json"])["model"]
            self.unknown_id = tokenizer.ids.get(
                model.get("unk_token"), model.get("unk_id")
            )
        else:
            # the other kinds can only drop bytes: their number shows it, and takes no time
            self.lengths = np.array(
                [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
            )

    def find_difference(self, text: str, tokens: np.ndarray) -> str:
        """Return where the decoded `tokens` first differ from `text`, or "". Threads call it."""
        if self.difference:
            return ""
        if self.lengths is not None and self.lengths[tokens].sum() == len(
            text.encode()
        ):
            return ""
        if self.lengths is not None:
            decoded = self.tokenizer.decode(tokens.tolist())
        else:
            # the one method that releases the GIL
            (decoded,) = self.tokenizer.tokenizer.decode_batch(
                [tokens.tolist()], skip_special_tokens=False
            )
        if decoded == text:
            return ""
        pairs = enumerate(zip_longest(text, decoded))
        at = next(i for i, (before, after) in pairs if before != after)
        part = slice(max(at - 10, 0), at + 20)
        return f"{text[part]!r} became {decoded[part]!r}"

    def add(self, difference: str, tokens: np.ndarray) -> None:
        """Count a chunk's tokens, and keep the first difference."""
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

    numbers = () if in_notebook() else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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


def split_documents(
    shards: list[Shard], k: int, cut: Callable[[str], int]
) -> Iterator[Chunk]:
    """Yield the texts of shard k to encode, those of long documents cut where `cut` allows it.

    Few or long documents are split, each at the same point; of many short ones some go to val as a
    whole.
    """
    total, first = (
        sum(shard.documents for shard in part) for part in (shards, shards[:k])
    )
    share = shards[k].val_fraction
    for i, document in enumerate(shards[k].read(), first):
        length = 0
        while block := read_block(document, BLOCK):
            length += len(block)
        document.seek(0)
        at = int(length * (1 - share))
        if total >= MANY and length <= LONG:
            at = 0 if int((i + 1) * share) > int(i * share) else length
        for split, left in ((0, at), (1, length - at)):
            starts, rest = True, ""
            while block := read_block(document, min(BLOCK, left)):
                left -= len(block)
                # the rest has no place to cut, unless the block completes one at its end
                searched = max(len(rest) - 2, 0)
                rest += block
                end = len(rest)
                if left:
                    place = cut(rest[searched:])
                    end = searched + place if place else 0
                if end:
                    yield split, starts, rest[:end]
                    starts, rest = False, rest[end:]


def complete_tokenizer(wanted: dict[str, Any], shards: list[Shard]) -> dict[str, Any]:
    """Return the description of the wanted tokenizer, with the characters of the text, or with a
    byte-pair encoding trained on the first gigabyte that goes to train."""
    chunks = (
        chunk
        for k in range(len(shards))
        for chunk in split_documents(shards, k, Tokenizer.cut)
    )

    def read_train_text() -> Iterator[str]:
        left = BPE_TEXT
        for split, _, text in chunks:
            if split == 0:
                yield text
                left -= len(text)
            if left <= 0:
                return

    if wanted["kind"] == "char":
        chars = set(chain.from_iterable(text for _, _, text in chunks))
        if sum(shard.documents for shard in shards) > 1:
            chars.add("\n")  # ends a document, for lack of a token
        return {"kind": "char", "chars": "".join(sorted(chars))}
    if wanted["kind"] == "bpe" and "tokens" not in wanted:
        return train_bpe(read_train_text(), int(wanted["name"].removeprefix("bpe:")))
    return wanted


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
        tokens = tokenizer.encode_to_numpy(chunk[2])
        return tokens.astype(dtype), loss.find_difference(chunk[2], tokens)

    threads = os.cpu_count() or 1
    with (
        open(paths[0], "wb") as train,
        open(paths[1], "wb") as val,
        ThreadPoolExecutor(threads) as pool,
        tqdm(unit="token", unit_scale=True, disable=None) as bar,
    ):
        while batch := list(islice(chunks, 2 * threads)):  # memory is flat
            for (split, starts, _), (tokens, difference) in zip(
                batch, pool.map(encode, batch)
            ):
                loss.add(difference, tokens)
                if starts and totals[split] > 0:  # a separator
                    end = (
                        tokenizer.encode("\n")
                        if tokenizer.eot is None
                        else [tokenizer.eot]
                    )
                    tokens = np.append(np.array(end, dtype), tokens)
                (train, val)[split].write(tokens)
                totals[split] += len(tokens)
                bar.update(len(tokens))
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())


def read_previous(
    folder: Path, request: dict[str, Any], wanted: dict[str, Any]
) -> dict[str, Any]:
    """Return the meta.json that a preparation of this request has left, {} if a file is missing or
    has changed since."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        same = (
            request.items() <= meta.items()
            and wanted.items() <= meta["tokenizer"].items()
        )
        return meta if same and is_intact(folder, meta) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def is_intact(folder: Path, meta: dict[str, Any]) -> bool:
    """Return True if the .bin files that `meta` lists are those that were written. Raises OSError
    for a missing file, and LookupError for a description without a way to tell."""
    size = np.dtype(meta["dtype"]).itemsize
    for split in SPLITS:
        for file, tokens in split_files(meta, split).items():
            if (folder / file).stat().st_size != size * tokens:
                return False
    # a complete dataset has a fingerprint, an older one no CRC32s
    if (
        "fingerprint" in meta
        and compute_fingerprint(folder, meta) != meta["fingerprint"]
    ):
        return False
    known = meta["crc32"] if "fingerprint" not in meta else meta.get("crc32", {})
    return all(compute_crc32(folder / file) == crc32 for file, crc32 in known.items())


def write_dataset(
    lock: FolderLock, meta: dict[str, Any], shards: list[Shard]
) -> dict[str, Any]:
    """Write the shards that `meta` lacks to the locked folder. Return the complete meta.

    meta.json without a fingerprint lists the complete shards of an unfinished dataset. It is there
    before the first file is replaced: a kill leaves the old dataset, an unfinished one, or the new.
    """
    folder = lock.folder

    def write_meta() -> None:
        write_atomically(
            folder / "meta.json", json.dumps(meta, indent=1).encode(), lock
        )

    tokenizer, dtype, files = from_meta(meta), np.dtype(meta["dtype"]), meta["files"]
    totals = [sum(files[split].values()) for split in SPLITS]
    loss = LossCheck(tokenizer)
    for k in range(len(files["val"]), len(shards)):
        names = [
            f"{split}-{k:05}.bin" if len(shards) > 1 else f"{split}.bin"
            for split in SPLITS
        ]
        lock.check()
        write_tokens(
            [folder / f"{name}.tmp" for name in names],
            totals,
            split_documents(shards, k, tokenizer.cut),
            tokenizer,
            dtype,
            loss,
        )
        if k + 1 == len(shards):
            loss.warn(meta["name"])
            if min(totals) < 2:
                raise UserError(
                    f"{meta['name']}: too short, with {totals[0]} train and "
                    f"{totals[1]} val tokens. Try: more text, or another "
                    "--val_fraction"
                )
        crc32 = {name: compute_crc32(folder / f"{name}.tmp") for name in names}
        write_meta()
        for split, name in zip(SPLITS, names):
            lock.check()
            os.replace(folder / f"{name}.tmp", folder / name)
            files[split][name] = (folder / name).stat().st_size // dtype.itemsize
        sync_folder(folder)
        meta["crc32"] |= crc32
        write_meta()
    remove_ours(lock, keep=["meta.json", *meta["crc32"]])
    meta["tokens"] = dict(zip(SPLITS, totals))
    meta["fingerprint"] = compute_fingerprint(folder, meta)
    if len(shards) == 1:
        del meta["files"]
    write_meta()
    return meta


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


def choose_recipe(
    config: PrepareConfig, overrides: dict[str, Any], args: list[str]
) -> tuple[str, Recipe]:
    """Return the name of the dataset that a command line asks for, and its recipe: that of data/,
    or one for the files and folders `args`. Raises UserError."""
    recipes = list_recipes()
    base = args[0] if len(args) == 1 and args[0] in recipes else ""
    name = config.name or base
    if not args or not name or os.path.basename(name) != name or name[0] == ".":
        raise UserError(
            f"expected {', '.join(recipes)}, or files and folders with --name=NAME, "
            f"a new folder in {config.data_dir}. Try: --help"
        )
    settings = {key: overrides[key] for key in OVERRIDES if key in overrides}
    if name in recipes and (name != base or settings):
        raise UserError(
            f"{name} has its own text, tokenizer and split. Try: --name=NAME for "
            "another dataset"
        )
    recipe = read_recipe(base) if base else Recipe(files=args)
    return name, replace(recipe, **settings)


def prepare(
    config: PrepareConfig,
    overrides: dict[str, Any],
    args: list[str],
    opened: ExitStack,
) -> None:
    """Prepare the dataset that a command line asks for, unless it exists. `opened` gets its lock.
    Raises UserError."""
    started = time.perf_counter()
    name, recipe = choose_recipe(config, overrides, args)
    wanted = describe_tokenizer(recipe.tokenizer)
    source = describe_source(recipe)
    request = {
        "format": 1,
        "name": name,
        "source": source,
        "val_fraction": recipe.val_fraction,
    }
    folder = dataset_folder(config.data_dir, name)
    folder = Path(min(str(folder), os.path.relpath(folder), key=len))

    meta = read_previous(folder, request, wanted)
    if "fingerprint" not in meta:
        lock = FolderLock(folder)
        opened.callback(lock.release)
        lock.acquire(patience=86_400)
        meta = read_previous(
            folder, request, wanted
        )  # another preparation had the lock
    took = "exists already"
    if "fingerprint" not in meta:
        foreign = [path for path in folder.glob("*.bin") if OURS.fullmatch(path.name)]
        if foreign and not (folder / "meta.json").exists():
            raise UserError(
                f"{foreign[0]} has no meta.json: it was not made by prepare.py, or "
                f"meta.json was lost. Try: another --name, or rm -r {folder}"
            )
        shards = open_shards(recipe, source, folder.parent)
        if meta:
            print(
                f"{folder}: {len(meta['files']['val'])} of {len(shards)} shards are "
                "complete; continuing",
                flush=True,
            )
        else:
            meta = request | {"tokenizer": complete_tokenizer(wanted, shards)}
            size = from_meta(meta).vocab_size
            meta |= {
                "vocab_size": size,
                "dtype": "uint16" if size <= 1 << 16 else "uint32",
                "files": {split: {} for split in SPLITS},
                "crc32": {},
            }
        with name_path(folder), clean_up_on_signals(lock):
            meta = write_dataset(lock, meta, shards)
        took = f"took {time.perf_counter() - started:.1f} s"
    tokens, label = meta["tokens"], wanted.get("name", wanted["kind"])
    print(
        f"{folder}: {tokens['train']:,} train and {tokens['val']:,} val tokens of {label}, "
        f"{meta['vocab_size']:,} in the vocabulary: {took}",
        flush=True,
    )


def print_recipes() -> None:
    """Print each recipe in data/ with its description."""
    for name, description in list_recipes().items():
        print(f"{name:<18}{description}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        run_or_exit(print_recipes)
        sys.exit()
    CONFIG, OVERRIDDEN, ARGS = command_line(
        PrepareConfig,
        "python prepare.py NAME | PATH... --name=NAME [--key=value ...]\n"
        f"NAME: {' | '.join(list_recipes())} (--list describes them)",
    )
    with ExitStack() as OPENED:
        run_or_exit(lambda: prepare(CONFIG, OVERRIDDEN, ARGS, OPENED))
