"""AdamW, Muon, and the schedule of their rates, a function of the step: no schedule is saved.

The contract of an optimizer, which tests/test_optim.py checks for each name in OPTIMIZERS:

- It is a torch.optim.Optimizer whose groups hold every parameter of the model exactly once.
- Each group has its own "peak_lr"; `set_rates` multiplies it by `get_lr_factor(step)`.
- `step()` leaves weights and state as they are if the tensor `found_inf` is 1: on CUDA the
  host does not know yet that a gradient is not finite. `found_inf` may be absent or None.
- Its state is a nest of tensors and plain values, as a checkpoint is loaded with weights_only=True.
- What training changes is in its state, not in a group: a resume takes the groups of its command.

To add one, write a function like `make_adamw(model, config, dtype)` and name it in OPTIMIZERS.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from keepgpt.config import TrainConfig
from keepgpt.errors import UserError

# Newton-Schulz's polynomial a x + b x^3 + c x^5, and how often to apply it (Jordan et al. 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Muon's momentum rises from the first number to config.muon_momentum in 300 steps: in
# modded-nanogpt's records that lowers the loss by 0.013
FIRST_MOMENTUM = 0.85
MOMENTUM_WARMUP = 300


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) without PyTorch's wrappers that keep torch.compile out of
    its methods: they import torch._dynamo, one second of CPU time at each start."""

    # the same methods, without the wrappers
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(AdamW):
    """Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") for the
    parameter groups that have `parts`, AdamW for the others.

    The momentum of each matrix's gradient is orthogonalized, so its singular values lie near 1, and
    multiplied by lr * max(1, R / C)^0.5, for R rows and C columns. Then one `lr` suits all widths
    (Yang, Simon and Bernstein 2023, "A Spectral Condition for Feature Learning").
    `torch.optim.Muon` computes the same one matrix at a time.
    """

    # AdamW's expects moments of all parameters
    __setstate__ = torch.optim.Optimizer.__setstate__

    def __init__(
        self, groups: list[dict], dtype: torch.dtype, **defaults: object
    ) -> None:
        """Expect `momentum` in a Muon group, and `parts`: how many matrices lie below one another
        in each of its parameters. Newton-Schulz computes in `dtype`."""
        super().__init__(groups, **defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters. Frees the gradients of the matrices."""
        found_inf = getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf > 0
        for group in self.param_groups:
            if "parts" not in group:
                continue
            self.update_matrices(group, skip)
            # AdamW skips a parameter without a gradient
            for p in group["params"]:
                p.grad = None
        super().step(closure)

    def update_matrices(self, group: dict, skip: Tensor | None = None) -> None:
        """Update the parameters of a Muon group, all matrices of one shape at a time, unless the
        tensor `skip` is True."""
        # shape -> (matrix, gradient, momentum) of each matrix
        by_shape = defaultdict(list)
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            tensors = (p, p.grad, state["momentum_buffer"])
            matrices = [tensor.chunk(group["parts"]) for tensor in tensors]
            for triple in zip(*matrices):
                by_shape[triple[0].shape].append(triple)
        # one large product is faster than many small ones
        for triples in by_shape.values():
            matrices, grads, means = zip(*triples)
            update_equal_shapes(matrices, grads, means, group, self.dtype, skip)


def update_equal_shapes(
    matrices: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    means: tuple[Tensor, ...],
    group: dict,
    dtype: torch.dtype,
    skip: Tensor | None,
) -> None:
    """Update N matrices (R, C) and the `means` of their gradients in place by Muon's rule, unless
    the tensor `skip` is True. Newton-Schulz computes in `dtype`."""
    R, C = matrices[0].shape
    lr = group["lr"]
    momentum = group["momentum"]

    # Nesterov's momentum
    grad = torch.stack(grads)  # (N, R, C)
    old_mean = torch.stack(means)  # (N, R, C)
    mean = interpolate(old_mean, grad, 1 - momentum)
    nesterov = interpolate(grad, mean, momentum, out=grad)

    # orthogonalized; a tall matrix takes a larger step
    update = orthogonalize(nesterov, dtype)
    update = update.mul_(-lr * max(1, R / C) ** 0.5)
    decay = 1 - lr * group["weight_decay"]

    # on CUDA the host does not know `skip`: then write the values of before
    if skip is not None:
        mean = mean.where(~skip, old_mean)
        # adding -0 changes no bit, adding 0 would change -0
        update = update.where(~skip, -0.0)
        decay = torch.where(skip, 1.0, decay)
    torch._foreach_copy_(means, mean.unbind())
    torch._foreach_mul_(matrices, decay)
    torch._foreach_add_(matrices, update.unbind())


def interpolate(
    a: Tensor, b: Tensor, weight: float, out: Tensor | None = None
) -> Tensor:
    """Return a + weight * (b - a), stored in `out` unless that is None."""
    # on MPS, lerp has returned wrong values (PyTorch issue 196067)
    if a.device.type == "mps":
        return torch.add(a * (1 - weight), b, alpha=weight, out=out)
    return torch.lerp(a, b, weight, out=out)


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return nearly U V^T, in x's dtype, for each matrix U S V^T of `x` (N, R, C). Newton-Schulz's
    iteration (Jordan et al. 2024), in `dtype`, brings the singular values to within 0.3 or so of 1
    by an odd polynomial."""
    a, b, c = COEFFICIENTS
    # the products below are R wide: let R be the smaller size
    is_tall = x.size(1) > x.size(2)
    y = x.mT if is_tall else x  # (N, R, C), R <= C

    # the iteration needs singular values below 1
    norm = torch.linalg.matrix_norm(y, keepdim=True)  # (N, 1, 1)
    y = (y / norm.clamp(min=1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        # a y + b (y y^T) y + c (y y^T)^2 y
        square = y @ y.mT  # (N, R, R)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)  # (N, R, R)
        y = torch.baddbmm(y, polynomial, y, beta=a)  # (N, R, C)
    y = y.mT if is_tall else y
    return y.to(x.dtype)


def make_adamw(model: nn.Module, config: TrainConfig, dtype: torch.dtype) -> AdamW:
    """Return AdamW for all parameters. Biases and norms do not decay."""
    groups = group_by_decay(model.parameters(), config)
    return AdamW(groups, betas=(config.beta1, config.beta2), fused=True)


def make_muon(model: nn.Module, config: TrainConfig, dtype: torch.dtype) -> Muon:
    """Return Muon for the matrices of the blocks and AdamW for all else."""
    # AdamW for embeddings, the output layer, norms and biases
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if name.startswith(f"{model.layers}.") and p.dim() == 2
    }
    others = [p for name, p in model.named_parameters() if name not in matrices]
    groups = group_by_decay(others, config)

    # a group for each number of matrices in a parameter; the larger number first, as in
    # checkpoints, whose state follows this order
    by_parts = defaultdict(list)
    for name, p in matrices.items():
        parts = [n for ending, n in model.stacked.items() if name.endswith(ending)]
        by_parts[parts[0] if parts else 1].append(p)
    for parts in sorted(by_parts, reverse=True):
        groups.append(
            {
                "params": by_parts[parts],
                "parts": parts,
                "peak_lr": config.muon_lr,
                "momentum": config.muon_momentum,
                "weight_decay": config.weight_decay,
            }
        )
    # in float16 the iteration could overflow
    iteration_dtype = dtype if dtype == torch.bfloat16 else torch.float32
    betas = (config.beta1, config.beta2)
    return Muon(groups, iteration_dtype, betas=betas, fused=True)


def group_by_decay(parameters: Iterable[Tensor], config: TrainConfig) -> list[dict]:
    """Return two groups for AdamW: matrices, which decay, and vectors, which do not."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    peak_lr = config.learning_rate
    return [
        {"params": matrices, "weight_decay": config.weight_decay, "peak_lr": peak_lr},
        {"params": vectors, "weight_decay": 0.0, "peak_lr": peak_lr},
    ]


OPTIMIZERS = {"adamw": make_adamw, "muon": make_muon}


def make_optimizer(
    model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters of `model`, whose matrix products are in `dtype`.
    Raises UserError for an unknown name of an optimizer or a schedule."""
    if config.optimizer not in OPTIMIZERS:
        raise UserError(
            f"optimizer: expected {' or '.join(OPTIMIZERS)}, got {config.optimizer!r}"
        )
    optimizer = OPTIMIZERS[config.optimizer](model, config, dtype)
    # each parameter is in one group: one that is in none would silently not be trained
    covered = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())
    set_rates(optimizer, 0, config)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> None:
    """Set each group's learning rate, and Muon's momentum, for the update that follows `step`."""
    factor = get_lr_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        # Muon's; that of another optimizer is its own business
        if "parts" in group:
            first = min(FIRST_MOMENTUM, config.muon_momentum)
            rise = min(1.0, step / MOMENTUM_WARMUP)
            group["momentum"] = first + (config.muon_momentum - first) * rise


# how far the learning rate has fallen, from 0 to 1, while `progress` goes from 0 to 1
SCHEDULES = {
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: progress,
    "constant": lambda progress: 0.0,
}


def get_lr_factor(step: int, config: TrainConfig) -> float:
    """Return the share of the peak learning rates that the update after `step` has: a linear
    warm-up, then lr_schedule (cosine: Loshchilov and Hutter 2017), down to min_lr /
    learning_rate at lr_decay_iters. Raises UserError for an unknown schedule."""
    if config.lr_schedule not in SCHEDULES:
        raise UserError(
            f"lr_schedule: expected {' or '.join(SCHEDULES)}, got "
            f"{config.lr_schedule!r}"
        )
    if not config.decay_lr:
        return 1.0
    # the warm-up starts above 0, which would waste a step
    if step < config.warmup_iters:
        return (step + 1) / (config.warmup_iters + 1)

    # then the fall, between decay_start and lr_decay_iters
    steps = max(1, config.lr_decay_iters - config.decay_start)
    progress = min(1.0, max(0.0, (step - config.decay_start) / steps))
    least = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    fall = SCHEDULES[config.lr_schedule](progress)
    return (1 - fall) + least * fall
