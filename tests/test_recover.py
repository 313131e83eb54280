"""Bad numbers: a step is computed again, then its data is skipped. Milestones, going back,
branches."""

import hashlib
import math
import signal
import subprocess

import pytest
import torch
from conftest import TINY, complaint, load, rows, run
from test_cuda import tiny_run  # noqa: F401

import train as script
from keepgpt.checkpoint import numbered, read_bundle
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

    def train(spoil=lambda run, losses, count: losses, **settings):
        computed = []

        def spoiled(run):
            losses = compute(run)
            count = computed.count(run.state.batch)
            computed.append(run.state.batch)
            return spoil(run, losses, count)

        monkeypatch.setattr(script, "compute_gradient", spoiled)
        settings = {"max_iters": 12, "log_interval": 5, "eval_iters": 1} | settings
        result = tiny_run(**settings)
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


def weights(result):
    return digest(result.state.model.state_dict())


def test_a_result_that_does_not_repeat_keeps_its_data(train_tiny, capsys):
    expected = weights(train_tiny())
    result = train_tiny(
        lambda run, losses, count: (
            losses + math.nan if run.state.batch == 3 and not count else losses
        )
    )
    assert weights(result) == expected
    assert (result.state.replays, result.state.skips) == (1, {})
    assert "step 4: loss nan" in capsys.readouterr().out


def test_the_same_bad_result_twice_skips_its_data(train_tiny):
    def spoil(run, losses, count):
        return losses + math.nan if run.state.batch in (3, 4, 8) else losses

    result = train_tiny(spoil)
    assert result.state.skips == {3: 2, 6: 1}
    assert (result.state.replays, result.state.step) == (0, 12)
    assert all(p.isfinite().all() for p in result.state.model.parameters())


def test_a_gradient_of_nan_is_skipped_as_well(train_tiny):
    def spoil(run, losses, count):
        if run.state.batch == 2:
            next(run.state.model.parameters()).grad[0, 0] = math.nan
        return losses

    assert train_tiny(spoil).state.skips == {2: 1}


def test_more_bad_batches_in_a_row_than_max_skips_end_the_run(train_tiny):
    def spoil(run, losses, count):
        return losses + math.inf if run.state.batch >= 4 else losses

    with pytest.raises(NotFinite, match=r"step 5: .* after 2 skipped batches"):
        train_tiny(spoil, max_skips=2)
    with pytest.raises(NotFinite, match=r"step 5: loss inf.*not finite"):
        train_tiny(spoil, max_skips=0)


def test_a_stop_goes_back_to_the_last_update_that_was_made(train_tiny):
    def spoil(run, losses, count):
        if run.state.batch == 8:
            signal.raise_signal(signal.SIGTERM)
        return losses + math.nan if run.state.batch >= 5 else losses

    result = train_tiny(spoil, log_interval=100, max_skips=100)
    assert result.state.step == result.updates == 5


def test_a_checkpoint_leaves_out_the_skips_of_its_next_update(tiny_run):  # noqa: F811
    state = tiny_run().state
    state.step = 5
    state.skips = {3: 1, 5: 2}
    assert state.state_dict()["skips"] == {3: 1}


def test_a_spike_skips_its_data(train_tiny, monkeypatch):
    monkeypatch.setattr(script, "SPIKE_WINDOW", 4)

    def spoil(run, losses, count):
        factor = {2: 100, 7: 100, 8: 2}.get(run.state.batch, 1)
        for p in run.state.model.parameters():
            p.grad *= factor
        return losses

    # the window is not full at batch 2; 2 is below the factor at batch 8
    assert train_tiny(spoil, spike_factor=5.0).state.skips == {7: 1}
    assert train_tiny(spoil).state.skips == {}


def test_float16_counts_only_a_collapsed_scale(tiny_run):  # noqa: F811
    result = tiny_run(max_skips=1)
    result.metrics = Metrics(None, 0, False, quiet=True)
    result.state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step():
        losses = script.compute_gradient(result)
        next(result.state.model.parameters()).grad[0, 0] = math.inf
        script.update(result, losses)
        return script.check_updates(result)

    before = weights(result)
    # the scaler skips the update at 4 and 2
    assert [step(), step()] == [True, True]
    # at 1 the scale would collapse: again, then the next batch, and again
    assert [step(), step(), step()] == [False, False, False]
    assert result.state.skips == {2: 1}
    with pytest.raises(NotFinite, match="step 3: "):
        step()
    assert weights(result) == before
    assert result.state.scaler.get_scale() == 1


# real runs on data that gives NaN


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """Return the settings of a run with a few batches that give NaN, and its uninterrupted end."""
    place = tmp_path_factory.mktemp("poisoned")
    settings = RUN | poison(place)
    settings |= {"elastic": True, "gradient_accumulation_steps": 4}
    settings |= {"max_iters": 100, "eval_interval": 50, "checkpoint_interval": 25}
    run("train.py", out_dir=place / "whole", **settings)
    return settings, place / "whole"


def test_batches_that_give_nan_are_skipped_and_listed(poisoned):
    _, whole = poisoned
    bundle = load(whole / "ckpt.pt")
    events = [row for row in rows(whole) if "event" in row]
    assert bundle["skips"] and bundle["replays"] == 0
    expected = [step + 1 for step, n in bundle["skips"].items() for _ in range(n)]
    assert [row["step"] for row in events] == expected
    assert {row["event"] for row in events} == {"skip"}
    # the curve has each step once, and only numbers
    steps = [row["step"] for row in rows(whole, "loss")]
    assert steps == list(range(1, 101))
    assert "NaN" not in (whole / "metrics.jsonl").read_text()
    card = (whole / "README.md").read_text()
    assert all(f"before step {step + 1}" in card for step in bundle["skips"])


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
    ends = [state_of(load(folder / "ckpt.pt"), keys) for folder in (out, whole)]
    assert ends[0] == ends[1]
    assert rows(out, "loss") == rows(whole, "loss")


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
    subprocess.run(["cp", "-a", trunk, tmp_path / "out"], check=True)
    return tmp_path / "out"


def names(folder, pattern="*.pt"):
    return sorted(path.name for path in folder.glob(pattern))


def test_milestones_are_kept_as_hard_links(trunk):
    expected = [f"step-{step:08d}.pt" for step in (6, 12, 18)]
    assert names(trunk, "step-*.pt") == expected
    assert len(numbered(trunk)) == 2
    assert (trunk / expected[-1]).samefile(trunk / "ckpt-00000018.pt")
    assert load(trunk / expected[0])["step"] == 6


def test_sample_takes_the_checkpoint_of_a_step(trunk):
    flags = {"out_dir": trunk, "max_new_tokens": 5, "num_samples": 1}
    assert ": step 6" in run("sample.py", step=6, **flags).stderr
    error = complaint(run("sample.py", step=7, code=2, **flags))
    assert "step 7" in error and "6, 12, 18, 20" in error


def test_a_run_goes_back_once_and_drops_what_came_later(copy):
    flags = {"init_from": "resume", "step": 6, "out_dir": copy}
    # a wrong number loses nothing
    before = names(copy)
    complaint(run("train.py", code=2, **flags | {"step": 5}))
    assert names(copy) == before
    assert not list(copy.glob("aside-*"))
    log = (copy / "metrics.jsonl").read_text()
    # the rate is another one, and so is the end
    run("train.py", learning_rate=1e-3, max_iters=9, **flags)
    assert names(copy, "step-*.pt") == ["step-00000006.pt"]
    assert names(copy, "ckpt-*.pt") == ["ckpt-00000009.pt"]
    assert load(copy / "best.pt")["step"] <= 9
    assert max(row["step"] for row in rows(copy, "loss")) <= 9
    # the later files are intact, and beside the run
    aside = copy / "aside-00000020"
    moved = ["ckpt-00000018.pt", "ckpt-00000020.pt"]
    moved += ["step-00000012.pt", "step-00000018.pt"]
    assert names(aside, "*-*.pt") == moved
    assert all(read_bundle(path) for path in aside.glob("*.pt"))
    assert (aside / "metrics.jsonl").read_text() == log
    # a restart loop repeats the command
    done = run("train.py", max_iters=12, **flags)
    assert "at step 9" in done.stdout


def test_a_kill_after_going_back_leaves_one_history(copy):
    flags = {"init_from": "resume", "out_dir": copy, "checkpoint_interval": 1000}
    run("train.py", step=6, max_iters=6, **flags)
    assert load(copy / "ckpt.pt")["step"] == 6
    done = run("train.py", max_iters=8, **flags)
    assert "at step 6" in done.stdout


def test_an_evaluation_of_a_step_moves_nothing(copy):
    before = sorted(copy.rglob("*"))
    done = run("train.py", eval_only=True, step=6, out_dir=copy)
    assert "step 6: " in done.stdout and "going back" not in done.stderr
    assert sorted(copy.rglob("*")) == before


def test_two_different_bad_results_are_both_shown(train_tiny, capsys):
    def spoil(run, losses, count):
        bad = (math.inf, math.nan)[count] if run.state.batch == 3 else 0.0
        return losses + bad

    result = train_tiny(spoil)
    assert (result.state.skips, result.state.replays) == ({3: 1}, 1)
    assert "first loss inf" in capsys.readouterr().out


def test_a_branch_drops_the_log_of_a_run_that_never_saved(trunk, tmp_path):
    out = tmp_path / "branch"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    run("train.py", init_from=f"branch:{trunk}", step=12, out_dir=out, max_iters=15)
    assert [row["step"] for row in rows(out, "loss")] == [15]


def test_going_back_without_a_change_ends_the_same(copy, trunk):
    run("train.py", init_from="resume", step=12, out_dir=copy)
    keys = ("model", "optimizer", "step", "evaluation")
    ends = [state_of(load(folder / "ckpt.pt"), keys) for folder in (copy, trunk)]
    assert ends[0] == ends[1]
    assert rows(copy, "loss") == rows(trunk, "loss")


def test_a_milestone_is_the_last_resort(copy):
    for path in (copy / "best.pt", *numbered(copy)):
        path.write_bytes(path.read_bytes()[:-1])
    (copy / "step-00000006.pt").unlink()
    done = run("train.py", init_from="resume", out_dir=copy, max_iters=21)
    assert "at step 12" in done.stdout


def test_a_drive_that_will_be_full_is_reported(tiny_run, tmp_path, capsys):  # noqa: F811
    for keep_every, is_reported in ((0, False), (1, True)):
        result = tiny_run(keep_every=keep_every, max_iters=10**9)
        result.saver.folder = tmp_path
        script.warn_if_full(result, parameters=10**6)
        found = "1000000004 checkpoints to come need about" in capsys.readouterr().err
        assert found == is_reported


# branches


def test_a_branch_without_a_change_is_its_trunk(trunk, tmp_path):
    out = tmp_path / "branch"
    run("train.py", init_from=f"branch:{trunk}", step=12, out_dir=out, max_iters=20)
    keys = ("model", "optimizer", "step", "evaluation", "rng", "best_val_loss")
    ends = [state_of(load(folder / "ckpt.pt"), keys) for folder in (out, trunk)]
    assert ends[0] == ends[1]
    # the rows before step 12 are the trunk's
    assert rows(out, "loss") == [row for row in rows(trunk, "loss") if row["step"] > 12]


def test_a_branch_names_its_trunk(trunk, tmp_path):
    out = tmp_path / "branch"
    source = trunk / "step-00000006.pt"
    flags = {"init_from": f"auto:branch:{source}", "out_dir": out}
    run("train.py", max_iters=8, learning_rate=1e-4, **flags)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    expected = {"path": str(source), "step": 6, "sha256": sha256}
    assert load(out / "ckpt.pt")["trunk"] == expected
    assert sha256 in (out / "README.md").read_text()
    assert load(out / "ckpt.pt")["config"]["learning_rate"] == 1e-4
    # a restart loop repeats the command, also with a step of the trunk
    step = {"init_from": f"auto:branch:{trunk}", "step": 12, "out_dir": tmp_path / "b"}
    run("train.py", max_iters=14, **step)
    done = run("train.py", max_iters=15, **step)
    assert "resuming" in done.stdout and "at step 14" in done.stdout
    # a restart continues the branch
    done = run("train.py", max_iters=9, **flags)
    assert "resuming" in done.stdout and "at step 8" in done.stdout


def test_a_branch_starts_other_data_at_its_beginning(trunk, play, tmp_path):
    text = play.read_text()
    (tmp_path / "text.txt").write_text(text[30_000:] + text[:30_000])
    flags = {"name": "other", "tokenizer": "char", "data_dir": tmp_path}
    run("prepare.py", tmp_path / "text.txt", **flags)
    flags = {"dataset": tmp_path / "other", "out_dir": tmp_path / "branch"}
    # a run can't change its data, a branch can
    error = run("train.py", init_from="resume", code=2, **flags | {"out_dir": trunk})
    assert "not the hamlet" in complaint(error)
    done = run("train.py", init_from=f"branch:{trunk}", max_iters=22, **flags)
    assert "with other from its beginning" in done.stdout
    bundle = load(tmp_path / "branch/ckpt.pt")
    assert (bundle["data_start"], bundle["skips"]) == (20, {})
    assert bundle["data"]["name"] == "other"
    assert bundle["evaluation"]["step"] == 22


@pytest.mark.parametrize(
    "source, step, word",
    [
        ("nowhere", 0, "No such file"),
        ("README.md", 0, "not a checkpoint"),
        ("ckpt.pt", 6, "needs a run's folder"),
        ("", 7, "no intact checkpoint of step 7"),
    ],
    ids=["a missing file", "another file", "a step of one file", "a missing step"],
)
def test_a_wrong_trunk_is_one_line(trunk, tmp_path, source, step, word):
    flags = {"init_from": f"branch:{trunk / source}", "out_dir": tmp_path / "out"}
    assert word in complaint(run("train.py", step=step, code=2, **flags))


def test_a_branch_has_steps_left_to_train(trunk, tmp_path):
    flags = {"init_from": f"branch:{trunk}", "step": 12, "out_dir": tmp_path / "out"}
    assert "max_iters=12" in complaint(run("train.py", max_iters=12, code=2, **flags))
    run("train.py", max_iters=13, **flags)


def test_a_branch_does_not_replace_a_run(copy, trunk):
    flags = {"init_from": f"branch:{trunk}", "out_dir": copy}
    assert "already holds a run" in complaint(run("train.py", code=2, **flags))
