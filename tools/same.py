"""Compare runs bit for bit: `python -m tools.same out-1 out-4 ...`.

Prints the sha256 of the weights and the optimizer's state in each folder's newest checkpoint. The
exit code is 0 if all are equal, else 1.
"""
import sys
from pathlib import Path

from keepgpt.checkpoint import read_newest
from keepgpt.process import UserError, exit_with
from tools.runs import digest


def main(folders: list[str]) -> int:
    """Compare; return the exit code. Raises UserError."""
    if len(folders) < 2 or any(folder.startswith("-") for folder in folders):
        raise UserError("expected the out_dirs of two runs or more. "
                        "Try: python -m tools.same out-1 out-2")
    states = set()
    for folder in folders:
        bundle = read_newest(Path(folder))
        state = digest([bundle["model"], bundle["optimizer"]])
        states.add((bundle["step"], state))
        print(f"{folder}: step {bundle['step']}, sha256 {state}")
    print("bit-identical" if len(states) == 1 else "DIFFERENT")
    return 0 if len(states) == 1 else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        exit_with(e)
