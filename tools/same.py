"""Whether runs have the same weights and moments, to the bit: `python -m tools.same out-1 out-4`.

Prints the sha256 of the weights and AdamW's moments in each folder's newest bundle. Exit code 0 if
all are the same, else 1.
"""
import sys
from pathlib import Path

from keepgpt.checkpoint import CorruptCheckpoint, read_newest
from keepgpt.process import fail
from tools.crash.common import digest


def main(folders: list[str]) -> int:
    """Compare; the exit code."""
    if len(folders) < 2 or any(folder.startswith("-") for folder in folders):
        fail("usage: python -m tools.same FOLDER FOLDER ...: the out_dirs of two runs or more")
    states = set()
    for folder in folders:
        try:
            bundle = read_newest(Path(folder))
        except CorruptCheckpoint as e:
            fail(str(e))
        states.add(state := (bundle["step"], digest([bundle["model"], bundle["optimizer"]])))
        print(f"{folder}: step {state[0]}, sha256 {state[1]}")
    print("the same bits" if len(states) == 1 else "OTHER BITS")
    return len(states) > 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
