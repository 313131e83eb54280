"""The proving machine finds nothing wrong here, and does find what is broken on purpose."""
import subprocess
import sys

import pytest
from conftest import REPO

FEW = {"kill": ("--cases=8", "--torchrun_cases=1"), "nth": ("--cases=120",),
       "power": ("--cases=400",), "rot": ("--cases=150",), "full": ("--cases=4",),
       "elastic": ("--cases=1",), "prepare": ("--cases=60",)}
BROKEN = {
    "kill": "from keepgpt import optim\noptim.AdamW.load_state_dict = lambda *args: None",
    "nth": "checkpoint.remove_leftovers = lambda *args: None",
    "power": """
write = checkpoint.write_bundle
class WithoutFsync:
    def __init__(self, disk):
        self.disk = disk
    def __getattr__(self, name):
        return (lambda file: None) if name == "fsync" else getattr(self.disk, name)
checkpoint.write_bundle = lambda bundle, path, disk: write(bundle, path, WithoutFsync(disk))""",
    "rot": "checkpoint.zlib = SimpleNamespace(crc32=lambda *args: 0)",
    "full": """
wait = checkpoint.Saver.wait
checkpoint.Saver.wait = lambda self: wait(self) or True""",
    "elastic": """
import train
def sum_in_a_row(model, add_gradient, first, end):
    for m in range(first, end):
        add_gradient(m)
    total = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return total
train.sum_as_tree = sum_in_a_row""",
    "prepare": "import prepare\nprepare.mark_incomplete = lambda folder: None"}


def crash(*words: str, broken: str = "") -> subprocess.CompletedProcess:
    """Run the machine in a process of its own, after the statements that break something."""
    program = f"""
import sys
from types import SimpleNamespace
from keepgpt import checkpoint
{broken}
from tools.crash import __main__ as machine
config, _, words = machine.parse(machine.CrashConfig, "", sys.argv[1:])
sys.exit(machine.main(config, words))"""
    return subprocess.run([sys.executable, "-c", program, *words], cwd=REPO, capture_output=True,
                          text=True, timeout=600)


@pytest.mark.parametrize("part", FEW)
def test_no_fault_loses_anything(part, tmp_path):
    done = crash(part, *FEW[part], f"--folder={tmp_path}")
    assert done.returncode == 0 and " 0 failures" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("part", BROKEN)
def test_a_broken_build_fails_its_part(part, tmp_path):
    few = [word for word in FEW[part] if "torchrun" not in word]
    done = crash(part, *few, *["--torchrun_cases=0"] * (part == "kill"), f"--folder={tmp_path}",
                 broken=BROKEN[part])
    assert done.returncode == 1 and "FAILURE" in done.stdout, done.stdout + done.stderr


def test_a_failure_repeats_with_the_printed_flags(tmp_path):
    words = ["rot", f"--folder={tmp_path}"]
    first = crash(*words, "--cases=20", "--seed=7", broken=BROKEN["rot"]).stdout.splitlines()[0]
    again = crash(*words, *first.split("again with ")[1].split(), broken=BROKEN["rot"])
    assert again.returncode == 1 and again.stdout.splitlines()[0] == first


def test_an_unknown_part_exits_2():
    done = crash("nosuch")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no part 'nosuch'")
