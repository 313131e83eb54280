"""Parameter groups, AdamW and the learning-rate schedule."""
import inspect
import math

import torch
from torch import nn

from keepgpt.config import TrainConfig


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) without PyTorch's wrappers that keep torch.compile out of
    its methods: they import torch._dynamo, one second of CPU time at each start."""
    add_param_group, zero_grad, state_dict, load_state_dict = (
        inspect.unwrap(getattr(torch.optim.AdamW, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"))
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Return AdamW over all parameters of `model`, with weight decay for matrices and embeddings
    only, not for biases and norms."""
    parameters = list(model.parameters())  # a shared parameter occurs once
    decayed = [p for p in parameters if p.dim() >= 2]
    not_decayed = [p for p in parameters if p.dim() < 2]
    assert len(decayed) + len(not_decayed) == len(parameters), "the groups must cover the model"
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": not_decayed, "weight_decay": 0.0}]
    return AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def get_lr(step: int, config: TrainConfig) -> float:
    """Return the learning rate of the update that follows `step`: linear warm-up, then a cosine
    decay to min_lr (Loshchilov and Hutter 2017)."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    span = max(1, config.lr_decay_iters - config.warmup_iters)
    progress = min(1.0, (step - config.warmup_iters) / span)
    return (config.min_lr
            + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2)
