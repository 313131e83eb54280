"""Muon's updates, the schedules, and runs with Muon: exact resume, 1, 2 and 4 ranks, NaN."""

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY, bits, complaint, rows, run
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
from tools.runs import digest

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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_found_inf_leaves_every_bit(optimizer):
    model = model_with_gradients()
    optimizer = make_optimizer(model, replace(CONFIG, optimizer=optimizer))
    optimizer.step()
    before = poison(model)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    check_unchanged(model, before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    optimizer.found_inf = torch.zeros(())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(
        (tensor != before[name]).any() for name, tensor in model.state_dict().items()
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


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_20_muon_steps_and_20_more_equal_40(train, tmp_path, ranks):
    train(out="whole", ranks=ranks, **MUON)
    train(out="parts", ranks=ranks, **MUON | {"max_iters": 20})
    train(out="parts", ranks=ranks, init_from="resume")
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert run("tools.same", tmp_path / "whole", tmp_path / "parts").returncode == 0
    train(out="adamw", ranks=ranks)
    assert bits(tmp_path / "whole/ckpt.pt") != bits(tmp_path / "adamw/ckpt.pt")
    if ranks == 1:
        bundle = torch.load(tmp_path / "parts/ckpt.pt", weights_only=True)
        states = [set(state) for state in bundle["optimizer"]["state"].values()]
        assert states.count({"momentum_buffer"}) == 4 * 2  # of 2 blocks
        assert {"step", "exp_avg", "exp_avg_sq"} in states


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_1_2_and_4_ranks_with_muon_are_bit_identical(train, tmp_path, dtype):
    flags = MUON | {
        "elastic": True,
        "gradient_accumulation_steps": 4,
        "dtype": dtype,
        "init_from": "auto",
        "max_iters": 12,
    }
    for ranks in (1, 2, 4):
        train(out=str(ranks), ranks=ranks, **flags)
    for ranks, steps in ((2, 4), (4, 8), (1, 12)):
        train(out="mixed", ranks=ranks, **flags | {"max_iters": steps})
    assert run("tools.same", *(tmp_path / name for name in ("1", "2", "4", "mixed")))


def test_muon_learns_faster_than_adamw(train, tmp_path):
    for name in ("adamw", "muon"):
        train(out=name, **MUON | {"optimizer": name, "dropout": 0.0})
    adamw, muon = (
        rows(tmp_path / name, "val_loss")[-1]["val_loss"] for name in ("adamw", "muon")
    )
    assert muon < adamw - 0.03


def test_changed_rates_are_printed_another_optimizer_refused(train, tmp_path):
    train(**MUON | {"max_iters": 10})
    before = bits(tmp_path / "out/ckpt.pt")
    done = train(init_from="resume", optimizer="adamw", code=None)
    assert "optimizer muon -> adamw" in complaint(done)
    assert bits(tmp_path / "out/ckpt.pt") == before
    done = train(
        init_from="resume",
        max_iters=11,
        muon_lr=0.001,
        decay_fraction=0.1,
        lr_schedule="constant",
        muon_momentum=0.8,
    )
    for change in (
        "muon_lr 0.02 -> 0.001",
        "decay_fraction 0.65 -> 0.1",
        "linear -> constant",
        "muon_momentum 0.95 -> 0.8",
    ):
        assert change in done.stdout
    bundle = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    group = bundle["optimizer"]["param_groups"][-1]
    assert group["lr"] == pytest.approx(0.001) and group["momentum"] == 0.8


def test_an_adamw_run_of_before_refuses_muon(train, tmp_path):
    train(max_iters=2)
    path = tmp_path / "out/ckpt.pt"
    bundle = checkpoint.read_bundle(path)
    for key in ("optimizer", "muon_lr", "lr_schedule"):
        del bundle["config"][key]
    checkpoint.write_bundle(bundle, path, checkpoint.Disk())
    done = train(init_from="resume", optimizer="muon", code=None)
    assert "optimizer adamw -> muon" in complaint(done)
    train(init_from="resume", max_iters=3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_muon_run_resumes_exactly(train, tmp_path, dtype):
    flags = MUON | {"dtype": dtype, "architecture": "qwen3"}
    train(out="whole", max_iters=20, **flags)
    train(out="parts", max_iters=10, **flags)
    train(out="parts", max_iters=20, init_from="resume")
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")


def test_muon_stops_before_a_loss_that_is_not_finite(train, tmp_path):
    train(**MUON | {"max_iters": 5})
    train(
        init_from="resume",
        learning_rate=1e30,
        muon_lr=1e30,
        decay_lr=False,
        max_iters=40,
        checkpoint_interval=1,
        code=3,
    )
    bundle = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert all(torch.isfinite(p).all() for p in bundle["model"].values())


def test_a_learning_rate_of_0_leaves_muons_rate(train, tmp_path):
    train(learning_rate=0.0, max_iters=2, **MUON)
    groups = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["optimizer"][
        "param_groups"
    ]
    assert [group["lr"] > 0 for group in groups] == [False, False, True, True]


@pytest.mark.parametrize(
    "setting", [{"optimizer": "adamm"}, {"lr_schedule": "cosin"}], ids=str
)
def test_an_unknown_optimizer_or_schedule_is_refused(train, setting):
    (key,) = setting
    assert key in complaint(train(code=None, **setting), silent=False)


# the contract, and an optimizer that a user adds


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023): the sign of a mean of gradients, with the state of one moment."""

    @torch.no_grad()
    def step(self, closure=None):
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf > 0:
            return
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                mean = state.setdefault("mean", torch.zeros_like(p))
                state["updates"] = state.get("updates", 0) + 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(mean.lerp(p.grad, 0.1).sign_(), alpha=group["lr"])
                mean.lerp_(p.grad, 0.01)


def make_lion(model, config, dtype):
    return Lion(optim.group_by_decay(model.parameters(), config), {})


@pytest.fixture
def all_optimizers(monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "lion", make_lion)


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
def test_found_inf_changes_neither_weights_nor_state(name, all_optimizers):
    model = model_with_gradients()
    optimizer = make_optimizer(model, replace(CONFIG, optimizer=name))
    optimizer.step()
    for found_inf, is_equal in ((torch.ones(()), True), (torch.zeros(()), False)):
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.found_inf = found_inf
        optimizer.step()
        after = [model.state_dict(), optimizer.state_dict()["state"]]
        assert (digest(before) == digest(after)) == is_equal


LION = """
import sys
sys.path.insert(0, {tests!r})
import test_optim
from keepgpt import optim
optim.OPTIMIZERS["lion"] = test_optim.make_lion
"""


def run_with_lion(program, *args, code=0):
    """Run Python code after Lion was added. Check its exit code."""
    source = LION.format(tests=str(Path(__file__).parent)) + program
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, args)],
        cwd=REPO,
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_an_added_optimizer_resumes_stops_at_nan_and_survives_kills(dataset, tmp_path):
    train = (
        "import sys, train\nfrom keepgpt.config import TrainConfig, parse\n"
        "sys.exit(train.main(*parse(TrainConfig, '', sys.argv[1:])[:2]))"
    )
    flags = [
        f"--{key}={value}"
        for key, value in (
            TINY | {"dataset": dataset, "optimizer": "lion", "learning_rate": 1e-3}
        ).items()
    ]
    run_with_lion(train, *flags, f"--out_dir={tmp_path}/whole")
    run_with_lion(train, *flags, f"--out_dir={tmp_path}/parts", "--max_iters=20")
    run_with_lion(
        train, "--init_from=resume", f"--out_dir={tmp_path}/parts", "--max_iters=40"
    )
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")
    run_with_lion(
        train,
        "--init_from=resume",
        f"--out_dir={tmp_path}/parts",
        "--max_iters=60",
        "--learning_rate=1e30",
        "--decay_lr=False",
        code=3,
    )
    crash = (
        "from tools.crash import common\n"
        "common.RUN |= {'optimizer': 'lion'}\n"
        "from tools.crash import __main__ as crash\n"
        "sys.exit(crash.main(common.CrashConfig(cases=5), ['kill']))"
    )
    assert " 0 failures" in run_with_lion(crash).stdout


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


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_limited_processor_trains_in_float32(train, tmp_path, architecture):
    """`auto` is float32 then, on any machine."""
    env = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    flags = MUON | {"architecture": architecture, "env": env, "fresh": True}
    assert "cpu, float32" in train(out="whole", max_iters=20, **flags).stdout
    train(out="parts", max_iters=10, **flags)
    train(out="parts", max_iters=20, init_from="resume", **flags)
    assert bits(tmp_path / "whole/ckpt.pt") == bits(tmp_path / "parts/ckpt.pt")
    bundle = torch.load(tmp_path / "whole/ckpt.pt", weights_only=True)
    assert bundle["dtype"] == "float32"
