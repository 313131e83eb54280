"""The GPU code, as far as a machine without one can test it: compiled graphs, fake CUDA tensors,
the order of streams, and decisions of the host."""

import copy
import itertools
import math
import string
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load
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
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=16,
    vocab_size=61,
    bias=True,
    dropout=0.0,
)
# models this small are slower on two threads
torch.set_num_threads(1)
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
MPS = torch.device("mps")


@pytest.fixture
def tiny_run(tmp_path):
    """Return a function that makes a run on random tokens, without an out_dir."""

    # what set_up does for a real run, without files, ranks and checkpoints
    def make(**settings):
        sizes = vars(ARGS) | settings
        # it follows from the dataset
        del sizes["vocab_size"]
        config = TrainConfig(
            **sizes,
            batch_size=4,
            warmup_iters=0,
            gradient_accumulation_steps=1,
        )
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        tokens = rng.integers(ARGS.vocab_size, size=2**16, dtype=np.uint16)
        tokens.tofile(tmp_path / "train.bin")
        chars = string.printable[: ARGS.vocab_size]
        meta = {
            "dtype": "uint16",
            "tokenizer": {"kind": "char", "chars": chars},
            "vocab_size": ARGS.vocab_size,
            "tokens": {"train": len(tokens)},
        }

        # training reads shifted windows, an evaluation always the same ones
        shifted = Split(tmp_path, "train", meta, config.block_size, 0, True)
        fixed = Split(tmp_path, "train", meta, config.block_size, 0, False)
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


def pretend_device(run, device):
    """Let the run believe that its tensors are on another device."""
    run.ranks = replace(run.ranks, device=device)


def set_windows(run, count):
    """Shorten both splits of an evaluation to `count` windows."""
    run.splits["train"].windows = count
    run.splits["val"].windows = count


# compiled graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    "evaluated_first", [True, False], ids=["evaluation-first", "step-first"]
)
def test_graphs_are_static_whichever_is_compiled_first(
    tiny_run, evaluated_first, monkeypatch
):
    # a resumed run trains first, the run that it resumes has evaluated first
    has_symbolic_sizes = []
    compile = torch.compile

    # instead of making code: look at the shapes of a graph, then run it as it is
    def backend(graph, inputs):
        symbolic = any(isinstance(x, torch.SymInt) for x in inputs)
        has_symbolic_sizes.append(symbolic)
        return graph.forward

    def compile_with_backend(*args, **kwargs):
        return compile(*args, backend=backend, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_with_backend)
    monkeypatch.setattr("keepgpt.device.can_compile", lambda *_: True)
    torch._dynamo.reset()
    run = tiny_run(compile=True, eval_iters=3)
    # two batches of 4 and a smaller one of 1, whose size must not become a symbol
    set_windows(run, 9)
    signals = SimpleNamespace(received=False)

    if evaluated_first:
        evaluate(run, signals)
        compute_gradient(run)
    else:
        compute_gradient(run)
        evaluate(run, signals)
    # one graph of an evaluation, one of a step
    assert has_symbolic_sizes == [False, False]

    # another size makes a static graph again
    with torch.no_grad():
        run.compiled_model(*run.splits["val"].rows(0, 3))
    assert has_symbolic_sizes == [False] * 3


def test_a_smaller_last_batch_counts_in_an_evaluation(tiny_run):
    run = tiny_run(eval_iters=3)
    # two batches of 4 and one of 1: a mean over batches would count its row four times
    set_windows(run, 9)
    losses = evaluate(run, SimpleNamespace(received=False))
    x, y = run.splits["val"].rows(0, 9)
    with torch.no_grad(), run.autocast:
        expected = run.state.model(x, y).item()
    assert losses["val_loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
def test_the_compiled_form_of_the_loss_has_the_same_bits(dtype, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(40, 16).to(dtype).requires_grad_()
    weight = torch.randn(64, 16).to(dtype).requires_grad_()
    targets = torch.randint(61, (40,))

    def compute_loss_and_gradients():
        loss = LinearCrossEntropy.apply(x, weight, targets, 61)
        return [loss, *torch.autograd.grad(loss, (x, weight))]

    # what runs without a compiler: the loss by parts
    eager = compute_loss_and_gradients()
    # the plain formula that the compiler sees, run without compiling it
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for eager_tensor, tensor in zip(eager, compute_loss_and_gradients()):
        assert torch.equal(eager_tensor, tensor)


@pytest.mark.slow
def test_the_compiled_loss_keeps_no_float32_logits(monkeypatch):
    # the compiler takes a second to load: here, not for all tests
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.utils import run_and_get_code

    # the generated code is enough: do not compile its kernels to machine code
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
    R = 48
    V = 192
    x = torch.randn(R, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, 16, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(V - 3, (R,))
    torch._dynamo.reset()

    @torch.compile(dynamic=False)
    def compute_loss():
        return LinearCrossEntropy.apply(x, weight, targets, V - 3)

    _, codes = run_and_get_code(lambda: compute_loss().backward())
    # the lines that allocate a tensor of the size of the logits
    lines = "\n".join(codes).splitlines()
    buffers = [
        line for line in lines if f"({R}, {V})" in line and "empty_strided" in line
    ]
    assert buffers
    assert not any("float32" in line for line in buffers), buffers


def test_deterministic_code_is_compiled_where_it_repeats(monkeypatch, capsys):
    # as if triton were installed
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda _: True)
    # only on CUDA, and before 2.10, kernels are chosen by their times
    for version, device, deterministic, compiles in (
        ("2.9.1+cu128", CUDA, True, False),
        ("2.9.1+cu128", CUDA, False, True),
        ("2.9.1+cu128", CPU, True, True),
        ("2.10.0+cu128", CUDA, True, True),
    ):
        torch_version = torch.torch_version.TorchVersion(version)
        monkeypatch.setattr(torch, "__version__", torch_version)
        assert runtime.can_compile(device, deterministic) == compiles
        assert ("2.10" in capsys.readouterr().err) == (not compiles)


def test_deterministic_sums_over_gpus_leave_the_switch_out(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    # NVLS adds inside the switch, in varying order
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    runtime.use_deterministic_algorithms()
    assert runtime.os.environ["NCCL_ALGO"] == "^NVLS,NVLSTree"

    # the user's choice stays
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    runtime.use_deterministic_algorithms()
    assert runtime.os.environ["NCCL_ALGO"] == "Ring"


# numbers that are not finite


def test_float16_that_overflows_now_and_then_goes_on(tiny_run):
    run = tiny_run()
    # the scale grows after each good update and shrinks after each bad one
    run.state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    for i in range(8):
        losses = compute_gradient(run)
        # every second gradient overflows
        if i % 2:
            run.state.model.transformer.wte.weight.grad[0, 0] = math.inf
        update(run, losses)
    assert run.is_good
    assert run.state.step == 8
    assert run.updates == 8


def compute_gradient_on_cpu(run):
    """Return the losses of a step whose gradient is computed while the run is on the CPU."""
    device = run.ranks.device
    pretend_device(run, CPU)
    losses = compute_gradient(run)
    pretend_device(run, device)
    return losses


def test_mps_makes_no_update_that_is_not_finite(tiny_run):
    # on MPS, AdamW takes no notice of found_inf
    class DeafAdamW(AdamW):
        found_inf = property(lambda self: None, lambda self, value: None)

    run = tiny_run()
    pretend_device(run, MPS)
    run.state.optimizer.__class__ = DeafAdamW
    losses = compute_gradient_on_cpu(run)
    before = copy.deepcopy(run.state.model.state_dict())
    run.state.model.transformer.wte.weight.grad[0, 0] = math.nan
    update(run, losses)
    assert not run.is_good
    assert run.updates == 0
    for name, p in run.state.model.state_dict().items():
        assert torch.equal(p, before[name]), name

    # the step is made again, with a gradient that is finite
    rewind(run)
    update(run, compute_gradient_on_cpu(run))
    after = run.state.model.state_dict()
    assert any((after[name] != before[name]).any() for name in before)


# copies


class Recorder(torch.Tensor):
    """A tensor that says whether it is on CUDA, and records for each copy whether the host waits
    for it."""

    copies = []
    cuda = False
    is_cuda = property(lambda self: type(self).cuda)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.Tensor.copy_, torch.Tensor.to):
            cls.copies.append(kwargs.get("non_blocking", False))
        # the device may be missing on this machine
        if function == torch.Tensor.to:
            return args[0]
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("cuda", [True, False], ids=["cuda", "cpu"])
def test_only_copies_from_cuda_are_not_waited_for(tmp_path, cuda, monkeypatch):
    monkeypatch.setattr(Recorder, "cuda", cuda)
    monkeypatch.setattr(Recorder, "copies", [])
    saver = Saver(tmp_path, 2, None, lambda: None, CPU)
    saver.copies = {"/w": torch.empty(3)}
    saver._copy("/w", torch.ones(3).as_subclass(Recorder))
    assert Recorder.copies == [cuda]


@pytest.mark.parametrize("device", [CUDA, MPS, CPU], ids=str)
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
        self.log = []
        self.now = "current"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream("saver"))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda: self.stream("current")
        )
        monkeypatch.setattr(torch.cuda, "stream", self.enter)
        monkeypatch.setattr(torch.cuda, "cudart", self.cudart)
        copy_ = torch.Tensor.copy_

        def record_copy(*args, **kwargs):
            self.log.append(f"copy on {self.now}")
            return copy_(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "copy_", record_copy)

    def stream(self, name):
        """Return a stream that logs who waits for whom."""
        return SimpleNamespace(
            name=name,
            synchronize=lambda: self.log.append(f"host waits for {name}"),
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
        )

    @contextmanager
    def enter(self, stream):
        """Make a stream the one on which copies are made."""
        self.now = stream.name
        yield
        self.now = "current"

    def cudart(self):
        """Return CUDA's runtime, whose only function logs the size of a buffer."""
        self.log.append(f"cudart on {self.now}")

        def register(address, size, flags):
            self.log.append(f"pinned {size}")
            return 0

        return SimpleNamespace(cudaHostRegister=register)


class WatchedDisk(Disk):
    """A disk that logs when a file is written."""

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

    # there is a copy for each tensor: keep the first of equal entries in a row
    log = [entry for entry, _ in itertools.groupby(cuda.log)]
    # the copy waits for the update before it
    assert log[0] == "saver waits for current"
    assert log[1] == "copy on saver"
    assert "copy on current" not in log
    # the update after it waits for the copy
    assert log.index("copy on saver") < log.index("current waits for saver")
    assert log.index("host waits for saver") < log.index("written")

    saved = read_bundle(tmp_path / "ckpt.pt")
    for name, p in bundle["model"].items():
        assert torch.equal(saved["model"][name], p), name


def test_a_checkpoint_stores_no_more_than_its_tensors(whole):
    tensors = load(whole / "ckpt.pt")["model"].values()
    # a slice of a larger tensor would be saved with all of it
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


# fake CUDA tensors


class SliceByOperators(TorchFunctionMode):
    """Replaces functions that ask for the real device.

    Python's slicing does. In a CUDA build of torch 2.6 so do an embedding, and a LayerNorm of a
    tensor that is not contiguous.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.embedding:
            idx, weight = args[:2]
            return weight.index_select(0, idx.flatten()).unflatten(0, idx.shape)
        if function is torch.nn.functional.layer_norm:
            x = args[0].clone(memory_format=torch.contiguous_format)
            args = (x, *args[1:])
        if function is torch.Tensor.__getitem__:
            return slice_tensor(*args)
        if function is torch.Tensor.__setitem__:
            tensor, index, value = args
            part = slice_tensor(tensor, index)
            # nothing to store, but the value must fit
            if isinstance(value, torch.Tensor):
                assert value.device == part.device
                assert value.expand(part.shape) is not None
            return None
        return function(*args, **(kwargs or {}))


def slice_tensor(tensor, index):
    """Return tensor[index], for integers and slices."""
    if not isinstance(index, tuple):
        index = (index,)
    dim = 0
    for i in index:
        # an integer removes its dimension
        if isinstance(i, int):
            tensor = torch.ops.aten.select(tensor, dim, i)
        else:
            tensor = torch.ops.aten.slice(tensor, dim, i.start, i.stop)
            dim += 1
    return tensor


@pytest.fixture
def fake_model():
    """A model on a GPU that this machine lacks: shapes, dtypes and devices are right, values are
    missing. Without CUDA it can't have gradients."""
    # the choice among the other kernels asks torch 2.6's CUDA build for a real device
    math_alone = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode(), SliceByOperators(), torch.inference_mode(), math_alone:
        with torch.device("meta"):
            model = build_model(replace(ARGS, n_head=1, n_embd=64, block_size=32))
        for module in model.modules():
            for name, p in module._parameters.items():
                fake = torch.empty(p.shape, dtype=torch.bfloat16, device=CUDA)
                parameter = torch.nn.Parameter(fake, requires_grad=False)
                module._parameters[name] = parameter
        yield model


def assert_tensor(tensor, shape, dtype=torch.bfloat16, device="cuda"):
    """Raise AssertionError unless a tensor has this shape, dtype and device."""
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.device.type == device


def test_a_loss_and_its_gradients_on_cuda_mix_no_devices(fake_model):
    idx = torch.zeros(3, 32, dtype=torch.long, device=CUDA)
    # 61 rows padded to a multiple of 64
    weight = fake_model.output_weight()
    assert weight.shape == (64, 64)
    assert_tensor(fake_model(idx, idx), (), torch.float32)

    # a context that records the gradients, which the forward pass computes
    gradients = []
    context = SimpleNamespace(
        needs_input_grad=[True],
        save_for_backward=lambda *tensors: gradients.extend(tensors),
    )
    x = torch.empty(96, 64, dtype=torch.bfloat16, device=CUDA)
    LinearCrossEntropy.forward(context, x, weight, idx.flatten(), 61)
    dx, dweight = gradients
    assert dx.device.type == "cuda"
    assert dx.shape == (96, 64)
    assert dweight.device.type == "cuda"
    assert dweight.shape == (64, 64)


def test_generation_on_cuda_mixes_no_devices(fake_model):
    fake_model.eval()
    idx = torch.zeros(3, 5, dtype=torch.long, device=CUDA)
    cache = fake_model.make_cache(3)
    assert {kv.device.type for kv in cache.layers} == {"cuda"}
    assert cache.layers[0].dtype == torch.bfloat16
    # a prompt, then one token after it
    assert_tensor(fake_model(idx, cache=cache), (3, 1, 61))
    assert_tensor(fake_model(idx[:, :1], cache=cache), (3, 1, 61))


def test_a_snapshot_of_cuda_tensors_is_on_the_host(fake_model, tmp_path, monkeypatch):
    Streams(monkeypatch)
    saver = Saver(tmp_path, 2, None, lambda: None, CUDA)
    state = fake_model.state_dict()
    # host memory that is not pinned: this machine has no CUDA to pin it
    saver.copies = {
        f"/{name}": torch.empty_like(p, device="cpu") for name, p in state.items()
    }
    snapshot = map_tensors(saver._copy, state)
    assert snapshot.keys() == state.keys()
    for name, p in snapshot.items():
        assert_tensor(p, state[name].shape, state[name].dtype, "cpu")


# sampling and peaks


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_cudnn_s_attention_is_off_once_a_device_is_picked(name):
    torch.backends.cuda.enable_cudnn_sdp(True)
    runtime.pick_device(name)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_generation_leaves_the_choice_of_attention_alone():
    # a program that imports model.py may want either
    for enabled in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        model = build_model(ARGS).eval()
        for _ in generate(model, [[1, 2]], 3):
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
    ids=[
        "all",
        "limit-amx",
        "old-processor",
        "old-onednn",
        "avx2",
        "no-vectors",
        "limit-avx512",
        "limit-vnni",
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
    # a dtype that is asked for is used anywhere
    assert runtime.pick_dtype("bfloat16", CPU) == torch.bfloat16


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
    expected = tflops * 1e12 if tflops else None
    assert runtime.peak_flops(CUDA) == expected
