"""Continue text with a trained model: `python sample.py --out_dir=out --start="To be"`; --help
lists every key."""
from dataclasses import dataclass
from typing import Literal

from keepgpt.config import command_line, knob
from keepgpt.process import fail, leave_closed_output


@dataclass(frozen=True)
class SampleConfig:
    """The settings of sample.py."""
    out_dir: str = knob("out", "folder of the run")
    init_from: str = knob("best",
        "best | resume (the newest) of out_dir's bundles | path of a checkpoint or a "
        "Hugging Face folder | gpt2, gpt2-medium, gpt2-large, gpt2-xl")
    dataset: str = knob("",
        "the dataset whose vocabulary a checkpoint of nanoGPT has; others know their own")
    data_dir: str = knob("data", "the folder of that dataset, as in train.py")
    start: str = knob("", "the text to continue; FILE:prompt.txt reads it from a file")
    num_samples: int = knob(3, "how many continuations", least=1, below=10_001)
    max_new_tokens: int = knob(500, "length of each", least=0, below=10_000_001)
    temperature: float = knob(0.8,
        "below 1 plainer, above 1 wilder; 0 = always the likeliest token", least=0)
    top_k: int = knob(200, "draw among so many of the likeliest tokens; 0 = all", least=0)
    top_p: float = knob(1.0, "draw among the likeliest tokens that hold this probability", least=0)
    stop_at_eot: bool = knob(False, "end a sample at the end-of-text token")
    seed: int = knob(1337, "another seed, another text", least=0, below=2**63)
    device: str = knob("auto", "auto | cpu | cuda | cuda:1 | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto",
        "of the weights: auto = what is fast")
    compile: bool = knob(False, "nanoGPT's; changes nothing here")


if __name__ == "__main__":  # before torch is loaded
    CONFIG, _, WORDS = command_line(SampleConfig, "python sample.py [--key=value ...]")
    if WORDS:
        fail(f"{WORDS[0]}: a flag is written --key=value; --help lists the keys")

import codecs
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from keepgpt import tokenizer
from keepgpt.checkpoint import BadBundle, best_bundle, find_foreign, has_run, newest_bundle
from keepgpt.distributed import pick_device, pick_dtype
from keepgpt.kernels import pack
from keepgpt.loader import BadData, dataset_folder, read_meta
from keepgpt.pretrained import crop_weights, read_weights
from keepgpt.process import host_memory
from model import GPT, ModelArgs, generate, load_model

SMALL = 4e6  # fewer parameters stay in the cache, where products of one row are fast in float32


def load(config: SampleConfig) -> tuple[GPT, tokenizer.Tokenizer, str]:
    """The model, its tokenizer, and where they come from."""
    folder, origin = Path(config.out_dir), config.init_from
    if origin in ("best", "resume") and not has_run(folder):
        fail(f"there is no checkpoint in {folder}. Try: --out_dir=<the folder of a run>, or first: "
             "python train.py config/train_plays_cpu.py")
    if origin in ("best", "resume") and (foreign := find_foreign(folder)):
        origin = str(foreign)
    try:
        if origin in ("best", "resume"):
            bundle = best_bundle(folder) if origin == "best" else newest_bundle(folder)
            args, state, data = bundle["model_args"], bundle["model"], bundle["data"]
            origin = f"{folder}: step {bundle['step']}" + describe_loss(bundle)
        else:
            args, state, data = read_weights(origin)
        vocab_size, block_size = (sizes := ModelArgs(**args)).vocab_size, sizes.block_size
    except (BadBundle, TypeError, ValueError) as e:
        fail(str(e))
    vocabulary = tokenizer.from_meta(find_meta(config, origin, vocab_size, data))
    try:
        model = load_model(*crop_weights(args, state, vocabulary.vocab_size, block_size))
    except ValueError as e:
        fail(f"{origin}: {e}")
    return model.eval(), vocabulary, origin


def describe_loss(bundle: dict[str, Any]) -> str:
    """Return the last validation loss, with the step that it is from if that is an older one."""
    evaluation = bundle["evaluation"]
    if "val_loss" not in evaluation:
        return ", not evaluated yet"
    older = f" at step {evaluation['step']}" * (evaluation["step"] != bundle["step"])
    return f", val loss {evaluation['val_loss']:.4f}" + older


def find_meta(config: SampleConfig, origin: str, vocab_size: int, data: dict[str, Any]
              ) -> dict[str, Any]:
    """Return a description of the tokens that the weights of `origin` know: its own, unless
    --dataset is given, else that of the dataset that nanoGPT's checkpoint names, else GPT-2's."""
    if "tokenizer" in data and not config.dataset:
        return data
    meta = {"name": "GPT-2", "tokenizer": {"kind": "gpt2"}, "vocab_size": 50257}
    try:
        if config.dataset:
            meta = read_meta(dataset_folder(config.data_dir, config.dataset))
        elif data.get("dataset"):
            with suppress(BadData):  # it need not be on this machine
                meta = read_meta(dataset_folder(config.data_dir, data["dataset"]))
        tokenizer.check_tokenizer(origin, vocab_size, data, meta)
    except BadData as e:
        fail(str(e))
    except ValueError as e:
        fail(f"{e}. Try: --dataset=<the dataset that these weights were trained on>")
    return meta


def make_fast(model: GPT, dtype_name: str, device: torch.device) -> None:
    """Move the model to the device, in the dtype that was asked for or the one that is fast."""
    fast, dtype = pick_dtype("auto", device), pick_dtype(dtype_name, device)
    size = sum(p.numel() for p in model.parameters())
    if dtype_name == "auto" and device.type == "cpu" and size < SMALL:
        dtype = torch.float32
    model.to(device, dtype)
    if device.type == "cpu" and dtype == fast == torch.bfloat16:
        pack(model)


def read_prompt(start: str, vocabulary: tokenizer.Tokenizer) -> list[int]:
    """The tokens to continue; for an empty text the end-of-text token, or the first character there
    is."""
    try:
        if start.startswith("FILE:"):
            start = Path(start.removeprefix("FILE:")).read_bytes().decode()
        return vocabulary.encode(start) or [vocabulary.eot or 0]
    except OSError as e:
        fail(f"--start={start}: {e.strerror.lower()}")
    except ValueError as e:  # a character that the vocabulary lacks, or a file that is not UTF-8
        fail(f"--start: {e}")


@torch.inference_mode()
def main(config: SampleConfig) -> None:
    """Show the first sample as it is made, then the others, which were made beside it."""
    device = pick_device(config.device)
    model, vocabulary, origin = load(config)
    make_fast(model, config.dtype, device)
    prompt = read_prompt(config.start, vocabulary)
    if config.stop_at_eot and vocabulary.eot is None:
        fail("--stop_at_eot=True: the vocabulary of this model has no end-of-text token")
    tokens = config.num_samples * (len(prompt) + config.max_new_tokens)
    cache = config.num_samples * model.args.n_layer * model.args.block_size * model.args.n_embd
    if 8 * (tokens + cache) > host_memory():
        fail(f"num_samples={config.num_samples:,} of {config.max_new_tokens:,} tokens need "
             f"{8 * (tokens + cache) / 1e9:,.0f} GB, and this machine has "
             f"{host_memory() / 1e9:,.0f}. Try: fewer --num_samples")
    print(origin, file=sys.stderr)  # stdout is for the text alone
    samples = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(config.num_samples)]
    texts = [vocabulary.decode(prompt) if config.start else ""] * config.num_samples
    print(texts[0], end="", flush=True)
    for new in generate(model, [prompt] * config.num_samples, config.max_new_tokens,
                        config.temperature, config.top_k, config.top_p,
                        vocabulary.eot if config.stop_at_eot else None, config.seed,
                        record=device.type == "cuda"):
        for i, token in enumerate(new):
            if token is not None:
                # a character may be several tokens
                piece = samples[i].decode(vocabulary.token_bytes(token))
                texts[i] += piece
                if i == 0:
                    print(piece, end="", flush=True)
    for text in texts[1:]:
        print("\n---------------\n" + text, end="")
    print()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(CONFIG)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except OSError as e:
        leave_closed_output(e)
