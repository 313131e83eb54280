"""Train a GPT: `python train.py config/x.py --key=value`, or the same under torchrun; --help lists
every key.

Kill it at any time: with --init_from=auto the same command resumes from the newest checkpoint in
out_dir. Read `train` first, then `set_up`.
"""

from keepgpt.config import TrainConfig, command_line

if __name__ == "__main__":  # before torch is loaded: --help and mistakes answer at once
    CONFIG, OVERRIDES, _ = command_line(
        TrainConfig, "python train.py [config/x.py] [--key=value ...]"
    )

import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from keepgpt import checkpoint, elastic
from keepgpt.card import write_card
from keepgpt.checkpoint import Bundle
from keepgpt.config import ARCHITECTURE, Settings, check_settings, resume_config
from keepgpt.dataset import IDENTITY, Meta, check_identity
from keepgpt.device import (
    device_name,
    peak_flops,
    pick_dtype,
    restore_rng,
    rng_state,
    seed_generator,
    should_compile,
)
from keepgpt.errors import (
    EXIT_FAILED,
    EXIT_STOPPED,
    NotFinite,
    UserError,
    end_process,
    in_notebook,
    run_or_exit,
    warn,
)
from keepgpt.evaluation import (
    Text,
    combine_losses,
    count_token_bytes,
    describe_evaluation,
)
from keepgpt.files import FolderLock
from keepgpt.huggingface import read_weights
from keepgpt.loader import Loader, Windows, batch_number, seed_of
from keepgpt.metrics import Metrics
from keepgpt.mixture import (
    Mixture,
    Source,
    describe_sources,
    find_sources,
    open_split,
    read_checksums,
)
from keepgpt.optim import get_lr_factor, make_optimizer, set_rates
from keepgpt.ranks import SAME_START, Ranks, join_ranks, shared_settings
from keepgpt.same_tokens import check_tokenizer
from keepgpt.signals import Signals
from keepgpt.tokenizer import from_meta
from model import GPT, ModelArgs, build_model, crop_weights, generate, load_model

# what an evaluation reads, by its names in the log
Splits = dict[str, Windows | Text]
# gradient norms whose median a spike is compared with
SPIKE_WINDOW = 128
# fields of State that a checkpoint stores as they are
PLAIN_STATE = (
    "step",
    "evaluation",
    "wandb_run_id",
    "data_start",
    "replays",
    "trunk",
    "went_back_to",
)


@dataclass
class State:
    """What training changes, and a checkpoint therefore stores."""

    ranks: Ranks
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # updates done
    # the last one: its step and losses
    evaluation: dict = field(default_factory=dict)
    wandb_run_id: str | None = None
    # the step where the dataset starts: 0, or that of a branch with other data
    data_start: int = 0
    # batches that are never trained on: their number before the update after each step
    skips: dict[int, int] = field(default_factory=dict)
    # steps that had another result when they were computed again
    replays: int = 0
    # the last gradient norms, NaN before there are as many; None without spike_factor
    norms: Tensor | None = None
    # the checkpoint that a branch started from, and the step that the run last went back to
    trunk: dict = field(default_factory=dict)
    went_back_to: int = 0

    def state_dict(self) -> Bundle:
        """Return the state as a dict of plain values and live tensors. Every rank must call it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self.ranks.gather(rng_state(self.ranks.device)),
            "world_size": self.ranks.world_size,
            **{key: getattr(self, key) for key in PLAIN_STATE},
            # a resumed run finds out again what to skip for its next update
            "skips": {step: n for step, n in self.skips.items() if step < self.step},
            "norms": self.norms,
        }

    def load_state_dict(self, bundle: Bundle) -> None:
        """Load what `state_dict` returned, except the model's weights, which are loaded already.
        The optimizer keeps this command's settings."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(bundle["optimizer"] | {"param_groups": groups})
        # only a float16 run has one
        if bundle["scaler"]:
            self.scaler.load_state_dict(bundle["scaler"])
        # a rank that the saved run did not have keeps the generators that its seed gave it
        if self.ranks.rank < len(bundle["rng"]):
            restore_rng(bundle["rng"][self.ranks.rank], self.ranks.device)
        # older bundles lack some
        for key in (*PLAIN_STATE, "skips"):
            setattr(self, key, bundle.get(key, getattr(self, key)))
        # a window that is saved, and is needed again
        if self.norms is not None and bundle.get("norms") is not None:
            self.norms = bundle["norms"].to(self.ranks.device)

    @property
    def next_batch(self) -> int:
        """Return the number of the batch that the next update reads."""
        return batch_number(self.step, self.skips, self.data_start)

    @property
    def progress(self) -> tuple[int, int | None]:
        """Return the step and that of the last evaluation, see checkpoint.progress_of."""
        return self.step, self.evaluation.get("step")


@dataclass
class Run:
    """A run in this process: its settings, its data, its model and its state."""

    config: TrainConfig
    ranks: Ranks
    lock: FolderLock  # on out_dir, held by rank 0
    data: Meta
    loader: Loader
    splits: Splits  # see open_data
    compiled_model: Any  # the model itself where it is not compiled
    train_model: Any  # that one in DDP, if there are several ranks
    accumulate: Callable[[elastic.AddGradient], None]  # see compute_gradient
    dtype: torch.dtype  # of the matrix products
    autocast: Any
    state: State
    token_bytes: Tensor | None  # see count_token_bytes
    # set_up makes these last
    saver: checkpoint.Saver | None = None
    metrics: Metrics | None = None
    first_step: int = 0  # of this process
    # on the device: False once an update was not made; the number of the updates before that one
    is_good: Tensor | bool = True
    updates: Tensor | int = 0
    # the loss and the gradient norm of each step since the host last asked for them
    unchecked: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    # those of a step that is being computed again
    replayed: tuple[float, float] | None = None


def set_up(config: TrainConfig, overrides: Settings, opened: ExitStack) -> Run:
    """Start the run that a command asks for, or resume it. `overrides` are the settings that the
    command gives; `opened` gets what must be closed. Raises UserError."""
    # join the other ranks; afterwards a notebook has its number of threads again
    opened.callback(torch.set_num_threads, torch.get_num_threads())
    ranks = join_ranks(config)

    # lock the folder and find the checkpoint to resume from, on rank 0, which sends it to all
    lock = FolderLock(Path(config.out_dir))
    opened.callback(lock.release)
    bundle = ranks.on_first(lambda: find_checkpoint(config, overrides, lock))

    # merge the checkpoint's settings with the command's
    config, changes, notes = ranks.on_each(
        lambda: merge_settings(config, overrides, bundle)
    )
    elastic.check_elastic(config, ranks)

    # find the data: the same on all ranks, and the same as before
    sources, data = find_data(config, bundle, ranks)

    # build the model: with the checkpoint's weights, those that init_from names, or random ones
    ranks.agree_on_threads(elastic.read_threads(config, bundle))
    torch.manual_seed(config.seed)
    model = ranks.on_each(lambda: make_model(config, overrides, data, bundle))
    is_read = bundle is not None or config.source != "scratch"
    ranks.agree_on_weights(model, is_read)
    # weights from elsewhere bring their sizes
    config = replace(config, **{key: getattr(model.args, key) for key in ARCHITECTURE})

    # open the data, in windows of the model's block_size
    loader, splits = ranks.on_each(lambda: open_data(sources, config, ranks))

    # compile the model, wrap it in DDP, make the optimizer, and restore the state
    run = build_run(config, ranks, lock, data, loader, splits, model)
    if bundle:
        run.state.load_state_dict(bundle)
        run.first_step = run.state.step
        run.updates = run.state.step

    # start the log and the saver, which write on rank 0 only
    start_log(run, bundle, opened)
    if bundle:
        changes |= list_roundings(run, bundle)
        start = f"{bundle['start']} at step {run.state.step}"
        run.metrics.say(", ".join([start, *changes.values()]))
    for note in notes:
        warn(note)
    describe_run(run)
    return run


def find_data(
    config: TrainConfig, bundle: Bundle | None, ranks: Ranks
) -> tuple[list[Source], Meta]:
    """Return the sources of the data, with the checksums of their blocks, and its description.
    Raises UserError unless it is the same on all ranks, and fits the `bundle`."""
    sources = ranks.on_each(lambda: find_sources(config.data_dir, config.dataset))
    data = describe_sources(sources, config.dataset)
    saved_data = bundle["data"] if bundle else {}
    identity = {key: data[key] for key in IDENTITY}
    if bundle:
        # only a branch may have other data, or other windows: it starts them at the beginning
        is_other = any(saved_data[key] != value for key, value in identity.items())
        may_differ = "dataset" in bundle.get("branch", ())
        has_other_windows = config.block_size != bundle["config"]["block_size"]
        if not may_differ:
            ranks.on_each(lambda: check_identity(config.dataset, data, saved_data))
        if is_other or has_other_windows:
            ranks.on_each(lambda: start_other_data(bundle, data))
            saved_data = {}
    # only its name and place may differ between hosts
    ranks.check_equal({"data": identity, **shared_settings(config)}, SAME_START)
    ranks.on_first(lambda: read_checksums(sources, saved_data))
    for source in sources:
        source.meta["crc32"] = ranks.from_first(source.meta.get("crc32"))
    return sources, describe_sources(sources, config.dataset)


def start_other_data(bundle: Bundle, data: Meta) -> None:
    """Let a branch's `bundle` start the dataset that `data` describes at its beginning. Raises
    UserError if it has other tokens."""
    vocab_size = bundle["model_args"]["vocab_size"]
    check_tokenizer("the trunk", vocab_size, bundle["data"], data)
    bundle["start"] += f", with {data['name']} from its beginning,"
    bundle["data_start"] = bundle["step"]
    bundle["skips"] = {}
    # its losses are of the other data
    bundle["evaluation"] = {}


def start_log(run: Run, bundle: Bundle | None, opened: ExitStack) -> None:
    """Start the log, and the saver that continues a checkpoint's `bundle`."""
    # a branch starts new files; a run that never saved may have left a log in its folder
    is_branch = bundle is not None and "branch" in bundle
    if is_branch:
        bundle = None
    config = run.config
    state = run.state
    is_writer = run.ranks.rank == 0 and not config.eval_only
    out_dir = Path(config.out_dir) if is_writer else None
    if out_dir and is_branch:
        (out_dir / "metrics.jsonl").unlink(missing_ok=True)

    # the log drops the rows after this step, which will come again
    is_evaluated = state.evaluation.get("step") == state.step
    is_quiet = run.ranks.rank > 0
    run.metrics = Metrics(out_dir, state.step, is_evaluated, is_quiet, run.lock)
    opened.push(run.metrics.end)

    # a checkpoint never is ahead of the log: metrics.sync comes before each commit
    run.saver = checkpoint.Saver(
        out_dir,
        config.keep_checkpoints,
        bundle,
        run.metrics.sync,
        run.ranks.device,
        checkpoint.Disk(run.lock),
        config.keep_every,
    )
    opened.callback(run.saver.wait)


def build_run(
    config: TrainConfig,
    ranks: Ranks,
    lock: FolderLock,
    data: Meta,
    loader: Loader,
    splits: Splits,
    model: GPT,
) -> Run:
    """Compile the model, wrap it in DDP, and make its optimizer. Raises UserError."""
    device = ranks.device
    model.to(device)

    # choose the dtype of matrix products and whether to compile: the same on all ranks
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    is_compiled = should_compile(config, device)
    ranks.check_equal(
        {"dtype": dtype, "compile": is_compiled},
        "--dtype=float32 --compile=False for all ranks",
    )

    # compile with static shapes: otherwise the graph depends on earlier batch sizes
    compiled_model = torch.compile(model, dynamic=False) if is_compiled else model

    # average gradients over the ranks: elastic's tree does it, or DDP
    train_model = compiled_model
    if config.elastic:
        accumulate = partial(elastic.accumulate_in_tree, model, ranks, loader.local)
    else:
        if ranks.world_size > 1:
            train_model = DistributedDataParallel(compiled_model)
            # DDP fixes the order of its buckets at the first backward pass. Run one now and discard
            # it: then a resumed run adds gradients in the same order as an uninterrupted one.
            with autocast:
                x, y = splits["train"].rows(0, config.batch_size)
                loss = train_model(x.to(device), y.to(device))
            loss.backward()
            model.zero_grad(set_to_none=True)
        accumulate = partial(accumulate_gradient, train_model, loader.local)

    # make the optimizer; the scaler acts in float16 only
    optimizer = make_optimizer(model, config, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = State(ranks, model, optimizer, scaler)
    if config.spike_factor:
        state.norms = torch.full((SPIKE_WINDOW,), math.nan, device=device)
    return Run(
        config=config,
        ranks=ranks,
        lock=lock,
        data=data,
        loader=loader,
        splits=splits,
        compiled_model=compiled_model,
        train_model=train_model,
        accumulate=accumulate,
        dtype=dtype,
        autocast=autocast,
        state=state,
        token_bytes=ranks.on_first(lambda: count_token_bytes(data)),
    )


def find_checkpoint(
    config: TrainConfig, overrides: Settings, lock: FolderLock
) -> Bundle | None:
    """Lock out_dir, unless with eval_only. Return the bundle to resume or branch from, with a
    "start" that says so, or None to start a run. Raises UserError if init_from does not fit the
    folder's content."""
    out_dir = Path(config.out_dir)
    is_auto = config.init_from.partition(":")[0] == "auto"
    if not config.eval_only:
        # a restart loop may come back before the ranks of a killed launcher have ended
        lock.acquire(patience=30 if is_auto else 0)
    checkpoint.mention_renamed(out_dir)
    has_run = checkpoint.has_run(out_dir)
    # an evaluation is of the folder's run, unless init_from names other weights
    if config.eval_only and "init_from" not in overrides:
        is_auto = True
    if config.source == "resume" or (is_auto and has_run):
        return read_run(config, lock) | {"start": f"resuming {out_dir}"}
    # a new run never overwrites another one
    if has_run and not config.eval_only:
        raise UserError(
            f"{out_dir} already holds a run. Try: --init_from=resume to continue it, or "
            "--out_dir=<new folder>"
        )
    if config.trunk is not None:
        bundle = checkpoint.read_trunk(Path(config.trunk), config.step)
        start = f"branching from {config.trunk}"
        return bundle | {"start": start, "branch": list(overrides)}
    if config.step:
        raise UserError(
            f"step={config.step} needs --init_from=resume, or branch:PATH with a run's folder"
        )
    return None


def read_run(config: TrainConfig, lock: FolderLock) -> Bundle:
    """Return the bundle of the run in out_dir to resume from. Raises UserError."""
    out_dir = Path(config.out_dir)
    # with auto:branch:, config.step is one of the trunk's
    step = config.step if config.trunk is None else 0
    # an evaluation changes nothing
    if config.eval_only:
        return checkpoint.find_bundle(out_dir, step)[1]
    return checkpoint.go_back(out_dir, step, lock)


def merge_settings(
    config: TrainConfig, overrides: Settings, bundle: Bundle | None
) -> tuple[TrainConfig, dict[str, str], list[str]]:
    """Return the run's settings, a line for each one that a resume changes, and notes on them.
    Raises UserError."""
    if not bundle:
        config, notes = check_settings(config, overrides, resumed=False)
        return config, {}, notes
    start = {"init_from": config.init_from, "step": config.step}
    is_branch = "branch" in bundle
    config, changes = resume_config(config, overrides, bundle["config"], is_branch)
    # a branch is another run, in another folder
    if is_branch:
        config = replace(config, **start)
        changes.pop("out_dir", None)
        step = bundle["step"]
        if step >= config.max_iters and not config.eval_only:
            raise UserError(
                f"the trunk is at step {step}, and max_iters={config.max_iters} leaves nothing to "
                "train. Try: a larger --max_iters, or --step of an earlier checkpoint"
            )
    config, notes = check_settings(config, changes, resumed=True)
    return config, changes, notes


def open_data(
    sources: list[Source], config: TrainConfig, ranks: Ranks
) -> tuple[Loader, Splits]:
    """Return this rank's share of the training batches, and the splits for evaluations: "train",
    "val" or for each source of a mixture "val/NAME", and "text", see eval_text. Raises
    UserError."""
    # this rank computes a contiguous range of each step's micro-batches
    micro_batches = config.gradient_accumulation_steps
    per_rank, rest = divmod(micro_batches, ranks.world_size)
    if rest:
        raise UserError(
            f"gradient_accumulation_steps={micro_batches} counts over all ranks: expected a "
            f"multiple of {ranks.world_size}"
        )
    local = range(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)

    # training cuts each epoch at another offset; an evaluation always reads the same windows
    cut = partial(open_split, block_size=config.block_size, seed=config.seed)
    shifted = cut(sources, "train", shift=True)
    loader = Loader(shifted, config.batch_size, micro_batches, local, ranks.device)
    splits = {"train": cut(sources, "train", shift=False)}
    for source in sources:
        name = "val" if len(sources) == 1 else f"val/{source.meta['name']}"
        splits[name] = cut([source], "val", shift=False)
    if config.eval_text:
        splits["text"] = Text(config.eval_text, sources[0].meta, config.block_size)
    return loader, splits


def make_model(
    config: TrainConfig,
    overrides: Settings,
    data: Meta,
    bundle: Bundle | None,
) -> GPT:
    """Return the model on the CPU, with the weights of a checkpoint's `bundle`, those that
    init_from names, or random ones. Raises UserError."""
    # a checkpoint's weights; the block may be another one in a branch
    if bundle:
        args = bundle["model_args"] | {
            "dropout": config.dropout,
            "block_size": config.block_size,
        }
        source = f"the weights, with block_size={config.block_size}"
        return load_model(args, bundle["model"], source)

    # weights from elsewhere
    if config.source != "scratch":
        return load_pretrained(config, overrides, data)

    # random weights
    if config.eval_only:
        warn(
            "evaluating an untrained model. Try: --init_from=resume for the run in out_dir"
        )
    settings = {key: getattr(config, key) for key in ARCHITECTURE}
    args = ModelArgs(vocab_size=data["vocab_size"], dropout=config.dropout, **settings)
    return build_model(args)


def load_pretrained(config: TrainConfig, overrides: Settings, data: Meta) -> GPT:
    """Return a model with the weights that init_from names (see huggingface.read_weights), cropped
    to the dataset's vocabulary and the config's block_size. Raises UserError."""
    source = config.source
    args, state, tokens = read_weights(source)
    source_args = ModelArgs(**args)  # raises UserError for impossible sizes

    # the weights decide the sizes; a setting may only shorten the block
    for key in ARCHITECTURE:
        expected = getattr(source_args, key)
        value = overrides.get(key, expected)
        is_shorter = key == "block_size" and value < expected
        if value != expected and not is_shorter:
            raise UserError(
                f"init_from={source} has {key}={expected}, not {value}. Try: leave --{key} out"
            )

    # each token must mean the same as in their training
    check_tokenizer(source, args["vocab_size"], tokens, data)
    block_size = min(config.block_size, args["block_size"])
    args, state = crop_weights(args, state, data["vocab_size"], block_size)
    return load_model(args | {"dropout": config.dropout}, state, f"init_from={source}")


def describe_machine(run: Run) -> dict:
    """Return the facts that decide how this process rounds, settings aside."""
    return {
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "dtype": str(run.dtype).removeprefix("torch."),
        "compile": run.compiled_model is not run.state.model,
        "device": device_name(run.ranks.device),
    }


def list_roundings(run: Run, bundle: Bundle) -> dict[str, str]:
    """Return a line for each change since a checkpoint that may round sums in another way, under
    the name of what changed."""
    config = run.config
    saved_config = bundle["config"]
    on_cpu = run.ranks.device.type == "cpu"

    # the values before and now; older bundles lack world_size
    settings = ["elastic", "deterministic"]
    # with windows of another length, the losses are others too
    if config.block_size == saved_config["block_size"]:
        settings.append("batch_size")
    before = bundle | {key: saved_config.get(key) for key in settings}
    before["ranks"] = bundle.get("world_size", len(bundle["rng"]))
    now = describe_machine(run) | {key: getattr(config, key) for key in settings}
    now["ranks"] = run.ranks.world_size
    # one of these two changes nothing on this device
    del now["deterministic" if on_cpu else "threads"]

    lines = {}
    for key, value in now.items():
        if before.get(key) in (None, value):
            continue
        lines[key] = f"{key} {before[key]} -> {value}"
        if key == "ranks" and elastic.keeps_bits(config, saved_config, on_cpu):
            continue
        lines[key] += ": the same losses up to rounding"
        if config.dropout and key in ("batch_size", "compile", "device"):
            lines[key] += " and other dropout masks"
    return lines


def describe_run(run: Run) -> None:
    """Print the size of the run and its machine, and start what describes it elsewhere."""
    config = run.config
    about = describe_machine(run)
    machine = f"{run.ranks.world_size} x {about['device']}, {about['dtype']}"
    if about["compile"]:
        machine += ", compiled"
    parameters = sum(p.numel() for p in run.state.model.parameters())
    run.metrics.say(
        f"{parameters / 1e6:.2f}M parameters, {config.tokens_per_step:,} tokens/step, "
        f"{run.data['tokens']['train']:,} of {run.data['name']}; {machine}"
    )
    if isinstance(run.loader.split, Mixture):
        batch = run.state.next_batch + config.max_iters - run.state.step
        run.metrics.say(f"by step {config.max_iters}: {describe_mixture(run, batch)}")
    if not run.saver.folder:
        return
    warn_if_disk_full(run, parameters)
    write_run_card(run, machine)
    if config.wandb_log:
        # a resumed run continues the same curve
        run.state.wandb_run_id = run.metrics.start_wandb(
            asdict(config), run.state.wandb_run_id
        )


def describe_mixture(run: Run, batch: int) -> str:
    """Return the share of each source of a mixture, and its epochs in the first `batch` batches."""
    mixture = run.loader.split
    counts = mixture.count_windows(run.loader.first_window(batch, 0))
    parts = []
    for part, split, count in zip(run.data["sources"], mixture.splits, counts):
        share = float(Fraction(part["share"]))
        parts.append(f"{part['name']} {share:.1%}, {count / split.windows:.2f} epochs")
    return "; ".join(parts)


def warn_if_disk_full(run: Run, parameters: int) -> None:
    """Warn if the checkpoints to come may need more space than is free."""
    config = run.config
    # the newest ones, best.pt and the file in progress, less those on the disk
    existing = len(checkpoint.list_numbered(run.saver.folder))
    count = max(1, config.keep_checkpoints + 2 - existing)
    if config.keep_every:
        count += config.max_iters // config.keep_every
        count -= run.state.step // config.keep_every
    # weights and two moments, in float32
    needed = 12 * parameters * count
    free = shutil.disk_usage(run.saver.folder).free
    if needed > free:
        warn(
            f"{run.saver.folder}: {count} checkpoints to come need about {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free. Try: a larger --keep_every, or another drive"
        )


def write_run_card(run: Run, machine: str = "") -> None:
    """Write out_dir/README.md, if that works; with a line about this start if `machine`
    is named."""
    if not run.saver.folder:
        return
    state = run.state
    notes = []
    if state.evaluation:
        losses = describe_evaluation(state.evaluation)
        notes.append(f"Step {state.evaluation['step']}: {losses}.")
    if isinstance(run.loader.split, Mixture):
        notes.append(f"Mixture: {describe_mixture(run, state.next_batch)}.")
    if state.trunk:
        notes.append(
            "Branched from `{path}`, step {step} (sha256 {sha256}).".format(
                **state.trunk
            )
        )
    if state.skips:
        skips = ", ".join(
            f"{n} before step {step + 1}" for step, n in state.skips.items()
        )
        notes.append(f"Skipped batches: {skips}.")
    if state.replays:
        notes.append(f"Steps with another result when computed again: {state.replays}.")
    start = f"step {state.step}, {machine}" if machine else ""
    run.metrics.attempt(
        f"not writing {run.config.out_dir}/README.md",
        lambda: write_card(run.config, run.data, notes, start, run.lock),
    )


def train(run: Run, signals: Signals) -> int:
    """Train until max_iters, or until a signal comes. Return the exit code. Raises UserError."""
    config = run.config
    state = run.state
    ranks = run.ranks
    is_alone = ranks.world_size == 1
    clock = Clock(state.step)
    is_best = False
    while True:
        # once in a while: evaluate
        if is_evaluation_due(run):
            is_best = evaluate_and_log(run, signals)
            clock.restart(state.step)

        # once in a while: save. A signal asks for the last save
        is_stopped = ranks.any(signals.received or run.lock.lost)
        if is_stopped or state.step >= config.max_iters:
            break
        if is_best or is_save_due(run):
            save(run, is_best)

        # a step: the gradient of all micro-batches, then one update
        losses = signals.interrupt(lambda: compute_gradient(run), is_alone)
        if losses is None:  # a signal came and interrupted it
            state.optimizer.zero_grad(set_to_none=True)
            continue
        loss, grad_norm = update(run, losses)
        is_best = False

        # an update that was not made: compute it again, or skip its data
        if is_check_due(run) and not check_updates(run):
            continue

        # once in a while: log
        if is_log_due(run):
            log_step(run, clock, loss, grad_norm)
    is_saved = save_last(run, is_best)
    return finish(run, signals, is_stopped, is_saved)


@dataclass
class Clock:
    """Measure the mean duration of the steps since the last line or evaluation."""

    step: int
    time: float = field(default_factory=time.perf_counter)

    def restart(self, step: int) -> None:
        """Start to measure at `step`."""
        self.step = step
        self.time = time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        """Return the mean seconds of the steps up to `step`."""
        return (time.perf_counter() - self.time) / (step - self.step)


def is_evaluation_due(run: Run) -> bool:
    """Return True at each eval_interval and at the end, unless this step is evaluated already."""
    step = run.state.step
    is_due = step % run.config.eval_interval == 0 or step >= run.config.max_iters
    return is_due and run.state.evaluation.get("step") != step


def evaluate_and_log(run: Run, signals: Signals) -> bool:
    """Evaluate. Return True if the validation loss is lower than best.pt's. If a signal comes, the
    resumed run evaluates at this step."""
    # a rank that left an evaluation alone would leave the others waiting
    is_alone = run.ranks.world_size == 1
    losses = signals.interrupt(lambda: evaluate(run, signals), is_alone)
    if losses is None:
        return False
    best = record_evaluation(run, losses)
    write_run_card(run)
    best_val_loss = min(run.saver.best_val_loss, losses["val_loss"])
    run.metrics.log_evaluation(run.state.evaluation, best, best_val_loss)
    if run.config.sample_tokens and run.ranks.rank == 0:
        signals.interrupt(lambda: show_sample(run), alone=True)
    return best


def record_evaluation(run: Run, losses: dict[str, float]) -> bool:
    """Store an evaluation's losses in the state. Return True if its validation loss is lower than
    best.pt's, and is to be saved."""
    run.state.evaluation = {"step": run.state.step, **losses}
    run.saver.wait()  # a save in progress may replace best.pt
    is_lower = losses["val_loss"] < run.saver.best_val_loss
    is_savable = run.saver.folder is not None and run.state.step > 0
    return run.ranks.from_first(is_savable and is_lower)


@torch.no_grad()
def evaluate(run: Run, signals: Signals) -> dict[str, float] | None:
    """Return the losses and the bits per byte of each split, see combine_losses, computed by all
    ranks together; None if a signal came."""
    run.state.model.eval()
    losses = {}
    bytes_per_token = {}
    for name in run.splits:
        means = evaluate_split(run, name, signals)
        if means is None:
            return None
        losses[name], bytes_per_token[name] = means
    return combine_losses(losses, bytes_per_token, run.data)


def evaluate_split(run: Run, name: str, signals: Signals) -> list[float] | None:
    """Return the mean loss of a split's windows, and their bytes per token, 0 if those are unknown;
    None if a signal came."""
    ranks = run.ranks
    batch_size = run.config.batch_size
    split = run.splits[name]
    # the same windows at each evaluation, of a text all; the last batch may be smaller
    count = min(run.config.eval_iters * batch_size, split.windows)
    if name == "text":
        count = split.windows
    starts = range(0, count, batch_size)
    sizes = [min(batch_size, count - start) for start in starts]

    # for each batch the mean loss, and the bytes per token; each column is filled by one rank
    means = torch.zeros(2, len(sizes), device=ranks.device)
    for i, size in enumerate(sizes):
        owner = i % ranks.world_size
        # all ranks stop at the same batch
        if owner == 0 and ranks.any(signals.received):
            return None
        if owner != ranks.rank:
            continue
        x, y = split.rows(starts[i], size)
        # a batch of another shape would need another compiled graph
        is_usual = x.shape == (batch_size, run.config.block_size)
        model = run.compiled_model if is_usual else run.state.model
        with run.autocast:
            means[0, i] = model(x.to(ranks.device), y.to(ranks.device))
        if run.token_bytes is not None:
            means[1, i] = run.token_bytes[y].double().mean()

    # the mean over windows, not over batches
    means = ranks.sum(means).cpu().double()
    return ((means * torch.tensor(sizes)).sum(1) / count).tolist()


def show_sample(run: Run) -> None:
    """Print a text of the current model, if that works."""
    text = run.metrics.attempt("no sample", lambda: generate_sample(run))
    if text is not None:
        run.metrics.say(text + "\n")


def generate_sample(run: Run) -> str:
    """Return a text of the current model, which starts after the end-of-text token or token 0."""
    tokenizer = from_meta(run.data)
    first = tokenizer.eot or 0
    run.state.model.eval()
    count = run.config.sample_tokens
    steps = generate(run.state.model, [[first]], count, temperature=0.8, top_k=200)
    tokens = [row[0] for row in steps]
    decode = tokenizer.make_decoder()
    # the first token may decide whether a space comes next
    decode(first)
    return "".join(decode(token) for token in tokens if token is not None)


def is_save_due(run: Run) -> bool:
    """Return True at each checkpoint_interval and milestone, unless a save of this state was
    started already."""
    config = run.config
    step = run.state.step
    interval = config.checkpoint_interval or config.eval_interval
    is_milestone = config.keep_every > 0 and step % config.keep_every == 0
    is_due = step > 0 and (step % interval == 0 or is_milestone)
    return is_due and run.saver.started != run.state.progress


def save(run: Run, best: bool) -> None:
    """Start to save a checkpoint, also as best.pt if it is the `best`. Raises UserError if the
    ranks hold different weights."""
    check_ranks(run)
    # a save in progress may change best_val_loss
    run.saver.wait()
    best_val_loss = run.saver.best_val_loss
    if best:
        best_val_loss = run.state.evaluation["val_loss"]
    run.saver.save(make_bundle(run, best_val_loss), best)


def make_bundle(run: Run, best_val_loss: float) -> Bundle:
    """Return the content of a checkpoint, with live tensors. Every rank must call it."""
    return {
        **run.state.state_dict(),
        **describe_machine(run),
        "format": checkpoint.FORMAT,
        "config": asdict(run.config),
        "model_args": asdict(run.state.model.args),
        "data": run.data,
        "best_val_loss": best_val_loss,
    }


def save_last(run: Run, best: bool) -> bool:
    """Save this step, unless it is on disk or there is nothing to save. Try twice: a second file
    may succeed where the first one failed. Return True if it is on disk."""
    if not run.is_good:
        rewind(run)
    for _ in range(2):
        if is_on_disk(run):
            return True
        save(run, best)
    return is_on_disk(run)


def is_on_disk(run: Run) -> bool:
    """Wait for the save in progress. Return True if this step is on disk, or it is step 0."""
    run.saver.wait()
    saved = run.state.step == 0 or run.saver.saved == run.state.progress
    return run.ranks.from_first(saved)


def check_ranks(run: Run) -> None:
    """Raise UserError, on every rank, unless all hold the same weights and moments: each rank
    computes the update itself, and another kind of machine may round it in another way."""
    state = {
        "model": run.state.model.state_dict(),
        "optimizer": run.state.optimizer.state_dict()["state"],
    }
    run.ranks.check_equal(
        {f"after step {run.state.step}": state},
        "the same kind of machine for all ranks, see docs/DISTRIBUTED.md; this step is not saved",
    )


def compute_gradient(run: Run) -> Tensor:
    """Set .grad to the mean gradient of a step's micro-batches. Return this rank's losses, (M,),
    0 for micro-batches of other ranks."""
    state = run.state
    device = run.ranks.device
    batch = state.next_batch
    state.model.train()
    losses = torch.zeros(run.config.gradient_accumulation_steps, device=device)

    def add_gradient(m: int, count: int) -> None:
        """Add the gradient of micro-batch m, divided by `count`, to .grad."""
        x, y = run.loader.get_batch(batch, m)  # (B, T) each
        # dropout depends on nothing else
        seed_generator(seed_of(run.config.seed, batch, m), device)
        with run.autocast:
            loss = run.train_model(x, y)
        losses[m] = loss.detach()
        state.scaler.scale(loss / count).backward()

    run.accumulate(add_gradient)
    return losses


def accumulate_gradient(
    train_model: Any, micro_batches: range, add_gradient: elastic.AddGradient
) -> None:
    """Set .grad to the mean gradient of this rank's `micro_batches`. DDP averages it over the
    ranks, once per step."""
    for m in micro_batches:
        # an attribute of DDP; without DDP nobody reads it
        train_model.require_backward_grad_sync = m == micro_batches[-1]
        add_gradient(m, len(micro_batches))


def update(run: Run, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of the optimizer, unless a number is not finite or the gradient is a spike.
    Return the mean loss and the norm of the gradient over all ranks, before clipping."""
    config = run.config
    state = run.state

    # the loss and the gradient norm, over all ranks
    loss = run.ranks.sum(losses).mean()
    state.scaler.unscale_(state.optimizer)
    parameters = list(state.model.parameters())
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, grad_norm)

    # float16 gradients overflow now and then: the scaler skips that update
    in_float16 = state.scaler.is_enabled()
    is_good = torch.isfinite(loss if in_float16 else loss + grad_norm)
    if state.norms is not None:
        # NaN, and so no limit, before the window is full
        limit = config.spike_factor * state.norms.median()
        is_good = is_good & ~((grad_norm > limit) & torch.isfinite(grad_norm))
    run.is_good = is_good & run.is_good
    run.unchecked.append((loss, grad_norm))
    if state.norms is not None:
        window = torch.cat((state.norms[1:], grad_norm.view(1)))
        is_counted = run.is_good & torch.isfinite(grad_norm)
        state.norms = torch.where(is_counted, window, state.norms)

    # the update, once a save in progress has copied the weights
    set_rates(state.optimizer, state.step, config)
    run.saver.wait_for_copy()
    if must_host_wait(run):
        if run.is_good:
            run.is_good = run.is_good & scale_and_step(state)
    else:
        # 1 makes the optimizer change nothing, on the device
        state.optimizer.found_inf = 1.0 - run.is_good.float()
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    run.updates = run.updates + run.is_good
    state.step += 1

    # ranks that round differently show it at once
    if state.step == run.first_step + 1:
        check_ranks(run)
    return loss, grad_norm


def must_host_wait(run: Run) -> bool:
    """Return True where the host learns of each update whether it was made: on a CPU, and in
    float16, whose scaler would continue after the first one that was not."""
    return run.ranks.device.type != "cuda" or run.state.scaler.is_enabled()


def scale_and_step(state: State) -> bool:
    """Make the update. Return False if it was not made because even unscaled gradients overflow in
    float16; the scale is then as before."""
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    has_collapsed = state.scaler.get_scale() < min(scale, 1)
    if has_collapsed:
        state.scaler.update(scale)
    return not has_collapsed


def is_check_due(run: Run) -> bool:
    """Return True if the host must know which updates were made: before anything is logged,
    evaluated or saved. Elsewhere a GPU need not be waited for."""
    if must_host_wait(run) or run.replayed is not None:
        return True
    return is_log_due(run) or is_evaluation_due(run) or is_save_due(run)


def check_updates(run: Run) -> bool:
    """Return True if all updates were made. Otherwise go back to the first step without one: to
    compute it again, or if it was the same twice, with the next batch. Raises NotFinite if that
    changes nothing max_skips times."""
    state = run.state
    replayed = run.replayed
    run.replayed = None
    if run.is_good:
        if replayed:
            # a step that is computed again is checked at once
            numbers = [number.item() for number in run.unchecked[-1]]
            log_event(
                run,
                state.step,
                "replay",
                f"{describe_numbers(replayed)}, and from the same data "
                f"{describe_numbers(numbers)}: an error of the machine, or code that is not "
                "deterministic; continuing",
            )
            state.replays += 1
            write_run_card(run)
        run.unchecked.clear()
        return True

    # the machine may be to blame: compute the same once more
    numbers = rewind(run)
    if not replayed and run.config.max_skips:
        run.replayed = numbers
        return False

    # the data is: take the next batch for this step
    skipped = state.skips.get(state.step, 0)
    if skipped >= run.config.max_skips:
        raise NotFinite(describe_failure(run, numbers))
    cause = f"{describe_cause(run, numbers)}, twice"
    if replayed and describe_numbers(replayed) != describe_numbers(numbers):
        cause += f" (first {describe_numbers(replayed)})"
        state.replays += 1
    text = f"{cause}; skipping its data, batch {state.next_batch}"
    log_event(run, state.step + 1, "skip", text)
    state.skips[state.step] = skipped + 1
    write_run_card(run)
    return False


def rewind(run: Run) -> tuple[float, float]:
    """Go back to the first step whose update was not made. Return its loss and gradient norm."""
    state = run.state
    step = int(run.updates)
    loss, grad_norm = run.unchecked[step - state.step]
    state.step = step
    # the scaler forgets the gradients of this step
    state.scaler.update(state.scaler.get_scale())
    run.is_good = True
    run.unchecked.clear()
    return loss.item(), grad_norm.item()


def describe_numbers(numbers: Sequence[float]) -> str:
    """Return a loss and a gradient norm as text."""
    loss, grad_norm = numbers
    return f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"


def describe_cause(run: Run, numbers: Sequence[float]) -> str:
    """Return why an update with these numbers was not made."""
    if not all(math.isfinite(number) for number in numbers):
        return f"{describe_numbers(numbers)}: not finite"
    factor = run.config.spike_factor
    median = run.state.norms.median().item()
    return f"{describe_numbers(numbers)}: a spike, above {factor:g} x the median {median:.4g}"


def describe_failure(run: Run, numbers: Sequence[float]) -> str:
    """Return an error message about the next step, which has these numbers again and again."""
    # let a save in progress end: the hint depends on it
    run.saver.wait()
    config = run.config
    step = run.state.step
    rate = config.learning_rate * get_lr_factor(step, config)
    cause = describe_cause(run, numbers)
    skipped = run.state.skips.get(step, 0)
    if skipped:
        cause += f", also after {skipped} skipped batches"

    # without a checkpoint the run can only start again
    hint = "another --out_dir and a lower --learning_rate"
    if checkpoint.has_run(Path(config.out_dir)):
        hint = "--init_from=resume with a lower --learning_rate or a larger --max_skips"
    if all(map(math.isfinite, numbers)):
        hint += ", or a larger --spike_factor"
    if run.state.scaler.is_enabled():
        hint += ", or --dtype=bfloat16"
    return (
        f"step {step + 1}: {cause}; that update was not made. Likely causes: too high a learning "
        f"rate (it was {rate:.2e}), too little warm-up, float16, or corrupt data (python -m "
        f"tools.inspect {config.out_dir} --step={step + 1} shows it). Try: {hint}"
    )


def is_log_due(run: Run) -> bool:
    """Return True at each log_interval."""
    return run.state.step % run.config.log_interval == 0


def log_event(run: Run, step: int, event: str, text: str) -> None:
    """Log an event of a step: a row in metrics.jsonl, and a line."""
    run.metrics.log({"step": step, "event": event, "text": text})
    run.metrics.say(f"step {step}: {text}")


def log_step(run: Run, clock: Clock, loss: Tensor, grad_norm: Tensor) -> None:
    """Log a training step."""
    config = run.config
    step = run.state.step
    seconds = clock.seconds_per_step(step)
    tokens_per_s = config.tokens_per_step / seconds
    row = {
        "step": step,
        "tokens": step * config.tokens_per_step,
        "loss": loss.item(),
        "lr": config.learning_rate * get_lr_factor(step - 1, config),
        "grad_norm": grad_norm.item(),
        "tokens_per_s": tokens_per_s,
    }
    # the model FLOPs utilization (Chowdhery et al. 2022, PaLM, appendix B), where known
    peak = peak_flops(run.ranks.device)
    if peak:
        flops = run.state.model.flops_per_token() * tokens_per_s
        row["mfu"] = flops / (peak * run.ranks.world_size)
    run.metrics.log_step(row, config.max_iters, seconds)
    clock.restart(step)


def finish(run: Run, signals: Signals, is_stopped: bool, is_saved: bool) -> int:
    """Print how the run ended and close the log. Return the exit code. Raises UserError if out_dir
    was moved."""
    # a moved folder stops a run as a signal does
    if is_stopped or not is_saved:
        run.ranks.on_first(run.lock.check)

    code = 0
    line = f"done at step {run.state.step}"
    if is_stopped:
        code = EXIT_STOPPED
        line = f"stopped at step {run.state.step}"
    if run.state.step == 0:
        line += ", with nothing to save yet"
    elif is_saved:
        line += f", saved in {run.config.out_dir}"
    else:
        code = EXIT_FAILED
        line += f", NOT SAVED in {run.config.out_dir}"
    if is_stopped:
        line += "; continue with --init_from=auto"
    run.metrics.say(line)
    if run.state.step:
        out = run.config.out_dir
        run.metrics.say(
            f"look at it: python -m tools.inspect {out}, python -m tools.plot {out}"
        )
    close(run, signals, code)
    return code


def close(run: Run, signals: Signals, code: int) -> None:
    """Close the log. End the process here where its own end may hang."""
    # all ranks wait for rank 0: torchrun kills the others when one has ended
    closed = run.ranks.from_first(
        signals.interrupt(run.metrics.close, alone=True, saved=True)
    )
    # groups are not destroyed: before PyTorch 2.8, gloo can deadlock there with the GIL. A wandb
    # that did not close in time would hang again at the interpreter's end
    if run.ranks.world_size > 1 or not (closed or in_notebook()):
        end_process(code)


def run_training(
    config: TrainConfig, overrides: Settings, signals: Signals, opened: ExitStack
) -> int:
    """Set up a run, then train, or evaluate once. Return the exit code. Raises UserError."""
    opened.callback(signals.restore)
    run = set_up(config, overrides, opened)
    if not run.config.eval_only:
        return train(run, signals)
    before = run.state.evaluation
    evaluate_and_log(run, signals)
    code = 0
    # without a new evaluation, a signal came
    if run.state.evaluation is before:
        run.metrics.say("stopped before the evaluation was complete")
        code = EXIT_STOPPED
    close(run, signals, code)
    return code


def main(config: TrainConfig, overrides: Settings) -> int:
    """Train. Return the exit code, or exit with one line for a mistake."""
    with ExitStack() as opened:
        return run_or_exit(
            lambda: run_training(config, overrides, Signals(), opened),
            "a smaller --batch_size and more --gradient_accumulation_steps",
        )


if __name__ == "__main__":
    sys.exit(main(CONFIG, OVERRIDES))
