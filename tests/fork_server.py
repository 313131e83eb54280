"""Run scripts in forks of one process that has imported torch already: that takes two seconds.

conftest.py writes one request per line to stdin and reads one exit code per line from stdout. The
server imports and never computes, because a fork keeps only the thread that called it.
"""
import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np


def wait_for_request() -> dict[str, Any]:
    """Fork for each request and answer with the exit code. Return the request in the fork."""
    for line in sys.stdin:
        request = json.loads(line)
        for module in request["imports"]:
            importlib.import_module(module)
        assert len(os.listdir("/proc/self/task")) == 1  # threads
        gc.freeze()  # a fork that ends would look through all of torch's objects
        pid = os.fork()
        if pid == 0:
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


def become(request: dict[str, Any]) -> None:
    """Take the folder, environment, files and arguments that a new interpreter would get."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for fd, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, fd)
        os.close(file)
    signal.alarm(request["timeout"])
    np.random.seed()  # Python's own generator is seeded at each fork
    for module in request["imports"]:
        del sys.modules[module]  # the script itself runs anew, what it imports does not
    sys.argv = request["argv"]


sys.path[0] = str(Path(__file__).resolve().parent.parent)
become(wait_for_request())
# at the top level, so that the interpreter itself handles sys.exit, exceptions and atexit
if sys.argv[0].endswith(".py"):
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    sys.path[0] = os.getcwd()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
