"""Run work in new processes and record the numbers. Shared by tools.bench and tools.gpu.

A row of a part is a dict from the title of a column to a bare number. docs/measured.json holds the
last record of each row, and the tables in docs/ are written from it.
"""

import json
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
Row = dict[str, float | str]
Records = dict[str, dict[str, dict]]  # by part and row


def name_cpu() -> str:
    """Return the model of the CPU; Linux knows it best."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def name_instructions() -> str:
    """Return the widest instructions for matrix products that PyTorch finds on this CPU."""
    # PyTorch has no public names for the first two
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX-512 bfloat16"
    return torch.backends.cpu.get_cpu_capability()


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return what every record says about its circumstances."""
    # numbers without their machine and version mean nothing a month later
    threads = torch.get_num_threads()
    machine = f"{name_cpu()} ({name_instructions()}), {threads} threads"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    return {
        "date": date.today().isoformat(),
        "torch": str(torch.__version__),
        "machine": machine,
    }


def read_records(path: Path = MEASURED) -> Records:
    """Return the records."""
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def record(path: Path, part: str, name: str, row: Row, machine: dict[str, str]) -> None:
    """Replace the record of a row. Raises OSError."""
    # four digits: the rest is noise, and would change with each run
    numbers = {}
    for title, value in row.items():
        numbers[title] = float(f"{value:.4g}") if isinstance(value, float) else value

    # read again each time: rows of several parts go into one file
    records = read_records(path)
    records.setdefault(part, {})[name] = machine | {"numbers": numbers}
    text = json.dumps(records, indent=1) + "\n"
    write_atomically(path, text.encode())


def format_cell(value: float | str) -> str:
    """Return a number with three digits or more, or a text as it is."""
    if isinstance(value, str):
        return value
    # no decimals for hundreds, three digits for the rest
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def format_table(part: str, rows: dict[str, Row]) -> list[str]:
    """Return the lines of a Markdown table; "-" stands for a missing number."""
    # the columns of all rows, each once, in the order of their first row
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    table = [[part, *titles]]
    for name, row in rows.items():
        cells = [format_cell(row.get(title, "-")) for title in titles]
        table.append([name, *cells])

    lines = [f"| {' | '.join(cells)} |" for cells in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    return lines


def update_page(text: str, records: Records) -> str:
    """Return a page whose tables, from `<!-- measured: PART -->` to `<!-- end -->`, are written
    from the records."""

    def write(match: re.Match) -> str:
        opening, part = match.groups()
        # rows of one table may be of several machines
        rows = {
            name: {"machine": record["machine"]} | record["numbers"]
            for name, record in records[part].items()
        }
        return "\n".join([opening, *format_table(part, rows), "<!-- end -->"])

    # everything between the two comments is replaced, and nothing else
    return re.sub(
        r"(<!-- measured: ([\w ]+) -->)\n.*?<!-- end -->", write, text, flags=re.DOTALL
    )


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that `work` takes, including its work on the device."""
    # CUDA works in the background: wait for what came before, and for the work itself
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def call(work: Callable[[], Any], time_limit: float | None = None) -> Any:
    """Return what `work`, a function of a module with its arguments, returns in a new process.
    Raises UserError if it fails."""
    # a new process: a side may patch modules and set threads
    command = [sys.executable, "-m", "tools.worker"]
    try:
        done = subprocess.run(
            command,
            input=pickle.dumps(work),
            cwd=REPO,
            capture_output=True,
            timeout=time_limit,
        )
    except subprocess.TimeoutExpired:
        raise UserError("no time is left") from None
    if done.returncode:
        # the last line of a traceback names the exception
        lines = done.stderr.decode(errors="replace").splitlines() or ["no output"]
        raise UserError(lines[-1])
    # the last line, because a library may print something before
    return json.loads(done.stdout.splitlines()[-1])


def run_rows(
    part: str,
    rows: dict[str, Callable[[], Row]],
    path: Path,
    machine: dict[str, str],
    minutes: float,
    workers: int,
) -> bool:
    """Measure each row in a process of its own, `workers` at a time and for `minutes` in all; print
    and record it when it is ready. Return False if one failed."""
    # one deadline for all rows: a GPU is lent by the minute
    deadline = time.monotonic() + 60 * minutes

    def measure(name: str) -> tuple[str, Row]:
        left = deadline - time.monotonic()
        try:
            return name, call(rows[name], max(0, left))
        # one row that fails must not hide the others
        except UserError as e:
            return name, {"FAILED": str(e)}

    # the threads only wait for the processes
    passed = True
    with ThreadPool(workers) as pool:
        # each row is stored when it is ready, so an interrupted part keeps its rows
        for name, row in pool.imap_unordered(measure, rows):
            print("", *format_table(part, {name: row}), sep="\n", flush=True)
            if "FAILED" in row:
                passed = False
            else:
                record(path, part, name, row, machine)
    return passed


def compare(rounds: int, sides: dict[str, Callable[[], float]]) -> Row:
    """Return the sides' median seconds, in ms and relative to the first one's. Sides alternate;
    those that can't run here are left out, but not the first. Raises UserError."""
    # ours
    first = next(iter(sides))
    times = defaultdict(list)
    # alternating, because a machine's speed changes over minutes
    for _ in range(rounds):
        for name, work in sides.items():
            try:
                value = work()
            except UserError:
                # maybe it is not installed
                if name == first:
                    raise
            else:
                times[name].append(value)

    # the ratios stand behind all times
    medians = {name: median(values) for name, values in times.items()}
    row = {f"{name}, ms": 1e3 * value for name, value in medians.items()}
    ours = medians.pop(first)
    for name, value in medians.items():
        row[f"{name} / {first}"] = value / ours
    return row
