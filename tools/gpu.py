"""Check and measure on a GPU: `python -m tools.gpu [--parts=checks,train] [--json=rows.jsonl]`.

    machine  the device, its clock, the rate of a matrix product, the attention kernel
    checks   resumed, killed and blown-up runs; snapshots; decode steps; two ranks; tree sums
    train    a step of GPT-2 124M and 350M, against nanoGPT's and Transformers' in bfloat16
    save     the cost of a save during training
    sample   tokens of one sequence, against Transformers
    ways     a step with one thing changed

Each part takes --minutes at most and prints a row when it is ready, the most important first. Each
row has its own process; if one fails, the others continue and the exit code is 1. Needs no network,
and Transformers only for the rows of that name.
"""
from keepgpt.process import prepare_process

if __name__ == "__main__":  # before torch is loaded
    prepare_process()

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend

from keepgpt.checkpoint import path_of, read_bundle
from keepgpt.config import parse, setting
from keepgpt.distributed import peak_flops, pick_device, pick_dtype, use_deterministic_algorithms
from keepgpt.process import fail
from model import GPT, ModelArgs, compile_decode, disable_cudnn_attention
from tools.bench import checkpoint, sides
from tools.bench.common import REPO, SHAPES, machine, new_run, report, seconds
from tools.crash.common import digest, ends, exit_code, prepare, start
from train import sum_as_tree

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 8,
        "gradient_accumulation_steps": 2, "dropout": 0.1, "learning_rate": 3e-3, "warmup_iters": 4,
        "lr_decay_iters": 40, "max_iters": 40, "eval_interval": 20,
        "eval_iters": 100,  # all windows, so an evaluation's last batch is smaller
        "log_interval": 5, "deterministic": True, "init_from": "auto"}


@dataclass(frozen=True)
class GpuConfig:
    """The settings."""
    parts: str = setting("machine,checks,train,save,sample,ways", "the parts to run, in this order")
    only: str = setting("", "only rows whose name contains this")
    minutes: float = setting(9.5, "time limit of each part", least=0)
    json: str = setting("", "append the rows to this file as JSON lines")
    device: str = setting("cuda", "cpu = test this program with small models")


def rows_of(device: str) -> dict[str, dict[str, str]]:
    """Return every part's rows by name, each as the call of this module that measures it."""
    def step(name: str, function: str, *args: str) -> str:
        call = f"sides.{function}({', '.join(map(repr, (*args, name, device)))})"
        return f"speed(lambda: {call}, {device!r}, {name!r})"

    def token(name: str, function: str, args: str = "") -> str:
        return f"speed(lambda: sides.{function}({name!r}, {device!r}{args}), {device!r})"

    gpt2, medium = (["4 layers, 128 wide"] * 3,) * 2 if device == "cpu" else (
        [f"GPT-2 124M, batch {rows}" for rows in (32, 64, 16)],
        [f"GPT-2 350M, batch {rows}" for rows in (16, 8, 32)])
    trained = {"keepGPT": "train_ours", "nanoGPT's step": "train_plain",
               "Transformers": "train_transformers"}
    sampled = {"keepGPT": ("sample_ours",), "Transformers": ("sample_transformers",),
               "keepGPT, compiled": ("sample_ours", ", compile=True")}
    shared = device if device == "cpu" else f"{device}:0"  # by two ranks
    return {
        "machine": {"": f"capabilities({device!r})"},
        "checks": {
            "resume, bfloat16": f"resume({device!r}, dtype='bfloat16')",
            "snapshots while training": f"snapshots({device!r})",
            "a loss that is not finite": f"blow_up({device!r})",
            "kill -9": f"kill({device!r})",
            "compiled decode steps, bfloat16": f"compare_decode({device!r})",
            "resume, two ranks": f"resume({shared!r}, ranks=2, backend='gloo')",
            "resume, elastic": f"resume({device!r}, elastic=True)",
            "a tree in 1, 2, 4 branches": f"branches({device!r})",
            "resume, float16": f"resume({device!r}, dtype='float16')",
            "resume, float32, not compiled": f"resume({device!r}, dtype='float32', compile=False)",
            "resume without deterministic=True": f"resume({device!r}, deterministic=False)"},
        "train": {f"{name}: {side}": step(name, trained[side]) for name, side in (
            *((gpt2[0], side) for side in trained), *((medium[0], side) for side in trained),
            *((name, "keepGPT") for name in gpt2[1:] + medium[1:]))},
        "save": {name: f"stall({name!r}, {device!r})" for name in (gpt2[2], medium[1])},
        "sample": {f"{name}: {side}": token(name, *how) for side, how in sampled.items()
                   for name in ({"GPT-2 124M", "6 layers, 384 wide"}
                                if device != "cpu" else {gpt2[0]})},
        "ways": {way: step(gpt2[2], "train_in_a_way", way) for way in sides.WAYS}}


# checks: each returns a row, or exits with an error


def train(out: Path, code: int = 0, ranks: int = 1, **flags: object) -> None:
    """Run train.py to its end, which must have that exit code."""
    found = exit_code(start(TINY | flags | {"out_dir": out}, ranks), seconds=200)
    if found != code:
        last = Path(f"{out}.log").read_text().strip().splitlines()[-1:]
        sys.exit(f"train.py: expected exit code {code}, got {found}: {last}")


def compare(same: bool, what: str = "") -> dict[str, str]:
    """Return the row of a comparison, or exit if the bits differ."""
    if not same:
        sys.exit(f"OTHER BITS {what}")
    return {"result": f"same bits {what}".strip()}


def resume(device: str, **flags: object) -> dict[str, str]:
    """Compare 40 steps with 20 steps and a resume. The first run evaluates before it trains, the
    resumed one trains first."""
    with tempfile.TemporaryDirectory() as name:
        whole, parts = Path(name) / "whole", Path(name) / "parts"
        flags |= {"device": device, "dataset": prepare(Path(name))}
        train(whole, **flags)
        train(parts, **flags | {"max_iters": 20})
        train(parts, **flags)
        same = ends(whole) == ends(parts)
    if not flags.get("deterministic", True):  # nothing is promised
        return {"result": "same bits" if same else "other bits, as may be"}
    return compare(same)


def snapshots(device: str) -> dict[str, str]:
    """Compare checkpoints of a run that saves after each step with those of runs that end there:
    none may hold values of a later step."""
    with tempfile.TemporaryDirectory() as name:
        often, seldom = Path(name) / "often", Path(name) / "seldom"
        flags = {"device": device, "dataset": prepare(Path(name)), "compile": False}
        if device != "cpu":  # a copy should take longer than a step
            flags |= {"n_layer": 8, "n_head": 8, "n_embd": 512}
        train(often, max_iters=12, checkpoint_interval=1, keep_checkpoints=12, **flags)
        for step in (6, 12):
            train(seldom, max_iters=step, **flags)
            one, other = (read_bundle(path_of(out, step)) for out in (often, seldom))
            compare(digest([one["model"], one["optimizer"]])
                    == digest([other["model"], other["optimizer"]]), f"at step {step}")
    return {"result": "same bits"}


def blow_up(device: str) -> dict[str, str]:
    """Check that a learning rate of 1e30 gives exit code 3 and leaves finite checkpoints."""
    with tempfile.TemporaryDirectory() as name:
        out, flags = Path(name) / "out", {"device": device, "dataset": prepare(Path(name))}
        train(out, max_iters=20, **flags)
        train(out, code=3, learning_rate=1e30, grad_clip=0, checkpoint_interval=1, **flags)
        bundle = read_bundle(out / "ckpt.pt")
    if not all(tensor.isfinite().all() for tensor in bundle["model"].values()):
        sys.exit("ckpt.pt is not finite")
    return {"result": f"exit code 3, ckpt.pt of step {bundle['step']} is finite"}


def kill(device: str) -> dict[str, str]:
    """Run kill -9 after a save, then the same command again."""
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        flags = {"device": device, "dataset": prepare(Path(name)), "max_iters": 400,
                 "eval_interval": 200, "checkpoint_interval": 10}
        train(whole, **flags)
        process = start(TINY | flags | {"out_dir": killed}, 1)
        while not (killed / "ckpt.pt").exists():
            if (code := exit_code(process, 0.01)) is not None:
                sys.exit(f"train.py: exit code {code} before its first save")
        os.kill(process, signal.SIGKILL)
        exit_code(process)
        train(killed, **flags)
        return compare(ends(whole) == ends(killed))


@torch.inference_mode()
def compare_decode(device: str) -> dict[str, str]:
    """Compare the logits of 50 compiled decode steps with those of plain ones; D is 64."""
    torch.manual_seed(0)
    where, args = pick_device(device), ModelArgs(4, 4, 256, 128, 512, bias=True, dropout=0.0)
    model = GPT(args).to(where, torch.bfloat16).eval()
    for p in model.parameters():  # large values, so that errors show
        torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(512, (3, 60), device=where)
    plain, cache, largest, error = model.make_cache(3), model.make_cache(3), 0.0, 0.0
    with disable_cudnn_attention():
        model(tokens[:, :10], cache=plain)
        model(tokens[:, :10], cache=cache)
        decode = compile_decode(model, cache)
        for i in range(10, 60):
            expected = model(tokens[:, i:i + 1], cache=plain)
            error = max(error, (decode(tokens[:, i:i + 1]) - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    verdict = f"logits differ by {error / largest:.1e} of the largest"
    if not error < 0.03 * largest:
        sys.exit(verdict)
    return {"result": verdict}


def branches(device: str) -> dict[str, str]:
    """Compare the elastic=True gradient of 8 micro-batches on one rank with that of 2 and 4 ranks,
    simulated in turn."""
    use_deterministic_algorithms()
    torch.manual_seed(0)
    where = pick_device(device)
    model = GPT(ModelArgs(4, 4, 256, 64, 512, bias=False, dropout=0.1)).to(where)
    x, y = torch.randint(512, (2, 8, 4, 64), device=where)

    def add_gradient(m: int) -> None:
        torch.manual_seed(m)
        with torch.autocast(where.type, torch.bfloat16):
            loss = model(x[m], y[m])
        loss.backward()

    def over(ranks: int) -> list[torch.Tensor]:
        share = 8 // ranks
        parts = [sum_as_tree(model, add_gradient, first, first + share)
                 for first in range(0, 8, share)]
        while len(parts) > 1:  # as the exchanges between ranks do
            parts = [[a + b for a, b in zip(*pair)] for pair in zip(parts[::2], parts[1::2])]
        return parts[0]

    sums = [over(ranks) for ranks in (1, 2, 4)]
    return compare(all(torch.equal(a, b) for other in sums[1:] for a, b in zip(sums[0], other)))


# measurements


def clocks(device: torch.device) -> Callable[[], str]:
    """Ask the driver for clock, power and temperature while other work is done; the call that
    returns them waits for its answer."""
    args = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu",
            "--format=csv,noheader",
            "--id=" + os.environ.get("CUDA_VISIBLE_DEVICES", str(device.index or 0)).split(",")[0]]
    try:
        process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   text=True)
    except OSError:
        return lambda: "-"
    return lambda: process.communicate()[0].strip() or "-"


def speed(make: Callable[[], Callable[[], float]], device: str, name: str = "") -> dict[str, str]:
    """Return the speed of one of `sides`: a training step of the model `name`, or a token. MFU
    counts our model's FLOPs; the time until it runs includes compilation."""
    where, start = pick_device(device), time.perf_counter()
    work = make()
    ready = time.perf_counter() - start
    clock = clocks(where)
    took = median(work() for _ in range(5))
    row = {"time": f"{took * 1e3:,.2f} ms"}
    if name:
        args, rows = SHAPES[name].args, SHAPES[name].batch_size
        rate = rows * args.block_size / took
        with torch.device("meta"):
            flops, peak = GPT(args).flops_per_token() * rate, peak_flops(where)
        row |= {"tokens/s": f"{rate:,.0f}", "TFLOP/s": f"{flops / 1e12:,.1f}",
                "MFU": f"{flops / peak:.1%}" if peak else "-"}
    else:
        row |= {"tokens/s": f"{1 / took:,.0f}"}
    memory = torch.cuda.max_memory_allocated(where) / 1e9 if where.type == "cuda" else math.nan
    return row | {"until it runs": f"{ready:.0f} s", "device memory": f"{memory:.2f} GB",
                  "clock, power, C": clock()}


def stall(name: str, device: str) -> dict[str, str]:
    """Measure the cost of a save during training."""
    with tempfile.TemporaryDirectory() as folder:
        run = new_run(SHAPES[name], pick_device(device))
        return checkpoint.measure(name, run, Path(folder), rounds=3)


def capabilities(device: str) -> dict[str, str]:
    """Return versions, kernels, and the rate of one large matrix product."""
    where = pick_device(device)
    dtype, size = pick_dtype("auto", where), 8192 if where.type == "cuda" else 256
    a = torch.randn(size, size, dtype=dtype, device=where)
    q = torch.randn(8, 12, 1024, 64, dtype=dtype, device=where)
    trained = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name
    with disable_cudnn_attention():
        generated = SDPBackend(torch._fused_sdp_choice(q[:, :, -1:], q, q)).name
    for _ in range(3):
        a @ a
    clock = clocks(where)
    took = min(seconds(lambda: [a @ a for _ in range(20)], where) for _ in range(5)) / 20
    return {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version()),
            "matrix product": f"{2 * size**3 / took / 1e12:,.1f} TFLOP/s",
            "attention in training": trained, "in generation": generated,
            "clock, power, C": clock()}


# one process a row


def kill_group(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def ask(call: str, deadline: float, processes: list[subprocess.Popen]) -> dict[str, str]:
    """Make a row by a call of this module, in a process of its own."""
    left = deadline - time.monotonic()
    if left <= 0:
        return {"result": "not started: no time is left"}
    program = ("from keepgpt.process import prepare_process\nprepare_process()\n"
               f"import json\nfrom tools.gpu import *\nprint(json.dumps({call}))")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPO, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    processes.append(process)
    try:
        out, err = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        kill_group(process)
        return {"result": "not finished: no time is left"}
    if process.returncode:
        return {"result": "FAILED: " + (err.strip().splitlines() or ["no output"])[-1]}
    return json.loads(out.splitlines()[-1])


def run_part(part: str, config: GpuConfig) -> Iterator[dict[str, str]]:
    """Yield the rows when they are ready; checks run in parallel, as they wait for compilers."""
    deadline, processes = time.monotonic() + 60 * config.minutes, []
    calls = {name: call for name, call in rows_of(config.device)[part].items()
             if config.only in name}
    with ThreadPoolExecutor(6 if part == "checks" else 1) as pool:
        try:
            asked = {pool.submit(ask, call, deadline, processes): name
                     for name, call in calls.items()}
            for done in as_completed(asked):
                yield {part: asked[done]} | done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                kill_group(process)


def main(config: GpuConfig) -> int:
    """Do the parts; return the exit code."""
    parts, known = config.parts.split(","), rows_of(config.device)
    if set(parts) - known.keys():
        fail(f"--parts={config.parts}: expected names out of {','.join(known)}")
    if config.device != "cpu" and not torch.cuda.is_available():
        fail("no CUDA device found. Try: python -m tools.bench")
    on, failed = machine(pick_device(config.device)), False
    print(on)
    for part in parts:
        for row in report(part, run_part(part, config), on, config.json):
            failed |= row.get("result", "").startswith("FAILED")
    return int(failed)


if __name__ == "__main__":
    CONFIG, _, ARGS = parse(GpuConfig, "python -m tools.gpu [--key=value ...]", sys.argv[1:])
    if ARGS:
        fail(f"{ARGS[0]}: expected --key=value. Try: --help")
    sys.exit(main(CONFIG))
