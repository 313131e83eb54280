"""Run scripts in forks of one process that has imported torch already: that takes two seconds.

conftest.py writes one request per line to stdin and reads one exit code per line from stdout. The
server imports and never computes, because a fork keeps only the thread that called it.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time
import types
import weakref
from math import inf
from pathlib import Path
from typing import Any

import numpy.random


@functools.cache
def compile_script(path: str, _modified: int) -> types.CodeType:
    """Return the code of a script. The forks share it."""
    return compile(Path(path).read_bytes(), path, "exec")


def wait_for_request() -> dict[str, Any]:
    """Fork for each request and answer with the exit code. Return the request in the fork."""
    for line in sys.stdin:
        request = json.loads(line)
        for module in request["imports"]:
            importlib.import_module(module)
        script = request["argv"][0]
        if script.endswith(".py"):
            request["code"] = compile_script(script, os.stat(script).st_mtime_ns)
        # a fork that ends would take each operator of torch out of its table
        for finalizer in list(weakref.finalize._registry):
            finalizer.atexit = False
        assert len(os.listdir("/proc/self/task")) == 1  # threads
        gc.freeze()  # a fork that ends would look through all of torch's objects
        children = []
        for rank in range(request["ranks"]):
            children.append(os.fork())
            if children[-1] == 0:
                if request["ranks"] > 1:
                    request["env"] |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                return request
        print(wait_for_exit(children), flush=True)
    sys.exit()


def wait_for_exit(children: list[int]) -> int:
    """Return the exit code of the only child, or of several as torchrun does: 1 if any fails. Then
    the others have 5 seconds to end."""
    code, several, deadline = 0, len(children) > 1, inf
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            children.remove(pid)
        if pid and status:
            code = 1 if several else os.waitstatus_to_exitcode(status)
            deadline = time.monotonic() + 5
        for child in children if time.monotonic() > deadline else []:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return code


def become(request: dict[str, Any]) -> None:
    """Take the folder, environment, files and arguments that a new interpreter would get."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for fd, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, fd)
        os.close(file)
    signal.alarm(request["timeout"])
    numpy.random.seed()  # Python's own generator is seeded at each fork
    sys.modules.pop(request["imports"][0])  # the script itself, which runs as __main__
    if "PYTHONPATH" in os.environ:
        sys.path[1:1] = os.environ["PYTHONPATH"].split(":")
    sys.argv = request["argv"]


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
request = wait_for_request()
become(request)
run_and_exit(request.get("code"))
