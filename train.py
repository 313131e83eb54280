"""Train a GPT: `python train.py config/x.py --key=value`, or the same behind torchrun; --help lists
every key.

Kill it at any time: with --init_from=auto the same command goes on from the newest bundle in
out_dir.
"""
from configurator import EXIT_FAILED, TrainConfig, command_line, fail

if __name__ == "__main__":  # before torch is loaded
    CONFIG, GIVEN, _ = command_line(TrainConfig, "python train.py [config/x.py] [--key=value ...]")

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenizer
from checkpoint import Saver, has_run
from loader import BadData, BadToken, seed_of
from metrics import Metrics
from model import GPT, generate
from runtime import EXIT_STOPPED, Signals, Stopped, peak_flops
from start import Run, begin

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
        group["lr"] = learning_rate(run.step, config)
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
    metrics.say(NOT_FINITE.format(step=step + 1, lr=learning_rate(step, run.config))
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
            losses = signals.unless_one_comes(lambda: evaluate(run, signals), ranks,
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
        losses = signals.unless_one_comes(lambda: gradient(run), ranks,
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
                   "lr": learning_rate(run.step - 1, config), "grad_norm": grad_norm.item(),
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
