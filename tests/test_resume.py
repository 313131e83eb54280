"""An interrupted and resumed run ends bit-identical to an uninterrupted one."""

import functools
import io
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROGRAMS, TINY, hash_state, load, read_error, read_rows, run, start

from keepgpt import checkpoint
from keepgpt.checkpoint import Disk
from tools.common import last_step

# the same run in two parts


def test_ten_steps_and_ten_more_equal_twenty(train, half, whole, tmp_path):
    train(init_from="resume")
    assert hash_state(half / "ckpt.pt") == hash_state(whole / "ckpt.pt")
    assert read_rows(half) == read_rows(whole)
    # the comparison notices another run
    train(out="other", seed=1)
    assert hash_state(tmp_path / "other/ckpt.pt") != hash_state(whole / "ckpt.pt")


@pytest.mark.slow
def test_four_ranks_resume_bit_identical(train, tmp_path):
    """DDP's order of addition matters with more than two ranks and several buckets."""
    # wide enough for several of DDP's buckets
    flags = {
        "ranks": 4,
        "n_embd": 256,
        "n_layer": 2,
        "block_size": 16,
        "batch_size": 1,
        "gradient_accumulation_steps": 4,
        "eval_interval": 100,
        "eval_iters": 1,
    }
    train(out="whole", max_iters=4, **flags)
    train(out="parts", max_iters=2, **flags)
    train(out="parts", max_iters=4, init_from="resume", **flags)
    whole = hash_state(tmp_path / "whole/ckpt.pt")
    assert hash_state(tmp_path / "parts/ckpt.pt") == whole


def test_auto_starts_a_run_and_resumes_it(train, whole, tmp_path):
    assert "resuming" not in train(init_from="auto", max_iters=10).stdout
    assert "resuming" in train(init_from="auto").stdout
    assert hash_state(tmp_path / "out/ckpt.pt") == hash_state(whole / "ckpt.pt")


def test_auto_with_a_source_starts_there_and_resumes(train, half, tmp_path):
    flags = {"init_from": f"auto:{half / 'ckpt.pt'}", "learning_rate": 1e-4}
    # it starts with the weights of that checkpoint
    train(out="whole", **flags)
    first, *_ = read_rows(tmp_path / "whole", "val_loss")
    assert first["val_loss"] == read_rows(half, "val_loss")[-1]["val_loss"]
    train(out="parts", max_iters=10, **flags)
    assert "resuming" in train(out="parts", **flags).stdout
    whole = hash_state(tmp_path / "whole/ckpt.pt")
    assert hash_state(tmp_path / "parts/ckpt.pt") == whole


def test_a_resumed_run_keeps_settings_not_given_again(train, tmp_path):
    train(max_iters=2, weight_decay=0.3)
    flags = {"max_iters": 4, "beta2": 0.9}
    done = run("train.py", out_dir=tmp_path / "out", init_from="resume", **flags)
    assert "at step 2, max_iters 2 -> 4, beta2 0.95 -> 0.9\n" in done.stdout
    bundle = load(tmp_path / "out/ckpt.pt")
    assert bundle["step"] == 4
    # those given before, and in the optimizer, too
    assert bundle["config"]["n_embd"] == TINY["n_embd"]
    groups = bundle["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [group["betas"] for group in groups] == [(0.9, 0.9)] * 2


def test_micro_batch_size_may_change_on_resume(train, half, whole):
    # as many tokens per step as 4 x 2, but another dropout
    train(init_from="resume", batch_size=8, gradient_accumulation_steps=1)
    last = read_rows(half, "loss")[-1]
    assert last["loss"] == pytest.approx(read_rows(whole, "loss")[-1]["loss"], abs=0.1)


@pytest.mark.parametrize(
    "flag, value, shown",
    [
        ("n_layer", 3, "n_layer 1 -> 3"),
        ("seed", 7, "seed 1337 -> 7"),
        ("block_size", 16, "block_size 32 -> 16"),
        ("batch_size", 5, "expected 256 as before, got 320"),
    ],
    ids=["n_layer", "seed", "block_size", "batch_size"],
)
def test_what_makes_another_run_is_refused(train, half, first_half, flag, value, shown):
    assert shown in read_error(train(init_from="resume", code=2, **{flag: value}))
    assert hash_state(half / "ckpt.pt") == hash_state(first_half / "ckpt.pt")


def test_resuming_on_another_dataset_is_refused(train, half, play, tmp_path):
    # the same text, cut in another place
    flags = {"tokenizer": "char", "data_dir": tmp_path, "val_fraction": 0.2}
    run("prepare.py", play, name="other", **flags)
    done = train(init_from="resume", dataset=tmp_path / "other", code=2)
    assert "hamlet" in read_error(done)


def test_scratch_never_overwrites_a_run(train, half, first_half):
    line = read_error(train(code=2))
    assert "--init_from=resume" in line
    assert "--out_dir=" in line
    assert hash_state(half / "ckpt.pt") == hash_state(first_half / "ckpt.pt")


def test_resume_without_a_run_is_refused(train):
    read_error(train(init_from="resume", code=2))


def test_a_moved_folder_resumes_in_its_new_place(half):
    # half was made in another place; out_dir=out is the default
    done = run("train.py", cwd=half.parent, init_from="resume", max_iters=15)
    assert done.stderr == ""
    saved = load(half / "ckpt.pt")
    assert saved["step"] == 15
    assert saved["config"]["out_dir"] == "out"


def test_a_checkpoint_alone_moves_its_run(train, half, whole, tmp_path):
    (tmp_path / "third").mkdir()
    shutil.copy(half / "ckpt.pt", tmp_path / "third")
    train(out="third", init_from="resume")
    assert hash_state(tmp_path / "third/ckpt.pt") == hash_state(whole / "ckpt.pt")


# corrupt checkpoints


# each of these takes the content of a checkpoint and returns that of a corrupt one
def flip_a_bit(raw: bytes) -> bytes:
    changed = bytearray(raw)
    changed[len(raw) // 3] ^= 1
    return bytes(changed)


def make_foreign_pickle(_raw: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"model": os.system}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda raw: raw[:-7],
        lambda raw: b"",
        lambda raw: b"not a bundle\n" * 9,
        make_foreign_pickle,
    ],
    ids=["flipped", "cut", "empty", "text", "pickle"],
)
def test_a_corrupt_checkpoint_is_skipped_for_an_older_one(train, half, whole, damage):
    train(init_from="resume", max_iters=15)
    damaged = damage((half / "ckpt.pt").read_bytes())
    # two names of one file
    for name in ("ckpt.pt", "ckpt-00000015.pt"):
        (half / name).write_bytes(damaged)
    done = train(init_from="resume")
    assert f"{half}/ckpt.pt: " in done.stderr
    assert "at step 10" in done.stdout
    assert hash_state(half / "ckpt.pt") == hash_state(whole / "ckpt.pt")
    assert read_rows(half) == read_rows(whole)


def test_no_intact_checkpoint_is_an_error_that_lists_them(train, half):
    # now there are two
    train(init_from="resume", max_iters=11)
    for path in half.glob("*.pt"):
        path.write_bytes(b"")
    done = train(init_from="resume", code=2)
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "ckpt-00000010.pt: " in done.stderr


def test_a_corrupt_checkpoint_is_read_once(train, half):
    # it is also ckpt-00000010.pt and best.pt
    os.truncate(half / "ckpt.pt", (half / "ckpt.pt").stat().st_size - 1)
    assert train(init_from="resume", code=2).stderr.count("skipping ") == 1


# signals


# a run long enough to be caught in the middle
SIGNALLED = TINY | {
    "max_iters": 100,
    "lr_decay_iters": 100,
    "eval_interval": 30,
    "log_interval": 1,
    "init_from": "auto",
}


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    """Return a function that returns the folder of an uninterrupted run on some ranks."""

    @functools.cache
    def finish(ranks):
        out = tmp_path_factory.mktemp("uninterrupted")
        run("train.py", ranks=ranks, out_dir=out, dataset=dataset, **SIGNALLED)
        return out

    return finish


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, number, code",
    [
        (1, signal.SIGINT, 75),
        (1, signal.SIGUSR1, 75),
        (1, signal.SIGKILL, -9),
        (2, signal.SIGTERM, 1),
    ],
    ids=["SIGINT", "SIGUSR1", "SIGKILL", "SIGTERM to one of two ranks"],
)
def test_a_run_resumes_bit_identical_after_a_signal(
    dataset, tmp_path, uninterrupted, ranks, number, code
):
    out = tmp_path / "out"
    flags = SIGNALLED | {"dataset": dataset, "out_dir": out}
    process = start("train.py", ranks=ranks, **flags)
    # after the checkpoint of step 30, so that steps are lost if it is killed
    while last_step(out) < 40:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    # one of the ranks
    os.kill(process.pids[-1], number)
    process.communicate(timeout=120)
    assert process.returncode == code
    stopped = read_rows(out)[-1]["step"]
    assert stopped < 100
    # SIGKILL leaves no time to save
    if number != signal.SIGKILL:
        assert load(out / "ckpt.pt")["step"] == stopped

    run("train.py", ranks=ranks, **flags)
    assert hash_state(out / "ckpt.pt") == hash_state(uninterrupted(ranks) / "ckpt.pt")
    assert read_rows(out) == read_rows(uninterrupted(ranks))


@pytest.mark.slow
def test_a_signal_before_the_first_step_exits_75(dataset, tmp_path, whole):
    out = tmp_path / "out"
    flags = TINY | {"dataset": dataset, "out_dir": out, "init_from": "auto"}
    process = start("train.py", **flags)
    # the run takes the lock before it makes its model
    while not (out / ".lock").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert errors == ""
    assert "--init_from=auto" in printed
    run("train.py", **flags)
    assert hash_state(out / "ckpt.pt") == hash_state(whole / "ckpt.pt")


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(dataset, tmp_path):
    out = tmp_path / "out"
    flags = TINY | {"dataset": dataset, "out_dir": out, "init_from": "auto"}
    first = start("train.py", **flags | {"max_iters": 10**5})
    while "step 5/" not in first.stdout.readline():
        pass
    line = read_error(run("train.py", code=2, **flags | {"init_from": "resume"}))
    assert str(out) in line
    # a restart loop's command waits for a run that is ending
    second = start("train.py", **flags)
    assert str(out) in second.stdout.readline()
    first.kill()
    first.communicate()
    second.communicate(timeout=120)
    assert second.returncode == 0


def test_newest_best_and_older_checkpoints_are_kept(train, tmp_path):
    # a save at each evaluation, at 5, 10, 15 and 20
    train(eval_interval=5, keep_checkpoints=3)
    out = tmp_path / "out"
    kept = {"ckpt-00000010.pt", "ckpt-00000015.pt", "ckpt-00000020.pt"}
    assert {path.name for path in out.glob("*.pt*")} == kept | {"ckpt.pt", "best.pt"}
    evaluations = read_rows(out, "val_loss")[1:]
    lowest = min(evaluations, key=lambda row: row["val_loss"])
    best = load(out / "best.pt")
    assert best["step"] == lowest["step"]
    assert best["best_val_loss"] == lowest["val_loss"]
    assert load(out / "ckpt.pt")["step"] == 20


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_identical(train, tmp_path):
    """With two threads, compiled code repeats only with deterministic algorithms."""
    flags = {
        "compile": True,
        "env": {"OMP_NUM_THREADS": "2"},
        "ranks": 2,
        "dtype": "bfloat16",
        "eval_interval": 5,
    }
    train(out="whole", max_iters=10, **flags)
    # as if the run had been killed after step 5
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    parts.mkdir()
    shutil.copy(whole / "ckpt-00000005.pt", parts / "ckpt.pt")
    shutil.copy(whole / "metrics.jsonl", parts)
    done = train(out="parts", max_iters=10, init_from="resume", **flags)
    assert "at step 5" in done.stdout
    assert ", compiled" in done.stdout
    assert hash_state(whole / "ckpt.pt") == hash_state(parts / "ckpt.pt")
    assert read_rows(whole) == read_rows(parts)
    # compiled and plain code agree up to rounding
    train(out="plain", max_iters=10, **flags | {"compile": False})
    last = read_rows(whole, "loss")[-1]
    plain = read_rows(tmp_path / "plain", "loss")[-1]
    assert last["loss"] == pytest.approx(plain["loss"], abs=0.02)


class Payload:
    """Make a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_runs_no_code(train, half, tmp_path):
    planted = tmp_path / "planted"
    payload = Payload(str(planted))
    # an attacker computes the right checksum
    newest = half / "ckpt-00000099.pt"
    bundle = load(half / "ckpt.pt") | {"step": 99, "wandb_run_id": payload}
    checkpoint.write_bundle(bundle, newest, Disk())
    newest.replace(half / "ckpt.pt")
    done = train(init_from="resume")
    assert "out/ckpt.pt: " in done.stderr
    assert "at step 10" in done.stdout

    # also in the weights that a new run or a sample starts with
    path = tmp_path / "evil.pt"
    checkpoint.write_bundle({"model": payload}, path, Disk())
    read_error(train(init_from=path, out="new", code=2))
    read_error(run("sample.py", init_from=path, code=2))
    assert not planted.exists()
    # the payload works where nobody is careful
    torch.load(path, weights_only=False)
    assert planted.exists()


# other ranks, machines and versions


def test_only_rank_0_needs_out_dir(dataset, tmp_path):
    """Each rank gets its own working folder, as on separate machines."""
    flags = {"dataset": dataset, "ranks": 2, "init_from": "auto", "cwd": tmp_path}
    flags |= TINY | {"eval_interval": 5}
    program = PROGRAMS / "folder_per_rank.py"
    run(program, out_dir="whole", **flags | {"max_iters": 10})
    run(program, out_dir="parts", **flags | {"max_iters": 5})
    done = run(program, out_dir="parts", **flags | {"max_iters": 10})
    assert "resuming parts at step 5" in done.stdout
    # the second rank's folder stays empty
    assert not list((tmp_path / "host1").iterdir())
    host = tmp_path / "host0"
    assert hash_state(host / "whole/ckpt.pt") == hash_state(host / "parts/ckpt.pt")
    assert read_rows(host / "whole") == read_rows(host / "parts")


def test_a_changed_number_of_ranks_is_printed(train, half):
    done = train(init_from="resume", max_iters=12, ranks=2)
    assert "ranks 1 -> 2" in done.stdout


def test_another_version_or_number_of_threads_is_printed(train, half):
    # a checkpoint as another machine leaves it
    bundle = load(half / "ckpt.pt") | {"torch": "2.6.0", "threads": 7}
    for path in half.glob("*.pt"):
        path.unlink()
    checkpoint.commit(bundle, half, 2, False, Disk())
    printed = train(init_from="resume", max_iters=11).stdout
    assert "torch 2.6.0 -> " in printed
    assert "threads 7 -> 1" in printed
    # the second time there is nothing to say
    assert "->" not in train(init_from="resume", max_iters=11).stdout


# signals of terminals and batch systems


def start_program(name: str, *args: str, **env: str) -> subprocess.Popen:
    """Start a program of tests/programs and wait until it prints `ready`."""
    process = subprocess.Popen(
        [sys.executable, PROGRAMS / name, *args],
        env=os.environ | env,
        text=True,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_another_ctrl_c_exits_at_once():
    process = start_program("wait_for_signal.py", "uninterruptible")
    # torchrun sends the first one twice, so two within a second are one
    for pause in (0.3, 1.2):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.parametrize(
    "number, ignored, env, seconds, answer",
    [
        (signal.SIGHUP, False, {}, 60, "None True"),
        (signal.SIGXCPU, False, {}, 60, "None True"),
        (signal.SIGUSR2, True, {}, 60, "None True"),
        (signal.SIGHUP, True, {}, 1, "uninterrupted False"),
        # torchrun passes it on
        (signal.SIGHUP, True, {"RANK": "0"}, 60, "None True"),
    ],
    ids=["SIGHUP", "SIGXCPU", "SIGUSR2 ignored", "nohup", "nohup of a rank"],
)
def test_signals_of_batch_systems_and_terminals(number, ignored, env, seconds, answer):
    # a new process inherits what its parent ignores; nohup works like this
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    process = start_program("wait_for_signal.py", str(seconds), **env)
    signal.signal(number, before)
    process.send_signal(number)
    # an ignored signal lets the work end by itself
    assert process.communicate(timeout=60)[0] == f"{answer}\n"


# an evaluation of seconds
LONG_EVALUATION = TINY | {"n_layer": 6, "n_embd": 64, "eval_iters": 400}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{}, {"compile": True, "eval_iters": 2}], ids=["evaluation", "compilation"]
)
def test_a_signal_interrupts_what_takes_long(dataset, tmp_path, flags):
    flags = LONG_EVALUATION | {"dataset": dataset, "init_from": "auto"} | flags
    process = start("train.py", out_dir=tmp_path / "out", **flags)
    # the line before the evaluation of step 0, which compiles first
    while "parameters" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    assert process.returncode == 75
    # the evaluation at step 0 did not finish
    assert not read_rows(tmp_path / "out")


@pytest.mark.slow
def test_ranks_leave_an_evaluation_together(dataset, tmp_path):
    flags = LONG_EVALUATION | {"eval_interval": 5, "dataset": dataset}
    process = start("train.py", ranks=2, out_dir=tmp_path / "out", **flags)
    while "step 5/" not in process.stdout.readline():
        pass
    # in the middle of the evaluation at step 5
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 1
    assert [row["step"] for row in read_rows(tmp_path / "out", "val_loss")] == [0]
    assert load(tmp_path / "out/ckpt.pt")["step"] == 5
