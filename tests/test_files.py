"""A process writes only in the folder that it locked; drives may lack an operation; errors of the
disk name their path."""

import errno
import fcntl
import json
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import PROGRAMS, TINY, complaint, run, start

import prepare
from keepgpt import errors
from keepgpt.dataset import read_meta
from keepgpt.errors import EXIT_FAILED, EXIT_MISTAKE, UserError, exit_code
from keepgpt.files import FolderLock, FolderLost, sync_folder, write_atomically
from keepgpt.loader import Split
from keepgpt.metrics import Metrics
from keepgpt.text import read_block
from model import ModelArgs, build_model

FOREIGN = b"of another process"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def move_away(folder: Path) -> None:
    """Move a folder to old and put another process's in its place, with all names in use."""
    names = [path.name for path in folder.iterdir()]
    folder.rename(folder.with_name("old"))
    folder.mkdir()
    for name in {*names, ".lock", "meta.json.tmp", "train.bin.tmp", "val.bin.tmp"}:
        (folder / name).write_bytes(FOREIGN)


def failing(number: int):
    """Return a function that raises OSError with that number, as for a descriptor."""

    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


# a folder that is not the locked one


def replace_lock(out: Path) -> None:
    (out / ".lock").unlink()


def move(out: Path) -> None:
    out.rename(out.with_name("old"))


def link_to_another(out: Path) -> None:
    move(out)
    out.with_name("another").mkdir()
    out.symlink_to(out.with_name("another"))


def start_run(dataset: Path, out: Path, ranks: int = 1):
    """Start a run without an end, and wait for its first checkpoint."""
    flags = TINY | {"dataset": dataset, "out_dir": out, "eval_interval": 3}
    flags |= {"max_iters": 10**6, "lr_decay_iters": 10**6}
    process = start("train.py", ranks=ranks, **flags)
    while not (out / "ckpt.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("change", [replace_lock, link_to_another])
def test_two_runs_never_mix_after_a_change_of_the_folder(change, dataset, tmp_path):
    out, flags = (
        tmp_path / "out",
        TINY | {"dataset": dataset, "max_iters": 2, "eval_interval": 1},
    )
    first = start_run(dataset, out)
    change(out)
    flags["init_from"] = "auto" if (out / "ckpt.pt").exists() else "scratch"
    run("train.py", out_dir=out, code=None, **flags)
    later = contents(out)
    _, err = first.communicate(timeout=180)
    assert first.returncode == 2, err
    assert len(err.splitlines()) == 1 and str(out) in err and err.startswith("error: ")
    assert contents(out) == later


@pytest.mark.slow
def test_a_moved_run_ends_and_its_folder_resumes(dataset, tmp_path):
    out = tmp_path / "out"
    process = start_run(dataset, out)
    move(out)
    assert process.wait(timeout=180) == 2 and not out.exists()
    step = torch.load(tmp_path / "old/ckpt.pt", weights_only=True)["step"]
    done = run(
        "train.py", out_dir=tmp_path / "old", init_from="resume", max_iters=step + 1
    )
    assert f"at step {step}" in done.stdout


@pytest.mark.slow
def test_all_ranks_end_when_the_folder_is_moved(dataset, tmp_path):
    out = tmp_path / "out"
    process = start_run(dataset, out, ranks=2)
    move(out)
    _, err = process.communicate(timeout=180)
    lines = {line for line in err.splitlines() if line.startswith("error: ")}
    assert process.returncode == 1
    assert len(lines) == 1, err
    assert not out.exists()


@pytest.mark.parametrize("number", [0, errno.ENOLCK])
@pytest.mark.parametrize("change", [replace_lock, move, link_to_another, move_away])
def test_a_change_of_the_folder_is_noticed(change, number, tmp_path, monkeypatch):
    if number:  # a drive without locks
        monkeypatch.setattr(fcntl, "flock", failing(number))
    lock = FolderLock(tmp_path / "out")
    lock.acquire(0)
    lock.check()
    change(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(FolderLost):
            lock.check()
    with pytest.raises(FolderLost):
        write_atomically(tmp_path / "out/x", b"", lock)
    assert not (tmp_path / "out/x").exists()


def test_a_same_folder_under_a_link_stays_locked(tmp_path):
    lock = FolderLock(tmp_path / "out")
    lock.acquire(0)
    move(tmp_path / "out")
    (tmp_path / "out").symlink_to(tmp_path / "old")
    lock.check()


def test_a_lock_file_replaced_while_waiting_is_not_used(tmp_path, monkeypatch):
    flock, other = fcntl.flock, FolderLock(tmp_path)

    def replaced_before(file, operation):
        monkeypatch.undo()
        (tmp_path / ".lock").unlink()
        other.acquire(0)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", replaced_before)
    with pytest.raises(UserError):
        FolderLock(tmp_path).acquire(0)
    other.release()
    FolderLock(tmp_path).acquire(0)


@pytest.mark.parametrize("n", range(2, 11))
def test_prepare_writes_nothing_into_another_folder(n, play, tmp_path, monkeypatch):
    """The folder is moved during the n-th fsync of a preparation; the first one is of its parent,
    before it is locked."""
    config, fsync, calls = (
        prepare.PrepareConfig("x", data_dir=str(tmp_path)),
        os.fsync,
        [],
    )

    def move_at_n(file):
        calls.append(file)
        fsync(file)
        if len(calls) == n:
            move_away(tmp_path / "x")

    monkeypatch.setattr(os, "fsync", move_at_n)
    with pytest.raises(FolderLost), ExitStack() as opened:
        prepare.prepare(config, {"tokenizer": "char"}, [str(play)], opened)
    assert set(contents(tmp_path / "x").values()) == {FOREIGN}


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


@pytest.mark.parametrize(
    "change, left",
    [
        (replace, [1, 2, 3, 4]),
        (Path.unlink, [2, 3, 4]),
        (lambda path: path.write_bytes(b""), [2, 3, 4]),
        (lambda path: path.write_bytes(b'{"step": 1}'), [1, 2, 3, 4]),
        (
            lambda path: replace(path) or os.truncate(path, path.stat().st_size - 1),
            [1, 2, 3, 4],
        ),
    ],
)
def test_rows_go_to_the_metrics_file_that_is_there(change, left, tmp_path, capsys):
    metrics = Metrics(tmp_path, 0, False)
    metrics.log({"step": 1})
    metrics.sync()
    metrics.log({"step": 2})
    change(tmp_path / "metrics.jsonl")
    metrics.log({"step": 3})
    metrics.sync()
    metrics.log({"step": 4})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == left
    assert capsys.readouterr().err.count("metrics.jsonl") == 1


# network drives

UNSUPPORTED = [
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTTY,
    errno.EBADF,
]


@pytest.fixture(autouse=True)
def forget_notes():
    errors.TOPICS.clear()


@pytest.mark.parametrize("number", UNSUPPORTED)
def test_a_drive_without_fsync_of_folders_gets_one_note(
    number, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(os, "fsync", failing(number))
    for _ in range(2):
        sync_folder(tmp_path)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(tmp_path) in err


@pytest.mark.parametrize("number", [*set(UNSUPPORTED) - {errno.EACCES}, errno.ENOLCK])
def test_a_drive_without_locks_gets_one_note(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    lock = FolderLock(tmp_path)
    lock.acquire(0)
    lock.check()
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(tmp_path) in err


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_held_lock_is_a_mistake(number, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(UserError):
        FolderLock(tmp_path).acquire(0)


@pytest.mark.parametrize("number", ["EINVAL", "EOPNOTSUPP"])
def test_a_run_on_a_network_drive_saves_and_resumes(number, dataset, tmp_path):
    out = tmp_path / "out"
    flags = TINY | {
        "dataset": dataset,
        "out_dir": out,
        "checkpoint_interval": 1,
        "keep_checkpoints": 2,
        "init_from": "auto",
    }
    for steps in (2, 4):
        flags["max_iters"] = steps
        done = run(PROGRAMS / "network_drive.py", env={"NUMBER": number}, **flags)
        notes = [line for line in done.stderr.splitlines() if " drive " in line]
        assert len(notes) == 3
        assert all(note.startswith("note: ") for note in notes)
        assert "saved in" in done.stdout.splitlines()[-2]
        kept = sorted(path.name for path in out.glob("ckpt-*"))
        assert kept == [f"ckpt-{step:08}.pt" for step in (steps - 1, steps)]


def test_a_failing_network_drive_is_an_error_to_retry(dataset, tmp_path):
    flags = {"env": {"NUMBER": "EIO"}, "dataset": dataset, "out_dir": tmp_path / "out"}
    done = run(PROGRAMS / "network_drive.py", code=1, **flags)
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path) in done.stderr


# errors of the operating system


def make_file(path: Path) -> None:
    path.touch()


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [make_file, make_link_to_nothing, make_link_to_itself])
def test_a_folder_that_is_none_exits_2(make, dataset, play, tmp_path):
    path = tmp_path / "x"
    make(path)
    for script, args in (
        ("train.py", {"out_dir": path, "dataset": dataset}),
        ("train.py", {"out_dir": path / "below", "dataset": dataset}),
        ("sample.py", {"out_dir": path}),
        ("prepare.py", {"name": "x", "data_dir": tmp_path, "tokenizer": "char"}),
    ):
        args = ([play], args) if script == "prepare.py" else ([], args)
        line = complaint(run(script, *args[0], code=2, **args[1]))
        assert f"{tmp_path.name}/x" in line
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "call", ["os.fsync", "pathlib.Path.write_bytes", "fcntl.flock", "os.pwrite"]
)
def test_an_error_of_the_disk_names_its_path(call, tmp_path, monkeypatch):
    metrics, named = Metrics(tmp_path, 0, False), 0
    monkeypatch.setattr(call, failing(errno.EIO))
    for work in (
        lambda: write_atomically(tmp_path / "x", b"x"),
        lambda: sync_folder(tmp_path),
        FolderLock(tmp_path).acquire,
        metrics.sync,
    ):
        metrics.rows = b"row"
        try:
            work(0) if work.__name__ == "acquire" else work()
        except OSError as e:
            assert str(tmp_path) in str(e)
            named += 1
    assert named == {"os.fsync": 3}.get(call, 1)


def test_a_read_error_of_the_tokens_names_the_file(dataset, monkeypatch):
    split = Split(dataset, "train", read_meta(dataset), 8, 1, True)
    monkeypatch.setattr(os, "pread", failing(errno.EIO))
    with pytest.raises(OSError, match="train.bin"):
        split.read(0, 1)


def test_a_read_error_of_the_text_names_the_file(play):
    with open(play) as file:
        file.path = play
        os.close(file.fileno())
        os.open(
            "/proc/self/mem", os.O_RDONLY
        )  # the same descriptor; reading it gives EIO
        with pytest.raises(OSError, match=play.name):
            read_block(file, 9)


def test_a_full_stdout_is_named(play, tmp_path):
    flags = {"name": "x", "tokenizer": "char", "data_dir": tmp_path}
    done = run("prepare.py", play, code=1, stdout="/dev/full", **flags)
    assert "stdout" in done.stderr
    assert len(done.stderr.splitlines()) == 1


RETRY = "ENOSPC EIO ESTALE EDQUOT ETIMEDOUT EMFILE ENOLCK EBUSY"
FIX = "ENOENT EEXIST EACCES EROFS ELOOP ENOTDIR EFBIG EOPNOTSUPP"


@pytest.mark.parametrize(
    "code, names",
    [(EXIT_FAILED, RETRY), (EXIT_MISTAKE, FIX)],
    ids=["retry", "fix"],
)
def test_an_errno_decides_whether_to_try_again(code, names):
    def fail_with_a_hint():
        try:
            failing(number)()
        except OSError as e:
            raise UserError("a hint") from e

    for name in names.split():
        number = getattr(errno, name)
        assert exit_code(OSError(number, "")) == code
        with pytest.raises(SystemExit) as e:
            errors.run_or_exit(fail_with_a_hint)
        assert e.value.code == code


# exports


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Return a file of random weights."""
    args, path = ModelArgs(1, 1, 32, 32, 60, True, 0.0), tmp_path / "weights.pt"
    torch.save(
        {
            "model": build_model(args).state_dict(),
            "model_args": vars(args),
            "data": {
                "tokenizer": {
                    "kind": "char",
                    "chars": "".join(map(chr, range(40, 100))),
                }
            },
        },
        path,
    )
    return path


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 130), (signal.SIGKILL, -9)], ids=["TERM", "KILL"]
)
def test_a_killed_export_leaves_nothing_for_ever(number, code, weights, tmp_path):
    flags = {"init_from": weights, "to": tmp_path / "to"}
    env = {"NUMBER": str(int(number))}
    run(PROGRAMS / "killed_export.py", code=code, env=env, **flags)
    left = {path.name for path in tmp_path.iterdir()} - {weights.name}
    assert "to" not in left
    assert number == signal.SIGKILL or not left
    run("tools.export", **flags)
    assert {path.name for path in tmp_path.iterdir()} == {weights.name, "to"}
    assert not list((tmp_path / "to").glob(".*"))


def test_two_exports_to_one_target_do_not_mix(weights, tmp_path):
    lock = FolderLock(tmp_path / "to.export.tmp")
    lock.acquire(0)
    done = run("tools.export", init_from=weights, to=tmp_path / "to", code=2)
    assert "another process" in complaint(done)
    assert contents(lock.folder) == {".lock": b""} and not (tmp_path / "to").exists()
