"""One typed configuration a script: defaults < config/x.py < --key=value.

Each setting is a field of a frozen dataclass, with its type, its default and its reason. `parse`
fills one from the command line; every mistake ends the program with a single line that names the
mend.
"""
import ast
import builtins
import difflib
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from keepgpt.process import (
    UserError,
    fail,
    host_memory,
    leave_closed_output,
    prepare_process,
    warn,
)

# what nanoGPT's train.py has imported before it runs a config file
MODULES = {"os": "os", "time": "time", "math": "math", "pickle": "pickle", "np": "numpy",
           "torch": "torch"}


def knob(default: Any, why: str, least: float = -inf, below: float = inf) -> Any:
    """A setting: its default, what it is for, and the half-open range [least, below) its value must
    lie in."""
    return field(default=default, metadata={"why": why, "least": least, "below": below})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of train.py. nanoGPT's names keep nanoGPT's meaning; "step" is an optimizer
    update done."""
    # the run
    out_dir: str = knob("out", "the run's folder: bundles and metrics.jsonl")
    init_from: str = knob("scratch",
        "scratch | resume | auto (resume if there is a run, else scratch) | auto:SOURCE | "
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl | path of a checkpoint or a Hugging Face folder")
    seed: int = knob(1337,
        "weights, order of the data and dropout follow from it", least=0, below=2**63)
    # the data
    dataset: str = knob("openwebtext", "its folder in data_dir, made by prepare.py or nanoGPT")
    data_dir: str = knob("data",
        "the folder of all datasets; a relative path starts at the folder of train.py")
    gradient_accumulation_steps: int = knob(5 * 8, "micro-batches a step, over all ranks", least=1)
    batch_size: int = knob(12, "sequences in a micro-batch", least=1)
    block_size: int = knob(1024, "tokens in a sequence", least=1)
    # the model (the defaults are GPT-2 124M)
    n_layer: int = knob(12, "transformer blocks", least=1)
    n_head: int = knob(12, "attention heads; n_embd must be a multiple", least=1)
    n_embd: int = knob(768, "width", least=1)
    dropout: float = knob(0.0, "0 for pretraining, 0.1 and more for small data", least=0, below=1)
    bias: bool = knob(False,
        "gpt2: biases in Linear and LayerNorm: True as in GPT-2, False is faster and no worse")
    architecture: Literal["gpt2", "qwen3"] = knob("gpt2",
        "gpt2 | qwen3 (RMSNorm, RoPE, QK-norm, SwiGLU): a lower loss from the same tokens")
    n_kv_head: int = knob(0,
        "qwen3: heads of keys and values, a divisor of n_head: fewer make the cache smaller; "
        "0 = n_head", least=0)
    head_dim: int = knob(0, "qwen3: width of a head; 0 = n_embd / n_head", least=0)
    n_ff: int = knob(0,
        "qwen3: width of the MLP; 0 = 8/3 n_embd, rounded up to a multiple of 64", least=0)
    rope_theta: float = knob(10000.0,
        "qwen3: base of the rotary wavelengths: 10000 for blocks of a few thousand tokens, "
        "1e6 for more", least=1)
    norm_eps: float = knob(1e-6, "qwen3: added to RMSNorm's mean square", least=1e-12)
    tie_embeddings: bool = knob(True,
        "qwen3: the output layer is the token embedding; False for its own weights")
    # the optimizer and its schedule
    optimizer: Literal["adamw", "muon"] = knob("adamw",
        "adamw | muon (for the blocks' matrices, AdamW for the rest): fewer steps to a loss")
    learning_rate: float = knob(6e-4, "peak learning rate", least=0)
    max_iters: int = knob(600000, "the run ends after so many steps", least=0)
    weight_decay: float = knob(1e-1,
        "on matrices and embeddings; never on biases and norms", least=0)
    beta1: float = knob(0.9, "AdamW's decay of the mean gradient", least=0, below=1)
    beta2: float = knob(0.95,
        "AdamW's decay of the mean square; 0.99 when a batch has few tokens", least=0, below=1)
    grad_clip: float = knob(1.0, "clip the global gradient norm here; 0 = off", least=0)
    muon_lr: float = knob(0.02, "peak learning rate of Muon's matrices, at any width", least=0)
    muon_momentum: float = knob(0.95,
        "Muon's decay of the mean gradient, after a rise from 0.85 in 300 steps", least=0, below=1)
    decay_lr: bool = knob(True, "warm up, then follow lr_schedule; False = constant")
    lr_schedule: Literal["cosine", "linear", "constant"] = knob("cosine",
        "after the warm-up: cosine | linear (constant, then linearly down) | constant")
    decay_fraction: float = knob(0.65,
        "linear: the share of lr_decay_iters, at its end, in which the rate falls", least=0)
    warmup_iters: int = knob(2000, "steps of linear warm-up", least=0)
    lr_decay_iters: int = knob(600000,
        "the rate reaches min_lr here, usually at max_iters", least=0)
    min_lr: float = knob(6e-5,
        "where the rate ends, usually learning_rate / 10; Muon's ends at the same fraction",
        least=0)
    # looking and saving
    eval_interval: int = knob(2000, "evaluate every so many steps", least=1)
    eval_iters: int = knob(200,
        "micro-batches an evaluation reads of each split, always the same ones", least=1)
    eval_only: bool = knob(False, "evaluate once and end")
    log_interval: int = knob(1, "log every so many steps", least=1)
    sample_tokens: int = knob(0,
        "show a sample of so many tokens at each evaluation; 0 = none", least=0)
    checkpoint_interval: int = knob(0, "save every so many steps; 0 = at each evaluation", least=0)
    keep_checkpoints: int = knob(2, "newest bundles to keep; best.pt is kept besides", least=2)
    always_save_checkpoint: bool = knob(True,
        "nanoGPT's; changes nothing here: newest and best are always kept")
    wandb_log: bool = knob(False, "log to Weights & Biases as well")
    wandb_project: str = knob("owt", "its project")
    wandb_run_name: str = knob("gpt2", "its run name")
    # the machine
    device: str = knob("auto", "auto | cpu | cuda | cuda:1 | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto",
        "of the matrix products: auto takes bfloat16 where it is fast")
    compile: bool | Literal["auto"] = knob("auto", "torch.compile: auto = on CUDA")
    deterministic: bool = knob(False,
        "bits repeat on CUDA too, for some speed; on a CPU they always do")
    elastic: bool = knob(False,
        "the same bits on 1, 2, 4, ... ranks: gradients are added in one order, without DDP")
    rank_timeout: int = knob(600,
        "seconds a rank waits for another, one on a host that was cut off, before it gives up",
        least=1)
    backend: Literal["auto", "nccl", "gloo"] = knob("auto",
        "of torch.distributed, for several ranks: auto = nccl on CUDA, else gloo")


    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step, over all ranks."""
        return self.gradient_accumulation_steps * self.batch_size * self.block_size


ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "architecture", "n_kv_head",
                "head_dim", "n_ff", "rope_theta", "norm_eps", "tie_embeddings")
FIXED = ("seed", "optimizer", *ARCHITECTURE)  # see resume_config


def resume_config(config: TrainConfig, given: dict[str, Any], bundle: dict[str, Any],
                  data: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    """Return the settings of a checkpoint's run with the `given` ones over them, and a line for
    each that changed. `config` is the command's, `data` describes its dataset.

    Raises UserError for what would make it another run.
    """
    known = {f.name for f in fields(TrainConfig)}
    # an older checkpoint lacks newer settings
    saved = asdict(TrainConfig(**{key: value for key, value in bundle["config"].items()
                                  if key in known}))
    resumed = TrainConfig(**saved | given)
    changes = {key: (saved[key], value) for key, value in given.items()
               if saved.get(key, value) != value}
    fixed = FIXED + (("batch_size",) if resumed.elastic else ())  # sums of other sizes round apart
    for key in fixed:
        if key in changes:
            raise UserError(f"this run has {key}={changes[key][0]}, not {changes[key][1]}: that "
                            f"would be another run. Try: leave --{key} out, or another --out_dir")
    rows, old_rows = (c["batch_size"] * c["gradient_accumulation_steps"]
                      for c in (asdict(resumed), saved))
    if rows != old_rows:
        raise UserError(f"batch_size x gradient_accumulation_steps: expected {old_rows} as before, "
                        f"got {rows}")
    if data["fingerprint"] != bundle["data"]["fingerprint"]:
        raise UserError(f"this run was trained on {bundle['data']['name']} "
                        f"{bundle['data']['fingerprint'][:12]}, but {resumed.dataset} in data_dir="
                        f"{resumed.data_dir} is {data['fingerprint'][:12]}. Try: prepare the same "
                        "text again")
    # the folder may have moved; what the run started from stays recorded
    resumed = replace(resumed, out_dir=config.out_dir, init_from=bundle["config"]["init_from"])
    return resumed, [f"{key} {old} -> {new}" for key, (old, new) in changes.items()
                     if key != "init_from"]


def check_memory(config: TrainConfig, vocab_size: int) -> None:
    """Raise UserError at once for a run that this machine could only swap itself to death on."""
    parameters = config.n_embd * (12 * config.n_layer * config.n_embd + vocab_size)
    # float32 weights, gradients and two moments; int64 inputs and targets; losses
    needed = 16 * max(parameters, config.batch_size * config.block_size,
                      config.gradient_accumulation_steps)
    if needed > host_memory():
        raise UserError(f"this run needs more than {needed / 1e9:,.0f} GB, and the machine has "
                        f"{host_memory() / 1e9:,.0f}. Try: smaller n_layer, n_embd, batch_size or "
                        "gradient_accumulation_steps")


def _convert(kind: Any, value: Any) -> Any:
    """`value` as a `kind`; a string may spell a number or a bool. Raises ValueError if it is
    none."""
    if hasattr(value, "item"):
        value = value.item()  # a scalar of numpy or torch
    if get_origin(kind) in (Union, UnionType):
        for option in get_args(kind):
            try:
                return _convert(option, value)
            except ValueError:
                pass
    elif get_origin(kind) is Literal and value in get_args(kind):
        return value
    elif kind is bool and str(value).lower() in ("true", "1", "false", "0"):
        return str(value).lower() in ("true", "1")
    elif kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    elif kind is float and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is int and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            return int(str(value))
        except ValueError:
            if float(value).is_integer():  # 1e4 is a good whole number too
                return int(float(value))
    raise ValueError


def _in_words(kind: Any) -> str:
    """A type, for messages."""
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
    if kind in words:
        return words[kind]
    return " or ".join(option if isinstance(option, str) else _in_words(option)
                       for option in get_args(kind))


def checked(settings: type, key: str, value: Any, where: str) -> Any:
    """`value` as the type of `settings.key`, in its range; else the program ends, naming the key
    and `where`."""
    known = {f.name: f for f in fields(settings)}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        fail(f"{where}: unknown key {key!r}; "
             + (f"did you mean {near[0]}?" if near else "--help lists the keys"))
    kind = get_type_hints(settings)[key]
    try:
        value = _convert(kind, value)
    except (ValueError, OverflowError):
        fail(f"{where}: {key} takes {_in_words(kind)}, not {value!r}")
    if value == "" and known[key].default:
        fail(f"{where}: {key} must not be empty")
    if type(value) in (int, float):
        least, below = known[key].metadata["least"], known[key].metadata["below"]
        if type(value) is int and below == inf:
            below = 2**31
        if not least <= value < below:
            fail(f"{where}: {key} must be at least {least} and below {below}")
    return value


def read_config_file(settings: type, path: str) -> dict[str, Any]:
    """Return the settings that a Python file assigns, e.g. {"n_layer": 6}.

    The file runs in a namespace of its own, where it can read the defaults by name and, as in
    nanoGPT, a few modules without importing them. A name that is no key is its own business; one
    that is close to a key ends the program, one that the file never reads is listed in a note.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            source = f.read()
        code, nodes = compile(source, path, "exec"), list(ast.walk(ast.parse(source)))
    except OSError as e:
        fail(f"{path}: {e.strerror.lower()}; give the path of a config file, "
             "e.g. config/train_plays_cpu.py")
    except (SyntaxError, ValueError) as e:
        fail(f"{path}:{getattr(e, 'lineno', None) or 1}: not Python: {getattr(e, 'msg', e)}")
    reads = {node.id for node in nodes
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    defaults = {f.name: f.default for f in fields(settings)}
    modules = {name: importlib.import_module(MODULES[name]) for name in MODULES.keys() & reads}
    namespace = {"__builtins__": vars(builtins) | modules | defaults, "__name__": "config",
                 "__file__": path}
    try:
        exec(code, namespace)
    except (Exception, SystemExit) as e:
        line = [frame.lineno for frame in inspect.trace() if frame.filename == path][-1]
        fail(f"{path}:{line}: {type(e).__name__}: {e}")
    given = {key: checked(settings, key, value, path) for key, value in namespace.items()
             if key in defaults}
    others = {key: value for key, value in namespace.items() if key not in defaults
              and not key.startswith("_") and not callable(value) and not inspect.ismodule(value)}
    check_misspelled_keys(path, others, reads, given, defaults)
    if unused := sorted(others.keys() - reads):
        warn(f"{path}: ignoring what is no setting of this program: {', '.join(unused)}")
    return given


def check_misspelled_keys(path: str, others: dict[str, Any], reads: set[str],
                          given: dict[str, Any], known: Iterable[str]) -> None:
    """End the program if one of the `others` that a file assigns has nearly the name of a key.

    Not misspelled are a container, such as `learning_rates` to loop over, and a helper that the
    file reads and that is close to a key which it also sets (n_heads = 4; n_head = n_heads).
    """
    for name, value in others.items():
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        container = hasattr(value, "__len__") and not isinstance(value, str)
        if near and not container and not (name in reads and near[0] in given):
            fail(f"{path}: unknown key {name!r}; did you mean {near[0]}?")


def show_help(settings: type, usage: str) -> NoReturn:
    """Print every setting with its default and its reason, and end the program."""
    lines = [f"  --{f.name + '=' + str(f.default):<36}  {f.metadata['why']}"
             for f in fields(settings)]
    try:
        print(f"usage: {usage}\n", *lines, sep="\n", flush=True)
    except OSError as e:
        leave_closed_output(e)
    sys.exit(0)


def parse(settings: type, usage: str, argv: list[str]) -> tuple[Any, dict[str, Any], list[str]]:
    """Read a command line of words (`config/x.py` or whatever the script takes) and `--key=value`
    flags.

    Config files come before the flags, whatever the order. Returns the settings, those of them that
    were given rather than left at their default, and the words that are no config files.
    """
    if "--help" in argv or "-h" in argv:
        show_help(settings, usage)
    flags: dict[str, Any] = {}
    words = [a for a in argv if not a.startswith("-")]
    for flag in (a for a in argv if a.startswith("-")):
        key, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not equals:
            fail(f"{flag}: a flag is written --key=value, e.g. --eval_only=True; "
                 "--help lists the keys")
        flags[key] = checked(settings, key, value, f"--{key}={value}")
    given: dict[str, Any] = {}
    if settings is TrainConfig:
        for path in words:
            given |= read_config_file(settings, path)
        words = []
    given |= flags
    return settings(**given), given, words


def command_line(settings: type, usage: str) -> tuple[Any, dict[str, Any], list[str]]:
    """`parse` this process's command line. A script calls it before it loads torch, so that --help
    and mistakes are answered at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of loading in silence
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a locale may lack a character
    prepare_process()
    return parse(settings, usage, sys.argv[1:])



