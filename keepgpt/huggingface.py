"""The names and sizes of Hugging Face's format, and how weights are read. tools.export writes them.

Weights are also read from checkpoints of keepGPT and nanoGPT, and from the hub: always as plain
dicts of the ModelArgs, the tensors, and a description of the tokens.
"""

import json
import pickle
import re
import reprlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepgpt.config import ARCHITECTURE
from keepgpt.errors import UserError, import_package, warn
from keepgpt.same_tokens import find_difference
from keepgpt.tokenizer import describe_folder, from_meta

Weights = tuple[dict, dict[str, Tensor], dict]  # ModelArgs, state dict, data
# the model_args of nanoGPT
ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# all that a download needs
PATTERNS = [
    "config.json",
    "keepgpt.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "model*.safetensors",
    "model.safetensors.index.json",
]


@dataclass(frozen=True)
class Format:
    """How Hugging Face's config.json and weights describe an architecture of model.py."""

    class_name: str
    # of all names of tensors, except the output layer's
    prefix: str
    # the name of each of our sizes
    sizes: dict[str, str]
    # keys that decide the network, and the values that model.py has
    fixed: dict[str, tuple]
    # keys with our dropout
    dropouts: tuple[str, ...]
    # our sizes that may be absent, and the values to use then
    optional: dict[str, Any]
    # biases in all linear layers and norms
    has_bias: bool = False
    # rotary positions, and an RMSNorm instead of a LayerNorm
    is_rotary: bool = True
    # endings of names: (in, out) there, (out, in) here
    transposed: tuple[str, ...] = ()
    # matrices whose rows llama.cpp wants in the order of interleaved rotary positions
    interleaved: tuple[str, ...] = ()


QWEN3 = Format(
    class_name="Qwen3ForCausalLM",
    prefix="model.",
    sizes={
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "head_dim": "head_dim",
        "n_embd": "hidden_size",
        "n_ff": "intermediate_size",
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
    # of several values, tools.export writes the first
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "tie_word_embeddings": (False, True),
    },
    dropouts=("attention_dropout",),
    optional={"n_kv_head": 0, "norm_eps": 1e-6, "tie_embeddings": False},
)
FORMATS = {
    "gpt2": Format(
        class_name="GPT2LMHeadModel",
        prefix="transformer.",
        sizes={
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_embd": "n_embd",
            "vocab_size": "vocab_size",
            "block_size": "n_positions",
        },
        fixed={
            # five names of one formula
            "activation_function": (
                "gelu_new",
                "gelu_pytorch_tanh",
                "gelu_python_tanh",
                "gelu_fast",
                "gelu_accurate",
            ),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
        },
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        optional={},
        has_bias=True,
        is_rotary=False,
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
    "llama": replace(
        QWEN3,
        class_name="LlamaForCausalLM",
        optional=QWEN3.optional | {"head_dim": 0},
        interleaved=("q_proj.weight", "k_proj.weight"),
    ),
    "qwen3": QWEN3,
}
FIXED_IN_ALL = {
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "is_llama_config": (True,),
    "rope_interleaved": (False,),
}
# of rotary positions; rope_theta is a size
FIXED_IN_ROPE = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1,),
}
# Keys that change no logit of this network: names, dropout and initialization, other heads, dtype,
# outputs, and settings of sampling. sliding_window and max_window_layers count only with
# use_sliding_window.
HARMLESS_TEXT = """
    model_type architectures transformers_version name_or_path _name_or_path _commit_hash
    tokenizer_class task_specific_params finetuning_task unsloth_version unsloth_fixed
    transformers.js_config
    initializer_range attn_pdrop embd_pdrop resid_pdrop attention_dropout n_ctx sliding_window
    max_window_layers gradient_checkpointing
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    classifier_dropout hidden_dropout num_labels _num_labels id2label label2id problem_type
    dtype torch_dtype use_bfloat16 torchscript attn_implementation _attn_implementation
    _attn_implementation_autoset experts_implementation chunk_size_feed_forward
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    tie_encoder_decoder tie_last_hidden_states tf_legacy_loss is_decoder
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix use_cache
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff
    repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens assistant_confidence_threshold assistant_lookbehind num_assistant_tokens
    num_assistant_tokens_schedule target_lookbehind
    """
HARMLESS = set(HARMLESS_TEXT.split())
# keys that have checks of their own
ROTARY_KEYS = {
    "layer_types",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
}


def read_weights(source: str) -> Weights:
    """Return (ModelArgs as a dict, state dict, data) of one of NAMES, another name on the hub, a
    folder in Hugging Face's format, or a checkpoint file of keepGPT or nanoGPT. `data` has the
    source's "tokenizer", the name of its "dataset" (nanoGPT), or nothing. Raises UserError."""
    path = Path(source)
    is_gpt2 = source in NAMES
    # OWNER/NAME also looks like a path
    is_name = re.fullmatch(r"[\w-]+/[\w.-]+(?<!\.pt)", source)
    if is_gpt2:
        path = download(f"openai-community/{source}")
    elif is_name and not path.parent.exists():
        path = download(source)
    if not path.exists():
        raise UserError(
            f"init_from={source}: no such file, folder or model. Try: one of "
            f"{', '.join(NAMES)}, or OWNER/NAME of a Llama or Qwen3"
        )
    if (path / "ckpt.pt").exists():
        # a run has several checkpoints
        raise UserError(
            f"init_from={source}: expected a file, got a run's folder. "
            f"Try: --init_from={path / 'ckpt.pt'}"
        )
    if path.is_dir():
        args, state = read_hugging_face(path)
        # that of GPT-2 needs no files
        data = {"tokenizer": {"kind": "gpt2"}} if is_gpt2 else read_tokenizer(path)
        return args, state, data
    with name_in_errors(path, "a checkpoint of keepGPT or nanoGPT"):
        return read_checkpoint(path)


def read_checkpoint(path: Path) -> Weights:
    """Return (ModelArgs as a dict, state dict, data) of a checkpoint of keepGPT or nanoGPT. Raises
    UserError."""
    saved = load_tensors(path)
    # all of nanoGPT's, whose absence is an error, and those that only keepGPT has
    args = {key: saved["model_args"][key] for key in ARGS} | saved["model_args"]
    unknown = min(args.keys() - {*ARGS, *ARCHITECTURE}, default=None)
    if unknown:
        raise UserError(
            f"{path}: model_args has {unknown}={args[unknown]!r}, which model.py lacks"
        )
    # nanoGPT saves the names of a compiled model
    state = {name.removeprefix("_orig_mod."): t for name, t in saved["model"].items()}
    data = saved.get("data")
    if not data:
        data = {"dataset": saved.get("config", {}).get("dataset")}
    # tools.average records which checkpoints it read
    if "origin" in saved:
        origin = "mean of steps {steps} of {path}".format(**saved["origin"])
        data = data | {"origin": origin}
    return args, drop_masks(state), data


@contextmanager
def name_in_errors(path: Path, expected: str) -> Iterator[None]:
    """Turn any error of reading a file, which may hold anything, into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    # its text would advise to load the file unsafely
    except pickle.UnpicklingError:
        raise UserError(f"{path}: expected only plain values and tensors") from None
    # libraries raise many types
    except Exception as e:
        got = f"{type(e).__name__}: {e}".partition("\n")[0]
        raise UserError(f"{path}: expected {expected}, got {got}") from None


def load_tensors(path: Path) -> Any:
    """Return the content of a .safetensors file or of one that torch.save wrote, after checking the
    CRC32s that torch.load ignores."""
    # its header names what each tensor takes, so a cut is an error there
    if path.suffix == ".safetensors":
        return import_package("safetensors.torch").load_file(path)
    # before PyTorch 1.6 these files were no zip files
    corrupt = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
    if corrupt:
        raise ValueError(f"{corrupt} is corrupt")
    return torch.load(path, map_location="cpu", weights_only=True)


def drop_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without GPT-2's causal masks and Llama's rotary frequencies, which are
    no parameters."""
    masks = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    return {name: tensor for name, tensor in state.items() if not name.endswith(masks)}


def read_hugging_face(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Return (ModelArgs as a dict, state dict) of a folder in Hugging Face's format, for one of
    FORMATS. Weights become float32. Raises UserError."""
    args = read_args(folder)
    form = FORMATS[args["architecture"]]
    state = {}
    for file, expected in find_weight_files(folder).items():
        with name_in_errors(file, "tensors"):
            tensors = load_tensors(file)
            missing = min(expected - tensors.keys(), default=None)
            if missing:
                raise UserError(
                    f"{file}: expected the tensor {missing}, which the index names"
                )
            for name, tensor in drop_masks(tensors).items():
                # quantized weights need their scales, too
                if not tensor.is_floating_point():
                    raise UserError(
                        f"{file}: {name}: expected weights, got {tensor.dtype}"
                    )
                # some programs leave out the prefix
                if name != "lm_head.weight":
                    name = form.prefix + name.removeprefix(form.prefix)
                if name in state:
                    raise UserError(
                        f"{file}: expected each tensor once, got {name} again"
                    )
                if name.endswith(form.transposed):
                    tensor = tensor.t()
                # a copy: the file may be replaced while it is mapped into memory
                state[name] = tensor.to(
                    torch.float32, copy=True, memory_format=torch.contiguous_format
                )
    return args, state


def find_weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the files with a folder's weights, and of each the tensors that an index expects.
    Print a note that names the files left out. Raises UserError."""
    files = sorted(folder.glob("*.safetensors"))
    files += sorted(folder.glob("pytorch_model*.bin"))
    used = {}
    # the order in which Transformers looks for them
    for name in ("model.safetensors", "pytorch_model.bin"):
        used = used or read_index(folder / name)
    if not used and len(files) == 1:
        used = {files[0]: set()}
    if not used:
        # several files without an index may be of several models
        got = ", ".join(file.name for file in files) or "none of them"
        raise UserError(
            f"{folder}: expected model.safetensors, pytorch_model.bin, an index of "
            f"several files, or one file, got {got}"
        )
    # whoever left a file there may have meant it
    ignored = [file.name for file in files if file not in used]
    if ignored:
        names = ", ".join(sorted(file.name for file in used))
        warn(f"{folder}: reading {names}, not {', '.join(ignored)}")
    return used


def read_index(path: Path) -> dict[Path, set[str]]:
    """Return the files that the index of `path` names, and the tensors of each; without an index
    `path` itself, if it exists. Raises UserError for a missing file, unless `path` exists:
    Transformers leaves the index of an earlier save."""
    index = path.with_name(f"{path.name}.index.json")
    files = {}
    if index.exists():
        # name of a tensor -> name of its file
        with name_in_errors(index, "an index of weights"):
            for tensor, name in json.loads(index.read_bytes())["weight_map"].items():
                files.setdefault(path.parent / name, set()).add(tensor)
    missing = [file.name for file in files if not file.exists()]
    if missing and not path.exists():
        raise UserError(f"{index}: expected its file {missing[0]}, got none")
    if missing:
        warn(f"{index}: its file {missing[0]} is missing; reading {path.name}")
    # all weights in one file
    if path.exists() and (missing or not files):
        return {path: set()}
    return files


def read_args(folder: Path) -> dict:
    """Return the ModelArgs, as a dict, of a folder's config.json. Raises UserError for an
    architecture that they can't represent."""
    path = folder / "config.json"
    with name_in_errors(path, f"the sizes of a model of type {' or '.join(FORMATS)}"):
        config = json.loads(path.read_bytes())
        kind = config["model_type"]
        if kind not in FORMATS:
            raise UserError(
                f"{path}: model_type is {kind!r}; expected {' or '.join(FORMATS)}"
            )
        form = FORMATS[kind]
        check_keys(path, config, form)

        # any size that is not optional is an error if it is absent
        args = {"architecture": kind, "bias": form.has_bias, "dropout": 0.0}
        args |= form.optional
        for size, name in form.sizes.items():
            if size not in args or name in config:
                args[size] = config[name]
        if not form.is_rotary:
            n_inner = config.get("n_inner")
            check_value(path, "n_inner", n_inner, (None, 4 * args["n_embd"]))
            return args

        for layer in config.get("layer_types") or []:
            check_value(path, "layer_types", layer, ("full_attention", "attention"))
        # 0 and null follow from other sizes
        args["n_kv_head"] = args["n_kv_head"] or args["n_head"]
        args["head_dim"] = args["head_dim"] or args["n_embd"] // args["n_head"]
        args["norm_eps"] = float(args["norm_eps"])
        args["rope_theta"] = read_rope_theta(path, config)
    return args


def check_keys(path: Path, config: dict, form: Format) -> None:
    """Raise UserError for a key of config.json with a value that model.py lacks, or that may change
    the network in a way that model.py lacks."""
    fixed = form.fixed | FIXED_IN_ALL
    # read_args checks these
    own = ROTARY_KEYS if form.is_rotary else {"n_inner"}
    for key, value in config.items():
        if key in fixed:
            check_value(path, key, value, fixed[key])
        elif key not in HARMLESS | own | set(form.sizes.values()):
            # null stands for a feature that is not used
            check_value(path, key, value, (None,))


def check_value(path: Path, key: str, value: Any, allowed: tuple) -> None:
    """Raise UserError for a value of config.json that is none of those allowed."""
    if value not in allowed:
        raise UserError(
            f"{path}: {key} is {reprlib.repr(value)}, which may change the network; "
            f"only {' or '.join(map(repr, allowed))} can be loaded"
        )


def read_rope_theta(path: Path, config: dict) -> float:
    """Return the base of the rotary positions, which config.json has in one of three places. Raises
    UserError for positions that model.py lacks."""
    thetas = {}
    if config.get("rope_theta") is not None:
        thetas["rope_theta"] = config["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        for key, value in (config.get(name) or {}).items():
            place = f"{name}.{key}"
            if key == "rope_theta":
                thetas[place] = value
            else:
                check_value(path, place, value, FIXED_IN_ROPE.get(key, (None,)))
    # programs differ in which one counts
    theta = next(iter(thetas.values()), 10000.0)
    for place, value in thetas.items():
        check_value(path, place, value, (theta,))
    return float(theta)


def read_tokenizer(folder: Path) -> dict:
    """Return the "tokenizer" of a folder: the one that tools.export wrote into keepgpt.json, else
    that of tokenizer.json, or of vocab.json and merges.txt. Return {} if there is none. Raises
    UserError."""
    data = {}
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        data = {"tokenizer": describe_folder(folder)}
    path = folder / "keepgpt.json"
    if not path.exists():
        return data
    with name_in_errors(path, "a tokenizer"):
        exported = {"tokenizer": json.loads(path.read_bytes())["tokenizer"]}
        difference = ""
        if data:
            difference = find_difference(from_meta(exported), from_meta(data))
    # one of the two was changed after the export
    if difference:
        raise UserError(
            f"{folder}: expected one tokenizer, got {difference} in its tokenizer.json "
            "than in keepgpt.json. Try: remove the file that is out of date"
        )
    return exported


def download(name: str) -> Path:
    """Return the folder of a model on the Hugging Face hub, from the local cache if possible."""
    # a package that only this needs
    snapshot_download = import_package("huggingface_hub").snapshot_download
    # the hub's errors are many, and long
    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as e:
        raise UserError(
            f"{name}: can't be downloaded ({type(e).__name__}). Try: --init_from="
            "FOLDER, one with its config.json and model.safetensors"
        ) from None
