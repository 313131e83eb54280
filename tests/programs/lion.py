"""An optimizer that a user adds: Lion. As a program it is train.py, or tools.crash if the first
argument is `kill`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

from keepgpt import optim


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


if __name__ == "__main__":
    from run_train import run_train

    optim.OPTIMIZERS["lion"] = make_lion
    if sys.argv[1] != "kill":
        run_train()

    from tools.crash import __main__ as crash
    from tools.crash import common

    common.RUN["optimizer"] = "lion"
    crash.run_tool(common.CrashConfig, "", crash.main)
