"""elastic: elastic=True against DDP, on 1, 2 and 4 ranks of one thread each."""
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from keepgpt.process import fail
from tools.bench.common import REPO, BenchConfig
from tools.crash.common import prepare

SETTINGS = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 2,
            "gradient_accumulation_steps": 8, "max_iters": 6, "eval_interval": 100, "eval_iters": 1,
            "log_interval": 1, "checkpoint_interval": 100, "warmup_iters": 1}
# each rank writes its peak memory to a file
PEAK = """
import runpy, re, os, sys
from pathlib import Path
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\\s*(\\d+)", status)[1]
    Path(os.environ["PEAK"] + os.environ.get("RANK", "0")).write_text(peak)
"""


def train(place: Path, ranks: int, elastic: bool) -> tuple[float, float]:
    """Return the median seconds per step, and the peak memory of any rank in GB."""
    with tempfile.TemporaryDirectory(dir=place) as out:
        program = place / "measured.py"
        program.write_text(PEAK)
        flags = [f"--{key}={value}" for key, value in
                 (SETTINGS | {"out_dir": out, "dataset": place / "source", "device": "cpu",
                              "elastic": elastic}).items()]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        f"--nproc_per_node={ranks}", str(program), *flags], cwd=REPO, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env=os.environ | {"PEAK": f"{out}/peak", "OMP_NUM_THREADS": "1",
                                         "PYTHONPATH": str(REPO)})
        rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
        speeds = [row["tokens_per_s"] for row in rows if "loss" in row][1:]
        peak = max(int(path.read_text()) for path in Path(out).glob("peak*"))
    tokens = (SETTINGS["batch_size"] * SETTINGS["gradient_accumulation_steps"]
              * SETTINGS["block_size"])
    return tokens / statistics.median(speeds), peak * 1024 / 1e9


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """Yield a row per number of ranks."""
    if config.device not in ("auto", "cpu"):
        fail(f"--device={config.device}: elastic needs cpu")
    with tempfile.TemporaryDirectory(dir=config.folder or None) as name:
        place = Path(name)
        prepare(place)
        for ranks in (1, 2, 4):
            seen = defaultdict(list)
            for _ in range(config.rounds):
                for elastic in (False, True):
                    seen[elastic].append(train(place, ranks, elastic))
            (step, peak), (elastic_step, elastic_peak) = (
                map(statistics.median, zip(*seen[elastic])) for elastic in (False, True))
            yield {"ranks": str(ranks), "DDP": f"{step:.2f} s a step, {peak:.2f} GB a rank",
                   "elastic": f"{elastic_step:.2f} s, {elastic_peak:.2f} GB",
                   "ratio": f"{elastic_step / step:.2f} x"}
