"""With elastic=True a run is bit-identical on 1, 2, 4, ... ranks, also if their number changes."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import PROGRAMS, TINY, load, read_error, read_rows, run

from tools.runs import STATE, state_of

# twelve micro-batches divide among 1, 2 and 4 ranks; bfloat16 and dropout would show another order
# of sums, and other random numbers
FLAGS = {
    "dtype": "bfloat16",
    "dropout": 0.2,
    "gradient_accumulation_steps": 12,
    "batch_size": 2,
    "block_size": 16,
    "max_iters": 12,
    "eval_interval": 6,
    "log_interval": 1,
    "init_from": "auto",
}


def read_outcome(out: Path) -> tuple[str, list[dict]]:
    """Return the sha256 of a run's weights, moments and last evaluation, and its metrics without
    the evaluations at the ends of shorter runs."""
    bundle = load(out / "ckpt.pt")
    # each rank saves its own random numbers, so these differ with the number of ranks
    state = state_of(bundle, {*STATE, "evaluation"} - {"rng"})
    kept = []
    for row in read_rows(out):
        if "loss" in row or row["step"] % FLAGS["eval_interval"] == 0:
            kept.append(row)
    return state, kept


@pytest.fixture(scope="module")
def alone_out(dataset, tmp_path_factory) -> Path:
    """Return the folder of a run on one rank."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    run("train.py", out_dir=out, dataset=dataset, elastic=True, **TINY | FLAGS)
    assert len(read_rows(out, "loss")) == 12
    return out


@pytest.fixture
def alone(alone_out) -> tuple[str, list[dict]]:
    """Return its outcome."""
    return read_outcome(alone_out)


@pytest.mark.slow
def test_two_ranks_are_bit_identical_to_one(train, tmp_path, alone):
    train(ranks=2, elastic=True, **FLAGS)
    assert read_outcome(tmp_path / "out") == alone


def test_tools_same_compares_the_states_of_runs(train, tmp_path, alone_out):
    train(out="other", elastic=True, **FLAGS | {"seed": 2})
    shutil.copytree(alone_out, tmp_path / "copy")
    same = run("tools.same", alone_out, tmp_path / "copy")
    other = run("tools.same", alone_out, tmp_path / "other", code=1)
    # a line for each of the two runs
    one, copy = re.findall(r"sha256 (\w+)", same.stdout)[:2]
    again, another = re.findall(r"sha256 (\w+)", other.stdout)[:2]
    assert one == copy == again
    assert another != one
    # a folder without a run, and a run alone
    read_error(run("tools.same", tmp_path, alone_out, code=2))
    read_error(run("tools.same", alone_out, code=2))


@pytest.mark.slow
def test_a_run_may_change_ranks_bit_identical(train, tmp_path, alone):
    train(ranks=4, elastic=True, **FLAGS | {"max_iters": 3})
    # fewer ranks, more, and as many as at first
    steps = {1: 6, 2: 9, 4: 12}
    for ranks, max_iters in steps.items():
        done = train(ranks=ranks, elastic=True, **FLAGS | {"max_iters": max_iters})
        assert f"-> {ranks}" in done.stdout
        assert "rounding" not in done.stdout
    assert read_outcome(tmp_path / "out") == alone


def test_a_resumed_run_keeps_its_number_of_threads(train, tmp_path, alone):
    train(elastic=True, **FLAGS | {"max_iters": 5})
    # two threads would add in another order
    train(elastic=True, env={"OMP_NUM_THREADS": "2"}, **FLAGS)
    assert read_outcome(tmp_path / "out") == alone


def test_all_ranks_use_rank_0s_number_of_threads(dataset, tmp_path, alone):
    flags = TINY | FLAGS | {"out_dir": tmp_path / "out", "dataset": dataset}
    run(PROGRAMS / "threads_by_rank.py", ranks=2, elastic=True, **flags)
    assert read_outcome(tmp_path / "out") == alone


def test_resuming_a_ddp_run_does_not_promise_equal_bits(train):
    # its first steps added the gradients in another order
    train(**FLAGS | {"max_iters": 5})
    done = train(ranks=2, elastic=True, **FLAGS | {"max_iters": 6})
    assert "1 -> 2: " in done.stdout
    assert "rounding" in done.stdout


@pytest.mark.slow
def test_plain_ddp_rounds_differently_on_two_ranks(train, tmp_path):
    """Without a difference here the tests above would show nothing."""
    for ranks in (1, 2):
        train(out=str(ranks), ranks=ranks, **FLAGS)
    one = [row["loss"] for row in read_rows(tmp_path / "1", "loss")]
    two = [row["loss"] for row in read_rows(tmp_path / "2", "loss")]
    assert one != two
    # the same batch, the same dropout; the first gradient makes the difference
    assert one[0] == two[0]
    assert one == pytest.approx(two, abs=0.02)


def test_settings_that_change_rounding_are_refused(train, tmp_path):
    # gradients are added in pairs, so the number of ranks is a power of two
    three = FLAGS | {"gradient_accumulation_steps": 4}
    done = train(ranks=3, code=None, elastic=True, **three)
    assert done.returncode
    assert "1, 2, 4, 8" in done.stderr
    # as many tokens per step, in larger micro-batches
    train(elastic=True, **FLAGS | {"max_iters": 2})
    done = train(
        code=2,
        elastic=True,
        **FLAGS | {"batch_size": 4, "gradient_accumulation_steps": 6},
    )
    assert "batch_size" in read_error(done)
