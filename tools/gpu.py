"""Check and measure on a GPU: `python -m tools.gpu [--parts=checks,train] [--only=ROW]`.

    checks  resumed, killed and blown-up runs; snapshots; decode steps; two ranks
    train, sample, checkpoint: as in tools.bench, on the shapes for a GPU

Each part takes --minutes at most and prints a row when it is ready. Each row has its own process;
if one fails, the others continue and the exit code is 1. Numbers go to docs/measured.json. Needs no
network, and Transformers only for its columns.
"""
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from keepgpt.checkpoint import path_of, read_bundle
from keepgpt.config import parse, setting
from keepgpt.distributed import pick_device
from keepgpt.process import UserError, exit_with
from model import GPT, ModelArgs, compile_decode, disable_cudnn_attention
from tools import measure, runs
from tools.bench import parts as bench
from tools.measure import Row

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 8,
        "gradient_accumulation_steps": 2, "dropout": 0.1, "learning_rate": 3e-3, "warmup_iters": 4,
        "lr_decay_iters": 40, "max_iters": 40, "eval_interval": 20,
        "eval_iters": 100,  # all windows, so an evaluation's last batch is smaller
        "log_interval": 5, "deterministic": True, "init_from": "auto"}
CHECKS = {  # a row's name: the call that makes it
    "resume, bfloat16": "resume(device, dtype='bfloat16')",
    "snapshots while training": "snapshots(device)",
    "a loss that is not finite": "blow_up(device)",
    "kill -9": "resume(device, kill=True)",
    "compiled decode steps, bfloat16": "compare_decode(device)",
    "resume, two ranks": "resume(device, ranks=2, backend='gloo')",
    "resume, elastic": "resume(device, elastic=True)",
    "resume, float16": "resume(device, dtype='float16')",
    "resume, float32, not compiled": "resume(device, dtype='float32', compile=False)"}
MEASURED = ("train", "sample", "checkpoint")


@dataclass(frozen=True)
class GpuConfig:
    """The settings of tools.gpu."""
    parts: str = setting("checks,train,sample,checkpoint", "the parts to run, in this order")
    only: str = setting("", "only rows whose name contains this")
    minutes: float = setting(9.5, "time limit of each part", least=0)
    rounds: int = setting(1, "rounds of a measurement; tables show medians", least=1)
    json: str = setting("docs/measured.json", "the file to record the numbers in")
    device: str = setting("cuda", "cpu = test this program without a GPU")


# checks: each returns a row, or raises UserError


def check(equal: bool, what: str) -> Row:
    """Return the row of a comparison. Raises UserError if it failed."""
    if not equal:
        raise UserError(f"{what} differ")
    return {"result": f"{what} are bit-identical"}


def resume(device: str, ranks: int = 1, kill: bool = False, **flags: object) -> Row:
    """Compare 40 steps with 20 steps and a resume, or with a run that is killed after a save. The
    whole run evaluates before it trains, a resumed one trains first."""
    with tempfile.TemporaryDirectory() as name:
        whole, resumed = Path(name) / "whole", Path(name) / "resumed"
        flags = TINY | flags | {"device": device, "dataset": runs.prepare_source(Path(name))}
        if ranks > 1 and device == "cuda":
            flags["device"] = "cuda:0"  # the ranks share it
        if kill:
            flags |= {"max_iters": 400, "eval_interval": 200, "checkpoint_interval": 10}
        runs.run(flags | {"out_dir": whole}, ranks)
        flags["out_dir"] = resumed
        if kill:
            pid = runs.start(flags, ranks)
            while runs.wait_for_exit(pid, 0.01) is None:
                if (resumed / "ckpt.pt").exists():
                    os.kill(pid, signal.SIGKILL)
        else:
            runs.run(flags | {"max_iters": 20}, ranks)
        runs.run(flags, ranks)
        return check(runs.read_end(whole) == runs.read_end(resumed), "a whole and a resumed run")


def snapshots(device: str) -> Row:
    """Compare checkpoints of a run that saves after each step with those of runs that end there:
    none may hold values of a later step."""
    with tempfile.TemporaryDirectory() as name:
        often, seldom = Path(name) / "often", Path(name) / "seldom"
        flags = TINY | {"device": device, "dataset": runs.prepare_source(Path(name)),
                        "compile": False}
        if device != "cpu":  # a copy should take longer than a step
            flags |= {"n_layer": 8, "n_head": 8, "n_embd": 512}
        runs.run(flags | {"out_dir": often, "max_iters": 12, "checkpoint_interval": 1,
                          "keep_checkpoints": 12}, ranks=1)
        for step in (6, 12):
            runs.run(flags | {"out_dir": seldom, "max_iters": step}, ranks=1)
            a, b = (read_bundle(path_of(out, step)) for out in (often, seldom))
            row = check(runs.digest([a["model"], a["optimizer"]])
                        == runs.digest([b["model"], b["optimizer"]]), "checkpoints")
        return row


def blow_up(device: str) -> Row:
    """Check that a learning rate of 1e30 gives exit code 3 and leaves finite checkpoints."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        flags = TINY | {"device": device, "dataset": runs.prepare_source(Path(name)),
                        "out_dir": out}
        runs.run(flags | {"max_iters": 20}, ranks=1)
        runs.run(flags | {"learning_rate": 1e30, "grad_clip": 0, "checkpoint_interval": 1},
                 ranks=1, code=3)
        bundle = read_bundle(out / "ckpt.pt")
    if not all(tensor.isfinite().all() for tensor in bundle["model"].values()):
        raise UserError("ckpt.pt is not finite")
    return {"result": f"exit code 3, ckpt.pt of step {bundle['step']} is finite"}


@torch.inference_mode()
def compare_decode(device: str) -> Row:
    """Compare the logits of 50 compiled decode steps with those of plain ones."""
    torch.manual_seed(0)
    where, args = pick_device(device), ModelArgs(4, 4, 256, 128, 512, bias=True, dropout=0.0)
    model = GPT(args).to(where, torch.bfloat16).eval()
    for p in model.parameters():  # large values, so errors show
        torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(512, (3, 60), device=where)
    plain, cache, errors, largest = model.make_cache(3), model.make_cache(3), [], []
    with disable_cudnn_attention():
        model(tokens[:, :10], cache=plain)
        model(tokens[:, :10], cache=cache)
        decode = compile_decode(model, cache)
        for i in range(10, 60):
            expected = model(tokens[:, i:i + 1], cache=plain)
            errors.append((decode(tokens[:, i:i + 1]) - expected).abs().max())
            largest.append(expected.abs().max())
    error = (torch.stack(errors).max() / torch.stack(largest).max()).item()  # NaN if any is
    verdict = f"logits differ by {error:.1e} of the largest"
    if not error < 0.03:
        raise UserError(verdict)
    return {"result": verdict}


def list_calls(part: str, config: GpuConfig) -> dict[str, str]:
    """Return the rows of a part by name, each as an expression for a process of its own."""
    if part == "checks":
        calls = {name: "gpu." + call.replace("device", repr(config.device), 1)
                 for name, call in CHECKS.items()}
    else:
        calls = bench.list_calls(part, bench.BenchConfig(rounds=config.rounds,
                                                         device=config.device))
    return {name: call for name, call in calls.items() if config.only in name}


def main(config: GpuConfig) -> int:
    """Run the parts and return the exit code. Raises UserError and OSError."""
    parts, known = config.parts.split(","), ("checks", *MEASURED)
    if set(parts) - set(known):
        raise UserError(f"--parts={config.parts}: expected some of {','.join(known)}")
    if config.device != "cpu" and not torch.cuda.is_available():
        raise UserError("no CUDA device found. Try: python -m tools.bench")
    machine, path = measure.describe_machine(pick_device(config.device)), measure.REPO / config.json
    print(*machine.values(), sep=", ")
    # checks run in parallel, as they wait for compilers
    passed = [measure.run_rows(f"gpu {part}", list_calls(part, config), path, machine,
                               config.minutes, workers=6 if part == "checks" else 1)
              for part in parts]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    try:
        CONFIG, _, ARGS = parse(GpuConfig, "python -m tools.gpu [--key=value ...]", sys.argv[1:])
        if ARGS:
            raise UserError(f"{ARGS[0]}: expected --key=value. Try: --help")
        sys.exit(main(CONFIG))
    except UserError as e:
        exit_with(e)
    except OSError as e:
        exit_with(UserError(str(e)))
