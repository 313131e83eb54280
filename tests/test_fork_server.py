"""A forked run behaves as one in a new interpreter."""

import pytest
from conftest import TINY, bits, rows, run


@pytest.mark.slow
def test_a_fork_trains_bit_for_bit_as_a_new_interpreter(dataset, tmp_path):
    flags = TINY | {"dataset": dataset, "sample_tokens": 5}
    forked = run("train.py", out_dir=tmp_path / "forked", **flags)
    fresh = run("train.py", fresh=True, out_dir=tmp_path / "fresh", **flags)
    assert bits(tmp_path / "forked/ckpt.pt") == bits(tmp_path / "fresh/ckpt.pt")
    assert rows(tmp_path / "forked") == rows(tmp_path / "fresh")
    assert forked.stderr == fresh.stderr == ""
    lines = [line for line in fresh.stdout.splitlines() if "tokens/s" not in line]
    assert [
        line.replace("forked", "fresh")
        for line in forked.stdout.splitlines()
        if "tokens/s" not in line
    ] == lines


@pytest.mark.parametrize(
    "program, code",
    [
        ("sys.exit()", 0),
        ("sys.exit(7)", 7),
        ("sys.exit('a mistake')", 1),
        ("1 / 0", 1),
        ("os._exit(5)", 5),
        ("os.kill(os.getpid(), 9)", -9),
        ("os.kill(os.getpid(), 15)", -15),
        ("os.kill(os.getpid(), 2)", -2),
        ("import atexit; atexit.register(print, 'end')", 0),
    ],
)
def test_a_fork_ends_as_a_new_interpreter_does(program, code, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nprint('ж', *sys.argv, os.getcwd(), sys.path[0], __name__, "
        f"__file__, file=sys.stderr)\nprint(1)\n{program}\n"
    )
    forked, fresh = (
        run(str(script), "word", code=code, fresh=fresh, cwd=tmp_path, key=3)
        for fresh in (False, True)
    )
    assert forked.stdout == fresh.stdout
    for line in (0, -1):  # a traceback between them differs
        assert forked.stderr.splitlines()[line] == fresh.stderr.splitlines()[line]
