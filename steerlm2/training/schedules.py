"""Learning-rate schedules."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def is_due(step: int, every: int | None, last: int) -> bool:
    """Whether something is due after `step` steps.

    Args:
        every: it is due every so many steps, and after the last one; None: never.
        last: the last step.
    """
    return every is not None and (step % every == 0 or step == last)


def warmup_cosine_hold(
    optimizer: Optimizer,
    *,
    num_training_steps: int,
    warmup_steps: int = 0,
    constant_steps: int = 0,
    min_lr: float = 0.0,
) -> LambdaLR:
    """Linear warm-up to the optimizer's lr, cosine to `min_lr`, then `min_lr` for the last steps.

    With `min_lr` equal to the optimizer's lr the rate is constant after the warm-up. A run that is
    shorter than its parts (a trial with a small max_steps) has the warm-up first, then as much of
    the constant part as fits.

    Args:
        num_training_steps: optimizer steps of the whole run (the recipe passes `max_steps`).
        warmup_steps: steps of the warm-up; the first step has lr / (warmup_steps + 1).
        constant_steps: steps at the end that hold `min_lr`.

    Raises:
        ValueError: where `min_lr` is above the lr.
    """
    peak = max(group["lr"] for group in optimizer.param_groups)
    if min_lr > peak:
        raise ValueError(f"lr_scheduler.min_lr={min_lr} is above optimizer.lr={peak}")
    decay_steps = max(num_training_steps - warmup_steps - constant_steps, 0)
    floor = min_lr / peak if peak else 1.0

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min((step - warmup_steps) / decay_steps, 1.0) if decay_steps else 1.0
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
