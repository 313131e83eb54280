"""Export weights to other programs: `python -m tools.export --out_dir=out --to=FOLDER`.

FOLDER is a GPT-2 with its tokenizer in Hugging Face's format, which Transformers, vLLM and others
load without this repository, and weights.pt for PyTorch.
"""
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # from any folder: python PATH/tools/export.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keepgpt.config import command_line, setting
from keepgpt.process import describe, fail

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) there; (out, in) here


@dataclass(frozen=True)
class ExportConfig:
    """The settings of tools.export."""
    out_dir: str = setting("out", "folder of the run")
    init_from: str = setting("best",
        "best | resume (the newest) checkpoint of out_dir | path of a checkpoint")
    dataset: str = setting("",
        "the dataset with the vocabulary of a nanoGPT checkpoint; others include their own")
    data_dir: str = setting("data", "folder of that dataset, as in train.py")
    to: str = setting("", "the new folder to write")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "of the weights")


if __name__ == "__main__":  # before torch is loaded
    CONFIG, _, ARGS = command_line(
        ExportConfig, "python -m tools.export --out_dir=out --to=FOLDER [--key=value ...]")
    if ARGS:
        fail(f"{ARGS[0]}: expected --key=value. Try: --help")
    if not CONFIG.to:
        fail("--to=FOLDER is missing: the new folder to write")

import torch
from torch import Tensor

from keepgpt.checkpoint import Disk, write_bundle
from keepgpt.tokenizer import CharTokenizer, HFTokenizer, Tokenizer
from model import GPT, ModelArgs
from sample import SampleConfig, load

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
A GPT of {parameters:,} parameters and {block_size} positions, exported from {origin}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(".") for kind in (AutoModelForCausalLM, AutoTokenizer))
print(tokenizer.decode(model.generate(**tokenizer({start!r}, return_tensors="pt"),
                                      max_new_tokens={length})[0]))
```
"""


def to_hugging_face(state: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Return the weights with GPT2LMHeadModel's names and shapes; a missing bias becomes 0."""
    exported = {}
    for name, tensor in state.items():
        exported[name] = tensor.t().contiguous() if name.endswith(CONV1D) else tensor
        bias = name.removesuffix("weight") + "bias"
        if not args.bias and not name.endswith(("wte.weight", "wpe.weight")):
            exported[bias] = tensor.new_zeros(tensor.size(0))
    return exported


def gpt2_config(args: ModelArgs) -> dict[str, Any]:
    """Return Transformers' GPT2Config as a dict."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
            "n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd, "n_inner": None,
            "n_positions": args.block_size, "n_ctx": args.block_size,
            "vocab_size": args.vocab_size, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "resid_pdrop": args.dropout,
            "embd_pdrop": args.dropout, "attn_pdrop": args.dropout}


def list_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return all pairs of tokens that join to a token, in tiktoken's order: by the rank of the
    result."""
    pairs = [(token[:i], token[i:]) for token in ranks for i in range(1, len(token))
             if token[:i] in ranks and token[i:] in ranks]
    return sorted(pairs, key=lambda pair: (ranks[pair[0] + pair[1]], ranks[pair[0]]))


def to_tokenizers(vocabulary: Tokenizer) -> Any:
    """Return a tokenizers.Tokenizer with the same ids for any text without special tokens."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    if isinstance(vocabulary, HFTokenizer):
        return tokenizers.Tokenizer.from_str(vocabulary.description["json"])
    if isinstance(vocabulary, CharTokenizer):
        made = tokenizers.Tokenizer(models.WordLevel(vocabulary.ids, unk_token=""))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return made
    ranks = vocabulary.ranks
    # the vocabulary includes special tokens: otherwise they would get new ids
    names = {i: name for name, i in vocabulary.token_ids().items()}
    made = tokenizers.Tokenizer(models.BPE(
        vocabulary.token_ids(),
        [(names[ranks[a]], names[ranks[b]]) for a, b in list_merges(ranks)]))
    # its regular expressions are Oniguruma's, where {1,3}+ is not possessive but a repetition
    pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", vocabulary.pattern)
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(name, normalized=False) for name in vocabulary.special_tokens])
    return made


def json_files(args: ModelArgs, vocabulary: Tokenizer, dtype: torch.dtype
               ) -> dict[str, dict[str, Any]]:
    """Return the JSON files to write next to the weights."""
    eot = vocabulary.eot
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": args.block_size,
                 # no token_type_ids: GPT2LMHeadModel would add their embeddings
                 "model_input_names": ["input_ids", "attention_mask"],
                 "clean_up_tokenization_spaces": False}
    if eot is not None:
        name = {i: token for token, i in vocabulary.token_ids().items()}[eot]
        tokenizer |= {"bos_token": name, "eos_token": name}
    config = gpt2_config(args) | ends | {"dtype": str(dtype).removeprefix("torch.")}
    return {"config.json": config, "generation_config.json": ends,
            "tokenizer_config.json": tokenizer}


def write(folder: Path, model: GPT, vocabulary: Tokenizer, origin: str, dtype: torch.dtype) -> None:
    """Write all files of an exported model. Raises the libraries' errors for a full disk."""
    from safetensors.torch import save_file
    args, data = model.args, {"tokenizer": vocabulary.description}
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    write_bundle({"model": state, "model_args": vars(args), "data": data}, folder / "weights.pt",
                 Disk())
    save_file(to_hugging_face(state, args), folder / "model.safetensors", {"format": "pt"})
    to_tokenizers(vocabulary).save(str(folder / "tokenizer.json"))
    files = json_files(args, vocabulary, dtype) | {"keepgpt.json": data}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(CARD.format(
        parameters=sum(p.numel() for p in model.parameters()), origin=origin,
        block_size=args.block_size, length=min(100, args.block_size // 2),
        start=vocabulary.decode([0]) if vocabulary.eot is None else "The"), encoding="utf-8")


def main(config: ExportConfig) -> None:
    """Write a temporary folder and rename it: the target is complete or absent."""
    if not (find_spec("safetensors") and find_spec("tokenizers")):
        fail("export needs two more packages. Try: pip install safetensors tokenizers")
    folder = Path(config.to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"--to={folder}: expected a new or empty folder")
    model, vocabulary, origin = load(SampleConfig(
        out_dir=config.out_dir, init_from=config.init_from, dataset=config.dataset,
        data_dir=config.data_dir))
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary, model, vocabulary, origin, getattr(torch, config.dtype))
        temporary.replace(folder)
    except Exception as e:  # libraries raise many types for a full disk
        fail(f"--to={folder} can't be written: {describe(e)[0] if isinstance(e, OSError) else e}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    print(f"{origin} -> {folder}: "
          + ", ".join(f"{name} {size / 1e6:,.1f} MB" if size > 1e5 else name
                      for name, size in sizes.items()))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(CONFIG)
    except KeyboardInterrupt:
        sys.exit(130)
