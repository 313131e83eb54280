"""What a run says: lines on the terminal, rows in metrics.jsonl, and Weights & Biases if asked."""
import json
import os
import shutil
import sys
from pathlib import Path
from threading import Lock
from typing import Any

from checkpoint import Disk
from configurator import fail


class Metrics:
    """The run's log, on rank 0. After a resume it is one clean curve: rows past the resumed step
    are dropped."""

    def __init__(self, out_dir: Path | None, step: int, evaluated: bool) -> None:
        """Go on after `step` in out_dir's metrics.jsonl; without a folder nothing is kept.

        Unless that step was `evaluated` when it was saved, the run will do that again.
        """
        self.live = False  # the cursor stands at the end of a line that the next one replaces
        self.wandb = None
        self.lock, self.waiting = Lock(), b""  # rows, or the rest of one, not written yet
        self.file = open(os.devnull, "wb", buffering=0)
        if out_dir is None:
            return
        path, temporary = out_dir / "metrics.jsonl", out_dir / "metrics.tmp"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _is_before(line, step, evaluated)]
        try:
            if kept != lines:
                with open(temporary, "wb") as file:
                    file.writelines(kept)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            self.file = open(path, "ab", buffering=0)
            Disk().fsync_folder(out_dir)  # before a bundle relies on it
        except OSError as e:
            temporary.unlink(missing_ok=True)
            fail(f"{path} can't be written: {e.strerror.lower()}")

    def start_wandb(self, config: dict[str, Any], run_id: str | None) -> str | None:
        """Log to Weights & Biases as well, into the run `run_id` if there is one, and return the
        run's id.

        A failure there stops nothing.
        """
        try:
            import wandb
            self.wandb = wandb.init(project=config["wandb_project"], name=config["wandb_run_name"],
                                    config=config, id=run_id, resume="allow",
                                    settings=wandb.Settings(init_timeout=20))
            return self.wandb.id
        except Exception as e:
            self.say(f"wandb is off for this run: {e}")
            return run_id

    def log(self, row: dict[str, Any]) -> None:
        """Add a row; floats are written so that they read back as the same bits.

        A disk that takes no more stops nothing: the rows wait, and no bundle is saved before them.
        """
        with self.lock:
            self.waiting += json.dumps(row).encode() + b"\n"
            try:
                self._write()
            except OSError as e:
                self.say(f"metrics.jsonl: {e.strerror.lower()}; its rows wait")
        if self.wandb:
            try:
                self.wandb.log(row, step=row["step"])
            except Exception as e:
                self.say(f"wandb is off from here on: {e}")
                self.wandb = None

    def sync(self) -> None:
        """Make the rows so far survive a power cut, before the bundle that counts on them.

        Raises OSError if the disk does not take them.
        """
        with self.lock:
            self._write()
            os.fsync(self.file.fileno())

    def _write(self) -> None:
        while self.waiting:
            self.waiting = self.waiting[self.file.write(self.waiting):]

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
        if live and tty:  # a line that wraps could not be replaced
            text = text[:shutil.get_terminal_size().columns - 1]
        print("\r\033[K" * (tty and self.live) + text, end="" if live and tty else "\n", flush=True)
        self.live = live


def _is_before(line: bytes, step: int, evaluated: bool) -> bool:
    """Whether a line of metrics.jsonl is of the run as it was saved at `step`. One that a crash
    has cut short is not."""
    try:
        row = json.loads(line)
        repeated = row["step"] == step and "val_loss" in row and not evaluated
        return line.endswith(b"\n") and row["step"] <= step and not repeated
    except (ValueError, KeyError, TypeError):
        return False
