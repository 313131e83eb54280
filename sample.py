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
    dataset: str = setting(
        "",
        "dataset with the vocabulary of a nanoGPT checkpoint; others include their own",
    )
    data_dir: str = setting("data", "folder of that dataset, as in train.py")
    start: str = setting(
        "", "the text to continue; FILE:prompt.txt reads it from a file"
    )
    num_samples: int = setting(3, "number of continuations", least=1, below=10_001)
    max_new_tokens: int = setting(
        500, "tokens of each continuation", least=0, below=10_000_001
    )
    temperature: float = setting(
        0.8,
        "0 = the likeliest token; 1 = the model's probabilities; above 1 = more random",
        least=0,
    )
    top_k: int = setting(200, "sample from the k likeliest tokens; 0 = all", least=0)
    top_p: float = setting(
        1.0, "sample from the likeliest tokens with this probability", least=0
    )
    stop_at_eot: bool = setting(False, "end a continuation at the end-of-text token")
    seed: int = setting(1337, "seed of the random numbers", least=0, below=2**63)
    compile: bool = setting(False, "no effect: one token's step is fast without it")
    device: str = setting("auto", "auto | cpu | cuda | cuda:1 | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "dtype of the weights; auto = the fastest"
    )


if __name__ == "__main__":  # before torch is imported
    CONFIG, _, ARGS = command_line(SampleConfig, "python sample.py [--key=value ...]")
    if ARGS:
        exit_with(UserError(f"{ARGS[0]}: expected --key=value. Try: --help"))

import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from keepgpt import tokenizer
from keepgpt.checkpoint import has_run, mention_renamed, read_newest
from keepgpt.dataset import dataset_folder, read_meta
from keepgpt.device import pick_device, pick_dtype
from keepgpt.huggingface import read_weights
from keepgpt.kernels import pack_linear_layers
from keepgpt.same_tokens import check_tokenizer
from keepgpt.signals import raise_interrupts
from keepgpt.text import open_text, read_block
from model import GPT, ModelArgs, crop_weights, generate, load_model

SMALL = (
    4e6  # parameters; below, weights stay in the CPU's cache, where float32 is fastest
)
GPT2 = {"name": "GPT-2", "tokenizer": {"kind": "gpt2"}, "vocab_size": 50257}


def load(config: SampleConfig) -> tuple[GPT, tokenizer.Tokenizer, str]:
    """Return the model, its tokenizer, and a line about where they come from. Raises UserError."""
    folder, origin = Path(config.out_dir), config.init_from
    if origin in ("best", "resume"):
        mention_renamed(folder)
        if not has_run(folder):
            raise UserError(
                f"{folder}: no checkpoint. Try: --out_dir=<folder of a run>, or "
                "first: python train.py config/train_plays_cpu.py"
            )
        bundle = read_newest(folder, prefer_best=origin == "best")
        args, state, data = bundle["model_args"], bundle["model"], bundle["data"]
        origin = f"{folder}: step {bundle['step']}"
        if evaluation := bundle["evaluation"]:
            origin += (
                f", val loss {evaluation['val_loss']:.4f} at step {evaluation['step']}"
            )
    else:
        args, state, data = read_weights(origin)
    ModelArgs(**args)  # raises UserError for impossible sizes
    vocabulary = tokenizer.from_meta(
        find_meta(config, origin, args["vocab_size"], data)
    )
    args, state = crop_weights(args, state, vocabulary.vocab_size, args["block_size"])
    model = load_model(args, state, origin)
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise UserError(f"{origin}: expected finite weights, got NaN or infinity")
    return model.eval(), vocabulary, origin


def find_meta(
    config: SampleConfig, origin: str, vocab_size: int, data: dict[str, Any]
) -> dict[str, Any]:
    """Return the meta of the weights' tokens: of --dataset if given, else the weights' own, else of
    the dataset that nanoGPT's checkpoint names, else GPT-2's if they fit. Raises UserError."""
    if "tokenizer" in data and not config.dataset:
        return data
    meta = GPT2
    if config.dataset:
        meta = read_meta(dataset_folder(config.data_dir, config.dataset))
    elif data.get("dataset"):
        with suppress(UserError):  # it may be on another machine
            meta = read_meta(dataset_folder(config.data_dir, data["dataset"]))
    check_tokenizer(origin, vocab_size, data, meta)
    return meta


def prepare_model(model: GPT, device: torch.device, dtype_name: str = "auto") -> None:
    """Move the model to the device in the given or the fastest dtype, and pack its linear layers
    if that makes it faster."""
    fastest, dtype = pick_dtype("auto", device), pick_dtype(dtype_name, device)
    size = sum(p.numel() for p in model.parameters())
    if dtype_name == "auto" and device.type == "cpu" and size < SMALL:
        dtype = torch.float32
    model.to(device, dtype)
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
    except (
        OSError,
        ValueError,
        UserError,
    ) as e:  # no file, not UTF-8, or without a token
        raise UserError(f"--start: {e}") from None


def main(config: SampleConfig) -> None:
    """Print the first sample token by token, then the others, which are sampled in parallel.
    Raises UserError."""
    device = pick_device(config.device)
    model, vocabulary, origin = load(config)
    prepare_model(model, device, config.dtype)
    prompt = read_prompt(config.start, vocabulary)
    if config.stop_at_eot and vocabulary.eot is None:
        raise UserError("--stop_at_eot=True: this vocabulary has no end-of-text token")
    print(origin, file=sys.stderr)  # stdout is only for the text
    decoders = [vocabulary.make_decoder() for _ in range(config.num_samples)]
    # each decoder reads the prompt first: a token's text may depend on the tokens before it
    texts = ["".join(map(decode, prompt)) for decode in decoders]
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
        new = [
            decode(token) if token is not None else ""
            for decode, token in zip(decoders, tokens)
        ]
        texts = [text + more for text, more in zip(texts, new)]
        print(new[0], end="", flush=True)
    print("", *texts[1:], sep="\n---------------\n")


if __name__ == "__main__":
    raise_interrupts(signal.SIGINT)
    run_or_exit(lambda: main(CONFIG), "a smaller --num_samples")
