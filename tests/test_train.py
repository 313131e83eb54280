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
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY, bits, command, complaint, rows, run, start
from wandb.proto import wandb_internal_pb2 as pb

import train as script
from keepgpt import config as configurator


@pytest.mark.slow
def test_loss_falls(train, tmp_path):
    train(
        dropout=0.0,
        max_iters=200,
        lr_decay_iters=200,
        eval_interval=100,
        eval_iters=1000,
    )
    losses = [row["val_loss"] for row in rows(tmp_path / "out", "val_loss")]
    assert losses[0] > 3.9 and losses[-1] < 3.0
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == 200


def test_a_checkpoint_has_the_documented_keys(train, dataset, tmp_path):
    train()
    bundle = torch.load(tmp_path / "out/ckpt.pt", map_location="cpu", weights_only=True)
    assert bundle["step"] == 40 and bundle["config"]["max_iters"] == 40
    assert {
        "model",
        "optimizer",
        "model_args",
        "best_val_loss",
        "rng",
        "scaler",
        "data",
        "wandb_run_id",
        "format",
    } <= bundle.keys()
    assert bundle["model"]["transformer.h.1.attn.c_attn.weight"].shape == (96, 32)
    assert (
        bundle["data"] == json.loads((dataset / "meta.json").read_text())
        and len(bundle["rng"]) == 1
    )
    steps = [row["step"] for row in rows(tmp_path / "out", "loss")]
    assert steps == list(range(5, 41, 5))
    assert [row["step"] for row in rows(tmp_path / "out", "val_loss")] == [0, 20, 40]


def test_evaluation_does_not_change_training(train, tmp_path):
    train(out="often", eval_interval=5, eval_iters=2, sample_tokens=5)
    train(out="seldom", eval_interval=40)
    often, seldom = (
        torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
        for out in ("often", "seldom")
    )
    assert all(
        torch.equal(often["model"][name], seldom["model"][name])
        for name in often["model"]
    )
    assert rows(tmp_path / "often", "loss") == rows(tmp_path / "seldom", "loss")


@pytest.mark.slow
def test_one_and_two_ranks_agree_to_rounding(train, tmp_path):
    train(out="one", dtype="float32", log_interval=1)
    train(out="two", dtype="float32", log_interval=1, ranks=2)
    one, two = (rows(tmp_path / out) for out in ("one", "two"))
    assert len(one) == len(two) == 43
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and all(
            math.isclose(a[key], b[key], rel_tol=2e-5) for key in a
        ), (a, b)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nan_weights_stop_a_run_before_its_first_update(train, tmp_path, ranks):
    train(max_iters=1)
    bundle = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    bundle["model"]["transformer.ln_f.weight"][3] = math.nan
    torch.save(bundle, tmp_path / "nan.pt")
    done = train(
        init_from=tmp_path / "nan.pt",
        out="nan",
        ranks=ranks,
        code=3 if ranks == 1 else 1,
    )
    assert "step 1: " in done.stderr
    assert not list(tmp_path.glob("nan/*.pt"))


def test_a_diverging_run_keeps_finite_checkpoints(train, tmp_path):
    train(max_iters=20)
    done = train(
        init_from="resume",
        learning_rate=1e30,
        grad_clip=0,
        checkpoint_interval=1,
        code=3,
    )
    assert "--init_from=resume" in done.stderr
    bundles = [
        torch.load(path, weights_only=True) for path in tmp_path.glob("out/*.pt")
    ]
    assert all(
        tensor.isfinite().all()
        for bundle in bundles
        for tensor in bundle["model"].values()
    )
    assert max(row["step"] for row in rows(tmp_path / "out")) < 40


def test_eval_only_writes_nothing(train, tmp_path):
    done = train(eval_only=True)
    assert "step 0: train loss" in done.stdout and not (tmp_path / "out").exists()
    train(max_iters=20)
    files = sorted(tmp_path.glob("out/*"))
    loss = rows(tmp_path / "out", "val_loss")[-1]["val_loss"]
    done = train(eval_only=True, init_from=tmp_path / "out/ckpt.pt")
    assert f"val loss {loss:.4f}" in done.stdout and files == sorted(
        tmp_path.glob("out/*")
    )


def test_eval_only_repeats_the_loss_of_a_finished_run(train, tmp_path):
    train(max_iters=20)
    loss = rows(tmp_path / "out", "val_loss")[-1]["val_loss"]
    assert (
        f"val loss {loss:.4f}"
        in train(init_from="resume", eval_only=True, max_iters=20).stdout
    )


def test_weights_with_another_vocabulary_are_refused(train, play, tmp_path):
    train(max_iters=1)
    (tmp_path / "other.txt").write_text(
        play.read_text().replace("z", "").replace("q", "k")
    )
    run(
        "prepare.py",
        tmp_path / "other.txt",
        name="other",
        tokenizer="char",
        data_dir=tmp_path,
    )
    done = train(
        init_from=tmp_path / "out/ckpt.pt",
        out="new",
        dataset=tmp_path / "other",
        code=None,
    )
    assert "--dataset=" in complaint(done)


def test_metrics_log_the_learning_rate_schedule(train, tmp_path):
    train(
        log_interval=1,
        learning_rate=1e-2,
        min_lr=1e-3,
        warmup_iters=9,
        lr_decay_iters=30,
    )
    lr = {row["step"]: row["lr"] for row in rows(tmp_path / "out", "loss")}
    assert [round(lr[s], 9) for s in (1, 5, 10)] == [0.001, 0.005, 0.01]
    assert lr[20] == pytest.approx(1e-3 + 9e-3 * (1 + math.cos(math.pi * 10 / 21)) / 2)
    assert lr[31] == lr[40] == 1e-3


def test_bfloat16_ends_close_to_float32(train, tmp_path):
    train(out="float32", dtype="float32", dropout=0.0)
    train(out="bfloat16", dtype="bfloat16", dropout=0.0)
    a, b = (
        rows(tmp_path / out, "val_loss")[-1]["val_loss"]
        for out in ("float32", "bfloat16")
    )
    assert a != b and abs(a - b) < 0.02


def test_train_runs_from_any_working_folder(dataset, tmp_path):
    run(
        "train.py",
        cwd=tmp_path,
        out_dir="here",
        dataset=dataset,
        **TINY | {"max_iters": 2},
    )
    assert (tmp_path / "here/ckpt.pt").exists()


@pytest.mark.parametrize(
    "word, shown",
    [
        ("--dataset=nosuch", "python prepare.py nosuch"),
        ("--learning_rat=1", "did you mean learning_rate?"),
        ("--n_head=3", "n_embd=32 is not a multiple of n_head=3"),
        ("--block_size=100000", "a smaller --block_size"),
        ("--device=cuda:99", "device=auto"),
        ("--device=toaster", "device=auto"),
        ("--device=meta", "device=auto"),
        ("--n_layer=1e9", "n_layer"),
        ("--batch_size=1e9", "batch_size"),
        ("--n_embd=1e300", "n_embd"),
        ("--batch_size=1e12", "batch_size"),
        ("--gradient_accumulation_steps=1e12", "gradient_accumulation_steps"),
        ("--gradient_accumulation_steps=2e9", "gradient_accumulation_steps"),
        ("--backend=foo", "nccl"),
        ("--init_from=nosuch", "nosuch"),
        ("--out_dir=/proc/nosuch", "/proc/nosuch"),
        ("config/nosuch.py", "nosuch.py"),
    ],
)
def test_a_mistake_exits_2_with_one_line(train, word, shown, tmp_path):
    done = train(last=word, code=None)
    assert shown in complaint(done)
    assert [path.name for path in (tmp_path / "out").glob("*")] in ([], [".lock"])


def test_prepare_and_train_share_data_dir(play, tmp_path):
    place = {"data_dir": tmp_path / "sets"}
    run("prepare.py", play, name="mine", tokenizer="char", **place)
    run(
        "train.py",
        **TINY
        | place
        | {"dataset": "mine", "out_dir": tmp_path / "out", "max_iters": 2},
    )
    run("train.py", out_dir=tmp_path / "out", init_from="resume", max_iters=3)
    assert rows(tmp_path / "out")[-1]["step"] == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_corrupt_token_id_exits_with_one_line(train, dataset, tmp_path, ranks):
    shutil.copytree(dataset, tmp_path / "data")
    with open(tmp_path / "data/train.bin", "r+b") as f:
        f.write(b"\xff" * 40_000)
    done = train(ranks=ranks, code=None, dataset=tmp_path / "data")
    if ranks == 1:
        assert "train.bin" in complaint(done, silent=False)
    assert (
        done.returncode
        and done.stderr.count("error: ")
        and "IndexError" not in done.stderr
    )


@pytest.mark.slow
def test_only_the_first_of_several_ranks_prints_a_common_error():
    done = run("train.py", dataset="missing", ranks=2, code=None, fresh=True)
    assert done.returncode and done.stderr.count("error: no prepared dataset") == 1


def test_nccl_without_cuda_is_refused_for_several_ranks(train):
    train(max_iters=1, device="cpu", backend="nccl")
    done = train(ranks=2, out="other", device="cpu", backend="nccl", code=None)
    assert done.returncode and "backend=nccl needs CUDA" in done.stderr


def test_a_folder_named_metrics_jsonl_is_refused(train, tmp_path):
    (tmp_path / "out/metrics.jsonl").mkdir(parents=True)
    assert "metrics.jsonl" in complaint(train(code=None), silent=False)


def test_a_full_disk_at_the_start_exits_1(dataset, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for where, name in (
        ("keepgpt.files", "sync"),
        ("keepgpt.metrics", "write_atomically"),
    ):
        monkeypatch.setattr(f"{where}.{name}", full)
        flags = [
            f"--{key}={value}"
            for key, value in (
                TINY | {"out_dir": tmp_path / where, "dataset": dataset}
            ).items()
        ]
        with pytest.raises(SystemExit) as e:
            script.main(*configurator.parse(configurator.TrainConfig, "", flags)[:2])
        assert e.value.code == 1 and capsys.readouterr().err.startswith("error: ")
        monkeypatch.undo()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_exits_1_with_one_line(monkeypatch, capsys, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(script, "set_up", fails)
    with pytest.raises(SystemExit) as e:
        script.main(None, {})
    assert e.value.code == 1 and capsys.readouterr().err.count("\n") == 1


def test_training_continues_when_stdout_is_full(dataset, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(
                "train.py", **TINY | {"out_dir": tmp_path / "out", "dataset": dataset}
            ),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert rows(tmp_path / "out")[-1]["step"] == 40


@pytest.mark.slow
def test_out_dir_may_have_any_name_in_any_locale(dataset, tmp_path):
    out = tmp_path / "жест" / b"\xff\xfe".decode(errors="surrogateescape")
    flags = TINY | {"out_dir": out, "dataset": dataset, "max_iters": 2}
    run("train.py", **flags, env={"PYTHONIOENCODING": "ascii"})
    run(
        "sample.py",
        out_dir=out,
        num_samples=1,
        max_new_tokens=2,
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert (out / "README.md").exists()


def test_micro_batches_must_divide_evenly_among_ranks(train):
    done = train(ranks=2, gradient_accumulation_steps=3, code=None)
    assert done.returncode != 0 and "gradient_accumulation_steps=3" in done.stderr


@pytest.mark.slow
def test_progress_is_one_line_in_a_terminal_many_in_a_pipe(train, dataset, tmp_path):
    piped = train(out="piped").stdout
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    process = subprocess.Popen(
        command("train.py", out_dir=tmp_path / "tty", dataset=dataset, **TINY),
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"COLUMNS": "", "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 1 << 16):
            written += block
    except OSError:  # Linux: the other side is closed
        pass
    assert process.wait() == 0
    lines = [line.split("\r\033[K") for line in written.decode().split("\r\n")]
    shown = [line[-1] for line in lines]
    replaced = [live for line in lines for live in line[:-1]]
    steps = [f"step {step}/40:" for step in range(5, 41, 5)]
    assert [
        live[: len(step)] for live, step in zip(replaced, steps, strict=True)
    ] == steps
    assert max(map(len, replaced)) == 49  # the terminal's width less one
    lasting = [line for line in piped.splitlines() if not line.startswith(tuple(steps))]
    assert shown == [line.replace("piped", "tty") for line in lasting] + [""]
    assert [
        line.split(" loss")[0] for line in piped.splitlines() if "left" in line
    ] == steps


def test_training_continues_when_stdout_closes(dataset, tmp_path):
    process = start("train.py", out_dir=tmp_path / "out", dataset=dataset, **TINY)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and process.stderr.read() == ""
    process.stderr.close()
    assert rows(tmp_path / "out", "loss")[-1]["step"] == 40


def wandb_records(path: Path) -> Iterator[pb.Record]:
    """Read the records that wandb wrote offline, in the format of LevelDB's log: blocks of 32 KiB
    hold whole records or parts of them, each after a CRC32, a length and a type."""
    data, at, record = path.read_bytes(), 7, b""  # after wandb's own header
    while at < len(data):
        if 32768 - at % 32768 < 7:  # too short for a header: padding
            at += 32768 - at % 32768
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of one
            yield pb.Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_a_resumed_run_keeps_its_wandb_id(train, tmp_path):
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    config, summary, ids, losses = {}, {}, set(), {}
    for i, flags in enumerate([{"max_iters": 20}, {"init_from": "resume"}]):
        train(wandb_log=True, wandb_run_name="hamlet", env=env, **flags)
        files = set(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        assert len(files) == i + 1
        for record in wandb_records(
            max(files, key=lambda path: path.stat().st_mtime_ns)
        ):
            ids |= {record.run.run_id} - {""}
            config |= {
                c.key: json.loads(c.value_json) for c in record.run.config.update
            }
            summary |= {
                s.key or s.nested_key[0]: json.loads(s.value_json)
                for s in record.summary.update
            }
            row = {
                h.key or h.nested_key[0]: json.loads(h.value_json)
                for h in record.history.item
            }
            if "loss" in row:
                losses[row["step"]] = row["loss"]
    bundle = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert ids == {bundle["wandb_run_id"]}
    assert {key: config[key] for key in TINY if key != "max_iters"} == {
        key: TINY[key] for key in TINY if key != "max_iters"
    }
    assert summary["best_val_loss"] == bundle["best_val_loss"]
    assert losses == {
        row["step"]: row["loss"] for row in rows(tmp_path / "out", "loss")
    }


def test_training_continues_when_wandb_fails(train, tmp_path):
    package = tmp_path / "wandb"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def Settings(**_): pass\ndef init(**_): raise RuntimeError('no key')\n"
    )
    done = train(wandb_log=True, max_iters=10, env={"PYTHONPATH": str(tmp_path)})
    assert "no key" in done.stdout and rows(tmp_path / "out")[-1]["step"] == 10


def test_float16_and_compile_fall_back_with_a_note(train, tmp_path):
    done = train(out="half", dtype="float16", compile=True, env={"CXX": "nosuch"})
    notes = done.stderr.splitlines()
    assert len(notes) == 2
    assert (
        "float16" in notes[0] and "torch.compile" in notes[1] and "nosuch" in notes[1]
    )
    train(out="plain")
    assert bits(tmp_path / "half/ckpt.pt") == bits(tmp_path / "plain/ckpt.pt")


@pytest.mark.slow
def test_the_compiler_is_loaded_only_if_used(dataset, tmp_path):
    flags = TINY | {"dataset": dataset, "out_dir": tmp_path, "max_iters": 4}
    program = (
        "import sys, runpy\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "finally:\n    print('torch._dynamo' in sys.modules)"
    )
    for steps in (4, 6):  # from scratch, then resumed
        flags |= {"max_iters": steps, "init_from": "auto"}
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                program,
                *(f"--{key}={value}" for key, value in flags.items()),
            ],
            cwd=REPO,
            env=os.environ | {"PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
        )
        assert f"done at step {steps}" in done.stdout, done.stderr
        assert done.stdout.endswith("False\n")
