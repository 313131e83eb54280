"""Check and measure on a GPU: `python -m tools.gpu [--parts=checks,train] [--only=ROW]`.

This is tools.bench with other defaults: each part takes 9.5 minutes at most, prints a row when it
is ready and records it in docs/measured.json. Needs no network, and Transformers only for its
columns. `checks` kills and resumes runs, blows one up, and compares compiled decode steps.
"""
from dataclasses import asdict, dataclass

from keepgpt.config import setting
from keepgpt.process import UserError
from tools.bench import __main__ as bench
from tools.common import run_tool


@dataclass(frozen=True)
class GpuConfig(bench.BenchConfig):
    """The settings of tools.gpu."""
    parts: str = setting("checks,train,sample,checkpoint", "the parts to run, in this order")
    rounds: int = setting(1, "rounds of a measurement; tables show medians", least=1)
    minutes: float = setting(9.5, "time limit of each part", least=0)
    device: str = setting("cuda:0", "cpu = test this program without a GPU")


def main(config: GpuConfig, args: list[str]) -> int:
    """Run the parts and return the exit code. Raises UserError and OSError."""
    if args:
        raise UserError(f"{args[0]}: expected --key=value. Try: --help")
    settings = asdict(config)
    parts = settings.pop("parts").split(",")
    return bench.main(bench.BenchConfig(**settings), parts)


if __name__ == "__main__":
    run_tool(GpuConfig, "python -m tools.gpu [--key=value ...]", main)
