"""train.py learns, logs its metrics, writes checkpoints and refuses mistakes."""

import errno
import fcntl
import json
import math
import os
import pty
import shutil
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    PROGRAMS,
    TINY,
    hash_state,
    load,
    make_command,
    read_error,
    read_rows,
    run,
    start,
)

import train as script
from keepgpt import config as configurator

# what training computes


@pytest.mark.slow
def test_loss_falls(train, tmp_path):
    # a longer run, whose evaluations are not of a few lucky windows
    flags = {"max_iters": 200, "lr_decay_iters": 200, "learning_rate": 1e-2}
    train(dropout=0.0, eval_interval=200, eval_iters=40, **flags)
    losses = [row["val_loss"] for row in read_rows(tmp_path / "out", "val_loss")]
    # an untrained model expects all characters about equally
    assert losses[0] > 3.9
    assert losses[-1] < 3.0


def test_a_checkpoint_has_the_documented_keys(whole, dataset):
    bundle = load(whole / "ckpt.pt")
    documented = {"model", "optimizer", "model_args", "best_val_loss", "rng", "scaler"}
    assert documented | {"data", "wandb_run_id", "format"} <= bundle.keys()
    assert bundle["step"] == bundle["config"]["max_iters"] == 20
    # queries, keys and values of 32 each, in one matrix
    assert bundle["model"]["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    assert bundle["data"] == json.loads((dataset / "meta.json").read_text())
    assert len(bundle["rng"]) == 1


def test_metrics_have_a_row_per_interval(whole):
    assert [row["step"] for row in read_rows(whole, "loss")] == [5, 10, 15, 20]
    assert [row["step"] for row in read_rows(whole, "val_loss")] == [0, 10, 20]


def test_evaluation_does_not_change_training(train, whole, tmp_path):
    train(eval_interval=4, eval_iters=1, sample_tokens=5)
    # an evaluation and a sample draw from random states of their own
    often = load(tmp_path / "out/ckpt.pt")["model"]
    seldom = load(whole / "ckpt.pt")["model"]
    for name, weight in seldom.items():
        assert torch.equal(often[name], weight)
    assert read_rows(tmp_path / "out", "loss") == read_rows(whole, "loss")


def test_one_and_two_ranks_agree_to_rounding(train, tmp_path):
    for ranks in (1, 2):
        train(
            out=str(ranks),
            ranks=ranks,
            dtype="float32",
            log_interval=1,
        )
    one = read_rows(tmp_path / "1")
    two = read_rows(tmp_path / "2")
    # 20 losses and three evaluations
    assert len(one) == len(two) == 23
    for row_of_one, row_of_two in zip(one, two):
        assert row_of_one == pytest.approx(row_of_two, rel=2e-5)


def test_bfloat16_ends_close_to_float32(train, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        train(out=dtype, dtype=dtype, dropout=0.0)
        evaluations = read_rows(tmp_path / dtype, "val_loss")
        losses[dtype] = evaluations[-1]["val_loss"]
    # equal losses would mean that both ran in one dtype
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], abs=0.02)


def test_metrics_log_the_learning_rate_schedule(train, tmp_path):
    rates = {"learning_rate": 1e-2, "min_lr": 1e-3, "lr_decay_iters": 14}
    train(log_interval=1, **rates)
    lr = {row["step"]: row["lr"] for row in read_rows(tmp_path / "out", "loss")}
    # the first of 4 steps of warm-up, the peak
    assert lr[1] == pytest.approx(0.002)
    assert lr[5] == pytest.approx(0.01)
    # half of the decay, its end
    assert lr[10] == pytest.approx(0.0055)
    assert lr[15] == lr[20] == 1e-3


# numbers that are not finite


@pytest.mark.parametrize("ranks, code", [(1, 3), (2, 1)], ids=["1 rank", "2 ranks"])
def test_nan_weights_stop_a_run_before_its_first_update(
    train, whole, tmp_path, ranks, code
):
    # one number of one layer is enough. torchrun exits with 1, whatever the code of its ranks.
    bundle = load(whole / "ckpt.pt")
    bundle["model"]["transformer.ln_f.weight"][3] = math.nan
    torch.save(bundle, tmp_path / "nan.pt")
    done = train(init_from=tmp_path / "nan.pt", ranks=ranks, code=code)
    assert "step 1: " in done.stderr
    assert not list(tmp_path.glob("out/*.pt"))


def test_a_diverging_run_keeps_finite_checkpoints(train, half):
    # a rate at which the weights overflow within a few steps, each of which would be saved
    flags = {"learning_rate": 1e30, "grad_clip": 0, "checkpoint_interval": 1}
    done = train(init_from="resume", code=3, **flags)
    assert "--init_from=resume" in done.stderr
    for path in half.glob("*.pt"):
        for weight in load(path)["model"].values():
            assert weight.isfinite().all()
    assert max(row["step"] for row in read_rows(half)) < 20


# eval_only


def test_eval_only_without_a_run_writes_nothing(train, tmp_path):
    done = train(eval_only=True)
    assert "step 0: train loss" in done.stdout
    assert "untrained" in done.stderr
    assert not (tmp_path / "out").exists()


def test_eval_only_repeats_the_loss_of_a_run(train, half):
    # the evaluation that the run itself has logged at its last step
    files = sorted(half.glob("*"))
    loss = f"val loss {read_rows(half, 'val_loss')[-1]['val_loss']:.4f}"
    for source in ("auto", "resume", half / "ckpt.pt"):
        done = train(eval_only=True, init_from=source)
        assert loss in done.stdout
        assert "untrained" not in done.stderr
    # weights asked for by name are evaluated
    done = train(eval_only=True, init_from="scratch")
    assert loss not in done.stdout
    assert "untrained" in done.stderr
    assert sorted(half.glob("*")) == files


# mistakes


# a part of each error says what to type instead
@pytest.mark.parametrize(
    "flag, shown",
    [
        ("--dataset=nosuch", "python prepare.py nosuch"),
        ("--learning_rat=1", "did you mean learning_rate?"),
        ("--n_head=3", "n_embd=32 is not a multiple of n_head=3"),
        ("--block_size=100000", "a smaller --block_size"),
        ("--device=cuda:99", "device=auto"),
        ("--device=toaster", "device=auto"),
        ("--device=meta", "device=auto"),
        ("--n_layer=1e9", "n_layer"),
        ("--n_embd=1e300", "n_embd"),
        ("--batch_size=1e9", "batch_size"),
        ("--batch_size=1e12", "batch_size"),
        ("--gradient_accumulation_steps=1e12", "gradient_accumulation_steps"),
        ("--gradient_accumulation_steps=2e9", "gradient_accumulation_steps"),
        ("--backend=foo", "nccl"),
        ("--init_from=nosuch", "nosuch"),
        ("--out_dir=/proc/nosuch", "/proc/nosuch"),
        ("config/nosuch.py", "nosuch.py"),
    ],
    ids=lambda flag: flag.strip("-").replace("/", "."),
)
def test_a_mistake_exits_2_with_one_line(train, flag, shown, tmp_path):
    assert shown in read_error(train(last=flag, code=None))
    # some are found before the folder is made, some with its lock held
    files = [path.name for path in tmp_path.glob("out/*")]
    assert files in ([], [".lock"])


def test_weights_with_another_vocabulary_are_refused(train, whole, play, tmp_path):
    # two letters fewer
    text = play.read_text().replace("z", "").replace("q", "k")
    (tmp_path / "other.txt").write_text(text)
    flags = {"name": "other", "tokenizer": "char", "data_dir": tmp_path}
    run("prepare.py", tmp_path / "other.txt", **flags)
    done = train(
        init_from=whole / "ckpt.pt",
        dataset=tmp_path / "other",
        code=2,
    )
    assert "--dataset=" in read_error(done)


def test_prepare_and_train_share_data_dir(play, tmp_path):
    data_dir = tmp_path / "sets"
    run("prepare.py", play, name="mine", tokenizer="char", data_dir=data_dir)
    flags = TINY | {"data_dir": data_dir, "dataset": "mine", "max_iters": 2}
    # from any working folder, which out_dir is relative to
    run("train.py", cwd=tmp_path, out_dir="here", **flags)
    # the checkpoint knows both
    run("train.py", out_dir=tmp_path / "here", init_from="resume", max_iters=3)
    assert read_rows(tmp_path / "here")[-1]["step"] == 3


@pytest.mark.parametrize("ranks", [1, 2], ids=["1 rank", "2 ranks"])
def test_a_corrupt_token_id_exits_with_one_line(train, dataset, tmp_path, ranks):
    shutil.copytree(dataset, tmp_path / "data")
    # 20,000 times the token 65,535, which the vocabulary lacks
    with open(tmp_path / "data/train.bin", "r+b") as file:
        file.write(b"\xff" * 40_000)
    done = train(ranks=ranks, code=None, dataset=tmp_path / "data")
    # two ranks may print a line each
    if ranks == 1:
        assert "train.bin" in read_error(done, silent=False)
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert "IndexError" not in done.stderr


@pytest.mark.slow
def test_one_rank_of_torchrun_prints_a_common_error():
    # forks end by themselves: only torchrun ends the other rank before it prints
    done = run(
        "train.py",
        dataset="missing",
        ranks=2,
        code=1,
        fresh=True,
    )
    assert done.stderr.count("error: no prepared dataset") == 1


def test_nccl_without_cuda_is_refused_for_several_ranks(train):
    flags = {"device": "cpu", "backend": "nccl"}
    # one rank communicates with nobody
    train(max_iters=1, **flags)
    done = train(ranks=2, out="other", code=1, **flags)
    assert "backend=nccl needs CUDA" in done.stderr


def test_micro_batches_must_divide_among_ranks(train):
    done = train(ranks=2, gradient_accumulation_steps=3, code=1)
    assert "gradient_accumulation_steps=3" in done.stderr


def test_a_folder_named_metrics_jsonl_is_refused(train, tmp_path):
    (tmp_path / "out/metrics.jsonl").mkdir(parents=True)
    assert "metrics.jsonl" in read_error(train(code=2), silent=False)


# errors of the machine


def fail_with(error: Exception):
    """Return a function that raises `error`."""

    def fail(*_args):
        raise error

    return fail


@pytest.mark.parametrize(
    "operation",
    ["keepgpt.files.sync", "keepgpt.metrics.write_atomically"],
    ids=["sync", "write"],
)
def test_a_full_disk_at_the_start_exits_1(
    operation, dataset, tmp_path, monkeypatch, capsys
):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # in this process: in a fork the operation would be the real one
    monkeypatch.setattr(operation, fail_with(full))
    settings = TINY | {"out_dir": tmp_path, "dataset": dataset}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    config, overrides, _ = configurator.parse(configurator.TrainConfig, "", flags)
    with pytest.raises(SystemExit) as end:
        script.main(config, overrides)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_out_of_memory_exits_1_with_one_line(monkeypatch, capsys, error):
    monkeypatch.setattr(script, "set_up", fail_with(error))
    with pytest.raises(SystemExit) as end:
        script.main(None, {})
    assert end.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_training_continues_when_stdout_is_full(train, tmp_path):
    # each write to it fails as on a full disk
    done = train(stdout="/dev/full")
    assert done.stderr.count("\n") == 1
    assert read_rows(tmp_path / "out")[-1]["step"] == 20


def test_a_resume_continues_when_stdout_closes(half, dataset):
    flags = TINY | {"out_dir": half, "dataset": dataset, "init_from": "resume"}
    # as after `| head`
    process = start("train.py", **flags)
    process.stdout.close()
    # a restart loop takes exit code 0 for a run at max_iters
    assert process.wait(timeout=120) == 0
    with process.stderr as stderr:
        assert stderr.read() == ""
    assert read_rows(half, "loss")[-1]["step"] == 20


@pytest.mark.slow
def test_out_dir_may_have_any_name_in_any_locale(dataset, tmp_path):
    # letters that ASCII lacks, and bytes that are not UTF-8
    name = b"\xff\xfe".decode(errors="surrogateescape")
    out = tmp_path / "жест" / name
    flags = TINY | {"out_dir": out, "dataset": dataset, "max_iters": 2}
    env = {"PYTHONIOENCODING": "ascii"}
    run("train.py", **flags, env=env)
    run(
        "sample.py",
        out_dir=out,
        num_samples=1,
        max_new_tokens=2,
        env=env,
    )
    assert (out / "README.md").exists()


def read_terminal(*args: str, **flags) -> str:
    """Run train.py in a terminal of 50 columns. Return all that it writes."""
    our_side, its_side = pty.openpty()
    # rows, columns, and two fields that nobody uses
    window = struct.pack("HHHH", 24, 50, 0, 0)
    fcntl.ioctl(its_side, termios.TIOCSWINSZ, window)
    process = subprocess.Popen(
        make_command("train.py", *args, **flags),
        stdout=its_side,
        stderr=its_side,
        env=os.environ | {"COLUMNS": "", "OMP_NUM_THREADS": "1"},
    )
    os.close(its_side)
    written = b""
    # Linux: an error tells that the other side is closed
    with suppress(OSError):
        block = os.read(our_side, 1 << 16)
        while block:
            written += block
            block = os.read(our_side, 1 << 16)
    assert process.wait() == 0
    return written.decode()


def cut_loss(line: str) -> str:
    """Return the start of a line of progress, with its step."""
    return line.split(" loss")[0]


@pytest.mark.slow
def test_progress_is_one_line_in_a_terminal(train, dataset, tmp_path):
    piped = train(out="piped").stdout.splitlines()
    written = read_terminal(out_dir=tmp_path / "tty", dataset=dataset, **TINY)
    steps = [f"step {step}/20:" for step in (5, 10, 15, 20)]
    progress = [line for line in piped if line.startswith(tuple(steps))]
    assert list(map(cut_loss, progress)) == steps
    # in the terminal each line of progress replaces the one before
    replaced = []
    last_texts = []
    for line in written.split("\r\n"):
        *earlier, last = line.split("\r\033[K")
        replaced += earlier
        last_texts.append(last)
    assert list(map(cut_loss, replaced)) == steps
    # the terminal's width less one
    assert max(map(len, replaced)) == 49
    # the other lines stay
    lasting = [line.replace("piped", "tty") for line in piped if line not in progress]
    assert last_texts == [*lasting, ""]


# wandb and the compiler


def read_wandb_records(path: Path) -> Iterator[Any]:
    """Read the records that wandb wrote offline, in the format of LevelDB's log: blocks of 32 KiB
    hold whole records or parts of them, each after a CRC32, a length and a type."""
    # loaded here, not for all tests
    from wandb.proto import wandb_internal_pb2 as pb

    data = path.read_bytes()
    # after wandb's own header
    at = 7
    record = b""
    while at < len(data):
        left = 32768 - at % 32768
        # too short for a header: padding
        if left < 7:
            at += left
        size, kind = struct.unpack_from("<HB", data, at + 4)
        start = at + 7
        record += data[start : start + size]
        at = start + size
        # a complete record, or the last part of one
        if kind in (1, 4):
            yield pb.Record.FromString(record)
            record = b""


def decode_items(items) -> dict:
    """Return the values of a wandb record by key."""
    values = {}
    for item in items:
        key = item.key or item.nested_key[0]
        values[key] = json.loads(item.value_json)
    return values


@dataclass
class WandbFiles:
    """What wandb would upload from its files: a run, as it joins them."""

    ids: set[str]
    config: dict[str, Any]
    summary: dict[str, Any]
    losses: dict[int, float]


def join_wandb_files(files: list[Path]) -> WandbFiles:
    """Read the files of a run's starts, in their order."""
    joined = WandbFiles(set(), {}, {}, {})
    for file in files:
        for record in read_wandb_records(file):
            joined.ids.add(record.run.run_id)
            joined.config |= decode_items(record.run.config.update)
            joined.summary |= decode_items(record.summary.update)
            row = decode_items(record.history.item)
            if "loss" in row:
                joined.losses[row["step"]] = row["loss"]
    # most records are not about the run and have no id
    joined.ids.discard("")
    return joined


@pytest.mark.slow
def test_a_resumed_run_keeps_its_wandb_id(train, tmp_path):
    env = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
    }
    for flags in ({"max_iters": 10}, {"init_from": "resume"}):
        train(wandb_log=True, wandb_run_name="hamlet", env=env, **flags)
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    files.sort(key=lambda path: path.stat().st_mtime_ns)

    joined = join_wandb_files(files)
    bundle = load(tmp_path / "out/ckpt.pt")
    assert joined.ids == {bundle["wandb_run_id"]}
    # the two starts differ in max_iters
    expected = TINY | {"max_iters": joined.config["max_iters"]}
    assert joined.config.items() >= expected.items()
    assert joined.summary["best_val_loss"] == bundle["best_val_loss"]
    logged = {row["step"]: row["loss"] for row in read_rows(tmp_path / "out", "loss")}
    assert joined.losses == logged


def test_float16_and_compile_fall_back_with_a_note(train, whole, tmp_path):
    done = train(dtype="float16", compile=True, env={"CXX": "nosuch"})
    # two notes, and the settings of `whole` instead
    float16, compiler = done.stderr.splitlines()
    assert "float16" in float16
    assert "torch.compile" in compiler
    assert "nosuch" in compiler
    assert hash_state(tmp_path / "out/ckpt.pt") == hash_state(whole / "ckpt.pt")


@pytest.mark.slow
def test_the_compiler_is_loaded_only_if_used(dataset, tmp_path):
    flags = TINY | {"dataset": dataset, "out_dir": tmp_path, "init_from": "auto"}
    # from scratch, then resumed
    for max_iters in (2, 3):
        flags["max_iters"] = max_iters
        done = run(PROGRAMS / "import_of_compiler.py", fresh=True, **flags)
        assert f"done at step {max_iters}" in done.stdout
        assert done.stdout.endswith("False\n")
