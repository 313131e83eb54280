"""The log of a run: lines on the terminal, rows in metrics.jsonl, Weights & Biases."""
import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

from keepgpt.process import warn, write_atomically


class Metrics:
    """Log to metrics.jsonl, the terminal and wandb, on rank 0. A resume drops the rows after its
    step, so metrics.jsonl is one clean curve."""

    def __init__(self, out_dir: Path | None, step: int, evaluated: bool) -> None:
        """Continue out_dir's metrics.jsonl after `step`; without a folder, write none. Unless that
        step was `evaluated` before its save, its evaluation is dropped too. Raises OSError."""
        self.wandb, self.file = None, None
        if not out_dir:
            return

        def is_before(line: bytes) -> bool:
            try:
                row = json.loads(line)
                repeated = row["step"] == step and "val_loss" in row and not evaluated
                return line.endswith(b"\n") and row["step"] <= step and not repeated
            except (ValueError, KeyError, TypeError):
                return False

        path = out_dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        write_atomically(path, b"".join(filter(is_before, lines)))
        # the rows since the last successful fsync; the bytes before them are on the disk
        self.rows, self.safe, self.lock = b"", path.stat().st_size, Lock()
        self.file = os.open(path, os.O_WRONLY)

    def start_wandb(self, config: dict[str, Any], run_id: str | None) -> str | None:
        """Also log to Weights & Biases, into the run `run_id` if given. Return the run's id. A
        failure only prints a warning."""
        try:
            import wandb
            self.wandb = wandb.init(project=config["wandb_project"], name=config["wandb_run_name"],
                                    config=config, id=run_id, resume="allow",
                                    settings=wandb.Settings(init_timeout=20))
            return self.wandb.id
        except Exception as e:
            self.say(f"warning: training without wandb: {e}")
            return run_id

    def log(self, row: dict[str, Any], **summary: Any) -> None:
        """Log a row, and `summary` to wandb's summary. If the disk is full, rows are written later;
        no checkpoint is saved before them."""
        if self.file:
            with self.lock:
                self.rows += json.dumps(row).encode() + b"\n"
                try:
                    self._write()
                except OSError as e:
                    self.say(f"warning: metrics.jsonl: {e}; trying again later")
        if self.wandb:
            try:
                self.wandb.log(row, step=row["step"])
                self.wandb.summary.update(summary)
            except Exception as e:
                self.say(f"warning: continuing without wandb: {e}")
                self.wandb = None

    def sync(self) -> None:
        """Fsync the rows, before a checkpoint of their step is written. Raises OSError."""
        with self.lock:
            self._write()
            os.fsync(self.file)
            self.safe, self.rows = self.safe + len(self.rows), b""

    def _write(self) -> None:
        """Write all rows since the last successful fsync, also those written before: after a failed
        one, the kernel may have dropped them. Raises OSError."""
        done = 0
        while done < len(self.rows):
            done += os.pwrite(self.file, self.rows[done:], self.safe + done)

    def close(self) -> None:
        """End the wandb run."""
        if self.wandb:
            self.wandb.finish()

    def say(self, text: str) -> None:
        """Print a line."""
        try:
            print(text, flush=True)
        except OSError as e:  # the reader has left, as `| head` does, or a log's disk is full
            if not isinstance(e, BrokenPipeError):
                warn(f"stdout: {e}; continuing with metrics.jsonl only")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
