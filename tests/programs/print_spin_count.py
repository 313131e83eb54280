"""Print the variable of OpenMP that a process of keepGPT has after its start."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from keepgpt.signals import prepare_process

prepare_process()
print(os.getenv("GOMP_SPINCOUNT"))
