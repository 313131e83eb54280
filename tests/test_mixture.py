"""Mixtures of datasets: exact proportions, the same rows for any number of ranks and after any
stop, losses and bits per byte of each source."""

import json
import math
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from conftest import TINY, bits, complaint, load, rows, run

from keepgpt.dataset import BadData
from keepgpt.loader import Split
from keepgpt.mixture import CYCLE, Mixture, describe_sources, find_sources
from keepgpt.tokenizer import from_meta
from tools.runs import state_of

SHARES = [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)]


@pytest.fixture
def mixture(tmp_path):
    """Return a mixture of three splits, whose tokens say where they are: 10,000 x split + place."""
    splits = []
    for k, tokens in enumerate((9_000, 2_000, 500)):
        folder = tmp_path / str(k)
        folder.mkdir()
        ids = np.arange(tokens, dtype=np.uint16) + 10_000 * k
        ids.tofile(folder / "train.bin")
        meta = {"dtype": "uint16", "vocab_size": 2**16, "tokens": {"train": tokens}}
        splits.append(Split(folder, "train", meta, 8, seed=3, shift=True))
    return Mixture(splits, SHARES, seed=3)


def sources_of(x):
    """Return the split of each window, (count,)."""
    return (x[:, 0] // 10_000).numpy()


def test_the_proportions_are_exact_in_every_cycle(mixture):
    x, y = mixture.rows(0, 40 * CYCLE)
    assert (x[:, 1:] == y[:, :-1]).all()
    for end in range(CYCLE, 40 * CYCLE + 1, CYCLE):
        counts = np.bincount(sources_of(x[:end]), minlength=3)
        assert counts.tolist() == mixture.count_windows(end)
        for count, share in zip(counts, SHARES):
            assert abs(count - end * share) < 1
    # mixed, not one source after the other
    first = sources_of(x[:CYCLE])
    assert (first[1:] != first[:-1]).sum() > CYCLE / 4


def test_each_source_is_read_without_replacement(mixture):
    x, _ = mixture.rows(0, 60 * CYCLE)
    sources = sources_of(x)
    for k, split in enumerate(mixture.splits):
        starts = x[sources == k, 0].tolist()
        assert len(starts) > 2 * split.windows
        # after each cycle these are the windows that it reads alone, each once in an epoch
        alone, _ = split.rows(0, len(starts))
        for end in range(CYCLE, 60 * CYCLE + 1, CYCLE):
            n = mixture.count_windows(end)[k]
            assert sorted(starts[:n]) == sorted(alone[:n, 0].tolist())


def test_a_window_depends_on_its_number_alone(mixture):
    x, y = mixture.rows(0, 3 * CYCLE)
    for first, count in ((0, 1), (CYCLE - 1, 2), (300, 77)):
        a, b = mixture.rows(first, count)
        assert (a == x[first : first + count]).all()
        assert (b == y[first : first + count]).all()
    # and on the seed
    other, _ = Mixture(mixture.splits, SHARES, seed=4).rows(0, CYCLE)
    assert (sources_of(other) != sources_of(x[:CYCLE])).any()


# runs


@pytest.fixture(scope="module")
def place(play, tmp_path_factory):
    """Return a folder with three datasets of one tokenizer, and one of another."""
    place = tmp_path_factory.mktemp("mixture")
    text = play.read_text(encoding="utf-8")
    for name, part in (
        ("a", text[:30_000]),
        ("b", text[30_000:45_000]),
        ("c", text[45_000:]),
    ):
        (place / f"{name}.txt").write_text(part)
    (place / "all.txt").write_text(text)
    run("prepare.py", place / "all.txt", name="all", tokenizer="char", data_dir=place)
    for name in "abc":
        flags = {"name": name, "tokenizer": place / "all", "data_dir": place}
        run("prepare.py", place / f"{name}.txt", **flags)
    run("prepare.py", place / "a.txt", name="d", tokenizer="bpe:300", data_dir=place)
    return place


MIXTURE = "a:0.7+b:0.2+c:0.1"


def flags(place, **more):
    return TINY | {"dataset": MIXTURE, "data_dir": place, "elastic": True} | more


@pytest.fixture(scope="module")
def whole_mixture(place):
    """Return the folder of a run on the mixture. Tests only read it."""
    run("train.py", out_dir=place / "whole", **flags(place))
    return place / "whole"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_run_ends_the_same_on_any_ranks(
    place, whole_mixture, ranks, tmp_path
):
    # the names in another order
    first = flags(place, dataset="c:1+a:7+b:2", max_iters=10)
    run("train.py", out_dir=tmp_path, ranks=3 - ranks, **first)
    again = {"init_from": "resume", "max_iters": 20, "out_dir": tmp_path}
    run("train.py", ranks=ranks, **again)
    keys = ("model", "optimizer", "step", "best_val_loss")
    expected = load(whole_mixture / "ckpt.pt")
    found = load(tmp_path / "ckpt.pt")
    assert state_of(found, keys) == state_of(expected, keys)
    assert rows(tmp_path) == rows(whole_mixture)


def test_an_evaluation_has_each_source(place, whole_mixture):
    last = rows(whole_mixture, "val_loss")[-1]
    losses = [last[f"val_loss/{name}"] for name in "abc"]
    expected = sum(float(share) * loss for share, loss in zip(SHARES, losses))
    assert math.isclose(last["val_loss"], expected, rel_tol=1e-6)
    assert len({*losses}) == 3
    card = (whole_mixture / "README.md").read_text()
    assert "a 70.0%, " in card
    assert f"{last['val_loss']:.4f} ({last['val_bpb']:.4f} bits per byte)" in card
    # 160 windows: 112 of source a
    epochs = 112 / (27_000 // 32 - 1)
    assert f"a 70.0%, {epochs:.2f} epochs" in card


def test_other_weights_need_a_branch(place, whole_mixture, tmp_path):
    out = tmp_path / "out"
    subprocess.run(["cp", "-a", whole_mixture, out], check=True)
    other = {"dataset": "a:0.5+b:0.5", "out_dir": out, "init_from": "resume"}
    assert "init_from=branch:" in complaint(run("train.py", code=2, **other))
    # names and weights that say the same are no change
    same = other | {"dataset": "b:2+c:1+a:7", "max_iters": 21}
    run("train.py", **same)
    branch = other | {
        "init_from": f"branch:{whole_mixture}",
        "out_dir": tmp_path / "b",
        "max_iters": 22,
    }
    done = run("train.py", **branch)
    assert "from its beginning" in done.stdout
    assert load(tmp_path / "b/ckpt.pt")["data_start"] == 20


@pytest.mark.parametrize(
    "dataset, words",
    [
        ("a:0.7+b", ["'b'", "NAME:WEIGHT"]),
        ("a:0.7+b:x", ["'b:x'"]),
        ("a:1+b:-1", ["'b:-1'"]),
        ("a:1+b:nan", ["'b:nan'"]),
        ("a:1+b:1/0", ["'b:1/0'"]),
        ("a:1+:1", ["':1'"]),
        ("a:1+a:2", ["once"]),
        ("a:1+nothing:1", ["nothing"]),
        ("a:1+d:1", ["/a", "/d", "tokenizer"]),
    ],
)
def test_a_wrong_mixture_is_one_line(place, dataset, words, tmp_path):
    wrong = {"dataset": dataset, "data_dir": place, "out_dir": tmp_path / "out"}
    error = complaint(run("train.py", code=2, **wrong))
    assert all(word in error for word in words)


def test_sources_are_different_datasets(place):
    for dataset in ("a:1+./a:1", "a:1+b/../a:2"):
        with pytest.raises(BadData):
            find_sources(str(place), dataset)


def test_one_source_is_that_dataset(place):
    (source,) = find_sources(str(place), "a:3")
    assert describe_sources([source])["name"] == "a"


# bits per byte


def test_bits_per_byte_are_of_the_windows_evaluated(place, tmp_path):
    out = tmp_path / "out"
    run("train.py", out_dir=out, data_dir=place, dataset="d", **TINY | {"max_iters": 0})
    row = rows(out, "val_loss")[0]
    meta = json.loads((place / "d/meta.json").read_text())
    split = Split(place / "d", "val", meta, 32, seed=1337, shift=False)
    count = min(2 * 4, split.windows)
    _, y = split.rows(0, count)
    decode = from_meta(meta)
    size = sum(len(decode.token_bytes(i)) for i in y.flatten().tolist())
    expected = row["val_loss"] / math.log(2) * y.numel() / size
    assert math.isclose(row["val_bpb"], expected, rel_tol=1e-6)
    # characters of one byte
    run(
        "train.py", out_dir=tmp_path / "2", data_dir=place, dataset="all",
        **TINY | {"max_iters": 0},
    )  # fmt: skip
    row = rows(tmp_path / "2", "val_loss")[0]
    assert math.isclose(row["val_bpb"], row["val_loss"] / math.log(2), rel_tol=0.02)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_text_is_part_of_each_evaluation(place, whole_mixture, ranks, tmp_path):
    out = tmp_path / "out"
    text = {"eval_text": place / "c.txt", "out_dir": out}
    run("train.py", ranks=ranks, **flags(place, **text))
    found = rows(out, "text_bpb")
    # training is as without it
    keys = rows(whole_mixture)[0].keys()
    kept = [{key: row[key] for key in row if "text" not in key} for row in rows(out)]
    assert kept == rows(whole_mixture) and keys
    if ranks == 1:
        assert bits(out / "ckpt.pt") == bits(whole_mixture / "ckpt.pt")
    assert [row["step"] for row in found] == [0, 10, 20]
    # a source of the mixture
    loss = found[-1]["val_loss/c"]
    assert abs(found[-1]["text_loss"] - loss) < 0.3
    assert found[-1]["text_loss"] < found[0]["text_loss"] - 0.5


@pytest.mark.parametrize(
    "content, word",
    [
        (None, "No such file"),
        (b"", "two tokens"),
        (b"\xff\xfe", ""),
        (b"\xe2\x82\xac", "€"),
    ],
    ids=["missing", "empty", "not UTF-8", "unknown character"],
)
def test_a_wrong_text_is_one_line(place, content, word, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    wrong = flags(place, eval_text=path, out_dir=tmp_path / "out")
    error = complaint(run("train.py", code=2, **wrong))
    assert "eval_text" in error and word in error
