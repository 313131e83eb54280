"""tools.crash finds no failure in this program, and finds those that a test makes on purpose."""

import subprocess
import tempfile

import pytest
from conftest import PROGRAMS, read_error, run

# cases of each part that find nothing, and those that find a fault
FEW = {
    "kill": 2,
    "nth": 40,
    "power": 40,
    "rot": 50,
    "full": 2,
    "elastic": 1,
    "skip": 1,
    "prepare": 30,
}
# a kill before the first save shows nothing: several
ENOUGH = {"kill": 4, "nth": 20, "power": 20, "rot": 30, "full": 2, "prepare": 10}
# each fault breaks what its part checks
BROKEN = [
    ("kill", "forget_the_optimizer"),
    ("nth", "leave_temporary_files"),
    ("power", "omit_fsync"),
    ("power", "omit_fsync_of_the_folder"),
    ("rot", "accept_any_checksum"),
    ("full", "claim_the_last_save"),
    ("prepare", "write_meta_only_at_the_end"),
]


def crash(
    part: str, *args: str, fault: str = "nothing", code: int = 0
) -> subprocess.CompletedProcess:
    """Run a part of tools.crash after a fault of programs/broken_crash.py."""
    # the tool keeps the folders of its failures
    with tempfile.TemporaryDirectory() as folder:
        program = PROGRAMS / "broken_crash.py"
        return run(program, fault, part, *args, code=code, env={"TMPDIR": folder})


@pytest.mark.slow
@pytest.mark.parametrize("part", FEW)
def test_no_fault_loses_anything(part):
    assert " 0 failures" in crash(part, f"--cases={FEW[part]}").stdout


@pytest.mark.slow
@pytest.mark.parametrize("part, fault", BROKEN, ids=[fault for _, fault in BROKEN])
def test_a_broken_build_fails_its_part(part, fault):
    done = crash(part, f"--cases={ENOUGH[part]}", fault=fault, code=1)
    assert "FAILURE" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_failure_repeats_with_the_printed_flags():
    broken = {"fault": "accept_any_checksum", "code": 1}
    first = crash("rot", "--cases=20", "--seed=7", **broken).stdout.splitlines()[0]
    # the first line is of the first failure, and ends with the flags of that case alone
    flags = first.split("again with ")[1].split()
    again = crash("rot", *flags, **broken)
    assert again.stdout.splitlines()[0] == first


def test_an_unknown_part_exits_2():
    read_error(run("tools.crash", "nosuch", code=2))


@pytest.mark.slow
def test_an_uninterrupted_run_that_hangs_is_an_error():
    read_error(crash("kill", "--cases=1", fault="limit_the_time", code=2))


@pytest.mark.slow
def test_checks_pass_on_a_cpu_and_count_those_that_fail():
    done = crash("checks", "--device=cpu", fault="replace_the_checks", code=1)
    differ, diverge, fail, summary, _ = done.stdout.splitlines()
    assert "differ: an uninter" in differ
    assert "diverge: an uninter" in diverge
    # the exit code of a run whose loss is NaN
    assert "got 3" in diverge
    assert "fail: no such device" in fail
    assert " 3 failures" in summary
