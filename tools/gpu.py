"""Check and measure on a GPU: `python -m tools.gpu [--parts=checks,train] [--only=ROW]`.

This is tools.bench with other defaults, and with the checks of tools.crash. Each part takes 9.5
minutes at most. It needs no network, and Transformers only for its columns.
"""

from dataclasses import dataclass

from keepgpt.config import setting
from tools.bench import __main__ as bench
from tools.common import run_tool
from tools.crash.checks import CHECKS

# the checks come first: the speed of a wrong result is worth nothing
PARTS = {"checks": CHECKS, **bench.PARTS}


@dataclass(frozen=True)
class GpuConfig(bench.BenchConfig):
    """The settings of tools.gpu."""

    # a GPU is lent by the minute
    rounds: int = setting(1, "rounds of a measurement; tables show medians", least=1)
    device: str = setting("cuda:0", "cpu = test this program without a GPU")
    minutes: float = setting(9.5, "time limit of each part", least=0)
    parts: str = setting(
        "checks,train,sample,checkpoint", "the parts to run, in this order"
    )


def main(config: GpuConfig, args: list[str]) -> int:
    """Check and measure. Return the exit code. Raises UserError and OSError."""
    # the rest is as on a CPU
    return bench.main(config, args, PARTS)


if __name__ == "__main__":
    run_tool(GpuConfig, "python -m tools.gpu [--key=value ...]", main)
