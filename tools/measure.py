"""Run the sides of a comparison in processes of their own, alternating, and record the numbers.
Shared by tools.bench and tools.gpu.

A row of a part is a dict from the title of a column to a bare number. docs/measured.json holds the
last record of each row, and the tables in docs/ are written from it.
"""
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from keepgpt.process import UserError, write_atomically

REPO = Path(__file__).resolve().parents[1]
MEASURED = REPO / "docs" / "measured.json"
PAGES = (REPO / "docs" / "BENCHMARKS.md", REPO / "docs" / "DISTRIBUTED.md")
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
        part = match[1]
        rows = {name: record["numbers"] for name, record in records[part].items()}
        return "\n".join([f"<!-- measured: {part} -->", *format_table(part, rows), "<!-- end -->"])

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


def kill_session(process: subprocess.Popen) -> None:
    """Kill a process that leads a session, and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def call(expression: str, as_script: bool = True) -> Any:
    """Return the value of an expression over tools.bench.parts, tools.bench.sides and tools.gpu,
    evaluated in a new process. `as_script` prepares it like keepGPT's scripts. Raises UserError if
    it fails."""
    return wait_for_value(start_call(expression, as_script), None)


def start_call(expression: str, as_script: bool = True, **options: Any) -> subprocess.Popen:
    """Start a process that prints the value of an expression as JSON."""
    prepare = "from keepgpt.process import prepare_process\nprepare_process()\n"
    program = (prepare if as_script else "") + (
        "import json\nfrom tools import gpu\nfrom tools.bench import parts, sides\n"
        f"print(json.dumps({expression}))")
    return subprocess.Popen([sys.executable, "-c", program], cwd=REPO, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def wait_for_value(process: subprocess.Popen, time_limit: float | None) -> Any:
    """Return the value that a process prints. Raises UserError if it fails, and
    subprocess.TimeoutExpired."""
    out, err = process.communicate(timeout=time_limit)
    if process.returncode:
        raise UserError((err.strip().splitlines() or ["no output"])[-1])
    return json.loads(out.splitlines()[-1])


def run_rows(part: str, calls: dict[str, str], path: Path, machine: dict[str, str],
             minutes: float, workers: int = 1) -> bool:
    """Evaluate the expression of each row in a process of its own, `workers` at a time and for
    `minutes` in all; print and record each row when it is ready. Return False if one failed."""
    deadline, started, passed = time.monotonic() + 60 * minutes, [], True

    def measure(expression: str) -> Row:
        process = start_call(expression, start_new_session=True)
        started.append(process)
        try:
            return wait_for_value(process, max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return {"not measured": "no time is left"}
        except UserError as e:
            return {"FAILED": str(e)}
        finally:
            kill_session(process)

    with ThreadPoolExecutor(workers) as pool:
        try:
            names = {pool.submit(measure, call): name for name, call in calls.items()}
            for done in as_completed(names):
                row = done.result()
                print("", *format_table(part, {names[done]: row}), sep="\n", flush=True)
                passed &= "FAILED" not in row
                if not {"FAILED", "not measured"} & row.keys():
                    record(path, part, names[done], row, machine)
        except BaseException:  # Ctrl-C, or a full disk
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                kill_session(process)
            raise
    return passed


def compare(rounds: int, ours: str, **peers: str) -> dict[str, float]:
    """Return each side's median of `rounds` numbers: "ours", and the peers that can run here. The
    sides are expressions for `call`, and alternate."""
    values: dict[str, list[float]] = {"ours": [], **{name: [] for name in peers}}
    for _ in range(rounds):
        values["ours"].append(call(ours))
        for name, expression in peers.items():
            with suppress(UserError):  # not installed, or another architecture
                values[name].append(call(expression, as_script=False))
    return {name: median(found) for name, found in values.items() if found}
