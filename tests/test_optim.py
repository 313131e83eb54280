"""Muon's updates, the schedules, and runs with Muon: exact resume, 1, 2 and 4 ranks, NaN."""

import copy
import math
import sys
from dataclasses import replace

import pytest
import torch
from conftest import PROGRAMS, TINY, bits, complaint, load, rows, run
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
from model import GPT, ModelArgs, build_model

sys.path.insert(0, str(PROGRAMS))
import lion

ARGS = ModelArgs(
    n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=61, bias=True, dropout=0.0
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
MUON = {"optimizer": "muon", "lr_schedule": "linear", "min_lr": 0.0}


def model_with_gradients(seed: int = 0) -> GPT:
    """Return a small GPT with random weights and gradients."""
    torch.manual_seed(seed)
    model = build_model(ARGS)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
        p.grad = torch.randn_like(p)
    return model


def muon_alone(parameters: list, momentum: float = 0.95, **settings: object) -> Muon:
    """Return Muon over `parameters`, with nothing for AdamW."""
    return Muon(
        [{"params": parameters, "parts": 1, "momentum": momentum, **settings}],
        torch.float32,
        fused=True,
    )


# one update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 32, 48), (2, 24, 64), (2, 64, 24)])
def test_updates_have_singular_values_near_1(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape)
    y = orthogonalize(x, dtype)
    assert y.shape == x.shape and y.dtype == x.dtype
    singular = torch.linalg.svdvals(y)
    assert singular.min() > 0.5 and singular.max() < 1.3
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    S = U.mT @ y @ Vh.mT  # diagonal: U and V are x's own
    off = S - torch.diag_embed(S.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < (1e-4 if dtype == torch.float32 else 0.05)
    assert torch.equal(orthogonalize(torch.zeros(shape), dtype), torch.zeros(shape))


def test_the_polynomial_acts_on_singular_values():
    x = torch.randn(
        1, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    U, s, Vh = torch.linalg.svd(x[0], full_matrices=False)
    s, (a, b, c) = s / s.norm(), COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(
        orthogonalize(x, torch.float64)[0], U @ torch.diag(s) @ Vh
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_float32_updates_match_torchs_muon_to_1e5(monkeypatch):
    # PyTorch's iteration is always bfloat16: let that mean float32 here
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    check_against_torch(torch.float32, 1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_bfloat16_updates_match_torchs_muon():
    check_against_torch(torch.bfloat16, 0.1)  # of noise: each is up to 0.05 off float32


def check_against_torch(dtype: torch.dtype, tolerance: float) -> None:
    """Make ten updates of matrices of three shapes with both, and compare the weights' changes."""
    torch.manual_seed(0)
    ours = [
        nn.Parameter(torch.randn(shape))
        for shape in [(16, 16)] * 3 + [(8, 24), (40, 8)]
    ]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.03, "weight_decay": 0.2}
    optimizers = (
        muon_alone(ours, 0.9, **settings),
        torch.optim.Muon(theirs, momentum=0.9, **settings),
    )
    optimizers[0].dtype = dtype
    for _ in range(10):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs):
            q.data.copy_(p.data)
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q, start in zip(ours, theirs, before):
            assert (p - q).norm() < tolerance * (q - start).norm()


def test_q_k_and_v_in_one_parameter_equal_three():
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(3 * 16, 16))
    apart = [nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    one, three = muon_alone([fused], lr=0.1), muon_alone(apart, lr=0.1)
    one.param_groups[0]["parts"] = 3
    for _ in range(3):
        fused.grad = torch.randn_like(fused)
        for p, grad in zip(apart, fused.grad.chunk(3)):
            p.grad = grad.clone()
        one.step()
        three.step()
    assert torch.equal(fused, torch.cat(apart))
    one.param_groups[0]["parts"] = 1  # as one matrix it is another update
    fused.grad = torch.randn_like(fused)
    for p, grad in zip(apart, fused.grad.chunk(3)):
        p.grad = grad.clone()
    one.step()
    three.step()
    assert not torch.allclose(fused, torch.cat(apart), atol=1e-2)


def test_updates_of_tall_matrices_are_larger():
    p, q = nn.Parameter(torch.zeros(64, 16)), nn.Parameter(torch.zeros(16, 64))
    p.grad = torch.randn(64, 16)
    q.grad = p.grad.T.contiguous()
    muon_alone([p, q], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(p, 2 * q.T)  # (64 / 16) ** 0.5


def poison(model: GPT) -> list[dict]:
    """Make all gradients NaN and one weight -0. Return a copy of the weights."""
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = -0.0
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    return copy.deepcopy(model.state_dict())


def check_unchanged(model: GPT, before: dict) -> None:
    """Check that the weights are `before`'s, bit for bit."""
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), (
            name
        )


@torch.no_grad()
def test_a_skip_on_the_device_leaves_every_bit():
    model = model_with_gradients()
    optimizer = make_optimizer(model, CONFIG)
    optimizer.step()
    before = poison(model)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    groups = [group for group in optimizer.param_groups if "momentum" in group]
    for group in groups:
        optimizer.update_matrices(group, torch.tensor(True))
    check_unchanged(model, before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    # and a step that is not skipped is the same with the tensor as without
    results = []
    for skip in (None, torch.tensor(False)):
        model = model_with_gradients()
        optimizer = make_optimizer(model, CONFIG)
        for group in optimizer.param_groups[2:]:
            optimizer.update_matrices(group, skip)
        results.append([model.state_dict(), optimizer.state_dict()["state"]])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_gradscaler_skips_an_overflow_and_goes_on():
    model = model_with_gradients()
    optimizer, scaler = (
        make_optimizer(model, CONFIG),
        torch.amp.GradScaler("cpu", init_scale=4.0),
    )
    for overflow in (True, False):
        before = copy.deepcopy(model.state_dict())
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 4.0
        if overflow:
            model.transformer.h[1].attn.c_attn.weight.grad[0, 0] = math.inf
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        changed = [
            (tensor != before[name]).any()
            for name, tensor in model.state_dict().items()
        ]
        assert not any(changed) if overflow else all(changed)


# groups and schedules


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_the_groups_cover_the_model(architecture):
    qwen3 = {
        "bias": False,
        "architecture": "qwen3",
        "n_kv_head": 1,
        "tie_embeddings": False,
    }
    model = build_model(replace(ARGS, **qwen3) if architecture == "qwen3" else ARGS)
    groups = make_optimizer(model, CONFIG).param_groups
    kind = {
        id(p): (group.get("parts"), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert (
        sum(len(group["params"]) for group in groups)
        == len(kind)
        == len([*model.parameters()])
    )
    for name, p in model.named_parameters():
        in_block = ".h." in name or ".layers." in name
        parts = None if not in_block or p.dim() == 1 else 3 if "c_attn" in name else 1
        assert kind[id(p)] == (parts, 0.1 if p.dim() == 2 else 0.0), name
    assert type(make_optimizer(model, TrainConfig())) is AdamW  # the default


def test_schedules_take_their_values():
    config = replace(
        CONFIG,
        learning_rate=2.0,
        min_lr=0.4,
        warmup_iters=10,
        lr_decay_iters=110,
        decay_fraction=0.5,
    )
    cosine, linear, constant = (
        replace(config, lr_schedule=name) for name in ("cosine", "linear", "constant")
    )
    for each in (cosine, linear, constant):
        assert [get_lr_factor(step, each) for step in (0, 4)] == [1 / 11, 5 / 11]
        without = replace(each, decay_lr=False)
        assert [get_lr_factor(step, without) for step in (0, 200)] == [1.0, 1.0]
    assert [get_lr_factor(step, constant) for step in (10, 60, 110, 200)] == [1.0] * 4
    assert [
        get_lr_factor(step, cosine) for step in (10, 60, 110, 200)
    ] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert [
        get_lr_factor(step, linear) for step in (10, 55, 66, 110, 200)
    ] == pytest.approx([1.0, 1.0, 0.84, 0.2, 0.2])
    # it never falls before the end of the warm-up, and may fall from there on
    early = replace(linear, decay_fraction=1.0)
    assert [get_lr_factor(step, early) for step in (9, 10, 60)] == pytest.approx(
        [10 / 11, 1.0, 0.6]
    )
    assert get_lr_factor(109, replace(linear, decay_fraction=0.0)) == 1.0


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
    for step, lr, momentum in (
        (0, 1e-3, 0.85),
        (150, 1e-3, 0.90),
        (750, 5.5e-4, 0.95),
        (1000, 1e-4, 0.95),
    ):
        set_rates(optimizer, step, config)
        for group in optimizer.param_groups:
            if "momentum" in group:
                assert (group["lr"], group["momentum"]) == pytest.approx(
                    (20 * lr, momentum)
                )
            else:
                assert group["lr"] == pytest.approx(lr)
    set_rates(optimizer, 0, replace(config, muon_momentum=0.5))
    assert optimizer.param_groups[-1]["momentum"] == 0.5


# runs


def test_ten_muon_steps_and_ten_more_equal_twenty(train, whole, tmp_path):
    train(out="whole", **MUON)
    train(out="parts", **MUON | {"max_iters": 10})
    train(out="parts", init_from="resume")
    parts = tmp_path / "parts"
    assert bits(tmp_path / "whole/ckpt.pt") == bits(parts / "ckpt.pt")
    assert rows(tmp_path / "whole") == rows(parts)
    # it learns faster than AdamW
    adamw, muon = (rows(out, "val_loss")[-1]["val_loss"] for out in (whole, parts))
    assert muon < adamw - 0.03
    states = load(parts / "ckpt.pt")["optimizer"]["state"].values()
    keys = [set(state) for state in states]
    assert keys.count({"momentum_buffer"}) == 4  # of a block
    assert {"step", "exp_avg", "exp_avg_sq"} in keys


def test_two_ranks_with_muon_resume_bit_identical(train, tmp_path):
    flags = MUON | {"ranks": 2, "eval_interval": 5}
    train(out="whole", **flags | {"max_iters": 10})
    train(out="parts", **flags | {"max_iters": 5})
    train(out="parts", init_from="resume", **flags | {"max_iters": 10})
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")


@pytest.mark.slow
def test_1_2_and_4_ranks_with_muon_are_bit_identical(train, tmp_path):
    flags = MUON | {
        "elastic": True,
        "gradient_accumulation_steps": 4,
        "dtype": "bfloat16",
        "init_from": "auto",
    }
    train(out="1", **flags | {"max_iters": 6})
    for ranks, steps in ((2, 2), (4, 4), (1, 6)):
        train(out="mixed", ranks=ranks, **flags | {"max_iters": steps})
    run("tools.same", tmp_path / "1", tmp_path / "mixed")


def test_changed_rates_of_muon_are_printed(train, tmp_path):
    train(**MUON | {"max_iters": 2})
    flags = {"muon_lr": 0.001, "decay_fraction": 0.1, "muon_momentum": 0.8}
    flags["lr_schedule"] = "constant"
    done = train(init_from="resume", max_iters=3, **flags)
    for change in (
        "muon_lr 0.02 -> 0.001",
        "decay_fraction 0.65 -> 0.1",
        "linear -> constant",
        "muon_momentum 0.95 -> 0.8",
    ):
        assert change in done.stdout
    group = load(tmp_path / "out/ckpt.pt")["optimizer"]["param_groups"][-1]
    assert group["lr"] == pytest.approx(0.001 * 3 / 5)  # in the warm-up
    assert group["momentum"] == 0.8


def test_another_optimizer_is_refused(train, half, first_half):
    done = train(init_from="resume", optimizer="muon", code=2)
    assert "optimizer adamw -> muon" in complaint(done)
    assert bits(half / "ckpt.pt") == bits(first_half / "ckpt.pt")


def test_a_checkpoint_of_before_muon_is_an_adamw_run(train, half):
    path = half / "ckpt.pt"
    bundle = checkpoint.read_bundle(path)
    for key in ("optimizer", "muon_lr", "lr_schedule"):
        del bundle["config"][key]
    checkpoint.write_bundle(bundle, path, checkpoint.Disk())
    done = train(init_from="resume", optimizer="muon", code=2)
    assert "optimizer adamw -> muon" in complaint(done)
    train(init_from="resume", max_iters=11)


def test_a_float16_muon_run_resumes_exactly(train, tmp_path):
    flags = MUON | {"dtype": "float16", "architecture": "qwen3"}
    train(out="whole", max_iters=10, **flags)
    train(out="parts", max_iters=5, **flags)
    train(out="parts", max_iters=10, init_from="resume")
    # without the evaluation in the middle
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")


def test_muon_stops_before_a_loss_that_is_not_finite(train, tmp_path):
    train(**MUON | {"max_iters": 5})
    flags = {"learning_rate": 1e30, "muon_lr": 1e30, "decay_lr": False}
    train(init_from="resume", checkpoint_interval=1, code=3, **flags)
    weights = load(tmp_path / "out/ckpt.pt")["model"].values()
    assert all(torch.isfinite(p).all() for p in weights)


def test_a_learning_rate_of_0_leaves_muons_rate(train, tmp_path):
    train(learning_rate=0.0, **MUON | {"max_iters": 2})
    groups = load(tmp_path / "out/ckpt.pt")["optimizer"]["param_groups"]
    assert [group["lr"] > 0 for group in groups] == [False, False, True, True]


@pytest.mark.parametrize(
    "setting", [{"optimizer": "adamm"}, {"lr_schedule": "cosin"}], ids=str
)
def test_an_unknown_optimizer_or_schedule_is_refused(train, setting):
    (key,) = setting
    assert key in complaint(train(code=None, **setting), silent=False)


# the contract, and an optimizer that a user adds


@pytest.fixture
def all_optimizers(monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "lion", lion.make_lion)


names = pytest.mark.parametrize("name", ["adamw", "muon", "lion"])


@names
def test_groups_cover_the_model_and_have_their_own_rates(name, all_optimizers):
    model = model_with_gradients()
    config = replace(CONFIG, optimizer=name, warmup_iters=9)
    optimizer = make_optimizer(model, config)
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(parameters) == sorted(id(p) for p in model.parameters())
    assert all(
        math.isclose(group["lr"], group["peak_lr"] / 10)
        for group in optimizer.param_groups
    )


@names
def test_found_inf_leaves_every_bit(name, all_optimizers):
    model = model_with_gradients()
    optimizer = make_optimizer(model, replace(CONFIG, optimizer=name))
    optimizer.step()
    before = poison(model)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    check_unchanged(model, before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    # the next step counts again
    optimizer.found_inf = torch.zeros(())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    after = model.state_dict()
    assert all((tensor != before[name]).any() for name, tensor in after.items())


@pytest.mark.slow
def test_an_added_optimizer_resumes_and_survives_kills(dataset, tmp_path):
    program = PROGRAMS / "lion.py"
    flags = TINY | {"dataset": dataset, "optimizer": "lion", "learning_rate": 1e-3}
    parts = flags | {"out_dir": tmp_path / "parts"}
    run(program, **flags | {"out_dir": tmp_path / "whole"})
    run(program, **parts | {"max_iters": 10})
    run(program, **parts | {"init_from": "resume"})
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")
    more = {"init_from": "resume", "max_iters": 40, "learning_rate": 1e30}
    run(program, **parts | more | {"decay_lr": False}, code=3)
    done = run(program, "kill", "--cases=2", env={"TMPDIR": str(tmp_path)})
    assert " 0 failures" in done.stdout


# devices


def test_muon_uses_no_lerp_on_mps():
    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.lerp, torch.Tensor.lerp, torch.Tensor.lerp_)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Recorder():
        p = nn.Parameter(torch.empty(4, 6, device="mps"), requires_grad=False)
        p.grad = torch.empty_like(p)
        optimizer = muon_alone([p], lr=0.1, weight_decay=0.0)
        optimizer.update_matrices(optimizer.param_groups[0])


def test_both_forms_of_the_mean_are_equal_to_rounding():
    a, b = torch.randn(2, 5), torch.randn(2, 5)
    expected = a.lerp(b, 0.3)
    assert torch.equal(interpolate(a, b, 0.3), expected)

    class Mps(torch.Tensor):
        device = torch.device("mps")

    assert torch.allclose(interpolate(a.as_subclass(Mps), b, 0.3), expected)
    out = a.clone().as_subclass(Mps)
    assert interpolate(out, b, 0.3, out=out) is out and torch.allclose(out, expected)


# the path of float32


def test_a_limited_processor_trains_in_float32(train, tmp_path):
    """`auto` is float32 then, on any machine."""
    env = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    flags = MUON | {"architecture": "qwen3", "env": env}
    assert "cpu, float32" in train(out="whole", **flags | {"max_iters": 10}).stdout
    train(out="parts", **flags | {"max_iters": 5})
    train(out="parts", init_from="resume", **flags | {"max_iters": 10})
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")
    assert load(tmp_path / "whole/ckpt.pt")["dtype"] == "float32"
