"""without_network.py SCRIPT ARGS: run prepare.py on Parquet files and fail if it connects."""

import runpy
import socket
import sys


def connect(*args):
    raise SystemExit(f"connects to {args}")


socket.socket.connect = connect
socket.getaddrinfo = connect
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
assert "pyarrow" in sys.modules and "torch" not in sys.modules
