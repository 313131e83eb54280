"""peak_memory.py SCRIPT ARGS: run a script and print /proc/self/status, which has its peak."""

import runpy
import sys

sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
print(open("/proc/self/status").read())
