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

# what nanoGPT's train.py has imported before it runs a config file
MODULES = {
    "os": "os",
    "time": "time",
    "math": "math",
    "pickle": "pickle",
    "np": "numpy",
    "torch": "torch",
}


def setting(default: Any, why: str, least: float = -inf, below: float = inf) -> Any:
    """Declare a setting: its default, its purpose, and its range [least, below)."""
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
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl, or OWNER/NAME of a Qwen3 on the hub | "
        "path of a checkpoint or a Hugging Face folder",
    )
    seed: int = setting(
        1337, "seed of weights, data order and dropout", least=0, below=2**63
    )
    # the data
    dataset: str = setting(
        "openwebtext", "folder in data_dir, made by prepare.py or nanoGPT"
    )
    data_dir: str = setting(
        "data", "folder of all datasets; relative paths start at train.py's"
    )
    gradient_accumulation_steps: int = setting(
        5 * 8, "micro-batches/step, over all ranks", least=1, below=10**6
    )
    batch_size: int = setting(12, "sequences in a micro-batch", least=1, below=10**6)
    block_size: int = setting(1024, "tokens in a sequence", least=1)
    # the model (the defaults are GPT-2 124M)
    n_layer: int = setting(12, "transformer blocks", least=1, below=1000)
    n_head: int = setting(12, "attention heads; n_embd must be a multiple", least=1)
    n_embd: int = setting(768, "width", least=1)
    dropout: float = setting(
        0.0, "0 for pretraining, 0.1+ for small data", least=0, below=1
    )
    bias: bool = setting(False, "gpt2: biases in Linear and LayerNorm; False is faster")
    architecture: str = setting(
        "gpt2",
        "gpt2 | llama (RMSNorm, RoPE, SwiGLU) | qwen3 (llama with QK-norm): a lower loss from the "
        "same tokens",
    )
    n_kv_head: int = setting(
        0, "llama, qwen3: heads of keys and values; 0 = n_head", least=0
    )
    head_dim: int = setting(
        0, "llama, qwen3: width of a head; 0 = n_embd / n_head", least=0
    )
    n_ff: int = setting(
        0, "llama, qwen3: width in the MLP; 0 = about 8/3 n_embd", least=0
    )
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
    learning_rate: float = setting(6e-4, "peak learning rate", least=0)
    max_iters: int = setting(600000, "number of steps of the run", least=0)
    weight_decay: float = setting(
        1e-1, "on matrices and embeddings, not biases and norms", least=0
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient", least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean square", least=0, below=1)
    grad_clip: float = setting(
        1.0, "maximum of the global gradient norm; 0 = no clipping", least=0
    )
    muon_lr: float = setting(0.02, "peak learning rate of Muon, at any width", least=0)
    muon_momentum: float = setting(
        0.95, "Muon's decay of the mean gradient", least=0, below=1
    )
    decay_lr: bool = setting(True, "linear warm-up, then lr_schedule; False = constant")
    lr_schedule: str = setting(
        "cosine",
        "after the warm-up: cosine | linear (constant, then linear decay) | constant",
    )
    decay_fraction: float = setting(
        0.65, "linear: share of lr_decay_iters that decays", least=0
    )
    warmup_iters: int = setting(2000, "steps of linear warm-up", least=0)
    lr_decay_iters: int = setting(
        600000, "step where the decay reaches min_lr", least=0
    )
    min_lr: float = setting(
        6e-5, "final learning rate; Muon's: the same share of muon_lr", least=0
    )
    # evaluating, logging and saving
    eval_interval: int = setting(2000, "steps between evaluations", least=1)
    eval_iters: int = setting(200, "micro-batches to evaluate of each split", least=1)
    eval_only: bool = setting(False, "evaluate once and exit")
    log_interval: int = setting(1, "steps between log lines", least=1)
    sample_tokens: int = setting(
        0, "tokens of a sample to show at each evaluation", least=0
    )
    checkpoint_interval: int = setting(
        0, "steps between saves; 0 = at each evaluation", least=0
    )
    keep_checkpoints: int = setting(
        2, "newest checkpoints to keep; best.pt is kept too", least=2
    )
    always_save_checkpoint: bool = setting(
        True, "no effect: newest and best are always kept"
    )
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
    rank_timeout: int = setting(
        600, "seconds that a rank waits for another one", least=1
    )
    backend: Literal["auto", "nccl", "gloo"] = setting(
        "auto", "torch.distributed's backend: auto = nccl on CUDA, else gloo"
    )

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
        if self.lr_schedule == "linear":
            return max(
                self.warmup_iters,
                round(self.lr_decay_iters * (1 - self.decay_fraction)),
            )
        return self.warmup_iters


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
FIXED = ("seed", "optimizer", *ARCHITECTURE)  # see resume_config
# may differ between hosts. Only rank 0 writes and logs; of weights, data and device, what they are
# is compared instead of their names
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
    config: TrainConfig, given: dict[str, Any], saved_config: dict[str, Any]
) -> tuple[TrainConfig, dict[str, str]]:
    """Return a checkpoint's settings overridden by the `given` ones of this command's `config`,
    and a line for each changed key. Raises UserError for what would make it another run."""
    known = {f.name for f in fields(TrainConfig)} & saved_config.keys()
    saved = TrainConfig(**{key: saved_config[key] for key in known})
    # the folder may have moved; the run's first init_from stays recorded
    resumed = replace(
        saved, **given | {"out_dir": config.out_dir, "init_from": saved.init_from}
    )
    changes = {
        key: f"{key} {getattr(saved, key)} -> {value}"
        for key, value in given.items()
        if key != "init_from" and getattr(saved, key) != value
    }
    # with elastic=True, sums over batches of another size would round differently
    for key in FIXED + (("batch_size",) if resumed.elastic else ()):
        if key in changes:
            raise UserError(
                f"{changes[key]} would make this another run. Try: leave --{key} out, "
                "or another --out_dir"
            )
    if resumed.tokens_per_step != saved.tokens_per_step and not resumed.eval_only:
        raise UserError(
            "batch_size x gradient_accumulation_steps x block_size: expected "
            f"{saved.tokens_per_step} as before, got {resumed.tokens_per_step}"
        )
    return resumed, changes


def check_settings(
    config: TrainConfig, changed: dict[str, Any], resumed: bool
) -> tuple[TrainConfig, list[str]]:
    """Return the settings and a note for each combination of them that is odd, if one of its keys
    is among the `changed` ones. A min_lr left at a default above learning_rate becomes a tenth of
    that. Raises UserError for a learning rate that would rise or jump; a run `resumed` with such a
    schedule unchanged gets a note."""
    if config.eval_only:
        return config, []
    notes = []
    if (
        config.decays
        and config.min_lr > config.learning_rate
        and not resumed
        and "min_lr" not in changed
    ):
        notes.append(
            f"min_lr: the default {config.min_lr} is above "
            f"learning_rate={config.learning_rate}; using {config.learning_rate / 10:g}"
        )
        config = replace(config, min_lr=config.learning_rate / 10)
    for keys, message in find_mistakes(config):
        if changed.keys() & keys:
            raise UserError(message)
        notes.append(message)
    notes += [
        message for keys, message in find_oddities(config) if changed.keys() & keys
    ]
    return config, notes + list_unused(config, changed)


def find_mistakes(config: TrainConfig) -> Iterator[tuple[set[str], str]]:
    """Yield the keys of settings that contradict each other, and an error message."""
    if not config.decays:
        return
    if config.min_lr > config.learning_rate:
        yield (
            {"min_lr", "learning_rate"},
            (
                f"min_lr={config.min_lr}: expected at most learning_rate="
                f"{config.learning_rate}, or the rate would rise. Try: "
                f"--min_lr={config.learning_rate / 10:g}"
            ),
        )
    if config.lr_decay_iters <= config.decay_start < config.max_iters:
        yield (
            {"warmup_iters", "lr_decay_iters", "decay_fraction", "max_iters"},
            (
                f"lr_decay_iters={config.lr_decay_iters}: expected more than {config.decay_start}, "
                "where the decay starts, or the rate would jump. Try: a smaller --warmup_iters, or "
                f"--lr_decay_iters={config.max_iters}"
            ),
        )
    if config.lr_schedule == "linear" and config.decay_fraction > 1:
        yield (
            {"decay_fraction", "lr_schedule"},
            (f"decay_fraction={config.decay_fraction}: expected at most 1. Try: 0.65"),
        )


def find_oddities(config: TrainConfig) -> Iterator[tuple[set[str], str]]:
    """Yield the keys of settings that are seldom meant together, and a note about them."""
    steps, decay = config.max_iters, config.lr_decay_iters
    if config.decay_lr and 0 < steps <= config.warmup_iters:
        yield (
            {"max_iters", "warmup_iters"},
            (
                f"max_iters={steps} ends the run within its warm-up of {config.warmup_iters} steps "
                "(warmup_iters)"
            ),
        )
    elif config.decays and not steps / 2 <= decay <= steps * 2:
        yield (
            {"max_iters", "lr_decay_iters"},
            (
                f"max_iters={steps} is far from lr_decay_iters={decay}, where the decay ends"
            ),
        )


def list_unused(config: TrainConfig, changed: dict[str, Any]) -> list[str]:
    """Return a note for each group of `changed` settings that has no effect beside the others."""
    notes = []
    for unused, cause, keys in (
        (config.optimizer != "muon", "optimizer", ("muon_lr", "muon_momentum")),
        (
            not config.decay_lr,
            "decay_lr",
            (
                "lr_schedule",
                "decay_fraction",
                "warmup_iters",
                "lr_decay_iters",
                "min_lr",
            ),
        ),
        (config.lr_schedule == "constant", "lr_schedule", ("lr_decay_iters", "min_lr")),
        (config.lr_schedule != "linear", "lr_schedule", ("decay_fraction",)),
    ):
        names = [key for key in keys if key in changed]
        if unused and names:
            notes.append(
                f"{', '.join(names)}: no effect with {cause}={getattr(config, cause)}"
            )
    return notes


def options_of(kind: Any) -> list[Any]:
    """Return the types and the strings that a setting takes, e.g. [bool, "auto"]."""
    return [
        option
        for part in get_args(kind) or (kind,)
        for option in get_args(part) or (part,)
    ]


def convert(value: Any, options: list[Any]) -> Any:
    """Return `value` as one of `options`; a string may spell a number or a bool. Raises
    ValueError, TypeError, OverflowError or SyntaxError."""
    if isinstance(value, str) and value in options:
        return value
    if bool in options and str(value).lower() in ("true", "1", "false", "0"):
        return str(value).lower() in ("true", "1")
    if str in options:
        return os.fspath(value)
    number = ast.literal_eval(value) if isinstance(value, str) else value
    if float in options and not isinstance(number, bool):
        return float(number)
    if int in options and not isinstance(number, bool) and int(number) == number:  # 1e4
        return int(number)
    raise ValueError


def check(settings: type, key: str, value: Any, where: str) -> Any:
    """Return `value` as the type of `settings.key`. Raises UserError, which names `where`."""
    known = {f.name: f for f in fields(settings)}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        raise UserError(
            f"{where}: unknown key {key!r}; "
            + (f"did you mean {near[0]}?" if near else "--help lists the keys")
        )
    try:
        value = convert(value, options_of(known[key].type))
    except (ValueError, TypeError, OverflowError, SyntaxError):
        names = [
            getattr(option, "__name__", option)
            for option in options_of(known[key].type)
        ]
        raise UserError(
            f"{where}: {key}: expected {' or '.join(names)}, got {value!r}"
        ) from None
    if value == "" and known[key].default:
        raise UserError(f"{where}: {key} must not be empty")
    if type(value) in (int, float):
        least, below = known[key].metadata["least"], known[key].metadata["below"]
        if type(value) is int and below == inf:
            below = 2**31
        if not least <= value < below:
            raise UserError(
                f"{where}: {key}: expected at least {least} and below {below}, "
                f"got {value}"
            )
    return value


def read_config_file(settings: type, path: str) -> dict[str, Any]:
    """Return the settings that a Python file assigns, e.g. {"n_layer": 6}.

    The file runs in a namespace of its own, where it can read the defaults by name and, as in
    nanoGPT, a few modules without importing them. Raises UserError, also for a name that looks
    like a misspelled key; prints the other names that nothing in the file reads.
    """
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise UserError(
            f"{path}: {getattr(e, 'strerror', None) or e}. Try: "
            "config/train_plays_cpu.py"
        ) from None
    defaults = {f.name: f.default for f in fields(settings)}
    namespace = {
        "__builtins__": vars(builtins) | defaults,
        "__name__": "config",
        "__file__": path,
    }
    try:
        reads = {
            node.id
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        for name in MODULES.keys() & reads:
            namespace["__builtins__"][name] = importlib.import_module(MODULES[name])
        exec(compile(source, path, "exec"), namespace)
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in inspect.trace() if frame.filename == path]
        line = lines[-1] if lines else getattr(e, "lineno", None) or 1
        raise UserError(f"{path}:{line}: {type(e).__name__}: {e}") from None
    given = {
        key: check(settings, key, value, path)
        for key, value in namespace.items()
        if key in defaults
    }
    others = {
        key
        for key, value in namespace.items()
        if key not in defaults
        and not key.startswith("_")
        and not callable(value)
        and not inspect.ismodule(value)
    }
    unused = others - reads
    for name in others:
        near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.85)
        if near and (
            name in unused or near[0] not in given
        ):  # else a helper: n_head = n_heads
            raise UserError(f"{path}: unknown key {name!r}; did you mean {near[0]}?")
    if unused:
        warn(f"{path}: ignoring unknown settings: {', '.join(sorted(unused))}")
    return given


def parse(
    settings: type, usage: str, argv: list[str]
) -> tuple[Any, dict[str, Any], list[str]]:
    """Read a command line: arguments (`config/x.py` or whatever the script takes) and `--key=value`
    flags, which override config files.

    Returns the settings, those of them that were given, and the arguments that are no config
    files. Raises UserError; --help prints every setting and exits.
    """
    if "--help" in argv or "-h" in argv:
        lines = [
            f"  --{f.name + '=' + str(f.default):<36}  {f.metadata['why']}"
            for f in fields(settings)
        ]
        print(f"usage: {usage}\n", *lines, sep="\n", flush=True)
        sys.exit(0)
    given: dict[str, Any] = {}
    flags: dict[str, Any] = {}
    args = []
    for arg in argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and equals:
            flags[key] = check(settings, key, value, arg)
        elif arg.startswith("-"):
            raise UserError(
                f"{arg}: expected --key=value, e.g. --eval_only=True. Try: --help"
            )
        elif settings is TrainConfig:
            given |= read_config_file(settings, arg)
        else:
            args.append(arg)
    given |= flags
    return settings(**given), given, args


def command_line(settings: type, usage: str) -> tuple[Any, dict[str, Any], list[str]]:
    """`parse` this process's command line, or exit with one line. A script calls it before it loads
    torch, so --help and mistakes are answered at once."""
    if not in_notebook():  # its kernel has set both
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # Ctrl-C ends the loading in silence
        prepare_streams()
    prepare_process()
    return run_or_exit(lambda: parse(settings, usage, sys.argv[1:]))
