"""Typed settings: defaults < config/x.py < --key=value.

Each setting is a field of a frozen dataclass: its type, its default and its purpose.
"""

import ast
import builtins
import difflib
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any, Literal, get_args

from keepgpt.errors import UserError, in_notebook, prepare_streams, run_or_exit, warn
from keepgpt.signals import prepare_process

# settings by name, such as those that a command line gives
Settings = dict[str, Any]
# what nanoGPT's train.py has imported before it runs a config file
MODULES = {
    "os": "os",
    "time": "time",
    "math": "math",
    "pickle": "pickle",
    "np": "numpy",
    "torch": "torch",
}


def setting(
    default: Any, why: str, least: float = 0, below: float | None = None
) -> Any:
    """Declare a setting: its default, its purpose, and if it is a number its range
    [least, below)."""
    # a whole number is a C int somewhere
    if below is None:
        below = 2**31 if type(default) is int else inf
    return field(default=default, metadata={"why": why, "least": least, "below": below})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of train.py. nanoGPT's keep their names and meaning. A "step" is one optimizer
    update."""

    # the run
    out_dir: str = setting("out", "the run's folder: checkpoints and metrics.jsonl")
    init_from: str = setting(
        "scratch",
        "scratch | resume | auto (resume if there is a run, else scratch) | auto:SOURCE | "
        "branch:PATH of a run's folder or checkpoint (a new run from its whole state) | "
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl, or OWNER/NAME of a Llama or Qwen3 on the hub | "
        "path of a checkpoint or a Hugging Face folder",
    )
    step: int = setting(
        0, "resume, branch: continue from this step's checkpoint; 0 = from the newest"
    )
    seed: int = setting(1337, "seed of weights, data order and dropout", below=2**63)
    # the data
    dataset: str = setting(
        "openwebtext",
        "folder in data_dir, made by prepare.py or nanoGPT, or with shards of llm.c | a mixture: "
        "NAME:WEIGHT+NAME:WEIGHT, e.g. web:0.7+code:0.3",
    )
    data_dir: str = setting(
        "data", "folder of all datasets; a relative path is in train.py's folder"
    )
    # the product of these three is a step's tokens, on any number of ranks
    gradient_accumulation_steps: int = setting(
        5 * 8, "micro-batches/step, over all ranks", least=1, below=10**6
    )
    batch_size: int = setting(12, "sequences in a micro-batch", least=1, below=10**6)
    block_size: int = setting(1024, "tokens in a sequence", least=1)
    # the model (the defaults are GPT-2 124M)
    n_layer: int = setting(12, "transformer blocks", least=1, below=1000)
    n_head: int = setting(12, "attention heads; n_embd must be a multiple", least=1)
    n_embd: int = setting(768, "width", least=1)
    # a resumed run may change dropout, but not its architecture
    dropout: float = setting(0.0, "0 for pretraining, 0.1+ for small data", below=1)
    bias: bool = setting(False, "gpt2: biases in Linear and LayerNorm; False is faster")
    architecture: str = setting(
        "gpt2",
        "gpt2 | llama (RMSNorm, RoPE, SwiGLU) | qwen3 (llama with QK-norm): a lower loss from the "
        "same tokens",
    )
    # sizes that GPT-2 lacks
    n_kv_head: int = setting(0, "llama, qwen3: heads of keys and values; 0 = n_head")
    head_dim: int = setting(0, "llama, qwen3: width of a head; 0 = n_embd / n_head")
    n_ff: int = setting(0, "llama, qwen3: width in the MLP; 0 = about 8/3 n_embd")
    rope_theta: float = setting(
        1e4, "llama, qwen3: base of the rotary wavelengths", least=1
    )
    norm_eps: float = setting(
        1e-6, "llama, qwen3: added to RMSNorm's mean square", least=1e-12
    )
    tie_embeddings: bool = setting(
        True, "llama, qwen3: the output layer is the token embedding"
    )
    # the optimizer and its schedule
    optimizer: str = setting(
        "adamw",
        "adamw | muon (the blocks' matrices; AdamW for the rest): fewer tokens to the same loss",
    )
    # as for GPT-2 124M
    learning_rate: float = setting(6e-4, "peak learning rate")
    max_iters: int = setting(600000, "number of steps of the run")
    weight_decay: float = setting(
        1e-1, "on matrices and embeddings, not biases and norms"
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient", below=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean square", below=1)
    grad_clip: float = setting(
        1.0, "maximum of the global gradient norm; 0 = no clipping"
    )
    # bad numbers: the step is computed again, then its data is skipped
    max_skips: int = setting(
        3, "batches in a row to skip while the loss is not finite; 0 = stop at once"
    )
    spike_factor: float = setting(
        0.0,
        "also skip the data of a gradient norm above this many times the median of the last 128; "
        "0 = off",
    )
    # Muon's own two; it shares the schedule
    muon_lr: float = setting(0.02, "peak learning rate of Muon, at any width")
    muon_momentum: float = setting(0.95, "Muon's decay of the mean gradient", below=1)
    # the schedule
    decay_lr: bool = setting(True, "linear warm-up, then lr_schedule; False = constant")
    lr_schedule: str = setting(
        "cosine",
        "after the warm-up: cosine | linear (constant, then linear decay) | constant",
    )
    decay_fraction: float = setting(
        0.65, "share of lr_decay_iters that decays; a cosine always decays"
    )
    warmup_iters: int = setting(2000, "steps of linear warm-up")
    lr_decay_iters: int = setting(600000, "step where the decay reaches min_lr")
    min_lr: float = setting(
        6e-5, "final learning rate; Muon's: the same share of muon_lr"
    )
    # evaluating, logging and saving
    eval_interval: int = setting(2000, "steps between evaluations", least=1)
    eval_iters: int = setting(200, "micro-batches to evaluate of each split", least=1)
    eval_text: str = setting(
        "", "a text file: its bits per byte are part of each evaluation"
    )
    eval_only: bool = setting(False, "evaluate once and exit")
    log_interval: int = setting(1, "steps between log lines", least=1)
    sample_tokens: int = setting(0, "tokens of a sample to show at each evaluation")
    # a kill costs the steps since the last save
    checkpoint_interval: int = setting(0, "steps between saves; 0 = at each evaluation")
    keep_checkpoints: int = setting(
        2, "newest checkpoints to keep; best.pt is kept too", least=2
    )
    keep_every: int = setting(0, "keep each N-th step's checkpoint for good; 0 = none")
    always_save_checkpoint: bool = setting(
        True, "no effect: newest and best are always kept"
    )
    # the log is in out_dir, whether this is on or not
    wandb_log: bool = setting(False, "also log to Weights & Biases")
    wandb_project: str = setting("owt", "wandb's project")
    wandb_run_name: str = setting("gpt2", "wandb's run name")
    # the machine
    device: str = setting("auto", "auto | cpu | cuda | cuda:1 | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "dtype of the matrix products: auto = bfloat16 where it is fast"
    )
    compile: bool | Literal["auto"] = setting("auto", "torch.compile: auto = on CUDA")
    deterministic: bool = setting(
        False, "bit-identical runs on CUDA, slower; a CPU's always are"
    )
    elastic: bool = setting(False, "bit-identical on 1, 2, 4, ... ranks, without DDP")
    # how ranks wait for each other, and over what
    rank_timeout: int = setting(
        600, "seconds that a rank waits for another one", least=1
    )
    backend: Literal["auto", "nccl", "gloo"] = setting(
        "auto", "torch.distributed's backend: auto = nccl on CUDA, else gloo"
    )

    @property
    def source(self) -> str:
        """Return what init_from starts a new run from, without auto: e.g. scratch."""
        source = self.init_from.removeprefix("auto:")
        return "scratch" if source == "auto" else source

    @property
    def trunk(self) -> str | None:
        """Return PATH if a new run starts from branch:PATH, else None."""
        kind, _, path = self.source.partition(":")
        return path if kind == "branch" else None

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of a step, over all ranks."""
        return self.gradient_accumulation_steps * self.batch_size * self.block_size

    @property
    def decays(self) -> bool:
        """Return True if the learning rate decays to min_lr."""
        return self.decay_lr and self.lr_schedule != "constant"

    @property
    def decay_start(self) -> int:
        """Return the step where that decay starts."""
        start = 0
        # a cosine falls from the warm-up on, all others are constant until then
        if self.lr_schedule != "cosine":
            start = round(self.lr_decay_iters * (1 - self.decay_fraction))
        return max(self.warmup_iters, start)


# the settings that the shape of the weights depends on
ARCHITECTURE = (
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "bias",
    "architecture",
    "n_kv_head",
    "head_dim",
    "n_ff",
    "rope_theta",
    "norm_eps",
    "tie_embeddings",
)
# a resumed run keeps these, or it would be another run
FIXED = ("seed", "optimizer", *ARCHITECTURE)
# may differ between hosts. Only rank 0 writes and logs; of weights, data and device, the
# content is compared instead of the name
PER_HOST = (
    "out_dir",
    "init_from",
    "dataset",
    "data_dir",
    "device",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
)


def resume_config(
    config: TrainConfig, overrides: Settings, saved_config: Settings, is_branch: bool
) -> tuple[TrainConfig, dict[str, str]]:
    """Return a checkpoint's settings with the `overrides` of this command's `config`, and a line
    for each changed key. Raises UserError for what would make it another run, or for a branch
    another model."""
    # a key that this version lacks is dropped; one that the saved version lacks has its default
    keys = {f.name for f in fields(TrainConfig)} & saved_config.keys()
    saved = TrainConfig(**{key: saved_config[key] for key in keys})
    # the folder may have moved; the run's first init_from and step stay recorded
    kept = {
        "out_dir": config.out_dir,
        "init_from": saved.init_from,
        "step": saved.step,
    }
    resumed = replace(saved, **overrides | kept)
    changes = {
        key: f"{key} {getattr(saved, key)} -> {value}"
        for key, value in overrides.items()
        if key not in ("init_from", "step") and value != getattr(saved, key)
    }

    fixed = FIXED
    # with elastic=True, sums over batches of another size would round differently
    if resumed.elastic:
        fixed += ("batch_size",)
    for key in fixed:
        # rotary positions have no weights, so a branch may have a longer context
        if key == "block_size" and is_branch:
            continue
        if key in changes:
            raise UserError(
                f"{changes[key]} would make this another run. Try: leave --{key} out, "
                "or --init_from=scratch with another --out_dir"
            )
    # an evaluation makes no step, so it may use other batches
    if resumed.tokens_per_step != saved.tokens_per_step and not resumed.eval_only:
        raise UserError(
            "batch_size x gradient_accumulation_steps x block_size: expected "
            f"{saved.tokens_per_step} as before, got {resumed.tokens_per_step}"
        )
    return resumed, changes


def check_settings(
    config: TrainConfig, changed: Settings, resumed: bool
) -> tuple[TrainConfig, list[str]]:
    """Return the settings and a note for each combination of them that is odd, if one of its keys
    is among the `changed` ones. A min_lr left at a default above learning_rate becomes a tenth of
    that. Raises UserError for a learning rate that would rise or jump; a run `resumed` with such a
    schedule unchanged gets a note."""
    if config.eval_only:
        return config, []
    notes = []
    # a config file for nanoGPT may set a small learning_rate alone
    rises = config.decays and config.min_lr > config.learning_rate
    if rises and not resumed and "min_lr" not in changed:
        min_lr = config.learning_rate / 10
        notes.append(
            f"min_lr: the default {config.min_lr} is above "
            f"learning_rate={config.learning_rate}; using {min_lr:g}"
        )
        config = replace(config, min_lr=min_lr)

    for keys, message in find_mistakes(config):
        if keys & changed.keys():
            raise UserError(message)
        notes.append(message)
    for keys, message in find_oddities(config):
        if keys & changed.keys():
            notes.append(message)
    return config, notes + list_unused(config, changed)


def find_mistakes(config: TrainConfig) -> Iterator[tuple[set[str], str]]:
    """Yield the keys of settings that contradict each other, and an error message."""
    if 0 < config.spike_factor <= 1:
        message = (
            f"spike_factor={config.spike_factor}: expected more than 1, or 0, or half of all steps "
            "would be skipped. Try: 10"
        )
        yield {"spike_factor"}, message
    if not config.decays:
        return
    if config.min_lr > config.learning_rate:
        message = (
            f"min_lr={config.min_lr}: expected at most learning_rate="
            f"{config.learning_rate}, or the rate would rise. Try: "
            f"--min_lr={config.learning_rate / 10:g}"
        )
        yield {"min_lr", "learning_rate"}, message
    # a decay without a step is a jump, unless the run ends before it
    if config.lr_decay_iters <= config.decay_start < config.max_iters:
        message = (
            f"lr_decay_iters={config.lr_decay_iters}: expected more than {config.decay_start}, "
            "where the decay starts, or the rate would jump. Try: a smaller --warmup_iters, or "
            f"--lr_decay_iters={config.max_iters}"
        )
        yield {"warmup_iters", "lr_decay_iters", "decay_fraction", "max_iters"}, message
    if config.lr_schedule != "cosine" and config.decay_fraction > 1:
        message = (
            f"decay_fraction={config.decay_fraction}: expected at most 1. Try: 0.65"
        )
        yield {"decay_fraction", "lr_schedule"}, message


def find_oddities(config: TrainConfig) -> Iterator[tuple[set[str], str]]:
    """Yield the keys of settings that are seldom meant together, and a note about them."""
    steps = config.max_iters
    decay = config.lr_decay_iters
    if config.decay_lr and 0 < steps <= config.warmup_iters:
        message = (
            f"max_iters={steps} ends the run within its warm-up of {config.warmup_iters} steps "
            "(warmup_iters)"
        )
        yield {"max_iters", "warmup_iters"}, message
    elif config.decays and not steps / 2 <= decay <= steps * 2:
        message = f"max_iters={steps} is far from lr_decay_iters={decay}, where the decay ends"
        yield {"max_iters", "lr_decay_iters"}, message


def list_unused(config: TrainConfig, changed: Settings) -> list[str]:
    """Return a note for each group of `changed` settings that has no effect beside the others."""
    decay = ["decay_fraction", "lr_decay_iters", "min_lr"]
    # a setting -> those that its value leaves unused
    unused = {}
    if config.optimizer != "muon":
        unused["optimizer"] = ["muon_lr", "muon_momentum"]
    if not config.decay_lr:
        unused["decay_lr"] = ["lr_schedule", "warmup_iters", *decay]
    elif config.lr_schedule == "constant":
        unused["lr_schedule"] = decay
    elif config.lr_schedule == "cosine":
        unused["lr_schedule"] = ["decay_fraction"]
    notes = []
    for cause, keys in unused.items():
        names = ", ".join(key for key in keys if key in changed)
        if names:
            notes.append(f"{names}: no effect with {cause}={getattr(config, cause)}")
    return notes


def options_of(kind: Any) -> list[Any]:
    """Return the types and the strings that a setting takes, e.g. [bool, "auto"]."""
    options = []
    # a union has parts, and a Literal in it has strings
    for part in get_args(kind) or [kind]:
        options += get_args(part) or [part]
    return options


def convert(value: Any, options: list[Any]) -> Any:
    """Return `value` as one of `options`; a string may spell a number or a bool. Raises
    ValueError, TypeError, OverflowError or SyntaxError."""
    if isinstance(value, str) and value in options:
        return value
    text = str(value).lower()
    if bool in options and text in ("true", "1", "false", "0"):
        return text in ("true", "1")
    # a config file may hold a Path
    if str in options:
        return os.fspath(value)
    number = ast.literal_eval(value) if isinstance(value, str) else value
    # True is a number to Python, but a mistake as one of ours
    if isinstance(number, bool):
        raise ValueError
    if float in options:
        return float(number)
    # 1e4 is a whole number too
    if int in options and int(number) == number:
        return int(number)
    raise ValueError


def check(settings: type, key: str, value: Any, where: str) -> Any:
    """Return `value` as the type of `settings.key`. Raises UserError, which names `where`."""
    by_name = {f.name: f for f in fields(settings)}
    if key not in by_name:
        hint = "--help lists the keys"
        for near in difflib.get_close_matches(key, by_name, n=1, cutoff=0.5):
            hint = f"did you mean {near}?"
        raise UserError(f"{where}: unknown key {key!r}; {hint}")

    # the type
    options = options_of(by_name[key].type)
    try:
        value = convert(value, options)
    except (ValueError, TypeError, OverflowError, SyntaxError):
        expected = " or ".join(getattr(kind, "__name__", kind) for kind in options)
        raise UserError(f"{where}: {key}: expected {expected}, got {value!r}") from None

    # the range; a text may be empty where the default is
    if value == "" and by_name[key].default:
        raise UserError(f"{where}: {key} must not be empty")
    if type(value) in (int, float):
        least = by_name[key].metadata["least"]
        below = by_name[key].metadata["below"]
        # a comparison that NaN fails, too
        if not least <= value < below:
            raise UserError(
                f"{where}: {key}: expected at least {least} and below {below}, got {value}"
            )
    return value


def read_config_file(settings: type, path: str) -> Settings:
    """Return the settings that a Python file assigns, e.g. {"n_layer": 6}.

    Raises UserError, also for a name that looks like a misspelled key; prints the other names that
    nothing in the file reads.
    """
    defaults = {f.name: f.default for f in fields(settings)}
    reads, assigned = run_source(read_source(path), path, defaults)
    overrides = {
        key: check(settings, key, assigned[key], path)
        for key in assigned
        if key in defaults
    }
    # private names, functions and modules are no settings, whatever they are called
    others = {
        name
        for name, value in assigned.items()
        if not (name.startswith("_") or callable(value) or inspect.ismodule(value))
    } - defaults.keys()
    unused = others - reads
    for name in others:
        for near in difflib.get_close_matches(name, defaults, n=1, cutoff=0.85):
            # a helper may have a similar name, as in n_head = n_heads
            if name in unused or near not in overrides:
                raise UserError(f"{path}: unknown key {name!r}; did you mean {near}?")
    if unused:
        warn(f"{path}: ignoring unknown settings: {', '.join(sorted(unused))}")
    return overrides


def read_source(path: str) -> str:
    """Return the text of a config file. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: {reason}. Try: config/train_plays_cpu.py") from None


def run_source(source: str, path: str, defaults: Settings) -> tuple[set[str], Settings]:
    """Run a config file in a namespace of its own, where it can read the defaults by name and, as
    in nanoGPT, a few modules without importing them. Return the names that it reads, and
    its assignments. Raises UserError for any error in it."""
    # as builtins: the namespace then holds only the assignments of the file
    readable = vars(builtins) | defaults
    namespace = {"__builtins__": readable, "__name__": "config", "__file__": path}
    try:
        reads = {
            node.id
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        # only those that it reads: torch takes seconds
        for name in MODULES.keys() & reads:
            readable[name] = importlib.import_module(MODULES[name])
        exec(compile(source, path, "exec"), namespace)
    except (Exception, SystemExit) as e:
        # the last line of the file that was running, or that can't be parsed
        lines = [getattr(e, "lineno", None) or 1]
        lines += [frame.lineno for frame in inspect.trace() if frame.filename == path]
        raise UserError(f"{path}:{lines[-1]}: {type(e).__name__}: {e}") from None
    return reads, namespace


def parse(
    settings: type, usage: str, argv: list[str]
) -> tuple[Any, Settings, list[str]]:
    """Read a command line: arguments (`config/x.py` or whatever the script takes) and `--key=value`
    flags, which override config files.

    Returns the settings, those of them that the command sets, and the arguments that are no config
    files. Raises UserError; --help prints every setting and exits.
    """
    if "--help" in argv or "-h" in argv:
        print_help(settings, usage)
        sys.exit(0)
    overrides = {}
    flags = {}
    args = []
    for arg in argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and equals:
            flags[key] = check(settings, key, value, arg)
        elif arg.startswith("-"):
            raise UserError(
                f"{arg}: expected --key=value, e.g. --eval_only=True. Try: --help"
            )
        # only train.py has config files
        elif settings is TrainConfig:
            overrides |= read_config_file(settings, arg)
        else:
            args.append(arg)
    # flags count wherever they stand
    overrides |= flags
    return settings(**overrides), overrides, args


def print_help(settings: type, usage: str) -> None:
    """Print every setting with its default and its purpose."""
    lines = [f"usage: {usage}", ""]
    for f in fields(settings):
        flag = f"--{f.name}={f.default}"
        lines.append(f"  {flag:<38}  {f.metadata['why']}")
    # flushed here, where an error of stdout is noticed
    print("\n".join(lines), flush=True)


def command_line(settings: type, usage: str) -> tuple[Any, Settings, list[str]]:
    """`parse` this process's command line, or exit with one line. A script calls it before it loads
    torch, so --help and mistakes are answered at once."""
    # a notebook's kernel has set both
    if not in_notebook():
        # Ctrl-C ends the loading in silence
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prepare_streams()
    prepare_process()
    return run_or_exit(lambda: parse(settings, usage, sys.argv[1:]))
