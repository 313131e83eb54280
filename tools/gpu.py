"""All that needs a GPU in one go, in less than ten minutes: `python -m tools.gpu`.

First whether an interrupted run ends in the bits of an undisturbed one under CUDA, whether sums
over ranks round alike, and whether recorded steps generate the tokens of plain ones; then the
benchmarks, the most wanted first: what the time does not suffice for is named. Prints as it goes;
needs no network, and Transformers only for the peers' columns.
"""
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import fail, knob, parse
from model import GPT, ModelArgs, generate
from runtime import be_deterministic
from tools.crash.common import REPO, ends, prepare
from train import sum_as_tree

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 8,
        "gradient_accumulation_steps": 2, "dropout": 0.1, "learning_rate": 3e-3, "warmup_iters": 4,
        "lr_decay_iters": 40, "max_iters": 40, "eval_interval": 20, "eval_iters": 3,
        "log_interval": 5, "sample_tokens": 10, "init_from": "auto", "device": "cuda"}
CASES = ({"dtype": "bfloat16", "compile": True}, {"dtype": "bfloat16", "compile": False},
         {"dtype": "float16", "compile": False}, {"dtype": "float32", "compile": False})
BENCHMARKS = (["train", "--only=GPT-2 124M, batch 32"], ["ways"], ["sample"],
              ["checkpoint", "--only=GPT-2 124M"], ["train", "--only=GPT-2 124M, batch 64"],
              ["train", "--only=GPT-2 124M, batch 16"], ["train", "--only=6 layers, dropout 0.2"],
              ["memory"], ["loader"])


@dataclass(frozen=True)
class GpuConfig:
    """The settings."""
    json: str = knob("", "append the benchmarks' rows to this file")
    minutes: float = knob(9.5, "begin nothing after so many, and end what is under way", least=0)


def train(out: Path, **flags: object) -> None:
    """Run train.py to its end. Raises RuntimeError with its last words."""
    words = [f"--{key}={value}" for key, value in (TINY | flags | {"out_dir": out}).items()]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=REPO, capture_output=True,
                          text=True, timeout=240)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-500:]}"
                           f"{done.stderr[-1500:]}")


def exactness() -> None:
    """40 steps, and 20 and 20 more, with and without deterministic=True; all cases side by side,
    for these runs wait for their compiler."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as pool:
        place = Path(name)
        dataset = prepare(place)
        cases = [case | {"deterministic": repeats} for case in CASES for repeats in (True, False)]

        def verdict(i: int) -> str:
            whole, parts = place / f"whole{i}", place / f"parts{i}"
            flags = cases[i] | {"dataset": dataset}
            try:
                train(whole, **flags)
                train(parts, **flags | {"max_iters": 20})
                train(parts, **flags)
                return "same bits" if ends(whole) == ends(parts) else "OTHER BITS"
            except (OSError, RuntimeError, subprocess.TimeoutExpired) as e:
                return f"FAILED: {e}"

        for case, found in zip(cases, pool.map(verdict, range(len(cases)))):
            print(json.dumps(case), found, flush=True)


def branches(device: str = "cuda") -> None:
    """The gradient of 8 micro-batches as elastic=True sums it up, on one rank and as 2 and 4
    would, one after the other."""
    be_deterministic()
    torch.manual_seed(0)
    model = GPT(ModelArgs(4, 4, 256, 64, 512, bias=False, dropout=0.1)).to(device)
    x, y = torch.randint(512, (2, 8, 4, 64), device=device)

    def add_gradient(m: int) -> None:
        torch.manual_seed(m)
        with torch.autocast(device, torch.bfloat16):
            loss = model(x[m], y[m])
        loss.backward()

    def over(ranks: int) -> list[torch.Tensor]:
        share = 8 // ranks
        parts = [sum_as_tree(model, add_gradient, first, first + share)
                 for first in range(0, 8, share)]
        while len(parts) > 1:  # what the exchanges do
            parts = [[a + b for a, b in zip(*pair)] for pair in zip(parts[::2], parts[1::2])]
        return parts[0]

    sums = [over(ranks) for ranks in (1, 2, 4)]
    same = all(torch.equal(a, b) for other in sums[1:] for a, b in zip(sums[0], other))
    print("micro-batches as a tree, in 1, 2, 4 branches:", "same bits" if same else "OTHER BITS",
          flush=True)
    torch.use_deterministic_algorithms(False)


def recorded_steps() -> None:
    """The likeliest tokens of a random model, by recorded steps and by plain ones."""
    torch.manual_seed(0)
    args = ModelArgs(4, 4, 256, 64, 512, bias=True, dropout=0.0)
    model = GPT(args).cuda().eval()
    made = [list(generate(model, [[1, 2, 3], [4]], 200, temperature=0, record=record))
            for record in (True, False)]
    print("generation by recorded steps:", "same tokens" if made[0] == made[1] else "OTHER TOKENS",
          flush=True)


def main(config: GpuConfig) -> None:
    """All of it."""
    begun = time.perf_counter()
    for check in (branches, recorded_steps, exactness):  # cuBLAS is told once, at its start
        try:
            check()
        except Exception as e:  # the others are still worth their time
            print(f"{check.__name__} FAILED: {type(e).__name__}: {e}", flush=True)
    for words in BENCHMARKS:
        left = 60 * config.minutes - (time.perf_counter() - begun)
        try:
            subprocess.run([sys.executable, "-m", "tools.bench", *words, "--rounds=3",
                            f"--json={config.json}"], cwd=REPO, timeout=max(0, left))
        except subprocess.TimeoutExpired:
            print("no time is left for:", *words)
        print(f"({time.perf_counter() - begun:.0f} s)", flush=True)


if __name__ == "__main__":
    CONFIG, _, WORDS = parse(GpuConfig, "python -m tools.gpu [--key=value ...]", sys.argv[1:])
    if WORDS:
        fail(f"{WORDS[0]}: a flag is written --key=value; --help lists the keys")
    if not torch.cuda.is_available():
        fail("there is no CUDA device here; the CPU's benchmarks are python -m tools.bench")
    main(CONFIG)
