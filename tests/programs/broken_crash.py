"""tools.crash after a fault was put into the code that it checks. The first argument names the
fault, a function of this file; the others are those of tools.crash."""

import importlib
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))
import prepare
import train
from keepgpt import checkpoint, optim
from keepgpt.errors import UserError
from tools import runs
from tools.crash import __main__ as tool
from tools.crash import checks, common, power

# shorter runs than the tool's own
common.RUN.update({"n_layer": 1, "max_iters": 30, "warmup_iters": 30})


class DiskWithout:
    """A disk on which the operation `name` does nothing."""

    def __init__(self, disk, name):
        self.disk = disk
        self.name = name

    def __getattr__(self, name):
        if name == self.name:
            return lambda *args: None
        return getattr(self.disk, name)


def nothing():
    """Leave the code as it is."""


def forget_the_optimizer():
    optim.AdamW.load_state_dict = lambda *args: None


def leave_temporary_files():
    checkpoint.remove_leftovers = lambda *args: None


def omit_fsync():
    write = checkpoint.write_bundle
    checkpoint.write_bundle = lambda bundle, path, disk: write(
        bundle, path, DiskWithout(disk, "fsync")
    )


def omit_fsync_of_the_folder():
    # all changes of names stay pending: there would be millions of states
    power.PENDING = 4
    commit = checkpoint.commit

    def commit_without(bundle, folder, keep, best, disk, *rest):
        disk = DiskWithout(disk, "fsync_folder")
        commit(bundle, folder, keep, best, disk, *rest)

    checkpoint.commit = commit_without


def accept_any_checksum():
    checkpoint.zlib = SimpleNamespace(crc32=lambda *args: 0)


def claim_the_last_save():
    train.is_on_disk = lambda run: run.saver.wait() or True


def write_meta_only_at_the_end():
    write = prepare.write_atomically

    def write_when_complete(path, content, lock):
        if b"fingerprint" in content:
            write(path, content, lock)

    prepare.write_atomically = write_when_complete


def limit_the_time():
    runs.TIME_LIMIT = 0.01


def replace_the_checks():
    """Run the checks in forks, with short runs, and add checks that fail."""
    # deterministic=True imports it, here once for all forks
    importlib.import_module("torch._inductor.config")
    start = runs.start
    runs.start = lambda settings, ranks=0, **_: start(settings, 0)
    checks.RUN |= {"n_layer": 1, "block_size": 16, "batch_size": 2, "compile": False}
    checks.RUN |= {"max_iters": 30, "eval_interval": 15, "eval_iters": 2}

    def differ(rounds, device, folder):
        ends = iter(range(2))
        read_end = runs.read_end
        runs.read_end = lambda out: next(ends)
        try:
            checks.resume(rounds, device, folder)
        finally:
            runs.read_end = read_end

    def fail(rounds, device, folder):
        raise UserError("no such device")

    checks.CHECKS = {
        "resume": checks.resume,
        "blow up": checks.blow_up,
        "differ": differ,
        "diverge": partial(checks.resume, learning_rate=1e38),
        "fail": fail,
    }


tempfile.tempdir = os.environ["TMPDIR"]
globals()[sys.argv.pop(1)]()
tool.run_tool(tool.CrashConfig, "", tool.main)
