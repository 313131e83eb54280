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
    numbered,
    path_of,
    read_bundle,
    read_newest,
    step_of,
)
from keepgpt.files import FolderLock
from keepgpt.metrics import Metrics
from keepgpt.ranks import Ranks
from train import record_evaluation


@pytest.fixture(scope="module")
def bundle(dataset, tmp_path_factory):
    """Return the bundle of a real run."""
    out = tmp_path_factory.mktemp("run")
    run("train.py", out_dir=out, dataset=dataset, **TINY | {"max_iters": 2})
    return read_bundle(out / "ckpt.pt")


class Faulty(Disk):
    """Replace one operation of a Disk."""

    def __init__(self, name, instead, lock=None):
        super().__init__(lock)
        setattr(self, name, instead)


def refuse(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_a_corrupted_write_is_never_committed(bundle, tmp_path):
    def flipping(file, data):
        return os.write(file, bytes(data)[:-1] + bytes([bytes(data)[-1] ^ 1]))

    commit(bundle | {"step": 1}, tmp_path, 2, False, Disk())
    for step in (2, 3, 4):
        with pytest.raises(CorruptCheckpoint):
            commit(
                bundle | {"step": step}, tmp_path, 2, False, Faulty("write", flipping)
            )
    assert read_newest(tmp_path)["step"] == 1
    assert {p.name for p in tmp_path.glob("*.pt*")} == {"ckpt.pt", "ckpt-00000001.pt"}


def test_a_checkpoint_that_cannot_be_removed_is_no_failure(bundle, tmp_path, capsys):
    saver = Saver(
        tmp_path, 2, None, lambda: None, torch.device("cpu"), Faulty("remove", refuse)
    )
    for step in (1, 2, 3):
        saver.save(bundle | {"step": step, "best_val_loss": 9.0 - step}, best=True)
        assert saver.wait() and saver.best_val_loss == 9.0 - step
    assert "can't be removed" in capsys.readouterr().err
    assert read_bundle(tmp_path / "best.pt")["step"] == 3


def test_a_failed_save_restores_best_val_loss(bundle, tmp_path):
    saver = Saver(
        tmp_path,
        2,
        bundle | {"best_val_loss": 9.0},
        lambda: None,
        torch.device("cpu"),
        Faulty("fsync", refuse),
    )
    saver.save(bundle | {"step": 7, "best_val_loss": 5.0}, best=True)
    assert not saver.wait()
    assert saver.best_val_loss == 9.0
    saver.disk = Faulty("fsync_folder", refuse)  # best.pt is there by then
    saver.save(bundle | {"step": 7, "best_val_loss": 5.0}, best=True)
    assert not saver.wait() and saver.best_val_loss == 5.0


@pytest.mark.parametrize(
    "number",
    [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL],
    ids=errno.errorcode.get,
)
def test_a_drive_without_links_saves_copies(
    bundle, tmp_path, capsys, monkeypatch, number
):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(errors, "TOPICS", set())
    for step in (1, 2, 3):
        commit(bundle | {"step": step}, tmp_path, 2, True, Faulty("link", unsupported))
    assert all(
        read_bundle(tmp_path / name)["step"] == 3 for name in ("ckpt.pt", "best.pt")
    )
    assert [step_of(path) for path in numbered(tmp_path)] == [3, 2]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_link_that_fails_with_eio_is_an_error(bundle, tmp_path):
    with pytest.raises(OSError, match="ckpt-00000001.pt"):
        commit(bundle | {"step": 1}, tmp_path, 2, False, Faulty("write", refuse))
    with pytest.raises(OSError, match="Input/output"):
        commit(bundle | {"step": 1}, tmp_path, 2, False, Faulty("link", refuse))


class MovingDisk(Disk):
    """Move the folder before the n-th operation and put another run's in its place."""

    def __init__(self, lock, bundle, n):
        super().__init__(lock)
        self.bundle, self.n, self.count, self.found = bundle, n, 0, None
        for name in [name for name in vars(Disk) if name[0] != "_"]:
            setattr(self, name, partial(self.perform, name, lock.folder))

    def perform(self, name, folder, *args):
        self.count += name != "write"  # there are many
        if self.count == self.n and not self.found:
            folder.rename(folder.with_name("old"))
            folder.mkdir()
            commit(self.bundle | {"step": 9}, folder, 2, True, Disk())
            for other in (
                "ckpt-00000003.pt.tmp",
                "best.pt.tmp",
                "ckpt.pt.tmp",
                ".lock",
            ):
                (folder / other).touch()
            self.found = contents(folder)
        return getattr(super(), name)(*args)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_operation_of_a_save_touches_another_folder(bundle, tmp_path):
    for n in range(1, 100):
        folder = tmp_path / str(n) / "out"
        lock = FolderLock(folder)
        lock.acquire(0)
        for step in (1, 2):  # one of them is removed by the next save
            commit(bundle | {"step": step}, folder, 2, True, Disk(lock))
        (folder / "stray.pt.tmp").touch()
        disk = MovingDisk(lock, bundle, n)
        saver = Saver(folder, 2, None, lambda: None, torch.device("cpu"), disk)
        saver.save(bundle | {"step": 3}, best=True)
        saved = saver.wait()
        if not disk.found:
            break
        assert contents(folder) == disk.found
        assert read_newest(folder.with_name("old"))["step"] in (
            (3,) if saved else (2, 3)
        )
    assert n > 10 and saved


def test_another_format_is_refused(bundle, tmp_path):
    checkpoint.write_bundle(bundle | {"format": 2}, tmp_path / "x.pt", Disk())
    with pytest.raises(CorruptCheckpoint):
        read_bundle(tmp_path / "x.pt")


def test_any_malformed_pickle_is_refused(bundle, tmp_path):
    """The checksum of each file is right."""
    whole = pickle.dumps({"a": [1, 2.5, "x"]}, protocol=2)
    for content in (b"", b".", b"\x80\x02", whole[:-1], whole[5:], b"0" * 9, b"R."):
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w") as file:
            file.writestr("x/data.pkl", content)
            file.writestr("x/version", "3")
        raw = memory.getvalue() + checkpoint.MAGIC
        crc = checkpoint.zlib.crc32(memory.getvalue()).to_bytes(4, "little")
        (tmp_path / "x.pt").write_bytes(raw + crc)
        with pytest.raises(CorruptCheckpoint):
            read_bundle(tmp_path / "x.pt")


def test_rows_survive_a_failed_fsync(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, 0, False)
    path = tmp_path / "metrics.jsonl"
    metrics.log({"step": 1})
    metrics.sync()
    metrics.log({"step": 2})
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError):
        metrics.sync()
    with pytest.raises(OSError):
        metrics.sync()
    monkeypatch.undo()
    metrics.log({"step": 3})
    with open(
        path, "rb+"
    ) as file:  # the kernel dropped the page that it could not write
        file.truncate(len('{"step": 1}\n'))
    metrics.sync()
    metrics.log({"step": 4})
    assert path.read_text() == "".join(f'{{"step": {i}}}\n' for i in (1, 2, 3, 4))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


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
    assert (tmp_path / "ckpt.pt").exists() == (code == 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_privileges_can_save(bundle):
    with (
        tempfile.TemporaryDirectory() as name
    ):  # not in pytest's own, which is root's alone
        os.chown(name, 65534, 65534)
        pid = os.fork()
        if not pid:
            os.nice(15)
            os.setgid(65534)
            os.setuid(65534)
            saver = Saver(Path(name), 2, None, lambda: None, torch.device("cpu"))
            saver.save(bundle, best=True)
            os._exit(0 if saver.wait() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (Path(name) / "best.pt").exists()


def test_an_evaluation_waits_for_a_best_save(bundle, tmp_path):
    cpu = torch.device("cpu")
    slow = Faulty("fsync", lambda *_: time.sleep(0.5))
    saver = Saver(tmp_path, 2, None, lambda: None, cpu, slow)
    saver.save(bundle | {"step": 1, "best_val_loss": 5.0}, best=True)
    run = SimpleNamespace(
        state=SimpleNamespace(step=2), ranks=Ranks(0, 1, cpu), saver=saver
    )
    assert not record_evaluation(run, {"val_loss": 6.0})
    assert record_evaluation(run, {"val_loss": 4.0})


def test_best_is_resumed_when_ckpt_has_lost_its_end(bundle, tmp_path):
    commit(bundle, tmp_path, 2, True, Disk())
    for path in tmp_path.glob("ckpt*.pt"):
        path.unlink()
    torch.save(bundle, tmp_path / "ckpt.pt")  # an intact zip without our checksum
    assert read_newest(tmp_path)["step"] == bundle["step"]


def test_steps_of_nine_digits_are_the_newest(bundle, tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001):
        commit(bundle | {"step": step}, tmp_path, 2, False, Disk())
    assert [step_of(path) for path in numbered(tmp_path)] == [100_000_001, 100_000_000]


def test_renamed_checkpoints_are_mentioned(bundle, dataset, tmp_path):
    out, flags = (
        tmp_path / "out",
        TINY | {"dataset": dataset, "max_iters": 3, "eval_interval": 1},
    )
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
    done = [
        run("sample.py", out_dir=out, code=2),
        run("train.py", out_dir=out, init_from="auto", **flags),
        run("train.py", out_dir=out, init_from="auto", **flags | {"max_iters": 4}),
        run("sample.py", out_dir=out, max_new_tokens=1, num_samples=1),
    ]
    for one in done:
        notes = [line for line in one.stderr.splitlines() if "not used because" in line]
        assert (
            len(notes) == 1 and "notes.pt" not in notes[0] and "--init_from" in notes[0]
        )
        assert all(str(out / name) in notes[0] for name in names)
    used = run("sample.py", init_from=out / names[1], max_new_tokens=1, num_samples=1)
    assert "note: " not in used.stderr and set(names) < set(contents(out))


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


@pytest.mark.parametrize("kind", STATES)
def test_an_optimizer_may_keep_any_plain_state(bundle, tmp_path, capsys, kind):
    changed = bundle | {
        "optimizer": bundle["optimizer"] | {"state": {0: {"x": STATES[kind]}}}
    }
    saver = Saver(tmp_path, 2, None, lambda: None, torch.device("cpu"))
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
)
def test_a_state_that_is_not_finite_is_never_saved(bundle, tmp_path, capsys, state):
    changed = bundle | {"optimizer": bundle["optimizer"] | {"state": {0: {"x": state}}}}
    saver = Saver(tmp_path, 2, None, lambda: None, torch.device("cpu"))
    saver.save(changed, best=False)
    assert not saver.wait() and "optimizer/0/x" in capsys.readouterr().err
    assert not path_of(tmp_path, bundle["step"]).exists()


def test_a_state_may_change_its_shape_between_saves(bundle, tmp_path):
    saver = Saver(tmp_path, 2, None, lambda: None, torch.device("cpu"))
    for step, tensor in enumerate((torch.ones(3), torch.ones(1), torch.ones(5)), 1):
        state = {"state": {0: {"x": tensor}}}
        saver.save(
            bundle | {"step": step, "optimizer": bundle["optimizer"] | state},
            best=False,
        )
        assert saver.wait()
        saved = read_bundle(tmp_path / "ckpt.pt")["optimizer"]["state"][0]["x"]
        assert torch.equal(saved, tensor)
