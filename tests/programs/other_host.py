"""train.py whose rank 1 runs on another host. $DIFFERENCE names what differs there, a function of
this file, and $RANK_1 lists flags for rank 1 alone, in JSON."""

import json
import os
import sys

from run_train import run_train


def nothing():
    """Leave the host as it is."""


def round_as_an_old_cpu():
    """Round as on an older processor. PyTorch reads this when it first computes."""
    os.environ["ATEN_CPU_CAPABILITY"] = "default"
    os.environ["ONEDNN_MAX_CPU_ISA"] = "SSE41"


def report_other_code():
    """Report the files of another copy of keepGPT, at $COPY."""
    from keepgpt import ranks

    ranks.__file__ = f"{os.environ['COPY']}/keepgpt/ranks.py"


def report_other_torch():
    import torch

    torch.__version__ = torch.torch_version.TorchVersion("2.0.1")


def pick_another_dtype():
    """Turn round whether the processor has bfloat16, which `dtype=auto` asks."""
    from keepgpt import device

    has_fast_bfloat16 = device.has_fast_bfloat16
    device.has_fast_bfloat16 = lambda: not has_fast_bfloat16()


def use_two_threads():
    import torch

    torch.set_num_threads(2)


if os.environ["RANK"] == "1":
    globals()[os.environ["DIFFERENCE"]]()
    sys.argv += json.loads(os.environ["RANK_1"])
run_train()
