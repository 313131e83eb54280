"""Bad numbers: a step is computed again, then its data is skipped. Milestones, going back,
branches."""

import hashlib
import math
import os
import signal
import subprocess

import pytest
import torch
from conftest import TINY, load, read_error, read_rows, run
from test_cuda import tiny_run  # noqa: F401

import train as script
from keepgpt.checkpoint import list_numbered, read_bundle
from keepgpt.errors import NotFinite
from keepgpt.files import FolderLock
from keepgpt.loader import batch_number
from keepgpt.metrics import Metrics
from keepgpt.signals import Signals
from tools.crash.common import RUN
from tools.crash.jobs import poison
from tools.runs import digest, state_of

# which batch a step reads


def test_a_skip_moves_the_batches_of_later_steps():
    skips = {3: 2, 5: 1}
    batches = [batch_number(step, skips) for step in range(8)]
    assert batches == [0, 1, 2, 5, 6, 8, 9, 10]
    # a branch with other data counts from its own start
    assert batch_number(107, {}, start=100) == 7


# in this process, where numbers can be made bad


@pytest.fixture(params=[True, False], ids=["host waits", "host does not wait"])
def train_tiny(request, tiny_run, tmp_path, monkeypatch):  # noqa: F811
    """Return a function that trains 12 steps and returns the run. `spoil(run, losses, count)` may
    change each gradient and the losses; `count` says how often that step was computed before."""
    if not request.param:
        # as on CUDA: the optimizer learns on the device that it must not change anything
        monkeypatch.setattr(script, "must_host_wait", lambda run: False)
    compute = script.compute_gradient
    locks = []

    def keep(run, losses, count):
        return losses

    def train(spoil=keep, **settings):
        # those computed so far, to count the attempts at each
        batches = []

        def compute_and_spoil(run):
            losses = compute(run)
            count = batches.count(run.state.next_batch)
            batches.append(run.state.next_batch)
            return spoil(run, losses, count)

        monkeypatch.setattr(script, "compute_gradient", compute_and_spoil)
        settings = {"max_iters": 12, "log_interval": 5, "eval_iters": 1} | settings
        result = tiny_run(**settings)
        # a test may train several runs
        result.lock = FolderLock(tmp_path / f"lock{len(locks)}")
        result.lock.acquire(0)
        locks.append(result.lock)
        result.metrics = Metrics(None, 0, False)
        signals = Signals()
        try:
            script.train(result, signals)
        finally:
            signals.restore()
        return result

    yield train
    for lock in locks:
        lock.release()


def digest_weights(result):
    return digest(result.state.model.state_dict())


def test_a_result_that_does_not_repeat_keeps_its_data(train_tiny, capsys):
    def spoil(run, losses, count):
        # only the first time
        if run.state.next_batch == 3 and count == 0:
            return losses + math.nan
        return losses

    # computed again, the step gives what it gives without the fault
    expected = digest_weights(train_tiny())
    result = train_tiny(spoil)
    assert digest_weights(result) == expected
    assert result.state.replays == 1
    assert result.state.skips == {}
    assert "step 4: loss nan" in capsys.readouterr().out


def test_the_same_bad_result_twice_skips_its_data(train_tiny):
    def spoil(run, losses, count):
        return losses + math.nan if run.state.next_batch in (3, 4, 8) else losses

    result = train_tiny(spoil)
    # batch 8 is the one of step 6, since two were skipped before
    assert result.state.skips == {3: 2, 6: 1}
    assert result.state.replays == 0
    assert result.state.step == 12
    for p in result.state.model.parameters():
        assert p.isfinite().all()


def test_a_gradient_of_nan_is_skipped_as_well(train_tiny):
    # the loss is finite, the gradient is not
    def spoil(run, losses, count):
        if run.state.next_batch == 2:
            next(run.state.model.parameters()).grad[0, 0] = math.nan
        return losses

    assert train_tiny(spoil).state.skips == {2: 1}


def test_more_bad_batches_in_a_row_than_max_skips_end_the_run(train_tiny):
    # every batch from the fifth step on
    def spoil(run, losses, count):
        return losses + math.inf if run.state.next_batch >= 4 else losses

    with pytest.raises(NotFinite, match=r"step 5: .* after 2 skipped batches"):
        train_tiny(spoil, max_skips=2)
    with pytest.raises(NotFinite, match=r"step 5: loss inf.*not finite"):
        train_tiny(spoil, max_skips=0)


def test_a_stop_goes_back_to_the_last_update_that_was_made(train_tiny):
    def spoil(run, losses, count):
        if run.state.next_batch == 8:
            signal.raise_signal(signal.SIGTERM)
        return losses + math.nan if run.state.next_batch >= 5 else losses

    # batches 5 to 8 are bad; nobody looks at them before the stop
    result = train_tiny(spoil, log_interval=100, max_skips=100)
    assert result.state.step == result.updates == 5


def test_a_signal_after_a_failed_save_saves_the_best_again(train_tiny, monkeypatch):
    # the first evaluation finds the best loss so far; the signal comes before it is saved
    saves = []

    def find_best(run, signals):
        run.state.evaluation = {"step": run.state.step, "val_loss": 1.0}
        return run.state.step == 4

    # the first save fails
    monkeypatch.setattr(script, "evaluate_and_log", find_best)
    monkeypatch.setattr(script, "save", lambda run, best: saves.append(best))
    monkeypatch.setattr(script, "is_on_disk", lambda run: len(saves) > 1)

    def stop_after_the_evaluation(run, losses, count):
        if run.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    train_tiny(stop_after_the_evaluation, eval_interval=4)
    assert saves == [True, True]


def test_a_checkpoint_leaves_out_the_skips_of_its_next_update(tiny_run):  # noqa: F811
    state = tiny_run().state
    state.step = 5
    # step 5 has not been made: it looks for its batch again after a resume
    state.skips = {3: 1, 5: 2}
    assert state.state_dict()["skips"] == {3: 1}


def test_a_spike_skips_its_data(train_tiny, monkeypatch):
    # the gradient's norm is compared with the last four
    monkeypatch.setattr(script, "SPIKE_WINDOW", 4)
    factors = {2: 100, 7: 100, 8: 2}

    def spoil(run, losses, count):
        for p in run.state.model.parameters():
            p.grad *= factors.get(run.state.next_batch, 1)
        return losses

    # the window is not full at batch 2; 2 is below the factor at batch 8
    assert train_tiny(spoil, spike_factor=5.0).state.skips == {7: 1}
    assert train_tiny(spoil).state.skips == {}


def test_float16_counts_only_a_collapsed_scale(tiny_run):  # noqa: F811
    result = tiny_run(max_skips=1)
    result.metrics = Metrics(None, 0, False, quiet=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    result.state.scaler = scaler

    def step():
        losses = script.compute_gradient(result)
        next(result.state.model.parameters()).grad[0, 0] = math.inf
        script.update(result, losses)
        return script.check_updates(result)

    before = digest_weights(result)
    # the scaler skips the update at 4 and 2
    assert step()
    assert step()
    # at 1 the scale would collapse: again, then the next batch, and again
    assert not step()
    assert not step()
    assert not step()
    assert result.state.skips == {2: 1}
    with pytest.raises(NotFinite, match="step 3: "):
        step()
    assert digest_weights(result) == before
    assert scaler.get_scale() == 1


# real runs on data that gives NaN


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """Return the settings of a run with a few batches that give NaN, and its uninterrupted end."""
    folder = tmp_path_factory.mktemp("poisoned")
    # elastic: one run is the reference for one and for two ranks
    settings = RUN | poison(folder)
    settings |= {
        "elastic": True,
        "gradient_accumulation_steps": 4,
        "max_iters": 100,
        "eval_interval": 50,
        "checkpoint_interval": 25,
    }
    run("train.py", out_dir=folder / "whole", **settings)
    return settings, folder / "whole"


@pytest.mark.slow
def test_batches_that_give_nan_are_skipped(poisoned):
    _, whole = poisoned
    bundle = load(whole / "ckpt.pt")
    assert bundle["skips"]
    # always NaN: it did not help to compute a step again
    assert bundle["replays"] == 0
    # the curve has each step once, and only numbers
    steps = [row["step"] for row in read_rows(whole, "loss")]
    assert steps == list(range(1, 101))
    assert "NaN" not in (whole / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_skipped_batches_are_listed(poisoned):
    _, whole = poisoned
    skips = load(whole / "ckpt.pt")["skips"]
    # a row for each skipped batch; steps count from 0 in the bundle, from 1 in the log
    expected = []
    for step, count in skips.items():
        expected += [(step + 1, "skip")] * count
    events = read_rows(whole, "event")
    assert [(row["step"], row["event"]) for row in events] == expected
    card = (whole / "README.md").read_text()
    for step in skips:
        assert f"before step {step + 1}" in card


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2], ids=["1 rank", "2 ranks"])
def test_a_resumed_run_skips_the_same(poisoned, tmp_path, ranks):
    settings, whole = poisoned
    out = tmp_path / "out"
    # an end between two saves: the next start computes steps again
    for max_iters in (40, 77, 100):
        flags = settings | {"max_iters": max_iters, "out_dir": out}
        run("train.py", ranks=ranks, **flags)
    # an end is evaluated, which the other run did not do at these steps
    keys = ("model", "optimizer", "step", "skips", "norms")
    assert_equal_ends(out, whole, keys)
    assert read_rows(out, "loss") == read_rows(whole, "loss")


@pytest.mark.slow
def test_max_skips_of_0_stops_at_the_first_bad_batch(poisoned, tmp_path):
    settings, whole = poisoned
    first = min(load(whole / "ckpt.pt")["skips"])
    flags = settings | {"max_skips": 0, "out_dir": tmp_path / "out"}
    done = run("train.py", code=3, **flags)
    assert f"step {first + 1}: " in done.stderr


# milestones


@pytest.fixture(scope="module")
def trunk(dataset, tmp_path_factory):
    """Return the folder of a run of 20 steps with a milestone each 6 steps. Tests only read it."""
    out = tmp_path_factory.mktemp("trunk") / "trunk"
    run("train.py", out_dir=out, dataset=dataset, keep_every=6, **TINY)
    return out


@pytest.fixture
def copy(trunk, tmp_path):
    """Return tmp_path/out, a copy of that folder."""
    # shutil would turn hard links into copies
    subprocess.run(
        [
            "cp",
            "-a",
            trunk,
            tmp_path / "out",
        ],
        check=True,
    )
    return tmp_path / "out"


def list_names(folder, pattern="*.pt"):
    return sorted(path.name for path in folder.glob(pattern))


def assert_equal_ends(folder, other, keys):
    """Fail if the last checkpoints of two runs differ in one of the keys."""
    bundle = load(folder / "ckpt.pt")
    other_bundle = load(other / "ckpt.pt")
    assert state_of(bundle, keys) == state_of(other_bundle, keys)


def test_milestones_are_kept_as_hard_links(trunk):
    expected = [f"step-{step:08d}.pt" for step in (6, 12, 18)]
    assert list_names(trunk, "step-*.pt") == expected
    # the numbered checkpoints are the last two
    assert len(list_numbered(trunk)) == 2
    assert (trunk / expected[-1]).samefile(trunk / "ckpt-00000018.pt")
    assert load(trunk / expected[0])["step"] == 6


def test_sample_takes_the_checkpoint_of_a_step(trunk):
    # the error lists the steps that there are
    flags = {"out_dir": trunk, "max_new_tokens": 5, "num_samples": 1}
    assert ": step 6" in run("sample.py", step=6, **flags).stderr
    error = read_error(
        run(
            "sample.py",
            step=7,
            code=2,
            **flags,
        )
    )
    assert "step 7" in error
    assert "6, 12, 18, 20" in error


def test_going_back_to_a_missing_step_loses_nothing(copy):
    before = list_names(copy)
    flags = {"init_from": "resume", "step": 5, "out_dir": copy}
    read_error(run("train.py", code=2, **flags))
    assert list_names(copy) == before
    assert not list(copy.glob("aside-*"))


def test_going_back_drops_what_came_later(copy):
    flags = {"init_from": "resume", "step": 6, "out_dir": copy}
    # the rate is another one, and so is the end
    run("train.py", learning_rate=1e-3, max_iters=9, **flags)
    assert list_names(copy, "step-*.pt") == ["step-00000006.pt"]
    assert list_names(copy, "ckpt-*.pt") == ["ckpt-00000009.pt"]
    assert load(copy / "best.pt")["step"] <= 9
    assert max(row["step"] for row in read_rows(copy, "loss")) <= 9
    # a restart loop repeats the command: it goes back once
    done = run("train.py", max_iters=12, **flags)
    assert "at step 9" in done.stdout


def test_going_back_keeps_later_files_beside_the_run(copy):
    log = (copy / "metrics.jsonl").read_text()
    flags = {"init_from": "resume", "step": 6, "out_dir": copy}
    run("train.py", max_iters=9, **flags)
    # named for the step that the run had reached
    aside = copy / "aside-00000020"
    moved = ["ckpt-00000018.pt", "ckpt-00000020.pt"]
    moved += ["step-00000012.pt", "step-00000018.pt"]
    assert list_names(aside, "*-*.pt") == moved
    for path in aside.glob("*.pt"):
        assert read_bundle(path)
    assert (aside / "metrics.jsonl").read_text() == log


def test_a_kill_after_going_back_leaves_one_history(copy):
    flags = {"init_from": "resume", "out_dir": copy, "checkpoint_interval": 1000}
    # it ends where it went back to, as if killed there: the later steps must not come back
    run("train.py", step=6, max_iters=6, **flags)
    assert load(copy / "ckpt.pt")["step"] == 6
    done = run("train.py", max_iters=8, **flags)
    assert "at step 6" in done.stdout


def test_an_evaluation_of_a_step_moves_nothing(copy):
    before = sorted(copy.rglob("*"))
    done = run("train.py", eval_only=True, step=6, out_dir=copy)
    assert "step 6: " in done.stdout
    assert "going back" not in done.stderr
    assert sorted(copy.rglob("*")) == before


def test_two_different_bad_results_are_both_shown(train_tiny, capsys):
    # infinite at first, then NaN
    def spoil(run, losses, count):
        if run.state.next_batch != 3:
            return losses
        return losses + (math.inf, math.nan)[count]

    result = train_tiny(spoil)
    assert result.state.skips == {3: 1}
    assert result.state.replays == 1
    assert "first loss inf" in capsys.readouterr().out


def test_a_branch_drops_the_log_of_a_run_that_never_saved(trunk, tmp_path):
    out = tmp_path / "branch"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    branch = {"init_from": f"branch:{trunk}", "step": 12}
    run("train.py", out_dir=out, max_iters=15, **branch)
    assert [row["step"] for row in read_rows(out, "loss")] == [15]


def test_going_back_without_a_change_ends_the_same(copy, trunk):
    # it computes steps 13 to 20 again
    run("train.py", init_from="resume", step=12, out_dir=copy)
    keys = ("model", "optimizer", "step", "evaluation")
    assert_equal_ends(copy, trunk, keys)
    assert read_rows(copy, "loss") == read_rows(trunk, "loss")


def test_a_milestone_is_the_last_resort(copy):
    # all others are truncated. Step 18 is the same file as a numbered one.
    for path in (copy / "best.pt", *list_numbered(copy)):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
    (copy / "step-00000006.pt").unlink()
    done = run("train.py", init_from="resume", out_dir=copy, max_iters=21)
    assert "at step 12" in done.stdout


def test_a_drive_that_will_be_full_is_reported(tiny_run, tmp_path, capsys):  # noqa: F811
    for keep_every, is_reported in ((0, False), (1, True)):
        result = tiny_run(keep_every=keep_every, max_iters=10**9)
        result.saver.folder = tmp_path
        script.warn_if_disk_full(result, parameters=10**6)
        # a milestone each step, and the others
        warning = "1000000004 checkpoints to come need about"
        assert (warning in capsys.readouterr().err) == is_reported


# branches


def test_a_branch_without_a_change_is_its_trunk(trunk, tmp_path):
    out = tmp_path / "branch"
    branch = {"init_from": f"branch:{trunk}", "step": 12}
    run("train.py", out_dir=out, max_iters=20, **branch)
    keys = ("model", "optimizer", "step", "evaluation", "rng", "best_val_loss")
    assert_equal_ends(out, trunk, keys)
    # the rows before step 12 are the trunk's
    later = [row for row in read_rows(trunk, "loss") if row["step"] > 12]
    assert read_rows(out, "loss") == later


def test_a_branch_names_its_trunk(trunk, tmp_path):
    out = tmp_path / "branch"
    source = trunk / "step-00000006.pt"
    flags = {"init_from": f"auto:branch:{source}", "out_dir": out}
    run("train.py", max_iters=8, learning_rate=1e-4, **flags)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    bundle = load(out / "ckpt.pt")
    assert bundle["trunk"] == {"path": str(source), "step": 6, "sha256": sha256}
    assert sha256 in (out / "README.md").read_text()
    assert bundle["config"]["learning_rate"] == 1e-4
    # a restart loop repeats the command, also with a step of the trunk
    other = {"init_from": f"auto:branch:{trunk}", "step": 12}
    other["out_dir"] = tmp_path / "other"
    run("train.py", max_iters=14, **other)
    done = run("train.py", max_iters=15, **other)
    assert "resuming" in done.stdout
    assert "at step 14" in done.stdout
    # a restart continues the branch
    done = run("train.py", max_iters=9, **flags)
    assert "resuming" in done.stdout
    assert "at step 8" in done.stdout


def test_a_branch_starts_other_data_at_its_beginning(trunk, play, tmp_path):
    # the same characters in another order
    text = play.read_text()
    (tmp_path / "text.txt").write_text(text[30_000:] + text[:30_000])
    flags = {"name": "other", "tokenizer": "char", "data_dir": tmp_path}
    run("prepare.py", tmp_path / "text.txt", **flags)
    # a run can't change its data, a branch can
    other = {"dataset": tmp_path / "other"}
    done = run(
        "train.py",
        init_from="resume",
        out_dir=trunk,
        code=2,
        **other,
    )
    assert "not the hamlet" in read_error(done)
    branch = {"init_from": f"branch:{trunk}", "out_dir": tmp_path / "branch"}
    done = run("train.py", max_iters=22, **branch, **other)
    assert "with other from its beginning" in done.stdout
    bundle = load(tmp_path / "branch/ckpt.pt")
    assert bundle["data_start"] == 20
    assert bundle["skips"] == {}
    assert bundle["data"]["name"] == "other"
    assert bundle["evaluation"]["step"] == 22


def test_a_branch_may_have_a_longer_context(dataset, tmp_path):
    short = tmp_path / "short"
    settings = TINY | {"architecture": "qwen3", "dataset": dataset, "max_iters": 10}
    run("train.py", out_dir=short, **settings)
    longer = {"block_size": 64, "batch_size": 2, "init_from": f"auto:branch:{short}"}
    done = run("train.py", out_dir=tmp_path / "long", max_iters=20, **longer)
    assert "with hamlet from its beginning, at step 10" in done.stdout
    assert "block_size 32 -> 64" in done.stdout
    # other windows have other losses
    assert "up to rounding" not in done.stdout
    bundle = load(tmp_path / "long/ckpt.pt")
    assert bundle["model_args"]["block_size"] == bundle["config"]["block_size"] == 64
    assert bundle["data_start"] == 10
    # an interrupted one ends the same
    for steps in (13, 20):
        run("train.py", out_dir=tmp_path / "again", max_iters=steps, **longer)
    assert_equal_ends(tmp_path / "again", tmp_path / "long", ("model", "optimizer"))


def test_a_branch_with_a_longer_context_needs_rotary_positions(trunk, tmp_path):
    longer = {"block_size": 64, "batch_size": 2, "init_from": f"branch:{trunk}"}
    done = run("train.py", out_dir=tmp_path / "out", max_iters=30, code=2, **longer)
    assert "with block_size=64: do not fit the network" in read_error(done)
    # a step has as many tokens as before
    longer["batch_size"] = 4
    done = run("train.py", out_dir=tmp_path / "out", max_iters=30, code=2, **longer)
    assert "expected 256 as before" in read_error(done)


@pytest.mark.parametrize(
    "source, step, part",
    [
        ("nowhere", 0, "No such file"),
        ("README.md", 0, "not a checkpoint"),
        ("ckpt.pt", 6, "needs a run's folder"),
        ("", 7, "no intact checkpoint of step 7"),
    ],
    ids=["a missing file", "another file", "a step of one file", "a missing step"],
)
def test_a_wrong_trunk_is_one_line(trunk, tmp_path, source, step, part):
    flags = {"init_from": f"branch:{trunk / source}", "out_dir": tmp_path / "out"}
    assert part in read_error(run("train.py", step=step, code=2, **flags))


def test_a_branch_has_steps_left_to_train(trunk, tmp_path):
    flags = {"init_from": f"branch:{trunk}", "step": 12, "out_dir": tmp_path / "out"}
    done = run("train.py", max_iters=12, code=2, **flags)
    assert "max_iters=12" in read_error(done)
    run("train.py", max_iters=13, **flags)


def test_a_branch_does_not_replace_a_run(copy, trunk):
    flags = {"init_from": f"branch:{trunk}", "out_dir": copy}
    assert "already holds a run" in read_error(run("train.py", code=2, **flags))
