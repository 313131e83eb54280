"""Train a GPT: `python train.py config/x.py --key=value`, or the same behind torchrun; --help lists
every key.

Kill it at any time: with --init_from=auto the same command goes on from the newest bundle in
out_dir.
"""
from configurator import TrainConfig, command_line, fail

if __name__ == "__main__":  # before torch is loaded
    CONFIG, GIVEN, _ = command_line(TrainConfig, "python train.py [config/x.py] [--key=value ...]")

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import tokenizer
from loader import Loader, Split, read_meta, seed_of
from metrics import Metrics
from model import GPT, ModelArgs, cropped, generate, read_weights, with_weights
from runtime import (EXIT_STOPPED, Ranks, Signals, Stopped, lock, peak_flops, pick_dtype,
                     restore_rng, rng_state, start)

EXIT_FAILED = 1  # the last save failed: the end of the run is not on the disk
EXIT_NOT_FINITE = 3  # trying again would meet the same numbers: look first
NOT_FINITE = (
    "step {step}: the loss or the gradient is not finite; that update was not made, "
    "and the run ends here.\n"
    "Likely causes: a learning rate that is too high (it was {lr:.2e}), too little warm-up, "
    "float16, or damaged data.\n")
GO_BACK = ("{out_dir}/ckpt.pt is from before it: go on from there with --init_from=resume and a "
           "lower --learning_rate.")
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "bias")


def is_auto(config: TrainConfig) -> bool:
    """Whether a run that is there is resumed, and else begun."""
    return config.init_from.partition(":")[0] == "auto"


def find_run(config: TrainConfig, ranks: Ranks) -> dict[str, Any] | None:
    """The bundle to resume from, chosen by rank 0 for all; None to begin a run."""
    bundle, problem, out_dir = None, None, Path(config.out_dir)
    if ranks.rank == 0:
        has_run = checkpoint.has_run(out_dir)
        try:
            if config.init_from == "resume" or is_auto(config) and has_run:
                bundle = checkpoint.newest_bundle(out_dir)
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
        if config.n_embd % config.n_head:
            fail(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        check_memory(config, vocab_size)
        return GPT(ModelArgs(*(getattr(config, key) for key in ARCHITECTURE[:4]), vocab_size,
                             config.bias, config.dropout)), config
    try:
        args, state, data = read_weights(source)
    except ValueError as e:
        fail(str(e))
    for key in ARCHITECTURE:
        value, have = given.get(key), getattr(args, key)
        if value is not None and value != have and not (key == "block_size" and value < have):
            fail(f"{source} has {key}={have}, not {value}; leave {key} out")
    padding = 63 if meta["tokenizer"]["kind"] == "gpt2" else 0  # nanoGPT has 50304 rows for 50257
    if (data["tokenizer"] != meta["tokenizer"] if data
            else not 0 <= args.vocab_size - vocab_size <= padding):
        fail(f"{source} has a vocabulary of {args.vocab_size} tokens, and "
             f"{meta['name']} another, of {vocab_size}; prepare the text with the tokenizer of "
             "those weights")
    args, state = cropped(args, state, vocab_size, min(config.block_size, args.block_size))
    try:
        model = with_weights(replace(args, dropout=config.dropout), state)
    except ValueError as e:
        fail(f"{source}: {e}")
    return model, replace(config, **{key: getattr(args, key) for key in ARCHITECTURE})


def check_memory(config: TrainConfig, vocab_size: int) -> None:
    """Refuse at once what this machine could only fail at after minutes of swapping."""
    parameters = config.n_embd * (12 * config.n_layer * config.n_embd + vocab_size)
    # float32 weights, gradients and two moments; int64 inputs and targets
    needed = 16 * max(parameters, config.batch_size * config.block_size)
    if needed > (room := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        fail(f"{parameters:,} parameters and batches of {config.batch_size:,} x "
             f"{config.block_size:,} tokens need more than {needed / 1e9:,.0f} GB, and this "
             f"machine has {room / 1e9:,.0f}; lower n_layer, n_embd or batch_size")


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of the update that follows `step`: linear warm-up, then a cosine (Loshchilov and
    Hutter 2017)."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    span = max(1, config.lr_decay_iters - config.warmup_iters)
    progress = min(1.0, (step - config.warmup_iters) / span)
    return (config.min_lr
            + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2)


@torch.no_grad()
def evaluate(model: GPT, splits: dict[str, Split], config: TrainConfig, ranks: Ranks, autocast: Any,
             stopping: Callable[[], bool]) -> dict[str, float] | None:
    """Mean loss over the first windows of each split, always the same ones, shared among the ranks;
    None if stopped."""
    model.eval()
    losses = {}
    for name, split in splits.items():
        count = min(config.eval_iters * config.batch_size, split.windows)
        batches = [(first, min(config.batch_size, count - first))
                   for first in range(0, count, config.batch_size)]
        means = torch.zeros(len(batches), device=ranks.device)  # each entry is filled by one rank
        for turn in range(0, len(batches), ranks.world_size):
            if stopping():
                return None
            if (i := turn + ranks.rank) < len(batches):
                x, y = (t.to(ranks.device) for t in split.rows(*batches[i]))
                with autocast:
                    means[i] = model(x, y)
        rows = torch.tensor([rows for _, rows in batches], dtype=torch.float64)
        losses[f"{name}_loss"] = (ranks.sum(means).cpu().double() * rows).sum().item() / count
    return losses


def begin(config: TrainConfig, given: dict[str, Any], ranks: Ranks) -> tuple:
    """What is trained, on which data, and the bundle it goes on from: (model, config, meta, bundle
    or None)."""
    bundle = find_run(config, ranks)
    try:
        meta = read_meta(given.get("dataset", bundle["config"]["dataset"]) if bundle
                         else config.dataset)
    except ValueError as e:
        fail(str(e))
    if not bundle:
        model, config = build(config, given, meta)
        return model, config, meta, None
    config, changes = checkpoint.resumed_config(given, bundle, meta)
    if ranks.rank == 0:
        print(f"resuming {given.get('out_dir', config.out_dir)} at step {bundle['step']}", *changes,
              sep=", ")
    model = GPT(ModelArgs(**bundle["model_args"] | {"dropout": config.dropout}))
    model.load_state_dict(bundle["model"])
    return model, config, meta, bundle


def open_data(config: TrainConfig, meta: dict[str, Any],
              ranks: Ranks) -> tuple[Loader, dict[str, Split]]:
    """This rank's share of the training batches, and the two splits as an evaluation reads them."""
    share, rest = divmod(config.gradient_accumulation_steps, ranks.world_size)
    if rest:
        fail(f"gradient_accumulation_steps={config.gradient_accumulation_steps} "
             f"is counted over all ranks; make it a multiple of their number, {ranks.world_size}")
    mine = range(ranks.rank * share, (ranks.rank + 1) * share)
    try:
        def split(name: str, shift: bool) -> Split:
            return Split(config.dataset, name, meta["dtype"], config.block_size, config.seed, shift)
        loader = Loader(split("train", shift=True), config.batch_size,
                        config.gradient_accumulation_steps, mine, ranks.device)
        return loader, {"train": split("train", shift=False), "val": split("val", shift=False)}
    except ValueError as e:
        fail(str(e))


def show_sample(model: GPT, meta: dict[str, Any], tokens: int) -> str:
    """A little text by the model as it is: from the end-of-text token, or from the first character
    it knows."""
    vocabulary = tokenizer.from_meta(meta)
    model.eval()
    made = [row[0] for row in generate(model, [[vocabulary.eot or 0]], tokens,
                                       temperature=0.8, top_k=200)]
    return vocabulary.decode([token for token in made if token is not None])


def as_it_runs(model: GPT, config: TrainConfig, ranks: Ranks, autocast: Any,
               split: Split) -> tuple[Any, Any]:
    """The model compiled if that pays, and that one again with its gradients averaged over
    the ranks."""
    compiled = config.compile is True or config.compile == "auto" and ranks.device.type == "cuda"
    fast = torch.compile(model) if compiled else model
    if ranks.world_size == 1:
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


def main(config: TrainConfig, given: dict[str, Any]) -> int:
    """Train; returns the exit code."""
    try:
        return run(config, given, Signals())
    except Stopped:
        if os.environ.get("RANK", "0") == "0":
            print("stopped before the first step; go on with --init_from=auto")
        return EXIT_STOPPED


def run(config: TrainConfig, given: dict[str, Any], signals: Signals) -> int:
    """The run, from where it stands to max_iters; returns the exit code."""
    ranks = start(config)
    device, lead, out_dir = ranks.device, ranks.rank == 0, Path(config.out_dir)
    writes = lead and not config.eval_only
    # a restart loop comes back while the ranks of a dead launcher may still be ending
    held, problem = (lock(out_dir, patience=30 if is_auto(config) else 0)
                     if writes else (None, ""))
    if problem := ranks.from_first(problem):
        fail(problem)
    if writes:
        checkpoint.remove_leftovers(out_dir, checkpoint.Disk())  # of a process that died

    # the state: model and optimizer, and how far they are
    model, config, meta, bundle = begin(config, given, ranks)
    loader, splits = open_data(config, meta, ranks)
    model.to(device)
    optimizer = model.optimizer(config.learning_rate, (config.beta1, config.beta2),
                                config.weight_decay)
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best_val_loss, evaluation, wandb_run_id = 0, math.inf, {}, None
    if bundle:
        step, best_val_loss, evaluation = (bundle["step"], bundle["best_val_loss"],
                                           bundle["evaluation"])
        wandb_run_id = bundle["wandb_run_id"]
        checkpoint.restore(bundle, optimizer, scaler)
        if len(bundle["rng"]) == ranks.world_size:
            restore_rng(bundle["rng"][ranks.rank], device)
        elif lead:
            print(f"ranks {len(bundle['rng'])} -> {ranks.world_size}: the same batches, and the "
                  "same losses but for rounding")
        del bundle
    metrics = Metrics(out_dir if writes else None, step, evaluation.get("step") == step)
    if writes:
        saver = checkpoint.Saver(out_dir, config.keep_checkpoints, best_val_loss, metrics.sync,
                                 device)
        if config.wandb_log:
            wandb_run_id = metrics.start_wandb(asdict(config), wandb_run_id)

    fast, net = as_it_runs(model, config, ranks, autocast, splits["train"])
    M = config.gradient_accumulation_steps
    tokens_per_step, peak = M * config.batch_size * config.block_size, peak_flops(device)
    if lead:
        metrics.say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
                    f"{tokens_per_step:,} tokens a step, {meta['tokens']['train']:,} of "
                    f"{meta['name']}; {ranks.world_size} x {device.type}, "
                    f"{str(dtype).removeprefix('torch.')}"
                    f"{', compiled' if fast is not model else ''}")

    # `healthy` becomes 0, for good, with the first loss or gradient that is not finite
    healthy = torch.ones((), device=device)
    # updates made; behind `step` once not healthy
    applied = torch.full((), float(step), device=device)

    def halt_unless_healthy() -> None:
        if not healthy:
            if writes:
                saver.wait()
            if lead:
                metrics.say(NOT_FINITE.format(step=int(applied) + 1, lr=lr)
                            + (GO_BACK.format(out_dir=out_dir) if checkpoint.has_run(out_dir)
                               else "Nothing was saved before it."))
            sys.exit(EXIT_NOT_FINITE)

    alone, begun_at, logged_step, unsaved, clock = (
        ranks.world_size == 1, step, step, False, time.perf_counter())
    while True:
        # once in a while: look
        best = False
        due = step % config.eval_interval == 0 or step >= config.max_iters
        if config.eval_only or due and evaluation.get("step") != step:
            halt_unless_healthy()
            losses = signals.unless_one_comes(
                lambda: evaluate(fast, splits, config, ranks, autocast,
                                 lambda: ranks.any(signals.came)),
                alone, nothing_new=step == begun_at)
            if losses:  # else a signal came: the run that goes on from here evaluates again
                evaluation = {"step": step, **losses}
                best_val_loss = ranks.from_first(saver.best_val_loss if writes else best_val_loss)
                best = 0 < step and losses["val_loss"] < best_val_loss
                best_val_loss = losses["val_loss"] if best else best_val_loss
                unsaved = step > 0
                metrics.log(evaluation)
                if lead:
                    metrics.say(f"step {step}: train loss {losses['train_loss']:.4f}, "
                                f"val loss {losses['val_loss']:.4f}" + ", the best so far" * best)
                    if config.sample_tokens:
                        metrics.say(show_sample(model, meta, config.sample_tokens) + "\n")
            logged_step, clock = step, time.perf_counter()
        if config.eval_only:
            break

        # once in a while: save
        stopped = ranks.any(signals.came)
        ending = stopped or step >= config.max_iters
        due = step % (config.checkpoint_interval or config.eval_interval) == 0
        if ending and ranks.any(writes and not saver.wait()):
            unsaved = True  # the last save failed: one more try
        if unsaved and (due or best or ending):
            halt_unless_healthy()
            rng = ranks.gather(rng_state(device))
            live = {"format": checkpoint.FORMAT, "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(), "step": step, "config": asdict(config),
                    "model_args": asdict(model.args), "best_val_loss": best_val_loss,
                    "evaluation": evaluation, "rng": rng, "scaler": scaler.state_dict(),
                    "data": meta, "wandb_run_id": wandb_run_id}
            if writes:
                saver.save(live, best)
            if writes and ending and not saver.wait():
                saver.save(live, best)  # it was the last one: once more, to a new file
            unsaved = False
        if ending:
            break

        # a step: the gradient of M micro-batches over all ranks, then one update
        model.train()
        lr = learning_rate(step, config)

        def gradient() -> Tensor:
            """The gradient of this rank's micro-batches; their losses, (M,), 0 for the others'."""
            losses = torch.zeros(M, device=device)
            for m, x, y in loader.step(step):
                torch.manual_seed(seed_of(config.seed, step, m))  # dropout depends on nothing else
                net.require_backward_grad_sync = m == loader.mine[-1]  # DDP reduces once a step
                with autocast:
                    loss = net(x, y)
                losses[m] = loss.detach()
                scaler.scale(loss / len(loader.mine)).backward()
            return losses

        # a signal may break this off: nothing is changed before the update
        losses = signals.unless_one_comes(gradient, alone, nothing_new=step == begun_at)
        if losses is None:
            optimizer.zero_grad(set_to_none=True)
            continue
        loss = ranks.sum(losses).mean()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, grad_norm)
        if scaler.is_enabled():
            # float16 gradients overflow now and then: the scaler skips that update by itself
            healthy *= torch.isfinite(loss)
        else:
            healthy *= torch.isfinite(loss + grad_norm)
            # read on the device by the fused AdamW, which then changes nothing
            optimizer.found_inf = 1 - healthy
        for group in optimizer.param_groups:
            group["lr"] = lr
        if writes:
            saver.wait_for_copy()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        applied += healthy
        step += 1
        unsaved = True

        # once in a while: log
        if step % config.log_interval == 0 or device.type == "cpu":
            halt_unless_healthy()
        if step % config.log_interval == 0 and lead:
            seconds, clock = ((time.perf_counter() - clock) / (step - logged_step),
                              time.perf_counter())
            logged_step = step
            row = {"step": step, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item(),
                   "tokens_per_s": tokens_per_step / seconds}
            if peak:
                row["mfu"] = (model.flops_per_token() * row["tokens_per_s"]
                              / (peak * ranks.world_size))
            metrics.log(row)
            metrics.say_progress(row, config.max_iters, seconds * (config.max_iters - step))

    # all ranks wait for the last save: torchrun kills the others when one has ended
    saved = ranks.from_first(saver.wait() if writes else True)
    if writes:
        metrics.close()
        metrics.say(f"{'stopped' if stopped else 'done'} at step {step}, "
                    + ("with nothing to save yet" if not step else
                       f"{'saved' if saved else 'NOT SAVED'} in {out_dir}")
                    + "; go on with --init_from=auto" * stopped)
        held.close()
    if ranks.world_size > 1:
        torch.distributed.destroy_process_group()
    if not saved:
        return EXIT_FAILED
    return EXIT_STOPPED if not config.eval_only and stopped else 0


if __name__ == "__main__":
    sys.exit(main(CONFIG, GIVEN))
