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
from keepgpt.files import FolderLock, FolderLost, check_lock, write_atomically

CLOSE_SECONDS = (
    10  # for wandb to send the rest; torchrun and Slurm kill 30 seconds after a signal
)


def init_wandb(config: dict[str, Any], run_id: str | None, **mode: str) -> Any:
    """Return a run of Weights & Biases, the one called `run_id` if given. Raises UserError, and
    what wandb raises."""
    wandb = import_package("wandb")
    terminal = sys.stdin
    with open(os.devnull) as nobody:
        sys.stdin = nobody  # else a menu waits for someone to log in
        try:
            return wandb.init(
                project=config["wandb_project"],
                name=config["wandb_run_name"],
                config=config,
                id=run_id,
                resume="allow",
                **mode,
                settings=wandb.Settings(init_timeout=20),
            )
        finally:
            sys.stdin = terminal


class Wandb:
    """Log to a run of Weights & Biases in a thread: a call that hangs or fails holds up nothing."""

    def __init__(self, run: Any, say: Callable[[str], None]) -> None:
        """Start the thread. `say` prints a line."""
        self.run, self.say = run, say
        # a resume repeats rows, which wandb would refuse one by one
        self.first_step = getattr(run, "starting_step", 0)
        self.sync = (
            f"Try: wandb sync {Path(getattr(run, 'dir', 'wandb/RUN/files')).parent}"
        )
        self.queue = SimpleQueue()  # of rows, each with a summary; None at the end
        self.ended = Event()
        self.sent = False  # everything
        Thread(target=self._send, daemon=True).start()

    def log(self, row: dict[str, Any], summary: dict[str, Any]) -> None:
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
        except BaseException as e:
            self.say(f"warning: continuing without wandb: {one_line(e)}. {self.sync}")
        self.ended.set()

    def close(self) -> bool:
        """Finish the run. Return True unless that fails, takes too long, or a signal comes."""
        self.queue.put(None)
        try:
            self.ended.wait(CLOSE_SECONDS)  # a signal raises Stopped
        finally:
            if not self.ended.is_set():
                self.say(f"warning: wandb has not sent everything. {self.sync}")
        return self.sent


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
        self.live = (
            False  # the cursor is at the end of a line that the next one replaces
        )
        self.step, self.wandb, self.file, self.quiet = step, None, None, quiet
        self.failures = set()  # of what decorates the run; each is printed once
        self.may_hang = False  # wandb, at the interpreter's end
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

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """Return what `work` returns, or None if it fails: what only decorates a run must not end
        it. The first failure of `what` prints a warning."""
        try:
            return work()
        except Stopped:
            raise
        except BaseException as e:  # a panic of compiled code is not an Exception
            if what not in self.failures:
                self.say(f"warning: {what}: {one_line(e)}")
            self.failures.add(what)

    def start_wandb(self, config: dict[str, Any], run_id: str | None) -> str | None:
        """Also log to Weights & Biases, into the run `run_id` if given; offline if its server or
        an account is missing. Return the run's id. A failure only prints a warning."""
        problem = None
        self.may_hang = True
        try:
            run = init_wandb(config, run_id)
            self.may_hang = False
        except Stopped:
            raise
        except BaseException as e:
            problem = e
            run = self.attempt(
                "training without wandb",
                lambda: init_wandb(config, run_id, mode="offline"),
            )
        if not run:
            return run_id
        self.wandb = Wandb(run, self.say)
        if problem:
            self.say(
                f"warning: wandb logs offline: {one_line(problem)}. {self.wandb.sync}"
            )
        if self.wandb.first_step > self.step + 1:
            self.say(
                f"wandb has the rows before step {self.wandb.first_step}; sending later ones"
            )
        return run.id

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
            self.wandb.log(row, summary)

    def log_evaluation(
        self, evaluation: dict[str, Any], best: bool, best_val_loss: float
    ) -> None:
        """Log the losses of an evaluation, the `best` so far or not."""
        self.log(evaluation, best_val_loss=best_val_loss)
        self.say(
            f"step {evaluation['step']}: train loss {evaluation['train_loss']:.4f}, "
            f"val loss {evaluation['val_loss']:.4f}"
            + (", the best so far" if best else "")
        )

    def log_step(
        self, row: dict[str, Any], max_iters: int, step_seconds: float
    ) -> None:
        """Log a training step; on the terminal also the time left until max_iters."""
        self.log(row)
        left = timedelta(seconds=round((max_iters - row["step"]) * step_seconds))
        self.say(
            f"step {row['step']}/{max_iters}: loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
            f"{row['tokens_per_s']:,.0f} tokens/s"
            + (f", MFU {row['mfu']:.1%}" if "mfu" in row else "")
            + f", {left} left",
            live=True,
        )

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
        warn(
            f"{self.path} was replaced, cut or removed; the next rows go to the file of that name"
        )

    def close(self) -> bool:
        """Close metrics.jsonl and wandb. Return False if wandb may still hang."""
        if self.file is not None:
            os.close(self.file)
            self.file = None
        wandb, self.wandb = self.wandb, None
        closed = not wandb or wandb.close()
        return closed and not self.may_hang

    def end(
        self, kind: type | None, error: BaseException | None, traceback: Any
    ) -> None:
        """Close after an error. If wandb may still hang, end the process here, since the
        interpreter's end would wait for wandb."""
        if self.close() or in_notebook():
            return
        code = EXIT_FAILED
        if isinstance(error, SystemExit):
            code = error.code
        else:
            sys.excepthook(kind, error, traceback)
        end_process(code)

    def say(self, text: str, live: bool = False) -> None:
        """Print a line. On a terminal, the next line replaces a `live` one."""
        if self.quiet:
            return
        live &= sys.stdout.isatty()
        if live:  # a wrapped line could not be replaced
            text = text[: shutil.get_terminal_size().columns - 1]
        say("\r\033[K" + text if self.live else text, end="" if live else "\n")
        self.live = live
