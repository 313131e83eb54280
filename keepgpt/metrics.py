"""What a run says: lines on the terminal, rows in metrics.jsonl, and Weights & Biases if asked."""
import json
import os
import shutil
import sys
from pathlib import Path
from threading import Lock
from typing import Any

from keepgpt.checkpoint import Disk
from keepgpt.process import describe, fail, warn


class Metrics:
    """The run's log, on rank 0. After a resume it is one clean curve: rows past the resumed step
    are dropped."""

    def __init__(self, out_dir: Path | None, step: int, evaluated: bool,
                 disk: Disk | None = None, quiet: bool = False) -> None:
        """Go on after `step` in out_dir's metrics.jsonl; without a folder nothing is kept.

        Unless that step was `evaluated` when it was saved, the run will do that again. A `quiet`
        one, of another rank than the first, prints nothing.
        """
        self.live = False  # the cursor stands at the end of a line that the next one replaces
        self.wandb, self.quiet = None, quiet
        # rows since the last fsync that succeeded, how many bytes of them are in the file, and how
        # many bytes before them are on the disk for sure
        self.lock, self.rows, self.written, self.safe = Lock(), b"", 0, 0
        self.path, self.disk, self.suspect = None, disk or Disk(), False
        self.file = os.open(os.devnull, os.O_WRONLY)
        if out_dir is None:
            return
        self.path = out_dir / "metrics.jsonl"
        try:
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            self._renew(b"".join(line for line in lines if _is_before(line, step, evaluated)))
        except OSError as e:
            reason, code = describe(e)
            fail(f"{self.path} can't be written: {reason}", code)

    def _renew(self, content: bytes) -> None:
        """Put a new file with that content, durably, in the place of the old one, and go on with
        it. Raises OSError; the old one is then as it was."""
        temporary = self.path.with_suffix(".tmp")
        try:
            file = self.disk.create(temporary)
            try:
                while content:
                    content = content[self.disk.write(file, memoryview(content)):]
                self.disk.fsync(file)
                self.disk.rename(temporary, self.path)
                self.disk.fsync_folder(self.path.parent)
            except BaseException:
                self.disk.close(file)
                raise
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        os.close(self.file)
        self.file, self.rows, self.written, self.suspect = file, b"", 0, False
        self.safe = os.fstat(file).st_size

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

    def log(self, row: dict[str, Any], **summary: Any) -> None:
        """Add a row; floats are written so that they read back as the same bits. The `summary` is
        of the whole run, for wandb.

        A disk that takes no more stops nothing: the rows wait, and no bundle is saved before them.
        """
        if self.path:
            with self.lock:
                self.rows += json.dumps(row).encode() + b"\n"
                try:
                    self._write()
                except OSError as e:
                    self.say(f"metrics.jsonl: {e.strerror.lower()}; its rows wait")
        if self.wandb:
            try:
                self.wandb.log(row, step=row["step"])
                self.wandb.summary.update(summary)
            except Exception as e:
                self.say(f"wandb is off from here on: {e}")
                self.wandb = None

    def sync(self) -> None:
        """Make the rows so far survive a power cut, before the bundle that counts on them.

        Raises OSError if the disk does not take them. After a failed fsync the kernel calls pages
        clean that are not on the disk: the next sync writes another file, and the lost part again.
        """
        with self.lock:
            if self.suspect:
                with open(self.path, "rb") as old:
                    return self._renew(old.read(self.safe) + self.rows)
            self._write()
            try:
                self.disk.fsync(self.file)
            except OSError:
                self.suspect = True
                raise
            self.safe, self.rows, self.written = self.safe + len(self.rows), b"", 0

    def _write(self) -> None:
        while self.written < len(self.rows):
            self.written += self.disk.write(self.file, memoryview(self.rows)[self.written:])

    def close(self) -> None:
        """The run has ended."""
        os.close(self.file)
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
        if self.quiet:
            return
        tty = sys.stdout.isatty()
        if live and tty:  # a line that wraps could not be replaced
            text = text[:shutil.get_terminal_size().columns - 1]
        try:
            print("\r\033[K" * (tty and self.live) + text, end="" if live and tty else "\n",
                  flush=True)
        except OSError as e:  # `| head` has seen enough, or a log's disk is full: train on
            if not isinstance(e, BrokenPipeError):
                warn(f"stdout: {describe(e)[0]}; nothing more is printed, metrics.jsonl continues")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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



