"""memory: peak memory of GPT-2 124M during training, saving, resuming and sampling."""
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from keepgpt.distributed import pick_device
from tools.bench.common import SHAPES, BenchConfig, peak_memory

TRAIN = """
import sys, train
from keepgpt import config
train.main(*config.parse(config.TrainConfig, "", sys.argv[1:])[:2])"""
WORKS = {
    "training": f"from keepgpt import checkpoint; checkpoint.Saver.save = lambda *_: None\n{TRAIN}",
    "training and saving": TRAIN,
    "resuming": TRAIN,
    "sampling": """
import sample, types
sample.tokenizer.from_meta = lambda meta: types.SimpleNamespace(vocab_size=meta["vocab_size"])
args = [arg for arg in sys.argv if arg.startswith(("--out_dir", "--device"))]
from keepgpt.config import parse
config = parse(sample.SampleConfig, "", args)[0]
network = sample.load(config)[0]
sample.prepare_model(network, sample.pick_device(config.device))
list(sample.generate(network, [[0]], 48))"""}


def bench(config: BenchConfig) -> Iterator[dict[str, str]]:
    """Yield a row per kind of work, each in a new process."""
    device, shape = pick_device(config.device), SHAPES["GPT-2 124M"]
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        for split in ("train", "val"):
            np.random.default_rng(0).integers(shape.args.vocab_size, size=100_000,
                                              dtype=np.uint16).tofile(f"{folder}/{split}.bin")
        for name, work in WORKS.items():
            out = Path(folder) / ("none" if name == "training" else "out")
            flags = {"out_dir": out, "dataset": folder, "device": device, "init_from": "auto",
                     "batch_size": shape.batch_size, "gradient_accumulation_steps": 1,
                     "checkpoint_interval": 1, "eval_iters": 1,
                     "max_iters": 6 if name == "resuming" else 3}
            host, gpu = peak_memory(
                "from keepgpt.process import prepare_process\nprepare_process()\n" + work,
                *(f"--{key}={value}" for key, value in flags.items()))
            row = {"GPT-2 124M, batch 1 x 1,024": name, "host memory": f"{host / 1e9:.2f} GB"}
            yield row | ({"device memory": f"{gpu / 1e9:.2f} GB"} if device.type == "cuda" else {})
