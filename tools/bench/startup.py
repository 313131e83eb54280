"""startup: the time to the first step, --help and an error message."""
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tools.bench.common import REPO, BenchConfig

TINY = ["--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=64", "--batch_size=12",
        "--gradient_accumulation_steps=1", "--compile=False", "--device=cpu", "--max_iters=1",
        "--eval_iters=1"]


def bench(config: BenchConfig) -> list[dict[str, str]]:
    """Return a row per command."""
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        place = Path(folder)
        (place / "text.txt").write_text(Path(__file__).read_text() * 20, encoding="utf-8")
        subprocess.run([sys.executable, REPO / "prepare.py", place / "text.txt", "--name=set",
                        "--tokenizer=char", f"--data_dir={place}"], check=True,
                       stdout=subprocess.DEVNULL)
        commands = {
            "import torch": ["-c", "import torch"],
            "train.py to the end of its first step, with evaluation and save":
                ["train.py", *TINY, f"--dataset={place / 'set'}"],
            "train.py --help": ["train.py", "--help"],
            "sample.py --help": ["sample.py", "--help"],
            "train.py --n_layr=3": ["train.py", "--n_layr=3"],
            "sample.py --temperature=warm": ["sample.py", "--temperature=warm"]}
        times: dict[str, list[float]] = {name: [] for name in commands}
        for i in range(config.rounds):
            for name, args in commands.items():
                start = time.perf_counter()
                out = [f"--out_dir={place / str(i)}"] * (len(args) > 2)
                subprocess.run([sys.executable, *args, *out], cwd=REPO,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                times[name].append(time.perf_counter() - start)
    return [{"command": name, "seconds": f"{median(values):.2f}"}
            for name, values in times.items()]
