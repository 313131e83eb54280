"""The log of a run: lines on the terminal, rows in metrics.jsonl, Weights & Biases, throughput."""
import json
import os
import shutil
import sys
import time
from pathlib import Path
from threading import Lock
from typing import Any

from keepgpt.process import UserError, describe, warn, write_atomically


class Throughput:
    """Measure the training speed between two logged steps, without evaluations."""

    def __init__(self, tokens_per_step: int, flops_per_token: int, peak: float | None) -> None:
        """Take the peak of all devices together in FLOP/s, None if it is not known."""
        self.tokens_per_step, self.flops_per_token, self.peak = (
            tokens_per_step, flops_per_token, peak)

    def restart(self, step: int) -> None:
        """Restart the clock at this step."""
        self.step, self.clock = step, time.perf_counter()

    def measure(self, step: int) -> dict[str, float]:
        """Return tokens_per_s since the last call and, if the peak is known, mfu: the model FLOPs
        utilization (Chowdhery et al. 2022, appendix B)."""
        seconds = (time.perf_counter() - self.clock) / (step - self.step)
        self.restart(step)
        speed = {"tokens_per_s": self.tokens_per_step / seconds}
        if self.peak:
            speed["mfu"] = self.flops_per_token * speed["tokens_per_s"] / self.peak
        return speed


class Metrics:
    """Log to metrics.jsonl, the terminal and wandb, on rank 0. A resume drops the rows after its
    step, so metrics.jsonl is one clean curve."""

    def __init__(self, out_dir: Path | None, step: int, evaluated: bool,
                 quiet: bool = False) -> None:
        """Continue out_dir's metrics.jsonl after `step`; without a folder, write none.

        Unless that step was `evaluated` before its save, its evaluation is dropped too. With
        `quiet`, on other ranks than the first, print nothing. Raises UserError.
        """
        self.live = False  # the cursor is at the end of a line that the next one replaces
        self.wandb, self.quiet, self.path = None, quiet, None
        # rows since the last successful fsync, how many bytes of them are in the file, and the
        # bytes before them, which are on the disk
        self.lock, self.rows, self.written, self.safe = Lock(), b"", 0, 0
        self.suspect = False  # an fsync has failed
        self.file = os.open(os.devnull, os.O_WRONLY)
        if out_dir is None:
            return
        self.path = out_dir / "metrics.jsonl"
        try:
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            self._replace(b"".join(line for line in lines if _is_before(line, step, evaluated)))
        except OSError as e:
            reason, code = describe(e)
            raise UserError(f"{self.path}: {reason}", code) from None

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
        """Log a row, and `summary` to wandb's summary. If the disk is full, rows are buffered and
        written later; no checkpoint is saved before them."""
        if self.path:
            with self.lock:
                self.rows += json.dumps(row).encode() + b"\n"
                try:
                    self._write()
                except OSError as e:
                    self.say(f"warning: metrics.jsonl: {describe(e)[0]}; buffering rows and "
                             "retrying")
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

    def log_step(self, row: dict[str, Any], max_iters: int, tokens_per_step: int) -> None:
        """Log a training step; on the terminal also the time left until max_iters."""
        self.log(row)
        left = (max_iters - row["step"]) * tokens_per_step / row["tokens_per_s"]
        minutes, seconds = divmod(round(left), 60)
        self.say(f"step {row['step']}/{max_iters}: loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
                 f"{row['tokens_per_s']:,.0f} tokens/s"
                 + (f", MFU {row['mfu']:.1%}" if "mfu" in row else "")
                 + f", {minutes // 60}:{minutes % 60:02}:{seconds:02} left", live=True)

    def sync(self) -> None:
        """Fsync the rows, before a checkpoint of their step is written. Raises OSError.

        After a failed fsync the kernel may treat unwritten pages as clean, so the next call writes
        a new file.
        """
        with self.lock:
            if self.suspect:
                self._replace(self.path.read_bytes()[:self.safe] + self.rows)
                return
            self._write()
            try:
                os.fsync(self.file)
            except OSError:
                self.suspect = True
                raise
            self.safe, self.rows, self.written = self.safe + len(self.rows), b"", 0

    def _replace(self, content: bytes) -> None:
        """Replace the file and append to the new one. Raises OSError."""
        write_atomically(self.path, content)
        os.close(self.file)
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.rows, self.written, self.safe, self.suspect = b"", 0, len(content), False

    def _write(self) -> None:
        """Append the buffered rows. Raises OSError."""
        while self.written < len(self.rows):
            self.written += os.write(self.file, memoryview(self.rows)[self.written:])

    def close(self) -> None:
        """Close the file and end the wandb run."""
        os.close(self.file)
        if self.wandb:
            self.wandb.finish()

    def say(self, text: str, live: bool = False) -> None:
        """Print a line. On a terminal, the next line replaces a `live` one."""
        if self.quiet:
            return
        tty = sys.stdout.isatty()
        if live and tty:  # a wrapped line could not be replaced
            text = text[:shutil.get_terminal_size().columns - 1]
        try:
            print("\r\033[K" * (tty and self.live) + text, end="" if live and tty else "\n",
                  flush=True)
        except OSError as e:  # the reader has left, as `| head` does, or a log's disk is full
            if not isinstance(e, BrokenPipeError):
                warn(f"stdout: {describe(e)[0]}; continuing with metrics.jsonl only")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self.live = live


def _is_before(line: bytes, step: int, evaluated: bool) -> bool:
    """Return True if a line of metrics.jsonl is complete and belongs to the run up to `step`."""
    try:
        row = json.loads(line)
        repeated = row["step"] == step and "val_loss" in row and not evaluated
        return line.endswith(b"\n") and row["step"] <= step and not repeated
    except (ValueError, KeyError, TypeError):
        return False
