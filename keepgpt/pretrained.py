"""Read weights from Hugging Face folders, the hub, and checkpoints of keepGPT and nanoGPT, as plain
dicts: the ModelArgs, the state dict, and a description of the tokens."""
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
MORE_ARGS = ("architecture", "n_kv_head", "head_dim", "n_ff", "rope_theta", "norm_eps",
             "tie_embeddings")
NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SUPPORTED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
             "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
             "add_cross_attention": False, "tie_word_embeddings": True}


def read_weights(source: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Return (ModelArgs as a dict, state dict, data) of one of NAMES, a folder in Hugging Face's
    format, or a checkpoint file of keepGPT or nanoGPT. `data` has the source's "tokenizer", its
    "token_of_id", the name of its "dataset" (nanoGPT), or nothing. Raises ValueError."""
    if source in NAMES:
        folder = download(f"openai-community/{source}")
        return *read_hugging_face(folder), {"tokenizer": {"kind": "gpt2"}}
    path = Path(source)
    if (path / "ckpt.pt").exists():
        best = path / ("best.pt" if (path / "best.pt").exists() else "ckpt.pt")
        raise ValueError(f"init_from={source}: expected a file, got a run's folder. "
                         f"Try: --init_from={best}")
    if path.is_dir():
        return *read_hugging_face(path), read_tokenizer(path)
    if not path.exists():
        raise ValueError(f"init_from={source}: no such file, folder or model. "
                         f"Try: one of {', '.join(NAMES)}")
    saved = load_tensors(path)
    try:
        args = {key: saved["model_args"][key] for key in ARGS} | {
            key: value for key, value in saved["model_args"].items() if key in MORE_ARGS}
        data = saved.get("data") or {"dataset": saved.get("config", {}).get("dataset")}
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()
                 if not name.endswith((".attn.bias", "lm_head.weight"))}  # mask, twin of wte
    except (LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{source}: expected a checkpoint of keepGPT or nanoGPT: {e}") from None
    return args, state, data


def load_tensors(path: Path) -> Any:
    """Return the content of a .safetensors file or of one that torch.save wrote, after checking the
    CRC32s that torch.load ignores. Raises ValueError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path) and (name := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{name} is corrupt")
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path}: needs one more package. Try: pip install safetensors") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: expected only plain values and tensors") from None
    except Exception as e:  # safetensors and torch.load raise many types
        raise ValueError(f"{path}: can't be read: {str(e).partition(chr(10))[0]}") from None


def read_hugging_face(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (ModelArgs as a dict, state dict) of a GPT-2 in Hugging Face's format. Raises
    ValueError for another architecture."""
    config = read_json(folder / "config.json")
    try:
        args = {key: config[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")} | {
            "block_size": config["n_positions"], "bias": True,
            "dropout": config.get("resid_pdrop", 0.0)}
    except (LookupError, TypeError):
        raise ValueError(f"{folder}/config.json: expected a GPT-2") from None
    supported = SUPPORTED
    if config.get("n_inner") is not None and type(args["n_embd"]) is int:
        supported = SUPPORTED | {"n_inner": 4 * args["n_embd"]}  # the default, if absent
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder}/config.json: {key} is {config[key]!r}; "
                             f"only {value!r} can be loaded")
    state = {}
    # a sharded model's index is not needed: each file has the names of its tensors
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        tensors = load_tensors(file)
        if not (isinstance(tensors, dict) and all(map(torch.is_tensor, tensors.values()))):
            raise ValueError(f"{file}: expected only tensors")
        for name, tensor in tensors.items():
            name = "transformer." + name.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
                continue  # the causal mask, and the twin of wte
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                tensor = tensor.t().contiguous()  # Conv1D has (in, out), Linear (out, in)
            state[name] = tensor.float()
    if not state:
        raise ValueError(f"{folder}: expected *.safetensors or pytorch_model*.bin")
    return args, state


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Return the "tokenizer" that tools.export wrote into a folder, else the "token_of_id" of its
    tokenizer's file, else nothing. Raises ValueError."""
    path = next((path for name in ("keepgpt.json", "tokenizer.json", "vocab.json")
                 if (path := folder / name).exists()), None)
    if not path:
        return {}
    content = read_json(path)
    try:
        if path.name == "keepgpt.json":
            return {"tokenizer": content["tokenizer"]}
        tokens, added = content, []
        if path.name == "tokenizer.json":
            tokens, added = content["model"]["vocab"], content.get("added_tokens", [])
        return {"token_of_id": {i: token for token, i in tokens.items()}
                | {token["id"]: token["content"] for token in added}}
    except (LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: can't be read: {type(e).__name__}: {e}") from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises ValueError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: can't be read: {e}") from None


def download(name: str) -> Path:
    """Return the folder of a model on the Hugging Face hub, from the local cache if possible."""
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except ImportError:
        raise ValueError(f"{name}: needs two more packages. "
                         "Try: pip install huggingface_hub safetensors") from None
    except Exception as e:
        raise ValueError(f"{name}: can't be downloaded ({type(e).__name__}). Try: --init_from="
                         "FOLDER, one with its config.json and model.safetensors") from None


def crop_weights(args: dict[str, Any], state: dict[str, Tensor], vocab_size: int,
                 block_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the same network with a smaller vocabulary and a shorter block."""
    rows = {"transformer.wte.weight": vocab_size, "transformer.wpe.weight": block_size}
    return args | {"vocab_size": vocab_size, "block_size": block_size}, {
        name: tensor[:rows[name]] if name in rows else tensor for name, tensor in state.items()}
