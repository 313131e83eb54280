"""Show the whole story in a few minutes: prepare, train, kill -9 half-way, resume, sample.

Prints each command of `python -m tools.demo [config/x.py]` before it runs it. What an earlier demo
made is used again; remove its out-demo folder to start from the beginning.
"""

import subprocess
import sys
import time
from pathlib import Path

from keepgpt.config import TrainConfig, parse
from keepgpt.errors import UserError
from tools.common import REPO, NoSettings, last_step, run_tool

# minutes on a CPU
DEFAULT = "config/train_plays_cpu.py"


def start(*args: str) -> subprocess.Popen:
    """Start a script, after showing its command."""
    print(f"\n$ python {' '.join(args)}", flush=True)
    return subprocess.Popen([sys.executable, *args], cwd=REPO)


def finish(process: subprocess.Popen) -> None:
    """Wait for a script; exit with its code if it fails."""
    code = process.wait()
    if code:
        sys.exit(code)


def kill_at(step: int, run: subprocess.Popen, out: Path) -> bool:
    """Kill a run when its log reaches `step`. Return False if the run ends before."""
    while last_step(out) < step:
        if run.poll() is not None:
            return False
        time.sleep(0.1)
    # kill -9: no signal handler can save anything
    run.kill()
    run.wait()
    return True


def main(_config: NoSettings, args: list[str]) -> None:
    """Prepare the config's dataset, train it with a kill in between, and sample from it."""
    # a second argument would be ignored without a word
    if len(args) > 1:
        raise UserError(f"expected one config file, got {' '.join(args)}")
    config_file = args[0] if args else DEFAULT
    settings, *_ = parse(TrainConfig, "", [config_file])

    # the README names the folder of the default
    out = "out-demo"
    if config_file != DEFAULT:
        out += f"-{Path(config_file).stem}"
    train = ["train.py", config_file, f"--out_dir={out}", "--init_from=auto"]

    # the four scripts in the order of the README
    finish(start("prepare.py", settings.dataset))

    # an earlier demo may have passed this step; then the run is not killed again
    half_way = settings.max_iters * 45 // 100
    is_before = last_step(REPO / out) < half_way
    run = start(*train)
    if is_before and kill_at(half_way, run, REPO / out):
        print(
            f"\nkill -9 at about step {last_step(REPO / out)}: there was no time to save. "
            "The same command again:"
        )
        run = start(*train)
    finish(run)

    finish(
        start(
            "sample.py", f"--out_dir={out}", "--num_samples=2", "--max_new_tokens=400"
        )
    )
    print(f'\nYour turn: python sample.py --out_dir={out} --start="JULIET:"')


if __name__ == "__main__":
    run_tool(NoSettings, "python -m tools.demo [config/x.py]", main)
