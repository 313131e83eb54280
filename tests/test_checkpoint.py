"""Saving and reading checkpoints: cases that tools.crash does not cover."""

import errno
import io
import math
import os
import pickle
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROGRAMS, TINY, run

from keepgpt import checkpoint, errors
from keepgpt.checkpoint import (
    CorruptCheckpoint,
    Disk,
    Saver,
    commit,
    find_bundle,
    list_numbered,
    path_of,
    read_bundle,
    step_of,
)
from keepgpt.files import FolderLock
from keepgpt.metrics import Metrics
from keepgpt.ranks import Ranks
from train import record_evaluation

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(dataset, tmp_path_factory):
    """Return the bundle of a real run."""
    # two steps: the optimizer has its moments
    out = tmp_path_factory.mktemp("run")
    run("train.py", out_dir=out, dataset=dataset, **TINY | {"max_iters": 2})
    return read_bundle(out / "ckpt.pt")


class FaultyDisk(Disk):
    """A disk one of whose operations is another function."""

    def __init__(self, name, function):
        super().__init__(None)
        setattr(self, name, function)


def make_saver(folder, disk=None, bundle=None):
    """Return a saver that keeps two checkpoints."""
    return Saver(folder, 2, bundle, lambda: None, CPU, disk)


def read_files(folder):
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refuse(*_):
    """Fail as a broken disk does."""
    raise OSError(errno.EIO, "Input/output error")


def test_a_corrupted_write_is_never_committed(bundle, tmp_path):
    # a disk that reports success and stores something else
    def flip_last_bit(file, data):
        changed = bytearray(data)
        changed[-1] ^= 1
        return os.write(file, changed)

    commit(bundle | {"step": 1}, tmp_path, 2, False, Disk())
    disk = FaultyDisk("write", flip_last_bit)
    # more failures than checkpoints are kept
    for step in (2, 3, 4):
        with pytest.raises(CorruptCheckpoint):
            commit(bundle | {"step": step}, tmp_path, 2, False, disk)
    assert find_bundle(tmp_path)[1]["step"] == 1
    names = {path.name for path in tmp_path.glob("*.pt*")}
    assert names == {"ckpt.pt", "ckpt-00000001.pt"}


def test_a_checkpoint_that_cannot_be_removed_is_no_failure(bundle, tmp_path, capsys):
    saver = make_saver(tmp_path, FaultyDisk("remove", refuse))
    # the third save removes the first checkpoint
    for step in (1, 2, 3):
        loss = 9.0 - step
        saver.save(bundle | {"step": step, "best_val_loss": loss}, best=True)
        assert saver.wait()
        assert saver.best_val_loss == loss
    assert "can't be removed" in capsys.readouterr().err
    # the save itself is complete
    assert read_bundle(tmp_path / "best.pt")["step"] == 3


def test_a_failed_save_restores_best_val_loss(bundle, tmp_path):
    resumed = bundle | {"best_val_loss": 9.0}
    better = bundle | {"step": 7, "best_val_loss": 5.0}
    saver = make_saver(tmp_path, FaultyDisk("fsync", refuse), resumed)
    saver.save(better, best=True)
    assert not saver.wait()
    assert saver.best_val_loss == 9.0

    # when the folder is synced, best.pt is in place
    saver.disk = FaultyDisk("fsync_folder", refuse)
    saver.save(better, best=True)
    assert not saver.wait()
    assert saver.best_val_loss == 5.0


@pytest.mark.parametrize(
    "number",
    [
        errno.EPERM,
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.EMLINK,
        errno.EXDEV,
        errno.EINVAL,
    ],
    ids=errno.errorcode.get,
)
def test_a_drive_without_links_saves_copies(
    bundle, tmp_path, capsys, monkeypatch, number
):
    def refuse_operation(*_):
        raise OSError(number, os.strerror(number))

    # earlier tests of this process may have printed the note, which is printed once
    monkeypatch.setattr(errors, "TOPICS", set())
    disk = FaultyDisk("link", refuse_operation)
    for step in (1, 2, 3):
        commit(bundle | {"step": step}, tmp_path, 2, True, disk)
    assert read_bundle(tmp_path / "ckpt.pt")["step"] == 3
    assert read_bundle(tmp_path / "best.pt")["step"] == 3
    steps = [step_of(path) for path in list_numbered(tmp_path)]
    assert steps == [3, 2]
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1


def test_a_link_that_fails_with_eio_is_an_error(bundle, tmp_path):
    # unlike the numbers above, EIO does not say that the drive has no links
    bundle = bundle | {"step": 1}
    with pytest.raises(OSError, match="ckpt-00000001.pt"):
        commit(bundle, tmp_path, 2, False, FaultyDisk("write", refuse))
    with pytest.raises(OSError, match="Input/output"):
        commit(bundle, tmp_path, 2, False, FaultyDisk("link", refuse))


class MovingDisk(Disk):
    """A disk on which the folder is moved before the n-th operation. Another run's is then in its
    place."""

    def __init__(self, lock, bundle, n):
        super().__init__(lock)
        self.bundle = bundle
        self.n = n
        self.count = 0
        self.files = None
        for name in vars(Disk):
            if not name.startswith("_"):
                setattr(self, name, partial(self.perform, name, lock.folder))

    def perform(self, name, folder, *args):
        """Do an operation of Disk, after moving the folder if its turn has come."""
        # there are many writes, and all are alike
        if name != "write":
            self.count += 1
        if self.count == self.n and not self.files:
            self.replace_folder(folder)
        return getattr(super(), name)(*args)

    def replace_folder(self, folder):
        """Move the folder to old, and save another run's checkpoint in its place."""
        folder.rename(folder.with_name("old"))
        folder.mkdir()
        commit(self.bundle | {"step": 9}, folder, 2, True, Disk())
        # names that the save uses, too
        names = ["ckpt-00000003.pt.tmp", "best.pt.tmp", "ckpt.pt.tmp", ".lock"]
        for name in names:
            (folder / name).touch()
        self.files = read_files(folder)


def test_no_operation_of_a_save_touches_another_folder(bundle, tmp_path):
    # until the save has fewer than n operations
    for n in range(1, 100):
        folder = tmp_path / str(n) / "out"
        lock = FolderLock(folder)
        lock.acquire(0)
        # two checkpoints: the next save removes the first one
        disk = Disk(lock)
        commit(bundle | {"step": 1}, folder, 2, True, disk)
        commit(bundle | {"step": 2}, folder, 2, True, disk)
        (folder / "stray.pt.tmp").touch()
        disk = MovingDisk(lock, bundle, n)
        saver = make_saver(folder, disk)
        saver.save(bundle | {"step": 3}, best=True)
        saved = saver.wait()
        if not disk.files:
            break

        assert read_files(folder) == disk.files
        # a save that failed may have been complete before the move
        step = find_bundle(folder.with_name("old"))[1]["step"]
        assert step == 3 or (step == 2 and not saved)
    # the folder stayed during the last save, and moved during more than ten
    assert n > 10
    assert saved


def test_another_format_is_refused(bundle, tmp_path):
    # as a later version could write it
    checkpoint.write_bundle(bundle | {"format": 2}, tmp_path / "x.pt", Disk())
    with pytest.raises(CorruptCheckpoint):
        read_bundle(tmp_path / "x.pt")


def test_any_malformed_pickle_is_refused(bundle, tmp_path):
    # a pickle without its end and one without its start; the others are none
    whole = pickle.dumps({"a": [1, 2.5, "x"]}, protocol=2)
    parts = (whole[:-1], whole[5:])
    for content in (b"", b".", b"\x80\x02", *parts, b"0" * 9, b"R."):
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w") as file:
            file.writestr("x/data.pkl", content)
            file.writestr("x/version", "3")
        # the checksum is right, so only the pickle can be refused
        archive = memory.getvalue()
        crc32 = checkpoint.zlib.crc32(archive).to_bytes(4, "little")
        (tmp_path / "x.pt").write_bytes(archive + checkpoint.MAGIC + crc32)
        with pytest.raises(CorruptCheckpoint):
            read_bundle(tmp_path / "x.pt")


def test_rows_survive_a_failed_fsync(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, 0, False)
    path = tmp_path / "metrics.jsonl"
    metrics.log({"step": 1})
    metrics.sync()
    metrics.log({"step": 2})
    monkeypatch.setattr(os, "fsync", refuse)
    for _ in range(2):
        with pytest.raises(OSError):
            metrics.sync()
    monkeypatch.undo()
    metrics.log({"step": 3})
    # the kernel dropped the page that it could not write
    os.truncate(path, len('{"step": 1}\n'))
    metrics.sync()
    metrics.log({"step": 4})
    expected = [f'{{"step": {i}}}\n' for i in (1, 2, 3, 4)]
    assert path.read_text() == "".join(expected)
    # no temporary files
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "failures, code, printed",
    [(1, 0, "saved in"), (2, 1, "NOT SAVED in")],
    ids=["once", "twice"],
)
def test_the_last_save_is_retried_once(dataset, tmp_path, failures, code, printed):
    flags = TINY | {"max_iters": 2, "dataset": dataset, "out_dir": tmp_path}
    env = {"FAILURES": str(failures)}
    done = run(PROGRAMS / "failing_fsync.py", code=code, env=env, **flags)
    assert printed in done.stdout.splitlines()[-2], done.stderr
    assert done.stderr.count("FAILED: [Errno 5]") == failures
    assert not list(tmp_path.glob("*.tmp"))
    # without the second attempt nothing was saved
    assert (tmp_path / "ckpt.pt").exists() == (code == 0)


# the user id of Linux for a user without privileges
NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_privileges_can_save(bundle):
    # pytest's own temporary folder is root's alone
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY, NOBODY)
        # in a fork: this process stays root
        pid = os.fork()
        if not pid:
            # a saver's thread asks for 10, a higher priority, which only root may have
            os.nice(15)
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            saver = make_saver(Path(name))
            saver.save(bundle, best=True)
            os._exit(0 if saver.wait() else 1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert (Path(name) / "best.pt").exists()


def test_an_evaluation_waits_for_a_best_save(bundle, tmp_path):
    slow_disk = FaultyDisk("fsync", lambda *_: time.sleep(0.5))
    saver = make_saver(tmp_path, slow_disk)
    saver.save(bundle | {"step": 1, "best_val_loss": 5.0}, best=True)
    # it is still being saved: without waiting, 6.0 would be the best loss so far
    state = SimpleNamespace(step=2)
    run = SimpleNamespace(state=state, ranks=Ranks(0, 1, CPU), saver=saver)
    assert not record_evaluation(run, {"val_loss": 6.0})
    assert record_evaluation(run, {"val_loss": 4.0})


def test_best_is_resumed_when_ckpt_has_lost_its_end(bundle, tmp_path):
    commit(bundle, tmp_path, 2, True, Disk())
    for path in tmp_path.glob("ckpt*.pt"):
        path.unlink()
    # an intact zip without keepGPT's checksum
    torch.save(bundle, tmp_path / "ckpt.pt")
    assert find_bundle(tmp_path)[1]["step"] == bundle["step"]


def test_steps_of_nine_digits_are_the_newest(bundle, tmp_path):
    # names have eight digits: sorted as text, those with nine would come first
    for step in (99_999_999, 100_000_000, 100_000_001):
        commit(bundle | {"step": step}, tmp_path, 2, False, Disk())
    steps = [step_of(path) for path in list_numbered(tmp_path)]
    assert steps == [100_000_001, 100_000_000]


def test_renamed_checkpoints_are_mentioned(bundle, dataset, tmp_path):
    # names that a person, a browser, an editor or a file manager gives
    out = tmp_path / "out"
    names = [
        "my-best.pt",
        "ckpt-00000100 (1).pt",
        "ckpt.pt.bak",
        "ckpt-2.pt",
        "copy of ckpt",
    ]
    out.mkdir()
    for name in names:
        checkpoint.write_bundle(bundle, out / name, Disk())
    (out / "notes.pt").write_bytes(b"something else, not a checkpoint")

    # without a checkpoint to use, and with the one that a run has saved
    flags = {"out_dir": out, "init_from": "auto", "dataset": dataset}
    flags = TINY | flags | {"eval_interval": 1}
    for done in (
        run("sample.py", out_dir=out, code=2),
        run("train.py", **flags | {"max_iters": 3}),
        run("train.py", **flags | {"max_iters": 4}),
        run("sample.py", out_dir=out, max_new_tokens=1, num_samples=1),
    ):
        lines = done.stderr.splitlines()
        [note] = [line for line in lines if "not used because" in line]
        assert "notes.pt" not in note
        assert "--init_from" in note
        for name in names:
            assert str(out / name) in note

    # the note's advice works, and nothing was removed
    flags = {"max_new_tokens": 1, "num_samples": 1}
    done = run("sample.py", init_from=out / names[1], **flags)
    assert "note: " not in done.stderr
    assert set(names) < set(read_files(out))


# counters, flags, moments and nested lists of all dtypes
STATES = {
    "int": 3,
    "float": 0.5,
    "None": None,
    "bool": True,
    "text": "x",
    "int tensor": torch.tensor([1, 2]),
    "bool tensor": torch.tensor([True]),
    "empty tensor": torch.empty(0),
    "list": [torch.ones(2), 3, {"a": torch.ones(1)}],
    "complex": torch.ones(2, dtype=torch.complex64),
    "float8": torch.ones(2).to(torch.float8_e4m3fn),
}


def replace_state(bundle, state):
    """Return the bundle with this state of the first parameter in the optimizer."""
    optimizer = bundle["optimizer"] | {"state": {0: {"x": state}}}
    return bundle | {"optimizer": optimizer}


@pytest.mark.parametrize("kind", STATES)
def test_an_optimizer_may_keep_any_plain_state(bundle, tmp_path, capsys, kind):
    # an optimizer that a user adds may have any of these
    changed = replace_state(bundle, STATES[kind])
    saver = make_saver(tmp_path)
    saver.save(changed, best=False)
    assert saver.wait(), capsys.readouterr().err
    saved = read_bundle(tmp_path / "ckpt.pt")
    assert str(saved["optimizer"]) == str(changed["optimizer"])


@pytest.mark.parametrize(
    "state",
    [
        torch.tensor([1.0, math.nan]),
        [{"a": torch.tensor(math.inf)}],
        torch.tensor([complex(0, math.inf)]),
        torch.tensor(math.nan).to(torch.float8_e4m3fn),
    ],
    ids=["nan", "nested", "complex", "float8"],
)
def test_a_state_that_is_not_finite_is_never_saved(bundle, tmp_path, capsys, state):
    saver = make_saver(tmp_path)
    saver.save(replace_state(bundle, state), best=False)
    assert not saver.wait()
    assert "optimizer/0/x" in capsys.readouterr().err
    assert not path_of(tmp_path, bundle["step"]).exists()


def test_a_state_may_change_its_shape_between_saves(bundle, tmp_path):
    saver = make_saver(tmp_path)
    # a saver reuses the memory of its last copy
    sizes = {1: 3, 2: 1, 3: 5}
    for step, size in sizes.items():
        tensor = torch.ones(size)
        changed = replace_state(bundle | {"step": step}, tensor)
        saver.save(changed, best=False)
        assert saver.wait()
        saved = read_bundle(tmp_path / "ckpt.pt")
        state = saved["optimizer"]["state"]
        assert torch.equal(state[0]["x"], tensor)
