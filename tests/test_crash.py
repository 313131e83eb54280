"""tools.crash finds no failure in this program, and finds those that a test makes on purpose."""

import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import REPO, complaint, run

from keepgpt.errors import UserError
from tools.crash import checks

FEW = {
    "kill": ("--cases=5",),
    "nth": ("--cases=120",),
    "power": ("--cases=400",),
    "rot": ("--cases=150",),
    "full": ("--cases=4",),
    "elastic": ("--cases=1",),
    "prepare": ("--cases=60",),
}
NO_FSYNC = """
write = checkpoint.write_bundle
class WithoutFsync:
    def __init__(self, disk):
        self.disk = disk
    def __getattr__(self, name):
        return (lambda file: None) if name == "fsync" else getattr(self.disk, name)
checkpoint.write_bundle = lambda bundle, path, disk: write(bundle, path, WithoutFsync(disk))"""
BROKEN = {  # a name that starts with a part: statements that break the code it checks
    "kill": "from keepgpt import optim\noptim.AdamW.load_state_dict = lambda *args: None",
    "nth": "checkpoint.remove_leftovers = lambda *args: None",
    "nth, write in place": """
def write_in_place(bundle, path, disk):
    write(bundle, path.with_name(path.name.removesuffix(".tmp")), disk)
    write(bundle, path, disk)
write = checkpoint.write_bundle
checkpoint.write_bundle = write_in_place""",
    "power": NO_FSYNC,
    "power, no fsync of the folder": """
commit = checkpoint.commit
class WithoutFolderFsync:
    def __init__(self, disk):
        self.disk = disk
    def __getattr__(self, name):
        return (lambda path: None) if name == "fsync_folder" else getattr(self.disk, name)
def commit_without(bundle, folder, keep, best, disk):
    commit(bundle, folder, keep, best, WithoutFolderFsync(disk))
checkpoint.commit = commit_without""",
    "rot": "checkpoint.zlib = SimpleNamespace(crc32=lambda *args: 0)",
    "full": """
import train
train.is_saved = lambda run: run.saver.wait() or True""",
    "elastic": """
from keepgpt import elastic
def sum_in_a_row(model, add_gradient, micro_batches):
    for m in micro_batches:
        add_gradient(m)
    total = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return total
elastic.sum_as_tree = sum_in_a_row""",
    "prepare": """
import prepare
write = prepare.write_atomically
def write_when_complete(path, content, lock):
    if b"fingerprint" in content:
        write(path, content, lock)
prepare.write_atomically = write_when_complete""",
}


def crash(*args: str, broken: str = "", code: int = 0) -> subprocess.CompletedProcess:
    """Run tools.crash after the statements `broken`."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "crash.py")
        program.write_text(f"""
import sys
import tempfile
sys.path.insert(0, {str(REPO)!r})
tempfile.tempdir = {folder!r}
from types import SimpleNamespace
from keepgpt import checkpoint
{broken}
from tools.crash import __main__ as tool
tool.run_tool(tool.CrashConfig, "", tool.main)""")
        return run(program, *args, code=code)


@pytest.mark.slow
@pytest.mark.parametrize("part", FEW)
def test_no_fault_loses_anything(part):
    assert " 0 failures" in crash(part, *FEW[part]).stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_build_fails_its_part(fault):
    part = fault.partition(",")[0]
    done = crash(part, *FEW[part], broken=BROKEN[fault], code=1)
    assert "FAILURE" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_failure_repeats_with_the_printed_flags():
    broken = {"broken": BROKEN["rot"], "code": 1}
    first = crash("rot", "--cases=20", "--seed=7", **broken).stdout.splitlines()[0]
    again = crash("rot", *first.split("again with ")[1].split(), **broken)
    assert again.stdout.splitlines()[0] == first


def test_an_unknown_part_exits_2():
    complaint(run("tools.crash", "nosuch", code=2))


@pytest.mark.slow
def test_an_uninterrupted_run_that_hangs_is_an_error():
    impatient = "from tools import runs\nruns.TIME_LIMIT = 0.01"
    complaint(crash("kill", "--cases=1", broken=impatient, code=2))


@pytest.mark.slow
@pytest.mark.parametrize("check", [checks.resume, checks.blow_up])
def test_a_check_with_real_runs_passes_on_a_cpu(check, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "RUN", checks.RUN | {"max_iters": 100, "eval_iters": 2})
    assert check(1, "cpu", tmp_path)


@pytest.mark.slow
def test_runs_that_differ_or_fail_are_noticed(monkeypatch, tmp_path):
    ends = iter(range(9))
    monkeypatch.setattr(checks.runs, "read_end", lambda _: next(ends))
    with pytest.raises(UserError, match="differ"):
        checks.resume(1, "cpu", tmp_path, max_iters=60, eval_iters=2)
    with pytest.raises(UserError, match="got 3"):
        checks.resume(
            1, "cpu", tmp_path / "2", learning_rate=1e38, max_iters=4, eval_iters=2
        )


@pytest.mark.slow
def test_the_checks_part_counts_a_check_that_fails():
    failing = """
from keepgpt.errors import UserError
from tools.crash import checks
def fail(rounds, device, folder):
    raise UserError("no such device")
checks.CHECKS = {"fails": fail, "passes": lambda rounds, device, folder: {}}"""
    done = crash("checks", "--device=cpu", broken=failing, code=1)
    assert "fails: no such device" in done.stdout and " 1 failures" in done.stdout
