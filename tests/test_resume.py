"""An interrupted and resumed run ends bit-identical to an uninterrupted one."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPO, TINY, bits, command, complaint, rows, run, start

from keepgpt import checkpoint
from keepgpt.checkpoint import Disk


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_twenty_steps_and_twenty_more_equal_forty(train, tmp_path, ranks):
    train(out="whole", ranks=ranks)
    train(out="parts", ranks=ranks, max_iters=20)
    train(out="parts", ranks=ranks, init_from="resume")
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    train(out="other", ranks=ranks, seed=1)
    assert bits(tmp_path / "whole/ckpt.pt") != bits(tmp_path / "other/ckpt.pt")


@pytest.mark.slow
def test_four_ranks_resume_bit_identical(train, tmp_path):
    """DDP's order of addition matters with more than two ranks and several buckets."""
    flags = {
        "ranks": 4,
        "n_embd": 256,
        "n_layer": 4,
        "block_size": 16,
        "batch_size": 1,
        "gradient_accumulation_steps": 4,
        "eval_interval": 100,
        "eval_iters": 1,
    }
    train(out="whole", max_iters=4, **flags)
    train(out="parts", max_iters=2, **flags)
    train(out="parts", max_iters=4, init_from="resume", **flags)
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")


def test_auto_starts_a_run_and_resumes_it(train, tmp_path):
    assert "resuming" not in train(init_from="auto", max_iters=20).stdout
    assert "resuming" in train(init_from="auto").stdout
    train(out="whole")
    assert bits(tmp_path / "out/ckpt.pt") == bits(tmp_path / "whole/ckpt.pt")


def test_auto_with_a_source_starts_there_and_resumes(train, tmp_path):
    train(out="source", max_iters=5)
    source = f"auto:{tmp_path / 'source/ckpt.pt'}"
    flags = {"init_from": source, "learning_rate": 1e-4}
    train(out="whole", **flags)
    first = rows(tmp_path / "whole", "val_loss")[0]["val_loss"]
    assert first == rows(tmp_path / "source", "val_loss")[-1]["val_loss"]
    train(max_iters=20, **flags)
    assert "resuming" in train(**flags).stdout
    assert bits(tmp_path / "out/ckpt.pt") == bits(tmp_path / "whole/ckpt.pt")


def test_a_resumed_run_keeps_settings_not_given_again(train, tmp_path):
    train(max_iters=20, weight_decay=0.3)
    done = run(
        "train.py",
        out_dir=tmp_path / "out",
        init_from="resume",
        max_iters=40,
        beta2=0.9,
    )
    assert "at step 20, max_iters 20 -> 40, beta2 0.95 -> 0.9\n" in done.stdout
    bundle = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert bundle["step"] == 40 and bundle["config"]["n_embd"] == TINY["n_embd"]
    groups = bundle["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0] and [
        g["betas"] for g in groups
    ] == [(0.9, 0.9)] * 2


def test_micro_batch_size_may_change_on_resume(train, tmp_path):
    train(max_iters=20)
    train(init_from="resume", batch_size=8, gradient_accumulation_steps=1, dropout=0.0)
    train(out="whole", dropout=0.0)
    loss = [row["loss"] for row in rows(tmp_path / "out", "loss")][-1]
    assert abs(loss - rows(tmp_path / "whole", "loss")[-1]["loss"]) < 0.1


def test_changing_model_seed_or_batch_is_refused(train, tmp_path):
    train(max_iters=1)
    before = bits(tmp_path / "out/ckpt.pt")
    for flag, value, shown in (
        ("n_layer", 3, "n_layer 2 -> 3"),
        ("seed", 7, "seed 1337 -> 7"),
        ("block_size", 16, "block_size 32 -> 16"),
        ("batch_size", 5, "expected 256 as before, got 320"),
    ):
        assert shown in complaint(train(init_from="resume", code=None, **{flag: value}))
        assert bits(tmp_path / "out/ckpt.pt") == before


def test_resuming_on_another_dataset_is_refused(train, play, tmp_path):
    train(max_iters=1)
    run(
        "prepare.py",
        play,
        name="other",
        tokenizer="char",
        data_dir=tmp_path,
        val_fraction=0.2,
    )
    assert "hamlet" in complaint(
        train(init_from="resume", dataset=tmp_path / "other", code=None)
    )


def test_scratch_never_overwrites_a_run(train, tmp_path):
    train(max_iters=1)
    before = bits(tmp_path / "out/ckpt.pt")
    line = complaint(train(code=None))
    assert "--init_from=resume" in line and "--out_dir=" in line
    assert bits(tmp_path / "out/ckpt.pt") == before


def test_resume_without_a_run_is_refused(train):
    complaint(train(init_from="resume", code=None))


def test_a_moved_folder_resumes_in_its_new_place(train, tmp_path):
    train(out="old", max_iters=20)
    (tmp_path / "old").rename(tmp_path / "out")
    done = run(
        "train.py", cwd=tmp_path, init_from="resume", max_iters=30
    )  # out_dir=out
    assert done.stderr == "" and not (tmp_path / "old").exists()
    saved = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert saved["step"] == 30 and saved["config"]["out_dir"] == "out"


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_skipped_for_an_older_one(train, tmp_path):
    train(out="whole")
    train(out="parts", max_iters=20)
    train(out="parts", init_from="resume", max_iters=30)
    raw = (tmp_path / "parts/ckpt.pt").read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 3] ^= 1
    torch.save({"model": os.system}, tmp_path / "other.pt")
    for name, damaged in {
        "flip": flipped,
        "cut": raw[:-7],
        "empty": b"",
        "text": b"not a bundle\n" * 9,
        "pickle": (tmp_path / "other.pt").read_bytes(),
    }.items():
        out = shutil.copytree(tmp_path / "parts", tmp_path / name)
        for path in (
            out / "ckpt.pt",
            out / "ckpt-00000030.pt",
        ):  # two names of one file
            path.write_bytes(damaged)
        done = train(out=name, init_from="resume")
        assert f"{out}/ckpt.pt: " in done.stderr and "at step 20" in done.stdout, name
        assert bits(out / "ckpt.pt") == bits(tmp_path / "whole/ckpt.pt"), name
        assert rows(out) == rows(tmp_path / "whole"), name


def test_a_checkpoint_moves_its_run_to_another_folder(train, tmp_path):
    train(out="other", seed=2)
    (tmp_path / "third").mkdir()
    shutil.copy(tmp_path / "other/ckpt.pt", tmp_path / "third")
    train(out="third", init_from="resume", max_iters=50)
    train(out="other", init_from="resume", max_iters=50)
    assert bits(tmp_path / "third/ckpt.pt") == bits(tmp_path / "other/ckpt.pt")


def test_no_intact_checkpoint_is_an_error_that_lists_them(train, tmp_path):
    train()
    for path in tmp_path.glob("out/*.pt"):
        path.write_bytes(b"")
    done = train(init_from="resume", code=2)
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "ckpt-00000020.pt: " in done.stderr


SIGNALLED = TINY | {
    "max_iters": 200,
    "lr_decay_iters": 200,
    "eval_interval": 30,
    "log_interval": 1,
    "init_from": "auto",
}


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    """Return the folders of uninterrupted runs, by number of ranks."""
    folders = {ranks: tmp_path_factory.mktemp("uninterrupted") for ranks in (1, 2)}
    for ranks, folder in folders.items():
        run("train.py", ranks=ranks, out_dir=folder, dataset=dataset, **SIGNALLED)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, number",
    [
        (1, signal.SIGINT),
        (1, signal.SIGTERM),
        (1, signal.SIGUSR1),
        (1, signal.SIGKILL),
        (2, signal.SIGTERM),
        (2, signal.SIGKILL),
    ],
)
def test_a_run_resumes_bit_identical_after_a_signal(
    dataset, tmp_path, uninterrupted, ranks, number
):
    flags = {"dataset": dataset, "out_dir": tmp_path / "out", **SIGNALLED}
    log = open(tmp_path / "log", "w+")
    process = subprocess.Popen(
        command("train.py", ranks=ranks, **flags),
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "out/metrics.jsonl"
    while not (metrics.exists() and '"step": 70,' in metrics.read_text()):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    # behind torchrun: one rank, not the launcher
    os.kill(int(workers[-1]) if ranks > 1 else process.pid, number)
    process.wait(timeout=60)
    stopped = rows(tmp_path / "out")[-1]["step"]
    assert process.returncode != 0 and stopped < 200
    if number != signal.SIGKILL:
        assert (
            torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == stopped
        )
    assert ranks > 1 or process.returncode == (-9 if number == signal.SIGKILL else 75)
    run("train.py", ranks=ranks, **flags)
    assert bits(tmp_path / "out/ckpt.pt") == bits(uninterrupted[ranks] / "ckpt.pt")
    assert rows(tmp_path / "out") == rows(uninterrupted[ranks])


@pytest.mark.slow
def test_a_signal_before_the_first_step_exits_75(dataset, tmp_path):
    flags = {
        "dataset": dataset,
        **TINY,
        "out_dir": tmp_path / "out",
        "init_from": "auto",
    }
    process = start("train.py", **flags)
    while not (tmp_path / "out/.lock").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and not err, err
    assert "--init_from=auto" in out
    run("train.py", **flags)
    run("train.py", **flags | {"out_dir": tmp_path / "whole"})
    assert bits(tmp_path / "out/ckpt.pt") == bits(tmp_path / "whole/ckpt.pt")


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(dataset, tmp_path):
    flags = {
        "dataset": dataset,
        **TINY,
        "max_iters": 100000,
        "out_dir": tmp_path / "out",
        "init_from": "auto",
    }
    first = start("train.py", **flags)
    while "step 5/" not in first.stdout.readline():
        pass
    line = complaint(run("train.py", code=None, **flags | {"init_from": "resume"}))
    assert str(tmp_path / "out") in line
    # a restart loop's command waits for a run that is ending
    second = start("train.py", **flags | {"max_iters": 40})
    assert str(tmp_path / "out") in second.stdout.readline()
    first.kill()
    first.wait()
    second.communicate(timeout=60)
    assert second.returncode == 0


def test_newest_best_and_older_checkpoints_are_kept(train, tmp_path):
    train(eval_interval=10, keep_checkpoints=3)
    names = {path.name for path in (tmp_path / "out").glob("*.pt*")}
    assert names == {
        "ckpt.pt",
        "best.pt",
        "ckpt-00000020.pt",
        "ckpt-00000030.pt",
        "ckpt-00000040.pt",
    }
    losses = {
        row["step"]: row["val_loss"]
        for row in rows(tmp_path / "out", "val_loss")
        if row["step"]
    }
    best = torch.load(tmp_path / "out/best.pt", weights_only=True)
    assert best["step"] == min(losses, key=losses.get) and best["best_val_loss"] == min(
        losses.values()
    )
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("ranks, dtype", [(1, "float32"), (2, "bfloat16")])
def test_a_compiled_run_resumes_bit_identical(train, tmp_path, ranks, dtype):
    """With two threads, compiled code repeats only with deterministic algorithms."""
    flags = {
        "compile": True,
        "env": {"OMP_NUM_THREADS": "2"},
        "n_layer": 1,
        "ranks": ranks,
        "dtype": dtype,
    }
    train(out="whole", **flags)
    train(out="parts", max_iters=20, **flags)
    assert ", compiled" in train(out="parts", init_from="resume", **flags).stdout
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


class Payload:
    """Make a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_runs_no_code(train, tmp_path):
    train(max_iters=20)
    planted = str(tmp_path / "planted")
    whole = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    newest = tmp_path / "out/ckpt-00000099.pt"
    # an attacker computes the right checksum
    checkpoint.write_bundle(
        whole | {"step": 99, "wandb_run_id": Payload(planted)},
        newest,
        checkpoint.Disk(),
    )
    newest.replace(tmp_path / "out/ckpt.pt")
    done = train(init_from="resume")
    assert "out/ckpt.pt: " in done.stderr
    assert "at step 20" in done.stdout and not os.path.exists(planted)
    path = tmp_path / "evil.pt"
    checkpoint.write_bundle({"model": Payload(planted)}, path, checkpoint.Disk())
    complaint(train(init_from=path, out="new", code=None))
    complaint(run("sample.py", init_from=path, code=None))
    assert not os.path.exists(planted)
    torch.load(path, weights_only=False)  # shows that the payload works
    assert os.path.exists(planted)


@pytest.mark.slow
def test_only_rank_0_needs_out_dir(dataset, tmp_path):
    """Each rank gets its own working folder, as on separate machines."""
    wrapper = tmp_path / "on_its_own_machine.py"
    wrapper.write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "host = f'host{os.environ[\"RANK\"]}'\n"
        "os.makedirs(host, exist_ok=True)\nos.chdir(host)\n"
        f"runpy.run_path({str(REPO / 'train.py')!r}, run_name='__main__')\n"
    )
    flags = TINY | {
        "dataset": dataset,
        "ranks": 2,
        "init_from": "auto",
        "cwd": tmp_path,
    }
    run(wrapper, out_dir="whole", **flags)
    run(wrapper, out_dir="parts", **flags | {"max_iters": 20})
    assert "resuming parts at step 20" in run(wrapper, out_dir="parts", **flags).stdout
    assert not list((tmp_path / "host1").iterdir())
    assert bits(tmp_path / "host0/whole/ckpt.pt") == bits(
        tmp_path / "host0/parts/ckpt.pt"
    )


def test_a_changed_number_of_ranks_is_printed(train, tmp_path):
    train(max_iters=2)
    assert "ranks 1 -> 2" in train(init_from="resume", max_iters=4, ranks=2).stdout


def test_another_version_or_number_of_threads_is_printed(train, tmp_path):
    train(max_iters=2)
    for path in tmp_path.glob("out/*.pt"):
        bundle = torch.load(path, weights_only=True)
        path.unlink()
    checkpoint.commit(
        bundle | {"torch": "2.6.0", "threads": 7}, tmp_path / "out", 2, False, Disk()
    )
    said = train(init_from="resume", max_iters=3).stdout
    assert "torch 2.6.0 -> " in said and "threads 7 -> 1" in said
    assert "->" not in train(init_from="resume", max_iters=3).stdout


def test_a_corrupt_checkpoint_is_read_once(train, tmp_path):
    train(max_iters=20)
    newest = tmp_path / "out/ckpt.pt"
    os.truncate(
        newest, newest.stat().st_size - 1
    )  # also as ckpt-00000020.pt and best.pt
    assert train(init_from="resume", code=2).stderr.count("skipping ") == 1


def test_a_resume_without_a_reader_does_not_claim_success(train, dataset, tmp_path):
    """A restart loop takes exit code 0 for a run at max_iters."""
    train(max_iters=20)
    process = start(
        "train.py",
        **TINY
        | {
            "dataset": dataset,
            "out_dir": tmp_path / "out",
            "init_from": "resume",
            "max_iters": 40,
        },
    )
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert rows(tmp_path / "out")[-1]["step"] == 40


def test_another_ctrl_c_exits_at_once(tmp_path):
    code = (
        "import time\nfrom keepgpt.signals import Signals\nsignals = Signals()\n"
        "signals.interruptible = False\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    for pause in (0.3, 1.2):  # torchrun sends the first one twice
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


PROGRAM = """import sys, time
from keepgpt.signals import Signals
signals = Signals()
def work():
    print("ready", flush=True)
    time.sleep(5)
    return "uninterrupted"
print(signals.interrupt(work, True), signals.received > 0)
"""


@pytest.mark.parametrize(
    "number, ignored, env, answer",
    [
        (signal.SIGHUP, False, {}, "None True"),
        (signal.SIGXCPU, False, {}, "None True"),
        (signal.SIGUSR2, False, {}, "None True"),
        (signal.SIGUSR2, True, {}, "None True"),
        (signal.SIGHUP, True, {}, "uninterrupted False"),
        (signal.SIGHUP, True, {"RANK": "0"}, "None True"),
    ],
)  # torchrun passes it on
def test_signals_of_batch_systems_and_terminals(number, ignored, env, answer):
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=REPO,
        text=True,
        env=os.environ | env,
        stdout=subprocess.PIPE,
    )
    signal.signal(number, before)
    process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == f"{answer}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, flags",
    [(1, {"eval_iters": 400}), (2, {"eval_iters": 400}), (1, {"compile": True})],
)
def test_a_signal_interrupts_evaluation_and_compilation(
    dataset, tmp_path, ranks, flags
):
    flags = TINY | {
        "dataset": dataset,
        "out_dir": tmp_path / "out",
        "n_layer": 6,
        "n_embd": 64,
        "init_from": "auto",
        "max_iters": 6,
        **flags,
    }
    process = start("train.py", ranks=ranks, **flags)
    while (
        "parameters" not in process.stdout.readline()
    ):  # an evaluation of seconds follows
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM if ranks > 1 else signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == (75 if ranks == 1 else 1)
    assert not rows(tmp_path / "out")  # the evaluation at step 0 did not finish


@pytest.mark.slow
def test_ranks_leave_an_evaluation_together(dataset, tmp_path):
    flags = TINY | {
        "dataset": dataset,
        "out_dir": tmp_path / "out",
        "n_layer": 6,
        "n_embd": 64,
        "eval_iters": 400,
        "eval_interval": 5,
        "max_iters": 10,
    }
    process = start("train.py", ranks=2, **flags)
    while (
        "step 5/" not in process.stdout.readline()
    ):  # an evaluation of seconds follows
        pass
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert [row["step"] for row in rows(tmp_path / "out", "val_loss")] == [0]
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == 5
