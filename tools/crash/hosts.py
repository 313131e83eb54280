"""hosts: two hosts without a common disk, as network namespaces of this one. One of them is killed,
comes back, is cut off; the run continues, and must end as an uninterrupted one. Needs root."""
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from keepgpt.process import UserError
from tools import runs
from tools.crash.common import RUN, Part

ADDRESS = {"keepgpt1": "10.77.0.1", "keepgpt2": "10.77.0.2"}  # by host name
FIRST, SECOND = ADDRESS
# each host calls its end of the cable `cable`; `ip netns exec` puts its hosts file over /etc/hosts
CONNECT = "ip link add cable netns keepgpt1 type veth peer cable netns keepgpt2\n" + "".join(f"""
ip -n {host} link set lo up
ip -n {host} addr add {address}/24 dev cable
ip -n {host} link set cable up
mkdir -p /etc/netns/{host}
printf '127.0.0.1 localhost\\n10.77.0.1 keepgpt1\\n10.77.0.2 keepgpt2\\n' > /etc/netns/{host}/hosts
""" for host, address in ADDRESS.items())
REMOVE = "ip netns del keepgpt1; ip netns del keepgpt2; rm -rf /etc/netns/keepgpt[12]"
STEPS = 2500  # enough for all faults
SETTINGS = RUN | {"elastic": True, "gradient_accumulation_steps": 4, "max_iters": STEPS,
                  "warmup_iters": STEPS, "checkpoint_interval": 20, "eval_interval": 200,
                  "rank_timeout": 20}  # a rank notices a cut cable only by waiting


def shell(commands: str) -> None:
    """Run a shell script with iproute2's ip. Raises UserError."""
    done = subprocess.run(["sh", "-ec", commands], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"hosts: {done.stderr.strip()}; this part needs Linux, root and iproute2")


def start(host: str, place: Path, settings: dict[str, Any]) -> subprocess.Popen:
    """Start torchrun on a host, with an out_dir of its own."""
    inside = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c",
              f'hostname {host}; exec "$@"', "sh"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1",
                "--max-restarts=20", "--rdzv_backend=c10d",
                f"--rdzv_endpoint={ADDRESS[FIRST]}:29500", "--rdzv_conf=last_call_timeout=5",
                f"--local_addr={ADDRESS[host]}"]
    # torch 2.13 shares torchrun's store with the ranks, and a host that comes back finds none
    env = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(place / f"{host}.log", "ab") as log:
        return subprocess.Popen(
            [*inside, sys.executable, *torchrun, str(runs.REPO / "train.py"),
             *runs.to_flags(settings | {"out_dir": place / host})],
            stdout=log, stderr=log, env=env, start_new_session=True)


def kill(job: subprocess.Popen) -> None:
    """Send SIGKILL to all processes on a host."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-KILL", "--session", str(job.pid)])
    job.wait()


def wait_until(reached: Callable[[], bool], what: str) -> None:
    """Return when `reached()` is true. Raises UserError if that takes minutes."""
    deadline = time.monotonic() + runs.TIME_LIMIT
    while not reached():
        if time.monotonic() > deadline:
            raise UserError(f"hosts: the run hangs when {what}")
        time.sleep(0.05)


def run_with_faults(place: Path, settings: dict[str, Any], part: Part) -> int:
    """Kill the second host, let it come back, cut it off. Return the exit code of the first's
    torchrun."""
    out, rng, jobs = place / FIRST, part.rng(0), {}

    def wait_for_steps(what: str) -> None:
        goal = runs.last_step(out) + rng.randint(100, 300)
        wait_until(lambda: runs.last_step(out) >= goal, what)

    def count_starts() -> int:
        return (out / "README.md").read_text().count("\n| 20")

    try:
        jobs = {host: start(host, place, settings) for host in ADDRESS}
        wait_for_steps("both hosts start")
        kill(jobs[SECOND])
        wait_for_steps("the second host was killed")
        before = count_starts()
        jobs[SECOND] = start(SECOND, place, settings)
        wait_until(lambda: count_starts() > before, "the second host comes back")
        wait_for_steps("the second host is back")
        shell(f"ip -n {SECOND} link set cable down")
        wait_for_steps("the second host is cut off")
        wait_until(lambda: jobs[FIRST].poll() is not None, "one host is left to end it")
        return jobs[FIRST].returncode
    finally:
        for job in jobs.values():
            kill(job)


def hosts(part: Part, place: Path) -> str:
    """Compare a run with three faults with an uninterrupted one on one rank."""
    settings = SETTINGS | {"dataset": runs.prepare_source(place)}
    runs.run(settings | {"out_dir": place / "whole"})
    subprocess.run(REMOVE, shell=True, stderr=subprocess.DEVNULL)  # of a run that was killed
    try:
        shell(f"ip netns add {FIRST}; ip netns add {SECOND}\n{CONNECT}")
        code = run_with_faults(place, settings, part)
    finally:
        subprocess.run(REMOVE, shell=True, stderr=subprocess.DEVNULL)
    part.count(0, runs.compare_end(code, place / FIRST, runs.read_end(place / "whole")), cases=3)
    if any((place / SECOND).glob("*.pt")):
        part.count(0, "the second host has checkpoints of its own", 0)
    card = (place / FIRST / "README.md").read_text()
    return (f"faults of two hosts without a common disk, {card.count('| 1 x cpu')} starts on one "
            f"of them and {card.count('| 2 x cpu')} on both; 1 end compared")
