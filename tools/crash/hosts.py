"""hosts: two hosts without a common disk, as network namespaces of this one. One of them is killed,
comes back, is cut off; the run goes on, and must end in the bits of an undisturbed one. Needs root.
"""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from keepgpt.process import fail
from tools.crash.common import HANGS, REPO, RUN, Part, difference, prepare, undisturbed

FIRST, SECOND = "keepgpt1", "keepgpt2"  # their names; each calls its end of the cable `cable`
ADDRESS = {FIRST: "10.77.0.1", SECOND: "10.77.0.2"}
STEPS = 4000  # enough for what happens to them
SETTINGS = RUN | {"elastic": True, "gradient_accumulation_steps": 4, "max_iters": STEPS,
                  "warmup_iters": STEPS, "checkpoint_interval": 20, "eval_interval": 200,
                  "rank_timeout": 20}  # a rank notices a cable that was cut only by waiting


def ip(*words: str) -> None:
    """Run iproute2's ip; ends the program if it can't."""
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as e:
        fail(f"ip {' '.join(words)}: {getattr(e, 'stderr', None) or e}; the part hosts needs "
             "Linux, root and iproute2")


@contextmanager
def network() -> Iterator[None]:
    """The two hosts, which know each other by name, and the cable between them."""
    def remove() -> None:
        for host in ADDRESS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)
            (Path("/etc/netns") / host / "hosts").unlink(missing_ok=True)

    remove()  # what a machine that was killed has left
    try:
        for host in ADDRESS:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
            hosts = Path("/etc/netns") / host / "hosts"  # `ip netns exec` puts it over /etc/hosts
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text("".join(f"{a} {name}\n" for name, a in
                                     [("localhost", "127.0.0.1"), *ADDRESS.items()]))
        ip("link", "add", "cable", "netns", FIRST, "type", "veth",
           "peer", "cable", "netns", SECOND)
        for host, address in ADDRESS.items():
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
        yield
    finally:
        remove()


def start(host: str, place: Path, settings: dict[str, Any]) -> subprocess.Popen:
    """torchrun on a host, with an out_dir of its own."""
    flags = [f"--{key}={value}" for key, value in (settings | {"out_dir": place / host}).items()]
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
            [*inside, sys.executable, *torchrun, str(REPO / "train.py"), *flags],
            stdout=log, stderr=log, env=env, start_new_session=True)


def kill(job: subprocess.Popen) -> None:
    """kill -9 of all that runs on a host."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-KILL", "--session", str(job.pid)])
    job.wait()


def last_step(out: Path) -> int:
    """The last step that the run has logged, or 0."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Return when it is true; the program ends if that takes minutes."""
    deadline = time.monotonic() + HANGS
    while not true():
        if time.monotonic() > deadline:
            fail(f"hosts: the run hangs: {what}")
        time.sleep(0.05)


def misfortunes(place: Path, settings: dict[str, Any], part: Part) -> int:
    """Kill the second host, let it come back, cut it off; the exit code of the first's torchrun."""
    out, dice, jobs = place / FIRST, part.dice(0), {}

    def goes_on(what: str) -> None:
        """Wait until so many more steps are done, some time within them."""
        goal = last_step(out) + dice.randint(100, 300)
        wait_until(lambda: last_step(out) >= goal, what)

    def starts() -> int:
        return (out / "README.md").read_text().count("\n| 20") if out.exists() else 0

    try:
        jobs = {host: start(host, place, settings) for host in ADDRESS}
        goes_on("both hosts begin")
        kill(jobs[SECOND])
        goes_on("the second host was killed")
        before = starts()
        jobs[SECOND] = start(SECOND, place, settings)
        wait_until(lambda: starts() > before, "the second host comes back")
        goes_on("the second host is back")
        ip("-n", SECOND, "link", "set", "cable", "down")
        goes_on("the second host is cut off")
        part.cases += 3
        return jobs[FIRST].wait(HANGS)
    finally:
        for job in jobs.values():
            kill(job)


def hosts(part: Part, place: Path) -> int:
    """Three misfortunes of one run."""
    settings = SETTINGS | {"dataset": prepare(place)}
    whole, _ = undisturbed(settings | {"out_dir": place / "whole"}, 0)
    with network():
        code = misfortunes(place, settings, part)
    part.count(0, difference(code, place / FIRST, whole), 0)
    if any((place / SECOND).glob("*.pt")):
        part.count(0, "the second host has bundles of its own", 0)
    card = (place / FIRST / "README.md").read_text()
    return part.end(f"misfortunes of two hosts without a common disk, {card.count('| 1 x cpu')} "
                    f"starts on one of them and {card.count('| 2 x cpu')} on both; 1 end compared")
