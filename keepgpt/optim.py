"""Parameter groups, AdamW and the learning-rate schedule."""
import inspect
import math

import torch

from keepgpt.config import TrainConfig


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019). PyTorch's own keeps torch.compile out of these methods,
    and loads all of it for that: half of the seconds that a start takes."""
    add_param_group, zero_grad, state_dict, load_state_dict = (
        inspect.unwrap(getattr(torch.optim.AdamW, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"))
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of the update that follows `step`: linear warm-up, then a cosine (Loshchilov and
    Hutter 2017)."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    span = max(1, config.lr_decay_iters - config.warmup_iters)
    progress = min(1.0, (step - config.warmup_iters) / span)
    return (config.min_lr
            + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2)



