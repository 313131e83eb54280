"""Small tokenizers of the kinds that Hugging Face's folders have, trained on a text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# how Qwen cuts a text into words: contractions, letters, single digits, signs, white space
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOT = "<|endoftext|>"


def train_byte_level(text: str, pattern: str | None = None) -> Tokenizer:
    """Return a BPE over bytes of 500 tokens, of GPT-2's kind or with another pattern."""
    # GPT-2's own pattern is a part of ByteLevel
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            # the end of text is the 500th
            vocab_size=499,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    made.add_special_tokens([AddedToken(EOT, normalized=False)])
    return made


def train_sentencepiece(text: str) -> Tokenizer:
    """Return a tokenizer of Llama 2's kind: `▁` for spaces, bytes for unknown characters, and a
    post-processor that adds <s>."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # a space before the text, as before each word
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            # the space before the text
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.train_from_iterator(
        text.splitlines(),
        trainers.BpeTrainer(
            vocab_size=600,
            show_progress=False,
            special_tokens=[
                "<unk>",
                "<s>",
                *(f"<0x{byte:02X}>" for byte in range(256)),
            ],
        ),
    )
    # the bytes are ordinary tokens
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:2]
    made = Tokenizer.from_str(json.dumps(content))
    made.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


def train_wordpiece(text: str) -> Tokenizer:
    """Return a tokenizer of BERT's kind, with cased letters."""
    # unknown letters become [UNK], and spaces are lost
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        [text],
        trainers.WordPieceTrainer(
            vocab_size=500, show_progress=False, special_tokens=["[UNK]"]
        ),
    )
    return made


def train_unigram(text: str) -> Tokenizer:
    """Return a tokenizer of T5's kind."""
    # tokens with probabilities instead of merges
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        [text],
        trainers.UnigramTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=["<unk>"],
            unk_token="<unk>",
        ),
    )
    return made


def save(
    tokenizer: Tokenizer,
    folder: Path,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Write a folder's tokenizer.json, after a change of its content. Return the folder."""
    folder.mkdir(exist_ok=True)
    content = json.loads(tokenizer.to_str())
    if change:
        change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder
