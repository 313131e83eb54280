"""tools.inspect shows the history of a run, and exactly the batches of each step."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROGRAMS, TINY, read_error, run

from keepgpt.checkpoint import find_bundle
from keepgpt.files import FolderLock
from tools.common import last_step, read_card
from tools.inspect import list_batches, open_loader, read_micro_batch, sort_log

SMALL = TINY | {
    "log_interval": 2,
    "eval_interval": 4,
    "keep_every": 4,
}


def inspect(folder: Path, code: int | None = 0, **flags: object):
    """Run `python -m tools.inspect`."""
    return run("tools.inspect", folder, code=code, **flags)


@pytest.fixture(scope="module")
def runs(
    dataset: Path, play: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """Train a run that skips batches and is resumed, a branch of it, and one with another dataset.
    Record the tokens that they read."""
    place = tmp_path_factory.mktemp("inspect")

    def record(
        name: str,
        poisoned: list[int],
        flaky: tuple[int, ...] = (),
        **flags: object,
    ) -> str:
        env = {
            "RECORD": str(place / f"{name}.jsonl"),
            "POISONED": json.dumps(poisoned),
            "FLAKY": json.dumps(flaky),
        }
        program = PROGRAMS / "recorded_batches.py"
        return run(program, out_dir=place / name, env=env, **flags).stdout

    # the same characters in another order
    text = play.read_text(encoding="utf-8")
    other = place / "other.txt"
    other.write_text(text[30_000:] + text[:30_000], encoding="utf-8")
    run("prepare.py", other, name="other", tokenizer="char", data_dir=place)

    # step 3 skips two batches, step 8 one, and step 5 one, right after a checkpoint; step 6 has
    # another result when it is computed again
    poisoned = [2, 3, 6, 10]
    settings = SMALL | {"dataset": dataset, "max_iters": 6}
    record("trunk", poisoned, (6,), **settings)
    record("trunk", poisoned, init_from="resume", max_iters=12)
    branch = {"init_from": f"branch:{place / 'trunk'}", "step": 8, "max_iters": 12}
    record("branch", [13], **branch)
    # batches of the other data count from 0
    printed = record("turned", [1], **branch, dataset=place / "other")
    return SimpleNamespace(
        trunk=place / "trunk",
        branch=place / "branch",
        turned=place / "turned",
        place=place,
        printed=printed,
    )


def read_record(folder: Path, step: int) -> list[tuple[int, list]]:
    """Return the batches that a run read in a step: their numbers and tokens, each once."""
    lines = folder.with_suffix(".jsonl").read_text().splitlines()
    batches = {}
    for line in lines:
        attempt = json.loads(line)
        if attempt["step"] == step:
            batches[attempt["batch"]] = attempt["read"]
    return list(batches.items())


def explain(folder: Path, step: int) -> list[tuple[int, list]]:
    """Return the same as tools.inspect finds it. Check that each sequence is at its place."""
    _, bundle = find_bundle(folder)
    loader = open_loader(bundle)
    # the dataset has one shard
    data = np.fromfile(loader.split.files[0].name, np.uint16).tolist()
    batches = []
    for batch in list_batches(bundle, sort_log(folder), step):
        read = []
        for m in range(loader.micro_batches):
            sequences = read_micro_batch(loader, batch, m)
            read.append([sequence.tokens for sequence in sequences])
            for sequence in sequences:
                end = sequence.offset + len(sequence.tokens)
                assert data[sequence.offset : end] == sequence.tokens
                assert sequence.file.endswith("/train.bin")
        batches.append((batch, read))
    return batches


@pytest.mark.slow
def test_each_step_is_explained_exactly(runs):
    first_steps = {
        runs.trunk: 1,
        runs.branch: 9,
        runs.turned: 9,
    }
    for folder, first_step in first_steps.items():
        for step in range(first_step, 13):
            assert explain(folder, step) == read_record(folder, step), step
    # a step's skipped batches come first
    for folder, step, expected in (
        (runs.trunk, 3, [2, 3, 4]),
        (runs.trunk, 5, [6, 7]),
        (runs.trunk, 8, [10, 11]),
        (runs.branch, 10, [13, 14]),
        (runs.turned, 10, [1, 2]),
    ):
        numbers = [batch for batch, _ in explain(folder, step)]
        assert numbers == expected
    # a branch knows what its trunk read
    assert explain(runs.branch, 3) == read_record(runs.trunk, 3)


def test_an_older_checkpoint_and_the_log_explain_later_steps(runs, tmp_path):
    folder = tmp_path / "trunk"
    folder.mkdir()
    # as after a kill -9 before a save: step 8 skips a batch
    shutil.copy(runs.trunk / "step-00000004.pt", folder)
    shutil.copy(runs.trunk / "metrics.jsonl", folder)
    for step in (3, 5, 8, 12):
        assert explain(folder, step) == read_record(runs.trunk, step)


@pytest.fixture(scope="module")
def step_3(runs) -> list[str]:
    """Return the lines about a step that skipped two batches, with its whole text."""
    return inspect(runs.trunk, step=3, chars=0).stdout.splitlines()


def test_a_step_is_shown_as_text(step_3, play):
    text = play.read_text(encoding="utf-8")
    batches = [line.split(":")[0] for line in step_3 if line.startswith("batch ")]
    assert batches == ["batch 2, skipped", "batch 3, skipped", "batch 4"]
    sequences = [line for line in step_3 if ", token " in line]
    # three batches of two micro-batches of four sequences
    assert len(sequences) == 3 * 2 * 4
    for line in sequences:
        place, _, shown = line.partition(": ")
        offset = int(place.split()[-1].replace(",", ""))
        # the training text starts where the file does
        assert eval(shown) == text[offset : offset + 32]


def test_a_step_is_shown_with_the_log_around_it(step_3):
    rows = [line.split(":")[0] for line in step_3 if line.startswith("  step")]
    steps = [int(row.removeprefix("  step ")) for row in rows]
    # steps are logged at 2, 4 and 6, skips at 3, 3 and 5, evaluations at 4 and 6, and at 6 also
    # that it was computed again
    assert steps == [2, 3, 3, 4, 4, 5, 6, 6, 6]


def test_a_step_is_shown_with_the_rate_that_was_logged(runs, tmp_path):
    rates = {row["step"]: row["lr"] for row in sort_log(runs.trunk).steps}
    for step in (2, 4, 12):
        line = inspect(runs.trunk, step=step).stdout.splitlines()[0]
        assert line == f"{runs.trunk}: step {step}, lr {rates[step]:.2e}"
    # also after a resume with another schedule, which the checkpoint has
    copy = shutil.copytree(runs.trunk, tmp_path / "copy")
    log = (copy / "metrics.jsonl").read_text()
    changed = log.replace(f'"lr": {rates[4]}', '"lr": 0.75')
    (copy / "metrics.jsonl").write_text(changed)
    assert "step 4, lr 7.50e-01" in inspect(copy, step=4).stdout


def test_a_step_that_is_not_made_yet_says_so(runs):
    # the run ends at step 12
    assert "not made yet" in inspect(runs.trunk, step=13).stdout
    assert "not made yet" not in inspect(runs.trunk, step=12).stdout


def test_the_run_is_shown_on_one_screen(runs):
    shown = inspect(runs.trunk).stdout
    for part in (
        "block_size=32",
        "step 12 of 12",
        "val ",
        "best val ",
        "skipped batches: 2 before step 3, 1 before step 5, 1 before step 8",
        "computed again: 1",
        "step 3: loss nan",
        "UTC, step 0: ",
        "UTC, step 6: ",
        "ckpt-00000012.pt, ckpt.pt",
        "step-00000004.pt",
        " MB, intact",
    ):
        assert part in shown, part
    # 12 is the default, not this run's
    assert "n_layer=12" not in shown
    assert "CORRUPT" not in shown
    assert len(shown.splitlines()) < 40
    # all weights are in the table once, whatever their names
    inodes = {path.stat().st_ino for path in runs.trunk.glob("*.pt")}
    assert shown.count("MB") == len(inodes)


def test_a_branch_is_shown_with_its_trunk(runs):
    shown = inspect(runs.turned).stdout
    # without the skips of the trunk, whose data was another
    assert "skipped batches: 1 before step 10" in shown
    assert f"branched from {runs.trunk}/" in shown
    assert "step 8, with other" in shown
    card = read_card(runs.turned)
    assert card.trunk["step"] == 8
    assert card.settings["max_iters"] == 12


def test_the_end_of_a_run_says_where_to_look(runs):
    # both commands work as they are
    *_, tools = runs.printed.splitlines()
    assert tools == (
        f"look at it: python -m tools.inspect {runs.turned}, "
        f"python -m tools.plot {runs.turned}"
    )


def test_an_event_is_no_step(tmp_path):
    rows = [
        {"step": 4, "loss": 2.0},
        # a step that skipped its batch has not been made
        {"step": 5, "event": "skip", "text": "loss nan"},
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert last_step(tmp_path) == 4


def test_a_running_run_is_shown_without_its_lock(runs):
    def list_files() -> list:
        files = sorted(runs.trunk.iterdir())
        return [(file.name, file.stat().st_mtime_ns) for file in files]

    lock = FolderLock(runs.trunk)
    lock.acquire(patience=0)
    try:
        before = list_files()
        assert "step 12 of 12" in inspect(runs.trunk).stdout
        assert "batch 4" in inspect(runs.trunk, step=3).stdout
        assert list_files() == before
    finally:
        lock.release()


@pytest.fixture
def folder(runs, tmp_path) -> Path:
    """Return a copy of the trunk's folder without its checkpoints."""
    folder = tmp_path / "trunk"
    shutil.copytree(runs.trunk, folder, ignore=shutil.ignore_patterns("*.pt"))
    return folder


def test_a_run_before_its_first_save_is_shown(folder):
    # README.md has the settings, and the log has the skips
    shown = inspect(folder).stdout
    assert "block_size=32" in shown
    assert "checkpoints, the newest last: none" in shown
    assert "skipped batches: 2 before step 3, 1 before step 5, 1 before step 8" in shown
    # but its batches depend on the dataset, which only a checkpoint has
    read_error(inspect(folder, code=None, step=3))


def test_a_damaged_folder_is_shown(runs, folder):
    whole = (runs.trunk / "ckpt.pt").read_bytes()
    (folder / "ckpt.pt").write_bytes(whole[:-100])
    (folder / "ckpt-00000016.pt.tmp").write_bytes(b"")
    # an empty row, no row, a wrong type, no UTF-8; the end of the last one does not count
    (folder / "metrics.jsonl").write_bytes(b'{}\n7\n"a"\n{"step": "x"}\n\xff\n{"st')
    (folder / "README.md").write_bytes(b"\xff my own")
    shown = inspect(folder).stdout
    assert "settings: unknown" in shown
    assert "CORRUPT: " in shown
    assert "5 corrupt lines" in shown
    assert "ckpt-00000016.pt.tmp" in shown


def test_an_older_checkpoint_alone_explains_a_run(runs, folder):
    (folder / "metrics.jsonl").unlink()
    (folder / "README.md").unlink()
    whole = (runs.trunk / "ckpt.pt").read_bytes()
    (folder / "ckpt.pt").write_bytes(whole[:-100])
    shutil.copy(runs.trunk / "step-00000008.pt", folder)
    shown = inspect(folder, verify=False).stdout
    assert "step 8 of 12" in shown
    assert "block_size=32" in shown
    assert "at step 8" in shown
    assert "batch 4" in inspect(folder, step=3).stdout


def test_an_empty_folder_is_shown(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "settings: unknown" in inspect(tmp_path / "empty").stdout


def test_missing_or_changed_data_is_one_line(runs, dataset, tmp_path):
    # the branch's own data starts at step 8
    assert str(runs.trunk) in read_error(inspect(runs.turned, code=None, step=8))
    read_error(inspect(tmp_path / "nothing", code=None))
    read_error(inspect(runs.trunk, code=None, step=-1))

    data = runs.place / "other"
    content = (data / "train.bin").read_bytes()
    backup = tmp_path / "backup"
    shutil.copytree(data, backup)
    try:
        # another token of the vocabulary at each place
        changed = bytearray(content)
        for i in range(0, len(content), 2):
            changed[i] ^= 1
        (data / "train.bin").write_bytes(changed)
        assert "has changed" in read_error(inspect(runs.turned, code=None, step=9))
        # cut short
        (data / "train.bin").write_bytes(content[:-2])
        assert "train.bin" in read_error(inspect(runs.turned, code=None, step=9))
        (data / "train.bin").unlink()
        assert "train.bin" in read_error(inspect(runs.turned, code=None, step=9))
        # another dataset at this place
        shutil.rmtree(data)
        shutil.copytree(dataset, data)
        assert "not the other" in read_error(inspect(runs.turned, code=None, step=9))
        shutil.rmtree(data)
        read_error(inspect(runs.turned, code=None, step=9))
        # the run itself is shown without its data
        assert "step 12 of 12" in inspect(runs.turned).stdout
    finally:
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(backup, data)
