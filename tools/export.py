"""Weights for other programs: `python -m tools.export --out_dir=out --to=FOLDER`.

FOLDER is a GPT-2 in Hugging Face's format, tokenizer included, which Transformers, vLLM and others
load with nothing of this repository installed, and weights.pt, for PyTorch alone.
"""
import json
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configurator import command_line, fail, knob

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) there; (out, in) here


@dataclass(frozen=True)
class ExportConfig:
    """The settings of tools.export."""
    out_dir: str = knob("out", "folder of the run")
    init_from: str = knob("best",
        "best | resume (the newest) of out_dir's bundles | path of a checkpoint")
    to: str = knob("", "the new folder to write")
    dtype: Literal["float32", "bfloat16", "float16"] = knob("float32", "of the weights")


if __name__ == "__main__":  # before torch is loaded
    CONFIG, _, WORDS = command_line(
        ExportConfig, "python -m tools.export --out_dir=out --to=FOLDER [--key=value ...]")
    if WORDS:
        fail(f"{WORDS[0]}: a flag is written --key=value; --help lists the keys")
    if not CONFIG.to:
        fail("--to=FOLDER is missing: where the exported model goes")

import torch
from torch import Tensor

from model import GPT, ModelArgs
from sample import SampleConfig, load
from tokenizer import BPETokenizer, Tokenizer, byte_characters

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
A GPT of {parameters:.1f} million parameters, exported from {origin}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(".") for kind in (AutoModelForCausalLM, AutoTokenizer))
print(tokenizer.decode(model.generate(**tokenizer({start!r}, return_tensors="pt"),
                                      max_new_tokens=100)[0]))
```
"""


def to_hugging_face(state: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """The weights under GPT2LMHeadModel's names and in its shapes; where this model has no bias,
    that one's is 0."""
    theirs = {}
    for name, tensor in state.items():
        theirs[name] = tensor.t().contiguous() if name.endswith(CONV1D) else tensor
        bias = name.removesuffix("weight") + "bias"
        if not args.bias and not name.endswith(("wte.weight", "wpe.weight")):
            theirs[bias] = tensor.new_zeros(tensor.size(0))
    return theirs


def config_json(args: ModelArgs, eot: int | None) -> dict[str, Any]:
    """Transformers' GPT2Config."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
            "n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd, "n_inner": None,
            "n_positions": args.block_size, "n_ctx": args.block_size,
            "vocab_size": args.vocab_size, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "resid_pdrop": args.dropout,
            "embd_pdrop": args.dropout, "attn_pdrop": args.dropout,
            "bos_token_id": eot, "eos_token_id": eot}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a third, in the order in which tiktoken joins them: by the
    rank of what they make."""
    pairs = [(token[:i], token[i:]) for token in ranks for i in range(1, len(token))
             if token[:i] in ranks and token[i:] in ranks]
    return sorted(pairs, key=lambda pair: (ranks[pair[0] + pair[1]], ranks[pair[0]]))


def to_tokenizers(vocabulary: Tokenizer) -> Any:
    """The same tokenizer as one of Hugging Face's tokenizers.Tokenizer, which gives the same ids
    for any text without special tokens in it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    if not isinstance(vocabulary, BPETokenizer):
        made = Tokenizer(models.WordLevel(vocabulary.ids, unk_token=""))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return made
    encoding = vocabulary.encoding
    spelling = {byte: char for char, byte in byte_characters().items()}

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    # special tokens are in the vocabulary too: else they would get the next free ids
    made = Tokenizer(models.BPE({spell(token): rank for token, rank in ranks.items()} | special,
                                [(spell(a), spell(b)) for a, b in merges(ranks)]))
    # its regular expressions are Oniguruma's, where {1,3}+ is not possessive but a repetition
    pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", encoding._pat_str)
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return made


def write(folder: Path, model: GPT, vocabulary: Tokenizer, origin: str, dtype: torch.dtype) -> None:
    """All files of an exported model. Raises OSError."""
    from safetensors.torch import save_file
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_file(to_hugging_face(state, model.args), folder / "model.safetensors", {"format": "pt"})
    special = {"bos_token_id": vocabulary.eot, "eos_token_id": vocabulary.eot}
    config = config_json(model.args, vocabulary.eot) | {
        "dtype": str(dtype).removeprefix("torch.")}
    tokens = {} if vocabulary.eot is None else {"bos_token": "<|endoftext|>",
                                                "eos_token": "<|endoftext|>"}
    for name, content in {
            "config.json": config, "generation_config.json": special,
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast",
                                      "model_max_length": model.args.block_size,
                                      # no token_type_ids: GPT2LMHeadModel would add them up
                                      "model_input_names": ["input_ids", "attention_mask"],
                                      "clean_up_tokenization_spaces": False} | tokens}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    to_tokenizers(vocabulary).save(str(folder / "tokenizer.json"))
    torch.save({"model": state, "model_args": vars(model.args),
                "data": {"tokenizer": vocabulary.description}}, folder / "weights.pt")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    start = vocabulary.decode([0]) if vocabulary.eot is None else "The"
    (folder / "README.md").write_text(
        CARD.format(parameters=parameters, origin=origin, start=start), encoding="utf-8")


def main(config: ExportConfig) -> None:
    """Write beside the folder and rename: it is whole or not there."""
    try:
        import safetensors.torch, tokenizers  # noqa: E401
    except ImportError:
        fail("exporting needs two more packages: pip install safetensors tokenizers")
    folder = Path(config.to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"--to={folder} is there already; give a new folder")
    model, vocabulary, origin = load(SampleConfig(out_dir=config.out_dir,
                                                  init_from=config.init_from))
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary, model, vocabulary, origin, getattr(torch, config.dtype))
        temporary.replace(folder)
    except OSError as e:
        fail(f"{e.filename or folder} can't be written: {(e.strerror or str(e)).lower()}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{origin} -> {folder}: "
          + ", ".join(f"{path.name} {path.stat().st_size / 1e6:,.1f} MB" if
                      path.stat().st_size > 1e5 else path.name for path in sorted(folder.iterdir())))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(CONFIG)
