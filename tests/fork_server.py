"""Run scripts in forks of one process that has imported torch already: an import takes seconds.

conftest.py writes a request, one line of JSON, to stdin. This process answers on stdout with the
ids of the forks, one for each rank, and writes their exit code to the request's `answer` when they
have ended. It imports and never computes, because a fork keeps only the thread that called it.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
import types
import weakref
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy.random
import torch


@dataclass
class Job:
    """The forks of one request."""

    running: list[int]  # process ids
    answer: int  # a file descriptor
    several: bool
    code: int = 0
    deadline: float = inf


@functools.cache
def compile_script(path: str, _modified: int) -> types.CodeType:
    """Return the code of a script. The forks share it."""
    return compile(Path(path).read_bytes(), path, "exec")


@functools.cache
def share_gpt2() -> None:
    """Let all forks share GPT-2's tokenizer: to make it takes longer than most preparations."""
    tokenizer = importlib.import_module("keepgpt.tokenizer").BPETokenizer
    make = tokenizer.__init__
    gpt2 = tokenizer({"kind": "gpt2"})

    def share(self: Any, description: dict[str, Any]) -> None:
        if description == gpt2.description:
            vars(self).update(vars(gpt2))
        else:
            make(self, description)

    tokenizer.__init__ = share


def prepare_fork(request: dict[str, Any]) -> types.CodeType | None:
    """Import the modules of a script. Return its code, or None for a module."""
    for module in request["imports"]:
        importlib.import_module(module)
    share_gpt2()
    # a fork that ends would take each operator of torch out of its table
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False
    # a lock that another thread holds would stay locked in a fork for ever
    assert len(os.listdir("/proc/self/task")) == 1
    # a fork that ends would look through all of torch's objects
    gc.freeze()
    script = request["argv"][0]
    if script.endswith(".py"):
        return compile_script(script, os.stat(script).st_mtime_ns)
    return None


def serve() -> None:
    """Answer requests until stdin closes."""
    jobs: list[Job] = []
    while True:
        # look after running forks every 5 ms
        readable, _, _ = select.select([sys.stdin], [], [], 0.005 if jobs else None)
        if readable:
            line = sys.stdin.readline()
            if not line:
                sys.exit()
            job = start_job(json.loads(line))
            print(json.dumps(job.running), flush=True)
            jobs.append(job)
        jobs = [job for job in jobs if not has_ended(job)]


def start_job(request: dict[str, Any]) -> Job:
    """Start a fork for each rank. In the forks this runs the script and does not return."""
    code = prepare_fork(request)
    streams = open_streams(request)
    answer = os.open(request["answer"], os.O_WRONLY)
    pids = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            become(request, rank, streams)
            run_and_exit(code)
        pids.append(pid)
    # a pipe ends when the forks close it
    for stream in streams:
        os.close(stream)
    return Job(pids, answer, several=len(pids) > 1)


def has_ended(job: Job) -> bool:
    """Return True if all forks of a job have ended, and answer with the exit code: that of the only
    fork, or of several as torchrun does: 1 if any fails. Then the others have 5 seconds to end."""
    # WNOHANG: (0, 0) while it runs
    for pid in list(job.running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            job.running.remove(pid)
        if status:
            job.code = 1 if job.several else os.waitstatus_to_exitcode(status)
            job.deadline = time.monotonic() + 5
    if job.running:
        for pid in job.running if time.monotonic() > job.deadline else []:
            os.kill(pid, signal.SIGKILL)
        return False
    os.write(job.answer, str(job.code).encode())
    os.close(job.answer)
    return True


def open_streams(request: dict[str, Any]) -> list[int]:
    """Open stdin, stdout and stderr of the forks."""
    # ranks that write to one file must not overwrite each other
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return [
        os.open(os.devnull, os.O_RDONLY),
        os.open(request["stdout"], flags),
        os.open(request["stderr"], flags),
    ]


def become(request: dict[str, Any], rank: int, streams: list[int]) -> None:
    """Take the folder, environment, files and arguments that a new interpreter would get."""
    # all of the environment: the server's own is of an earlier time
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["ranks"] > 1:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
        shorten_pauses()
    # stdin, stdout and stderr
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # those of the server: pipes of other requests end when their own forks do
    os.closerange(3, 256)
    signal.alarm(request["timeout"])
    # Python's own generator is seeded at each fork, NumPy's is not
    numpy.random.seed()
    # the script itself, which runs as __main__
    sys.modules.pop(request["imports"][0])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # an interpreter reads it once, at its start
    if "PYTHONPATH" in os.environ:
        sys.path[1:1] = os.environ["PYTHONPATH"].split(":")
    sys.argv = request["argv"]


def shorten_pauses() -> None:
    """Let a rank print its error soon. It waits for seconds in case that torchrun ends it after
    another rank's error; here the ranks end by themselves."""
    errors = importlib.import_module("keepgpt.errors")
    errors.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10))


def run_script(code: types.CodeType | None) -> None:
    """Run the script or module in sys.argv. A script's code is `code`."""
    if code:
        sys.path[0] = os.path.dirname(sys.argv[0])
        module = types.ModuleType("__main__")
        module.__file__ = sys.argv[0]
        sys.modules["__main__"] = module
        exec(code, module.__dict__)
    else:
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def run_and_exit(script: types.CodeType | None) -> None:
    """Run the script, then end as the interpreter does, but without freeing memory: with torch that
    takes longer than most of the tests."""
    code = 0
    try:
        run_script(script)
    except KeyboardInterrupt:
        # the interpreter's own end, by a signal
        raise
    except SystemExit as e:
        code = e.code
        if code is None:
            code = 0
        elif not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # a script may have closed it
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError:
            code = 120
    os._exit(code)


sys.path[0] = str(Path(__file__).resolve().parent.parent)
serve()
