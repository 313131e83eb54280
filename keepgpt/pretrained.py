"""Weights from Hugging Face folders, the hub, and checkpoints of keepGPT and nanoGPT."""
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")


def read_hugging_face(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (ModelArgs as a dict, state dict) of a GPT-2 in Hugging Face's format. Raises
    ValueError for another architecture."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder}/config.json can't be read: {e}") from None
    ours = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False, "tie_word_embeddings": True}
    sizes = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    if not isinstance(config, dict) or any(key not in config for key in sizes):
        raise ValueError(f"{folder}/config.json does not describe a GPT-2")
    if config.get("n_inner") is not None and type(config["n_embd"]) is int:
        ours["n_inner"] = 4 * config["n_embd"]  # absent or null means that
    for key, value in ours.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder}/config.json: {key} is {config[key]!r}; "
                             f"only {value!r} can be loaded")
    args = {key: config[key] for key in sizes} | {"bias": True}
    args |= {"block_size": args.pop("n_positions"), "dropout": config.get("resid_pdrop", 0.0)}
    state = {}
    # a sharded model's index is not needed: each file holds the names of its tensors
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for file in files:
        for name, tensor in load_tensors(file).items():
            name = "transformer." + name.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
                continue  # the causal mask, and the twin of wte
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                # Conv1D keeps (in, out) where Linear keeps (out, in)
                tensor = tensor.t().contiguous()
            state[name] = tensor.float()
    if not state:
        raise ValueError(f"{folder} has no *.safetensors and no pytorch_model*.bin")
    return args, state


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or a .bin file by name. Raises ValueError."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(file)
        tensors = dict(load_intact(file))
        if not all(torch.is_tensor(tensor) for tensor in tensors.values()):
            raise ValueError("it holds more than tensors")
        return tensors
    except ImportError:
        raise ValueError(f"{file} needs one more package: pip install safetensors") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{file} can't be read: it holds more than tensors") from None
    except Exception as e:  # safetensors and torch.load raise many kinds
        raise ValueError(f"{file} can't be read: {str(e).partition(chr(10))[0]}") from None


def load_intact(path: Path) -> Any:
    """torch.load a file of plain values and tensors, after checking the CRC32s that torch.load
    ignores. Raises ValueError for a corrupt file, and whatever torch.load raises."""
    if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
        raise ValueError(f"it is damaged, in {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_data(folder: Path) -> dict[str, Any]:
    """Return what a folder in Hugging Face's format says about its tokens: the "tokenizer" that
    tools.export has described, the "token_of_id" of its tokenizer's file, or nothing. Raises
    ValueError."""
    for name in ("keepgpt.json", "tokenizer.json", "vocab.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if name == "keepgpt.json":
                return {"tokenizer": content["tokenizer"]}
            if name == "vocab.json":
                return {"token_of_id": {i: token for token, i in content.items()}}
            vocabulary = content["model"]["vocab"]
            if isinstance(vocabulary, list):  # a Unigram model's: [token, score], by id
                tokens = {i: token for i, (token, _) in enumerate(vocabulary)}
            else:
                tokens = {i: token for token, i in vocabulary.items()}
            added = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
            return {"token_of_id": tokens | added}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} can't be read: {type(e).__name__}: {e}") from None
    return {}


def crop_weights(args: dict[str, Any], state: dict[str, Tensor], vocab_size: int,
                 block_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the same network for fewer tokens, without the rows that pad its vocabulary, and for
    a shorter block."""
    sizes = {"transformer.wte.weight": vocab_size, "transformer.wpe.weight": block_size}
    state = {name: tensor[:sizes[name]] if name in sizes else tensor
             for name, tensor in state.items()}
    return args | {"vocab_size": vocab_size, "block_size": block_size}, state


def read_weights(source: str) -> tuple[dict, dict[str, Tensor], dict[str, Any]]:
    """Return weights to start from, as (ModelArgs as a dict, state dict, data): gpt2, gpt2-medium, gpt2-large or gpt2-xl; a folder in Hugging Face's
    format; or a checkpoint file of keepGPT or nanoGPT. Returns them with what the source says of
    its data: the "tokenizer", the "token_of_id", the name of the "dataset" (nanoGPT's) or nothing.

    Raises ValueError, with the mend, for anything else.
    """
    if source in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        return *read_hugging_face(download(f"openai-community/{source}")), {
            "tokenizer": {"kind": "gpt2"}}
    path = Path(source)
    if (path / "ckpt.pt").exists():
        best = path / ("best.pt" if (path / "best.pt").exists() else "ckpt.pt")
        raise ValueError(f"init_from={source} is the folder of a run; give {best}")
    if path.is_dir():
        return *read_hugging_face(path), read_data(path)
    if not path.exists():
        raise ValueError(f"init_from={source}: neither a file or folder that is there nor a name "
                         "that is known; --help lists them")
    try:
        saved = load_intact(path)
        args = {key: saved["model_args"][key] for key in ARGS}
        data = saved.get("data") or {"dataset": saved.get("config", {}).get("dataset")}
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()
                 if not name.endswith(".attn.bias")}
    except pickle.UnpicklingError:
        raise ValueError(f"init_from={source} is no checkpoint of keepGPT or nanoGPT: it is not of "
                         "plain values and tensors") from None
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, OSError,
            zipfile.BadZipFile) as e:
        raise ValueError(f"init_from={source} is no checkpoint of keepGPT or nanoGPT: {e}"
                         .splitlines()[0]) from None
    state.pop("lm_head.weight", None)  # the twin of wte
    return args, state, data


def download(name: str) -> Path:
    """The folder of a model on the Hugging Face hub, from the local cache if it is there."""
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except ImportError:
        raise ValueError("GPT-2's weights need two more packages: "
                         "pip install huggingface_hub safetensors") from None
    except Exception as e:
        raise ValueError(f"{name} can't be fetched ({type(e).__name__}); without a network give "
                         "a folder that holds its config.json and model.safetensors: "
                         "--init_from=FOLDER") from None



