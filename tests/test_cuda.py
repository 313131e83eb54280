"""The GPU code, as far as a machine without one can test it: compiled graphs, fake CUDA tensors,
the order of streams, and decisions of the host."""

import copy
import math
import string
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from keepgpt import device as runtime
from keepgpt.checkpoint import Disk, Saver, read_bundle
from keepgpt.config import TrainConfig
from keepgpt.kernels import LinearCrossEntropy
from keepgpt.loader import Loader, Split
from keepgpt.optim import AdamW
from keepgpt.ranks import Ranks, map_tensors
from model import ModelArgs, build_model, generate
from train import (
    build_run,
    compute_gradient,
    evaluate,
    make_bundle,
    rewind,
    update,
)

ARGS = ModelArgs(
    n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=61, bias=True, dropout=0.0
)
torch.set_num_threads(1)  # models this small are slower on two
CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def tiny_run(tmp_path):
    """Return a function that makes a run on random tokens, without an out_dir."""

    def make(**settings):
        sizes = {key: value for key, value in vars(ARGS).items() if key != "vocab_size"}
        config = TrainConfig(
            **sizes | settings,
            batch_size=4,
            warmup_iters=0,
            gradient_accumulation_steps=1,
        )
        torch.manual_seed(0)
        tokens = np.random.default_rng(0).integers(
            ARGS.vocab_size, size=2**16, dtype=np.uint16
        )
        tokens.tofile(tmp_path / "train.bin")
        meta = {
            "dtype": "uint16",
            "tokenizer": {"kind": "char", "chars": string.printable[: ARGS.vocab_size]},
            "vocab_size": ARGS.vocab_size,
            "tokens": {"train": len(tokens)},
        }
        shifted, fixed = (
            Split(tmp_path, "train", meta, config.block_size, 0, shift)
            for shift in (True, False)
        )
        loader = Loader(shifted, config.batch_size, 1, range(1), CPU)
        run = build_run(
            config,
            Ranks(0, 1, CPU),
            None,
            meta,
            loader,
            {"train": fixed, "val": fixed},
            build_model(ARGS),
        )
        run.saver = Saver(None, 2, None, lambda: None, CPU)
        return run

    return make


def on(run, device):
    """The run, as if its tensors were on another device."""
    run.ranks = replace(run.ranks, device=device)
    return run


# compiled graphs


@pytest.mark.parametrize("evaluated_first", [True, False])
def test_graphs_are_static_whichever_is_compiled_first(
    tiny_run, evaluated_first, monkeypatch
):
    """A resumed run trains first, the run that it resumes has evaluated first."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda *a, **how: compile(*a, backend=backend, **how)
    )
    monkeypatch.setattr("keepgpt.device.can_compile", lambda *_: True)
    torch._dynamo.reset()
    run, signals = tiny_run(compile=True, eval_iters=3), SimpleNamespace(received=False)
    run.splits["train"].windows = run.splits["val"].windows = (
        4 + 4 + 1
    )  # the last batch is smaller
    works = [lambda: evaluate(run, signals), lambda: compute_gradient(run)]
    for work in works if evaluated_first else reversed(works):
        work()
    assert graphs == [False, False]  # an evaluation's and a step's
    with torch.no_grad():
        run.compiled_model(*run.splits["val"].rows(0, 3))
    assert graphs == [False] * 3


def test_a_smaller_last_batch_counts_in_an_evaluation(tiny_run):
    run = tiny_run(eval_iters=3)
    run.splits["train"].windows = run.splits["val"].windows = 9
    losses = evaluate(run, SimpleNamespace(received=False))
    x, y = run.splits["val"].rows(0, 9)
    with torch.no_grad(), run.autocast:
        assert losses["val_loss"] == pytest.approx(
            run.state.model(x, y).item(), rel=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_form_of_the_loss_has_the_same_bits(dtype, monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(40, 16).to(dtype), torch.randn(64, 16).to(dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(61, (40,))

    def results():
        loss = LinearCrossEntropy.apply(x, weight, targets, 61)
        return [loss, *torch.autograd.grad(loss, (x, weight))]

    eager = results()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all(torch.equal(a, b) for a, b in zip(eager, results()))


def test_the_compiled_loss_keeps_no_float32_logits(monkeypatch):
    # the generated code is enough: do not compile its kernels to machine code
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
    R = 48
    V = 192
    x = torch.randn(R, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, 16, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(V - 3, (R,))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: LinearCrossEntropy.apply(*args, V - 3), dynamic=False
    )
    _, codes = run_and_get_code(lambda: compiled(x, weight, targets).backward())
    buffers = [
        line
        for code in codes
        for line in code.splitlines()
        if f"({R}, {V})" in line and "empty_strided" in line
    ]
    assert buffers and not [line for line in buffers if "float32" in line], buffers


def test_deterministic_code_is_compiled_where_it_repeats(monkeypatch, capsys):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda _: True)  # triton
    for version, device, deterministic, can in (
        ("2.9.1+cu128", CUDA, True, False),
        ("2.9.1+cu128", CUDA, False, True),
        ("2.9.1+cu128", CPU, True, True),
        ("2.10.0+cu128", CUDA, True, True),
    ):
        monkeypatch.setattr(
            torch, "__version__", torch.torch_version.TorchVersion(version)
        )
        assert runtime.can_compile(device, deterministic) == can
        assert ("2.10" in capsys.readouterr().err) == (not can)


def test_deterministic_sums_over_gpus_leave_the_switch_out(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    for given, taken in ((None, "^NVLS,NVLSTree"), ("Ring", "Ring")):
        monkeypatch.delenv("NCCL_ALGO", raising=False)
        if given:
            monkeypatch.setenv("NCCL_ALGO", given)
        runtime.use_deterministic_algorithms()
        assert runtime.os.environ["NCCL_ALGO"] == taken


# numbers that are not finite


def test_float16_that_overflows_now_and_then_goes_on(tiny_run):
    run = tiny_run()
    run.state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    for i in range(8):
        losses = compute_gradient(run)
        if i % 2:
            run.state.model.transformer.wte.weight.grad[0, 0] = math.inf
        update(run, losses)
    assert run.is_good
    assert run.state.step == run.updates == 8


def test_mps_makes_no_update_that_is_not_finite(tiny_run):
    class Deaf(AdamW):  # as on MPS
        found_inf = property(lambda self: None, lambda self, value: None)

    run = on(tiny_run(), MPS)
    run.state.optimizer.__class__ = Deaf
    losses = gradient_on_cpu(run)
    before = copy.deepcopy(run.state.model.state_dict())
    run.state.model.transformer.wte.weight.grad[0, 0] = math.nan
    update(run, losses)
    assert not run.is_good
    assert run.updates == 0
    assert all(
        torch.equal(p, before[name]) for name, p in run.state.model.state_dict().items()
    )
    rewind(run)
    update(run, gradient_on_cpu(run))
    assert any(
        (p != before[name]).any() for name, p in run.state.model.state_dict().items()
    )


def gradient_on_cpu(run):
    """Its gradient, computed while the run is on the CPU."""
    device = run.ranks.device
    losses = compute_gradient(on(run, CPU))
    on(run, device)
    return losses


# copies


class Recorder(torch.Tensor):
    """A tensor that says whether it is on CUDA, and remembers how it was copied."""

    copies, cuda = [], False
    is_cuda = property(lambda self: type(self).cuda)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.copy_, torch.Tensor.to):
            cls.copies.append((kwargs or {}).get("non_blocking", False))
        if function == torch.Tensor.to:
            return args[0]
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("cuda", [True, False])
def test_only_copies_from_cuda_are_not_waited_for(tmp_path, cuda, monkeypatch):
    monkeypatch.setattr(Recorder, "cuda", cuda)
    monkeypatch.setattr(Recorder, "copies", [])
    saver = Saver(tmp_path, 2, None, lambda: None, CPU)
    saver.copies = {"/w": torch.empty(3)}
    saver._copy("/w", torch.ones(3).as_subclass(Recorder))
    assert Recorder.copies == [cuda]


@pytest.mark.parametrize("device", [CUDA, MPS, CPU])
def test_only_pinned_batches_are_not_waited_for(device, monkeypatch):
    monkeypatch.setattr(Recorder, "copies", [])
    rows = [torch.zeros(2, 3).as_subclass(Recorder) for _ in "xy"]
    loader = Loader(None, 2, 1, range(1), device)
    loader._read = lambda *_: rows
    loader.get_batch(0, 0)
    assert Recorder.copies == [device == CUDA] * 2


class Streams:
    """Replaces torch.cuda: logs each call, in order."""

    def __init__(self, monkeypatch):
        self.log, self.now = [], "current"
        for name, value in {
            "Stream": lambda device: self.stream("saver"),
            "current_stream": lambda: self.stream("current"),
            "stream": self.enter,
            "cudart": self.cudart,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        real = torch.Tensor.copy_
        monkeypatch.setattr(
            torch.Tensor,
            "copy_",
            lambda *a, **how: (self.log.append(f"copy on {self.now}"), real(*a, **how))[
                1
            ],
        )

    def stream(self, name):
        return SimpleNamespace(
            name=name,
            synchronize=lambda: self.log.append(f"host waits for {name}"),
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
        )

    def enter(self, stream):
        streams = self

        class Context:
            def __enter__(self):
                streams.now = stream.name

            def __exit__(self, *_):
                streams.now = "current"

        return Context()

    def cudart(self):
        self.log.append(f"cudart on {self.now}")
        return SimpleNamespace(
            cudaHostRegister=lambda at, size, flags: (
                self.log.append(f"pinned {size}") or 0
            )
        )


class WatchedDisk(Disk):
    def __init__(self, log):
        self.log = log

    def create(self, path):
        self.log.append("written")
        return super().create(path)


def test_a_snapshot_is_between_two_updates(tiny_run, tmp_path, monkeypatch):
    run = tiny_run()
    update(run, compute_gradient(run))
    cuda = Streams(monkeypatch)
    saver = Saver(tmp_path, 2, None, lambda: None, CUDA, WatchedDisk(cuda.log))
    bundle = make_bundle(run, 9.0)
    saver.save(bundle, best=False)
    saver.wait_for_copy()
    assert saver.wait()
    log = [entry for i, entry in enumerate(cuda.log) if entry != cuda.log[i - 1]]
    assert log[0] == "saver waits for current"  # the update before
    assert log[1] == "copy on saver" and "copy on current" not in log
    assert log.index("copy on saver") < log.index(
        "current waits for saver"
    )  # the update after
    assert log.index("host waits for saver") < log.index("written")
    saved = read_bundle(tmp_path / "ckpt.pt")
    assert all(
        torch.equal(saved["model"][name], p) for name, p in bundle["model"].items()
    )


def test_a_checkpoint_stores_no_more_than_its_tensors(whole):
    tensors = load(whole / "ckpt.pt")["model"].values()
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


# fake CUDA tensors


class SliceByOperators(TorchFunctionMode):
    """Python's own slicing asks for the real device. In a CUDA build of torch 2.6 so do an
    embedding, and a LayerNorm of a tensor that is not contiguous."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.embedding:
            idx, weight = args[:2]
            return weight.index_select(0, idx.flatten()).unflatten(0, idx.shape)
        if function is torch.nn.functional.layer_norm:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        if function not in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return function(*args, **(kwargs or {}))
        part, index, dim = (
            args[0],
            args[1] if isinstance(args[1], tuple) else (args[1],),
            0,
        )
        for i in index:
            if isinstance(i, int):
                part = torch.ops.aten.select(part, dim, i)
            else:
                part, dim = torch.ops.aten.slice(part, dim, i.start, i.stop), dim + 1
        if function is torch.Tensor.__getitem__:
            return part
        if isinstance(args[2], torch.Tensor):
            assert (
                args[2].device == part.device and args[2].expand(part.shape) is not None
            )
        return None


@pytest.fixture
def fake():
    """A model on a GPU that is not there: shapes, dtypes and devices are right, values are none.
    Without CUDA it can't have gradients."""
    # the choice among the other kernels asks torch 2.6's CUDA build for a real device
    math_alone = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode(), SliceByOperators(), torch.inference_mode(), math_alone:
        with torch.device("meta"):
            model = build_model(replace(ARGS, n_head=1, n_embd=64, block_size=32))
        for module in model.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = torch.nn.Parameter(
                    torch.empty(p.shape, dtype=torch.bfloat16, device=CUDA),
                    requires_grad=False,
                )
        yield model


def test_a_loss_and_its_gradients_on_cuda_mix_no_devices(fake):
    idx = torch.zeros(3, 32, dtype=torch.long, device=CUDA)
    assert fake.output_weight().shape == (64, 64)  # padded
    loss, saved = fake(idx, idx), []
    assert (
        loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.shape == ()
    )
    context = SimpleNamespace(
        needs_input_grad=[True], save_for_backward=lambda *t: saved.extend(t)
    )
    x = torch.empty(96, 64, dtype=torch.bfloat16, device=CUDA)
    LinearCrossEntropy.forward(context, x, fake.output_weight(), idx.flatten(), 61)
    assert [(t.device.type, t.shape) for t in saved] == [
        ("cuda", (96, 64)),
        ("cuda", (64, 64)),
    ]


def test_generation_on_cuda_mixes_no_devices(fake):
    fake.eval()
    idx, cache = torch.zeros(3, 5, dtype=torch.long, device=CUDA), fake.make_cache(3)
    assert {kv.device.type for kv in cache.layers} == {"cuda"}
    assert cache.layers[0].dtype == torch.bfloat16
    logits = fake(idx, cache=cache)
    plain = fake(idx[:, :1], cache=cache)
    for x in (logits, plain):
        assert (
            x.shape == (3, 1, 61)
            and x.device.type == "cuda"
            and x.dtype == torch.bfloat16
        )


def test_a_snapshot_of_cuda_tensors_is_on_the_host(fake, tmp_path, monkeypatch):
    Streams(monkeypatch)
    saver, live = Saver(tmp_path, 2, None, lambda: None, CUDA), fake.state_dict()
    saver.copies = {
        f"/{name}": torch.empty_like(p, device="cpu") for name, p in live.items()
    }
    bundle = map_tensors(saver._copy, live)
    assert bundle.keys() == live.keys()
    for name, p in bundle.items():
        assert (
            p.device == CPU
            and p.shape == live[name].shape
            and p.dtype == live[name].dtype
        )


# sampling and peaks


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_cudnn_s_attention_is_off_once_a_device_is_picked(name):
    torch.backends.cuda.enable_cudnn_sdp(True)
    runtime.pick_device(name)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_generation_leaves_the_choice_of_attention_alone():
    for enabled in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        for _ in generate(build_model(ARGS).eval(), [[1, 2]], 3):
            assert torch.backends.cuda.cudnn_sdp_enabled() == enabled


@pytest.mark.parametrize(
    "processor, onednn, aten, limit, fast",
    [
        (True, True, "AVX512", "", True),
        (True, True, "AVX512", "AVX512_CORE_AMX", True),
        (False, True, "AVX512", "", False),
        (True, False, "AVX512", "AVX2", False),
        (True, True, "AVX2", "", False),
        (True, True, "DEFAULT", "", False),
        (True, True, "AVX512", "avx512_core", False),
        (True, True, "AVX512", "AVX512_CORE_VNNI", False),
    ],
)
def test_auto_takes_bfloat16_only_where_pytorch_uses_it(
    monkeypatch, processor, onednn, aten, limit, fast
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: processor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: processor)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: aten)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    expected = torch.bfloat16 if fast else torch.float32
    assert runtime.pick_dtype("auto", CPU) == expected
    assert runtime.pick_dtype("bfloat16", CPU) == torch.bfloat16  # as asked for


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", 65),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_card_is_that_of_its_own_data_sheet(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert runtime.peak_flops(CUDA) == (tflops and tflops * 1e12)
