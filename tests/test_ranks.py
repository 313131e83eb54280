"""keepgpt/ranks.py: ranks compare their settings and their results."""

import json
import shutil
import subprocess

import pytest
import torch
from conftest import PROGRAMS, REPO, TINY, hash_state, run

from keepgpt.ranks import CHUNK, checksum, find_difference, flatten

# the dtype that `auto` picks differs between a new and an old processor
SHORT = TINY | {
    "max_iters": 4,
    "eval_interval": 2,
    "eval_iters": 1,
    "dtype": "float32",
}


@pytest.fixture
def hosts(dataset, tmp_path):
    """Run train.py on two ranks. `other` names what makes rank 1's host another one, a function of
    tests/programs/other_host.py. `rank_1` are settings for rank 1 alone."""

    def hosts(
        other: str = "nothing",
        rank_1: dict[str, object] | None = None,
        code: int | None = 0,
        **flags: object,
    ) -> subprocess.CompletedProcess:
        more = [f"--{key}={value}" for key, value in (rank_1 or {}).items()]
        return run(
            PROGRAMS / "other_host.py",
            ranks=2,
            code=code,
            env={"DIFFERENCE": other, "RANK_1": json.dumps(more)},
            **{"out_dir": tmp_path / "out", "dataset": dataset, **SHORT, **flags},
        )

    return hosts


@pytest.fixture
def difference(hosts):
    """Run train.py on two ranks that differ. Return the line with which both end."""

    def difference(
        other: str = "nothing",
        rank_1: dict[str, object] | None = None,
        **flags: object,
    ) -> str:
        done = hosts(other, rank_1, code=1, **flags)
        lines = done.stderr.splitlines()
        errors = {line for line in lines if not line.startswith("note: ")}
        # the ranks may print it once each
        assert len(errors) == 1, done.stderr
        line = errors.pop()
        assert line.startswith("error: ")
        assert "rank 1" in line
        assert "Try: " in line
        return line

    return difference


# settings


@pytest.mark.parametrize(
    "key, value",
    [
        ("learning_rate", 1e-3),
        ("elastic", True),
        ("dtype", "bfloat16"),
        ("eval_only", True),
    ],
)
def test_a_setting_of_one_rank_alone_is_named(difference, tmp_path, key, value):
    assert f"error: {key}: rank 0 has" in difference(rank_1={key: value})
    assert not (tmp_path / "out").exists()


def test_a_default_given_on_one_rank_counts_in_a_resume(difference, hosts):
    hosts(weight_decay=0.3, max_iters=2)
    # 0.1 is the default
    line = difference(rank_1={"weight_decay": 0.1}, init_from="resume")
    assert "weight_decay: rank 0 has 0.3, rank 1 has 0.1" in line


def test_another_text_under_one_name_is_named(difference, play, tmp_path):
    # backwards: the same characters, so the same vocabulary and sizes
    (tmp_path / "other.txt").write_text(play.read_text()[::-1])
    run(
        "prepare.py",
        tmp_path / "other.txt",
        name="hamlet",
        tokenizer="char",
        data_dir=tmp_path / "data",
    )
    line = difference(rank_1={"dataset": tmp_path / "data/hamlet"})
    assert "data/fingerprint" in line


def test_a_dataset_that_one_host_lacks_ends_both(difference, tmp_path):
    line = difference(rank_1={"dataset": tmp_path / "none"})
    assert f"{tmp_path}/none" in line


def test_other_weights_in_a_file_are_named(difference, hosts, train, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        train(out=name, **SHORT | {"max_iters": 1, "seed": seed})
    source = tmp_path / "a/ckpt.pt"
    other = {"init_from": tmp_path / "b/ckpt.pt"}
    line = difference(rank_1=other, init_from=source)
    assert "init_from" in line
    assert "weight" in line
    # the same weights may lie in another place
    copy = shutil.copy(source, tmp_path / "copy.pt")
    hosts(rank_1={"init_from": copy}, init_from=source)


@pytest.mark.parametrize("name", ["train.py", "keepgpt/new.py"])
def test_another_version_of_the_code_is_named(difference, tmp_path, monkeypatch, name):
    # rank 1's host has a copy of the program in which one file differs
    for path in ("train.py", "model.py"):
        shutil.copy(REPO / path, tmp_path)
    shutil.copytree(REPO / "keepgpt", tmp_path / "keepgpt")
    with open(tmp_path / name, "a") as file:
        file.write("# changed\n")
    monkeypatch.setenv("COPY", str(tmp_path))
    assert f"error: {name}: rank 0 has" in difference("report_other_code")


def test_another_version_of_torch_is_named(difference):
    assert "error: torch: rank 0 has" in difference("report_other_torch")


def test_another_dtype_that_auto_picks_is_named(difference):
    line = difference("pick_another_dtype", dtype="auto")
    assert "error: dtype: rank 0 has" in line


def test_names_and_places_may_differ_between_hosts(hosts, dataset, tmp_path):
    # the same data under another name
    shutil.copytree(dataset, tmp_path / "elsewhere/other")
    places = {
        "dataset": "other",
        "data_dir": tmp_path / "elsewhere",
        "device": "cpu",
        "out_dir": tmp_path / "unused",
        "wandb_run_name": "b",
    }
    hosts(rank_1=places)
    # only rank 0 writes
    assert not (tmp_path / "unused").exists()
    run("train.py", ranks=2, out_dir=tmp_path / "same", dataset=dataset, **SHORT)
    assert hash_state(tmp_path / "out/ckpt.pt") == hash_state(tmp_path / "same/ckpt.pt")


# results


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer": "muon", "grad_clip": 0},
        {"elastic": True, "grad_clip": 0.01},
        {"grad_clip": 0.01},
    ],
    ids=["muon", "elastic", "ddp"],
)
def test_ranks_that_round_differently_end_unsaved(difference, tmp_path, flags):
    assert "after step" in difference("round_as_an_old_cpu", **flags)
    # a state that differs between the ranks is no state
    assert not list(tmp_path.glob("out/*.pt"))


def test_a_drift_after_a_save_keeps_that_checkpoint(hosts, difference, tmp_path):
    hosts(optimizer="muon", max_iters=2)
    before = (tmp_path / "out/ckpt.pt").read_bytes()
    difference("round_as_an_old_cpu", optimizer="muon", init_from="resume")
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before


def test_random_weights_are_rank_0s(hosts):
    # another kind of processor draws other ones
    hosts("round_as_an_old_cpu", elastic=True, eval_only=True)


def test_all_ranks_of_ddp_use_rank_0s_threads(hosts, dataset, tmp_path):
    # on its own, a rank with two threads rounds differently than one with a single thread
    hosts("use_two_threads", n_embd=128)
    run(
        "train.py",
        ranks=2,
        out_dir=tmp_path / "same",
        dataset=dataset,
        **SHORT | {"n_embd": 128},
    )
    assert hash_state(tmp_path / "out/ckpt.pt") == hash_state(tmp_path / "same/ckpt.pt")


# the parts


@pytest.mark.parametrize("size", [1, 7, 64, 2 * CHUNK + 10])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool]
)
def test_a_checksum_changes_with_a_bit_and_with_the_order(size, dtype):
    weights = torch.arange(1, 2 * CHUNK, 2)
    # zeros and ones, which every dtype has
    x = (torch.arange(size) % 2).to(dtype)
    number = checksum(x, weights)
    assert checksum(x.clone(), weights) == number
    # the lowest bit of the first, a middle and the last number
    for i in {0, size // 2, size - 1}:
        other = x.clone()
        other.view(torch.uint8)[i * x.element_size()] ^= 1
        assert checksum(other, weights) != number
    if size > 1:
        assert checksum(x.roll(1), weights) != number or torch.equal(x.roll(1), x)


def test_a_number_in_the_state_counts_and_a_scalar_too():
    weights = torch.arange(1, 2 * CHUNK, 2)
    assert checksum(torch.tensor(3.0), weights) != checksum(torch.tensor(4.0), weights)
    assert checksum(torch.empty(0), weights) == 0


def test_the_first_rank_and_key_that_differ_are_named():
    # long values are shown by their sha256
    same = flatten({"a": 1, "b": {"c": "x" * 50}})
    facts = [same, same, same]
    assert find_difference(facts) == ""
    facts[2] = flatten({"a": 1, "b": {"c": "y" * 50}, "d": None})
    line = find_difference(facts)
    assert line.startswith("b/c: rank 0 has sha256 ")
    assert "rank 2" in line
    assert "1 more" in line
