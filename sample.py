"""Continue a text with a trained model: `python sample.py --out_dir=out --start="To be"`; --help
lists every setting."""

from dataclasses import dataclass
from typing import Literal

from keepgpt.config import command_line, setting
from keepgpt.errors import UserError, exit_with, run_or_exit


@dataclass(frozen=True)
class SampleConfig:
    """The settings of sample.py."""

    out_dir: str = setting("out", "folder of the run")
    init_from: str = setting(
        "best",
        "best | resume (the newest) checkpoint of out_dir | path of a checkpoint or a Hugging Face "
        "folder | gpt2, gpt2-medium, gpt2-large, gpt2-xl",
    )
    step: int = setting(
        0, "the checkpoint of this step in out_dir; 0 = as init_from says"
    )
    dataset: str = setting(
        "",
        "dataset with the vocabulary of a nanoGPT checkpoint; others include their own",
    )
    data_dir: str = setting("data", "folder of that dataset, as in train.py")
    start: str = setting(
        "", "the text to continue; FILE:prompt.txt reads it from a file"
    )
    num_samples: int = setting(3, "number of continuations", least=1, below=10_001)
    max_new_tokens: int = setting(500, "tokens of each continuation", below=10_000_001)
    temperature: float = setting(
        0.8,
        "0 = the likeliest token; 1 = the model's probabilities; above 1 = more random",
    )
    top_k: int = setting(200, "sample from the k likeliest tokens; 0 = all")
    top_p: float = setting(
        1.0, "sample from the likeliest tokens with this probability"
    )
    stop_at_eot: bool = setting(False, "end a continuation at the end-of-text token")
    seed: int = setting(1337, "seed of the random numbers", below=2**63)
    compile: bool = setting(False, "no effect: one token's step is fast without it")
    device: str = setting("auto", "auto | cpu | cuda | cuda:1 | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "dtype of the weights; auto = the fastest"
    )


# before torch is imported: --help and mistakes are answered at once
if __name__ == "__main__":
    CONFIG, _, ARGS = command_line(SampleConfig, "python sample.py [--key=value ...]")
    if ARGS:
        exit_with(UserError(f"{ARGS[0]}: expected --key=value. Try: --help"))

import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch

from keepgpt import tokenizer
from keepgpt.checkpoint import find_bundle, has_run, mention_renamed
from keepgpt.dataset import GPT2_DATA, Meta, dataset_folder, read_meta
from keepgpt.device import pick_device, pick_dtype
from keepgpt.huggingface import read_weights
from keepgpt.kernels import pack_linear_layers
from keepgpt.same_tokens import check_tokenizer
from keepgpt.signals import raise_interrupts
from keepgpt.text import open_text, read_block
from model import GPT, ModelArgs, crop_weights, generate, load_model

# parameters; the weights of fewer stay in a CPU's cache, where float32 is fastest
SMALL = 4e6


def load(config: SampleConfig) -> tuple[GPT, tokenizer.Tokenizer, str]:
    """Return the model, its tokenizer, and a line about where they come from. Raises UserError."""
    folder = Path(config.out_dir)
    origin = config.init_from
    if origin in ("best", "resume"):
        mention_renamed(folder)
        if not has_run(folder):
            raise UserError(
                f"{folder}: no checkpoint. Try: --out_dir=<folder of a run>, or "
                "first: python train.py config/train_plays_cpu.py"
            )
        _, bundle = find_bundle(folder, config.step, prefer_best=origin == "best")
        args = bundle["model_args"]
        state = bundle["model"]
        data = bundle["data"]
        origin = f"{folder}: step {bundle['step']}"
        # a run may have stopped before its first evaluation
        evaluation = bundle["evaluation"]
        if evaluation:
            origin += (
                f", val loss {evaluation['val_loss']:.4f} at step {evaluation['step']}"
            )
    elif config.step:
        raise UserError(f"step={config.step} needs --out_dir, not --init_from={origin}")
    else:
        args, state, data = read_weights(origin)
        # an average of checkpoints
        if "origin" in data:
            origin += f": {data['origin']}"

    # raises UserError for impossible sizes
    ModelArgs(**args)
    meta = find_meta(config, origin, args["vocab_size"], data)
    vocabulary = tokenizer.from_meta(meta)
    # without the rows that pad a vocabulary: they would be sampled
    args, state = crop_weights(args, state, vocabulary.vocab_size, args["block_size"])
    model = load_model(args, state, origin)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{origin}: expected finite weights, got NaN or infinity")
    return model.eval(), vocabulary, origin


def find_meta(config: SampleConfig, origin: str, vocab_size: int, data: Meta) -> Meta:
    """Return the meta of the weights' tokens: that of --dataset, else the weights' own, else of the
    dataset that nanoGPT's checkpoint names, else GPT-2's if they fit. Raises UserError."""
    if "tokenizer" in data and not config.dataset:
        return data
    meta = GPT2_DATA | {"name": "GPT-2"}
    if config.dataset:
        meta = read_meta(dataset_folder(config.data_dir, config.dataset))
    elif data.get("dataset"):
        # it may be on another machine
        with suppress(UserError):
            meta = read_meta(dataset_folder(config.data_dir, data["dataset"]))
    # another vocabulary would give a text, but nonsense
    check_tokenizer(origin, vocab_size, data, meta)
    return meta


def prepare_model(model: GPT, device: torch.device, dtype_name: str = "auto") -> None:
    """Move the model to the device in the dtype of that name, and pack its linear layers if that
    makes it faster."""
    fastest = pick_dtype("auto", device)
    dtype = pick_dtype(dtype_name, device)
    size = sum(p.numel() for p in model.parameters())
    if dtype_name == "auto" and device.type == "cpu" and size < SMALL:
        dtype = torch.float32
    model.to(device, dtype)
    # packed layers need instructions for bfloat16
    if device.type == "cpu" and dtype == fastest == torch.bfloat16:
        pack_linear_layers(model)


def read_prompt(start: str, vocabulary: tokenizer.Tokenizer) -> list[int]:
    """Return the tokens to continue; for an empty text the end-of-text token, or token 0. Raises
    UserError."""
    try:
        if start.startswith("FILE:"):
            # as prepare.py reads it: \n for each line end, without a byte-order mark
            start = read_block(open_text(start.removeprefix("FILE:")), -1)
        return vocabulary.encode(start) or [vocabulary.eot or 0]
    # no file, not UTF-8, or a character without a token
    except (OSError, ValueError, UserError) as e:
        raise UserError(f"--start: {e}") from None


def main(config: SampleConfig) -> None:
    """Print the first sample token by token, then the others, which are sampled in parallel.
    Raises UserError."""
    # the device first: a wrong name is noticed before the weights are read
    device = pick_device(config.device)
    model, vocabulary, origin = load(config)
    prepare_model(model, device, config.dtype)
    prompt = read_prompt(config.start, vocabulary)
    # it would stop nowhere
    if config.stop_at_eot and vocabulary.eot is None:
        raise UserError("--stop_at_eot=True: this vocabulary has no end-of-text token")
    # stdout is only for the text
    print(origin, file=sys.stderr)
    # each decoder reads the prompt first: a token's text may depend on the tokens before it
    decoders = [vocabulary.make_decoder() for _ in range(config.num_samples)]
    texts = ["".join(map(decode, prompt)) for decode in decoders]
    # without a start, the prompt is a token that nobody wrote
    if not config.start:
        texts = [""] * config.num_samples

    print(texts[0], end="", flush=True)
    for tokens in generate(
        model,
        [prompt] * config.num_samples,
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        vocabulary.eot if config.stop_at_eot else None,
        config.seed,
    ):
        # None: that sample has ended
        for i, token in enumerate(tokens):
            new = "" if token is None else decoders[i](token)
            texts[i] += new
            # only the first one can be shown while it grows
            if i == 0:
                print(new, end="", flush=True)
    print("", *texts[1:], sep="\n---------------\n")


if __name__ == "__main__":
    raise_interrupts(signal.SIGINT)
    run_or_exit(lambda: main(CONFIG), "a smaller --num_samples")
