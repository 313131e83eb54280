"""Read weights from Hugging Face folders, the hub, and checkpoints of keepGPT and nanoGPT, as plain
dicts: the ModelArgs, the state dict, and a description of the tokens."""
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepgpt.config import ARCHITECTURE
from keepgpt.errors import UserError, import_package

ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")  # nanoGPT's
NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TOKENIZERS = ("keepgpt.json", "tokenizer.json", "vocab.json")  # the first one counts
PATTERNS = ["config.json", "tokenizer.json", "model*.safetensors"]
# ours: theirs, and the values of config.json that can be loaded, which are also the defaults
GPT2_ARGS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
             "vocab_size": "vocab_size", "block_size": "n_positions"}
GPT2_SUPPORTED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                  "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                  "add_cross_attention": False, "tie_word_embeddings": True}
QWEN3_ARGS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
              "n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "n_embd": "hidden_size",
              "n_ff": "intermediate_size", "vocab_size": "vocab_size",
              "block_size": "max_position_embeddings"}
QWEN3_SUPPORTED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False,
                   "rope_scaling": None, "rope_parameters": "default"}


def read_weights(source: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Return (ModelArgs as a dict, state dict, data) of one of NAMES, another name on the hub, a
    folder in Hugging Face's format, or a checkpoint file of keepGPT or nanoGPT. `data` has the
    source's "tokenizer", its "token_of_id", the name of its "dataset" (nanoGPT), or nothing. Raises
    UserError."""
    path, gpt2 = Path(source), source in NAMES
    if gpt2 or re.fullmatch(r"[\w-]+/[\w.-]+(?<!\.pt)", source) and not path.parent.exists():
        path = download(f"openai-community/{source}" if gpt2 else source)
    if not path.exists():
        raise UserError(f"init_from={source}: no such file, folder or model. "
                        f"Try: one of {', '.join(NAMES)}, or OWNER/NAME of a Qwen3")
    if (path / "ckpt.pt").exists():
        raise UserError(f"init_from={source}: expected a file, got a run's folder. "
                        f"Try: --init_from={path / 'ckpt.pt'}")
    if path.is_dir():
        data = {"tokenizer": {"kind": "gpt2"}} if gpt2 else read_tokenizer(path)
        return *read_hugging_face(path), data
    with name_in_errors(path, "a checkpoint of keepGPT or nanoGPT"):
        saved = load_tensors(path)
        args = {key: saved["model_args"][key] for key in ARGS}
        args |= {key: value for key, value in saved["model_args"].items() if key in ARCHITECTURE}
        state = {name.removeprefix("_orig_mod."): t for name, t in saved["model"].items()}
        data = saved.get("data") or {"dataset": saved.get("config", {}).get("dataset")}
        return args, drop_copies(args, state), data


@contextmanager
def name_in_errors(path: Path, expected: str) -> Iterator[None]:
    """Turn any error of reading a file, which may hold anything, into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError:  # its text would advise to load it unsafely
        raise UserError(f"{path}: expected only plain values and tensors") from None
    except Exception as e:
        got = f"{type(e).__name__}: {e}".partition("\n")[0]
        raise UserError(f"{path}: expected {expected}, got {got}") from None


def load_tensors(path: Path) -> Any:
    """Return the content of a .safetensors file or of one that torch.save wrote, after checking the
    CRC32s that torch.load ignores."""
    if path.suffix == ".safetensors":
        return import_package("safetensors.torch").load_file(path)
    if zipfile.is_zipfile(path) and (name := zipfile.ZipFile(path).testzip()):
        raise ValueError(f"{name} is corrupt")
    return torch.load(path, map_location="cpu", weights_only=True)


def drop_copies(args: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without causal masks and without the twin of the token embedding."""
    copies = (".attn.bias", ".attn.masked_bias")
    copies += ("lm_head.weight",) if args.get("tie_embeddings", True) else ()
    return {name: tensor for name, tensor in state.items() if not name.endswith(copies)}


def read_hugging_face(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (ModelArgs as a dict, state dict) of a GPT-2 or a dense Qwen3 in Hugging Face's
    format. Weights become float32. Raises UserError."""
    args = read_args(folder)
    state, prefix = {}, "transformer." if args["architecture"] == "gpt2" else "model."
    # a sharded model's index is not needed: each file has the names of its tensors
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        with name_in_errors(file, "tensors"):
            for name, tensor in load_tensors(file).items():
                if name != "lm_head.weight":
                    name = prefix + name.removeprefix(prefix)
                if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                    tensor = tensor.t()  # Conv1D has (in, out), Linear (out, in)
                # a copy: the file may be replaced while it is mapped into memory
                state[name] = tensor.to(torch.float32, copy=True,
                                        memory_format=torch.contiguous_format)
    if not state:
        raise UserError(f"{folder}: expected *.safetensors or pytorch_model*.bin")
    return args, drop_copies(args, state)


def read_args(folder: Path) -> dict[str, Any]:
    """Return the ModelArgs, as a dict, of a folder's config.json. Raises UserError for an
    architecture that they can't represent."""
    path = folder / "config.json"
    with name_in_errors(path, "the sizes of a GPT-2 or Qwen3"):
        config = json.loads(path.read_bytes())
        if (kind := config["model_type"]) not in ("gpt2", "qwen3"):
            raise UserError(f"{path}: model_type is {kind!r}; expected 'gpt2' or 'qwen3'")
        gpt2 = kind == "gpt2"
        names, supported = (GPT2_ARGS, GPT2_SUPPORTED) if gpt2 else (QWEN3_ARGS, QWEN3_SUPPORTED)
        args = {ours: config[theirs] for ours, theirs in names.items()}
        args |= {"architecture": kind, "bias": gpt2, "dropout": 0.0}
        if not gpt2:
            rope = config.get("rope_parameters") or {}
            config["rope_parameters"] = rope.get("rope_type", "default")
            args |= {"norm_eps": config.get("rms_norm_eps", 1e-6),
                     "tie_embeddings": config.get("tie_word_embeddings", False),
                     "rope_theta": rope.get("rope_theta") or config.get("rope_theta", 10000.0)}
        for key, value in supported.items():
            if config.get(key, value) != value:
                raise UserError(f"{path}: {key} is {config[key]!r}; only {value!r} can be loaded")
    return args


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Return the "tokenizer" that tools.export wrote into a folder, else the "token_of_id" of its
    tokenizer's file and, of a tokenizer.json, the "folder". Raises UserError."""
    path = next(filter(Path.exists, (folder / name for name in TOKENIZERS)), None)
    if path is None:
        return {}
    with name_in_errors(path, "a tokenizer"):
        content = json.loads(path.read_bytes())
        if path.name == "keepgpt.json":
            return {"tokenizer": content["tokenizer"]}
        if path.name == "vocab.json":
            return {"token_of_id": {i: token for token, i in content.items()}}
        token_of_id = {i: token for token, i in content["model"]["vocab"].items()}
        token_of_id |= {token["id"]: token["content"] for token in content.get("added_tokens", [])}
        return {"token_of_id": token_of_id, "folder": folder}


def download(name: str) -> Path:
    """Return the folder of a model on the Hugging Face hub, from the local cache if possible."""
    snapshot_download = import_package("huggingface_hub").snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as e:
        raise UserError(f"{name}: can't be downloaded ({type(e).__name__}). Try: --init_from="
                        "FOLDER, one with its config.json and model.safetensors") from None


def crop_weights(args: dict[str, Any], state: dict[str, Tensor], vocab_size: int,
                 block_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the same network with a smaller vocabulary and a shorter block."""
    rows = {"transformer.wte.weight": vocab_size, "transformer.wpe.weight": block_size,
            "model.embed_tokens.weight": vocab_size, "lm_head.weight": vocab_size}
    return args | {"vocab_size": vocab_size, "block_size": block_size}, {
        name: tensor[:rows[name]].clone() if name in rows else tensor
        for name, tensor in state.items()}
