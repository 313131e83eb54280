"""How a run begins: from scratch, from weights, or from the newest whole bundle of its folder."""
import math
import secrets
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from card import write_card
from configurator import EXIT_MISTAKE, TrainConfig, describe, fail, warn
from loader import Loader, Split, dataset_folder, read_meta
from metrics import Metrics
from model import GPT, ModelArgs, cropped, read_weights, with_weights
from runtime import (Ranks, compiler_lacks, device_name, host_memory, join_ranks, lock, pick_dtype,
                     restore_rng, rng_state)
from tokenizer import check_tokenizer

ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "bias")
FIXED = ("seed", *ARCHITECTURE)  # another value would be another run


@dataclass
class Run:
    """A run in this process: its settings, its state, and what moves it on."""
    config: TrainConfig
    ranks: Ranks
    data: dict[str, Any]  # its meta.json
    loader: Loader
    splits: dict[str, Split]
    model: GPT
    fast: Any  # the model, compiled if that pays
    net: Any  # that one, its gradients averaged over the ranks
    dtype: torch.dtype  # of the matrix products
    autocast: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    lock: TextIO | None  # held for as long as the process lives
    id: str
    step: int = 0  # updates done
    evaluation: dict[str, Any] = field(default_factory=dict)  # the last one: step and losses
    best_val_loss: float = math.inf
    wandb_run_id: str | None = None
    healthy: Tensor = field(init=False)  # 1; 0, for good, with the first number that is not finite
    applied: Tensor = field(init=False)  # updates made; stays behind `step` once not healthy

    def __post_init__(self) -> None:
        self.healthy = torch.ones((), device=self.ranks.device)
        self.applied = torch.zeros((), device=self.ranks.device)

    def bundle(self) -> dict[str, Any]:
        """All that a resume needs, with the live tensors. A collective: each rank calls it."""
        return {"format": checkpoint.FORMAT, "run": self.id, "step": self.step,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": self.ranks.gather(rng_state(self.ranks.device)),
                "threads": torch.get_num_threads(),
                "config": asdict(self.config), "model_args": asdict(self.model.args),
                "data": self.data, "evaluation": self.evaluation,
                "best_val_loss": self.best_val_loss, "wandb_run_id": self.wandb_run_id}

    def restore(self, bundle: dict[str, Any]) -> None:
        """Take the state from a bundle whose weights the model has already. The optimizer's
        settings stay those of this command."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": bundle["optimizer"]["state"],
                                        "param_groups": groups})
        if self.scaler.is_enabled() and bundle["scaler"]:
            self.scaler.load_state_dict(bundle["scaler"])
        repeats = self.ranks.device.type == "cpu" or self.config.deterministic
        exact = self.config.elastic and bundle["config"].get("elastic") and repeats
        if len(bundle["rng"]) == self.ranks.world_size:
            restore_rng(bundle["rng"][self.ranks.rank], self.ranks.device)
        elif self.ranks.rank == 0:
            print(f"ranks {len(bundle['rng'])} -> {self.ranks.world_size}: "
                  + ("the same bits" if exact else
                     "the same batches, and the same losses but for rounding"))
        self.id = bundle["run"]
        for key in ("step", "evaluation", "best_val_loss", "wandb_run_id"):
            setattr(self, key, bundle[key])
        self.applied.fill_(self.step)


def begin(config: TrainConfig, given: dict[str, Any]) -> tuple[Run, Metrics, checkpoint.Saver]:
    """The run that a command asks for, where it stands; its log, and what saves it."""
    ranks = join_ranks(config)
    out_dir, device = Path(config.out_dir), ranks.device
    writes = ranks.rank == 0 and not config.eval_only
    held = hold(out_dir, config, ranks, writes)
    bundle = find_run(config, ranks, held)
    where = {"data_dir": config.data_dir} | bundle["config"] | given if bundle else asdict(config)
    folder = dataset_folder(where["data_dir"], where["dataset"])
    data = read_meta(folder)
    if bundle:
        config, changes = resumed_config(given, bundle, data)
        # the folder may have moved; what the run began from stays told
        config = replace(config, out_dir=str(out_dir), init_from=bundle["config"]["init_from"])
        if ranks.rank == 0:
            print(f"resuming {out_dir} at step {bundle['step']}", *changes, sep=", ")
        model = GPT(ModelArgs(**bundle["model_args"] | {"dropout": config.dropout}))
        model.load_state_dict(bundle["model"])
    else:
        model, config = build(config, given, data)
    if config.elastic:  # how many threads share a sum is part of its order
        threads = ranks.from_first(torch.get_num_threads())
        torch.set_num_threads(bundle.get("threads", threads) if bundle else threads)
    loader, splits = open_data(folder, config, data, ranks)
    model.to(device)
    run = assemble(config, ranks, data, loader, splits, model, held)
    if bundle:
        run.restore(bundle)

    metrics = Metrics(out_dir if writes else None, run.step,
                      run.evaluation.get("step") == run.step, quiet=ranks.rank > 0)
    saver = checkpoint.Saver(out_dir if writes else None, config.keep_checkpoints,
                             run.best_val_loss, metrics.sync, device)
    if writes:
        mark(held, run.id)
    introduce(run, metrics)
    return run, metrics, saver


def assemble(config: TrainConfig, ranks: Ranks, data: dict[str, Any], loader: Loader,
             splits: dict[str, Split], model: GPT, lock: TextIO | None) -> Run:
    """Return the run of a new model that is on its device: compiled, with an optimizer."""
    dtype = pick_dtype(config.dtype, ranks.device)
    autocast = (torch.autocast(ranks.device.type, dtype) if dtype != torch.float32
                else nullcontext())
    fast, net = as_it_runs(model, config, ranks, autocast, splits["train"])
    betas = config.beta1, config.beta2
    return Run(config, ranks, data, loader, splits, model, fast, net, dtype, autocast,
               model.optimizer(config.learning_rate, betas, config.weight_decay),
               torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16),
               lock, secrets.token_hex(8))


def introduce(run: Run, metrics: Metrics) -> None:
    """Say what begins here: on the terminal, in out_dir's README.md, and to wandb."""
    config, data = run.config, run.data
    parameters = sum(p.numel() for p in run.model.parameters())
    tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    machine = (f"{run.ranks.world_size} x {device_name(run.ranks.device)}, "
               + str(run.dtype).removeprefix("torch.")
               + ", compiled" * (run.fast is not run.model))
    metrics.say(f"{parameters / 1e6:.2f}M parameters, {tokens:,} tokens a step, "
                f"{data['tokens']['train']:,} of {data['name']}; {machine}")
    if not run.lock:  # another rank's, or no run's
        return
    try:
        write_card(config, data, parameters, run.step, machine)
    except OSError as e:
        warn(f"{config.out_dir}/README.md is left as it is: {describe(e)[0]}")
    if config.wandb_log:
        run.wandb_run_id = metrics.start_wandb(asdict(config), run.wandb_run_id)


def hold(out_dir: Path, config: TrainConfig, ranks: Ranks, writes: bool) -> TextIO | None:
    """Keep every other run out of out_dir, and remove what a dead one has left half-written."""
    held, problem = None, None
    try:
        if writes:
            # a restart loop comes back while the ranks of a dead launcher may still be ending
            held = lock(out_dir, patience=30 if is_auto(config) else 0)
            checkpoint.remove_leftovers(out_dir, checkpoint.Disk())
    except BlockingIOError:
        problem = (f"another run is writing to {out_dir}; wait for its end, or take another "
                   "--out_dir", EXIT_MISTAKE)
    except OSError as e:
        reason, code = describe(e)
        problem = f"out_dir={out_dir} can't be used: {reason}", code
    if problem := ranks.from_first(problem):
        fail(*problem)
    return held


def mark(held: TextIO, run_id: str) -> None:
    """Write into the lock's file whose folder this is."""
    held.seek(0)
    if held.read() == run_id:
        return
    try:
        held.truncate(0)
        held.write(run_id)
        held.flush()
    except OSError as e:
        reason, code = describe(e)
        fail(f"{held.name} can't be written: {reason}", code)


def is_auto(config: TrainConfig) -> bool:
    """Whether a run that is there is resumed, and else begun."""
    return config.init_from.partition(":")[0] == "auto"


def find_run(config: TrainConfig, ranks: Ranks, held: TextIO | None) -> dict[str, Any] | None:
    """The bundle to resume from, chosen by rank 0 for all; None to begin a run."""
    bundle, problem, out_dir = None, None, Path(config.out_dir)
    if ranks.rank == 0:
        has_run, foreign = checkpoint.has_run(out_dir), checkpoint.find_foreign(out_dir)
        resumes = config.init_from == "resume" or is_auto(config) and has_run
        try:
            if foreign and (resumes or not config.eval_only):
                problem = (f"{foreign} was not written by keepGPT; its weights can be loaded, its "
                           f"optimizer and step cannot. Try: --init_from={foreign} "
                           "--out_dir=<new folder>")
            elif resumes:
                bundle = checkpoint.newest_bundle(out_dir, held.read() if held else "")
            elif has_run and not config.eval_only:
                problem = (f"{out_dir} already holds a run; go on with it by --init_from=resume, "
                           "or begin another with --out_dir=<new folder>")
        except checkpoint.BadBundle as e:
            problem = (f"nothing to resume: {e}; "
                       "begin a run with --init_from=scratch in a new --out_dir")
    bundle, problem = ranks.from_first((bundle, problem))
    if problem:
        fail(problem)
    return bundle


def build(config: TrainConfig, given: dict[str, Any], meta: dict[str, Any]
          ) -> tuple[GPT, TrainConfig]:
    """The model at step 0, from scratch or from weights, and the settings with its true sizes."""
    torch.manual_seed(config.seed)
    vocab_size = meta["vocab_size"]
    source = config.init_from.removeprefix("auto:")
    if source in ("scratch", "auto"):
        try:
            args = ModelArgs(*(getattr(config, key) for key in ARCHITECTURE[:4]), vocab_size,
                             config.bias, config.dropout)
        except ValueError as e:
            fail(str(e))
        check_memory(config, vocab_size)
        return GPT(args), config
    try:
        args, state, data = read_weights(source)
    except ValueError as e:
        fail(str(e))
    for key in ARCHITECTURE:
        value, have = given.get(key), getattr(args, key)
        if value is not None and value != have and not (key == "block_size" and value < have):
            fail(f"{source} has {key}={have}, not {value}; leave {key} out")
    try:
        check_tokenizer(source, args.vocab_size, data, meta)
    except ValueError as e:
        fail(f"{e}; prepare the text with the tokenizer of those weights")
    args, state = cropped(args, state, vocab_size, min(config.block_size, args.block_size))
    try:
        model = with_weights(replace(args, dropout=config.dropout), state)
    except ValueError as e:
        fail(f"{source}: {e}")
    return model, replace(config, **{key: getattr(args, key) for key in ARCHITECTURE})


def check_memory(config: TrainConfig, vocab_size: int) -> None:
    """Refuse at once what this machine could only fail at after minutes of swapping."""
    parameters = config.n_embd * (12 * config.n_layer * config.n_embd + vocab_size)
    # float32 weights, gradients and two moments; int64 inputs and targets; losses
    needed = 16 * max(parameters, config.batch_size * config.block_size,
                      config.gradient_accumulation_steps)
    if needed > (room := host_memory()):
        fail(f"{parameters:,} parameters and {config.gradient_accumulation_steps:,} batches of "
             f"{config.batch_size:,} x {config.block_size:,} tokens need more than "
             f"{needed / 1e9:,.0f} GB, and this machine has {room / 1e9:,.0f}; lower n_layer, "
             "n_embd, batch_size or gradient_accumulation_steps")


def resumed_config(given: dict[str, Any], bundle: dict[str, Any],
                   data: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    """The run's own settings with the `given` ones over them, and a word on each that changed.

    What would make it another run is refused.
    """
    known = {f.name for f in fields(TrainConfig)}
    saved = {key: value for key, value in bundle["config"].items() if key in known}
    config = TrainConfig(**saved | given)
    changes = {key: (saved[key], value) for key, value in given.items()
               if saved.get(key, value) != value}
    for key in FIXED:
        if key in changes:
            fail(f"this run has {key}={changes[key][0]}, not {changes[key][1]}: "
                 f"that would be another run; leave --{key} out, "
                 "or begin anew with another --out_dir")
    if config.elastic and "batch_size" in changes:
        fail(f"with elastic=True batch_size stays {changes['batch_size'][0]}: micro-batches of "
             "another size round otherwise; leave --batch_size out")
    rows, old_rows = (c["batch_size"] * c["gradient_accumulation_steps"]
                      for c in (asdict(config), saved))
    if rows != old_rows:
        fail(f"this run has batch_size x gradient_accumulation_steps = {old_rows}, not {rows}; "
             "keep the product")
    if data["fingerprint"] != bundle["data"]["fingerprint"]:
        fail(f"this run was trained on {bundle['data']['name']} "
             f"{bundle['data']['fingerprint'][:12]}, but {config.dataset} in data_dir="
             f"{config.data_dir} is {data['fingerprint'][:12]}; prepare that text again")
    return config, [f"{key} {old} -> {new}" for key, (old, new) in changes.items()
                    if key != "init_from"]


def open_data(folder: Path, config: TrainConfig, meta: dict[str, Any],
              ranks: Ranks) -> tuple[Loader, dict[str, Split]]:
    """This rank's share of the training batches, and the two splits as an evaluation reads them."""
    if config.elastic and ranks.world_size & (ranks.world_size - 1):
        fail("elastic=True adds up in pairs: start 1, 2, 4, 8, ... ranks, "
             f"not {ranks.world_size}")
    if config.elastic and config.backend == "gloo" and ranks.device.type == "cuda":
        fail("elastic=True exchanges what lies on the GPU, and gloo can't; take --backend=nccl")
    share, rest = divmod(config.gradient_accumulation_steps, ranks.world_size)
    if rest:
        fail(f"gradient_accumulation_steps={config.gradient_accumulation_steps} "
             f"is counted over all ranks; make it a multiple of their number, {ranks.world_size}")
    mine = range(ranks.rank * share, (ranks.rank + 1) * share)

    def split(name: str, shift: bool) -> Split:
        return Split(folder, name, meta, config.block_size, config.seed, shift)

    loader = Loader(split("train", shift=True), config.batch_size,
                    config.gradient_accumulation_steps, mine, ranks.device)
    return loader, {"train": split("train", shift=False), "val": split("val", shift=False)}


def as_it_runs(model: GPT, config: TrainConfig, ranks: Ranks, autocast: Any,
               split: Split) -> tuple[Any, Any]:
    """The model compiled if that pays, and that one again with its gradients averaged over
    the ranks."""
    compiled = config.compile is True or config.compile == "auto" and ranks.device.type == "cuda"
    if compiled and (lacks := compiler_lacks(ranks.device, config.deterministic)):
        warn(f"torch.compile needs {lacks}; going on without it")
        compiled = False
    # static shapes: else the training graph depends on which batch sizes came before it
    fast = torch.compile(model, dynamic=False) if compiled else model
    if ranks.world_size == 1 or config.elastic:
        return fast, fast
    # DDP orders its buckets by the first backward that it sees. That one is made here, not in the
    # first step: sums over the ranks then round alike in a run that begins at a step and in one
    # that only passes by.
    net = DistributedDataParallel(fast)
    with autocast:
        loss = net(*(t.to(ranks.device) for t in split.rows(0, config.batch_size)))
    loss.backward()
    model.zero_grad(set_to_none=True)
    return fast, net
