"""keepgpt/ranks.py: ranks compare their settings and their results."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY, bits, run

from keepgpt.ranks import CHUNK, checksum, find_difference, flatten

# the dtype that `auto` picks differs between a new and an old processor
SHORT = TINY | {
    "max_iters": 4,
    "eval_interval": 2,
    "eval_iters": 1,
    "dtype": "float32",
}
# rank 1 rounds as on an older processor
OLD_CPU = """
os.environ["ATEN_CPU_CAPABILITY"] = "default"
os.environ["ONEDNN_MAX_CPU_ISA"] = "SSE41"
"""


@pytest.fixture
def hosts(dataset, tmp_path):
    """Run train.py on two ranks. `rank_1` are lines of a config file for rank 1 alone: settings,
    or what makes it another host."""

    def hosts(
        rank_1: str, code: int | None = 0, **flags
    ) -> subprocess.CompletedProcess:
        flags = {"out_dir": tmp_path / "out", "dataset": dataset, **SHORT, **flags}
        lines = [
            f"{key} = {value!r}"
            if not isinstance(value, Path)
            else f"{key} = '{value}'"
            for key, value in flags.items()
        ]
        lines += ["import os", "if os.environ['RANK'] == '1':"]
        lines += ["    " + line for line in (rank_1 or "pass").strip().splitlines()]
        (tmp_path / "hosts.py").write_text("\n".join(lines))
        return run("train.py", tmp_path / "hosts.py", ranks=2, code=code)

    return hosts


@pytest.fixture
def difference(hosts):
    """Run train.py on two ranks that differ. Return the line with which both end."""

    def difference(rank_1: str, **flags) -> str:
        done = hosts(rank_1, code=1, **flags)
        errors = {
            line for line in done.stderr.splitlines() if not line.startswith("note: ")
        }
        assert len(errors) == 1, done.stderr
        line = errors.pop()
        assert line.startswith("error: ") and "rank 1" in line and "Try: " in line
        return line

    return difference


# settings


@pytest.mark.parametrize(
    "key, value",
    [
        ("learning_rate", "1e-3"),
        ("elastic", "True"),
        ("dtype", "'bfloat16'"),
        ("eval_only", "True"),
    ],
    ids=lambda text: text.strip("'"),
)
def test_a_setting_of_one_rank_alone_is_named(difference, tmp_path, key, value):
    assert f"error: {key}: rank 0 has" in difference(f"{key} = {value}")
    assert not (tmp_path / "out").exists()


def test_a_default_given_on_one_rank_counts_in_a_resume(difference, hosts):
    hosts("", weight_decay=0.3, max_iters=2)
    line = difference("weight_decay = 0.1", init_from="resume")
    assert "weight_decay: rank 0 has 0.3, rank 1 has 0.1" in line


def test_another_text_under_one_name_is_named(difference, play, tmp_path):
    (tmp_path / "other.txt").write_text(play.read_text()[::-1])
    run(
        "prepare.py",
        tmp_path / "other.txt",
        name="hamlet",
        tokenizer="char",
        data_dir=tmp_path / "data",
    )
    assert "data/fingerprint" in difference(f"dataset = '{tmp_path / 'data/hamlet'}'")


def test_a_dataset_that_one_host_lacks_ends_both(difference, tmp_path):
    assert f"{tmp_path}/none" in difference(f"dataset = '{tmp_path / 'none'}'")


def test_other_weights_in_a_file_are_named(difference, hosts, train, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        train(out=name, **SHORT | {"max_iters": 1, "seed": seed})
    shutil.copy(tmp_path / "a/ckpt.pt", tmp_path / "copy.pt")
    source = tmp_path / "a/ckpt.pt"
    line = difference(f"init_from = '{tmp_path / 'b/ckpt.pt'}'", init_from=source)
    assert "init_from" in line and "weight" in line
    # the same weights may lie in another place
    hosts(f"init_from = '{tmp_path / 'copy.pt'}'", init_from=source)


@pytest.mark.parametrize("name", ["train.py", "keepgpt/new.py"])
def test_another_version_of_the_code_is_named(difference, tmp_path, name):
    for path in ("train.py", "model.py"):
        shutil.copy(REPO / path, tmp_path)
    shutil.copytree(REPO / "keepgpt", tmp_path / "keepgpt")
    with open(tmp_path / name, "a") as file:
        file.write("# changed\n")
    other = (
        f"import keepgpt.ranks; keepgpt.ranks.__file__ = '{tmp_path}/keepgpt/ranks.py'"
    )
    assert f"error: {name}: rank 0 has" in difference(other)


def test_another_version_of_torch_is_named(difference):
    other = (
        "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.0.1')"
    )
    assert "error: torch: rank 0 has" in difference(other)


def test_another_dtype_that_auto_picks_is_named(difference):
    other = """
import keepgpt.device as _device
_device.has_fast_bfloat16 = lambda has=_device.has_fast_bfloat16: not has()
"""
    assert "error: dtype: rank 0 has" in difference(other, dtype="auto")


def test_names_and_places_may_differ_between_hosts(hosts, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "elsewhere/other")
    hosts(f"""
dataset = "other"
data_dir = "{tmp_path / "elsewhere"}"
device = "cpu"
out_dir = "{tmp_path / "unused"}"
wandb_run_name = "b"
""")
    assert not (tmp_path / "unused").exists()
    run("train.py", ranks=2, out_dir=tmp_path / "same", dataset=dataset, **SHORT)
    assert bits(tmp_path / "out/ckpt.pt") == bits(tmp_path / "same/ckpt.pt")


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
    assert "after step" in difference(OLD_CPU, **flags)
    assert not list(tmp_path.glob("out/*.pt"))


def test_a_drift_after_a_save_keeps_that_checkpoint(hosts, difference, tmp_path):
    hosts("", optimizer="muon", max_iters=2)
    before = (tmp_path / "out/ckpt.pt").read_bytes()
    difference(OLD_CPU, optimizer="muon", init_from="resume")
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before


def test_random_weights_are_rank_0s(hosts):
    # another kind of processor draws other ones
    hosts(OLD_CPU, elastic=True, eval_only=True)


def test_all_ranks_of_ddp_use_rank_0s_threads(hosts, dataset, tmp_path):
    hosts("import torch; torch.set_num_threads(2)", n_embd=128)
    run(
        "train.py",
        ranks=2,
        out_dir=tmp_path / "same",
        dataset=dataset,
        **SHORT | {"n_embd": 128},
    )
    assert bits(tmp_path / "out/ckpt.pt") == bits(tmp_path / "same/ckpt.pt")


# the parts


@pytest.mark.parametrize("size", [1, 7, 64, 2 * CHUNK + 10])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool]
)
def test_a_checksum_changes_with_a_bit_and_with_the_order(size, dtype):
    weights = torch.arange(1, 2 * CHUNK, 2)
    x = (torch.arange(size) % 2).to(dtype)
    number = checksum(x, weights)
    assert checksum(x.clone(), weights) == number
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
    facts = [flatten({"a": 1, "b": {"c": "x" * 50}}) for _ in range(3)]
    assert find_difference(facts) == ""
    facts[2] = flatten({"a": 1, "b": {"c": "y" * 50}, "d": None})
    line = find_difference(facts)
    assert line.startswith("b/c: rank 0 has sha256 ")
    assert "rank 2" in line
    assert "1 more" in line
