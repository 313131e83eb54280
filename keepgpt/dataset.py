"""Describe a prepared dataset: meta.json, or what stands in for it beside nanoGPT's files."""

import hashlib
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from keepgpt.errors import UserError, warn

# the description of a dataset: the content of meta.json
Meta = dict[str, Any]
SPLITS = ("train", "val")
META_TYPES = {
    "name": str,
    "tokenizer": dict,
    "vocab_size": int,
    "dtype": str,
    "tokens": dict,
    "fingerprint": str,
}
# of a dataset in GPT-2's tokens from another program
GPT2_DATA = {
    "tokenizer": {"kind": "gpt2"},
    "vocab_size": 50257,
    "dtype": "uint16",
}
# two descriptions with the same values here are of the same tokens
IDENTITY = ("fingerprint", "tokenizer", "vocab_size", "dtype", "tokens")
# tokens of a .bin file without meta.json that identify it
FIRST = 1 << 19
# bytes of a .bin file with a CRC32 of their own; Linux reads that many ahead
BLOCK = 1 << 17
# of the shards of llm.c and modded-nanogpt: bytes of the header, and the number that starts it
SHARD_HEADER = 1024
SHARD_MAGIC = 20240520


class BadData(UserError):
    """A dataset that is missing, corrupt or too small; the text says how to fix it."""


def dataset_folder(data_dir: str, dataset: str) -> Path:
    """Return a dataset's folder; a relative data_dir starts at the folder of the scripts."""
    return Path(__file__).parents[1] / data_dir / dataset


def read_meta(folder: Path) -> Meta:
    """Return the description of the dataset in `folder`: prepare.py's meta.json, or one made for
    a dataset that nanoGPT prepared. Raises BadData."""
    # other programs write no meta.json
    path = folder / "meta.json"
    if not path.exists():
        if (folder / "train.bin").exists():
            return describe_nanogpt_data(folder)
        if any(folder.glob("*_train_*.bin")) or any(folder.glob("*_val_*.bin")):
            return describe_shards(folder)
        raise BadData(
            f"no prepared dataset in {folder}. Try: python prepare.py {folder.name}"
        )
    try:
        meta = json.loads(path.read_bytes())
        check_meta(meta)
        # the folder may have been renamed
        return meta | {"name": folder.name}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise BadData(
            f"{path}: corrupt or unfinished ({e!r}). Try: prepare.py again"
        ) from None


def check_meta(meta: Meta) -> None:
    """Raise ValueError, LookupError, TypeError or AttributeError unless `meta` is complete."""
    # a preparation writes the fingerprint last
    wrong = [key for key in META_TYPES if type(meta.get(key)) is not META_TYPES[key]]
    if wrong or meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"{', '.join(wrong) or 'dtype'} missing or wrong")
    # numbers of tokens, and texts
    for split in SPLITS:
        sum([meta["tokens"][split], *split_files(meta, split).values()])
    "".join(meta.get("crc32", {}).values())


def check_identity(folder: Path | str, meta: Meta, saved: Meta) -> None:
    """Raise BadData unless the data called `folder` has the tokens of the description `saved`."""
    # its name and source may differ
    if all(meta[key] == saved[key] for key in IDENTITY):
        return
    # of a mixture, the sources that the run has not seen
    seen = {part["fingerprint"] for part in saved.get("sources", ())}
    parts = meta.get("sources", ())
    new = [part["name"] for part in parts if part["fingerprint"] not in seen]
    raise BadData(
        f"{folder}: not the {saved['name']} that this run was trained on: other "
        f"{', '.join(new) or 'tokens or weights'}. Try: the same data again, or this one in "
        f"another run: --dataset={folder} --init_from=branch:<this run's folder> "
        "--out_dir=<new folder>"
    )


def split_files(meta: Meta, split: str) -> dict[str, int]:
    """Return the .bin files of a split, in order, with the number of tokens in each."""
    # a dataset of several shards
    if "files" in meta:
        return meta["files"][split]
    return {f"{split}.bin": meta["tokens"][split]}


def compute_crc32(path: Path) -> str:
    """Return the CRC32 of each BLOCK bytes of a file, in 8 hexadecimal digits. Raises OSError."""
    # a block at a time, so memory is flat
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(BLOCK), b"")
        return "".join(f"{zlib.crc32(block):08x}" for block in blocks)


def compute_fingerprint(folder: Path, meta: Meta) -> str:
    """Return the sha256 of the tokenizer's description, the token counts (as JSON with sorted keys)
    and the bytes of train and val. Raises OSError."""
    # the files of shards count as one: the same tokens have the same fingerprint
    totals = [meta["tokens"][split] for split in SPLITS]
    described = json.dumps([meta["tokenizer"], totals], sort_keys=True)
    digest = hashlib.sha256(described.encode())
    for split in SPLITS:
        for name in split_files(meta, split):
            with open(folder / name, "rb") as file:
                # adds to the digest so far
                hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def read_crc32(folder: Path, meta: Meta, saved: Meta) -> dict[str, str]:
    """Return the CRC32s of each .bin file, see `compute_crc32`: those of meta.json, or of the
    description `saved` in a checkpoint.

    Neither has any at the first start on a dataset of nanoGPT, or of a prepare.py before it wrote
    them. Then all files are read once. Raises BadData if they are not those that prepare.py wrote.
    """
    files = [name for split in SPLITS for name in split_files(meta, split)]
    for description in (meta, saved):
        crc32 = description.get("crc32", {})
        if set(files) == crc32.keys():
            return crc32
    # it may take minutes
    gigabytes = sum((folder / name).stat().st_size for name in files) / 1e9
    if gigabytes > 1:
        warn(
            f"{folder}: no checksums yet; reading its {gigabytes:.1f} GB once to compute them"
        )
    # nanoGPT's have no source, and no fingerprint of all their bytes
    if "source" in meta and compute_fingerprint(folder, meta) != meta["fingerprint"]:
        raise BadData(
            f"{folder}: changed since it was prepared: its fingerprint differs. "
            "Try: prepare.py again"
        )
    return {name: compute_crc32(folder / name) for name in files}


def describe_nanogpt_data(folder: Path) -> Meta:
    """Return the description of a dataset that nanoGPT prepared: characters if it has a meta.pkl,
    else GPT-2's tokens. Raises BadData."""
    digest = hashlib.sha256()
    tokens = {}
    largest = 0
    for split in SPLITS:
        path = folder / f"{split}.bin"
        try:
            size = path.stat().st_size
            ids = np.fromfile(path, "<u2", FIRST)
        except OSError as e:
            raise BadData(
                f"{path}: {e.strerror.lower()}. Try: prepare it again"
            ) from None
        # its size and first tokens identify a file of any size without a long wait
        digest.update(f"{split} {size}".encode() + ids.tobytes())
        tokens[split] = size // 2
        largest = max(largest, ids.max(initial=0))

    # nanoGPT has these two kinds; only that of characters leaves a file
    kind = {}
    if (folder / "meta.pkl").exists():
        chars = read_meta_pkl(folder / "meta.pkl")
        kind["tokenizer"] = {"kind": "char", "chars": chars}
        kind["vocab_size"] = len(chars)
        digest.update(chars.encode())
    # characters whose meta.pkl was lost
    elif largest < 256:
        raise BadData(
            f"{folder}: expected GPT-2's tokens, got ids below 256. Try: prepare again"
        )
    else:
        warn(f"{folder}: no meta.json or meta.pkl; reading its tokens as GPT-2's")
    return {
        **GPT2_DATA,
        **kind,
        "name": folder.name,
        "tokens": tokens,
        "fingerprint": digest.hexdigest(),
    }


def describe_shards(folder: Path) -> Meta:
    """Return the description of a folder with the shards of llm.c or modded-nanogpt,
    NAME_train_NUMBER.bin and NAME_val_NUMBER.bin, in GPT-2's tokens. Raises BadData."""
    digest = hashlib.sha256()
    # split -> name of a file -> its tokens
    files = {}
    for split in SPLITS:
        files[split] = {}
        for path in sorted(folder.glob(f"*_{split}_*.bin")):
            files[split][path.name] = read_shard_header(path)
            # its size and first tokens identify a shard without a long wait
            with open(path, "rb") as file:
                digest.update(path.name.encode() + file.read(BLOCK))
        if not files[split]:
            raise BadData(
                f"{folder}: no file *_{split}_*.bin. Try: download the shards of both splits"
            )
    return {
        **GPT2_DATA,
        "name": folder.name,
        "tokens": {split: sum(files[split].values()) for split in SPLITS},
        "files": files,
        "header": SHARD_HEADER,
        "fingerprint": digest.hexdigest(),
    }


def read_shard_header(path: Path) -> int:
    """Return the number of tokens of a shard by its header: 256 int32, which start with
    SHARD_MAGIC, the version and that number. Raises BadData unless the file has that size."""
    try:
        header = np.fromfile(path, "<i4", SHARD_HEADER // 4)
        size = path.stat().st_size
    except OSError as e:
        raise BadData(f"{path}: {e.strerror.lower()}. Try: download it again") from None
    if size >= 8 and header[:2].tolist() != [SHARD_MAGIC, 1]:
        raise BadData(
            f"{path}: expected a header of llm.c's shards with 16 bits per token ({SHARD_MAGIC}, "
            f"1), got {header[:2].tolist()}. Try: shards in GPT-2's tokens, or download it again"
        )
    # a file that ends here has no number
    tokens = sum(header[2:3].tolist())
    expected = SHARD_HEADER + 2 * tokens
    if size != expected:
        raise BadData(
            f"{path}: expected {expected:,} bytes for the {tokens:,} tokens of its header, got "
            f"{size:,}. Try: remove it, and download it again"
        )
    return tokens


class PlainUnpickler(pickle.Unpickler):
    """Unpickle dicts, lists, strings and numbers, and refuse to import anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it imports {module}.{name}")


def read_meta_pkl(path: Path) -> str:
    """Return the characters of nanoGPT's meta.pkl in the order of their ids. Raises BadData."""
    try:
        with open(path, "rb") as file:
            # id -> character
            itos = PlainUnpickler(file).load()["itos"]
        chars = "".join(itos[i] for i in range(len(itos)))
        # one character for each id, and none twice
        if not len(set(chars)) == len(chars) == len(itos):
            raise ValueError("its itos does not map ids to different characters")
        return chars
    except Exception as e:  # malformed pickles raise nearly anything
        raise BadData(
            f"{path} is not nanoGPT's vocabulary ({e!r}). Try: prepare.py"
        ) from None
