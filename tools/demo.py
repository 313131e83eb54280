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

DEFAULT = "config/train_plays_cpu.py"


def start(*args: str) -> subprocess.Popen:
    """Start a script, after showing its command."""
    print(f"\n$ python {' '.join(args)}", flush=True)
    return subprocess.Popen([sys.executable, *args], cwd=REPO)


def finish(process: subprocess.Popen) -> None:
    """Wait for a script; exit with its code if it fails."""
    if code := process.wait():
        sys.exit(code)


def main(_config: NoSettings, args: list[str]) -> None:
    """Prepare the config's dataset, train it with a kill in between, and sample from it."""
    if len(args) > 1:
        raise UserError(f"expected one config file, got {' '.join(args)}")
    config_file = args[0] if args else DEFAULT
    settings = parse(TrainConfig, "", [config_file])[0]
    # the default's folder is named in the README
    out = "out-demo" if config_file == DEFAULT else f"out-demo-{Path(config_file).stem}"
    kill_at = settings.max_iters * 45 // 100
    train = ["train.py", config_file, f"--out_dir={out}", "--init_from=auto"]
    finish(start("prepare.py", settings.dataset))
    first, run = last_step(REPO / out), start(*train)
    while run.poll() is None and not first < kill_at <= last_step(REPO / out):
        time.sleep(0.1)
    if run.poll() is None:
        run.kill()
        run.wait()
        print(f"\nkill -9 at about step {last_step(REPO / out)}: there was no time to save. "
              "The same command again:")
        run = start(*train)
    finish(run)
    finish(start("sample.py", f"--out_dir={out}", "--num_samples=2", "--max_new_tokens=400"))
    print(f'\nYour turn: python sample.py --out_dir={out} --start="JULIET:"')


if __name__ == "__main__":
    run_tool(NoSettings, "python -m tools.demo [config/x.py]", main)
