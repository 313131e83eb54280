"""Train a GPT: `python train.py config/x.py --key=value`, or the same behind torchrun; --help lists
every key.

Kill it at any time: with --init_from=auto the same command goes on from the newest bundle in
out_dir.
"""
from keepgpt.config import TrainConfig, command_line

if __name__ == "__main__":  # before torch is loaded
    CONFIG, GIVEN, _ = command_line(TrainConfig, "python train.py [config/x.py] [--key=value ...]")

import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from keepgpt import checkpoint, tokenizer
from keepgpt.card import write_card
from keepgpt.checkpoint import Saver, has_run
from keepgpt.distributed import (
    Ranks,
    compiler_lacks,
    device_name,
    join_ranks,
    peak_flops,
    pick_dtype,
    restore_rng,
    rng_state,
)
from keepgpt.loader import BadData, BadToken, Loader, Split, dataset_folder, read_meta, seed_of
from keepgpt.metrics import Metrics
from keepgpt.optim import get_lr, make_optimizer
from keepgpt.pretrained import crop_weights, read_weights
from keepgpt.process import (
    EXIT_FAILED,
    EXIT_MISTAKE,
    EXIT_STOPPED,
    Signals,
    Stopped,
    describe,
    fail,
    host_memory,
    lock,
    warn,
)
from keepgpt.tokenizer import check_tokenizer
from model import GPT, ModelArgs, generate, load_model

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
        try:
            model = load_model(bundle["model_args"] | {"dropout": config.dropout}, bundle["model"])
        except (TypeError, ValueError) as e:
            fail(f"{out_dir}/ckpt.pt: {e}")
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
    return Run(config, ranks, data, loader, splits, model, fast, net, dtype, autocast,
               make_optimizer(model, config),
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
        value, have = given.get(key), args.get(key)
        if value is not None and value != have and not (key == "block_size" and value < have):
            fail(f"{source} has {key}={have}, not {value}; leave {key} out")
    try:
        ModelArgs(**args)
    except (TypeError, ValueError) as e:
        fail(f"{source}: {e}")
    try:
        check_tokenizer(source, args["vocab_size"], data, meta)
    except ValueError as e:
        fail(f"{e}; prepare the text with the tokenizer of those weights")
    args, state = crop_weights(args, state, vocab_size, min(config.block_size, args["block_size"]))
    try:
        model = load_model(args | {"dropout": config.dropout}, state)
    except ValueError as e:
        fail(f"{source}: {e}")
    return model, replace(config, **{key: args[key] for key in ARCHITECTURE})


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


EXIT_NOT_FINITE = 3  # trying again would meet the same numbers: look first
NOT_FINITE = (
    "step {step}: the loss or the gradient is not finite; that update was not made, "
    "and the run ends here.\n"
    "Likely causes: a learning rate that is too high (it was {lr:.2e}), too little warm-up, "
    "float16, or damaged data.\n")
OVERFLOW = ("GradScaler's scale fell below 1: float16 gradients overflow at every scale. "
            "Try: --dtype=bfloat16\n")
GO_BACK = ("{out_dir}/ckpt.pt is from before it: go on from there with --init_from=resume and a "
           "lower --learning_rate.")


class Pace:
    """How fast a run trains, between two logged steps and apart from evaluations."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self.tokens_per_step = (config.gradient_accumulation_steps * config.batch_size
                                * config.block_size)
        self.peak = peak_flops(run.ranks.device)
        self.restart(run)

    def restart(self, run: Run) -> None:
        """Begin to measure here."""
        self.step, self.clock = run.step, time.perf_counter()

    def since_last(self, run: Run) -> tuple[float, dict[str, float]]:
        """Seconds a step; tokens_per_s and, where the device's peak is known, mfu (PaLM, appendix
        B)."""
        seconds = (time.perf_counter() - self.clock) / (run.step - self.step)
        pace = {"tokens_per_s": self.tokens_per_step / seconds}
        if self.peak:
            pace["mfu"] = (run.model.flops_per_token() * pace["tokens_per_s"]
                           / (self.peak * run.ranks.world_size))
        self.restart(run)
        return seconds, pace


@torch.no_grad()
def evaluate(run: Run, signals: Signals) -> dict[str, float] | None:
    """Mean loss over the first windows of each split, always the same ones, shared among the ranks;
    None if a signal came."""
    run.model.eval()
    config, ranks, losses = run.config, run.ranks, {}
    for name, split in run.splits.items():
        count = min(config.eval_iters * config.batch_size, split.windows)
        batches = [(first, min(config.batch_size, count - first))
                   for first in range(0, count, config.batch_size)]
        means = torch.zeros(len(batches), device=ranks.device)  # each entry is filled by one rank
        for turn in range(0, len(batches), ranks.world_size):
            if ranks.any(signals.came):
                return None
            if (i := turn + ranks.rank) < len(batches):
                x, y = (t.to(ranks.device) for t in split.rows(*batches[i]))
                # a smaller last batch would compile a graph of its own
                model = run.fast if len(x) == config.batch_size else run.model
                with run.autocast:
                    means[i] = model(x, y)
        rows = torch.tensor([rows for _, rows in batches], dtype=torch.float64)
        losses[f"{name}_loss"] = (ranks.sum(means).cpu().double() * rows).sum().item() / count
    return losses


def take_note(run: Run, saver: Saver, losses: dict[str, float]) -> bool:
    """Let the run know an evaluation; whether it is the best so far."""
    run.evaluation = {"step": run.step, **losses}
    # a save that failed has taken its word back
    best_val_loss = run.ranks.from_first(saver.best_val_loss)
    best = 0 < run.step and losses["val_loss"] < best_val_loss
    run.best_val_loss = losses["val_loss"] if best else best_val_loss
    return best


def show_sample(run: Run) -> str:
    """A little text by the model as it is: from the end-of-text token, or from the first character
    it knows."""
    vocabulary = tokenizer.from_meta(run.data)
    run.model.eval()
    made = [row[0] for row in generate(run.model, [[vocabulary.eot or 0]], run.config.sample_tokens,
                                       temperature=0.8, top_k=200)]
    return vocabulary.decode([token for token in made if token is not None])


def gradient(run: Run) -> Tensor:
    """Let .grad hold the mean gradient of a step's micro-batches. Returns the losses of this
    rank's, (M,), 0 for the others'."""
    run.model.train()
    mine, elastic = run.loader.mine, run.config.elastic
    losses = torch.zeros(run.config.gradient_accumulation_steps, device=run.ranks.device)
    parts = len(losses) if elastic else len(mine)  # DDP takes the mean over the ranks
    batches = run.loader.step(run.step)

    def add_gradient(m: int) -> None:
        _, x, y = next(batches)
        torch.manual_seed(seed_of(run.config.seed, run.step, m))  # dropout depends on nothing else
        with run.autocast:
            loss = run.net(x, y)
        losses[m] = loss.detach()
        run.scaler.scale(loss / parts).backward()

    if elastic:
        total = sum_as_tree(run.model, add_gradient, mine.start, mine.stop)
        run.ranks.add_in_pairs(total)
        for p, grad in zip(run.model.parameters(), total):
            p.grad = grad
    else:
        for m in mine:
            run.net.require_backward_grad_sync = m == mine[-1]  # DDP reduces once a step
            add_gradient(m)
    return losses


def sum_as_tree(model: GPT, add_gradient: Callable[[int], None], first: int, end: int
                ) -> list[Tensor]:
    """The gradients of micro-batches first ... end - 1, each half summed apart: what a rank of
    many computes is a branch of what one alone does, and the rounding is the same."""
    if end - first > 2:
        middle = (first + end) // 2
        total = sum_as_tree(model, add_gradient, first, middle)
        torch._foreach_add_(total, sum_as_tree(model, add_gradient, middle, end))
        return total
    for m in range(first, end):  # two are a + b in any case: backward adds them in passing
        add_gradient(m)
    total = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return total


def update(run: Run, saver: Saver, losses: Tensor) -> tuple[Tensor, Tensor]:
    """One step of AdamW, unless a number is not finite. Returns the mean loss and the norm of the
    gradient, of all ranks."""
    config, optimizer, scaler = run.config, run.optimizer, run.scaler
    loss = run.ranks.sum(losses).mean()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), config.grad_clip, grad_norm)
    if scaler.is_enabled():
        # float16 gradients overflow now and then: the scaler skips that update by itself
        run.healthy *= torch.isfinite(loss)
    else:
        run.healthy *= torch.isfinite(loss + grad_norm)
        # read on the device by the fused AdamW, which then changes nothing
        optimizer.found_inf = 1 - run.healthy
    for group in optimizer.param_groups:
        group["lr"] = get_lr(run.step, config)
    saver.wait_for_copy()
    # on MPS AdamW does not read found_inf: the host does
    if run.ranks.device.type != "mps" or run.healthy:
        scaler.step(optimizer)
    scaler.update()
    if scaler.is_enabled():
        # below 1 the gradients overflow unscaled: no scale can help
        run.healthy *= scaler.scale(torch.ones_like(loss)) >= 1
    optimizer.zero_grad(set_to_none=True)
    run.applied += run.healthy
    run.step += 1
    return loss, grad_norm


def halt_unless_healthy(run: Run, metrics: Metrics, saver: Saver) -> None:
    """End a run whose numbers are not finite; its last update was not made. Waits for the GPU."""
    if run.healthy:
        return
    saver.wait()
    step, out_dir = int(run.applied), Path(run.config.out_dir)
    metrics.say(NOT_FINITE.format(step=step + 1, lr=get_lr(step, run.config))
                + OVERFLOW * (run.scaler.get_scale() < 1)
                + (GO_BACK.format(out_dir=out_dir) if has_run(out_dir)
                   else "Nothing was saved before it."))
    sys.exit(EXIT_NOT_FINITE)


def main(config: TrainConfig, given: dict[str, Any]) -> int:
    """Train; returns the exit code."""
    try:
        return train(config, given, Signals())
    except Stopped:
        if os.environ.get("RANK", "0") == "0":
            print("stopped while starting, with nothing new to save; "
                  "continue with --init_from=auto")
        return EXIT_STOPPED
    except BadData as e:
        fail(str(e), any_rank=isinstance(e, BadToken))
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(e):
            raise
        fail(f"out of memory: {str(e).strip()}. Try: a smaller --batch_size and as much larger "
             "--gradient_accumulation_steps", EXIT_FAILED, any_rank=True)


def train(config: TrainConfig, given: dict[str, Any], signals: Signals) -> int:
    """The run, from where it stands to max_iters; returns the exit code."""
    run, metrics, saver = begin(config, given)
    config, ranks, begun_at, unsaved = run.config, run.ranks, run.step, False
    pace = Pace(run)
    while True:
        ending = run.step >= config.max_iters

        # once in a while: look
        best, due = False, ending or run.step % config.eval_interval == 0
        if config.eval_only or due and run.evaluation.get("step") != run.step:
            halt_unless_healthy(run, metrics, saver)
            losses = signals.unless_one_comes(lambda: evaluate(run, signals), ranks.world_size,
                                              nothing_new=run.step == begun_at)
            if losses:  # else a signal came: the run that goes on from here evaluates again
                best, unsaved = take_note(run, saver, losses), run.step > 0
                metrics.log(run.evaluation, best_val_loss=run.best_val_loss)
                metrics.say(f"step {run.step}: train loss {losses['train_loss']:.4f}, "
                            f"val loss {losses['val_loss']:.4f}" + ", the best so far" * best)
                if config.sample_tokens and ranks.rank == 0:
                    metrics.say(show_sample(run) + "\n")
            pace.restart(run)
        if config.eval_only:
            break

        # once in a while: save
        stopped = ranks.any(signals.came)
        due = run.step % (config.checkpoint_interval or config.eval_interval) == 0
        if (ending := ending or stopped) and ranks.any(not saver.wait()):
            unsaved = True  # the last save failed: one more try
        if unsaved and (due or best or ending):
            halt_unless_healthy(run, metrics, saver)
            saver.save(bundle := run.bundle(), best)
            if ending and not saver.wait():
                saver.save(bundle, best)  # it was the last one: once more, to a new file
            unsaved = False
        if ending:
            break

        # a step: the gradient of all micro-batches, then one update
        losses = signals.unless_one_comes(lambda: gradient(run), ranks.world_size,
                                          nothing_new=run.step == begun_at)
        if losses is None:  # a signal came, and has broken it off
            run.optimizer.zero_grad(set_to_none=True)
            continue
        loss, grad_norm = update(run, saver, losses)
        unsaved = True

        # once in a while: log
        if run.step % config.log_interval == 0 or ranks.device.type == "cpu":
            halt_unless_healthy(run, metrics, saver)
        if run.step % config.log_interval == 0:
            seconds, speed = pace.since_last(run)
            row = {"step": run.step, "tokens": run.step * pace.tokens_per_step, "loss": loss.item(),
                   "lr": get_lr(run.step - 1, config), "grad_norm": grad_norm.item(),
                   **speed}
            metrics.log(row)
            metrics.say_progress(row, config.max_iters, seconds * (config.max_iters - run.step))

    # all ranks wait for the last save: torchrun kills the others when one has ended
    saved = ranks.from_first(saver.wait())
    metrics.close()
    if not config.eval_only:
        metrics.say(f"{'stopped' if stopped else 'done'} at step {run.step}, "
                    + ("with nothing to save yet" if not run.step else
                       f"{'saved' if saved else 'NOT SAVED'} in {config.out_dir}")
                    + "; go on with --init_from=auto" * stopped)
    code = (EXIT_FAILED if not saved else
            EXIT_STOPPED if not config.eval_only and stopped else 0)
    ranks.leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main(CONFIG, GIVEN))
