"""The proving machine: can anything take a run away? Run it as `python -m tools.crash [PART ...]`.

    kill   kill -9 at random instants of real runs; each must end in the bits of an undisturbed one
    nth    each file operation of a save fails, or the process dies in it
    power  the states of the disk that a power cut during a save may leave
    rot    flipped bits, zeroed pages and cuts in the newest bundle
    full   no room for a bundle, whatever part of it would still have fitted

Without a part, all five in small numbers. A line each; exit code 1 if anything failed. Linux only.
"""
import errno
import hashlib
import io
import itertools
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401  an optimizer imports it: here once, not in each forked process

import checkpoint
import train
from checkpoint import BadBundle, Disk, Saver
from configurator import TrainConfig, fail, knob, parse

REPO = Path(__file__).resolve().parent.parent
KEEP, INTERVAL = 2, 2  # generations that are kept; steps between two saves
RUN = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.1,
       "batch_size": 4, "gradient_accumulation_steps": 2,
       "learning_rate": 3e-3, "warmup_iters": 4, "lr_decay_iters": 60, "max_iters": 60,
       "eval_interval": 10, "eval_iters": 2, "log_interval": 1,
       "checkpoint_interval": INTERVAL, "keep_checkpoints": KEEP,
       "device": "cpu", "compile": False, "init_from": "auto"}
WIDE = RUN | {"n_embd": 64, "eval_interval": 6, "max_iters": 42}  # a bundle of over a megabyte
BEFORE = ((0, True), (KEEP, False), (KEEP, True))  # bundles before a save; whether it is the best
FAULTS = ("EIO", "ENOSPC", "EINTR", "EDQUOT", "late", "gone", "dies")
WRITE_FAULTS = (*FAULTS, "short", "dies halfway")
TEARS = ("lost", "kept", "cut", "pages", "zeros")  # what becomes of data without an fsync
PAGE, ROOM = 1 << 12, 1 << 16  # bytes
HANGS = 300  # seconds; no process here takes so long


@dataclass(frozen=True)
class CrashConfig:
    """The settings of tools.crash."""
    cases: int = knob(0, "of each part; 0 = a few, 1e9 = all there are (nth, power, full)", least=0)
    torchrun_cases: int = knob(2, "kill: kills of a rank or torchrun, in two-rank runs", least=0)
    seed: int = knob(1, "repeats the cases; a kill falls on the same instant, as far as clocks go")
    only: int = knob(-1, "the number of the one case (kill: run) to try", least=-1)
    exec: bool = knob(False, "kill: start python anew each time, not a fork that has torch loaded")
    folder: str = knob("", "work there, to test that file system, not in the temporary folder")


class Part:
    """Counts the cases of a part and its failures, and prints what repeats a failure."""

    def __init__(self, name: str, settings: CrashConfig) -> None:
        self.name, self.settings, self.clock = name, settings, time.perf_counter()
        self.cases = self.failures = 0

    def dice(self, case: int) -> random.Random:
        """The random numbers of a case, whichever cases are tried before it."""
        return random.Random(f"{self.settings.seed} {self.name} {case}")

    def choose(self, rare: list[bool], few: int) -> list[int]:
        """The numbers of the cases to try, out of len(rare): the rare ones, then random others."""
        if self.settings.only >= 0:
            return [self.settings.only]
        dice = self.dice(-1)
        order = sorted(range(len(rare)), key=lambda case: (not rare[case], dice.random()))
        return sorted(order[:self.settings.cases or few])

    def count(self, case: int, problem: str, cases: int = 1) -> None:
        self.cases += cases
        self.failures += bool(problem)
        if problem and self.failures <= 5:
            print(f"{self.name}: FAILURE in case {case}: {problem}; again with "
                  f"--seed={self.settings.seed} --only={case}", flush=True)

    def end(self, of_what: str) -> int:
        print(f"{self.name:5} {self.cases:6,} {of_what}: {self.failures} failures, "
              f"{time.perf_counter() - self.clock:.0f} s, seed {self.settings.seed}", flush=True)
        return self.failures


# Real processes

def prepare(place: Path) -> Path:
    """A small real text, the source of this program, as a dataset of characters."""
    subprocess.run([sys.executable, REPO / "prepare.py", REPO / "train.py", REPO / "model.py",
                    "--name=source", "--tokenizer=char", f"--data_dir={place}"],
                   check=True, stdout=subprocess.DEVNULL)
    return place / "source"


def start(settings: dict[str, Any], ranks: int = 0, limit: int = 0) -> int:
    """Start training with `ranks` real commands, or with a fork of this process; return its id.

    A fork is a process like any other; it only finds torch loaded. `limit` is the most bytes that
    a file of it may have.
    """
    pid = os.fork()
    if pid:
        return pid
    flags, code = [f"--{key}={value}" for key, value in settings.items()], 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                "--max-restarts=20"] if ranks > 1 else []
    try:
        log = os.open(f"{settings['out_dir']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if ranks:
            os.execv(sys.executable, [sys.executable, *torchrun, str(REPO / "train.py"), *flags])
        code = train.main(*parse(TrainConfig, "", flags)[:2])
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid: int, seconds: float = HANGS) -> int | None:
    """The exit code of a child, or None if it still runs after so many seconds."""
    file = os.pidfd_open(pid)
    ended = select.select([file], [], [], seconds)[0]
    os.close(file)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if ended else None


def processes(out: Path) -> list[int]:
    """torchrun and its ranks: the processes whose command line names `out`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if f"--out_dir={out}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def wait_for_orphans(out: Path) -> int:
    """Wait for the ranks whose torchrun was killed; how many hung and had to be killed as well."""
    deadline = time.monotonic() + 60
    while (left := processes(out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    while processes(out):
        time.sleep(0.1)
    return len(left)


def undisturbed(settings: dict[str, Any], ranks: int) -> tuple[dict[str, Any], float]:
    """What a run ends in that nobody disturbs, and the seconds it takes."""
    clock = time.perf_counter()
    if code := exit_code(start(settings, ranks)):
        fail(f"even an undisturbed run ends with exit code {code}; see {settings['out_dir']}.log")
    return ends(settings["out_dir"]), time.perf_counter() - clock


# States, compared to the bit

def digest(value: Any) -> str:
    """sha256 of a nest of tensors and plain values."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            add([item for key in sorted(value, key=str) for item in (key, value[key])])
        elif isinstance(value, (list, tuple)):
            sha.update(f"{len(value)}:".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{value!r},".encode())

    add(value)
    return sha.hexdigest()


def state(bundle: dict[str, Any]) -> str:
    """The digest of a bundle without its settings, which name the run's folder."""
    return digest({key: value for key, value in bundle.items() if key != "config"})


def state_at(path: Path, known: dict[str, str]) -> str:
    """The state in a file, "damaged", or "" for no file. `known` remembers what was read."""
    if not path.exists():
        return ""
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    if content not in known:
        try:
            known[content] = state(checkpoint.read_bundle(path))
        except BadBundle:
            known[content] = "damaged"
        except Exception as e:  # a run would end with it, and not try an older bundle
            known[content] = repr(e)
    return known[content]


def newest(folder: Path) -> str:
    """The state that a run would go on from, or ""."""
    try:
        return state(checkpoint.newest_bundle(folder))
    except BadBundle:
        return ""
    except Exception as e:
        return repr(e)


def half_written(folder: Path) -> str:
    """The names of temporary files."""
    return ", ".join(path.name for path in folder.glob("*.tmp"))


def ends(out: Path) -> dict[str, Any]:
    """What a run has left, without what depends on the clock."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {"ckpt.pt": state_at(out / "ckpt.pt", {}), "best.pt": state_at(out / "best.pt", {}),
            "metrics.jsonl": [row | {"tokens_per_s": 0, "mfu": 0} for row in rows],
            "the half-written": half_written(out)}


def difference(code: int | None, out: Path, whole: dict[str, Any]) -> str:
    """How the end of a run differs from the undisturbed one's, or ""."""
    if code != 0:
        return f"exit code {code}, see {out}.log"
    names = [name for name, value in ends(out).items() if value != whole[name]]
    return f"{', '.join(names)}: not as in the undisturbed run" * bool(names)


def wrong(folder: Path, allowed: dict[str, set[str]], least: int, known: dict[str, str]) -> str:
    """What is wrong in a folder, or "".

    `allowed` says in which states a name may be ("": it may be missing), `least` how many
    generations there must be.
    """
    for path in sorted(folder.glob("*.pt")):
        if state_at(path, known) == "damaged":
            return f"{path.name} is not whole"
    for name, states in allowed.items():
        if state_at(folder / name, known) not in states:
            return f"{name} is neither the old nor the new one, or missing"
    if newest(folder) not in allowed["ckpt.pt"]:
        return "newest_bundle gives neither the old nor the new one"
    few = len(checkpoint.generations(folder)) < least
    return f"fewer than {least} generations are left" * few


# kill

def traces(out: Path) -> set:
    """What shows that a save is under way, from its first operation on the disk to its last."""
    there, newest = checkpoint.generations(out), out / "ckpt.pt"
    unlinked = there[:1] if not newest.exists() or not there[0].samefile(newest) else []
    return {*there[KEEP:], *unlinked,
            *((path, path.stat().st_mtime_ns) for path in out.glob("*.pt.tmp"))}


def steps_again(out: Path) -> int:
    """How many of the steps that were logged are in no bundle."""
    path = out / "metrics.jsonl"
    rows = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    saved = max((int(p.stem.removeprefix("ckpt-")) for p in checkpoint.generations(out)), default=0)
    return json.loads(rows[-1])["step"] - saved if rows else 0


def killed_run(settings: dict[str, Any], ranks: int, life: float, budget: int,
               dice: random.Random, seen: Counter) -> int | None:
    """A run that is killed and started again until it ends; its exit code, None if it hangs.

    Each kill falls on an instant that is uniform over an undisturbed `life`; after `budget` kills
    there are no more.
    """
    out, pid, kills = settings["out_dir"], 0, 0
    while True:
        pid, before = pid or start(settings, ranks), traces(out)
        code = exit_code(pid, dice.uniform(0, life) if kills < budget else HANGS)
        if code is not None or kills == budget:
            break
        victim = dice.choice(processes(out) or [pid])
        with suppress(ProcessLookupError):  # a rank that has just ended
            os.kill(victim, signal.SIGKILL)
        kills += 1
        if victim == pid:  # else it is a rank, and torchrun starts all ranks again
            exit_code(pid)
            seen["inside"] += bool(traces(out) - before)
            seen["again"] = max(seen["again"], steps_again(out))
            seen["hung"] += wait_for_orphans(out)
            pid = 0
    seen["kills"] += kills
    return code


def kill_runs(part: Part, settings: dict[str, Any], place: Path, ranks: int, kills: int) -> Counter:
    """Run after run until so many kills are spent; the end of each is compared."""
    seen, only = Counter(), part.settings.only
    whole, life = undisturbed(settings | {"out_dir": place / f"whole{ranks}"}, max(ranks, 1))
    if ranks == 0:  # a fork lives shorter, and must do the same
        forked, life = undisturbed(settings | {"out_dir": place / "forked"}, 0)
        part.count(-1, "a fork does not end as a real command does" * (forked != whole), 0)
    while seen["kills"] < kills and not (seen["runs"] and only >= 0):
        run, before = only if only >= 0 else seen["runs"], seen["kills"]
        out = place / f"run{ranks}-{run}"
        code = killed_run(settings | {"out_dir": out}, ranks, life, kills - before, part.dice(run),
                          seen)
        too_many = seen["again"] > 2 * INTERVAL  # one that was not yet saved, and one being saved
        problem = difference(code, out, whole) or f"{seen['again']} steps made again" * too_many
        part.count(run, problem, seen["kills"] - before)
        seen["runs"] += 1
    return seen


def kill(part: Part, place: Path) -> int:
    """kill -9, from the start of a process to its end."""
    settings, data = part.settings, {"dataset": prepare(place)}
    seen = kill_runs(part, RUN | data, place, int(settings.exec), settings.cases or 20)
    failures = part.end(
        f"kills of one process ({'started anew' if settings.exec else 'forked'}), "
        f"{seen['inside']} inside a save, at most {seen['again']} steps made again; "
        f"{seen['runs']} ends compared")
    if settings.torchrun_cases:
        part = Part("kill", settings)
        seen = kill_runs(part, RUN | data | {"max_iters": 400}, place, 2, settings.torchrun_cases)
        failures += part.end(f"kills of a rank or of torchrun, {seen['hung']} orphans hung; "
                             f"{seen['runs']} ends compared")
    return failures


# nth

class TappedDisk(Disk):
    """Logs each operation, whatever there is in Disk; the `n`-th fails in the way of `fault`.

    Does not wait for the real disk: what a process leaves does not depend on it.
    """

    def __init__(self, fault: str = "", n: int = 0) -> None:
        self.fault, self.n, self.count, self.log = fault, n, 0, []
        self.struck = self.problem = ""
        self.opened, self.distrusted = {}, set()  # paths by descriptor; those whose fsync failed

    def __getattribute__(self, name: str) -> Any:
        is_operation = name in vars(Disk) and not name.startswith("_")
        return partial(self.on, name) if is_operation else super().__getattribute__(name)

    def on(self, name: str, *args: Any) -> Any:
        """What each operation does instead."""
        self.count += 1
        path = self.opened.get(args[0], args[0])
        if name == "remove":
            self.distrusted.discard(path)
        elif path in self.distrusted and name != "close":
            self.problem = f"{name} of a file whose fsync has failed"
        if self.fault == "thin" and name == "write":  # a disk that takes little at a time
            args = args[0], args[1][:999]
        elif self.count == self.n or self.fault == "gone" and self.count > self.n:
            return self.fail(name, *args)
        return self.do(name, *args)

    def do(self, name: str, *args: Any) -> Any:
        result = None if name.startswith("fsync") else getattr(Disk, name)(self, *args)
        if name == "create":
            self.opened[result] = args[0]
        kept = [bytes(arg) if isinstance(arg, memoryview) else arg for arg in args]
        self.log.append((name, kept, result))
        return result

    def fail(self, name: str, *args: Any) -> Any:
        self.struck, fault = name, self.fault
        if fault in ("short", "dies halfway"):
            taken = self.do(name, args[0], args[1][:len(args[1]) // 2 + 1])
        elif fault == "late" or name == "close":  # it is done, and an error comes nevertheless
            self.do(name, *args)
        if fault.startswith("dies"):
            os._exit(9)
        if fault == "short":  # no error yet: it comes with the next operation
            self.n, self.fault = self.n + 1, "ENOSPC"
            return taken
        if name == "fsync":
            self.distrusted.add(self.opened[args[0]])
        number = getattr(errno, fault, errno.EIO)
        raise OSError(number, os.strerror(number))


def real_bundles(place: Path) -> list[dict[str, Any]]:
    """Four bundles of a small run, in the order of their steps."""
    settings, bundles = RUN | {"dataset": prepare(place), "out_dir": place / "run"}, []
    for step in (2, 4, 6, 8):
        undisturbed(settings | {"max_iters": step}, 0)
        bundles.append(checkpoint.read_bundle(place / "run" / "ckpt.pt"))
    return bundles


def clone(source: Path, target: Path) -> Path:
    """Make `target` a copy of a folder; what was a second name of a file is one again."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(exist_ok=True)  # a mounted one is still there
    subprocess.run(["cp", "-a", f"{source}/.", target], check=True)
    return target


def save(saver: Saver, bundle: dict[str, Any], best: bool) -> bool:
    """Save as a run does; whether it says that it succeeded."""
    saver.save(bundle, best)
    return saver.wait()


def faulty_save(folder: Path, older: list, new: dict, later: dict, best: bool, disk: TappedDisk,
                known: dict[str, str]) -> str:
    """Save `new` on a faulty disk, then `later` on a sound one. What is wrong then, or ""."""
    old, old_best = (state(older[-1]), state(older[0])) if older else ("", "")
    now, now_best = state(new), state(new) if best else old_best
    allowed = {"ckpt.pt": {old, now}, "best.pt": {old_best, now_best}}
    saver_on = partial(Saver, folder, KEEP, math.inf, lambda: None, torch.device("cpu"))
    saver = saver_on()
    saver.disk = disk
    dies = disk.fault.startswith("dies")
    if dies:
        pid = os.fork()
        if not pid:
            save(saver, new, best)
            os._exit(0)
        if (code := exit_code(pid)) != 9:
            return f"exit code {code}: the save never comes to that operation"
    elif save(saver, new, best):
        allowed = {"ckpt.pt": {now}, "best.pt": {now_best}}
        if disk.struck not in ("", "close", "remove"):
            return "it is called a success"
    if problem := disk.problem or wrong(folder, allowed, min(len(older), KEEP), known):
        return problem
    if half_written(folder) and not dies and disk.fault != "gone":
        return f"{half_written(folder)} left behind"
    saver = saver_on() if dies else saver
    saver.disk = TappedDisk()
    if not save(saver, later, False) or newest(folder) != state(later):
        return "the next save fails"
    return f"{half_written(folder)} left behind for good" * bool(half_written(folder))


def nth(part: Part, place: Path) -> int:
    """Each operation of a save fails in each way, in folders with and without older bundles."""
    bundles, known, cases = real_bundles(place), {}, []
    for there, best in BEFORE:
        folder = place / f"{there}{best}"
        folder.mkdir()
        for i, bundle in enumerate(bundles[:there]):
            checkpoint.commit(bundle, folder, KEEP, i == 0, Disk())
        disk = TappedDisk()
        checkpoint.commit(bundles[there], clone(folder, place / "case"), KEEP, best, disk)
        cases += [(there, best, "thin", 0, "")]
        cases += [(there, best, fault, n, name) for n, (name, _, _) in enumerate(disk.log, 1)
                  for fault in (WRITE_FAULTS if name == "write" else FAULTS)]
    for number in part.choose([name != "write" for *_, name in cases], few=300):
        there, best, fault, n, name = cases[number]
        folder = clone(place / f"{there}{best}", place / "case")
        with redirect_stderr(io.StringIO()):
            problem = faulty_save(folder, bundles[:there], bundles[there], bundles[there + 1], best,
                                  TappedDisk(fault, n), known)
        part.count(number, problem and f"{name} is operation {n}, {fault}: {problem}")
    return part.end(f"of {len(cases):,} faults in the {len(disk.log)} operations of a save")


# power

class Volume:
    """A folder as the programs see it, as the disk has it for sure, and what lies between."""

    def __init__(self) -> None:
        self.files, self.synced = [], []  # contents, by file number
        self.names, self.durable = {}, {}  # file numbers, by name
        self.pending, self.opened = [], {}  # changes of names since the folder's fsync; descriptors

    def rename(self, change: dict[str, int | None]) -> None:
        """Change what names stand for (None: for nothing), all at once."""
        self.pending.append(change)
        self.names = {n: file for n, file in (self.names | change).items() if file is not None}

    def apply(self, name: str, args: list, result: Any) -> None:
        """Follow an operation that was logged."""
        if name == "create" and args[0].name not in self.names:
            self.files.append(b"")
            self.synced.append(b"")
            self.rename({args[0].name: len(self.files) - 1})
        if name == "create":
            self.opened[result] = self.names[args[0].name]
            self.files[self.opened[result]] = b""
        elif name == "write":
            self.files[self.opened[args[0]]] += args[1][:result]
        elif name == "fsync":
            self.synced[self.opened[args[0]]] = self.files[self.opened[args[0]]]
        elif name == "rename":
            self.rename({args[0].name: None, args[1].name: self.names[args[0].name]})
        elif name == "link":
            self.rename({args[1].name: self.names[args[0].name]})
        elif name == "remove":
            self.rename({args[0].name: None})
        elif name == "fsync_folder":
            self.durable, self.pending = self.names, []

    def subsets(self, dice: random.Random) -> list[tuple]:
        """Which of the pending changes may have reached the disk: any of them."""
        n = len(self.pending)
        if n <= 8:
            return list(itertools.product((False, True), repeat=n))
        first = [(True,) * kept + (False,) * (n - kept) for kept in range(n + 1)]
        return first + [tuple(dice.random() < 0.5 for _ in range(n)) for _ in range(200)]

    def after_cut(self, subset: tuple, tear: str, dice: random.Random) -> dict[str, bytes]:
        """The folder when the power is back: contents by name."""
        names = self.durable.copy()
        for change in itertools.compress(self.pending, subset):
            names |= change
        return {n: self.torn(file, tear, dice) for n, file in names.items() if file is not None}

    def torn(self, file: int, tear: str, dice: random.Random) -> bytes:
        """What is left of a file: what came after its fsync may be there or not."""
        now, sure = self.files[file], self.synced[file]
        if now == sure or tear == "kept":
            return now
        if tear == "pages":
            pages = [now[i:i + PAGE] for i in range(0, len(now), PAGE)]
            return b"".join(page if dice.random() < 0.7 else bytes(len(page)) for page in pages)
        if tear == "cut":
            return now[:dice.randrange(len(now) + 1)]
        return sure if tear == "lost" else bytes(len(now))


def instants(log: list) -> Iterator[tuple[str, Volume, int, int]]:
    """After each operation: its name, the volume, how many saves are durable and have begun."""
    volume, names, durable = Volume(), [name for name, _, _ in log], 0
    for i, (name, args, result) in enumerate(log):
        volume.apply(name, args, result)
        begun, rest = names[:i].count("saved") + 1, names[i + 1:names.index("saved", i)]
        if name == "saved" or name == "fsync_folder" and name not in rest:
            durable = begun
        yield name, volume, durable, begun


def power(part: Part, place: Path) -> int:
    """Every instant of a few saves, and all that may be on the disk if the power goes then."""
    bundles, known, distinct, cases, disk = real_bundles(place), {}, set(), [], TappedDisk()
    states, bests, folder = [""], [""], place / "recorded"
    folder.mkdir()
    for i, bundle in enumerate(bundles):
        best = i % 2 == 0
        checkpoint.commit(bundle, folder, KEEP, best, disk)
        disk.log.append(("saved", [], None))
        states.append(state(bundle))
        bests.append(states[-1] if best else bests[-1])
    for i, (name, volume, _, _) in enumerate(instants(disk.log)):
        tears = TEARS if volume.files != volume.synced else TEARS[:1]
        subsets = volume.subsets(part.dice(-2 - i))
        cases += [(i, name, *left) for left in itertools.product(subsets, tears)]
    chosen = part.choose([name != "write" for _, name, _, _ in cases], few=1000)
    for i, (name, volume, durable, begun) in enumerate(instants(disk.log)):
        allowed = {name: {those[durable], those[begun]}
                   for name, those in (("ckpt.pt", states), ("best.pt", bests))}
        while chosen and cases[chosen[0]][0] == i:
            number = chosen.pop(0)
            left, problem = volume.after_cut(*cases[number][2:], part.dice(number)), ""
            if (key := digest([sorted(left.items()), durable, begun])) not in distinct:
                distinct.add(key)
                shutil.rmtree(place / "left", ignore_errors=True)
                (place / "left").mkdir()
                for path, content in left.items():
                    (place / "left" / path).write_bytes(content)
                with redirect_stderr(io.StringIO()):
                    problem = wrong(place / "left", allowed, min(durable, KEEP), known)
            part.count(number, problem and f"a cut after operation {i}, {name}, that leaves "
                                           f"{', '.join(sorted(left))}: {problem}")
    return part.end(f"of {len(cases):,} states after a power cut, {len(distinct):,} distinct ones")


# rot

def damaged(raw: bytes, edges: list[int], case: int, dice: random.Random) -> tuple[bytes, str]:
    """A file's content when it has rotted, and how."""
    kind, turn = case % 3, case // 3
    if kind == 0:
        bits, made = dice.sample(range(8 * len(raw)), dice.choice((1, 1, 2, 3))), bytearray(raw)
        for bit in bits:
            made[bit // 8] ^= 1 << bit % 8
        return bytes(made), ", ".join(f"bit {bit % 8} of byte {bit // 8} flipped" for bit in bits)
    if kind == 1:
        page = dice.choice([i for i in range(0, len(raw), PAGE) if any(raw[i:i + PAGE])])
        zeros = bytes(len(raw[page:page + PAGE]))
        return raw[:page] + zeros + raw[page + PAGE:], f"page at byte {page} zeroed"
    at = edges[turn] if turn < len(edges) else dice.randrange(len(raw))
    return raw[:at], f"cut to {at} bytes"


def rot(part: Part, place: Path) -> int:
    """The newest bundle is damaged: it must be refused, and the one before it taken."""
    older, newer = real_bundles(place)[-2:]
    folder, path = place / "rot", place / "rot" / "ckpt.pt"
    folder.mkdir()
    checkpoint.commit(older, folder, KEEP, True, Disk())
    checkpoint.commit(newer, folder, KEEP, True, Disk())  # best.pt is it, too: no way out
    raw, sound = path.read_bytes(), state(older)
    part.count(-1, "a sound bundle is not taken" * (newest(folder) != state(newer)), 0)
    with zipfile.ZipFile(path) as file:
        edges = [record.header_offset for record in file.infolist()] + [file.start_dir, len(raw)]
    around = sorted({at + d for at in edges for d in (-1, 0, 1)} & set(range(len(raw))))
    for case in part.choose([False] * (part.settings.cases or 500), few=500):
        content, how = damaged(raw, around, case, part.dice(case))
        path.write_bytes(content)  # in place: its other name, the numbered one, rots with it
        with redirect_stderr(io.StringIO()):
            problem = "it is not refused" * (state_at(path, {}) != "damaged")
            problem = problem or "the older one is not taken" * (newest(folder) != sound)
        part.count(case, problem and f"{how}, of {len(raw)}: {problem}")
    return part.end(f"damages to a bundle of {len(raw):,} bytes and {len(edges) - 2} records")


# full

def no_room(settings: dict[str, Any], older: Path, limit: int, instant: float, expected: set[str],
            whole: dict[str, Any]) -> str:
    """Go on with a run while no file may have more than `limit` bytes, or on a file system that is
    full from some instant on; then with room. What is wrong, or ""."""
    out, problem = clone(older, settings["out_dir"]), ""
    log = Path(f"{out}.log")
    log.unlink(missing_ok=True)
    code = exit_code(pid := start(settings, limit=limit), instant)
    if code is None:
        with open(out / "filler", "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(PAGE)):
                pass
        code = exit_code(pid)
        (out / "filler").unlink()
    if limit or code != 0:  # 0: the end was saved before there was no room
        end = f"done at step {settings['max_iters']}"
        if code != train.EXIT_FAILED or end not in log.read_text():
            problem = f"training did not go on (exit code {code}), see {log}"
        elif newest(out) not in expected:
            problem = "the older bundle is lost"
        elif half_written(out):
            problem = f"{half_written(out)} left behind"
    return problem or difference(exit_code(start(settings)), out, whole)


def mount(folder: Path) -> bool:
    """Mount 16 MiB of memory as a file system, if that is allowed here."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    return os.geteuid() == 0 and not subprocess.run(command, stderr=subprocess.DEVNULL).returncode


def full(part: Part, place: Path) -> int:
    """No room: training goes on, older bundles stay, and with room again all is well."""
    base, older, small = WIDE | {"dataset": prepare(place)}, place / "older", place / "small"
    whole, life = undisturbed(base | {"out_dir": place / "whole", "keep_checkpoints": 99}, 0)
    states = {state_at(path, {}) for path in checkpoint.generations(place / "whole")}
    undisturbed(base | {"out_dir": older, "max_iters": base["eval_interval"]}, 0)
    limits = range(ROOM, (older / "ckpt.pt").stat().st_size, ROOM)
    mounted, real = mount(small), 0
    try:
        for number in part.choose([False] * len(limits) * (1 + mounted), few=8):
            if number < len(limits):
                case = {"out_dir": place / f"limit{number}"}, limits[number], HANGS, {newest(older)}
            else:
                real += 1
                case = {"out_dir": small}, 0, part.dice(number).uniform(0, life), states
            part.count(number, no_room(base | case[0], older, *case[1:], whole))
    finally:
        if mounted:
            subprocess.run(["umount", small], check=True)
    return part.end(f"disks without room: {part.cases - real} of the {len(limits)} file sizes by "
                    + (f"64 KiB, {real} small file systems" if mounted else
                       "64 KiB; a small file system can be mounted only by root"))


PARTS = {"kill": kill, "nth": nth, "power": power, "rot": rot, "full": full}


def main(settings: CrashConfig, words: list[str]) -> int:
    """Try the parts that are named, or all; the exit code."""
    if unknown := [word for word in words if word not in PARTS]:
        fail(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # a process with one thread may be forked
    failed = 0
    for name in words or PARTS:
        place = Path(tempfile.mkdtemp(prefix="keepgpt-crash-", dir=settings.folder or None))
        if PARTS[name](Part(name, settings), place):
            failed = 1
            print(f"{name}: what it has left is in {place}")
        else:
            shutil.rmtree(place)
    return failed


if __name__ == "__main__":
    USAGE = f"python -m tools.crash [{' | '.join(PARTS)} ...] [--key=value ...]"
    CONFIG, _, WORDS = parse(CrashConfig, USAGE, sys.argv[1:])
    sys.exit(main(CONFIG, WORDS))
