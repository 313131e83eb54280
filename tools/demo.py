"""Show the whole story in a few minutes: prepare, train, kill -9 half-way, resume, sample.

usage: python -m tools.demo [config/x.py]      # or: make demo CONFIG=config/x.py

Prints each command before it runs it. What an earlier demo made is used again; remove its out-demo
folder to start from the beginning.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

from keepgpt.config import TrainConfig, parse
from keepgpt.process import UserError, exit_with

REPO = Path(__file__).parent.parent
DEFAULT = "config/train_plays_cpu.py"


def say(text: str) -> None:
    """Print in bold where there is a terminal."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def start(*args: str) -> subprocess.Popen:
    """Start a script, after showing its command."""
    say(f"$ python {' '.join(args)}")
    return subprocess.Popen([sys.executable, *args], cwd=REPO)


def finish(process: subprocess.Popen) -> None:
    """Wait for a script; exit with its code if it fails."""
    if code := process.wait():
        sys.exit(code)


def read_step(out_dir: str) -> int:
    """Return the last step that the run has logged."""
    path = REPO / out_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def main(config_file: str) -> None:
    """Prepare the config's dataset, train it with a kill in between, and sample from it."""
    settings = parse(TrainConfig, "", [config_file])[0]
    # the default's folder is named in the README
    out = "out-demo" if config_file == DEFAULT else f"out-demo-{Path(config_file).stem}"
    kill_at = settings.max_iters * 45 // 100
    train = ["train.py", config_file, f"--out_dir={out}", "--init_from=auto"]
    finish(start("prepare.py", settings.dataset))
    first, run = read_step(out), start(*train)
    while run.poll() is None and not first < kill_at <= read_step(out):
        time.sleep(0.1)
    if run.poll() is None:
        run.kill()
        run.wait()
        say(f"kill -9 at about step {read_step(out)}: there was no time to save. "
            "The same command again:")
        run = start(*train)
    finish(run)
    finish(start("sample.py", f"--out_dir={out}", "--num_samples=2", "--max_new_tokens=400"))
    say(f'Your turn: python sample.py --out_dir={out} --start="JULIET:"')


if __name__ == "__main__":
    ARGS = sys.argv[1:] or [DEFAULT]
    if ARGS[0] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0)
    if len(ARGS) > 1 or ARGS[0].startswith("-"):
        exit_with(UserError(f"expected one config file, got {' '.join(ARGS)}. "
                            f"Try: python -m tools.demo {DEFAULT}"))
    try:
        main(ARGS[0])
    except KeyboardInterrupt:  # the running script has received it too, and saves
        sys.exit(130)
