"""The whole story in a few minutes: prepare, train, pull the plug, go on, sample. Run it as
`python -m tools.demo`.

Shows each command before it runs it. What an earlier demo made is used again; remove out-demo/ to
see it anew.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parent.parent
METRICS = REPO / "out-demo" / "metrics.jsonl"
PULL_THE_PLUG_AT = 1250  # steps, of the 2800 in the config
TRAIN = ["train.py", "config/train_plays_cpu.py", "--out_dir=out-demo",
         "--init_from=auto"]


def say(text: str) -> None:
    """Print in bold where there is a terminal."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def start(words: list[str]) -> subprocess.Popen:
    """Start a script, after showing its command."""
    say(f"$ python {' '.join(words)}")
    return subprocess.Popen([sys.executable, *words], cwd=REPO)


def step() -> int:
    """The last step that the run has logged."""
    rows = METRICS.read_text().splitlines(keepends=True) if METRICS.exists() else []
    return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("\n") else 0


def finish(process: subprocess.Popen) -> None:
    """Wait for a script; the demo ends where it fails."""
    if process.wait():
        sys.exit(process.returncode)


def main() -> None:
    finish(start(["prepare.py", "plays_char"]))
    begun_at, run = step(), start(TRAIN)
    while run.poll() is None and not begun_at < PULL_THE_PLUG_AT <= step():
        time.sleep(0.1)
    if run.poll() is None:
        run.kill()
        run.wait()
        say(f"The plug is pulled: kill -9 at about step {step()}. Nobody had time to save. "
            "The same command again:")
        run = start(TRAIN)
    finish(run)
    finish(start(["sample.py", "--out_dir=out-demo", "--num_samples=2", "--max_new_tokens=400"]))
    say('Your turn: python sample.py --out_dir=out-demo --start="JULIET:"')


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    try:
        main()
    except KeyboardInterrupt:  # the script that runs has had it as well, and saves
        sys.exit(130)
