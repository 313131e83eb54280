"""tools.average writes the mean of a run's weights, which every --init_from reads."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, load, read_error, run

from tools.runs import digest


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny run with checkpoints at steps 6 and 8 and milestones at 4 and 8."""
    out = tmp_path_factory.mktemp("average") / "out"
    # the last two numbered checkpoints are kept
    settings = {"max_iters": 8, "checkpoint_interval": 2, "keep_every": 4}
    run("train.py", **TINY | settings, dataset=dataset, out_dir=out)
    return out


def average(*args: object, code: int | None = 0, **flags: object):
    """Run `python -m tools.average`."""
    # `run` has another meaning for `last`
    options = [f"--{key}={value}" for key, value in flags.items()]
    return run("tools.average", *args, *options, code=code)


def corrupt(path: Path) -> None:
    """Change a byte in the middle of a file that may have other names."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


# in the order of the steps, whatever the order of the flag
AVERAGED = ("step-00000004.pt", "ckpt-00000006.pt", "ckpt-00000008.pt")


@pytest.fixture(
    scope="module",
    params=[{"last": 3}, {"steps": "8,4,6,4"}],
    ids=["last", "steps"],
)
def averaged(request, trained, tmp_path_factory) -> Path:
    """Average the steps 4, 6 and 8, which two flags can name. Return the new file."""
    path = tmp_path_factory.mktemp("averaged") / "avg.pt"
    average(trained, **request.param, to=path)
    return path


@pytest.mark.slow
def test_the_mean_is_exact(trained, averaged):
    models = [load(trained / name)["model"] for name in AVERAGED]
    result = load(averaged)["model"]
    assert result.keys() == models[0].keys()
    for name, weight in result.items():
        # in float64 the mean is rounded once
        weights = [model[name].double() for model in models]
        exact = torch.stack(weights).mean(0)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, exact.float())


@pytest.mark.slow
def test_the_mean_names_its_checkpoints(trained, averaged):
    contents = [(trained / name).read_bytes() for name in AVERAGED]
    assert load(averaged)["origin"] == {
        "path": str(trained),
        "steps": [4, 6, 8],
        "sha256": [hashlib.sha256(content).hexdigest() for content in contents],
    }
    # no temporary file is left
    assert [path.name for path in averaged.parent.iterdir()] == ["avg.pt"]


def test_sample_export_and_train_read_it(trained, dataset, tmp_path):
    path = tmp_path / "avg.pt"
    average(trained, last=2, to=path)
    origin = f"{path}: mean of steps [6, 8] of {trained}"
    few = {"num_samples": 1, "max_new_tokens": 2}
    assert origin in run("sample.py", init_from=path, **few).stderr
    done = run("tools.export", init_from=path, to=tmp_path / "exported")
    assert origin in done.stdout
    settings = TINY | {"dataset": dataset, "init_from": path, "max_iters": 1}
    run("train.py", out_dir=tmp_path / "out", **settings)
    assert (tmp_path / "out/ckpt.pt").exists()


def test_it_is_no_checkpoint_to_resume(trained, dataset, tmp_path):
    path = tmp_path / "out/ckpt.pt"
    path.parent.mkdir()
    average(trained, last=2, to=path)
    settings = TINY | {"dataset": dataset}
    resume = {"out_dir": tmp_path / "out", "init_from": "resume"}
    done = run("train.py", **settings, **resume, code=2)
    # the error names the flag that reads it
    assert f"--init_from={path}" in done.stderr
    branch = {"out_dir": tmp_path / "new", "init_from": f"branch:{path}"}
    done = run("train.py", **settings, **branch, code=None)
    assert "not a checkpoint" in read_error(done)


def test_corrupt_checkpoints_are_named_and_skipped(trained, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(trained, folder)
    # the milestone of step 8 is a copy there, and counts once
    average(folder, last=3, to=tmp_path / "copied.pt")
    average(trained, last=3, to=tmp_path / "linked.pt")
    copied = load(tmp_path / "copied.pt")
    linked = load(tmp_path / "linked.pt")
    assert digest(copied["model"]) == digest(linked["model"])
    # if the checkpoint of step 8 is corrupt, its copy is used instead
    corrupt(folder / "ckpt-00000008.pt")
    done = average(folder, last=3, to=tmp_path / "avg.pt")
    assert "ckpt-00000008.pt: wrong checksum" in done.stderr
    assert load(tmp_path / "avg.pt")["origin"]["steps"] == [4, 6, 8]
    # without the copy too few are left
    corrupt(folder / "step-00000008.pt")
    done = average(folder, last=3, to=tmp_path / "few.pt", code=2)
    assert "expected 3 intact checkpoints, got 2" in done.stderr
    # these are other names of step 8
    corrupt(folder / "best.pt")
    corrupt(folder / "ckpt.pt")
    done = average(
        folder,
        steps="4,8",
        to=tmp_path / "few.pt",
        code=2,
    )
    assert "no intact checkpoint of step 8" in done.stderr
    assert not (tmp_path / "few.pt").exists()


def test_a_mistake_exits_2_with_one_line(trained, dataset, tmp_path):
    to = tmp_path / "avg.pt"
    # no folder, no --to, a file of the run, missing folders
    read_error(average(to=to, code=None))
    read_error(average(trained, code=None))
    read_error(average(trained, to=trained / "ckpt.pt", code=None))
    read_error(
        average(
            trained,
            to=tmp_path / "no/avg.pt",
            last=1,
            code=None,
        )
    )
    read_error(average(tmp_path / "nothing", to=to, code=None))
    # the run has three checkpoints: 4, 6 and 8
    for choice in (
        {"last": 4},
        {"last": 0},
        {"steps": "4;6"},
        {"steps": "5"},
    ):
        read_error(average(trained, to=to, code=None, **choice))

    # a checkpoint of another network that was copied here
    other = TINY | {"n_layer": 2, "max_iters": 10, "eval_interval": 10}
    run("train.py", dataset=dataset, out_dir=tmp_path / "other", **other)
    folder = tmp_path / "mixed"
    shutil.copytree(trained, folder)
    shutil.copy(tmp_path / "other/ckpt-00000010.pt", folder)
    line = read_error(
        average(
            folder,
            last=2,
            to=to,
            code=None,
        )
    )
    assert "model_args" in line
    assert not to.exists()
