"""Muon's updates, the schedules, and runs with Muon: exact resume, 1, 2 and 4 ranks, NaN."""

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PROGRAMS, TINY, hash_state, load, read_error, read_rows, run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from keepgpt import checkpoint, optim
from keepgpt.config import TrainConfig
from keepgpt.optim import (
    COEFFICIENTS,
    AdamW,
    Muon,
    get_lr_factor,
    interpolate,
    make_optimizer,
    orthogonalize,
    set_rates,
)
from model import ARCHITECTURES, GPT, ModelArgs, build_model

sys.path.insert(0, str(PROGRAMS))
import lion

ARGS = ModelArgs(
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=16,
    vocab_size=61,
    bias=True,
    dropout=0.0,
)
CONFIG = TrainConfig(
    optimizer="muon",
    learning_rate=1e-2,
    muon_lr=0.05,
    weight_decay=0.1,
    warmup_iters=0,
    max_iters=40,
    lr_decay_iters=40,
)
MUON = {
    "optimizer": "muon",
    "lr_schedule": "linear",
    "min_lr": 0.0,
}


def build_model_with_gradients() -> GPT:
    """Return a small GPT with random weights and gradients."""
    torch.manual_seed(0)
    model = build_model(ARGS)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
        p.grad = torch.randn_like(p)
    return model


def get_gradient(model: GPT) -> torch.Tensor:
    """Return the gradient of one of Muon's matrices."""
    attention = model.transformer.h[1].attn
    return attention.c_attn.weight.grad


def assert_same_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Raise AssertionError unless the optimizer's state is bit-identical to `state`."""
    actual = optimizer.state_dict()["state"]
    torch.testing.assert_close(actual, state, rtol=0, atol=0)


def assert_same_runs(folder: Path) -> None:
    """Raise AssertionError unless the last checkpoints of whole and parts are bit-identical."""
    whole = hash_state(folder / "whole/ckpt.pt")
    assert hash_state(folder / "parts/ckpt.pt") == whole


def make_muon(parameters: list, momentum: float = 0.95, **settings: object) -> Muon:
    """Return Muon over `parameters`, with nothing for AdamW."""
    group = {
        "params": parameters,
        "parts": 1,
        "momentum": momentum,
        **settings,
    }
    return Muon([group], torch.float32, fused=True)


# one update


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 1e-4), (torch.bfloat16, 0.05)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize(
    "shape",
    [
        (3, 32, 48),
        (2, 24, 64),
        (2, 64, 24),
    ],
    ids=["wide", "wider", "tall"],
)
def test_updates_have_singular_values_near_1(shape, dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(shape)
    y = orthogonalize(x, dtype)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    singular_values = torch.linalg.svdvals(y)
    assert singular_values.min() > 0.5
    assert singular_values.max() < 1.3

    # the singular vectors are those of x: between them, y is diagonal
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    S = U.mT @ y @ Vh.mT
    diagonal = torch.diag_embed(S.diagonal(dim1=1, dim2=2))
    assert (S - diagonal).abs().max() < tolerance

    # the norm of zeros must not divide by 0
    zeros = torch.zeros(shape)
    assert torch.equal(orthogonalize(zeros, dtype), zeros)


def test_the_polynomial_acts_on_singular_values():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 12, dtype=torch.float64, generator=rng)
    U, S, Vh = torch.linalg.svd(x[0], full_matrices=False)
    S = S / S.norm()
    # as many iterations as orthogonalize makes
    a, b, c = COEFFICIENTS
    for _ in range(5):
        S = a * S + b * S**3 + c * S**5
    y = orthogonalize(x, torch.float64)
    torch.testing.assert_close(y[0], U @ torch.diag(S) @ Vh)


needs_torchs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="needs torch 2.9"
)


@needs_torchs_muon
def test_float32_updates_match_torchs_muon_to_1e5(monkeypatch):
    # PyTorch's iteration is always bfloat16: let that mean float32 here
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    check_against_torch(torch.float32, 1e-5)


@needs_torchs_muon
def test_bfloat16_updates_match_torchs_muon():
    # both are noisy: each is up to 0.05 off float32
    check_against_torch(torch.bfloat16, 0.1)


def check_against_torch(dtype: torch.dtype, tolerance: float) -> None:
    """Make ten updates of matrices of three shapes with both, and compare the weights' changes."""
    torch.manual_seed(0)
    # equal shapes are updated together
    shapes = [
        (16, 16),
        (16, 16),
        (16, 16),
        (8, 24),
        (40, 8),
    ]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    torch_parameters = copy.deepcopy(parameters)
    settings = {"momentum": 0.9, "lr": 0.03, "weight_decay": 0.2}
    optimizer = make_muon(parameters, **settings)
    optimizer.dtype = dtype
    torch_optimizer = torch.optim.Muon(torch_parameters, **settings)
    for _ in range(10):
        before = [p.detach().clone() for p in parameters]
        # both start each update from the same weights, so differences do not add up
        for p, torch_p in zip(parameters, torch_parameters):
            torch_p.data.copy_(p.data)
            p.grad = torch.randn_like(p)
            torch_p.grad = p.grad.clone()
        optimizer.step()
        torch_optimizer.step()
        for p, torch_p, start in zip(parameters, torch_parameters, before):
            assert (p - torch_p).norm() < tolerance * (torch_p - start).norm()


def test_q_k_and_v_in_one_parameter_equal_three():
    torch.manual_seed(0)
    # GPT-2's c_attn holds the three matrices that others keep apart
    fused = nn.Parameter(torch.randn(3 * 16, 16))
    chunks = fused.detach().chunk(3)
    parts = [nn.Parameter(chunk.clone()) for chunk in chunks]
    fused_optimizer = make_muon([fused], lr=0.1)
    parts_optimizer = make_muon(parts, lr=0.1)

    def update():
        fused.grad = torch.randn_like(fused)
        for p, grad in zip(parts, fused.grad.chunk(3)):
            p.grad = grad.clone()
        fused_optimizer.step()
        parts_optimizer.step()

    fused_optimizer.param_groups[0]["parts"] = 3
    for _ in range(3):
        update()
    assert torch.equal(fused, torch.cat(parts))

    # as one matrix it is another update
    fused_optimizer.param_groups[0]["parts"] = 1
    update()
    assert not torch.allclose(fused, torch.cat(parts), atol=1e-2)


def test_updates_of_tall_matrices_are_larger():
    tall = nn.Parameter(torch.zeros(64, 16))
    wide = nn.Parameter(torch.zeros(16, 64))
    tall.grad = torch.randn(64, 16)
    wide.grad = tall.grad.T.contiguous()
    make_muon([tall, wide], lr=0.1, weight_decay=0.0).step()
    # by the root of the ratio of rows to columns: (64 / 16) ** 0.5
    torch.testing.assert_close(tall, 2 * wide.T)


def poison(model: GPT) -> dict:
    """Make all gradients NaN and one weight -0. Return a copy of the weights."""
    # adding 0 to -0 makes +0: a skip must not even do that
    mlp = model.transformer.h[0].mlp
    mlp.c_fc.weight.data[0, 0] = -0.0
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    return copy.deepcopy(model.state_dict())


def check_unchanged(model: GPT, before: dict) -> None:
    """Check that the weights are `before`'s, bit for bit."""
    for name, tensor in model.state_dict().items():
        new_bits = tensor.view(torch.int32)
        old_bits = before[name].view(torch.int32)
        assert torch.equal(new_bits, old_bits), name


@torch.no_grad()
def test_a_skip_on_the_device_leaves_every_bit():
    model = build_model_with_gradients()
    optimizer = make_optimizer(model, CONFIG)
    optimizer.step()
    before = poison(model)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    # the groups that are Muon's
    for group in optimizer.param_groups:
        if "momentum" in group:
            optimizer.update_matrices(group, torch.tensor(True))
    check_unchanged(model, before)
    assert_same_state(optimizer, state)

    # a step that is not skipped is the same with the tensor as without
    results = []
    for skip in (None, torch.tensor(False)):
        model = build_model_with_gradients()
        optimizer = make_optimizer(model, CONFIG)
        # the groups of matrices
        for group in optimizer.param_groups[2:]:
            optimizer.update_matrices(group, skip)
        state = optimizer.state_dict()["state"]
        results.append([model.state_dict(), state])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_gradscaler_skips_an_overflow_and_goes_on():
    model = build_model_with_gradients()
    optimizer = make_optimizer(model, CONFIG)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (True, False):
        before = copy.deepcopy(model.state_dict())
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 4.0
        if overflow:
            get_gradient(model)[0, 0] = math.inf
        # the scaler makes its scale when it first scales a loss
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        for name, tensor in model.state_dict().items():
            changed = bool((tensor != before[name]).any())
            assert changed != overflow, name


# groups and schedules


every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def build_architecture(name: str) -> GPT:
    """Return a small model of an architecture, with all kinds of parameters that it can have."""
    settings = {"bias": True, "n_kv_head": 1, "tie_embeddings": False}
    existing = settings.keys() & set(ARCHITECTURES[name].settings)
    own = {key: settings[key] for key in existing}
    return build_model(replace(ARGS, architecture=name, **{"bias": False} | own))


@every_architecture
def test_each_parameter_is_in_one_group(name):
    model = build_architecture(name)
    grouped = []
    for group in make_optimizer(model, CONFIG).param_groups:
        grouped += map(id, group["params"])
    assert sorted(grouped) == sorted(map(id, model.parameters()))


@every_architecture
def test_muon_takes_the_matrices_of_the_blocks(name):
    model = build_architecture(name)
    taken = {}
    for group in make_optimizer(model, CONFIG).param_groups:
        for p in group["params"]:
            taken[id(p)] = group.get("parts")
    for path, p in model.named_parameters():
        in_block = ".h." in path or ".layers." in path
        expected = None
        if in_block and p.dim() == 2:
            # c_attn holds three: queries, keys and values
            expected = 3 if "c_attn" in path else 1
        assert taken[id(p)] == expected, path


@every_architecture
def test_only_matrices_decay(name):
    model = build_architecture(name)
    for group in make_optimizer(model, CONFIG).param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.dim() == 2 else 0.0)


def test_the_default_optimizer_has_no_group_for_muon():
    model = build_model(ARGS)
    assert type(make_optimizer(model, TrainConfig())) is AdamW


def test_schedules_take_their_values():
    config = replace(
        CONFIG,
        learning_rate=2.0,
        min_lr=0.4,
        warmup_iters=10,
        lr_decay_iters=110,
        decay_fraction=0.5,
    )
    cosine = replace(config, lr_schedule="cosine")
    linear = replace(config, lr_schedule="linear")
    constant = replace(config, lr_schedule="constant")

    def assert_factors(config, factors):
        for step, factor in factors.items():
            assert get_lr_factor(step, config) == pytest.approx(factor), step

    # all have the same warm-up, and decay_lr=False leaves it out
    for schedule in (cosine, linear, constant):
        assert get_lr_factor(0, schedule) == 1 / 11
        assert get_lr_factor(4, schedule) == 5 / 11
        without = replace(schedule, decay_lr=False)
        assert get_lr_factor(0, without) == 1.0
        assert get_lr_factor(200, without) == 1.0

    for step in (10, 60, 110, 200):
        assert get_lr_factor(step, constant) == 1.0
    # to min_lr / learning_rate = 0.2, linearly in the second half: from step 55 on
    assert_factors(cosine, {10: 1.0, 60: 0.6, 110: 0.2, 200: 0.2})
    assert_factors(linear, {10: 1.0, 55: 1.0, 66: 0.84})
    assert_factors(linear, {110: 0.2, 200: 0.2})

    # it never falls before the end of the warm-up, and may fall from there on
    early = replace(linear, decay_fraction=1.0)
    assert_factors(early, {9: 10 / 11, 10: 1.0, 60: 0.6})
    never = replace(linear, decay_fraction=0.0)
    assert get_lr_factor(109, never) == 1.0


def test_muons_rate_and_momentum_follow_the_step():
    config = replace(
        CONFIG,
        learning_rate=1e-3,
        min_lr=1e-4,
        muon_lr=0.02,
        lr_decay_iters=1000,
        lr_schedule="linear",
        decay_fraction=0.5,
    )
    optimizer = make_optimizer(build_model(ARGS), config)
    # at the start, in the middle of the momentum's warm-up, of the decay, and at the end
    for step, lr, momentum in (
        (0, 1e-3, 0.85),
        (150, 1e-3, 0.90),
        (750, 5.5e-4, 0.95),
        (1000, 1e-4, 0.95),
    ):
        set_rates(optimizer, step, config)
        for group in optimizer.param_groups:
            if "momentum" in group:
                # muon_lr is 20 times learning_rate
                assert group["lr"] == pytest.approx(20 * lr)
                assert group["momentum"] == pytest.approx(momentum)
            else:
                assert group["lr"] == pytest.approx(lr)

    # a momentum below that of the warm-up has no warm-up
    set_rates(optimizer, 0, replace(config, muon_momentum=0.5))
    assert optimizer.param_groups[-1]["momentum"] == 0.5


# runs


def test_ten_muon_steps_and_ten_more_equal_twenty(train, whole, tmp_path):
    # the resume takes the optimizer and its schedule from the checkpoint
    train(out="whole", **MUON)
    train(out="parts", **MUON | {"max_iters": 10})
    train(out="parts", init_from="resume")
    parts = tmp_path / "parts"
    assert_same_runs(tmp_path)
    assert read_rows(tmp_path / "whole") == read_rows(parts)

    # it learns faster than AdamW
    adamw_row = read_rows(whole, "val_loss")[-1]
    muon_row = read_rows(parts, "val_loss")[-1]
    assert muon_row["val_loss"] < adamw_row["val_loss"] - 0.03

    # Muon has the four matrices of a block, AdamW the other parameters
    optimizer = load(parts / "ckpt.pt")["optimizer"]
    keys = [set(state) for state in optimizer["state"].values()]
    assert keys.count({"momentum_buffer"}) == 4
    assert {"step", "exp_avg", "exp_avg_sq"} in keys


@pytest.mark.slow
def test_two_ranks_with_muon_resume_bit_identical(train, tmp_path):
    flags = MUON | {"ranks": 2, "eval_interval": 5}
    train(out="whole", max_iters=10, **flags)
    train(out="parts", max_iters=5, **flags)
    train(out="parts", max_iters=10, init_from="resume", **flags)
    assert_same_runs(tmp_path)


@pytest.mark.slow
def test_1_2_and_4_ranks_with_muon_are_bit_identical(train, tmp_path):
    flags = MUON | {
        "elastic": True,
        "gradient_accumulation_steps": 4,
        "dtype": "bfloat16",
        "init_from": "auto",
    }
    train(out="one", max_iters=6, **flags)
    # two more steps with each number of ranks
    train(out="mixed", ranks=2, max_iters=2, **flags)
    train(out="mixed", ranks=4, max_iters=4, **flags)
    train(out="mixed", ranks=1, max_iters=6, **flags)
    run("tools.same", tmp_path / "one", tmp_path / "mixed")


def test_changed_rates_of_muon_are_printed(train, tmp_path):
    train(**MUON | {"max_iters": 2})
    done = train(
        init_from="resume",
        max_iters=3,
        muon_lr=0.001,
        decay_fraction=0.1,
        muon_momentum=0.8,
        lr_schedule="constant",
    )
    for change in (
        "muon_lr 0.02 -> 0.001",
        "decay_fraction 0.65 -> 0.1",
        "linear -> constant",
        "muon_momentum 0.95 -> 0.8",
    ):
        assert change in done.stdout
    # the last group is Muon's, at step 3 of the warm-up
    optimizer = load(tmp_path / "out/ckpt.pt")["optimizer"]
    group = optimizer["param_groups"][-1]
    assert group["lr"] == pytest.approx(0.001 * 3 / 5)
    assert group["momentum"] == 0.8


def test_another_optimizer_is_refused(train, half, first_half):
    done = train(init_from="resume", optimizer="muon", code=2)
    assert "optimizer adamw -> muon" in read_error(done)
    assert hash_state(half / "ckpt.pt") == hash_state(first_half / "ckpt.pt")


def test_a_checkpoint_of_before_muon_is_an_adamw_run(train, half):
    path = half / "ckpt.pt"
    bundle = checkpoint.read_bundle(path)
    # settings that did not exist
    for key in ("optimizer", "muon_lr", "lr_schedule"):
        del bundle["config"][key]
    checkpoint.write_bundle(bundle, path, checkpoint.Disk())
    done = train(init_from="resume", optimizer="muon", code=2)
    assert "optimizer adamw -> muon" in read_error(done)
    train(init_from="resume", max_iters=11)


def test_a_float16_muon_run_resumes_exactly(train, tmp_path):
    flags = MUON | {"dtype": "float16", "architecture": "qwen3"}
    train(out="whole", max_iters=10, **flags)
    train(out="parts", max_iters=5, **flags)
    train(out="parts", max_iters=10, init_from="resume")
    # the evaluation in the middle changes nothing
    assert_same_runs(tmp_path)


def test_muon_stops_before_a_loss_that_is_not_finite(train, tmp_path):
    # one update at this rate overflows
    train(**MUON | {"max_iters": 5})
    flags = {"learning_rate": 1e30, "muon_lr": 1e30, "decay_lr": False}
    train(init_from="resume", checkpoint_interval=1, code=3, **flags)
    weights = load(tmp_path / "out/ckpt.pt")["model"].values()
    for p in weights:
        assert torch.isfinite(p).all()


def test_a_learning_rate_of_0_leaves_muons_rate(train, tmp_path):
    # the rate of Muon does not follow from the other one
    train(learning_rate=0.0, **MUON | {"max_iters": 2})
    optimizer = load(tmp_path / "out/ckpt.pt")["optimizer"]
    moves = [group["lr"] > 0 for group in optimizer["param_groups"]]
    # the first two groups are AdamW's
    assert moves == [False, False, True, True]


@pytest.mark.parametrize(
    "key, value",
    [("optimizer", "adamm"), ("lr_schedule", "cosin")],
    ids=["optimizer", "lr_schedule"],
)
def test_an_unknown_optimizer_or_schedule_is_refused(train, key, value):
    done = train(code=None, **{key: value})
    assert key in read_error(done, silent=False)


# the contract, and an optimizer that a user adds


@pytest.fixture
def all_optimizers(monkeypatch):
    """Add Lion, as a user would."""
    monkeypatch.setitem(optim.OPTIMIZERS, "lion of a test", lion.make_lion)


# those that the project has, also one that is added later
NAMES = [*optim.OPTIMIZERS, "lion of a test"]
every_optimizer = pytest.mark.parametrize("name", NAMES)


@every_optimizer
def test_groups_cover_the_model_and_have_their_own_rates(name, all_optimizers):
    model = build_model_with_gradients()
    # the first of ten steps to the peak
    config = replace(CONFIG, optimizer=name, warmup_iters=9)
    optimizer = make_optimizer(model, config)
    in_groups = []
    for group in optimizer.param_groups:
        in_groups += [id(p) for p in group["params"]]
    in_model = [id(p) for p in model.parameters()]
    assert sorted(in_groups) == sorted(in_model)
    for group in optimizer.param_groups:
        assert math.isclose(group["lr"], group["peak_lr"] / 10)


def test_the_momentum_of_another_optimizer_is_its_own(monkeypatch):
    def make_sgd(model, config, dtype):
        group = {"params": list(model.parameters()), "peak_lr": config.learning_rate}
        return torch.optim.SGD([group], momentum=0.5)

    # far behind Muon's warm-up, whose momentum would be 0.95
    monkeypatch.setitem(optim.OPTIMIZERS, "sgd", make_sgd)
    config = replace(CONFIG, optimizer="sgd")
    optimizer = make_optimizer(build_model_with_gradients(), config)
    set_rates(optimizer, 1000, config)
    assert optimizer.param_groups[0]["momentum"] == 0.5


@every_optimizer
def test_found_inf_leaves_every_bit(name, all_optimizers):
    model = build_model_with_gradients()
    optimizer = make_optimizer(model, replace(CONFIG, optimizer=name))
    optimizer.step()
    before = poison(model)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    check_unchanged(model, before)
    assert_same_state(optimizer, state)

    # the next step counts again
    optimizer.found_inf = torch.zeros(())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert (tensor != before[name]).any(), name


def copy_groups(optimizer):
    """Return the groups of an optimizer, with numbers for parameters."""
    groups = optimizer.state_dict()["param_groups"]
    return copy.deepcopy(groups)


@every_optimizer
def test_a_step_changes_no_group(name, all_optimizers):
    model = build_model_with_gradients()
    optimizer = make_optimizer(model, replace(CONFIG, optimizer=name))
    before = copy_groups(optimizer)
    # a resume takes the groups of its command, and would lose a change
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert copy_groups(optimizer) == before


@pytest.mark.slow
def test_an_added_optimizer_resumes_and_survives_kills(dataset, tmp_path):
    program = PROGRAMS / "lion.py"
    flags = TINY | {
        "dataset": dataset,
        "optimizer": "lion",
        "learning_rate": 1e-3,
    }
    parts = flags | {"out_dir": tmp_path / "parts"}
    run(program, **flags | {"out_dir": tmp_path / "whole"})
    run(program, **parts | {"max_iters": 10})
    run(program, **parts | {"init_from": "resume"})
    assert_same_runs(tmp_path)

    # with this rate the loss is not finite
    parts |= {"init_from": "resume", "max_iters": 40}
    parts |= {"learning_rate": 1e30, "decay_lr": False}
    run(program, **parts, code=3)

    # two runs that are killed at a random time and resumed
    done = run(program, "kill", "--cases=2", env={"TMPDIR": str(tmp_path)})
    assert " 0 failures" in done.stdout


# devices


def test_muon_uses_no_lerp_on_mps():
    # on MPS, lerp has returned wrong values (PyTorch issue 196067)
    lerps = (torch.lerp, torch.Tensor.lerp, torch.Tensor.lerp_)

    class RefuseLerp(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert function not in lerps
            return function(*args, **(kwargs or {}))

    # fake tensors: shapes without numbers, on a device that is not here
    with FakeTensorMode(), RefuseLerp():
        p = nn.Parameter(torch.empty(4, 6, device="mps"), requires_grad=False)
        p.grad = torch.empty_like(p)
        optimizer = make_muon([p], lr=0.1, weight_decay=0.0)
        optimizer.update_matrices(optimizer.param_groups[0])


def test_both_forms_of_the_mean_are_equal_to_rounding():
    a = torch.randn(2, 5)
    b = torch.randn(2, 5)
    expected = a.lerp(b, 0.3)
    assert torch.equal(interpolate(a, b, 0.3), expected)

    # a tensor on the CPU that names another device takes the other form
    class Mps(torch.Tensor):
        device = torch.device("mps")

    assert torch.allclose(interpolate(a.as_subclass(Mps), b, 0.3), expected)
    out = a.clone().as_subclass(Mps)
    assert interpolate(out, b, 0.3, out=out) is out
    assert torch.allclose(out, expected)


# the path of float32


def test_a_limited_processor_trains_in_float32(train, tmp_path):
    # `auto` is float32 then, on any machine
    env = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    flags = MUON | {"architecture": "qwen3", "env": env}
    done = train(out="whole", max_iters=10, **flags)
    assert "cpu, float32" in done.stdout
    train(out="parts", max_iters=5, **flags)
    train(out="parts", max_iters=10, init_from="resume", **flags)
    assert_same_runs(tmp_path)
    assert load(tmp_path / "whole/ckpt.pt")["dtype"] == "float32"
