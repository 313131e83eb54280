"""Files from nanoGPT's first tutorial work here: train.bin, val.bin, meta.pkl, a checkpoint."""

import json
import os
import pickle
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import TINY, read_error, read_rows, run

from keepgpt.dataset import BadData, read_meta
from keepgpt.tokenizer import describe_tokenizer


@pytest.fixture(scope="module")
def place(dataset, tmp_path_factory):
    """Return a folder with a dataset `tutorial` as nanoGPT prepares it."""
    place = tmp_path_factory.mktemp("nanogpt")
    (place / "tutorial").mkdir()
    for name in ("train.bin", "val.bin"):
        shutil.copy(dataset / name, place / "tutorial")
    meta = json.loads((dataset / "meta.json").read_text())
    chars = meta["tokenizer"]["chars"]
    # nanoGPT's names: text to id and back
    description = {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {char: i for i, char in enumerate(chars)},
    }
    (place / "tutorial/meta.pkl").write_bytes(pickle.dumps(description))
    return place


@pytest.fixture(scope="module")
def checkpoint(place):
    """Return a checkpoint trained on it with nanoGPT's keys: no vocabulary, compiled names."""
    flags = {"data_dir": place, "dataset": "tutorial", "out_dir": place / "out"}
    run("train.py", **TINY | flags)
    bundle = torch.load(place / "out/ckpt.pt", weights_only=True)
    # nanoGPT stores the shared weight twice, under the names of a compiled model
    state = {f"_orig_mod.{name}": tensor for name, tensor in bundle["model"].items()}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    torch.save(
        {
            "model": state,
            "optimizer": bundle["optimizer"],
            "iter_num": 40,
            "model_args": bundle["model_args"],
            "best_val_loss": torch.tensor(3.0),
            "config": bundle["config"],
        },
        place / "nanogpt.pt",
    )
    return place / "nanogpt.pt"


@pytest.mark.slow
def test_both_datasets_train_identically(place, checkpoint, dataset):
    # the losses of each step tell two datasets apart
    run("train.py", **TINY | {"dataset": dataset, "out_dir": place / "ours"})
    assert read_rows(place / "ours") == read_rows(place / "out")


def test_dataset_supplies_a_checkpoints_vocabulary(place, checkpoint):
    line = read_error(run("sample.py", code=None, init_from=checkpoint))
    assert "--dataset" in line
    flags = {"init_from": checkpoint, "dataset": place / "tutorial"}
    sample = {"start": "HAM", "temperature": 0, "num_samples": 1, "max_new_tokens": 20}
    expected = run("sample.py", out_dir=place / "out", **sample).stdout
    assert run("sample.py", **flags, **sample).stdout == expected
    # an export has the vocabulary, too
    run("tools.export", **flags, to=place / "exported")
    exported = run("sample.py", init_from=place / "exported", **sample)
    assert exported.stdout == expected


def test_a_nanogpt_checkpoint_can_be_fine_tuned(place, checkpoint):
    flags = {"data_dir": place, "dataset": "tutorial", "out_dir": place / "further"}
    run("train.py", init_from=checkpoint, **TINY | flags)
    before = read_rows(place / "out", "val_loss")[-1]["val_loss"]
    after = read_rows(place / "further", "val_loss")
    # it starts with the checkpoint's weights
    assert after[0]["val_loss"] == pytest.approx(before, abs=1e-5)
    assert after[-1]["val_loss"] < before


# data that changes between two starts

# 64 characters of ASCII
CHARS = "".join(map(chr, range(32, 96)))


def zero_half(content):
    """Return the content of a file of tokens whose second half was never written."""
    half = len(content) // 2
    return content[:half] + bytes(len(content) - half)


def reverse(content):
    return np.frombuffer(content, "<u2")[::-1].tobytes()


def reverse_end(content):
    """Return the content with another end, behind the first 524,288 tokens."""
    return content[:1_100_000] + reverse(content[1_100_000:])


def replace_all(content):
    return np.full(len(content) // 2, 7, "<u2").tobytes()


@contextmanager
def damage_file(path, damage):
    """Change a file within a `with` block. Its times do not tell."""
    intact = path.read_bytes()
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(damage(intact))
    os.utime(path, ns=times)
    try:
        yield
    finally:
        path.write_bytes(intact)


def write_dataset(folder, kind):
    """Write 1.4 MB of tokens: as prepare.py does, as it did before checksums, or as nanoGPT."""
    tokens = np.random.default_rng(0).integers(64, size=700_000, dtype="<u2")
    (folder / "text.txt").write_text("".join(CHARS[i] for i in tokens), "ascii")
    run("prepare.py", folder / "text.txt", name="x", tokenizer="char", data_dir=folder)
    meta = json.loads((folder / "x/meta.json").read_text())
    if kind == "old":
        del meta["crc32"]
        (folder / "x/meta.json").write_text(json.dumps(meta))
    elif kind == "nanogpt":
        (folder / "x/meta.json").unlink()
        itos = dict(enumerate(meta["tokenizer"]["chars"]))
        (folder / "x/meta.pkl").write_bytes(pickle.dumps({"itos": itos}))


def train_on(folder, ranks=1, code=0, **flags):
    """Train on the dataset of `write_dataset`. Each evaluation reads all of its blocks."""
    # 40 batches of 16 windows
    settings = TINY | {
        "dataset": folder / "x",
        "out_dir": folder / "out",
        "init_from": "auto",
        "max_iters": 4,
        "lr_decay_iters": 4,
        "warmup_iters": 1,
        "eval_interval": 4,
        "batch_size": 16,
        "eval_iters": 40,
    }
    return run("train.py", ranks=ranks, code=code, **settings | flags)


@pytest.fixture(scope="module", params=["new", "old", "nanogpt"])
def started(request, tmp_path_factory):
    """Return the kind of a dataset, and the folder with it and with a run of four steps on it."""
    folder = tmp_path_factory.mktemp(request.param)
    write_dataset(folder, request.param)
    train_on(folder)
    return request.param, folder


# torchrun's exit code is 1
@pytest.mark.parametrize(
    "file, damage, ranks, code",
    [
        ("train.bin", reverse, 1, 2),
        ("val.bin", replace_all, 1, 2),
        ("train.bin", zero_half, 1, 2),
        ("train.bin", reverse_end, 1, 2),
        pytest.param("train.bin", reverse_end, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_resume_on_changed_data_is_refused(started, file, damage, ranks, code):
    kind, folder = started
    saved = (folder / "out/ckpt.pt").read_bytes()
    with damage_file(folder / "x" / file, damage):
        done = train_on(folder, ranks, max_iters=8, eval_interval=8, code=code)
    expected = f"x/{file}: block "
    # the first 524,288 tokens are a part of what identifies a dataset of nanoGPT
    if kind == "nanogpt" and damage != reverse_end:
        expected = "x: not the x that this run was trained on"
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    # one rank may end before another one prints it
    assert 1 <= len(lines) <= ranks
    for line in lines:
        assert line.startswith("error: ")
        assert expected in line
    assert (folder / "out/ckpt.pt").read_bytes() == saved


@pytest.mark.parametrize("kind", ["new", "old"])
def test_a_first_start_on_changed_data_is_refused(tmp_path, kind):
    write_dataset(tmp_path, kind)
    path = tmp_path / "x/train.bin"
    path.write_bytes(zero_half(path.read_bytes()))
    assert str(tmp_path / "x") in read_error(train_on(tmp_path, code=2), silent=False)


def test_a_changed_description_is_refused(train, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "x")
    train(dataset=tmp_path / "x", max_iters=2)
    text = (tmp_path / "x/meta.json").read_text()
    meta = json.loads(text)
    # the same tokens would be another text
    meta["tokenizer"]["chars"] = meta["tokenizer"]["chars"][::-1]
    (tmp_path / "x/meta.json").write_text(json.dumps(meta))
    read_error(train(dataset=tmp_path / "x", max_iters=4, init_from="resume", code=2))


def test_checksums_are_computed_once(train, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "x")
    meta = json.loads((tmp_path / "x/meta.json").read_text())
    # a description of an older version has no checksums
    crc32 = meta.pop("crc32")
    (tmp_path / "x/meta.json").write_text(json.dumps(meta))
    # from scratch, then resumed, which takes them from the checkpoint
    for steps in (2, 4):
        train(dataset=tmp_path / "x", max_iters=steps, init_from="auto")
        data = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["data"]
        assert data["crc32"] == crc32
        # a copy has the name of its folder
        assert data.items() >= (meta | {"name": "x"}).items()


# shards of llm.c and modded-nanogpt


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """Write a shard as llm.c does: a header of 256 int32, then uint16."""
    header = np.zeros(256, "<i4")
    header[:3] = (magic, version, len(tokens) if count is None else count)
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


@pytest.fixture
def shards(tmp_path):
    """Return a folder with three shards, and a dataset of prepare.py with the same tokens."""
    folder = tmp_path / "fineweb"
    folder.mkdir()
    # GPT-2's ids, over the border of two shards
    ids = np.random.default_rng(0).integers(50257, size=5000).astype(np.uint16)
    write_shard(folder / "fineweb_train_000001.bin", ids[:3000])
    write_shard(folder / "fineweb_train_000002.bin", ids[3000:4500])
    write_shard(folder / "fineweb_val_000000.bin", ids[4500:])
    plain = tmp_path / "plain"
    plain.mkdir()
    ids[:4500].tofile(plain / "train.bin")
    ids[4500:].tofile(plain / "val.bin")
    return tmp_path


SMALL = TINY | {"max_iters": 3, "eval_interval": 3, "block_size": 16}


@pytest.mark.slow
def test_shards_train_as_their_tokens_do(shards):
    for name in ("fineweb", "plain"):
        flags = SMALL | {"data_dir": shards, "dataset": name}
        run("train.py", out_dir=shards / f"out-{name}", **flags)
    assert read_rows(shards / "out-fineweb") == read_rows(shards / "out-plain")

    # a byte that changes later is noticed
    path = shards / "fineweb/fineweb_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    again = {"out_dir": shards / "out-fineweb", "init_from": "resume", "max_iters": 6}
    assert "not the fineweb" in read_error(run("train.py", code=2, **again))


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"magic": 20240801}, ["20240520", "20240801"]),
        ({"version": 7}, ["20240520"]),
        ({"count": 2999}, ["7,022 bytes", "7,024"]),
    ],
    ids=["another kind", "another version", "another size"],
)
def test_a_wrong_shard_is_one_line(shards, change, parts):
    write_shard(shards / "fineweb/fineweb_train_000001.bin", range(3000), **change)
    flags = SMALL | {"data_dir": shards, "dataset": "fineweb"}
    error = read_error(run("train.py", code=2, out_dir=shards / "out", **flags))
    for part in parts:
        assert part in error


@pytest.mark.parametrize("size", [0, 100, 1024])
def test_a_truncated_shard_is_called_so(shards, size):
    # nothing, a part of the header, and the header alone
    path = shards / "fineweb/fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadData, match=rf"got {size:,}\..* download it again"):
        read_meta(path.parent)


def test_other_text_may_have_the_tokens_of_shards(shards):
    assert describe_tokenizer(str(shards / "fineweb")) == {"kind": "gpt2"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_of_one_split_are_one_line(shards, split):
    # as after a download of the other split's shards alone
    for path in (shards / "fineweb").glob(f"*_{split}_*.bin"):
        path.unlink()
    flags = SMALL | {"data_dir": shards, "dataset": "fineweb"}
    error = read_error(run("train.py", code=2, out_dir=shards / "out", **flags))
    assert f"*_{split}_*.bin" in error
