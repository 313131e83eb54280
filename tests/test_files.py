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
from conftest import PROGRAMS, TINY, read_error, run, start

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


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def move_away(folder: Path) -> None:
    """Move a folder to old and create another process's there, with all names in use."""
    names = {path.name for path in folder.iterdir()}
    # names of files that a preparation writes later
    names |= {".lock", "meta.json.tmp", "train.bin.tmp", "val.bin.tmp"}
    folder.rename(folder.with_name("old"))
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(FOREIGN)


def make_failing(number: int):
    """Return a function that raises OSError with that number."""

    # without a path, as for a descriptor
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


# a folder that is not the locked one


# a person or another program may change the folder of a run in these ways
def replace_lock(out: Path) -> None:
    (out / ".lock").unlink()


def move(out: Path) -> None:
    out.rename(out.with_name("old"))


def link_to_another(out: Path) -> None:
    move(out)
    out.with_name("another").mkdir()
    out.symlink_to(out.with_name("another"))


def assert_one_line(text: str, path: Path) -> None:
    """Raise AssertionError unless the text is one line that names the path."""
    assert len(text.splitlines()) == 1
    assert str(path) in text


def start_run(dataset: Path, out: Path, ranks: int = 1):
    """Start a run without an end, and wait for its first checkpoint."""
    flags = TINY | {"dataset": dataset, "out_dir": out, "eval_interval": 3}
    flags |= {"max_iters": 10**6, "lr_decay_iters": 10**6}
    process = start("train.py", ranks=ranks, **flags)
    # a run that has ended makes no checkpoint any more
    while not (out / "ckpt.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [replace_lock, link_to_another], ids=["lock", "link"]
)
def test_two_runs_never_mix_after_a_change_of_the_folder(change, dataset, tmp_path):
    out = tmp_path / "out"
    first = start_run(dataset, out)
    change(out)

    # another run starts there, and the first one must not write over its files
    flags = TINY | {"dataset": dataset, "max_iters": 2, "eval_interval": 1}
    init_from = "auto" if (out / "ckpt.pt").exists() else "scratch"
    run("train.py", out_dir=out, code=None, init_from=init_from, **flags)
    files = read_files(out)
    _, err = first.communicate(timeout=180)
    assert first.returncode == 2, err
    assert_one_line(err, out)
    assert err.startswith("error: ")
    assert read_files(out) == files


@pytest.mark.slow
def test_a_moved_run_ends_and_its_folder_resumes(dataset, tmp_path):
    out = tmp_path / "out"
    old = tmp_path / "old"
    # its next save notices the move; it must not make the folder again
    process = start_run(dataset, out)
    move(out)
    assert process.wait(timeout=180) == 2
    assert not out.exists()
    step = torch.load(old / "ckpt.pt", weights_only=True)["step"]
    done = run("train.py", out_dir=old, init_from="resume", max_iters=step + 1)
    assert f"at step {step}" in done.stdout


@pytest.mark.slow
def test_all_ranks_end_when_the_folder_is_moved(dataset, tmp_path):
    out = tmp_path / "out"
    process = start_run(dataset, out, ranks=2)
    move(out)
    _, err = process.communicate(timeout=180)
    # torchrun's exit code
    assert process.returncode == 1
    # both ranks may print it, but it is the same line
    lines = {line for line in err.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1, err
    assert not out.exists()


@pytest.mark.parametrize("has_locks", [True, False], ids=["locks", "no-locks"])
@pytest.mark.parametrize(
    "change",
    [replace_lock, move, link_to_another, move_away],
    ids=["lock", "move", "link", "replace"],
)
def test_a_change_of_the_folder_is_noticed(change, has_locks, tmp_path, monkeypatch):
    # on a drive without locks the file's identity must be enough
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", make_failing(errno.ENOLCK))
    lock = FolderLock(tmp_path / "out")
    lock.acquire(0)
    lock.check()
    change(tmp_path / "out")
    # the second time, too
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
    # a user moved the folder to a larger drive and left a link
    (tmp_path / "out").symlink_to(tmp_path / "old")
    lock.check()


def test_a_lock_file_replaced_while_waiting_is_not_used(tmp_path, monkeypatch):
    flock = fcntl.flock
    other = FolderLock(tmp_path)

    # between opening the lock file and locking it, another process replaces it
    def replace_then_lock(file, operation):
        monkeypatch.undo()
        (tmp_path / ".lock").unlink()
        other.acquire(0)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", replace_then_lock)
    with pytest.raises(UserError):
        FolderLock(tmp_path).acquire(0)
    other.release()
    FolderLock(tmp_path).acquire(0)


@pytest.mark.parametrize("n", range(2, 11))
def test_prepare_writes_nothing_into_another_folder(n, play, tmp_path, monkeypatch):
    config = prepare.PrepareConfig("x", data_dir=str(tmp_path))
    fsync = os.fsync
    calls = []

    # the first fsync is of the parent, before the folder is locked
    def move_at_n(file):
        calls.append(file)
        fsync(file)
        if len(calls) == n:
            move_away(tmp_path / "x")

    monkeypatch.setattr(os, "fsync", move_at_n)
    with pytest.raises(FolderLost), ExitStack() as opened:
        prepare.prepare(config, {"tokenizer": "char"}, [str(play)], opened)
    assert set(read_files(tmp_path / "x").values()) == {FOREIGN}


# and metrics.jsonl in these: an editor replaces it by a copy, for example
def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(b'{"step": 1}')


def replace_and_cut(path: Path) -> None:
    replace(path)
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    "change, expected",
    [
        (replace, [1, 2, 3, 4]),
        (Path.unlink, [2, 3, 4]),
        (empty, [2, 3, 4]),
        (cut, [1, 2, 3, 4]),
        (replace_and_cut, [1, 2, 3, 4]),
    ],
    ids=["replaced", "removed", "emptied", "cut", "replaced-and-cut"],
)
def test_rows_go_to_the_metrics_file_that_is_there(change, expected, tmp_path, capsys):
    metrics = Metrics(tmp_path, 0, False)
    metrics.log({"step": 1})
    metrics.sync()
    metrics.log({"step": 2})
    # row 1 is on the disk, row 2 is not
    change(tmp_path / "metrics.jsonl")
    metrics.log({"step": 3})
    metrics.sync()
    metrics.log({"step": 4})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == expected
    # one note, however many rows follow
    assert capsys.readouterr().err.count("metrics.jsonl") == 1


# network drives

# what drives answer to an operation that they lack
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
    """Let each test print its notes: a process prints each only once."""
    errors.TOPICS.clear()


@pytest.mark.parametrize("number", UNSUPPORTED, ids=errno.errorcode.get)
def test_a_drive_without_fsync_of_folders_gets_one_note(
    number, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(os, "fsync", make_failing(number))
    # two folders or two saves: one note
    for _ in range(2):
        sync_folder(tmp_path)
    assert_one_line(capsys.readouterr().err, tmp_path)


# EACCES means that another process has the lock
NO_LOCKS = sorted(set(UNSUPPORTED) - {errno.EACCES} | {errno.ENOLCK})


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_a_drive_without_locks_gets_one_note(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", make_failing(number))
    lock = FolderLock(tmp_path)
    lock.acquire(0)
    lock.check()
    assert_one_line(capsys.readouterr().err, tmp_path)


@pytest.mark.parametrize(
    "number", [errno.EAGAIN, errno.EACCES], ids=errno.errorcode.get
)
def test_a_held_lock_is_a_mistake(number, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", make_failing(number))
    with pytest.raises(UserError):
        FolderLock(tmp_path).acquire(0)


@pytest.mark.parametrize("number", ["EINVAL", "EOPNOTSUPP"])
def test_a_run_on_a_network_drive_saves_and_resumes(number, dataset, tmp_path):
    out = tmp_path / "out"
    # without links each name of a checkpoint is a copy, and old ones must still go
    flags = TINY | {
        "dataset": dataset,
        "out_dir": out,
        "checkpoint_interval": 1,
        "keep_checkpoints": 2,
        "init_from": "auto",
    }
    env = {"NUMBER": number}
    for max_iters in (2, 4):
        flags["max_iters"] = max_iters
        done = run(PROGRAMS / "network_drive.py", env=env, **flags)
        # no locks, no links, no fsync of folders
        notes = [line for line in done.stderr.splitlines() if " drive " in line]
        assert len(notes) == 3
        for note in notes:
            assert note.startswith("note: ")
        assert "saved in" in done.stdout.splitlines()[-2]

        # the newest two
        names = sorted(path.name for path in out.glob("ckpt-*"))
        steps = (max_iters - 1, max_iters)
        assert names == [f"ckpt-{step:08}.pt" for step in steps]


def test_a_failing_network_drive_is_an_error_to_retry(dataset, tmp_path):
    # EIO is a fault of the drive, not something that it lacks
    done = run(
        PROGRAMS / "network_drive.py",
        code=1,
        env={"NUMBER": "EIO"},
        dataset=dataset,
        out_dir=tmp_path / "out",
    )
    assert_one_line(done.stderr, tmp_path)


# errors of the operating system


def make_file(path: Path) -> None:
    path.touch()


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    "make",
    [make_file, make_link_to_nothing, make_link_to_itself],
    ids=["file", "broken-link", "loop"],
)
def test_a_folder_that_is_none_exits_2(make, dataset, play, tmp_path):
    path = tmp_path / "x"
    make(path)
    prepare_flags = {"name": "x", "data_dir": tmp_path, "tokenizer": "char"}
    for args, flags in (
        (["train.py"], {"out_dir": path, "dataset": dataset}),
        (["train.py"], {"out_dir": path / "below", "dataset": dataset}),
        (["sample.py"], {"out_dir": path}),
        (["prepare.py", play], prepare_flags),
    ):
        done = run(*args, code=2, **flags)
        assert f"{tmp_path.name}/x" in read_error(done)
    # nothing is written through the link
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "call", ["os.fsync", "pathlib.Path.write_bytes", "fcntl.flock", "os.pwrite"]
)
def test_an_error_of_the_disk_names_its_path(call, tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, 0, False)
    named = 0
    monkeypatch.setattr(call, make_failing(errno.EIO))
    for work in (
        lambda: write_atomically(tmp_path / "x", b"x"),
        lambda: sync_folder(tmp_path),
        lambda: FolderLock(tmp_path).acquire(0),
        metrics.sync,
    ):
        metrics.rows = b"row"
        try:
            work()
        except OSError as e:
            assert str(tmp_path) in str(e)
            named += 1
    # three of them sync, the other calls are made by one each
    assert named == {"os.fsync": 3}.get(call, 1)


def test_a_read_error_of_the_tokens_names_the_file(dataset, monkeypatch):
    # it fails after the files were opened
    split = Split(dataset, "train", read_meta(dataset), 8, 1, True)
    monkeypatch.setattr(os, "pread", make_failing(errno.EIO))
    with pytest.raises(OSError, match="train.bin"):
        split.read(0, 1)


def test_a_read_error_of_the_text_names_the_file(play):
    with open(play) as file:
        file.path = play
        # the lowest free descriptor is the same one; reading this file gives EIO
        os.close(file.fileno())
        os.open("/proc/self/mem", os.O_RDONLY)
        with pytest.raises(OSError, match=play.name):
            read_block(file, 9)


def test_a_full_stdout_is_named(play, tmp_path):
    flags = {"name": "x", "tokenizer": "char", "data_dir": tmp_path}
    # /dev/full answers each write with ENOSPC
    done = run("prepare.py", play, code=1, stdout="/dev/full", **flags)
    assert "stdout" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# errors that may go away by themselves, and those that need a change by the user
RETRY = "ENOSPC EIO ESTALE EDQUOT ETIMEDOUT EMFILE ENOLCK EBUSY"
FIX = "ENOENT EEXIST EACCES EROFS ELOOP ENOTDIR EFBIG EOPNOTSUPP"


@pytest.mark.parametrize(
    "code, names",
    [(EXIT_FAILED, RETRY), (EXIT_MISTAKE, FIX)],
    ids=["retry", "fix"],
)
def test_an_errno_decides_whether_to_try_again(code, names):
    # a hint keeps the code of the error that caused it
    def fail_with_a_hint():
        try:
            make_failing(number)()
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
    args = ModelArgs(1, 1, 32, 32, 60, True, 0.0)
    chars = "".join(map(chr, range(40, 100)))
    checkpoint = {
        "model": build_model(args).state_dict(),
        "model_args": vars(args),
        "data": {"tokenizer": {"kind": "char", "chars": chars}},
    }
    path = tmp_path / "weights.pt"
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 130), (signal.SIGKILL, -9)],
    ids=["TERM", "KILL"],
)
def test_a_killed_export_leaves_nothing_for_ever(number, code, weights, tmp_path):
    flags = {"init_from": weights, "to": tmp_path / "to"}
    env = {"NUMBER": str(int(number))}
    run(PROGRAMS / "killed_export.py", code=code, env=env, **flags)
    left = {path.name for path in tmp_path.iterdir()} - {weights.name}
    assert "to" not in left
    # only SIGKILL leaves no time to clean up
    if number == signal.SIGTERM:
        assert not left

    # the next export removes the rest
    run("tools.export", **flags)
    assert {path.name for path in tmp_path.iterdir()} == {weights.name, "to"}
    assert not list((tmp_path / "to").glob(".*"))


def test_two_exports_to_one_target_do_not_mix(weights, tmp_path):
    # an export that is running holds this lock
    lock = FolderLock(tmp_path / "to.export.tmp")
    lock.acquire(0)
    done = run("tools.export", init_from=weights, to=tmp_path / "to", code=2)
    assert "another process" in read_error(done)
    assert read_files(lock.folder) == {".lock": b""}
    assert not (tmp_path / "to").exists()
