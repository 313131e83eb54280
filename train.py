"""Train a GPT: `python train.py config/x.py --key=value`, or the same under torchrun; --help lists
every key.

Kill it at any time: with --init_from=auto the same command resumes from the newest checkpoint in
out_dir.
"""
from keepgpt.config import TrainConfig, command_line

if __name__ == "__main__":  # before torch is loaded: --help and mistakes answer at once
    CONFIG, GIVEN, _ = command_line(TrainConfig, "python train.py [config/x.py] [--key=value ...]")

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from keepgpt import checkpoint
from keepgpt.card import write_card
from keepgpt.config import ARCHITECTURE, resume_config
from keepgpt.dataset import dataset_folder, read_meta
from keepgpt.device import can_compile, device_name, peak_flops, pick_dtype, restore_rng, rng_state
from keepgpt.errors import (
    EXIT_FAILED,
    EXIT_NOT_FINITE,
    EXIT_STOPPED,
    UserError,
    end_process,
    in_notebook,
    run_or_exit,
)
from keepgpt.files import lock_out_dir
from keepgpt.loader import Loader, Split, seed_of
from keepgpt.metrics import Metrics
from keepgpt.optim import get_lr, make_optimizer, set_rates
from keepgpt.pretrained import crop_weights, read_weights
from keepgpt.ranks import Ranks, join_ranks
from keepgpt.signals import Signals
from keepgpt.tokenizer import check_tokenizer, from_meta
from model import GPT, ModelArgs, generate, load_model


@dataclass
class Run:
    """A run in this process: its settings, its data, its model and its progress."""
    config: TrainConfig
    ranks: Ranks
    data: dict[str, Any]  # the dataset's description, see dataset.read_meta
    loader: Loader
    splits: dict[str, Split]
    model: GPT
    compiled_model: Any  # the model itself where it is not compiled
    train_model: Any  # that one in DDP, if there are several ranks
    dtype: torch.dtype  # of the matrix products
    autocast: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # updates done
    evaluation: dict[str, Any] = field(default_factory=dict)  # the last one: step and losses
    wandb_run_id: str | None = None
    healthy: Tensor | int = 1  # 0 after the first non-finite number
    applied: Tensor | int = 0  # updates made; stays behind `step` once not healthy

    def bundle(self, best_val_loss: float) -> dict[str, Any]:
        """Return the content of a checkpoint, with the live tensors. Every rank must call it."""
        return {"format": checkpoint.FORMAT, "step": self.step,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": self.ranks.gather(rng_state(self.ranks.device)),
                "threads": torch.get_num_threads(), "torch": str(torch.__version__),
                "config": asdict(self.config), "model_args": asdict(self.model.args),
                "data": self.data, "evaluation": self.evaluation,
                "best_val_loss": best_val_loss, "wandb_run_id": self.wandb_run_id}

    def restore(self, bundle: dict[str, Any]) -> None:
        """Load a checkpoint's state, except the model's, which is loaded already. The optimizer
        keeps this command's settings."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(bundle["optimizer"] | {"param_groups": groups})
        if bundle["scaler"]:
            self.scaler.load_state_dict(bundle["scaler"])
        if self.ranks.rank < len(bundle["rng"]):
            restore_rng(bundle["rng"][self.ranks.rank], self.ranks.device)
        self.step = self.applied = bundle["step"]
        self.evaluation, self.wandb_run_id = bundle["evaluation"], bundle["wandb_run_id"]


def start(config: TrainConfig, given: dict[str, Any], ranks: Ranks, opened: ExitStack
          ) -> tuple[Run, checkpoint.Saver, Metrics]:
    """Start the run that a command asks for, or resume it. `opened` gets what must be closed.
    Raises UserError."""
    bundle = ranks.on_first(lambda: find_checkpoint(config, opened))

    # data
    if bundle:
        config, changes = resume_config(config, given, bundle["config"])
    folder = dataset_folder(config.data_dir, config.dataset)
    data = read_meta(folder)
    if bundle and data["fingerprint"] != bundle["data"]["fingerprint"]:
        raise UserError(f"{folder}: not the {bundle['data']['name']} that this run was trained on. "
                        "Try: prepare the same text again")

    # model
    torch.manual_seed(config.seed)
    if bundle:
        model = load_model(bundle["model_args"] | {"dropout": config.dropout}, bundle["model"])
    elif (source := config.init_from.removeprefix("auto:")) in ("scratch", "auto"):
        model = GPT(ModelArgs(vocab_size=data["vocab_size"], dropout=config.dropout,
                              **{key: getattr(config, key) for key in ARCHITECTURE}))
    else:
        model = load_pretrained(source, config, given, data)
        config = replace(config, **{key: getattr(model.args, key) for key in ARCHITECTURE})
    # the number of threads decides the order of a sum; each rank computes Muon's update itself
    if config.elastic or config.optimizer == "muon" and ranks.world_size > 1:
        threads = ranks.from_first(torch.get_num_threads())
        torch.set_num_threads((bundle or {}).get("threads", threads))
    run = build_run(config, ranks, data, *open_data(folder, config, data, ranks), model)

    # log
    if bundle:
        run.restore(bundle)
    out_dir = Path(config.out_dir) if ranks.rank == 0 and not config.eval_only else None
    metrics = Metrics(out_dir, run.step, run.evaluation.get("step") == run.step,
                      quiet=ranks.rank > 0)
    opened.push(metrics.end)
    saver = checkpoint.Saver(out_dir, config.keep_checkpoints,
                             bundle["best_val_loss"] if bundle else math.inf, metrics.sync,
                             ranks.device)
    opened.callback(saver.wait)
    if bundle:
        changes += list_roundings(config, bundle, ranks)
        metrics.say(", ".join([f"resuming {config.out_dir} at step {run.step}", *changes]))
    machine = (f"{ranks.world_size} x {device_name(ranks.device)}, "
               + str(run.dtype).removeprefix("torch.")
               + (", compiled" if run.compiled_model is not model else ""))
    parameters = sum(p.numel() for p in model.parameters())
    metrics.say(f"{parameters / 1e6:.2f}M parameters, {config.tokens_per_step:,} tokens/step, "
                f"{data['tokens']['train']:,} of {data['name']}; {machine}")
    if out_dir:
        metrics.attempt(f"not writing {out_dir}/README.md",
                        lambda: write_card(config, data, run.step, machine))
        if config.wandb_log:
            run.wandb_run_id = metrics.start_wandb(asdict(config), run.wandb_run_id)
    return run, saver, metrics


def list_roundings(config: TrainConfig, bundle: dict[str, Any], ranks: Ranks) -> list[str]:
    """Return a line for each change since a checkpoint that may round sums in another way."""
    cpu = ranks.device.type == "cpu"
    exact = config.elastic and bundle["config"].get("elastic") and (cpu or config.deterministic)
    lines = []
    for what, before, now in (("ranks", len(bundle["rng"]), ranks.world_size),
                              ("threads", bundle.get("threads"), torch.get_num_threads()),
                              ("torch", bundle.get("torch"), str(torch.__version__))):
        if before not in (None, now) and (cpu or what != "threads"):
            lines.append(f"{what} {before} -> {now}" + (
                "" if what == "ranks" and exact else ": the same losses up to rounding"))
    return lines


def build_run(config: TrainConfig, ranks: Ranks, data: dict[str, Any], loader: Loader,
              splits: dict[str, Split], model: GPT) -> Run:
    """Compile the model, wrap it in DDP, and make its optimizer."""
    device = ranks.device
    model.to(device)
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    compiled_model = model
    compile_it = config.compile is True or config.compile == "auto" and device.type == "cuda"
    if compile_it and can_compile(device, config.deterministic):
        # static shapes: otherwise the training graph depends on earlier batch sizes
        compiled_model = torch.compile(model, dynamic=False)
    train_model = compiled_model
    if ranks.world_size > 1 and not config.elastic:
        train_model = DistributedDataParallel(compiled_model)
        # DDP fixes the order of its buckets at the first backward pass. Run one now and discard
        # it: then a resumed run adds gradients in the same order as an uninterrupted one.
        with autocast:
            x, y = splits["train"].rows(0, config.batch_size)
            loss = train_model(x.to(device), y.to(device))
        loss.backward()
        model.zero_grad(set_to_none=True)
    optimizer = make_optimizer(model, config, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Run(config, ranks, data, loader, splits, model, compiled_model, train_model, dtype,
               autocast, optimizer, scaler)


def find_checkpoint(config: TrainConfig, opened: ExitStack) -> dict[str, Any] | None:
    """Lock out_dir, unless with eval_only. Return the bundle to resume from, or None to start a
    run. `opened` gets the lock. Raises UserError if init_from does not fit the folder's content."""
    out_dir, auto = Path(config.out_dir), config.init_from.partition(":")[0] == "auto"
    if not config.eval_only:
        # a restart loop may come back before the ranks of a killed launcher have ended
        opened.enter_context(lock_out_dir(out_dir, patience=30 if auto else 0))
    has_run = checkpoint.has_run(out_dir)
    if config.init_from == "resume" or auto and has_run:
        return checkpoint.read_newest(out_dir)
    if has_run and not config.eval_only:
        raise UserError(f"{out_dir} already holds a run. Try: --init_from=resume to continue it, "
                        "or --out_dir=<new folder>")
    return None


def load_pretrained(source: str, config: TrainConfig, given: dict[str, Any],
                    data: dict[str, Any]) -> GPT:
    """Return a model with the weights of `source` (see pretrained.read_weights), cropped to the
    dataset's vocabulary and the config's block_size. Raises UserError."""
    args, state, tokens = read_weights(source)
    have_args = ModelArgs(**args)  # raises UserError for impossible sizes
    for key in ARCHITECTURE:
        value, have = given.get(key), getattr(have_args, key)
        if value is not None and value != have and not (key == "block_size" and value < have):
            raise UserError(f"init_from={source} has {key}={have}, not {value}. "
                            f"Try: leave --{key} out")
    check_tokenizer(source, args["vocab_size"], tokens, data)
    args, state = crop_weights(args, state, data["vocab_size"],
                               min(config.block_size, args["block_size"]))
    return load_model(args | {"dropout": config.dropout}, state)


def open_data(folder: Path, config: TrainConfig, data: dict[str, Any],
              ranks: Ranks) -> tuple[Loader, dict[str, Split]]:
    """Return this rank's share of the training batches, and both splits for evaluations."""
    if config.elastic and ranks.world_size & (ranks.world_size - 1):
        raise UserError(f"elastic=True: expected 1, 2, 4, 8, ... ranks, got {ranks.world_size}")
    if config.elastic and config.backend == "gloo" and ranks.device.type == "cuda":
        raise UserError("elastic=True needs backend=nccl on CUDA. Try: --backend=auto")
    per_rank, rest = divmod(config.gradient_accumulation_steps, ranks.world_size)
    if rest:
        raise UserError(f"gradient_accumulation_steps={config.gradient_accumulation_steps} counts "
                        f"over all ranks: expected a multiple of {ranks.world_size}")
    train, ordered_train, val = (
        Split(folder, name, data, config.block_size, config.seed, shift)
        for name, shift in (("train", True), ("train", False), ("val", False)))
    loader = Loader(train, config.batch_size, config.gradient_accumulation_steps,
                    range(ranks.rank * per_rank, (ranks.rank + 1) * per_rank), ranks.device)
    return loader, {"train": ordered_train, "val": val}


@torch.no_grad()
def evaluate(run: Run, signals: Signals) -> dict[str, float] | None:
    """Return each split's mean loss, computed by all ranks together; None if a signal came."""
    run.model.eval()
    config, ranks, losses = run.config, run.ranks, {}
    for name, split in run.splits.items():
        count = min(config.eval_iters * config.batch_size, split.windows)
        rows = torch.tensor([min(config.batch_size, count - first)
                             for first in range(0, count, config.batch_size)])
        means = torch.zeros(len(rows), device=ranks.device)  # each entry is filled by one rank
        for i, size in enumerate(rows.tolist()):
            rank = i % ranks.world_size
            if rank == 0 and ranks.any(signals.received):
                return None
            if rank == ranks.rank:
                x, y = (t.to(ranks.device) for t in split.rows(i * config.batch_size, size))
                # a smaller last batch would need another compiled graph
                model = run.compiled_model if size == config.batch_size else run.model
                with run.autocast:
                    means[i] = model(x, y)
        losses[f"{name}_loss"] = (ranks.sum(means).cpu().double() * rows).sum().item() / count
    return losses


def record_evaluation(run: Run, saver: checkpoint.Saver, losses: dict[str, float]) -> bool:
    """Store an evaluation's losses. Return True if its validation loss is lower than best.pt's."""
    run.evaluation = {"step": run.step, **losses}
    saver.wait()  # a save in progress may replace best.pt
    return run.ranks.from_first(run.step > 0 and losses["val_loss"] < saver.best_val_loss)


def show_sample(run: Run, metrics: Metrics) -> None:
    """Print a text of the current model, if that works."""
    text = metrics.attempt("no sample", lambda: generate_sample(run))
    if text is not None:
        metrics.say(text + "\n")


def generate_sample(run: Run) -> str:
    """Return a text of the current model, which starts after the end-of-text token or token 0."""
    vocabulary = from_meta(run.data)
    run.model.eval()
    tokens = [row[0] for row in generate(run.model, [[vocabulary.eot or 0]],
                                         run.config.sample_tokens, temperature=0.8, top_k=200)]
    return vocabulary.decode([token for token in tokens if token is not None])


def compute_gradient(run: Run) -> Tensor:
    """Set .grad to the mean gradient of a step's micro-batches. Return this rank's losses, (M,),
    0 for micro-batches of other ranks."""
    run.model.train()
    mine = run.loader.mine
    losses = torch.zeros(run.config.gradient_accumulation_steps, device=run.ranks.device)
    count = len(losses) if run.config.elastic else len(mine)  # DDP averages over the ranks
    batches = run.loader.step(run.step)

    def add_gradient(m: int) -> None:
        _, x, y = next(batches)
        torch.manual_seed(seed_of(run.config.seed, run.step, m))  # dropout depends on nothing else
        with run.autocast:
            loss = run.train_model(x, y)
        losses[m] = loss.detach()
        run.scaler.scale(loss / count).backward()

    if run.config.elastic:
        total = sum_as_tree(run.model, add_gradient, mine.start, mine.stop)
        run.ranks.add_in_pairs(total)
        for p, grad in zip(run.model.parameters(), total):
            p.grad = grad
    else:
        for m in mine:
            run.train_model.require_backward_grad_sync = m == mine[-1]  # DDP: once per step
            add_gradient(m)
    return losses


def sum_as_tree(model: GPT, add_gradient: Callable[[int], None], first: int, end: int
                ) -> list[Tensor]:
    """Return the gradient of micro-batches first ... end - 1, added in a binary tree. Each of
    several ranks computes one branch of the tree that one rank computes, so both round alike."""
    if end - first > 2:
        middle = (first + end) // 2
        total = sum_as_tree(model, add_gradient, first, middle)
        torch._foreach_add_(total, sum_as_tree(model, add_gradient, middle, end))
        return total
    for m in range(first, end):  # backward adds the second gradient to the first
        add_gradient(m)
    total = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return total


def update(run: Run, saver: checkpoint.Saver, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of the optimizer, unless a number is not finite. Return the mean loss and the
    norm of the gradient over all ranks, before clipping."""
    config, optimizer, scaler = run.config, run.optimizer, run.scaler
    loss = run.ranks.sum(losses).mean()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), config.grad_clip, grad_norm)
    on_cuda = run.ranks.device.type == "cuda"
    # float16 gradients overflow now and then: the scaler skips that update
    run.healthy = run.healthy * torch.isfinite(loss if scaler.is_enabled() else loss + grad_norm)
    if on_cuda and not scaler.is_enabled():
        optimizer.found_inf = 1.0 - run.healthy  # read on the device: 1 changes nothing
    set_rates(optimizer, run.step, config)
    saver.wait_for_copy()
    if on_cuda or run.healthy:  # elsewhere the host decides
        scaler.step(optimizer)
    scaler.update()
    if scaler.is_enabled():
        # below 1, even unscaled gradients overflow
        run.healthy = run.healthy * (scaler.scale(torch.ones_like(loss)) >= 1)
    optimizer.zero_grad(set_to_none=True)
    run.applied = run.applied + run.healthy
    run.step += 1
    return loss, grad_norm


def halt_unless_healthy(run: Run, metrics: Metrics, saver: checkpoint.Saver) -> None:
    """Exit if a loss or a gradient was not finite; that update was not made. Waits for the GPU."""
    if run.healthy:
        return
    saver.wait()
    step, saved = int(run.applied), checkpoint.has_run(Path(run.config.out_dir))
    metrics.say(f"step {step + 1}: the loss or the gradient is not finite; the update was skipped "
                "and the run ends.\nLikely causes: a learning rate that is too high (it was "
                f"{get_lr(step, run.config):.2e}), too little warm-up, float16, or corrupt data.\n"
                + ("Try: --init_from=resume with a lower --learning_rate or --dtype=bfloat16."
                   if saved else "Nothing was saved before."))
    sys.exit(EXIT_NOT_FINITE)


def train(config: TrainConfig, given: dict[str, Any], signals: Signals, opened: ExitStack) -> int:
    """Train from the step of the newest checkpoint, or from step 0, to max_iters. Return the exit
    code. `opened` gets what must be closed, as a notebook outlives its runs. Raises UserError."""
    opened.callback(signals.restore)
    opened.callback(torch.set_num_threads, torch.get_num_threads())
    ranks = join_ranks(config)
    run, saver, metrics = start(config, given, ranks, opened)
    config, alone, unsaved, stopped = run.config, ranks.world_size == 1, False, False
    peak, clock, clock_step = peak_flops(ranks.device), time.perf_counter(), run.step
    while True:
        ending = run.step >= config.max_iters

        # once in a while: evaluate
        best, due = False, ending or run.step % config.eval_interval == 0
        if config.eval_only or due and run.evaluation.get("step") != run.step:
            halt_unless_healthy(run, metrics, saver)
            losses = signals.interrupt(lambda: evaluate(run, signals), alone)
            if losses:  # else a signal came: the resumed run evaluates at this step
                best, unsaved = record_evaluation(run, saver, losses), run.step > 0
                metrics.log_evaluation(run.evaluation, best,
                                       min(saver.best_val_loss, losses["val_loss"]))
                if config.sample_tokens and ranks.rank == 0:
                    signals.interrupt(lambda: show_sample(run, metrics), alone=True)
            clock, clock_step = time.perf_counter(), run.step
        if config.eval_only:
            break

        # once in a while: save
        stopped = ranks.any(signals.received)
        due = run.step % (config.checkpoint_interval or config.eval_interval) == 0
        if (ending := ending or stopped) and ranks.any(not saver.wait()):
            unsaved = True  # the last save failed: try once more
        if unsaved and (due or best or ending):
            halt_unless_healthy(run, metrics, saver)
            saver.wait()
            bundle = run.bundle(run.evaluation["val_loss"] if best else saver.best_val_loss)
            saver.save(bundle, best)
            if ending and not saver.wait():
                saver.save(bundle, best)  # the last one: try once more, to a new file
            unsaved = False
        if ending:
            break

        # a step: the gradient of all micro-batches, then one update
        losses = signals.interrupt(lambda: compute_gradient(run), alone)
        if losses is None:  # a signal came and interrupted it
            run.optimizer.zero_grad(set_to_none=True)
            continue
        loss, grad_norm = update(run, saver, losses)
        unsaved = True

        # once in a while: log
        log = run.step % config.log_interval == 0
        if log or ranks.device.type == "cpu":
            halt_unless_healthy(run, metrics, saver)
        if log:
            row = {"step": run.step, "tokens": run.step * config.tokens_per_step,
                   "loss": loss.item(), "lr": get_lr(run.step - 1, config),
                   "grad_norm": grad_norm.item()}
            seconds = (time.perf_counter() - clock) / (run.step - clock_step)
            row["tokens_per_s"] = config.tokens_per_step / seconds
            if peak:  # the model FLOPs utilization (Chowdhery et al. 2022, PaLM, appendix B)
                row["mfu"] = (run.model.flops_per_token() * row["tokens_per_s"]
                              / (peak * ranks.world_size))
            metrics.log_step(row, config.max_iters, seconds)
            clock, clock_step = time.perf_counter(), run.step

    # all ranks wait for the last save: torchrun kills the others when one has ended
    saved = ranks.from_first(saver.wait())
    if not config.eval_only:
        metrics.say(f"{'stopped' if stopped else 'done'} at step {run.step}, "
                    + ("with nothing to save yet" if not run.step else
                       f"{'saved' if saved else 'NOT SAVED'} in {config.out_dir}")
                    + ("; continue with --init_from=auto" if stopped else ""))
    code = EXIT_FAILED if not saved else EXIT_STOPPED if stopped else 0
    closed = ranks.from_first(signals.interrupt(metrics.close, alone=True, saved=True))
    if ranks.world_size > 1 or not (closed or in_notebook()):
        # groups are not destroyed: before PyTorch 2.8, gloo can deadlock there with the GIL.
        # wandb would hang again
        end_process(code)
    return code


def main(config: TrainConfig, given: dict[str, Any]) -> int:
    """Train. Return the exit code, or exit with one line for a mistake."""
    with ExitStack() as opened:
        return run_or_exit(lambda: train(config, given, Signals(), opened),
                           "a smaller --batch_size and more --gradient_accumulation_steps")


if __name__ == "__main__":
    sys.exit(main(CONFIG, GIVEN))
