"""Mixtures of datasets: exact proportions, the same rows for any number of ranks and after any
stop, losses and bits per byte of each source."""

import json
import math
import re
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from conftest import TINY, hash_state, load, read_error, read_rows, run

from keepgpt.dataset import BadData, read_meta
from keepgpt.loader import Split
from keepgpt.mixture import CYCLE, Mixture, describe_sources, find_sources
from keepgpt.tokenizer import from_meta
from tools.runs import state_of

SHARES = [
    Fraction(7, 10),
    Fraction(2, 10),
    Fraction(1, 10),
]


@pytest.fixture
def mixture(tmp_path):
    """Return a mixture of three splits, whose tokens say where they are: 10,000 x split + place."""
    splits = []
    for k, tokens in enumerate((9_000, 2_000, 500)):
        folder = tmp_path / str(k)
        folder.mkdir()
        ids = np.arange(tokens, dtype=np.uint16) + 10_000 * k
        ids.tofile(folder / "train.bin")
        meta = {
            "dtype": "uint16",
            "vocab_size": 2**16,
            "tokens": {"train": tokens},
        }
        splits.append(
            Split(
                folder,
                "train",
                meta,
                8,
                seed=3,
                shift=True,
            )
        )
    return Mixture(splits, SHARES, seed=3)


def find_source(x):
    """Return the split of each window, (count,)."""
    return (x[:, 0] // 10_000).numpy()


def test_the_proportions_are_exact_in_every_cycle(mixture):
    # targets are the next tokens, whatever the source
    x, y = mixture.rows(0, 40 * CYCLE)
    assert (x[:, 1:] == y[:, :-1]).all()
    for end in range(CYCLE, 40 * CYCLE + 1, CYCLE):
        counts = np.bincount(find_source(x[:end]), minlength=3)
        assert counts.tolist() == mixture.count_windows(end).tolist()
        for count, share in zip(counts, SHARES):
            assert abs(count - end * share) < 1
    # mixed, not one source after the other
    first = find_source(x[:CYCLE])
    assert (first[1:] != first[:-1]).sum() > CYCLE / 4


def test_each_source_is_read_without_replacement(mixture):
    x, _ = mixture.rows(0, 60 * CYCLE)
    sources = find_source(x)
    for k, split in enumerate(mixture.splits):
        # the first token of a window says where it starts
        starts = x[sources == k, 0].tolist()
        assert len(starts) > 2 * split.windows
        # after each cycle these are the windows that it reads alone, each once in an epoch
        x_alone, _ = split.rows(0, len(starts))
        starts_alone = x_alone[:, 0].tolist()
        for end in range(CYCLE, 60 * CYCLE + 1, CYCLE):
            count = mixture.count_windows(end)[k]
            assert sorted(starts[:count]) == sorted(starts_alone[:count])


def test_a_window_depends_on_its_number_alone(mixture):
    x, y = mixture.rows(0, 3 * CYCLE)
    # one window, two in different cycles, many
    for start, stop in (
        (0, 1),
        (CYCLE - 1, CYCLE + 1),
        (300, 377),
    ):
        some_x, some_y = mixture.rows(start, stop - start)
        assert (some_x == x[start:stop]).all()
        assert (some_y == y[start:stop]).all()
    # and on the seed
    other = Mixture(mixture.splits, SHARES, seed=4)
    other_x, _ = other.rows(0, CYCLE)
    assert (find_source(other_x) != find_source(x[:CYCLE])).any()


# runs


@pytest.fixture(scope="module")
def data_dir(play, tmp_path_factory):
    """Return a folder with three datasets of one tokenizer, and one of another."""
    folder = tmp_path_factory.mktemp("mixture")
    text = play.read_text(encoding="utf-8")
    (folder / "all.txt").write_text(text)
    (folder / "a.txt").write_text(text[:30_000])
    (folder / "b.txt").write_text(text[30_000:45_000])
    (folder / "c.txt").write_text(text[45_000:])
    flags = {"data_dir": folder}
    # a, b and c take the characters of the whole text, which each of them lacks some of
    run("prepare.py", folder / "all.txt", name="all", tokenizer="char", **flags)
    flags["tokenizer"] = folder / "all"
    for name in "abc":
        run("prepare.py", folder / f"{name}.txt", name=name, **flags)
    flags["tokenizer"] = "bpe:300"
    run("prepare.py", folder / "a.txt", name="d", **flags)
    return folder


MIXTURE = "a:0.7+b:0.2+c:0.1"


def make_flags(data_dir, **more):
    """Return the flags of a tiny run on the mixture."""
    # elastic: the reference is the same for any number of ranks
    flags = {"dataset": MIXTURE, "data_dir": data_dir, "elastic": True}
    return TINY | flags | more


@pytest.fixture(scope="module")
def whole_mixture(data_dir):
    """Return the folder of a run on the mixture. Tests only read it."""
    run("train.py", out_dir=data_dir / "whole", **make_flags(data_dir))
    return data_dir / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2], ids=["1 rank", "2 ranks"])
def test_a_stopped_run_ends_the_same_on_any_ranks(
    data_dir, whole_mixture, ranks, tmp_path
):
    # the first half on the other number of ranks, and the names in another order
    flags = make_flags(data_dir, dataset="c:1+a:7+b:2", max_iters=10)
    run("train.py", out_dir=tmp_path, ranks=3 - ranks, **flags)
    resume = {"init_from": "resume", "max_iters": 20, "out_dir": tmp_path}
    run("train.py", ranks=ranks, **resume)
    keys = ("model", "optimizer", "step", "best_val_loss")
    expected = load(whole_mixture / "ckpt.pt")
    actual = load(tmp_path / "ckpt.pt")
    assert state_of(actual, keys) == state_of(expected, keys)
    assert read_rows(tmp_path) == read_rows(whole_mixture)


def test_an_evaluation_has_each_source(whole_mixture):
    last = read_rows(whole_mixture, "val_loss")[-1]
    losses = [last[f"val_loss/{name}"] for name in "abc"]
    # the loss is the mean of theirs by weight
    expected = sum(float(share) * loss for share, loss in zip(SHARES, losses))
    assert math.isclose(last["val_loss"], expected, rel_tol=1e-6)
    assert len(set(losses)) == 3
    # the card has the shares, the losses and how often each source was read
    card = (whole_mixture / "README.md").read_text()
    assert "a 70.0%, " in card
    assert f"{last['val_loss']:.4f} ({last['val_bpb']:.4f} bits per byte)" in card
    # 20 steps of 8 windows are 160, and 112 of them are of source a
    epochs = 112 / (27_000 // 32 - 1)
    assert f"a 70.0%, {epochs:.2f} epochs" in card


def test_other_weights_need_a_branch(whole_mixture, tmp_path):
    out = tmp_path / "out"
    # shutil would turn hard links into copies
    subprocess.run(["cp", "-a", whole_mixture, out], check=True)
    resume = {"init_from": "resume", "out_dir": out}
    done = run("train.py", dataset="a:0.5+b:0.5", code=2, **resume)
    assert "init_from=branch:" in read_error(done)
    # a source that the run has not read is named
    done = run("train.py", dataset="a:0.7+b:0.2+all:0.1", code=2, **resume)
    assert "trained on: other all. Try" in read_error(done)
    # names and weights that say the same are no change
    run("train.py", dataset="b:2+c:1+a:7", max_iters=21, **resume)
    branch = {"init_from": f"branch:{whole_mixture}", "out_dir": tmp_path / "b"}
    done = run("train.py", dataset="a:0.5+b:0.5", max_iters=22, **branch)
    assert "from its beginning" in done.stdout
    # the new mixture is read from its first window
    assert load(tmp_path / "b/ckpt.pt")["data_start"] == 20


@pytest.mark.parametrize(
    "dataset, parts",
    [
        ("a:0.7+b", ["'b'", "NAME:WEIGHT"]),
        ("a:0.7+b:x", ["'b:x'"]),
        ("a:1+b:-1", ["'b:-1'"]),
        ("a:1+b:nan", ["'b:nan'"]),
        ("a:1+b:1/0", ["'b:1/0'"]),
        ("a:1+b:1e999999999", ["'b:1e999999999'"]),
        ("a:1+:1", ["':1'"]),
        ("a:1+a:2", ["once"]),
        ("a:1+nothing:1", ["nothing"]),
        ("a:1+d:1", ["/a", "/d", "tokenizer"]),
    ],
    ids=[
        "no weight",
        "a word",
        "negative",
        "nan",
        "a fraction",
        "too large",
        "no name",
        "a name twice",
        "a missing dataset",
        "another tokenizer",
    ],
)
def test_a_wrong_mixture_is_one_line(data_dir, dataset, parts, tmp_path):
    wrong = {"dataset": dataset, "data_dir": data_dir, "out_dir": tmp_path / "out"}
    error = read_error(run("train.py", code=2, **wrong))
    for part in parts:
        assert part in error


def test_sources_are_different_datasets(data_dir):
    # other paths of the same folder
    for dataset in ("a:1+./a:1", "a:1+b/../a:2"):
        with pytest.raises(BadData):
            find_sources(str(data_dir), dataset)


def test_one_source_is_that_dataset(data_dir):
    (source,) = find_sources(str(data_dir), "a:3")
    assert describe_sources([source], "a:3")["name"] == "a"


def test_a_mixture_is_the_same_in_another_spelling(data_dir):
    described = []
    for dataset in ("a:1+b:3", "b:0.75+a:0.25", "a:0.2500+b:0.7500", "a:1/4+b:3/4"):
        sources = find_sources(str(data_dir), dataset)
        described.append(describe_sources(sources, dataset))
        # its name is the command's
        assert described[-1].pop("name") == dataset
    assert described[0] == described[1] == described[2]


def test_a_renamed_dataset_has_its_new_name(data_dir, tmp_path):
    shutil.copytree(data_dir / "a", tmp_path / "new")
    assert read_meta(tmp_path / "new")["name"] == "new"


def test_inspect_counts_the_epochs_as_the_run_does(data_dir, tmp_path):
    # a source has few of these large windows
    large = {"block_size": 1024, "batch_size": 2, "max_iters": 5, "eval_iters": 1}
    flags = make_flags(data_dir, dataset="a:0.5+b:0.5", **large)
    run("train.py", out_dir=tmp_path, **flags)
    card = (tmp_path / "README.md").read_text()
    printed = run("tools.inspect", tmp_path).stdout
    for name in "ab":
        (epochs,) = re.findall(rf"{name} [0-9.]+%, ([0-9.]+) epochs", card)
        assert f"{epochs} epochs of {name}" in printed


# bits per byte


def test_bits_per_byte_are_of_the_windows_evaluated(data_dir, tmp_path):
    untrained = TINY | {"data_dir": data_dir, "max_iters": 0}
    run("train.py", out_dir=tmp_path / "bpe", dataset="d", **untrained)
    row = read_rows(tmp_path / "bpe", "val_loss")[0]
    meta = json.loads((data_dir / "d/meta.json").read_text())
    split = Split(
        data_dir / "d",
        "val",
        meta,
        32,
        seed=1337,
        shift=False,
    )
    # an evaluation has 2 batches of 4 windows
    count = min(2 * 4, split.windows)
    _, y = split.rows(0, count)
    tokenizer = from_meta(meta)
    # each token that was predicted, and its bytes
    tokens = [tokenizer.token_bytes(i) for i in y.flatten().tolist()]
    size = len(b"".join(tokens))
    expected = row["val_loss"] / math.log(2) * len(tokens) / size
    assert math.isclose(row["val_bpb"], expected, rel_tol=1e-6)
    # characters of one byte
    run("train.py", out_dir=tmp_path / "char", dataset="all", **untrained)
    row = read_rows(tmp_path / "char", "val_loss")[0]
    # nats to bits; a few characters of the play have two bytes
    expected = row["val_loss"] / math.log(2)
    assert math.isclose(row["val_bpb"], expected, rel_tol=0.02)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def run_with_text(request, data_dir, tmp_path_factory):
    """Run the mixture with the evaluation of a text, one of its sources. Return the number of ranks
    and the folder."""
    ranks = request.param
    out = tmp_path_factory.mktemp("text") / "out"
    flags = make_flags(data_dir, eval_text=data_dir / "c.txt", out_dir=out)
    run("train.py", ranks=ranks, **flags)
    return ranks, out


@pytest.mark.slow
def test_a_text_is_part_of_each_evaluation(run_with_text):
    _, out = run_with_text
    first, middle, last = read_rows(out, "text_bpb")
    assert [first["step"], middle["step"], last["step"]] == [0, 10, 20]
    # the text is a source of the mixture: its loss is about that source's, and falls
    assert abs(last["text_loss"] - last["val_loss/c"]) < 0.3
    assert last["text_loss"] < first["text_loss"] - 0.5


@pytest.mark.slow
def test_a_text_leaves_training_as_it_is(run_with_text, whole_mixture):
    ranks, out = run_with_text
    other_rows = []
    for row in read_rows(out):
        other_rows.append({key: row[key] for key in row if "text" not in key})
    assert other_rows
    assert other_rows == read_rows(whole_mixture)
    # two ranks save two random states
    if ranks == 1:
        assert hash_state(out / "ckpt.pt") == hash_state(whole_mixture / "ckpt.pt")


@pytest.mark.parametrize(
    "content, part",
    [
        (None, "No such file"),
        (b"", "two tokens"),
        (b"\xff\xfe", ""),
        (b"\xe2\x82\xac", "€"),
    ],
    ids=["missing", "empty", "not UTF-8", "unknown character"],
)
def test_a_wrong_text_is_one_line(data_dir, content, part, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    flags = make_flags(data_dir, eval_text=path, out_dir=tmp_path / "out")
    error = read_error(run("train.py", code=2, **flags))
    assert "eval_text" in error
    # once: a hint may have it without the colon
    assert error.count(f"{path}:") == 1
    assert part in error
