"""AdamW, Muon, and their schedules, which are functions of the step: no schedule is saved.

Letters for shapes: N matrices of R rows and C columns.
"""
import inspect
import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from keepgpt.config import TrainConfig
from keepgpt.errors import UserError

# Newton-Schulz's polynomial a x + b x^3 + c x^5, and how often to apply it (Jordan et al. 2024)
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# Muon's momentum rises from the first number to config.muon_momentum in 300 steps: in
# modded-nanogpt's records that lowers the loss by 0.013
FIRST_MOMENTUM, MOMENTUM_WARMUP = 0.85, 300


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) without PyTorch's wrappers that keep torch.compile out of
    its methods: they import torch._dynamo, one second of CPU time at each start."""
    add_param_group, zero_grad, state_dict, load_state_dict = (
        inspect.unwrap(getattr(torch.optim.AdamW, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"))
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(AdamW):
    """Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") for the
    parameter groups that have a `momentum`, AdamW for the others.

    The momentum of each matrix's gradient is orthogonalized, so its singular values lie near 1, and
    multiplied by lr * max(1, R / C)^0.5. Then one `lr` suits all widths (Yang, Simon and Bernstein
    2023, "A Spectral Condition for Feature Learning"). Like the fused AdamW, it changes nothing if
    `found_inf`, which GradScaler or the training loop may set, is 1. `torch.optim.Muon` computes
    the same one matrix at a time.
    """
    __setstate__ = torch.optim.Optimizer.__setstate__  # Adam's wants moments of all parameters

    def __init__(self, groups: list[dict], dtype: torch.dtype, **defaults: object) -> None:
        """Expect `momentum` in a Muon group, and `parts`: how many matrices lie below one another
        in each of its parameters. Newton-Schulz computes in `dtype`."""
        super().__init__(groups, **defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters. Frees the gradients of the matrices."""
        skip = self.found_inf > 0 if getattr(self, "found_inf", None) is not None else None
        for group in self.param_groups:
            if "momentum" in group:
                self.update_matrices(group, skip)
                for p in group["params"]:
                    p.grad = None  # AdamW skips a parameter without a gradient
        super().step(closure)

    def update_matrices(self, group: dict, skip: Tensor | None = None) -> None:
        """Update the parameters of a Muon group, all matrices of one shape at a time, unless the
        tensor `skip` is True."""
        lr, momentum, shapes = group["lr"], group["momentum"], defaultdict(list)
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            matrices = (t.chunk(group["parts"]) for t in (p, p.grad, state["momentum_buffer"]))
            for triple in zip(*matrices):
                shapes[triple[0].shape].append(triple)
        for (R, C), triples in shapes.items():
            matrices, grads, means = zip(*triples)
            grad, old_mean = torch.stack(grads), torch.stack(means)  # (N, R, C)
            mean = interpolate(old_mean, grad, 1 - momentum)
            nesterov = interpolate(grad, mean, momentum, out=grad)
            update = orthogonalize(nesterov, self.dtype)
            update = update.mul_(-lr * max(1, R / C) ** 0.5)
            decay = 1 - lr * group["weight_decay"]
            if skip is not None:
                # adding -0 changes no bit, adding 0 would change -0
                mean, update = mean.where(~skip, old_mean), update.where(~skip, -0.0)
                decay = torch.where(skip, 1.0, decay)
            torch._foreach_copy_(means, mean.unbind())
            torch._foreach_mul_(matrices, decay)
            torch._foreach_add_(matrices, update.unbind())


def interpolate(a: Tensor, b: Tensor, weight: float, out: Tensor | None = None) -> Tensor:
    """Return a + weight * (b - a), in `out` if given."""
    if a.device.type == "mps":  # lerp has returned wrong values there (pytorch issue 196067)
        return torch.add(a * (1 - weight), b, alpha=weight, out=out)
    return torch.lerp(a, b, weight, out=out)


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return nearly U V^T, in x's dtype, for each matrix U S V^T of `x` (N, R, C). Newton-Schulz's
    iteration (Jordan et al. 2024), in `dtype`, brings the singular values to within 0.3 or so of 1
    by an odd polynomial."""
    a, b, c = COEFFICIENTS
    tall = x.size(1) > x.size(2)
    y = x.mT if tall else x  # (N, R, C), R <= C: the products below are R wide
    y = (y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        square = y @ y.mT  # (N, R, R)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a)  # (N, R, C)
    return (y.mT if tall else y).to(x.dtype)


def make_optimizer(model: nn.Module, config: TrainConfig,
                   dtype: torch.dtype = torch.float32) -> AdamW:
    """Return the optimizer of all parameters of `model`, whose matrix products are in `dtype`.
    Muon takes the matrices of the blocks, AdamW all else. Biases and norms do not decay. Raises
    UserError."""
    named = dict(model.named_parameters())  # a shared parameter occurs once
    # the blocks' modules are numbered: transformer.h.0.attn, model.layers.0.self_attn
    matrices = {name: p for name, p in named.items() if config.optimizer == "muon"
                and p.dim() == 2 and any(part.isdecimal() for part in name.split("."))}
    rest = [p for name, p in named.items() if name not in matrices]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "fused": True}
    if config.optimizer == "adamw":
        return AdamW(groups, **settings)
    if not config.learning_rate:
        raise UserError("optimizer=muon: expected learning_rate above 0, got 0: min_lr / "
                        "learning_rate is where both rates end. Try: --learning_rate=1e-3")
    for parts in (3, 1):  # q, k and v are three matrices in one parameter
        group = [p for name, p in matrices.items() if ("c_attn" in name) == (parts == 3)]
        if group:
            groups.append({"params": group, "parts": parts, "lr": config.muon_lr,
                           "momentum": config.muon_momentum, "weight_decay": config.weight_decay})
    return Muon(groups, dtype if dtype == torch.bfloat16 else torch.float32, **settings)


def set_rates(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> None:
    """Set each group's learning rate, and Muon's momentum, for the update that follows `step`. Muon
    has the same fraction of muon_lr as AdamW has of learning_rate."""
    for group in optimizer.param_groups:
        group["lr"] = get_lr(step, config)
        if "momentum" in group:
            group["lr"] *= config.muon_lr / config.learning_rate
            first = min(FIRST_MOMENTUM, config.muon_momentum)
            rise = min(1.0, step / MOMENTUM_WARMUP)
            group["momentum"] = first + (config.muon_momentum - first) * rise


def get_lr(step: int, config: TrainConfig) -> float:
    """Return the learning rate of the update that follows `step`: linear warm-up, then a cosine
    (Loshchilov and Hutter 2017), or constant and linear over the last decay_fraction of
    lr_decay_iters, both down to min_lr, or constant."""
    highest, lowest, warmup = config.learning_rate, config.min_lr, config.warmup_iters
    if config.decay_lr and step < warmup:
        return highest * (step + 1) / (warmup + 1)
    if not config.decays:
        return highest
    start = config.decay_start
    progress = min(1.0, max(0.0, (step - start) / max(1, config.lr_decay_iters - start)))
    if config.lr_schedule == "linear":
        return highest + (lowest - highest) * progress
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * progress)) / 2
