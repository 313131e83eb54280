"""Saving and reading checkpoints: cases that tools.crash does not cover."""
import errno
import io
import os
import pickle
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, TINY, bits, run

from keepgpt import checkpoint
from keepgpt.checkpoint import CorruptCheckpoint, Disk, Saver, commit, read_bundle, read_newest
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

    def __init__(self, name, instead):
        setattr(self, name, instead)


def refuse(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_a_corrupted_write_is_never_committed(bundle, tmp_path):
    def flipping(file, data):
        return os.write(file, bytes(data)[:-1] + bytes([bytes(data)[-1] ^ 1]))

    commit(bundle | {"step": 1}, tmp_path, 2, False, Disk())
    for step in (2, 3, 4):
        with pytest.raises(CorruptCheckpoint):
            commit(bundle | {"step": step}, tmp_path, 2, False, Faulty("write", flipping))
    assert read_newest(tmp_path)["step"] == 1
    assert {p.name for p in tmp_path.glob("*.pt*")} == {"ckpt.pt", "ckpt-00000001.pt"}


def test_a_checkpoint_that_cannot_be_removed_is_no_failure(bundle, tmp_path, capsys):
    saver = Saver(tmp_path, 2, 9.0, lambda: None, torch.device("cpu"), Faulty("remove", refuse))
    for step in (1, 2, 3):
        saver.save(bundle | {"step": step, "best_val_loss": 9.0 - step}, best=True)
        assert saver.wait() and saver.best_val_loss == 9.0 - step
    assert "can't be removed" in capsys.readouterr().err
    assert read_bundle(tmp_path / "best.pt")["step"] == 3


def test_a_failed_save_restores_best_val_loss(bundle, tmp_path):
    saver = Saver(tmp_path, 2, 9.0, lambda: None, torch.device("cpu"), Faulty("fsync", refuse))
    saver.save(bundle | {"best_val_loss": 5.0}, best=True)
    saver.wait()
    assert saver.best_val_loss == 9.0
    saver.disk = Faulty("fsync_folder", refuse)  # best.pt is there by then
    saver.save(bundle | {"best_val_loss": 5.0}, best=True)
    assert not saver.wait() and saver.best_val_loss == 5.0


def test_a_file_system_without_links(bundle, tmp_path):
    def unsupported(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    for step in (1, 2):
        commit(bundle | {"step": step}, tmp_path, 2, True, Faulty("link", unsupported))
    assert all(read_bundle(tmp_path / name)["step"] == 2 for name in ("ckpt.pt", "best.pt"))


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
    with open(path, "rb+") as file:  # the kernel dropped the page that it could not write
        file.truncate(len('{"step": 1}\n'))
    metrics.sync()
    metrics.log({"step": 4})
    assert path.read_text() == "".join(f'{{"step": {i}}}\n' for i in (1, 2, 3, 4))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_last_save_is_retried_once(dataset, train, tmp_path):
    (tmp_path / "failing.py").write_text(f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import train
from keepgpt import checkpoint
from keepgpt.config import TrainConfig, parse
failures = int(sys.argv.pop())
class Failing(checkpoint.Disk):
    def fsync(self, file):
        global failures
        if failures and "ckpt-00000004" in __import__("os").readlink(f"/proc/self/fd/{{file}}"):
            failures -= 1
            raise OSError(5, "Input/output error")
        super().fsync(file)
checkpoint.Disk = Failing
sys.exit(train.main(*parse(TrainConfig, "", sys.argv[1:])[:2]))""")
    for failures, code, said in ((1, 0, "saved in"), (2, 1, "NOT SAVED in")):
        flags = TINY | {"max_iters": 4, "dataset": dataset, "out_dir": tmp_path / str(failures)}
        done = run(tmp_path / "failing.py", code=code, last=str(failures), **flags)
        assert said in done.stdout.splitlines()[-1], done.stderr
        assert done.stderr.count("FAILED: [Errno 5]") == failures
        assert not list(tmp_path.glob(f"{failures}/*.tmp"))
    train(out="whole", max_iters=4)
    assert bits(tmp_path / "1/ckpt.pt") == bits(tmp_path / "whole/ckpt.pt")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_privileges_can_save(bundle):
    with tempfile.TemporaryDirectory() as name:  # not in pytest's own, which is root's alone
        os.chown(name, 65534, 65534)
        pid = os.fork()
        if not pid:
            os.nice(15)
            os.setgid(65534)
            os.setuid(65534)
            saver = Saver(Path(name), 2, 9.0, lambda: None, torch.device("cpu"))
            saver.save(bundle, best=True)
            os._exit(0 if saver.wait() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (Path(name) / "best.pt").exists()


def test_an_evaluation_waits_for_a_best_save(bundle, tmp_path):
    cpu = torch.device("cpu")
    slow = Faulty("fsync", lambda *_: time.sleep(0.5))
    saver = Saver(tmp_path, 2, 9.0, lambda: None, cpu, slow)
    saver.save(bundle | {"step": 1, "best_val_loss": 5.0}, best=True)
    run = SimpleNamespace(step=2, ranks=Ranks(0, 1, cpu))
    assert not record_evaluation(run, saver, {"val_loss": 6.0})
    assert record_evaluation(run, saver, {"val_loss": 4.0})


def test_best_is_resumed_when_ckpt_has_lost_its_end(bundle, tmp_path):
    commit(bundle, tmp_path, 2, True, Disk())
    for path in tmp_path.glob("ckpt*.pt"):
        path.unlink()
    torch.save(bundle, tmp_path / "ckpt.pt")  # an intact zip without our checksum
    assert read_newest(tmp_path)["step"] == bundle["step"]
