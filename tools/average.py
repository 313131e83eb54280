"""Average the weights of a run's checkpoints: `python -m tools.average OUT --last=8 --to=avg.pt`.

The mean of the last few often has a lower loss than each of them. sample.py, tools.export and
train.py read the file with --init_from=avg.pt. It holds no optimizer, so no run resumes from it.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from keepgpt.checkpoint import Bundle, find_step, list_by_step, read_intact
from keepgpt.config import setting
from keepgpt.errors import UserError
from keepgpt.files import write_atomically
from tools.common import run_tool

# the path and the bundle of a checkpoint
Checkpoint = tuple[Path, Bundle]


@dataclass(frozen=True)
class AverageConfig:
    """The settings of tools.average."""

    last: int = setting(8, "number of checkpoints: the newest intact ones", least=1)
    steps: str = setting("", "instead: their steps, e.g. 1000,1500,2000")
    to: str = setting("", "the new file to write")


def parse_steps(text: str) -> list[int]:
    """Return the steps that the text lists, each once. Raises UserError."""
    try:
        return sorted({int(step) for step in text.split(",")})
    except ValueError:
        raise UserError(f"--steps={text}: expected numbers, e.g. 1000,1500") from None


def read_last(folder: Path, count: int) -> Iterator[Checkpoint]:
    """Yield the newest `count` intact checkpoints of different steps, among the numbered ones and
    the milestones. Print which ones are skipped. Raises UserError at the end if there are fewer."""
    paths = list_by_step(folder)
    steps: set[int] = set()
    for path, bundle in read_intact(paths, []):
        # a milestone may be a copy of a numbered one
        if bundle["step"] in steps:
            continue
        yield path, bundle
        steps.add(bundle["step"])
        if len(steps) == count:
            return
    raise UserError(
        f"{folder}: expected {count} intact checkpoints, got {len(steps)}. Try: a smaller --last; "
        "the next run keeps more with --keep_checkpoints or --keep_every"
    )


def describe_network(bundle: Bundle) -> tuple[dict, dict]:
    """Return the sizes of the network and the tokenizer, which are equal in all checkpoints of an
    average. A resumed run may change its dropout."""
    return bundle["model_args"] | {"dropout": 0.0}, bundle["data"]["tokenizer"]


def average(checkpoints: Iterator[Checkpoint], folder: Path) -> Bundle:
    """Return a bundle with the mean of the checkpoints' weights, which says where they come from.
    Raises UserError if they are of different networks."""
    # one checkpoint at a time is in memory
    newest = {}
    sums: dict[str, torch.Tensor] = {}
    hashes: dict[int, str] = {}
    for path, bundle in checkpoints:
        newest = newest or bundle
        if describe_network(bundle) != describe_network(newest):
            raise UserError(
                f"{path}: expected the model_args and the tokenizer of step {newest['step']}, got "
                "others. Try: the checkpoints of one run"
            )
        # in float64 the order of the sum changes nothing that float32 shows
        for name, weight in bundle["model"].items():
            sums[name] = sums.get(name, 0) + weight.double()
        # identifies it also after the run has removed it
        with open(path, "rb") as file:
            hashes[bundle["step"]] = hashlib.file_digest(file, "sha256").hexdigest()

    # as a checkpoint has them; without an optimizer, and without a step
    steps = sorted(hashes)
    sha256 = [hashes[step] for step in steps]
    return {
        "model": {name: (total / len(steps)).float() for name, total in sums.items()},
        "model_args": newest["model_args"],
        "data": newest["data"],
        "config": newest["config"],
        "origin": {"path": str(folder), "steps": steps, "sha256": sha256},
    }


def main(config: AverageConfig, args: list[str]) -> None:
    """Write the average of one run's checkpoints. Raises UserError and OSError."""
    if len(args) != 1 or not config.to:
        raise UserError(
            "expected the out_dir of a run, and --to=FILE. Try: python -m tools.average out "
            "--last=8 --to=avg.pt"
        )
    # one folder: the run
    folder = Path(args[0])
    target = Path(config.to)
    # an average replaces nothing
    if target.exists():
        raise UserError(f"--to={target}: expected a new file")
    checkpoints = read_last(folder, config.last)
    if config.steps:
        # in the order of `read_last`, the newest first
        steps = parse_steps(config.steps)[::-1]
        checkpoints = (find_step(folder, step) for step in steps)
    bundle = average(checkpoints, folder)

    # without the checksum of a checkpoint, which would look like one to resume from
    content = io.BytesIO()
    torch.save(bundle, content)
    write_atomically(target, content.getbuffer())
    print(f"{folder}: mean of steps {bundle['origin']['steps']} -> {target}")


if __name__ == "__main__":
    run_tool(
        AverageConfig, "python -m tools.average OUT --to=FILE [--key=value ...]", main
    )
