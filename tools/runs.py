"""Start real training runs and compare how they end, bit for bit. Shared by tools.crash, tools.gpu,
tools.bench, tools.same and the tests."""

import hashlib
import os
import resource
import select
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import train
from keepgpt.checkpoint import Bundle, CorruptCheckpoint, find_bundle, read_bundle
from keepgpt.config import Settings, TrainConfig, parse
from keepgpt.errors import UserError
from keepgpt.signals import die_with_parent
from tools.common import REPO, read_log

# seconds; a process that takes longer hangs
TIME_LIMIT = 300
# the state of a run: the parts of a checkpoint on which its next steps depend
STATE = (
    "model",
    "optimizer",
    "scaler",
    "rng",
    "step",
    "best_val_loss",
    "data_start",
    "skips",
    "norms",
)
# files that are always there, without a download
SOURCE = (REPO / "train.py", REPO / "model.py")
# what two equal runs may log differently
SPEEDS = ("tokens_per_s", "mfu")


def prepare_source(
    place: Path,
    texts: Sequence[Path] = SOURCE,
    name: str = "source",
    tokenizer: str = "char",
) -> Path:
    """Prepare a small real text, by default the source of this program, as a dataset `name`, by
    default of characters. Return its folder."""
    flags = to_flags({"name": name, "tokenizer": tokenizer, "data_dir": place})
    subprocess.run(
        [sys.executable, REPO / "prepare.py", *texts, *flags],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return place / name


def prepare_mixture(place: Path) -> str:
    """Prepare three texts with one tokenizer. Return the setting `dataset` that mixes them."""
    both = prepare_source(place)
    parts = [
        prepare_source(place, [text], text.stem, tokenizer=str(both)) for text in SOURCE
    ]
    return f"{both}:0.5+{parts[0]}:0.3+{parts[1]}:0.2"


def to_flags(settings: Settings) -> list[str]:
    """Return settings as arguments of a command."""
    return [f"--{key}={value}" for key, value in settings.items()]


def fork(work: Callable[[], int | None], log: Path) -> int:
    """Run `work` in a fork of this process, its output appended to `log`. Return the process id.
    The fork's exit code is what `work` returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # as a command in a shell: ended with this program, its output in a file
        die_with_parent()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work() or 0
    # a fork must not return into the code of its parent, whatever happens
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # nothing of the parent may run twice, such as its clean-up
        os._exit(code)


def fork_ranks(work: Callable[[], int | None], ranks: int, log: Path) -> int:
    """Run `work` on several ranks: forks of a process that ends them all when one fails, as
    torchrun does. Return the process id of that one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def launch() -> int:
        os.environ |= {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        pids = set()
        for rank in range(ranks):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            pids.add(fork(work, log))
        while pids:
            pid, status = os.wait()
            pids.remove(pid)
            if status:
                # the others die with this process
                return 1
        return 0

    return fork(launch, log)


def start(
    settings: Settings,
    ranks: int = 0,
    torchrun: tuple[str, ...] = (),
    largest_file: int = 0,
    forked: bool = False,
) -> int:
    """Start train.py, its output appended to <out_dir>.log. Return the process id. With 0 `ranks`
    it is a fork, which finds torch imported; otherwise the real command, behind torchrun for
    several ranks, or with the flags `torchrun`; with `forked` each rank is a fork. `largest_file`
    limits the bytes of a file."""
    if ranks > 1 and not torchrun:
        torchrun = ("--standalone", f"--nproc_per_node={ranks}")
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--max-restarts=20", *torchrun]
    # the same settings, for a command or a fork
    flags = to_flags(settings)
    command += [str(REPO / "train.py"), *flags]

    def work() -> int:
        # the limit is set in the child alone
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if ranks and not forked:
            os.execv(sys.executable, command)
        # what train.py does after its imports, which the fork has made already
        config, overrides, _ = parse(TrainConfig, "", flags)
        return train.main(config, overrides)

    log = Path(f"{settings['out_dir']}.log")
    if forked and ranks:
        return fork_ranks(work, ranks, log)
    return fork(work, log)


def wait_for_exit(pid: int, seconds: float | None = None) -> int | None:
    """Return the exit code of a child, or None if it still runs after `seconds` (TIME_LIMIT)."""
    if seconds is None:
        seconds = TIME_LIMIT
    # a descriptor that is readable when the process has ended
    handle = os.pidfd_open(pid)
    ended, _, _ = select.select([handle], [], [], seconds)
    os.close(handle)
    if not ended:
        return None
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def list_descendants(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started, of those that they have started,
    and so on. Linux only."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        # by parentage: other runs on this machine are left alone
        for child in map(int, path.read_text().split()):
            found += [child, *list_descendants(child)]
    return found


def run(
    settings: Settings, ranks: int = 0, code: int = 0, forked: bool = False
) -> float:
    """Run train.py to its end and return its seconds. Raises UserError if it hangs or ends with
    another exit code."""
    # the time of the whole command, to choose instants within it
    started = time.perf_counter()
    found = wait_for_exit(start(settings, ranks, forked=forked))
    if found != code:
        raise UserError(
            f"an uninterrupted run: expected exit code {code}, got {found} (None: it "
            f"hangs); see {settings['out_dir']}.log"
        )
    return time.perf_counter() - started


def digest(value: Any) -> str:
    """Return the sha256 of nested dicts and lists of tensors and plain values."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        # the dtype and shape too: equal bytes may mean other numbers
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            # the order of the keys does not count
            keys = sorted(value, key=str)
            add([item for key in keys for item in (key, value[key])])
        elif isinstance(value, (list, tuple)):
            # the length first: else [[1], 2] and [1, [2]] would be equal
            sha.update(f"{len(value)}:".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{value!r},".encode())

    add(value)
    return sha.hexdigest()


def state_of(bundle: Bundle, keys: Iterable[str] = STATE) -> str:
    """Return the digest of those parts of a checkpoint. Runs with equal digests are in the same
    state."""
    # an older checkpoint lacks some
    return digest({key: bundle.get(key) for key in keys})


def full_state_of(bundle: Bundle) -> str:
    """Return the digest of all that a checkpoint holds, except for the settings, which name its
    folder, and in an elastic run the number of ranks and their generators."""
    # settings name the run's folder
    left_out = {"config"}
    if bundle["config"]["elastic"]:
        left_out = {"config", "rng", "world_size"}
    return state_of(bundle, bundle.keys() - left_out)


def read_state(path: Path) -> str:
    """Return the full state in a checkpoint file, "corrupt", or "" if it does not exist."""
    if not path.exists():
        return ""
    try:
        return full_state_of(read_bundle(path))
    except CorruptCheckpoint:
        return "corrupt"


def newest_state(folder: Path) -> str:
    """Return the full state that a run would resume from, or ""."""
    try:
        return full_state_of(find_bundle(folder)[1])
    except CorruptCheckpoint:
        return ""


def read_rows(out: Path, *keys: str) -> list[dict]:
    """Return the rows of metrics.jsonl that have all of `keys`, without measured speeds."""
    return [
        {key: row[key] for key in row if key not in SPEEDS}
        for row in read_log(out)
        if row.keys() >= set(keys)
    ]


def list_temporary(folder: Path) -> str:
    """Return the names of temporary files."""
    return ", ".join(path.name for path in folder.glob("*.tmp"))


def read_end(out: Path) -> dict:
    """Return all that a run leaves in its folder, except for its speed."""
    return {
        "ckpt.pt": read_state(out / "ckpt.pt"),
        "best.pt": read_state(out / "best.pt"),
        "metrics.jsonl": read_rows(out),
        "temporary files": list_temporary(out),
    }


def compare_end(code: int | None, out: Path, expected: dict) -> str:
    """Return how the end of a run differs from the `expected` one, or ""."""
    # then the files may be those of any step
    if code != 0:
        return f"exit code {code}, see {out}.log"
    # name what differs: weights, curve, or files left behind
    names = [name for name, value in read_end(out).items() if value != expected[name]]
    if not names:
        return ""
    return f"{', '.join(names)}: not as in the uninterrupted run"
