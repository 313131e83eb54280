"""Export weights to other programs: `python -m tools.export --out_dir=out --to=FOLDER`.

FOLDER is a GPT-2, Llama or Qwen3 with its tokenizer in Hugging Face's format, which Transformers,
vLLM and others load without this repository, and weights.pt for PyTorch. With --format=gguf
--to=FILE is one file for llama.cpp and the programs on it.
"""

import json
import reprlib
import shutil
import signal
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import torch
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from keepgpt.checkpoint import Disk, write_bundle
from keepgpt.config import setting
from keepgpt.errors import UserError, import_package
from keepgpt.files import FolderLock
from keepgpt.huggingface import FORMATS
from keepgpt.tokenizer import (
    BYTE_OF,
    CharTokenizer,
    Tokenizer,
    read_parts,
    split_by,
    to_tokenizers,
)
from model import ARCHITECTURES, GPT, ModelArgs
from sample import SampleConfig, load
from tools.common import run_tool

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name for a way to split a text, and that way as a tokenizer.json says it
SPLITS = {"gpt-2": split_by(r50k_pat_str), "qwen2": split_by(QWEN2_PATTERN)}


@dataclass(frozen=True)
class ExportConfig:
    """The settings of tools.export."""

    out_dir: str = setting("out", "folder of the run")
    init_from: str = setting(
        "best",
        "best | resume (the newest) checkpoint of out_dir | path of a checkpoint",
    )
    step: int = setting(
        0, "the checkpoint of this step in out_dir; 0 = as init_from says"
    )
    dataset: str = setting(
        "",
        "the dataset with the vocabulary of a nanoGPT checkpoint, in data/ "
        "or a path; others include their own",
    )
    to: str = setting("", "the new folder to write; of format=gguf the new file")
    format: Literal["hf", "gguf"] = setting(
        "hf",
        "hf: a folder for Transformers, vLLM and others | gguf: a file for llama.cpp",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "of the weights; in gguf of the matrices"
    )


def make_config(args: ModelArgs) -> dict:
    """Return the content of config.json for a model."""
    # what 0 stands for
    follows = {"n_kv_head": args.K, "head_dim": args.D, "n_ff": args.ff_width}
    sizes = vars(args) | follows
    kind = args.architecture
    form = FORMATS[kind]
    # a key with several allowed values gets the first, unless it is a size
    config = {"architectures": [form.class_name], "model_type": kind}
    config |= {key: values[0] for key, values in form.fixed.items()}
    config |= {name: sizes[size] for size, name in form.sizes.items()}
    config |= dict.fromkeys(form.dropouts, args.dropout)
    if not form.is_rotary:
        return config | {"n_inner": None, "n_ctx": args.block_size}
    return config | {
        # read by Transformers 4; the next line by 5
        "rope_theta": args.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
    }


def make_tensors(state: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Return the weights of an architecture with Hugging Face's names and shapes. A bias that
    GPT-2 lacks becomes 0."""
    form = FORMATS[architecture]
    kind = ARCHITECTURES[architecture]
    embeddings = (kind.tokens, kind.positions)
    tensors = {}
    biases = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        # embeddings have none, and vectors that are biases have another name
        if form.has_bias and layer != name and layer not in embeddings:
            biases[f"{layer}.bias"] = tensor.new_zeros(tensor.size(0))
        if name.endswith(form.transposed):
            tensor = tensor.t().contiguous()
        tensors[name] = tensor
    for name, zeros in biases.items():
        tensors.setdefault(name, zeros)
    return tensors


def write_hugging_face(
    folder: Path, model: GPT, vocabulary: Tokenizer, origin: str, dtype: torch.dtype
) -> None:
    """Write all files in Hugging Face's format, and weights.pt. Raises the libraries' errors for a
    full disk."""
    args = model.args
    eot = vocabulary.eot
    # for keepGPT itself: a bundle without a run
    data = {"tokenizer": vocabulary.description}
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    write_bundle(
        {"model": state, "model_args": vars(args), "data": data},
        folder / "weights.pt",
        Disk(),
    )
    # Transformers wants to know which library wrote the tensors
    tensors = make_tensors(state, args.architecture)
    path = folder / "model.safetensors"
    import_package("safetensors.torch").save_file(tensors, path, {"format": "pt"})
    to_tokenizers(vocabulary).save(str(folder / "tokenizer.json"))
    # GPT-2's one special token is the start and the end of a text
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": args.block_size,
        # no token_type_ids: GPT2LMHeadModel would add their embeddings
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    # programs look for the end by its name, too
    if eot is not None:
        name = {i: token for token, i in vocabulary.ids.items()}[eot]
        tokenizer |= {"bos_token": name, "eos_token": name}
    dtype_name = str(dtype).removeprefix("torch.")
    files = {
        "config": make_config(args) | ends | {"dtype": dtype_name},
        "generation_config": ends,
        "tokenizer_config": tokenizer,
        "keepgpt": data | {"origin": origin},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def write_gguf(
    folder: Path, model: GPT, vocabulary: Tokenizer, origin: str, dtype: torch.dtype
) -> None:
    """Write model.gguf, llama.cpp's format, with the tokenizer. Matrices are in `dtype`; vectors
    and positions stay float32, as llama.cpp wants them."""
    gguf = import_package("gguf")
    args = model.args
    form = FORMATS[args.architecture]
    # the writer has a method add_KEY for each key of the format
    writer = gguf.GGUFWriter(folder / "model.gguf", args.architecture)
    keys = {
        "name": origin,
        "context_length": args.block_size,
        "embedding_length": args.n_embd,
        "block_count": args.n_layer,
        "head_count": args.n_head,
        "feed_forward_length": args.ff_width if form.is_rotary else 4 * args.n_embd,
    }
    # GPT-2 lacks these sizes
    if form.is_rotary:
        keys |= {
            "head_count_kv": args.K,
            "key_length": args.D,
            "value_length": args.D,
            "rope_dimension_count": args.D,
            "layer_norm_rms_eps": args.norm_eps,
            "rope_freq_base": args.rope_theta,
            "vocab_size": args.vocab_size,
        }
    else:
        keys["layer_norm_eps"] = form.fixed["layer_norm_epsilon"][0]
    for key, value in (keys | to_gguf_tokenizer(vocabulary)).items():
        getattr(writer, f"add_{key}")(value)

    # Hugging Face's names, which make_tensors gives -> llama.cpp's
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[args.architecture.upper()], args.n_layer
    )
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name, tensor in make_tensors(model.state_dict(), args.architecture).items():
        # (out, in) again: llama.cpp has one layout for all architectures
        if name.endswith(form.transposed):
            tensor = tensor.t()
        if name.endswith(form.interleaved):
            tensor = interleave_heads(tensor, args.D)
        # vectors, and positions
        is_float32 = tensor.dim() < 2 or name == f"{model.positions}.weight"
        kind = gguf.GGMLQuantizationType["F32" if is_float32 else kinds[dtype]]
        content = gguf.quantize(tensor.float().contiguous().numpy(), kind)
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")), content, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave_heads(weight: Tensor, D: int) -> Tensor:
    """Return a matrix (heads * D, C) whose rows i and i + D / 2 of each head, which RoPE rotates
    together, are neighbours: llama.cpp wants a Llama's queries and keys so."""
    halves = weight.unflatten(0, (-1, 2, D // 2))  # (heads, 2, D / 2, C)
    return halves.transpose(1, 2).flatten(0, 2)  # (heads * D, C)


def to_gguf_tokenizer(vocabulary: Tokenizer) -> dict:
    """Return the tokenizer by the keys of gguf. Raises UserError for one that llama.cpp lacks."""
    parts = read_parts(to_tokenizers(vocabulary))
    if parts["model"]["type"] == "WordLevel":
        check_characters(parts)
        return describe_characters(parts["model"]["vocab"])
    check_byte_level(parts, vocabulary.eot)
    return describe_byte_level(parts, vocabulary)


def describe_characters(vocab: dict[str, int]) -> dict:
    """Return a tokenizer of characters by the keys of gguf."""
    # llama.cpp's tokenizer of RWKV takes the longest token that fits, which is here the next
    # character, and is the only one without an end-of-text token; \ is its escape character
    tokens = sorted(vocab, key=vocab.get)
    return {
        "tokenizer_model": "rwkv",
        "token_list": [token.replace("\\", r"\\") for token in tokens],
    }


def describe_byte_level(parts: dict, vocabulary: Tokenizer) -> dict:
    """Return a byte-level BPE, a tokenizer with these `parts`, by the keys of gguf."""
    from gguf import TokenType

    names = {i: name for name, i in parts["model"]["vocab"].items()}
    types = dict.fromkeys(names, TokenType.NORMAL)
    # added tokens may also be in the vocabulary
    for token in parts["added_tokens"]:
        names[token["id"]] = token["content"]
        is_special = token["special"]
        types[token["id"]] = TokenType.CONTROL if is_special else TokenType.USER_DEFINED
    # llama.cpp wants a name for each row of the embedding
    ids = range(vocabulary.vocab_size)
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": next(
            name for name in SPLITS if SPLITS[name] == parts["pre_tokenizer"]
        ),
        "token_list": [names.get(i, f"[unused {i}]") for i in ids],
        "token_types": [types.get(i, TokenType.UNUSED) for i in ids],
        "token_merges": [" ".join(pair) for pair in parts["model"]["merges"]],
        "bos_token_id": vocabulary.eot,
        "eos_token_id": vocabulary.eot,
        "add_bos_token": False,
    }


def check_part(name: str, value: Any, *allowed: Any) -> None:
    """Raise UserError for a part of a tokenizer with a value that llama.cpp can't be told."""
    # such a text may be as long as a vocabulary
    if value not in allowed:
        expected = " or ".join(map(reprlib.repr, allowed))
        raise UserError(
            f"its tokenizer's {name} is {reprlib.repr(value)}; llama.cpp gives the "
            f"same tokens only for {expected}. Try: --format=hf"
        )


def check_characters(parts: dict) -> None:
    """Raise UserError unless each character is a token, and nothing else."""
    vocab = parts["model"]["vocab"]
    example = read_parts(to_tokenizers(CharTokenizer({"kind": "char", "chars": ""})))
    for part in ("normalizer", "pre_tokenizer", "added_tokens", "decoder"):
        check_part(part, parts[part], example[part])
    check_part("model", parts["model"] | {"vocab": {}}, example["model"])
    # a token of several characters could be found where two of one are meant
    for token in vocab:
        check_part("token", token, token[:1])
    check_part("ids", sorted(vocab.values()), list(range(len(vocab))))


def check_byte_level(parts: dict, eot: int | None) -> None:
    """Raise UserError unless llama.cpp's tokenizer `gpt2` does the same as this one."""
    check_part("normalizer", parts["normalizer"], None)
    check_part("pre_tokenizer", parts["pre_tokenizer"], *SPLITS.values())
    check_part("decoder", (parts["decoder"] or {}).get("type"), "ByteLevel")
    check_part("model.type", parts["model"]["type"], "BPE")
    # dropout, byte fallback and others are off
    for key, value in parts["model"].items():
        if key not in ("type", "vocab", "merges"):
            check_part(f"model.{key}", value, None, False)
    # without one of the 256 bytes, the pairs around it would count as neighbors
    check_part(
        "missing bytes", sorted(BYTE_OF.keys() - parts["model"]["vocab"].keys()), []
    )
    check_added_tokens(parts["added_tokens"])
    if eot is None:
        raise UserError(
            "its tokenizer has no end-of-text token, which llama.cpp needs. "
            "Try: --format=hf"
        )


def check_added_tokens(added: list[dict]) -> None:
    """Raise UserError unless llama.cpp finds the same added tokens in a text."""
    for token in added:
        for key in ("single_word", "lstrip", "rstrip"):
            check_part(f"added token {token['content']!r}: {key}", token[key], False)
    # where two overlap, llama.cpp takes the longer one, tokenizers the first one
    names = [token["content"] for token in added]
    for a, b in permutations(names, 2):
        for size in range(1, min(len(a), len(b))):
            if a[-size:] == b[:size]:
                check_part(f"added token {a!r}: its overlap with {b!r}", b[:size], "")


def check_target(config: ExportConfig, args: list[str]) -> Path:
    """Return the path to write. Raises UserError unless it is a new file or an empty folder."""
    if args or not config.to:
        raise UserError(f"expected --to=FOLDER_OR_FILE, got {' '.join(args) or 'none'}")
    target = Path(config.to)
    if not target.exists():
        return target
    # an export replaces nothing
    if config.format == "gguf":
        raise UserError(f"--to={target}: expected a new file")
    if not target.is_dir() or any(target.iterdir()):
        raise UserError(f"--to={target}: expected a new or empty folder")
    return target


def main(config: ExportConfig, args: list[str]) -> None:
    """Write into a temporary folder and rename: the target is complete or absent."""
    target = check_target(config, args)
    model, vocabulary, origin = load(
        SampleConfig(
            out_dir=config.out_dir,
            init_from=config.init_from,
            step=config.step,
            dataset=config.dataset,
        )
    )
    # the lock says whether the folder is that of a killed export
    lock = FolderLock(target.with_name(f"{target.name}.export.tmp"))
    folder = lock.folder / "export"
    written = folder
    write = write_hugging_face
    if config.format == "gguf":
        written = folder / "model.gguf"
        write = write_gguf
    # clean up, as after Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lock.acquire(patience=0)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write(folder, model, vocabulary, origin, getattr(torch, config.dtype))
        # the folder may be another process's by now
        lock.check()
        written.replace(target)
    # libraries raise many types for a full disk
    except Exception as e:
        raise UserError(f"--to={target}: {e}") from e
    finally:
        lock.check()
        shutil.rmtree(lock.folder, ignore_errors=True)
    print(f"{origin} -> {target}")


if __name__ == "__main__":
    run_tool(
        ExportConfig,
        "python -m tools.export --out_dir=out --to=FOLDER [--key=value ...]",
        main,
    )
