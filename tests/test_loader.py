"""keepgpt/loader.py: batches depend on (seed, step) alone; an epoch reads every window once."""

import json
import os
import pickle
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from keepgpt.dataset import BLOCK, BadData, compute_crc32, read_meta
from keepgpt.loader import Loader, Split, mix, permute, seed_of


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Return a function that writes 0, 1, 2, ... as the training split of x: a token is its
    position."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()

    def write(count, dtype="uint16", first=0):
        np.arange(first, first + count).astype(dtype).tofile(
            tmp_path / "x" / "train.bin"
        )

    return write


def split(block_size, seed=1, shift=True, dtype="uint16", files=None):
    """Return the training split of x: train.bin, or `files` as {name: number of tokens}."""
    path = Path("x/train.bin")
    files = files or {path.name: path.stat().st_size // np.dtype(dtype).itemsize}
    meta = {"dtype": dtype, "vocab_size": 2**32, "files": {"train": files}}
    return Split(Path("x"), "train", meta, block_size, seed, shift)


def starts(a_split, epoch=0):
    """Return the position in the file of each window of an epoch, in reading order."""
    x, _ = a_split.rows(epoch * a_split.windows, a_split.windows)
    return x[:, 0].tolist()


# the permutation


def permutation(n, key):
    return permute(
        np.arange(n, dtype=np.uint64), n, np.full(n, key, np.uint64)
    ).tolist()


@pytest.mark.parametrize(
    "n",
    [
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        9,
        15,
        16,
        17,
        63,
        64,
        65,
        100,
        1000,
        1023,
        1024,
        1025,
        4097,
        30_011,
    ],
)
def test_permute_is_a_permutation_that_depends_on_the_key(n):
    orders = [permutation(n, key) for key in range(20)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len(set(map(tuple, orders))) >= (1, 1, 2, 4, 8)[n] if n < 5 else 15


@pytest.mark.parametrize("n", [2**31, 2**40 + 7, 2**62 - 1])
def test_permute_permutes_huge_ranges(n):
    index = np.concatenate([np.arange(20_000), n - 1 - np.arange(20_000)]).astype(
        np.uint64
    )
    to = permute(index, n, np.zeros(40_000, np.uint64))
    assert (to < n).all() and len(np.unique(to)) == 40_000
    assert (
        abs(to.astype(float).mean() / n - 0.5) < 0.01
    )  # spread evenly: sigma is 0.0014


@pytest.mark.parametrize("n", [2, 3, 4, 6, 16])
def test_permute_is_uniform(n):
    keys = mix(np.arange(8000, dtype=np.uint64))
    for i in range(n):
        to = np.bincount(
            permute(np.full(8000, i, np.uint64), n, keys).astype(int), minlength=n
        )
        assert (abs(to - 8000 / n) < 0.15 * 8000 / n + 60).all(), to


def test_permute_separates_neighbours():
    order = np.array(permutation(10_000, 3))
    assert (abs(np.diff(order)) < 10).mean() < 0.01  # 0.002 by chance
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_permute_does_not_change_its_argument():
    index = np.arange(10, dtype=np.uint64)
    permute(index, 10, np.zeros(10, np.uint64))
    assert index.tolist() == list(range(10))


def test_seed_of_depends_on_all_numbers_and_their_order():
    seeds = [seed_of(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1337, 5, 0) == seed_of(1337, 5, 0) != seed_of(1337, 0, 5)


# a split


def test_a_split_that_is_no_longer_used_closes_its_files(data):
    data(100)
    file = split(8).files[0].fileno()
    with pytest.raises(OSError):
        os.fstat(file)


@pytest.mark.parametrize(
    "count, block_size",
    [(9, 8), (16, 8), (17, 8), (24, 8), (100, 8), (1000, 7), (4097, 64), (50, 1)],
)
def test_every_epoch_visits_every_window_once(data, count, block_size):
    data(count)
    a_split = split(block_size)
    for epoch in range(5):
        places = sorted(starts(a_split, epoch))
        assert np.diff(places).tolist() == [block_size] * (
            a_split.windows - 1
        )  # side by side
        assert places[0] >= 0 and places[-1] + block_size < count


def test_each_epoch_has_its_own_order_and_offset(data):
    data(1000)
    epochs = [starts(split(8), epoch) for epoch in range(100)]
    orders = {tuple(np.argsort(places).tolist()) for places in epochs}
    assert len(orders) == 100 and {min(places) for places in epochs} == set(range(8))


@pytest.mark.parametrize("count", [9, 12, 16, 17, 23, 24, 31, 100])
def test_every_token_is_read_over_the_epochs(data, count):
    data(count)
    a_split = split(8)
    x, y = a_split.rows(0, 400 * a_split.windows)
    assert set(x.flatten().tolist()) == set(range(count - 1))
    assert set(y.flatten().tolist()) == set(range(1, count))


def test_an_epoch_omits_less_than_two_windows(data):
    for count in range(9, 100):
        data(count)
        a_split = split(8)
        assert count - a_split.windows * 8 < 16


def test_targets_are_the_inputs_shifted_by_one(data):
    data(1000)
    x, y = split(16).rows(123, 50)
    assert x.shape == y.shape == (50, 16) and x.dtype == y.dtype == torch.int64
    assert (x == x[:, :1] + torch.arange(16)).all() and (y == x + 1).all()


def test_rows_do_not_depend_on_how_they_are_requested(data):
    data(1000)
    x, y = split(8).rows(100, 300)  # across the ends of epochs
    for first, count in ((100, 1), (170, 7), (399, 1), (240, 20)):
        a, b = split(8).rows(first, count)
        part = slice(first - 100, first - 100 + count)
        assert torch.equal(a, x[part]) and torch.equal(b, y[part])


def test_the_seed_determines_the_order(data):
    data(1000)
    orders = [tuple(starts(split(8, seed=seed))) for seed in range(20)]
    assert len(set(orders)) == 20
    assert orders == [tuple(starts(split(8, seed=seed))) for seed in range(20)]


def test_evaluation_windows_are_fixed_and_cover_the_split(data):
    for count in (9, 16, 17, 100, 1001):
        data(count)
        for seed in (1, 2):
            a_split = split(8, seed, shift=False)
            for epoch in range(3):
                assert sorted(starts(a_split, epoch)) == list(range(0, count - 8, 8))


def test_wide_tokens_are_read_from_uint32(data):
    data(200, "uint32", first=2**31)
    x, y = split(8, dtype="uint32").rows(0, 100)
    assert x.dtype == torch.int64 and (y == x + 1).all()
    assert x.min() >= 2**31 and x.max() < 2**31 + 200


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_file_shorter_than_one_window_is_refused(data, dtype):
    for count in (0, 1, 8):
        data(count, dtype)
        for shift in (True, False):
            says = f"at least 9 .*got {count}"
            with pytest.raises(BadData, match=says):
                split(8, shift=shift, dtype=dtype)
    data(9, dtype)
    x, y = split(8, dtype=dtype).rows(0, 3)
    assert x.tolist() == [list(range(8))] * 3 and y.tolist() == [list(range(1, 9))] * 3


def test_a_missing_dataset_is_refused_with_the_command(data, tmp_path):
    with pytest.raises(BadData, match="python prepare.py none"):
        read_meta(Path("none"))
    with pytest.raises(BadData, match="train.bin: no such file"):
        split(8, files={"train.bin": 9})


META = {
    "name": "x",
    "tokenizer": {"kind": "char", "chars": "ab"},
    "vocab_size": 2,
    "dtype": "uint16",
    "tokens": {"train": 2, "val": 2},
    "fingerprint": "0",
}


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"dtype": ',
        "[]",
        "{}",
        '"text"',
        *(
            json.dumps(META | change)
            for change in (
                {"dtype": "float32"},
                {"vocab_size": "2"},
                {"tokens": {"train": 2}},
                {"tokens": [1, 2]},
                {"tokenizer": None},
                {"files": {"train": {}}},
                {"files": []},
                {"files": {"train": {"train.bin": 2}, "val": ["val.bin"]}},
                {
                    "files": {"train": {"train.bin": 2}, "val": {"val.bin": 2}},
                    "tokens": {},
                },
            )
        ),
    ],
)
def test_a_corrupt_meta_json_is_refused(data, text):
    Path("x/meta.json").write_text(text)
    with pytest.raises(BadData, match="x/meta.json"):
        read_meta(Path("x"))


def test_an_intact_meta_json_is_returned(data):
    Path("x/meta.json").write_text(json.dumps(META))
    assert read_meta(Path("x")) == META


def test_an_id_outside_the_vocabulary_names_its_file(data):
    data(1000)
    files = in_parts(Path("x"), 400, 600)
    with open("x/train-00001.bin", "r+b") as f:
        f.seek(2 * 100)
        f.write(np.uint16(1000).tobytes())
    meta = {"dtype": "uint16", "vocab_size": 1000, "files": {"train": files}}
    a_split = Split(Path("x"), "train", meta, 8, 1, shift=False)
    with pytest.raises(BadData, match="x/train-00001.bin: .*below 1000, got 1000"):
        a_split.rows(0, a_split.windows)


# a split with checksums


def split_with_crc32(*names):
    """Return the split of these files of x, with the CRC32s that they have now."""
    sizes = {name: Path("x", name).stat().st_size // 2 for name in names}
    crc32 = {name: compute_crc32(Path("x", name)) for name in names}
    meta = {
        "dtype": "uint16",
        "vocab_size": 2**16,
        "files": {"train": sizes},
        "crc32": crc32,
    }
    return Split(Path("x"), "train", meta, 8, 1, shift=False)


def change(path, where, content):
    """Replace bytes of a file in place."""
    with open(path, "r+b") as f:
        f.seek(where)
        f.write(content)


@pytest.mark.parametrize(
    "block, where",
    [
        (0, 0),
        (0, BLOCK - 1),
        (1, BLOCK),
        (2, 2 * BLOCK + 77),
        (3, 3 * BLOCK),
        (3, 400_001),
    ],
)
def test_a_changed_byte_is_never_returned(data, block, where):
    data(200_001)  # 400,002 bytes: three blocks and a part
    whole, a_split = split(8), split_with_crc32("train.bin")
    before = Path("x/train.bin").read_bytes()[where]
    change("x/train.bin", where, bytes([before ^ 1]))
    for first in range(0, a_split.ends[-1] - 9, 1000):
        touched = range(2 * first // BLOCK, (2 * first + 17) // BLOCK + 1)
        if block in touched:
            with pytest.raises(BadData, match=f"x/train.bin: block {block}, "):
                a_split.read(first, 9)
        else:
            assert a_split.read(first, 9) == whole.read(first, 9)


def test_each_block_is_compared_once(data, monkeypatch):
    data(200_001)
    a_split, sizes, pread = split_with_crc32("train.bin"), [], os.pread
    monkeypatch.setattr(os, "pread", lambda *a: sizes.append(a[1]) or pread(*a))
    for epoch in range(2):
        a_split.rows(epoch * a_split.windows, a_split.windows)
    assert sizes.count(BLOCK) == 4 and len(sizes) == 4 + 2 * a_split.windows


def test_swapped_files_are_refused(data):
    for first, name in ((0, "train-00000.bin"), (7, "train-00001.bin")):
        data(100_000, first=first)
        os.rename("x/train.bin", f"x/{name}")
    a_split = split_with_crc32("train-00000.bin", "train-00001.bin")
    contents = [
        Path("x", name).read_bytes() for name in ("train-00001.bin", "train-00000.bin")
    ]
    for k, content in enumerate(contents):
        Path(f"x/train-0000{k}.bin").write_bytes(content)
        with pytest.raises(BadData, match=f"train-0000{k}.bin: block 0"):
            a_split.read(k * 100_000, 9)


# a dataset that nanoGPT prepared


@pytest.fixture
def nanogpt(data):
    """Return a function that writes ids below `top` as both splits of x, and `meta` as meta.pkl."""

    def write(top, meta=None, protocol=4):
        for name in ("train", "val"):
            (np.arange(5000) * 7 % top).astype("uint16").tofile(f"x/{name}.bin")
        if meta is not None:
            Path("x/meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        return read_meta(Path("x"))

    return write


@pytest.mark.parametrize("protocol", range(6))
def test_meta_pkl_gives_the_characters(nanogpt, protocol):
    chars = "\n abcé"
    itos = dict(enumerate(chars))
    meta = nanogpt(
        6,
        {"vocab_size": 6, "itos": itos, "stoi": {c: i for i, c in itos.items()}},
        protocol,
    )
    assert (
        meta["tokenizer"] == {"kind": "char", "chars": chars}
        and meta["vocab_size"] == 6
    )
    assert meta["tokens"] == {"train": 5000, "val": 5000}


class Evil:
    def __reduce__(self):
        return Path("ran").touch, ()


@pytest.mark.parametrize(
    "meta",
    [
        {"itos": {0: "a"}, "stoi": Evil()},
        Evil(),
        {"itos": {0: "a", 2: "b"}},
        {"itos": ["a", "a"]},
        {"itos": {0: "ab"}},
        {"itos": {0: 1}},
        {"itos": np.array(["a"])},
        {"vocab_size": 5},
        [1],
    ],
)
def test_a_malformed_meta_pkl_is_refused(nanogpt, meta):
    with pytest.raises(BadData, match="x/meta.pkl is not nanoGPT's vocabulary"):
        nanogpt(6, meta)
    assert not Path("ran").exists()


def test_a_truncated_meta_pkl_is_refused(nanogpt):
    whole = pickle.dumps({"itos": {0: "a", 1: "b"}})
    for size in range(len(whole)):
        Path("x/meta.pkl").write_bytes(whole[:size])
        with pytest.raises(BadData):
            nanogpt(2)


def test_gpt2_tokens_are_assumed_with_a_note(nanogpt, capsys):
    assert nanogpt(50257)["tokenizer"] == {"kind": "gpt2"}
    assert "GPT-2" in capsys.readouterr().err


def test_characters_are_never_read_as_gpt2_tokens(nanogpt):
    with pytest.raises(BadData, match="below 256"):
        nanogpt(65)


def test_half_a_dataset_is_refused(nanogpt):
    nanogpt(50257)
    Path("x/val.bin").unlink()
    with pytest.raises(BadData, match="x/val.bin"):
        read_meta(Path("x"))


def test_an_unreadable_meta_json_is_refused(nanogpt):
    nanogpt(50257)
    Path("x/meta.json").touch()
    with pytest.raises(BadData, match="unfinished"):
        read_meta(Path("x"))
    Path("x/meta.json").unlink()
    Path("x/meta.json").mkdir()
    with pytest.raises(BadData, match="meta.json.*directory"):
        read_meta(Path("x"))


def test_offsets_beyond_4_gb_are_exact(data, tmp_path, monkeypatch):
    with open(tmp_path / "x" / "train.bin", "wb") as f:
        f.truncate(2**34)  # no byte of it is on the disk
    places, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *a: places.append(a[2]) or pread(*a))
    split(1000).rows(0, 2000)
    assert max(places) > 0.99 * 2**34 and min(places) < 0.01 * 2**34
    assert len(set(places)) == 2000 and len({place % 2000 for place in places}) == 1


# a split of several files


def in_parts(folder, *sizes, dtype="uint16"):
    """Copy train.bin into files of the given numbers of tokens. Return the `files` of a Split."""
    tokens = np.fromfile(folder / "train.bin", dtype)
    assert sum(sizes) == len(tokens)
    files = {f"train-{k:05}.bin": size for k, size in enumerate(sizes)}
    for file, end in zip(files, np.cumsum(sizes)):
        tokens[end - files[file] : end].tofile(folder / file)
    return files


@pytest.mark.parametrize(
    "sizes", [(400, 300, 300), (0, 999, 0, 0, 1), (3,) * 333 + (1,), (1000,)]
)
@pytest.mark.parametrize("shift", [True, False])
def test_several_files_are_read_as_one(data, tmp_path, sizes, shift):
    data(1000)
    files = in_parts(tmp_path / "x", *sizes)
    for block_size in (1, 8, 37):
        whole = split(block_size, 1, shift)
        parts = split(block_size, 1, shift, files=files)
        assert (parts.windows, parts.offsets) == (whole.windows, whole.offsets)
        for a, b in zip(
            whole.rows(0, 3 * whole.windows), parts.rows(0, 3 * whole.windows)
        ):
            assert torch.equal(a, b)


def test_batches_do_not_depend_on_the_number_of_files(data, tmp_path):
    data(5000, "uint32", first=2**31)
    files = in_parts(tmp_path / "x", 1234, 2345, 1421, dtype="uint32")
    loaders = [
        Loader(
            split(16, 7, dtype="uint32", files=files),
            3,
            4,
            range(4),
            torch.device("cpu"),
        )
        for files in (None, files)
    ]
    for step in (0, 1, 2, 3, 40, 41, 1000, 10**7):
        assert batches(loaders[0], step) == batches(loaders[1], step)


def test_a_missing_or_truncated_file_is_named(data, tmp_path):
    data(1000)
    files = in_parts(tmp_path / "x", 400, 0, 600)
    for size in (1198, 1202, 0):
        os.truncate(tmp_path / "x" / "train-00002.bin", size)
        with pytest.raises(
            BadData, match=f"train-00002.bin: expected 600 .*got {size // 2}"
        ):
            split(8, files=files)
    (tmp_path / "x" / "train-00002.bin").unlink()
    with pytest.raises(BadData, match="train-00002.bin: no such file"):
        split(8, files=files)
    os.truncate(tmp_path / "x" / "train.bin", 1000)
    with pytest.raises(BadData, match="train.bin: expected 1,000 .*got 500"):
        split(8, files={"train.bin": 1000})


def test_a_file_truncated_while_it_is_open_is_refused(data):
    data(1000)
    a_split = split(8)
    os.truncate(a_split.files[0].name, 700 * 2)
    for first in range(a_split.windows):
        with suppress(BadData):
            assert a_split.rows(first, 1)[0].shape == (1, 8)
    with pytest.raises(BadData, match="truncated"):
        a_split.rows(0, a_split.windows)


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads the memory from /proc"
)
def test_memory_stays_flat_while_large_files_are_read(data, tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )

    size = 2**28  # bytes of each of eight files
    for k in range(8):
        with open(tmp_path / "x" / f"train-{k:05}.bin", "wb") as f:
            f.truncate(size)
    a_split = split(1024, files={f"train-{k:05}.bin": size // 2 for k in range(8)})
    for i in range(50):
        a_split.rows(i * 32, 32)
    before = resident()
    for i in range(2000):
        a_split.rows(i * 32, 32)
    assert (
        resident() - before < 20 * 2**20
    )  # the pages that were touched are some 250 MB


# a loader


def batches(a_loader, step):
    """Return a step's micro-batches as {m: (inputs, targets)} in plain lists."""
    rows = {}
    for m in a_loader.local:
        x, y = a_loader.get_batch(step, m)
        rows[m] = (x.tolist(), y.tolist())
    return rows


def first_tokens(a_loader, steps):
    """Return the first token of each row of these steps."""
    return [
        row[0]
        for step in steps
        for x, _ in batches(a_loader, step).values()
        for row in x
    ]


def share(rank=0, ranks=1, micro_batches=4, batch_size=3, seed=1):
    each = micro_batches // ranks
    mine = range(rank * each, (rank + 1) * each)
    return Loader(split(8, seed), batch_size, micro_batches, mine, torch.device("cpu"))


def test_a_step_has_the_same_rows_on_any_number_of_ranks(data):
    data(1000)
    for step in (0, 1, 57):
        alone = batches(share(), step)
        assert list(alone) == [0, 1, 2, 3]
        for ranks in (2, 4):
            shared = [batches(share(rank, ranks), step) for rank in range(ranks)]
            assert sum(map(len, shared)) == 4
            assert {m: rows for part in shared for m, rows in part.items()} == alone


def test_steps_of_an_epoch_read_every_window_once(data):
    data(8 * 25)  # 24 windows: two steps of 4 x 3
    a_loader = share()
    for epoch in range(3):
        rows = first_tokens(a_loader, (2 * epoch, 2 * epoch + 1))
        assert len(set(rows)) == len(rows) == a_loader.split.windows == 24


def test_a_step_does_not_depend_on_the_steps_before_it(data):
    data(1000)
    a_loader = share()
    reached = [batches(a_loader, step) for step in range(30)]
    assert all(batches(share(), step) == reached[step] for step in range(30))
    for step in (29, 3, 4, 0, 29, 29):
        assert batches(a_loader, step) == reached[step]
    assert all(reached[i] != reached[i + 1] for i in range(29))


def test_an_interrupted_step_is_complete_the_next_time(data):
    data(1000)
    a_loader = share()
    a_loader.get_batch(5, 0)
    assert batches(a_loader, 5) == batches(share(), 5)
    assert batches(a_loader, 6) == batches(share(), 6)


def test_micro_batches_are_read_once_and_one_ahead(data, monkeypatch):
    data(1000)
    a_loader, firsts = share(rank=1, ranks=2), []
    rows = a_loader.split.rows
    monkeypatch.setattr(
        a_loader.split, "rows", lambda *a: firsts.append(a[0]) or rows(*a)
    )
    for step in range(3):
        batches(a_loader, step)
    a_loader.thread.shutdown()
    assert firsts == [3 * (4 * step + m) for step in range(3) for m in (2, 3)] + [
        3 * (4 * 3 + 2)
    ]


def test_a_distant_step_needs_no_scan(data):
    data(8 * 25)
    a_loader = share()
    rows = first_tokens(a_loader, (10**9, 10**9 + 1))
    assert np.diff(sorted(rows)).tolist() == [8] * 23


def test_another_seed_gives_different_batches(data):
    data(1000)
    assert len({json.dumps(batches(share(seed=seed), 0)) for seed in range(10)}) == 10


def test_gpu_batches_are_pinned_and_contiguous(data, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    data(1000)
    loader = Loader(split(8), 4, 1, range(1), torch.device("cuda"))
    x, y = loader._read(0, 0)
    assert torch.equal(x[:, 1:], y[:, :-1]) and [id(t) for t in pinned] == [
        id(x),
        id(y),
    ]
    assert (
        x.is_contiguous() and y.is_contiguous()
    )  # else the transfer makes a copy and waits
