"""What a run says: lines on the terminal, rows in metrics.jsonl, and Weights & Biases if asked."""
import json
import os
import sys
from pathlib import Path
from typing import Any


class Metrics:
    """The run's log, on rank 0. After a resume it is one clean curve: rows past the resumed step
    are dropped."""

    def __init__(self, out_dir: Path | None, step: int) -> None:
        """Go on after `step` in out_dir's metrics.jsonl; without a folder nothing is kept."""
        self.live = False  # the cursor stands at the end of a line that the next one replaces
        self.wandb = None
        self.file = open(os.devnull, "w")
        if out_dir is None:
            return
        path = out_dir / "metrics.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        with open(path.with_suffix(".tmp"), "w", encoding="utf-8") as file:
            file.writelines(f"{row}\n" for row in rows if _step_of(row) <= step)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".tmp"), path)
        self.file = open(path, "a", encoding="utf-8")

    def start_wandb(self, config: dict[str, Any], run_id: str | None) -> str | None:
        """Log to Weights & Biases as well, into the run `run_id` if there is one, and return the
        run's id.

        A failure there stops nothing.
        """
        try:
            import wandb
            self.wandb = wandb.init(project=config["wandb_project"], name=config["wandb_run_name"],
                                    config=config, id=run_id, resume="allow")
            return self.wandb.id
        except Exception as e:
            self.say(f"wandb is off for this run: {e}")
            return run_id

    def log(self, row: dict[str, Any]) -> None:
        """Add a row; floats are written so that they read back as the same bits."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb:
            try:
                self.wandb.log(row, step=row["step"])
            except Exception as e:
                self.say(f"wandb is off from here on: {e}")
                self.wandb = None

    def sync(self) -> None:
        """Make the rows so far survive a power cut: before the bundle that counts on them."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """The run has ended."""
        self.file.close()
        if self.wandb:
            self.wandb.finish()

    def say_progress(self, row: dict[str, Any], max_iters: int, seconds_left: float) -> None:
        """The line of a logged step."""
        minutes, seconds = divmod(round(seconds_left), 60)
        self.say(f"step {row['step']}/{max_iters}: loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
                 f"{row['tokens_per_s']:,.0f} tokens/s"
                 + (f", MFU {row['mfu']:.1%}" if "mfu" in row else "")
                 + f", {minutes // 60}:{minutes % 60:02}:{seconds:02} left", live=True)

    def say(self, text: str, live: bool = False) -> None:
        """Print a line; on a terminal, the next one takes the place of a `live` one."""
        tty = sys.stdout.isatty()
        print("\r\033[K" * (tty and self.live) + text, end="" if live and tty else "\n", flush=True)
        self.live = live


def _step_of(row: str) -> float:
    """The step of a row of metrics.jsonl; a row that a crash cut short lies past every step."""
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
