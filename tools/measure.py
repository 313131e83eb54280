"""Run work in new processes and record the numbers. Shared by tools.bench and tools.gpu.

A row of a part is a dict from the title of a column to a bare number. docs/measured.json holds the
last record of each row, and the tables in docs/ are written from it.
"""
import json
import os
import pickle
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median
from typing import Any

import torch

from keepgpt.errors import UserError
from keepgpt.files import write_atomically
from tools.common import REPO

MEASURED = REPO / "docs" / "measured.json"
PAGES = (REPO / "docs" / "BENCHMARKS.md", REPO / "docs" / "DISTRIBUTED.md")
NEW_PROCESS = """import json, pickle, sys
from keepgpt.signals import die_with_parent
die_with_parent()
print(json.dumps(pickle.load(sys.stdin.buffer)()))"""
Row = dict[str, float | str]


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return what every record says about its circumstances."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                   if line.startswith("model name"))
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return {"date": date.today().isoformat(), "torch": str(torch.__version__),
            "machine": f"{gpu}{cpu}, {torch.get_num_threads()} threads"}


def read_records(path: Path = MEASURED) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the records by part and row."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(path: Path, part: str, name: str, row: Row, machine: dict[str, str]) -> None:
    """Replace the record of a row. Raises OSError."""
    records = read_records(path)
    rounded = {title: float(f"{value:.4g}") if isinstance(value, float) else value
               for title, value in row.items()}
    records.setdefault(part, {})[name] = machine | {"numbers": rounded}
    write_atomically(path, (json.dumps(records, indent=1) + "\n").encode())


def format_cell(value: float | str) -> str:
    """Return a number with three digits or more, or a text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_table(part: str, rows: dict[str, Row]) -> list[str]:
    """Return the lines of a Markdown table; "-" stands for a missing number."""
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    return [f"| {' | '.join([part, *titles])} |", "|" + "---|" * (len(titles) + 1),
            *(f"| {' | '.join([name, *(format_cell(row.get(title, '-')) for title in titles)])} |"
              for name, row in rows.items())]


def update_page(text: str, records: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a page whose tables, from `<!-- measured: PART -->` to `<!-- end -->`, are written
    from the records."""
    def write(match: re.Match) -> str:
        rows = {name: record["numbers"] for name, record in records[match[1]].items()}
        return "\n".join([match[0].split("\n")[0], *format_table(match[1], rows), "<!-- end -->"])

    return re.sub(r"<!-- measured: ([\w ]+) -->\n.*?<!-- end -->", write, text, flags=re.DOTALL)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that `work` takes, including its work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def call(work: Callable[[], Any], time_limit: float | None = None) -> Any:
    """Return what `work`, a function of a module with its arguments, returns in a new process.
    Raises UserError if it fails."""
    try:
        done = subprocess.run([sys.executable, "-c", NEW_PROCESS], input=pickle.dumps(work),
                              cwd=REPO, capture_output=True, timeout=time_limit)
    except subprocess.TimeoutExpired:
        raise UserError("no time is left") from None
    if done.returncode:
        raise UserError((done.stderr.decode(errors="replace").splitlines() or ["no output"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run_rows(part: str, rows: dict[str, Callable[[], Row]], path: Path, machine: dict[str, str],
             minutes: float, workers: int) -> bool:
    """Measure each row in a process of its own, `workers` at a time and for `minutes` in all; print
    and record it when it is ready. Return False if one failed."""
    deadline, passed = time.monotonic() + 60 * minutes, True

    def measure(name: str) -> tuple[str, Row]:
        try:
            return name, call(rows[name], max(0, deadline - time.monotonic()))
        except UserError as e:
            return name, {"FAILED": str(e)}

    with ThreadPool(workers) as pool:
        for name, row in pool.imap_unordered(measure, rows):
            print("", *format_table(part, {name: row}), sep="\n", flush=True)
            passed &= "FAILED" not in row
            if "FAILED" not in row:
                record(path, part, name, row, machine)
    return passed


def compare(rounds: int, sides: dict[str, Callable[[], float]]) -> Row:
    """Return the sides' median seconds, in ms and relative to the first one's. Sides alternate;
    those that can't run here are left out, but not the first. Raises UserError."""
    times, (first, *_) = defaultdict(list), sides
    for _ in range(rounds):
        for name, work in sides.items():
            try:
                times[name].append(work())
            except UserError:  # maybe it is not installed
                if name == first:
                    raise
    t = {name: median(values) for name, values in times.items() if values}
    return ({f"{name}, ms": 1e3 * time for name, time in t.items()}
            | {f"{name} / {first}": time / t[first] for name, time in t.items() if name != first})
