"""A forked run behaves as one in a new interpreter."""

import pytest
from conftest import PROGRAMS, TINY, hash_state, read_rows, run


def list_lines(done) -> list[str]:
    """Return the lines that a run printed, except those with its speed."""
    return [line for line in done.stdout.splitlines() if "tokens/s" not in line]


@pytest.mark.slow
def test_a_fork_trains_bit_for_bit_as_a_new_interpreter(dataset, tmp_path):
    # a sample draws from the random state, too
    flags = TINY | {"dataset": dataset, "sample_tokens": 5}
    forked = run("train.py", out_dir=tmp_path / "forked", **flags)
    fresh = run("train.py", fresh=True, out_dir=tmp_path / "fresh", **flags)
    assert hash_state(tmp_path / "forked/ckpt.pt") == hash_state(
        tmp_path / "fresh/ckpt.pt"
    )
    assert read_rows(tmp_path / "forked") == read_rows(tmp_path / "fresh")
    assert forked.stderr == fresh.stderr == ""
    # the lines differ only in the folder's name
    lines = [line.replace("forked", "fresh") for line in list_lines(forked)]
    assert lines == list_lines(fresh)


@pytest.mark.parametrize(
    "way, code",
    [
        ("exit_without_a_code", 0),
        ("exit_with_7", 7),
        ("exit_with_a_sentence", 1),
        ("divide_by_zero", 1),
        ("exit_at_once", 5),
        ("get_sigkill", -9),
        ("get_sigterm", -15),
        ("get_sigint", -2),
        ("print_at_the_end", 0),
    ],
)
def test_a_fork_ends_as_a_new_interpreter_does(way, code, tmp_path):
    program = PROGRAMS / "end.py"
    flags = {"code": code, "cwd": tmp_path, "key": 3}
    forked = run(program, way, **flags)
    fresh = run(program, way, fresh=True, **flags)
    assert forked.stdout == fresh.stdout
    forked_lines = forked.stderr.splitlines()
    fresh_lines = fresh.stderr.splitlines()
    # a traceback between the first and the last line differs
    for place in (0, -1):
        assert forked_lines[place] == fresh_lines[place]
