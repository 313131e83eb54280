"""Explain a run: `python -m tools.inspect OUT` shows its settings, progress, checkpoints and
history on one screen; with `--step=N` it shows the text that step N read.

It only reads, and takes no lock: the run may be running, or its folder damaged.
"""

import json
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import torch

from keepgpt.checkpoint import (
    Bundle,
    CorruptCheckpoint,
    check_crc,
    find_bundle,
    list_by_step,
    read_bundle,
)
from keepgpt.config import Settings, TrainConfig, setting
from keepgpt.dataset import check_identity
from keepgpt.errors import UserError
from keepgpt.evaluation import describe_evaluation
from keepgpt.loader import Loader, batch_number
from keepgpt.mixture import (
    describe_sources,
    find_sources,
    open_split,
    read_checksums,
)
from keepgpt.optim import get_lr_factor
from keepgpt.tokenizer import from_meta
from tools.common import Card, read_card, run_tool

# the keys of a logged step
STEP_KEYS = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s"}
# lines of one list on the screen
MOST = 8


@dataclass(frozen=True)
class InspectConfig:
    """The settings of tools.inspect."""

    # about one step instead of the run
    step: int = setting(0, "show the batch of this step (1 = the first); 0 = the run")
    chars: int = setting(100, "with step: characters of each sequence; 0 = all")
    # it reads all of each file
    verify: bool = setting(True, "read every checkpoint and compare its checksum")


@dataclass
class Log:
    """The rows of metrics.jsonl by kind, and the number of lines that are none."""

    steps: list[dict]
    evaluations: list[dict]
    events: list[dict]
    corrupt: int = 0


@dataclass
class Sequence:
    """A sequence of a micro-batch: its tokens, and the place of the first one in the dataset."""

    file: str
    offset: int
    tokens: list[int]


def sort_log(folder: Path) -> Log:
    """Return the log of a run, also of one that is damaged or missing."""
    log = Log([], [], [])
    path = folder / "metrics.jsonl"
    content = path.read_bytes() if path.is_file() else b""
    # the last line may still be being written
    for line in content.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
            rows = classify(row, log)
        except (ValueError, TypeError, AttributeError):
            log.corrupt += 1
        else:
            rows.append(row)
    return log


def classify(row: dict, log: Log) -> list[dict]:
    """Return the list of `log` that a row belongs to. Raises ValueError, TypeError or
    AttributeError unless it is a row of a run."""
    # everything else is a number; a sum raises otherwise
    sum(row[key] for key in row.keys() - {"event", "text"})
    # by all keys that are read below
    if row.keys() >= {"step", "event", "text"}:
        return log.events
    if row.keys() >= {"step", "train_loss", "val_loss"}:
        return log.evaluations
    if row.keys() >= STEP_KEYS:
        return log.steps
    raise ValueError("unknown keys")


def list_files(folder: Path) -> list[list[Path]]:
    """Return the names of each checkpoint file, the newest file first."""
    # the order in which a resume tries them
    names = list_by_step(folder)
    files: dict[int, list[Path]] = {}
    for path in [folder / "ckpt.pt", *names, folder / "best.pt"]:
        # a running run may remove it at any instant
        with suppress(FileNotFoundError):
            # several names are hard links of one file
            files.setdefault(path.stat().st_ino, []).append(path)
    return list(files.values())


def read_checkpoints(folder: Path, verify: bool) -> tuple[list[str], Bundle]:
    """Return a line about each checkpoint file, and the bundle of the newest intact one, {} if
    there is none. Older ones are compared with their checksums if `verify`."""
    unfinished = sorted(path.name for path in folder.glob("*.pt.tmp"))
    lines = [f"{name}: a save in progress, or a killed one" for name in unfinished]
    bundle: Bundle = {}
    for paths in list_files(folder):
        names = ", ".join(sorted(path.name for path in paths))
        status = "not verified"
        try:
            size = paths[0].stat().st_size
            # reading it verifies it
            if not bundle:
                bundle = read_bundle(paths[0])
                status = "intact"
            elif verify:
                check_crc(paths[0])
                status = "intact"
            lines.append(f"{names}: {size / 1e6:,.1f} MB, {status}")
        # removed since the folder was listed
        except FileNotFoundError:
            continue
        except (CorruptCheckpoint, OSError) as e:
            lines.append(f"{names}: CORRUPT: {e}")
    return lines, bundle


def merge_skips(bundle: Bundle, log: Log) -> dict[int, int]:
    """Return the numbers of skipped batches by step: those of a checkpoint, and the later ones in
    the log."""
    skips = dict(bundle.get("skips", {}))
    for row in list_later_events(bundle, log, "skip"):
        # an event names the update that comes next
        step = row["step"] - 1
        skips[step] = skips.get(step, 0) + 1
    return skips


def list_later_events(bundle: Bundle, log: Log, kind: str) -> list[dict]:
    """Return the events of a kind that a checkpoint does not count yet."""
    saved = bundle.get("step", 0)
    rows = [row for row in log.events if row["step"] > saved]
    return [row for row in rows if row["event"] == kind]


def read_config(settings: Settings) -> TrainConfig:
    """Return saved settings. A key that this version lacks is dropped."""
    keys = {f.name for f in fields(TrainConfig)} & settings.keys()
    return TrainConfig(**{key: settings[key] for key in keys})


def count_steps(bundle: Bundle, log: Log) -> int:
    """Return the number of steps that a run has made, as far as the folder says."""
    # the log is ahead of the checkpoint, or it may be lost
    rows = log.steps[-1:] + log.evaluations[-1:]
    return max([bundle.get("step", 0), *(row["step"] for row in rows)])


def describe_settings(config: TrainConfig) -> str:
    """Return the settings that differ from the defaults."""
    changed = [
        f"{f.name}={getattr(config, f.name)}"
        for f in fields(TrainConfig)
        if getattr(config, f.name) != f.default
    ]
    return f"settings that differ from the defaults: {', '.join(changed)}"


def describe_progress(
    folder: Path, config: TrainConfig, bundle: Bundle, log: Log
) -> str:
    """Return how far the run is, and how fast."""
    step = count_steps(bundle, log)
    tokens = step * config.tokens_per_step
    text = f"progress: step {step:,} of {config.max_iters:,}, {tokens:,} tokens"
    if bundle:
        # a branch may have started another dataset, and batches may be skipped
        skips = bundle.get("skips", {})
        batch = batch_number(step, skips, bundle.get("data_start", 0))
        read = batch * config.tokens_per_step / config.block_size
        # the whole data, or the sources of a mixture
        parts = []
        for part in bundle["data"].get("sources", [bundle["data"]]):
            # as in loader.Split: the last one leaves room for another offset
            windows = max(1, part["tokens"]["train"] // config.block_size - 1)
            epochs = read * float(Fraction(part.get("share", 1))) / windows
            parts.append(f"{epochs:.2f} epochs of {part['name']}")
        text += f" ({', '.join(parts)})"
    # as in the lines on the terminal
    if log.steps:
        speed = log.steps[-1]["tokens_per_s"]
        # max_iters may have been lowered
        left = max(0, config.max_iters - step) * config.tokens_per_step / speed
        text += f", {speed:,.0f} tokens/s, {timedelta(seconds=round(left))} left"
        age = time.time() - (folder / "metrics.jsonl").stat().st_mtime
        text += f"; last row {timedelta(seconds=round(age))} ago"
    return text


def describe_losses(bundle: Bundle, log: Log) -> str:
    """Return the last losses and the best validation loss."""
    losses = []
    # before the first logged step there is none
    if log.steps:
        losses.append("train {loss:.4f} at step {step}".format(**log.steps[-1]))
    # a log may be lost
    evaluations = log.evaluations
    if not evaluations and bundle.get("evaluation"):
        evaluations = [bundle["evaluation"]]
    if evaluations:
        best = min(evaluations, key=lambda row: row["val_loss"])
        losses.append("val {val_loss:.4f} at step {step}".format(**evaluations[-1]))
        losses.append("best val {val_loss:.4f} at step {step}".format(**best))
    return f"loss: {', '.join(losses) or 'none logged yet'}"


def describe_history(bundle: Bundle, log: Log, card: Card) -> Iterator[str]:
    """Yield lines about the trunk of a branch, skipped batches and steps with two results."""
    # before the first save only README.md names the trunk
    trunk = bundle.get("trunk") or card.trunk
    if trunk:
        text = "branched from {path}, step {step}".format(**trunk)
        if bundle.get("data_start"):
            text += f", with {bundle['data']['name']} from its beginning"
        yield text
    if bundle.get("went_back_to"):
        yield f"went back to step {bundle['went_back_to']}"

    # in total; the rows of the log say why
    skips = merge_skips(bundle, log)
    listed = ", ".join(f"{n} before step {step + 1}" for step, n in skips.items())
    yield f"skipped batches: {listed or 'none'}"
    later = list_later_events(bundle, log, "replay")
    replays = bundle.get("replays", 0) + len(later)
    yield f"steps with another result when computed again: {replays or 'none'}"
    for row in log.events[-MOST:]:
        yield f"  {describe_row(row)}"


def describe_row(row: dict) -> str:
    """Return a row of metrics.jsonl as text."""
    # the three kinds, see `classify`
    if "event" in row:
        text = row["text"]
    elif "val_loss" in row:
        text = describe_evaluation(row)
    else:
        text = "loss {loss:.4f}, lr {lr:.2e}, gradient norm {grad_norm:.4g}".format(
            **row
        )
    return f"step {row['step']}: {text}"


def cut_list(title: str, lines: list[str]) -> Iterator[str]:
    """Yield a title and the last lines of a list that may be longer than a screen."""
    # a corrupt checkpoint is shown wherever it stands
    corrupt = [line for line in lines[:-MOST] if "CORRUPT" in line]
    left_out = len(lines[:-MOST]) - len(corrupt)
    yield f"{title}:" + ("" if lines else " none")
    if left_out:
        yield f"  ... and {left_out} earlier"
    for line in corrupt + lines[-MOST:]:
        yield f"  {line}"


def describe_run(folder: Path, verify: bool) -> Iterator[str]:
    """Yield the lines about a run."""
    # the run may write meanwhile: the log, read later, is never behind the checkpoint
    checkpoints, bundle = read_checkpoints(folder, verify)
    log = sort_log(folder)
    card = read_card(folder)

    # README.md has the settings of the last start, which may not have saved yet
    settings = card.settings or bundle.get("config", {})
    yield str(folder)
    if settings:
        config = read_config(settings)
        yield describe_settings(config)
        yield describe_progress(folder, config, bundle, log)
    else:
        yield "settings: unknown: no intact checkpoint, and no README.md of a run"
    yield describe_losses(bundle, log)
    if log.corrupt:
        yield f"metrics.jsonl: {log.corrupt} corrupt lines"
    starts = [f"{s.time} UTC, step {s.step}: {s.command}" for s in card.starts]
    yield from cut_list("starts", starts)
    yield from describe_history(bundle, log, card)
    yield from cut_list("checkpoints, the newest last", checkpoints[::-1])


def open_loader(bundle: Bundle) -> Loader:
    """Return the loader of a checkpoint's run. Raises UserError if its data is missing or was
    changed."""
    config = read_config(bundle["config"])
    # the same checks as at a start
    sources = find_sources(config.data_dir, config.dataset)
    check_identity(
        config.dataset, describe_sources(sources, config.dataset), bundle["data"]
    )
    read_checksums(sources, bundle["data"])
    split = open_split(sources, "train", config.block_size, config.seed, shift=True)
    # all micro-batches, whatever rank computed them
    micro_batches = config.gradient_accumulation_steps
    local = range(micro_batches)
    return Loader(split, config.batch_size, micro_batches, local, torch.device("cpu"))


def read_micro_batch(loader: Loader, batch: int, m: int) -> list[Sequence]:
    """Return the sequences of micro-batch m of a batch. Raises BadData."""
    first = loader.first_window(batch, m)
    places = loader.split.locate(range(first, first + loader.batch_size))
    x, _ = loader.split.rows(first, loader.batch_size)
    sequences = []
    for (split, start), tokens in zip(places, x.tolist()):
        # the file that holds the first token, as in Split.read
        i = bisect_right(split.ends, start) - 1
        path = Path(split.files[i].name)
        # the folder too: a mixture has several files of one name
        name = f"{path.parent.name}/{path.name}"
        sequences.append(Sequence(name, start - split.ends[i], tokens))
    return sequences


def list_batches(bundle: Bundle, log: Log, step: int) -> range:
    """Return the numbers of the batches that step `step` read: those that it skipped, then the one
    that it was made with. Raises UserError for a step with other data."""
    data_start = bundle.get("data_start", 0)
    if step <= data_start:
        raise UserError(
            f"step {step} read other data: this branch started its own at step {data_start}. Try: "
            "python -m tools.inspect <folder of the trunk, {path}>".format(
                **bundle["trunk"]
            )
        )
    # each skip moved on by one batch
    skips = merge_skips(bundle, log)
    batch = batch_number(step - 1, skips, data_start)
    return range(batch - skips.get(step - 1, 0), batch + 1)


def rows_around(log: Log, step: int) -> list[dict]:
    """Return the rows of the log about a step: two logged steps before it, two after it, and what
    is between them."""
    # log_interval may be anything
    before = [row["step"] for row in log.steps if row["step"] < step]
    after = [row["step"] for row in log.steps if row["step"] > step]
    first = min([step, *before[-2:]])
    last = max([step, *after[:2]])
    rows = log.events + log.steps + log.evaluations
    # rows of one step: its skips, the update, the evaluation after it
    return sorted(
        (row for row in rows if first <= row["step"] <= last),
        key=lambda row: row["step"],
    )


def describe_step(folder: Path, step: int, chars: int) -> Iterator[str]:
    """Yield the lines about a step. Raises UserError."""
    # any checkpoint of this run would do, the newest knows most skips
    _, bundle = find_bundle(folder)
    log = sort_log(folder)
    config = read_config(bundle["config"])
    batches = list_batches(bundle, log, step)
    loader = open_loader(bundle)
    decode = from_meta(bundle["data"]).decode

    # the rate by the log: a resume may have changed the schedule since
    rate = config.learning_rate * get_lr_factor(step - 1, config)
    for row in log.steps:
        if row["step"] == step:
            rate = row["lr"]
    text = f"{folder}: step {step}, lr {rate:.2e}"
    if step > count_steps(bundle, log):
        text += ", not made yet"
    yield text
    for row in rows_around(log, step):
        yield f"  {describe_row(row)}"

    for batch in batches:
        note = "" if batch == batches[-1] else ", skipped"
        yield f"batch {batch}{note}: {config.tokens_per_step:,} tokens of {bundle['data']['name']}"
        for m in range(loader.micro_batches):
            yield f"  micro-batch {m}"
            for sequence in read_micro_batch(loader, batch, m):
                text = decode(sequence.tokens)
                if chars:
                    text = text[:chars]
                # escaped: one line, and nothing that a terminal obeys
                yield f"    {sequence.file}, token {sequence.offset:,}: {text!r}"


def main(config: InspectConfig, args: list[str]) -> None:
    """Print about a run, or about one of its steps. Raises UserError."""
    if len(args) != 1:
        raise UserError("expected the out_dir of a run")
    folder = Path(args[0])
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Try: the out_dir of a run")
    # one step, or the run
    if config.step:
        lines = describe_step(folder, config.step, config.chars)
    else:
        lines = describe_run(folder, config.verify)
    # all at once, as an error is the only line
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    run_tool(InspectConfig, "python -m tools.inspect OUT [--key=value ...]", main)
