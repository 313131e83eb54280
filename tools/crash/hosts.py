"""hosts: two hosts without a common disk: a torchrun each, with an out_dir of its own. One of them
is killed, comes back, is cut off; the run continues, and must end as an uninterrupted one."""
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from keepgpt.process import UserError
from tools import runs
from tools.common import last_step
from tools.crash.common import RUN, Part
from tools.crash.kill import list_processes

STEPS = 2500  # enough for all faults
SETTINGS = RUN | {"elastic": True, "gradient_accumulation_steps": 4, "max_iters": STEPS,
                  "warmup_iters": STEPS, "checkpoint_interval": 20, "eval_interval": 200,
                  "rank_timeout": 20}  # a rank notices a cut cable only by waiting


def wait_until(reached: Callable[[], bool]) -> None:
    """Return when `reached()` is true. Raises UserError if that takes minutes."""
    deadline = time.monotonic() + runs.TIME_LIMIT
    while not reached():
        if time.monotonic() > deadline:
            raise UserError("hosts: the run hangs")
        time.sleep(0.05)


def hosts(part: Part, place: Path) -> str:
    """Compare a run with three faults with an uninterrupted one on one rank."""
    settings = SETTINGS | {"dataset": runs.prepare_source(place)}
    whole, first, second = place / "whole", place / "first", place / "second"
    runs.run(settings | {"out_dir": whole})
    # torch 2.13 shares torchrun's store with the ranks, and a host that comes back finds none
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, rng = free.getsockname()[1], part.rng(0)

    def start(out: Path) -> int:
        # addresses in this order: the first host has rank 0
        return runs.start(settings | {"out_dir": out}, ranks=1, torchrun=(
            "--nnodes=1:2", "--nproc_per_node=1", "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{port}", f"--local_addr=127.0.0.{1 + (out == second)}",
            f"--rdzv_conf=last_call_timeout=5,is_host={int(out == first)}"))

    def wait_for_steps() -> None:
        goal = last_step(first) + rng.randint(100, 300)
        wait_until(lambda: last_step(first) >= goal)

    def count_starts() -> int:
        return (first / "README.md").read_text().count("\n| 20")

    torchruns = [start(first), start(second)]
    wait_for_steps()
    os.kill(torchruns[1], signal.SIGKILL)  # its rank dies with it
    wait_for_steps()
    before, back = count_starts(), start(second)
    wait_until(lambda: count_starts() > before)
    wait_for_steps()
    for pid in list_processes(second):  # to the first host, that is a cut cable
        os.kill(pid, signal.SIGSTOP)
    code = runs.wait_for_exit(torchruns[0])
    os.kill(back, signal.SIGKILL)
    part.count(0, runs.compare_end(code, first, runs.read_end(whole)), cases=3)
    if any(second.glob("*.pt")):
        part.count(0, "the second host has checkpoints of its own", 0)
    return f"faults of two hosts without a common disk in {count_starts()} starts; 1 end compared"
