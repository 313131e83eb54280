"""Compare runs bit for bit: `python -m tools.same out-1 out-4 ...`.

Prints the sha256 of the weights and the optimizer's state in each folder's newest checkpoint. The
exit code is 0 if all are equal, else 1.
"""

from pathlib import Path

from keepgpt.checkpoint import find_bundle
from keepgpt.errors import UserError
from tools.common import NoSettings, run_tool
from tools.runs import digest


def main(_config: NoSettings, folders: list[str]) -> int:
    """Compare; return the exit code. Raises UserError."""
    if len(folders) < 2:
        raise UserError("expected the out_dirs of two runs or more")
    # a step and its state: the same state at another step is another run
    states = set()
    for folder in folders:
        bundle = find_bundle(Path(folder))[1]
        # a list: these sums stand in logs, and those of a dict would differ
        state = digest([bundle["model"], bundle["optimizer"]])
        states.add((bundle["step"], state))
        print(f"{folder}: step {bundle['step']}, sha256 {state}")
    if len(states) > 1:
        print("DIFFERENT")
        return 1
    print("bit-identical")
    return 0


if __name__ == "__main__":
    run_tool(NoSettings, "python -m tools.same FOLDER FOLDER ...", main)
