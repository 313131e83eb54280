"""Device, dtype, compiler, peak speeds, and random number generators."""

import importlib.util
import os
import random
import shutil
import sys

import numpy as np
import torch

from keepgpt.config import TrainConfig
from keepgpt.errors import UserError, warn

# dense bfloat16 (float16 before Ampere) from the data sheets; the longest name that the device's
# name contains counts
PEAK_TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "H200": 989,
    "H200 NVL": 835,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "A10G": 70,
    "L40": 181,
    "L40S": 362,
    "L4": 121,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}


def pick_device(name: str) -> torch.device:
    """Return the device called `name`, or the best one for auto. On CUDA each rank of a host gets
    its own. Raises UserError."""
    # cuDNN's attention has given NaN gradients on H100 and H200 (pytorch issue 139298). When
    # sampling, it makes a plan for each length, which takes tens of milliseconds.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    # PyTorch reports a device that is absent only when it is used
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        # such as meta
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"no device {name!r} on this machine. Try: --device=auto"
        ) from None
    return device


def use_deterministic_algorithms() -> None:
    """Use only algorithms whose results are bit-identical each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # NVLS adds in varying order
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    torch.use_deterministic_algorithms(True)
    # a help to find reads of memory that nothing has written, which takes time
    torch.utils.deterministic.fill_uninitialized_memory = False


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products: the one called `name`, or the fastest safe one for
    auto."""
    if name == "float16" and device.type != "cuda":
        name = "auto"
        warn(f"float16 needs CUDA; using {pick_dtype(name, device)}")
    if name != "auto":
        return getattr(torch, name)
    fastest = torch.float32
    if device.type == "cuda":
        # from Ampere on, GPUs compute in bfloat16
        is_ampere = torch.cuda.get_device_capability()[0] >= 8
        fastest = torch.bfloat16 if is_ampere else torch.float16
    elif device.type == "cpu" and has_fast_bfloat16():
        fastest = torch.bfloat16
    return fastest


def has_fast_bfloat16() -> bool:
    """Return True if the processor has instructions for bfloat16 and PyTorch uses them: the
    environment can limit oneDNN, which multiplies matrices, and ATen, which does the rest."""
    if not (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    ):
        return False
    # oneDNN says it supports bfloat16 also where these limits make it convert to float32
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if os.environ.get(name, "").lower() in ("avx512_core", "avx512_core_vnni"):
            return False
    uses_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return uses_avx512 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def can_compile(device: torch.device, deterministic: bool = False) -> bool:
    """Return True if torch.compile works on this machine, else print a note."""
    cuda = device.type == "cuda"
    # Inductor makes C++ for a CPU, and Triton needs a C compiler for its launchers
    compilers = [os.environ.get("CC", "cc"), "gcc", "clang"]
    if not cuda:
        default = "clang++" if sys.platform == "darwin" else "g++"
        compilers = [os.environ.get("CXX", default)]
    needs = ""
    # older versions choose kernels by their times
    if cuda and deterministic and torch.__version__ < (2, 10):
        needs = "torch 2.10 or newer for deterministic=True"
    elif cuda and importlib.util.find_spec("triton") is None:
        needs = "the package triton"
    elif not any(shutil.which(compiler) for compiler in compilers):
        needs = f"a compiler ({compilers[-1]})"
    if needs:
        warn(f"torch.compile needs {needs}; continuing without it")
    return not needs


def should_compile(config: TrainConfig, device: torch.device) -> bool:
    """Return True if the model is to be compiled, and can be on this machine."""
    wanted = config.compile
    # compiling for a CPU takes a minute
    if wanted == "auto":
        wanted = device.type == "cuda"
    return wanted and can_compile(device, config.deterministic)


def device_name(device: torch.device) -> str:
    """Return the device's type, or on CUDA its model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak in FLOP/s, or None if it is not known."""
    # the longest, as in "H100 PCIe"
    name = device_name(device)
    gpu = max((gpu for gpu in PEAK_TFLOPS if gpu in name), key=len, default=None)
    return 1e12 * PEAK_TFLOPS[gpu] if gpu else None


def seed_generator(seed: int, device: torch.device) -> None:
    """Seed the generator of the device's random numbers. torch.manual_seed seeds those of absent
    devices too, which takes 0.4 ms."""
    # GPUs draw from generators of their own; code on the host may draw, too
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    torch.default_generator.manual_seed(seed)


def rng_state(device: torch.device) -> dict:
    """Return the states of this process's random number generators, as plain values."""
    # the array as a list: a checkpoint holds plain values and tensors
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    # training draws from PyTorch's alone; code that a user adds may draw from any
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng(state: dict, device: torch.device) -> None:
    """Restore the states that `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
