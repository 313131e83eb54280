"""keepgpt/config.py: types, precedence, isolated config files, one-line errors, --help."""

import builtins
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import PROGRAMS, read_error

from keepgpt.checkpoint import Disk, read_bundle, write_bundle
from keepgpt.config import (
    TrainConfig,
    check_settings,
    find_mistakes,
    find_oddities,
    parse,
)
from keepgpt.errors import UserError, exit_with
from keepgpt.optim import get_lr_factor
from sample import SampleConfig

ROOT = Path(__file__).parents[1]
DEFAULTS = TrainConfig()
# a run of seconds whose rate is below the default min_lr
SHORT = {
    "learning_rate": 1e-5,
    "max_iters": 4,
    "lr_decay_iters": 4,
    "warmup_iters": 1,
    "eval_interval": 2,
    "eval_iters": 1,
    "log_interval": 1,
}


def read(*argv):
    """Return the settings of a command line."""
    return parse(TrainConfig, "", [str(a) for a in argv])[0]


def expect_error(*argv):
    """Return the message of a command line that is refused."""
    with pytest.raises(UserError) as error:
        read(*argv)
    return str(error.value)


@pytest.fixture
def write_config(tmp_path):
    """Return a function that writes a config file and returns its path."""

    def write(text, name="x.py"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def run(*argv):
    """Run a script in a new interpreter."""
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# types


@pytest.mark.parametrize(
    "key, spelling, value",
    [
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", "1", 1.0),
        ("min_lr", "0", 0.0),
        ("dropout", ".5", 0.5),
        ("max_iters", "1e4", 10000),
        ("max_iters", "500", 500),
        ("max_iters", "0", 0),
        ("n_layer", "3.0", 3),
        ("out_dir", "a=b", "a=b"),
        ("out_dir", "7", "7"),
        ("wandb_run_name", "--x", "--x"),
        ("bias", "True", True),
        ("bias", "true", True),
        ("bias", "1", True),
        ("decay_lr", "False", False),
        ("decay_lr", "false", False),
        ("decay_lr", "0", False),
        ("compile", "True", True),
        ("compile", "False", False),
        ("compile", "auto", "auto"),
        ("dtype", "bfloat16", "bfloat16"),
        ("dtype", "auto", "auto"),
        ("seed", "9007199254740993", 2**53 + 1),
    ],
)
def test_a_flag_is_converted_to_its_type(key, spelling, value):
    got = getattr(read(f"--{key}={spelling}"), key)
    assert got == value
    # 1 == 1.0 == True
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "key, spelling, value",
    [
        ("learning_rate", "1", 1.0),
        ("max_iters", "1e4", 10000),
        ("bias", "1", True),
        ("compile", "False", False),
        ("gradient_accumulation_steps", "5 * 8", 40),
        ("min_lr", "0.5 / 4", 0.125),
        ("out_dir", "'a' + 'b'", "ab"),
    ],
)
def test_a_value_in_a_file_is_converted_to_its_type(write_config, key, spelling, value):
    got = getattr(read(write_config(f"{key} = {spelling}\n")), key)
    assert got == value
    # 1 == 1.0 == True
    assert type(got) is type(value)


# no number, not whole, not finite, empty, a truth value, out of range
@pytest.mark.parametrize(
    "flag",
    [
        *(
            f"--n_layer={value}"
            for value in ("six", "1.5", "nan", "inf", "", "True", "0")
        ),
        "--learning_rate=fast",
        "--bias=yes",
        "--bias=2",
        "--dtype=float64",
        "--compile=maybe",
        "--batch_size=-1",
        "--keep_checkpoints=1",
        "--beta2=1",
        "--dropout=1.0",
        "--learning_rate=-1e-3",
        "--learning_rate=nan",
        "--learning_rate=inf",
        "--seed=1e30",
        "--seed=-1",
        "--out_dir=",
    ],
)
def test_a_wrong_value_of_a_flag_is_refused(flag):
    assert expect_error(flag).startswith(f"{flag}: ")


@pytest.mark.parametrize(
    "line",
    [
        "n_layer = 'six'",
        "n_layer = [6]",
        "n_layer = None",
        "n_layer = True",
        "out_dir = 5",
        "dtype = ['float32']",
        "learning_rate = 10**400",
        "n_layer = 0",
        "learning_rate = float('nan')",
        "learning_rate = lambda step: 1e-3",
        "n_layer = max",
    ],
)
def test_a_wrong_value_in_a_file_names_key_and_file(write_config, line):
    path = write_config(line)
    assert expect_error(path).startswith(f"{path}: {line.split()[0]}: expected ")


# precedence


def test_no_arguments_give_the_defaults():
    assert parse(TrainConfig, "", []) == (DEFAULTS, {}, [])


def test_flags_override_files_and_files_override_defaults(write_config):
    path = write_config("n_layer = 3\nn_head = 3\n")
    # whatever their order
    for argv in ([path, "--n_layer=2"], ["--n_layer=2", path]):
        config = read(*argv)
        assert (config.n_layer, config.n_head, config.n_embd) == (2, 3, DEFAULTS.n_embd)


def test_the_later_of_two_flags_or_files_wins(write_config):
    one = write_config("n_layer = 3\nn_head = 3", "one.py")
    two = write_config("n_layer = 4", "two.py")
    assert read("--n_layer=7", "--n_layer=8").n_layer == 8
    config = read(one, two)
    assert (config.n_layer, config.n_head) == (4, 3)


def test_overrides_include_values_equal_to_a_default(write_config):
    path = write_config("n_head = 12")
    _, overrides, _ = parse(TrainConfig, "", [str(path), "--seed=1337"])
    assert overrides == {"n_head": 12, "seed": 1337}


@pytest.mark.parametrize("settings", [TrainConfig, SampleConfig])
def test_every_default_is_valid_as_a_flag(settings):
    # so a help text or a README can be copied
    flags = [f"--{f.name}={f.default}" for f in fields(settings)]
    assert parse(settings, "", flags)[0] == settings()


def test_settings_are_immutable():
    with pytest.raises(AttributeError):
        DEFAULTS.n_layer = 3


# files


def test_a_file_may_compute_import_and_define():
    config = read(PROGRAMS / "config/compute.py")
    assert (config.block_size, config.n_embd, config.max_iters) == (512, 64, 3)
    assert config.out_dir == "a/b"
    assert config.learning_rate == pytest.approx(1e-3)
    assert config.min_lr == pytest.approx(1e-4)
    assert float(config.wandb_run_name.removeprefix("ft-")) > 1e9


def test_a_file_can_read_the_defaults_and_change_them():
    config = read(PROGRAMS / "config/change_defaults.py")
    assert config.n_layer == 2 * DEFAULTS.n_layer + 1
    assert config.lr_decay_iters == DEFAULTS.max_iters
    assert config.n_head == DEFAULTS.n_embd


def test_a_file_sees_neither_the_program_nor_another_file(write_config):
    one = write_config("_mine = 1\nn_layer = 3", "one.py")
    # names of keepgpt/config.py, and one of the first file
    for name in ("TrainConfig", "fields", "settings", "path", "_mine"):
        message = expect_error(one, write_config(f"_x = {name}"))
        assert f"NameError: name '{name}' is not defined" in message
    assert (
        read(one, write_config("n_head = n_layer", "two.py")).n_head == DEFAULTS.n_layer
    )


# each way that Python has to reach the builtins
@pytest.mark.parametrize(
    "text",
    [
        "__builtins__ = None\n",
        "__builtins__ = {'print': 3}\n",
        "__builtins__['print'] = 3\n__builtins__.pop('len')\n",
        "def print(*a):\n    raise OSError\ndef len(x):\n    return 7\n",
        "import sys as print, math as len\n",
        "__name__ = '__main__'\n__file__ = 'elsewhere'\n",
        "globals().update(print=max, len=min)\n",
    ],
)
def test_a_file_cannot_change_the_programs_builtins(write_config, text):
    # put back in any case: pytest itself needs them
    before = dict(vars(builtins))
    try:
        config = read(write_config(text + "n_layer = 3\n"))
        assert vars(builtins) == before
    finally:
        vars(builtins).update(before)
    assert config.n_layer == 3
    # a later parse is as before
    assert read() == DEFAULTS


def test_a_file_may_use_helpers_loops_and_modules(tmp_path, monkeypatch, capsys):
    # the file that it reads
    (tmp_path / "width.txt").write_text("64")
    monkeypatch.chdir(tmp_path)
    config = read(PROGRAMS / "config/use_helpers.py")
    assert (config.n_layer, config.n_embd, config.max_iters) == (3, 64, 1000)
    assert config.learning_rate == pytest.approx(6e-4)
    assert config.warmup_iters == 100
    # no note about its helpers
    assert not capsys.readouterr().err


def test_numpy_and_torch_scalars_and_paths_are_values():
    config = read(PROGRAMS / "config/use_scalars.py")
    assert (config.learning_rate, config.n_layer, config.bias) == (0.5, 3, True)
    assert (config.max_iters, config.min_lr, config.out_dir) == (7, 1e-4, "a/b")


@pytest.mark.parametrize(
    "text, near",
    [
        ("learning_rat = 1e-3", "learning_rate"),
        ("n_heads = 4", "n_head"),
        ("learning_rate = 1e-3\nlearning_rat = 1e-4", "learning_rate"),
        ("learning_rat = 1e-3\nmin_lr = learning_rat / 10", "learning_rate"),
        ("import numpy as np\nweight_decays = np.float64(0.1)", "weight_decay"),
        ("for max_iter in (1, 2):\n    pass", "max_iters"),
    ],
)
def test_a_misspelled_key_is_refused(write_config, text, near):
    assert f"did you mean {near}?" in expect_error(write_config(text))


# the file uses each of these names itself, so it is not a misspelling
@pytest.mark.parametrize(
    "text",
    [
        "n_heads = 4\nn_head = n_heads",
        "learning_rates = [1e-3, 1e-4]\nlearning_rate = learning_rates[1]",
        "import numpy as np\nweight_decays = np.logspace(-3, -1, 3)\n"
        "weight_decay = max(weight_decays)",
        "max_iter = max_iters = 5\nlr_decay_iters = max_iter",
        "lr = 1\ndef f():\n    return lr",
        "class Sizes:\n    n_heads = 4\nn_head = Sizes.n_heads",
    ],
)
def test_a_helper_named_like_a_key_is_allowed(write_config, text, capsys):
    read(write_config(text))
    assert not capsys.readouterr().err


def test_unused_names_in_a_file_are_listed_in_one_line(write_config, capsys):
    # a builtin, an unknown key, a private name, and a name on the way to a key
    path = write_config("print = 3\nuse_rope = True\n_own = 1\nn_experts = n_head = 4")
    assert read(path).n_head == 4
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("note: ")
    assert line.endswith(": n_experts, print, use_rope\n")


@pytest.mark.parametrize(
    "env, spins",
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
    ids=["default", "count", "policy"],
)
def test_the_users_thread_spin_setting_is_kept(env, spins, monkeypatch):
    # the shell of the tests may have set them
    for key in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    done = run(PROGRAMS / "print_spin_count.py")
    assert done.stdout.strip() == spins, done.stderr


nanogpt_files = pytest.mark.parametrize(
    "path", sorted((PROGRAMS / "nanogpt").glob("*.py")), ids=lambda path: path.stem
)


@nanogpt_files
def test_files_in_nanogpts_style_are_valid(path):
    config, overrides, _ = parse(TrainConfig, "", [str(path)])
    for line in path.read_text().splitlines():
        key, equals, value = line.partition(" = ")
        # the file's own settings; the name of a run may have the time in it
        if equals and key.isidentifier() and "time" not in value:
            assert overrides.pop(key) == getattr(config, key) == eval(value)
    assert overrides.keys() <= {"wandb_run_name"}


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_every_size_of_gpt2_is_a_start(write_config, name):
    assert read(write_config(f"init_from = {name!r}")).init_from == name


# all of nanoGPT's settings
TRAINING_KEYS = """
out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer
n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr
warmup_iters lr_decay_iters min_lr backend device dtype compile
"""
SAMPLING_KEYS = """
init_from out_dir start num_samples max_new_tokens temperature top_k seed device dtype compile
"""


@pytest.mark.parametrize(
    "settings, keys",
    [(TrainConfig, TRAINING_KEYS), (SampleConfig, SAMPLING_KEYS)],
    ids=["train", "sample"],
)
def test_every_nanogpt_key_is_known(settings, keys):
    assert set(keys.split()) <= {f.name for f in fields(settings)}


# mistakes


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("n_layers", "n_layer"),
        ("learning_rte", "learning_rate"),
        ("n-head", "n_head"),
        ("lr_decay_steps", "lr_decay_iters"),
        ("batchsize", "batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_key_and_its_place(write_config, wrong, near):
    hint = f"unknown key {wrong!r}; did you mean {near}?"
    message = expect_error(f"--{wrong}=3")
    assert hint in message
    assert f"--{wrong}=3" in message
    # a line of a file can't have a hyphen in a name
    if wrong.isidentifier():
        path = write_config(f"{wrong} = 3")
        assert f"{path}: {hint}" in expect_error(path)


def test_an_unknown_key_unlike_any_other_points_to_help():
    assert "--help" in expect_error("--zzzzzzzz=3")


@pytest.mark.parametrize("flag", ["--n_layer", "-n_layer=3", "--", "-", "--compile"])
def test_a_flag_not_written_key_equals_value_is_refused(flag):
    message = expect_error(flag)
    assert flag in message
    assert "--key=value" in message


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    assert f"{tmp_path}/none.py: " in expect_error(tmp_path / "none.py")
    message = expect_error(tmp_path)
    assert "directory" in message
    assert str(tmp_path) in message
    # without hyphens it names a file
    assert "n_layer=3" in expect_error("n_layer=3")


@pytest.mark.parametrize(
    "text, line",
    [
        ("n_layer = 3\nn_head =\n", 2),
        ("n_layer = (3\n\n", 1),
        ("a = 1\n  n_layer = 3\n", 2),
        ("n_layer = 3\0\n", 1),
        (b"n_layer = 3\nout_dir = '\xff'\n", None),
    ],
)
def test_a_syntax_error_in_a_file_names_its_line(write_config, text, line):
    path = write_config(text)
    # bytes that are no UTF-8 have no line
    place = f"{path}:{line}: " if line else f"{path}:"
    assert place in expect_error(path)


@pytest.mark.parametrize(
    "text, line, says",
    [
        ("n_layer = 3\nn_head = 1 // 0\n", 2, "ZeroDivisionError"),
        ("import no_such_module\n", 1, "no_such_module"),
        ("def f():\n    return missing\n\nn_head = f()\n", 2, "NameError"),
        ("raise ValueError('a\\nb')\n", 1, "ValueError"),
        ("import json\n\nn_layer = json.loads('{')\n", 3, "JSONDecodeError"),
        ("assert 1 > 2, 'no'\n", 1, "no"),
        ("\nn_layer = eval('1 +')\n", 2, "SyntaxError"),
    ],
)
def test_an_exception_in_a_file_names_its_line(write_config, text, line, says):
    path = write_config(text)
    message = expect_error(path)
    assert f"{path}:{line}: " in message
    assert says in message


@pytest.mark.parametrize(
    "script, argv, says",
    [
        ("train.py", ["--n_layer"], "--key=value"),
        ("train.py", ["no/such.py"], "no/such.py"),
        ("train.py", ["config"], "directory"),
        ("train.py", ["{file}"], ":2: "),
        ("sample.py", ["--temprature=1"], "did you mean temperature?"),
        ("sample.py", ["--num_samples=0"], "at least 1"),
        ("sample.py", ["config/train_gpt2.py"], "--key=value"),
    ],
)
def test_a_mistake_exits_2_with_one_line(write_config, script, argv, says):
    # its second line fails
    path = write_config("n_layer = 3\nn_head = nothing\n")
    done = run(script, *(a.format(file=path) for a in argv))
    assert says in read_error(done)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_prints_an_error_in_one_line(monkeypatch, capsys, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    # no test waits for the seconds that it waits
    pauses = []
    monkeypatch.setattr("keepgpt.errors.time.sleep", pauses.append)
    with pytest.raises(SystemExit) as end:
        exit_with(UserError("two\nlines"))
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: two lines\n"
    # torchrun may end the others before they print the same
    assert pauses == ([] if rank == "0" else [3])


# --help


@pytest.mark.parametrize(
    "script, settings", [("train.py", TrainConfig), ("sample.py", SampleConfig)]
)
def test_help_lists_every_key(script, settings):
    done = run(script, "--help")
    assert done.returncode == 0
    lines = [line.strip() for line in done.stdout.splitlines()]
    for f in fields(settings):
        key = f"--{f.name}={f.default} "
        why = f.metadata["why"]
        assert why
        (line,) = [line for line in lines if line.startswith(key)]
        assert line.endswith(why)


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_loads_no_torch(script):
    done = run("-X", "importtime", script, "--help")
    assert done.returncode == 0
    # a line is: import time: 123 | 456 |   package.module
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    packages = {module.split(".")[0] for module in modules}
    assert "keepgpt" in packages
    assert packages.isdisjoint({"torch", "numpy", "tiktoken", "wandb"})


# settings together


def check_run(resumed=False, changed=None, **settings):
    """Return the settings and the notes of a run with these settings; `changed` ones of a resumed
    run, all of a new one."""
    # the defaults are for a run that is longer than these
    config = replace(
        TrainConfig(
            max_iters=1000, lr_decay_iters=1000, warmup_iters=10, eval_interval=100
        ),
        **settings,
    )
    return check_settings(
        config, settings if changed is None else dict.fromkeys(changed), resumed
    )


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"learning_rate": 1e-4, "min_lr": 2e-4}, "--min_lr=1e-05"),
        ({"learning_rate": 1e-4, "min_lr": 2e-4, "lr_schedule": "linear"}, "min_lr"),
        ({"learning_rate": 1e-4, "min_lr": 2e-4, "optimizer": "muon"}, "min_lr"),
        ({"warmup_iters": 200, "lr_decay_iters": 100}, "--warmup_iters"),
        ({"warmup_iters": 200, "lr_decay_iters": 200}, "--lr_decay_iters=1000"),
        ({"lr_decay_iters": 0, "warmup_iters": 0}, "--lr_decay_iters=1000"),
        (
            {"lr_schedule": "linear", "decay_fraction": 0.0, "lr_decay_iters": 500},
            "jump",
        ),
        ({"lr_schedule": "linear", "decay_fraction": 1.5}, "decay_fraction"),
    ],
)
def test_a_rate_that_rises_or_jumps_is_refused(settings, says):
    with pytest.raises(UserError) as error:
        check_run(**settings)
    assert says in str(error.value)
    # an older run with it continues, with a note
    config, notes = check_run(resumed=True, changed=[], **settings)
    assert vars(config).items() >= settings.items()
    assert says in " ".join(notes)
    # unless the resume asks for it
    with pytest.raises(UserError):
        check_run(resumed=True, **settings)
    # without a decay it has no effect
    check_run(**settings | {"decay_lr": False})
    assert check_run(**settings | {"eval_only": True})[1] == []


def test_a_default_min_lr_follows_a_lower_learning_rate():
    config, notes = check_run(learning_rate=1e-5)
    assert config.min_lr == pytest.approx(1e-6)
    (note,) = notes
    assert "min_lr" in note
    # after the warm-up of 10 steps the rate only falls
    factors = [get_lr_factor(step, config) for step in range(10, 1001)]
    assert factors == sorted(factors, reverse=True)
    assert max(factors) == 1


@pytest.mark.parametrize(
    "settings",
    [{"decay_lr": False}, {"lr_schedule": "constant"}],
    ids=["no decay", "constant"],
)
def test_a_constant_rate_leaves_min_lr_alone(settings):
    config, notes = check_run(learning_rate=1e-5, **settings)
    assert config.min_lr == DEFAULTS.min_lr
    assert notes == []


def test_a_resumed_run_keeps_its_own_min_lr():
    config, notes = check_run(resumed=True, changed=[], learning_rate=1e-5)
    assert config.min_lr == DEFAULTS.min_lr
    assert "min_lr" in notes[0]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"max_iters": 10, "eval_interval": 5}, "warm-up"),
        (
            {
                "max_iters": 5,
                "eval_interval": 5,
                "decay_fraction": 0.5,
                "lr_schedule": "linear",
            },
            "warm-up",
        ),
        ({"max_iters": 100}, "lr_decay_iters=1000"),
        ({"lr_decay_iters": 20}, "lr_decay_iters=20"),
        (
            {"muon_lr": 0.1, "muon_momentum": 0.9},
            "muon_lr, muon_momentum: no effect with optimizer=adamw",
        ),
        ({"decay_fraction": 0.5}, "lr_schedule=cosine"),
        ({"lr_schedule": "constant", "lr_decay_iters": 900}, "lr_schedule=constant"),
        (
            {"decay_lr": False, "warmup_iters": 5, "min_lr": 1e-5},
            "warmup_iters, min_lr: no effect",
        ),
    ],
)
def test_odd_settings_get_a_note(settings, says):
    _, notes = check_run(**settings)
    assert len([note for note in notes if says in note]) == 1
    # a resumed run said so at its start
    assert check_run(resumed=True, changed=[], **settings)[1] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name
)
def test_files_in_config_fit_together(path):
    # no note either, and no setting that is changed for the user
    config, overrides, _ = parse(TrainConfig, "", [str(path)])
    assert check_settings(config, overrides, resumed=False) == (config, [])


@nanogpt_files
def test_files_in_nanogpts_style_fit_together(path):
    config, overrides, _ = parse(TrainConfig, "", [str(path)])
    assert check_settings(config, overrides, resumed=False) == (config, [])


def test_the_defaults_fit_together():
    assert check_settings(DEFAULTS, vars(DEFAULTS) | {}, resumed=False)[0] == DEFAULTS
    assert not list(find_mistakes(DEFAULTS))
    assert not list(find_oddities(DEFAULTS))


def test_a_run_prints_notes_and_keeps_the_lower_min_lr(train, tmp_path):
    done = train(**SHORT)
    assert "note: min_lr" in done.stderr
    bundle = read_bundle(tmp_path / "out/ckpt.pt")
    assert bundle["config"]["min_lr"] == pytest.approx(1e-6)
    # a resume does not repeat the note
    done = train(init_from="resume", **SHORT)
    assert "min_lr" not in done.stdout + done.stderr
    # a min_lr above the rate that was asked for is a mistake
    read_error(train(out="other", code=None, min_lr=1e-3, **SHORT))
    assert not (tmp_path / "other/ckpt.pt").exists()


# a resume with other rounding


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, shown",
    [
        ({"batch_size": 8, "gradient_accumulation_steps": 1}, "batch_size 4 -> 8"),
        ({"dtype": "bfloat16"}, "dtype float32 -> bfloat16"),
        ({"elastic": True}, "elastic False -> True"),
        ({"compile": True}, "compile False -> True"),
    ],
    ids=["batch_size", "dtype", "elastic", "compile"],
)
def test_a_resume_that_rounds_differently_says_so(train, changes, shown):
    # one step: its checkpoint is resumed, and no step is computed after it
    flags = {"dtype": "float32", "compile": False, "max_iters": 1}
    train(**flags)
    flags |= changes | {"init_from": "resume"}
    printed = train(**flags).stdout.splitlines()
    # one line has all changes
    line = next(line for line in printed if line.startswith("resuming"))
    assert f"{shown}: the same losses up to rounding" in line
    assert line.count("rounding") == line.count(shown) == 1
    # a step of compiled code would take long
    if "compile" in changes:
        return
    # a checkpoint made with the changed settings resumes in silence
    flags["max_iters"] = 2
    train(**flags)
    assert "rounding" not in train(**flags).stdout


def test_a_resume_where_auto_picks_another_dtype_says_so(train, half):
    bundle = read_bundle(half / "ckpt.pt")
    # whichever this machine picks, the other one is a change
    picked = bundle["dtype"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[picked]
    # as if it came from a GPU
    bundle |= {"dtype": other, "device": "NVIDIA H100"}
    write_bundle(bundle, half / "ckpt.pt", Disk())
    printed = train(init_from="resume", max_iters=10).stdout
    same = "the same losses up to rounding"
    assert f"dtype {other} -> {picked}: {same}" in printed
    assert f"device NVIDIA H100 -> cpu: {same} and other" in printed


def test_an_older_checkpoint_resumes_without_a_note(train, half):
    bundle = read_bundle(half / "ckpt.pt")
    # older versions did not save these
    for key in ("dtype", "compile", "device"):
        del bundle[key]
    write_bundle(bundle, half / "ckpt.pt", Disk())
    assert "rounding" not in train(init_from="resume", max_iters=11).stdout
