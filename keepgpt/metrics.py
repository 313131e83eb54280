"""The log of a run: lines on the terminal, rows in metrics.jsonl, Weights & Biases."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from keepgpt.errors import (
    EXIT_FAILED,
    Stopped,
    end_process,
    import_package,
    in_notebook,
    name_path,
    one_line,
    say,
    warn,
)
from keepgpt.evaluation import describe_evaluation
from keepgpt.files import FolderLock, FolderLost, check_lock, write_atomically

# for wandb to send the rest; torchrun and Slurm kill 30 seconds after a signal
CLOSE_SECONDS = 10


def init_wandb(config: dict, run_id: str | None, mode: str | None = None) -> Any:
    """Return a run of Weights & Biases, the one called `run_id` unless that is None. Raises
    UserError, and what wandb raises."""
    wandb = import_package("wandb")
    terminal = sys.stdin
    # without a stdin that is empty, a menu waits for someone to log in
    with open(os.devnull) as nobody:
        sys.stdin = nobody
        try:
            return wandb.init(
                project=config["wandb_project"],
                name=config["wandb_run_name"],
                config=config,
                id=run_id,
                resume="allow",
                mode=mode,
                settings=wandb.Settings(init_timeout=20),
            )
        finally:
            sys.stdin = terminal


class Wandb:
    """Log to a run of Weights & Biases in a thread: a call that hangs or fails holds up nothing."""

    def __init__(self, run: Any, say: Callable[[str], None]) -> None:
        """Start the thread. `say` prints a line."""
        self.run = run
        self.say = say
        # a resume repeats rows, which wandb would refuse one by one
        self.first_step = run.starting_step
        self.sync = f"Try: wandb sync {Path(run.dir).parent}"
        # of rows, each with a summary; None at the end
        self.queue = SimpleQueue()
        self.ended = Event()
        # True once wandb has everything
        self.sent = False
        Thread(target=self._send, daemon=True).start()

    def log(self, row: dict, summary: dict) -> None:
        """Send a row unless wandb has it already, and update the run's summary."""
        if row["step"] >= self.first_step and not self.ended.is_set():
            self.queue.put((row, summary))

    def _send(self) -> None:
        """Send the rows and finish the run, in the thread. The first failure is the last."""
        try:
            for row, summary in iter(self.queue.get, None):
                self.run.log(row, step=row["step"])
                self.run.summary.update(summary)
            self.run.finish()
            self.sent = True
        # SystemExit too: some libraries raise it
        except BaseException as e:
            self.say(f"warning: continuing without wandb: {one_line(e)}. {self.sync}")
        self.ended.set()

    def close(self) -> bool:
        """Finish the run. Return True unless that fails, takes too long, or a signal comes."""
        self.queue.put(None)
        try:
            self.ended.wait(CLOSE_SECONDS)
        # also after Stopped, which a signal raises
        finally:
            if not self.ended.is_set():
                self.say(f"warning: wandb has not sent everything. {self.sync}")
        return self.sent


def is_before(line: bytes, step: int, evaluated: bool) -> bool:
    """Return True for a complete row that a resume at `step` does not repeat: it evaluates that
    step again, unless it was `evaluated`."""
    # a crash leaves a part of a row, and an editor anything
    try:
        row = json.loads(line)
        repeated = row["step"] == step and "val_loss" in row and not evaluated
        return line.endswith(b"\n") and row["step"] <= step and not repeated
    except (ValueError, KeyError, TypeError):
        return False


class Metrics:
    """Log to metrics.jsonl, the terminal and wandb, on rank 0. A resume drops the rows after its
    step, so metrics.jsonl is one clean curve."""

    def __init__(
        self,
        out_dir: Path | None,
        step: int,
        evaluated: bool,
        quiet: bool = False,
        folder_lock: FolderLock | None = None,
    ) -> None:
        """Continue out_dir's metrics.jsonl after `step`; without a folder, write none. Unless that
        step was `evaluated` before its save, its evaluation is dropped too. With `quiet`, on other
        ranks than the first, print nothing. `folder_lock` is checked before rows are written.
        Raises OSError and FolderLost."""
        self.folder_lock = folder_lock
        self.step = step
        self.quiet = quiet
        # True while the next line replaces the one with the cursor
        self.live = False
        # names of what failed; each is printed once
        self.failures = set()
        self.wandb = None
        # True while the interpreter's end would wait for wandb
        self.may_hang = False
        self.file = None
        if not out_dir:
            return

        self.path = out_dir / "metrics.jsonl"
        lines = []
        with name_path(self.path):
            if self.path.exists():
                lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if is_before(line, step, evaluated)]
        write_atomically(self.path, b"".join(kept), folder_lock)
        # the rows since the last successful fsync; the bytes before them are on the disk
        self.rows = b""
        self.safe = self.path.stat().st_size
        # training logs while a save calls `sync` in its thread
        self.lock = Lock()
        self.file = os.open(self.path, os.O_WRONLY)

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """Return what `work` returns, or None if it fails: what only decorates a run must not end
        it. The first failure of `what` prints a warning."""
        try:
            return work()
        except Stopped:
            raise
        # a panic of compiled code is not an Exception
        except BaseException as e:
            if what not in self.failures:
                self.say(f"warning: {what}: {one_line(e)}")
            self.failures.add(what)

    def start_wandb(self, config: dict, run_id: str | None) -> str | None:
        """Also log to Weights & Biases, into the run `run_id` unless that is None; offline if its
        server or an account is missing. Return the run's id. A failure only prints a warning."""
        self.may_hang = True
        run = self.attempt("wandb logs offline", lambda: init_wandb(config, run_id))
        if run:
            self.may_hang = False
        else:
            run = self.attempt(
                "training without wandb", lambda: init_wandb(config, run_id, "offline")
            )
        if not run:
            return run_id
        self.wandb = Wandb(run, self.say)
        # to send the log later
        if self.may_hang:
            self.say(self.wandb.sync)
        # the run went on there after the checkpoint that this one resumes from
        first = self.wandb.first_step
        if first > self.step + 1:
            self.say(f"wandb has the rows before step {first}; sending later ones")
        return run.id

    def log(self, row: dict, **summary: Any) -> None:
        """Log a row, and `summary` to wandb's summary. If the disk is full, rows are written later;
        no checkpoint is saved before them."""
        if self.file is not None:
            with self.lock:
                self.rows += json.dumps(row).encode() + b"\n"
                # at once, for whoever watches the file; fsync waits for a save
                try:
                    self._write()
                except OSError as e:
                    self.say(f"warning: {e}; trying again later")
                # this ends the run before its next step
                except FolderLost:
                    pass
        if self.wandb:
            self.wandb.log(row, summary)

    def log_evaluation(
        self, evaluation: dict, best: bool, best_val_loss: float
    ) -> None:
        """Log the losses of an evaluation, the `best` so far or not."""
        self.log(evaluation, best_val_loss=best_val_loss)
        text = f"step {evaluation['step']}: {describe_evaluation(evaluation)}"
        if best:
            text += ", the best so far"
        self.say(text)

    def log_step(self, row: dict, max_iters: int, step_seconds: float) -> None:
        """Log a training step; on the terminal also the time left until max_iters."""
        self.log(row)
        text = (
            f"step {row['step']}/{max_iters}: loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
            f"{row['tokens_per_s']:,.0f} tokens/s"
        )
        # only of a device whose peak is listed
        if "mfu" in row:
            text += f", MFU {row['mfu']:.1%}"
        left = timedelta(seconds=round((max_iters - row["step"]) * step_seconds))
        self.say(f"{text}, {left} left", live=True)

    def sync(self) -> None:
        """Fsync the rows, before a checkpoint of their step is written. Raises OSError and
        FolderLost."""
        with self.lock:
            # what an earlier attempt could not
            self._write()
            with name_path(self.path):
                os.fsync(self.file)
            self.safe += len(self.rows)
            self.rows = b""

    def _write(self) -> None:
        """Write all rows since the last successful fsync, also those written before: after a failed
        one, the kernel may have dropped them. Raises OSError and FolderLost."""
        check_lock(self.folder_lock)
        with name_path(self.path):
            self._reopen_if_replaced()
            # a disk may take a part of the rows
            done = 0
            while done < len(self.rows):
                done += os.pwrite(self.file, self.rows[done:], self.safe + done)

    def _reopen_if_replaced(self) -> None:
        """Continue the file that is at the path of metrics.jsonl, if that is not the opened one, as
        after a removal or an editor's save, or if it was cut. Raises OSError."""
        opened = os.fstat(self.file)
        exists = self.path.exists()
        is_same = exists and os.path.samestat(opened, self.path.stat())
        # someone may have cut it, in place
        if is_same and opened.st_size >= self.safe:
            return
        content = self.path.read_bytes() if exists else b""
        # opened before the other one is closed: this may fail
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        os.close(self.file)
        self.file = file
        # keep the rows that it lacks, on lines of their own
        lines = content.splitlines()
        rows = [row + b"\n" for row in self.rows.splitlines() if row not in lines]
        if content and not content.endswith(b"\n"):
            rows.insert(0, b"\n")
        self.safe = len(content)
        self.rows = b"".join(rows)
        warn(
            f"{self.path} was replaced, cut or removed; the next rows go to the file of that name"
        )

    def close(self) -> bool:
        """Close metrics.jsonl and wandb. Return False if wandb may still hang."""
        if self.file is not None:
            os.close(self.file)
            self.file = None
        # once: `end` closes too
        wandb = self.wandb
        self.wandb = None
        if wandb and not wandb.close():
            return False
        return not self.may_hang

    def end(
        self, kind: type | None, error: BaseException | None, traceback: Any
    ) -> None:
        """Close after an error. If wandb may still hang, end the process here, since the
        interpreter's end would wait for wandb."""
        # a notebook continues, and shows the error itself
        if self.close() or in_notebook():
            return
        # as at the interpreter's own end
        if isinstance(error, SystemExit):
            end_process(error.code)
        sys.excepthook(kind, error, traceback)
        end_process(EXIT_FAILED)

    def say(self, text: str, live: bool = False) -> None:
        """Print a line. On a terminal, the next line replaces a `live` one."""
        if self.quiet:
            return
        live = live and sys.stdout.isatty()
        # a wrapped line could not be replaced
        if live:
            text = text[: shutil.get_terminal_size().columns - 1]
        # back to the start of the line, and erase it
        if self.live:
            text = "\r\033[K" + text
        say(text, end="" if live else "\n")
        self.live = live
