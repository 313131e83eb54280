"""keepgpt/loader.py: batches depend on (seed, step) alone; an epoch reads every window once."""

import itertools
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

CPU = torch.device("cpu")


@pytest.fixture
def write_tokens(tmp_path, monkeypatch):
    """Return a function that writes 0, 1, 2, ... as the training split of x: a token is its
    position."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()

    def write(count, dtype="uint16", first=0):
        tokens = np.arange(first, first + count).astype(dtype)
        tokens.tofile(tmp_path / "x" / "train.bin")

    return write


def open_split(block_size, seed=1, shift=True, dtype="uint16", files=None):
    """Return the training split of x: train.bin, or `files` as {name: number of tokens}."""
    path = Path("x/train.bin")
    if files is None:
        size = path.stat().st_size // np.dtype(dtype).itemsize
        files = {path.name: size}
    meta = {
        "dtype": dtype,
        "vocab_size": 2**32,
        "files": {"train": files},
    }
    return Split(Path("x"), "train", meta, block_size, seed, shift)


def list_starts(split, epoch=0):
    """Return the position in the file of each window of an epoch, in reading order."""
    x, _ = split.rows(epoch * split.windows, split.windows)
    return x[:, 0].tolist()


# the permutation


def list_permutation(n, key):
    """Return where `permute` puts 0 to n - 1."""
    index = np.arange(n, dtype=np.uint64)
    keys = np.full(n, key, np.uint64)
    return permute(index, n, keys).tolist()


# on both sides of powers of 4, at which the network that permutes grows
SMALL_SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17]
LARGE_SIZES = [63, 64, 65, 100, 1000, 1023, 1024, 1025]
HUGE_SIZES = [4097, 30_011]


@pytest.mark.parametrize("n", SMALL_SIZES + LARGE_SIZES + HUGE_SIZES)
def test_permute_is_a_permutation_that_depends_on_the_key(n):
    orders = [list_permutation(n, key) for key in range(20)]
    for order in orders:
        assert sorted(order) == list(range(n))
    # with few elements, the 20 keys share orders
    least = {1: 1, 2: 2, 3: 4, 4: 8}.get(n, 15)
    assert len({tuple(order) for order in orders}) >= least


@pytest.mark.parametrize("n", [2**31, 2**40 + 7, 2**62 - 1])
def test_permute_permutes_huge_ranges(n):
    # the first 20,000 and the last ones
    first = np.arange(20_000)
    last = n - 1 - first
    index = np.concatenate([first, last]).astype(np.uint64)
    permuted = permute(index, n, np.zeros(40_000, np.uint64))
    assert (permuted < n).all()
    assert len(np.unique(permuted)) == 40_000
    # spread evenly: sigma is 0.0014
    mean = permuted.astype(float).mean() / n
    assert abs(mean - 0.5) < 0.01


@pytest.mark.parametrize("n", [2, 3, 4, 6, 16])
def test_permute_is_uniform(n):
    keys = mix(np.arange(8000, dtype=np.uint64))
    expected = 8000 / n
    # where each element goes under 8,000 keys
    for i in range(n):
        index = np.full(8000, i, np.uint64)
        permuted = permute(index, n, keys)
        counts = np.bincount(permuted.astype(int), minlength=n)
        assert (abs(counts - expected) < 0.15 * expected + 60).all(), counts


def test_permute_separates_neighbours():
    order = np.array(list_permutation(10_000, 3))
    # 0.002 by chance
    assert (abs(np.diff(order)) < 10).mean() < 0.01
    correlation = np.corrcoef(order, np.arange(10_000))[0, 1]
    assert abs(correlation) < 0.05


def test_permute_does_not_change_its_argument():
    # a caller's array must not change under it
    index = np.arange(10, dtype=np.uint64)
    permute(index, 10, np.zeros(10, np.uint64))
    assert index.tolist() == list(range(10))


def test_seed_of_depends_on_all_numbers_and_their_order():
    triples = itertools.product(range(10), repeat=3)
    seeds = {seed_of(*triple) for triple in triples}
    assert len(seeds) == 1000
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert seed_of(1337, 5, 0) == seed_of(1337, 5, 0)
    assert seed_of(1337, 5, 0) != seed_of(1337, 0, 5)


# a split


def test_a_split_that_is_no_longer_used_closes_its_files(write_tokens):
    write_tokens(100)
    # nothing holds the split after this line
    descriptor = open_split(8).files[0].fileno()
    with pytest.raises(OSError):
        os.fstat(descriptor)


@pytest.mark.parametrize(
    "count, block_size",
    [
        (9, 8),
        (16, 8),
        (17, 8),
        (24, 8),
        (100, 8),
        (1000, 7),
        (4097, 64),
        (50, 1),
    ],
)
def test_every_epoch_visits_every_window_once(write_tokens, count, block_size):
    write_tokens(count)
    split = open_split(block_size)
    for epoch in range(5):
        starts = sorted(list_starts(split, epoch))
        # side by side
        assert np.diff(starts).tolist() == [block_size] * (split.windows - 1)
        assert starts[0] >= 0
        assert starts[-1] + block_size < count


def test_each_epoch_has_its_own_order_and_offset(write_tokens):
    write_tokens(1000)
    split = open_split(8)
    # enough epochs to see each of eight offsets
    epochs = [list_starts(split, epoch) for epoch in range(100)]
    orders = {tuple(np.argsort(starts)) for starts in epochs}
    offsets = {min(starts) for starts in epochs}
    assert len(orders) == 100
    assert offsets == set(range(8))


@pytest.mark.parametrize("count", [9, 12, 16, 17, 23, 24, 31, 100])
def test_every_token_is_read_over_the_epochs(write_tokens, count):
    write_tokens(count)
    split = open_split(8)
    # enough epochs to see each of eight offsets
    x, y = split.rows(0, 400 * split.windows)
    assert set(x.flatten().tolist()) == set(range(count - 1))
    assert set(y.flatten().tolist()) == set(range(1, count))


def test_an_epoch_omits_less_than_two_windows(write_tokens):
    # the offset takes less than one, and the end less than another
    for count in range(9, 100):
        write_tokens(count)
        split = open_split(8)
        assert count - split.windows * 8 < 16


def test_targets_are_the_inputs_shifted_by_one(write_tokens):
    write_tokens(1000)
    x, y = open_split(16).rows(123, 50)
    assert x.shape == (50, 16)
    assert y.shape == (50, 16)
    assert x.dtype == torch.int64
    assert y.dtype == torch.int64
    # a token is its position
    assert (x == x[:, :1] + torch.arange(16)).all()
    assert (y == x + 1).all()


def test_rows_do_not_depend_on_how_they_are_requested(write_tokens):
    write_tokens(1000)
    # an epoch has 124 windows: these cross the ends of epochs
    x, y = open_split(8).rows(100, 300)
    for first, count in (
        (100, 1),
        (170, 7),
        (399, 1),
        (240, 20),
    ):
        part_x, part_y = open_split(8).rows(first, count)
        start = first - 100
        assert torch.equal(part_x, x[start : start + count])
        assert torch.equal(part_y, y[start : start + count])


def test_the_seed_determines_the_order(write_tokens):
    write_tokens(1000)
    orders = set()
    for seed in range(20):
        starts = list_starts(open_split(8, seed=seed))
        assert list_starts(open_split(8, seed=seed)) == starts
        orders.add(tuple(starts))
    assert len(orders) == 20


def test_evaluation_windows_are_fixed_and_cover_the_split(write_tokens):
    # whatever the seed and the epoch: losses of two evaluations must be comparable
    for count in (9, 16, 17, 100, 1001):
        write_tokens(count)
        for seed in (1, 2):
            split = open_split(8, seed, shift=False)
            for epoch in range(3):
                starts = sorted(list_starts(split, epoch))
                assert starts == list(range(0, count - 8, 8))


def test_wide_tokens_are_read_from_uint32(write_tokens):
    # ids that would be negative as int32
    write_tokens(200, "uint32", first=2**31)
    x, y = open_split(8, dtype="uint32").rows(0, 100)
    assert x.dtype == torch.int64
    assert (y == x + 1).all()
    assert x.min() >= 2**31
    assert x.max() < 2**31 + 200


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_file_shorter_than_one_window_is_refused(write_tokens, dtype):
    # a window of eight needs a ninth token as the last target
    for count in (0, 1, 8):
        write_tokens(count, dtype)
        for shift in (True, False):
            with pytest.raises(BadData, match=f"at least 9 .*got {count}"):
                open_split(8, shift=shift, dtype=dtype)

    # nine tokens are one window and its targets
    write_tokens(9, dtype)
    x, y = open_split(8, dtype=dtype).rows(0, 3)
    assert x.tolist() == [list(range(8))] * 3
    assert y.tolist() == [list(range(1, 9))] * 3


def test_a_missing_dataset_is_refused_with_the_command(write_tokens, tmp_path):
    with pytest.raises(BadData, match="python prepare.py none"):
        read_meta(Path("none"))
    with pytest.raises(BadData, match="train.bin: no such file"):
        open_split(8, files={"train.bin": 9})


# what read_meta asks for at least
META = {
    "name": "x",
    "tokenizer": {"kind": "char", "chars": "ab"},
    "vocab_size": 2,
    "dtype": "uint16",
    "tokens": {"train": 2, "val": 2},
    "fingerprint": "0",
}


FILES = {"train": {"train.bin": 2}, "val": {"val.bin": 2}}
# changes of META that make it wrong
CHANGES = [
    {"dtype": "float32"},
    {"vocab_size": "2"},
    {"tokens": {"train": 2}},
    {"tokens": [1, 2]},
    {"tokenizer": None},
    {"files": {"train": {}}},
    {"files": []},
    {"files": FILES | {"val": ["val.bin"]}},
    {"files": FILES, "tokens": {}},
]


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"dtype": ',
        "[]",
        "{}",
        '"text"',
        *(json.dumps(META | change) for change in CHANGES),
    ],
    ids=[
        "empty",
        "cut",
        "list",
        "no-keys",
        "string",
        "dtype",
        "vocab_size",
        "one-split",
        "token-list",
        "no-tokenizer",
        "no-files",
        "file-list",
        "list-of-val",
        "no-tokens",
    ],
)
def test_a_corrupt_meta_json_is_refused(write_tokens, text):
    Path("x/meta.json").write_text(text)
    with pytest.raises(BadData, match="x/meta.json"):
        read_meta(Path("x"))


def test_an_intact_meta_json_is_returned(write_tokens):
    Path("x/meta.json").write_text(json.dumps(META))
    assert read_meta(Path("x")) == META


def test_an_id_outside_the_vocabulary_names_its_file(write_tokens):
    write_tokens(1000)
    files = divide_file(Path("x"), 400, 600)
    # the first id that the vocabulary lacks
    replace_bytes("x/train-00001.bin", 2 * 100, np.uint16(1000).tobytes())
    meta = {
        "dtype": "uint16",
        "vocab_size": 1000,
        "files": {"train": files},
    }
    split = Split(Path("x"), "train", meta, 8, 1, shift=False)
    with pytest.raises(BadData, match="x/train-00001.bin: .*below 1000, got 1000"):
        split.rows(0, split.windows)


# a split with checksums


def make_split_with_crc32(*names):
    """Return the split of these files of x, with the CRC32s that they have now."""
    sizes = {}
    crc32 = {}
    for name in names:
        path = Path("x", name)
        sizes[name] = path.stat().st_size // 2
        crc32[name] = compute_crc32(path)
    meta = {
        "dtype": "uint16",
        "vocab_size": 2**16,
        "files": {"train": sizes},
        "crc32": crc32,
    }
    return Split(Path("x"), "train", meta, 8, 1, shift=False)


def replace_bytes(path, position, content):
    """Replace bytes of a file in place."""
    with open(path, "r+b") as f:
        f.seek(position)
        f.write(content)


@pytest.mark.parametrize(
    "block, position",
    [
        (0, 0),
        (0, BLOCK - 1),
        (1, BLOCK),
        (2, 2 * BLOCK + 77),
        (3, 3 * BLOCK),
        (3, 400_001),
    ],
    ids=[
        "first",
        "last-of-block-0",
        "first-of-block-1",
        "inside-block-2",
        "first-of-block-3",
        "last",
    ],
)
def test_a_changed_byte_is_never_returned(write_tokens, block, position):
    # 400,002 bytes: three blocks and a part
    write_tokens(200_001)
    intact = open_split(8)
    split = make_split_with_crc32("train.bin")
    byte = Path("x/train.bin").read_bytes()[position]
    replace_bytes("x/train.bin", position, bytes([byte ^ 1]))
    for first in range(0, split.ends[-1] - 9, 1000):
        # the blocks that hold the 18 bytes of nine tokens
        first_block = 2 * first // BLOCK
        last_block = (2 * first + 17) // BLOCK
        if first_block <= block <= last_block:
            with pytest.raises(BadData, match=f"x/train.bin: block {block}, "):
                split.read(first, 9)
        else:
            assert split.read(first, 9) == intact.read(first, 9)


def record_reads(monkeypatch):
    """Return a list to which each read from a file adds its size and its position."""
    reads = []
    pread = os.pread

    def record_pread(file, size, position):
        reads.append((size, position))
        return pread(file, size, position)

    monkeypatch.setattr(os, "pread", record_pread)
    return reads


def test_each_block_is_compared_once(write_tokens, monkeypatch):
    write_tokens(200_001)
    split = make_split_with_crc32("train.bin")
    reads = record_reads(monkeypatch)
    # a CRC32 is of a whole block, so the first window in it reads all of it
    for epoch in range(2):
        split.rows(epoch * split.windows, split.windows)
    # four blocks, then the windows alone
    sizes = [size for size, _ in reads]
    assert sizes.count(BLOCK) == 4
    assert len(sizes) == 4 + 2 * split.windows


def test_swapped_files_are_refused(write_tokens):
    names = ("train-00000.bin", "train-00001.bin")
    paths = [Path("x", name) for name in names]
    # files of one size and dtype, which only their checksums tell apart
    for first, path in zip((0, 7), paths):
        write_tokens(100_000, first=first)
        os.rename("x/train.bin", path)
    split = make_split_with_crc32(*names)
    contents = [path.read_bytes() for path in paths]
    for k, path in enumerate(paths):
        path.write_bytes(contents[1 - k])
        with pytest.raises(BadData, match=f"{path.name}: block 0"):
            split.read(k * 100_000, 9)


# a dataset that nanoGPT prepared


@pytest.fixture
def nanogpt(write_tokens):
    """Return a function that writes ids below `top` as both splits of x, and `meta` as meta.pkl."""

    def write(top, meta=None, protocol=4):
        tokens = (np.arange(5000) * 7 % top).astype("uint16")
        for name in ("train", "val"):
            tokens.tofile(f"x/{name}.bin")
        if meta is not None:
            Path("x/meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        return read_meta(Path("x"))

    return write


@pytest.mark.parametrize("protocol", range(6))
def test_meta_pkl_gives_the_characters(nanogpt, protocol):
    # nanoGPT's three entries
    chars = "\n abcé"
    itos = dict(enumerate(chars))
    stoi = {char: i for i, char in itos.items()}
    vocabulary = {"vocab_size": 6, "itos": itos, "stoi": stoi}
    meta = nanogpt(6, vocabulary, protocol)
    assert meta["tokenizer"] == {"kind": "char", "chars": chars}
    assert meta["vocab_size"] == 6
    assert meta["tokens"] == {"train": 5000, "val": 5000}


class Trap:
    """An object whose unpickling creates a file."""

    def __reduce__(self):
        return Path("ran").touch, ()


@pytest.mark.parametrize(
    "meta",
    [
        {"itos": {0: "a"}, "stoi": Trap()},
        Trap(),
        {"itos": {0: "a", 2: "b"}},
        {"itos": ["a", "a"]},
        {"itos": {0: "ab"}},
        {"itos": {0: 1}},
        {"itos": np.array(["a"])},
        {"vocab_size": 5},
        [1],
    ],
    ids=[
        "trap-inside",
        "trap",
        "gap",
        "twice",
        "two-characters",
        "number",
        "array",
        "no-itos",
        "list",
    ],
)
def test_a_malformed_meta_pkl_is_refused(nanogpt, meta):
    with pytest.raises(BadData, match="x/meta.pkl is not nanoGPT's vocabulary"):
        nanogpt(6, meta)
    assert not Path("ran").exists()


def test_a_truncated_meta_pkl_is_refused(nanogpt):
    whole = pickle.dumps({"itos": {0: "a", 1: "b"}})
    # a pickle ends with a dot, so no prefix is complete
    for size in range(len(whole)):
        Path("x/meta.pkl").write_bytes(whole[:size])
        with pytest.raises(BadData):
            nanogpt(2)


def test_gpt2_tokens_are_assumed_with_a_note(nanogpt, capsys):
    # as many ids as GPT-2 has, without meta.pkl
    assert nanogpt(50257)["tokenizer"] == {"kind": "gpt2"}
    assert "GPT-2" in capsys.readouterr().err


def test_characters_are_never_read_as_gpt2_tokens(nanogpt):
    # 65 ids without meta.pkl: characters whose vocabulary is lost
    with pytest.raises(BadData, match="below 256"):
        nanogpt(65)


def test_half_a_dataset_is_refused(nanogpt):
    nanogpt(50257)
    Path("x/val.bin").unlink()
    with pytest.raises(BadData, match="x/val.bin"):
        read_meta(Path("x"))


def test_an_unreadable_meta_json_is_refused(nanogpt):
    nanogpt(50257)
    # prepare.py writes it last
    Path("x/meta.json").touch()
    with pytest.raises(BadData, match="unfinished"):
        read_meta(Path("x"))

    Path("x/meta.json").unlink()
    Path("x/meta.json").mkdir()
    with pytest.raises(BadData, match="meta.json.*directory"):
        read_meta(Path("x"))


def test_offsets_beyond_4_gb_are_exact(write_tokens, tmp_path, monkeypatch):
    # a sparse file: no byte of it is on the disk
    with open(tmp_path / "x" / "train.bin", "wb") as f:
        f.truncate(2**34)
    reads = record_reads(monkeypatch)
    open_split(1000).rows(0, 2000)
    positions = {position for _, position in reads}
    assert max(positions) > 0.99 * 2**34
    assert min(positions) < 0.01 * 2**34
    # 2,000 windows of 2,000 bytes each, side by side
    assert len(reads) == 2000
    assert len(positions) == 2000
    assert len({position % 2000 for position in positions}) == 1


# a split of several files


def divide_file(folder, *sizes, dtype="uint16"):
    """Copy train.bin into files of the given numbers of tokens. Return the `files` of a Split."""
    tokens = np.fromfile(folder / "train.bin", dtype)
    assert sum(sizes) == len(tokens)
    files = {f"train-{k:05}.bin": size for k, size in enumerate(sizes)}
    start = 0
    for file, size in files.items():
        part = tokens[start : start + size]
        part.tofile(folder / file)
        start += size
    return files


@pytest.mark.parametrize(
    "sizes",
    [
        (400, 300, 300),
        (0, 999, 0, 0, 1),
        (3,) * 333 + (1,),
        (1000,),
    ],
    ids=["three", "empty-ones", "tiny", "one"],
)
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "fixed"])
def test_several_files_are_read_as_one(write_tokens, tmp_path, sizes, shift):
    write_tokens(1000)
    files = divide_file(tmp_path / "x", *sizes)
    for block_size in (1, 8, 37):
        one = open_split(block_size, 1, shift)
        several = open_split(block_size, 1, shift, files=files)
        assert several.windows == one.windows
        assert several.offsets == one.offsets
        one_x, one_y = one.rows(0, 3 * one.windows)
        several_x, several_y = several.rows(0, 3 * one.windows)
        assert torch.equal(one_x, several_x)
        assert torch.equal(one_y, several_y)


def test_batches_do_not_depend_on_the_number_of_files(write_tokens, tmp_path):
    write_tokens(5000, "uint32", first=2**31)
    files = divide_file(tmp_path / "x", 1234, 2345, 1421, dtype="uint32")
    one_file = open_split(16, 7, dtype="uint32")
    several_files = open_split(16, 7, dtype="uint32", files=files)
    one_loader = Loader(one_file, 3, 4, range(4), CPU)
    loader = Loader(several_files, 3, 4, range(4), CPU)
    for step in (0, 1, 2, 3, 40, 41, 1000, 10**7):
        assert list_batches(loader, step) == list_batches(one_loader, step)


def test_a_missing_or_truncated_file_is_named(write_tokens, tmp_path):
    write_tokens(1000)
    files = divide_file(tmp_path / "x", 400, 0, 600)
    last = tmp_path / "x" / "train-00002.bin"
    # a token less, a token more, none
    for count in (599, 601, 0):
        os.truncate(last, 2 * count)
        with pytest.raises(BadData, match=f"{last.name}: expected 600 .*got {count}"):
            open_split(8, files=files)
    last.unlink()
    with pytest.raises(BadData, match="train-00002.bin: no such file"):
        open_split(8, files=files)

    # a single file, too
    os.truncate(tmp_path / "x" / "train.bin", 1000)
    with pytest.raises(BadData, match="train.bin: expected 1,000 .*got 500"):
        open_split(8, files={"train.bin": 1000})


def test_a_file_truncated_while_it_is_open_is_refused(write_tokens):
    write_tokens(1000)
    split = open_split(8)
    os.truncate(split.files[0].name, 700 * 2)
    # a window is read as a whole or not at all
    for first in range(split.windows):
        with suppress(BadData):
            x, _ = split.rows(first, 1)
            assert x.shape == (1, 8)
    with pytest.raises(BadData, match="truncated"):
        split.rows(0, split.windows)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads the memory from /proc"
)
def test_memory_stays_flat_while_large_files_are_read(write_tokens, tmp_path):
    def get_resident_bytes():
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    # eight sparse files of 256 MB
    size = 2**28
    files = {f"train-{k:05}.bin": size // 2 for k in range(8)}
    for name in files:
        with open(tmp_path / "x" / name, "wb") as f:
            f.truncate(size)
    split = open_split(1024, files=files)
    # whatever is allocated once is allocated now
    for i in range(50):
        split.rows(i * 32, 32)
    before = get_resident_bytes()
    for i in range(2000):
        split.rows(i * 32, 32)
    # the pages that were touched are some 250 MB
    assert get_resident_bytes() - before < 20 * 2**20


# a loader


def list_batches(loader, step):
    """Return a step's micro-batches as {m: (inputs, targets)} in plain lists."""
    rows = {}
    for m in loader.local:
        x, y = loader.get_batch(step, m)
        rows[m] = (x.tolist(), y.tolist())
    return rows


def list_first_tokens(loader, steps):
    """Return the first token of each row of these steps."""
    tokens = []
    for step in steps:
        for x, _ in list_batches(loader, step).values():
            tokens += [row[0] for row in x]
    return tokens


def make_loader(rank=0, ranks=1, seed=1):
    """Return the loader of a rank, for four micro-batches of three windows."""
    each = 4 // ranks
    local = range(rank * each, (rank + 1) * each)
    return Loader(open_split(8, seed), 3, 4, local, CPU)


def test_a_step_has_the_same_rows_on_any_number_of_ranks(write_tokens):
    write_tokens(1000)
    for step in (0, 1, 57):
        alone = list_batches(make_loader(), step)
        assert list(alone) == [0, 1, 2, 3]
        for ranks in (2, 4):
            together = {}
            for rank in range(ranks):
                part = list_batches(make_loader(rank, ranks), step)
                # no rank reads the micro-batch of another
                assert not part.keys() & together.keys()
                together |= part
            assert together == alone


def test_steps_of_an_epoch_read_every_window_once(write_tokens):
    # 24 windows: two steps of 4 x 3
    write_tokens(8 * 25)
    loader = make_loader()
    for epoch in range(3):
        rows = list_first_tokens(loader, (2 * epoch, 2 * epoch + 1))
        assert loader.split.windows == 24
        assert len(rows) == 24
        assert len(set(rows)) == 24


def test_a_step_does_not_depend_on_the_steps_before_it(write_tokens):
    write_tokens(1000)
    loader = make_loader()
    in_order = [list_batches(loader, step) for step in range(30)]
    # with a new loader for each
    for step in range(30):
        assert list_batches(make_loader(), step) == in_order[step]
    # in any order
    for step in (29, 3, 4, 0, 29, 29):
        assert list_batches(loader, step) == in_order[step]
    for step in range(29):
        assert in_order[step] != in_order[step + 1]


def test_an_interrupted_step_is_complete_the_next_time(write_tokens):
    write_tokens(1000)
    loader = make_loader()
    # an exception ended step 5 after its first micro-batch
    loader.get_batch(5, 0)
    assert list_batches(loader, 5) == list_batches(make_loader(), 5)
    assert list_batches(loader, 6) == list_batches(make_loader(), 6)


def test_micro_batches_are_read_once_and_one_ahead(write_tokens, monkeypatch):
    write_tokens(1000)
    loader = make_loader(rank=1, ranks=2)
    firsts = []
    rows = loader.split.rows

    def record_rows(first, count):
        firsts.append(first)
        return rows(first, count)

    monkeypatch.setattr(loader.split, "rows", record_rows)
    for step in range(3):
        list_batches(loader, step)
    # wait for the read ahead
    loader.executor.shutdown()
    # the micro-batches 2 and 3 of each step, and the one after them
    micro_batches = [2, 3, 6, 7, 10, 11, 14]
    assert firsts == [3 * m for m in micro_batches]


def test_a_distant_step_needs_no_scan(write_tokens):
    write_tokens(8 * 25)
    loader = make_loader()
    # the two steps of an epoch
    rows = list_first_tokens(loader, (10**9, 10**9 + 1))
    assert np.diff(sorted(rows)).tolist() == [8] * 23


def test_another_seed_gives_different_batches(write_tokens):
    write_tokens(1000)
    batches = set()
    # JSON: lists of numbers can't be members of a set
    for seed in range(10):
        loader = make_loader(seed=seed)
        batches.add(json.dumps(list_batches(loader, 0)))
    assert len(batches) == 10


def test_gpu_batches_are_pinned_and_contiguous(write_tokens, monkeypatch):
    pinned = []

    def record_pin(tensor):
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", record_pin)
    write_tokens(1000)
    loader = Loader(open_split(8), 4, 1, range(1), torch.device("cuda"))
    x, y = loader._read(0, 0)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert [id(tensor) for tensor in pinned] == [id(x), id(y)]
    # otherwise the transfer makes a copy and waits
    assert x.is_contiguous()
    assert y.is_contiguous()
