"""The log of a run: lines on the terminal, rows in metrics.jsonl, Weights & Biases."""
import json
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Any

from keepgpt.errors import name_path, warn
from keepgpt.files import FolderLock, FolderLost, check_lock, write_atomically


class Metrics:
    """Log to metrics.jsonl, the terminal and wandb, on rank 0. A resume drops the rows after its
    step, so metrics.jsonl is one clean curve."""

    def __init__(self, out_dir: Path | None, step: int, evaluated: bool,
                 quiet: bool = False, folder_lock: FolderLock | None = None) -> None:
        """Continue out_dir's metrics.jsonl after `step`; without a folder, write none. Unless that
        step was `evaluated` before its save, its evaluation is dropped too. With `quiet`, on other
        ranks than the first, print nothing. `folder_lock` is checked before rows are written.
        Raises OSError and FolderLost."""
        self.folder_lock = folder_lock
        self.live = False  # the cursor is at the end of a line that the next one replaces
        self.wandb, self.file, self.quiet = None, None, quiet
        if not out_dir:
            return

        def is_before(line: bytes) -> bool:
            try:
                row = json.loads(line)
                repeated = row["step"] == step and "val_loss" in row and not evaluated
                return line.endswith(b"\n") and row["step"] <= step and not repeated
            except (ValueError, KeyError, TypeError):
                return False

        self.path = path = out_dir / "metrics.jsonl"
        with name_path(path):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        write_atomically(path, b"".join(filter(is_before, lines)), folder_lock)
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
        if self.file is not None:
            with self.lock:
                self.rows += json.dumps(row).encode() + b"\n"
                try:
                    self._write()
                except OSError as e:
                    self.say(f"warning: {e}; trying again later")
                except FolderLost:
                    pass  # this ends the run before its next step
        if self.wandb:
            try:
                self.wandb.log(row, step=row["step"])
                self.wandb.summary.update(summary)
            except Exception as e:
                self.say(f"warning: continuing without wandb: {e}")
                self.wandb = None

    def log_evaluation(self, evaluation: dict[str, Any], best: bool, best_val_loss: float) -> None:
        """Log the losses of an evaluation, the `best` so far or not."""
        self.log(evaluation, best_val_loss=best_val_loss)
        self.say(f"step {evaluation['step']}: train loss {evaluation['train_loss']:.4f}, "
                 f"val loss {evaluation['val_loss']:.4f}" + (", the best so far" if best else ""))

    def log_step(self, row: dict[str, Any], max_iters: int, step_seconds: float) -> None:
        """Log a training step; on the terminal also the time left until max_iters."""
        self.log(row)
        left = timedelta(seconds=round((max_iters - row["step"]) * step_seconds))
        self.say(f"step {row['step']}/{max_iters}: loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
                 f"{row['tokens_per_s']:,.0f} tokens/s"
                 + (f", MFU {row['mfu']:.1%}" if "mfu" in row else "")
                 + f", {left} left", live=True)

    def sync(self) -> None:
        """Fsync the rows, before a checkpoint of their step is written. Raises OSError and
        FolderLost."""
        with self.lock:
            self._write()
            with name_path(self.path):
                os.fsync(self.file)
            self.safe, self.rows = self.safe + len(self.rows), b""

    def _write(self) -> None:
        """Write all rows since the last successful fsync, also those written before: after a failed
        one, the kernel may have dropped them. Raises OSError and FolderLost."""
        check_lock(self.folder_lock)
        with name_path(self.path):
            self._reopen_if_replaced()
            done = 0
            while done < len(self.rows):
                done += os.pwrite(self.file, self.rows[done:], self.safe + done)

    def _reopen_if_replaced(self) -> None:
        """Continue the file that is at the path of metrics.jsonl, if that is not the opened one, as
        after a removal or an editor's save, or if it was cut. Raises OSError."""
        opened = os.fstat(self.file)
        same = self.path.exists() and os.path.samestat(opened, self.path.stat())
        if same and opened.st_size >= self.safe:
            return
        content = self.path.read_bytes() if self.path.exists() else b""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        os.close(self.file)
        # keep the rows that it lacks, on lines of their own
        lines = content.splitlines()
        rows = [row for row in self.rows.splitlines() if row not in lines]
        first = b"\n" if content and not content.endswith(b"\n") else b""
        self.file, self.safe = file, len(content)
        self.rows = first + b"".join(row + b"\n" for row in rows)
        warn(f"{self.path} was replaced, cut or removed; the next rows go to the file of that name")

    def close(self) -> None:
        """End the wandb run."""
        if self.wandb:
            self.wandb.finish()

    def say(self, text: str, live: bool = False) -> None:
        """Print a line. On a terminal, the next line replaces a `live` one."""
        if self.quiet:
            return
        live &= sys.stdout.isatty()
        if live:  # a wrapped line could not be replaced
            text = text[:shutil.get_terminal_size().columns - 1]
        try:
            print("\r\033[K" + text if self.live else text, end="" if live else "\n", flush=True)
        except OSError as e:  # the reader has left, as `| head` does, or a log's disk is full
            if not isinstance(e, BrokenPipeError):
                warn(f"stdout: {e}; continuing with metrics.jsonl only")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        self.live = live
