"""The learning rate of every step: linear warm-up, cosine, hold.

Steps are counted from 0; `rates` are those that the optimizer's steps use.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from steerlm2.training.schedules import warmup_cosine_hold

LR = 8e-6


def scheduler(lr: float = LR, **settings: Any) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    return optimizer, warmup_cosine_hold(optimizer, **settings)


def rates(num_training_steps: int, lr: float = LR, **settings: Any) -> list[float]:
    optimizer, schedule = scheduler(lr, num_training_steps=num_training_steps, **settings)
    found = []
    for _ in range(num_training_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    """3 warm-up steps of a quarter each, then the peak: lr * 1/4, 2/4, 3/4, 4/4."""
    found = rates(10, warmup_steps=3)
    assert found[:4] == pytest.approx([LR / 4, LR / 2, LR * 3 / 4, LR], rel=1e-12)


def test_cosine_passes_the_mean_in_its_middle() -> None:
    """2 warm-up + 8 cosine + 3 hold: step 2 + 8/2 = 6 has (lr + min_lr) / 2."""
    found = rates(13, warmup_steps=2, constant_steps=3, min_lr=LR / 4)
    assert found[6] == pytest.approx(LR * 5 / 8, rel=1e-12)


def test_cosine_quarter() -> None:
    """A quarter of the way: min + (lr - min) (1 + cos(pi/4)) / 2."""
    found = rates(13, warmup_steps=2, constant_steps=3, min_lr=LR / 4)
    expected = LR / 4 + LR * 3 / 4 * (1 + math.cos(math.pi / 4)) / 2
    assert found[4] == pytest.approx(expected, rel=1e-12)


def test_last_constant_steps_hold_min_lr() -> None:
    """13 steps, the last 3 hold; the one before is still on the cosine."""
    found = rates(13, warmup_steps=2, constant_steps=3, min_lr=LR / 4)
    assert found[-3:] == pytest.approx([LR / 4] * 3, rel=1e-12)
    assert found[-4] > LR / 4 * 1.01


def test_hold_begins_right_after_the_warm_up_where_no_step_is_left_between() -> None:
    """2 warm-up + 4 hold = 6 steps: lr/3, 2 lr/3, then min_lr four times."""
    found = rates(6, warmup_steps=2, constant_steps=4, min_lr=LR / 4)
    assert found == pytest.approx([LR / 3, LR * 2 / 3] + [LR / 4] * 4, rel=1e-12)


def test_rate_never_falls_below_min_lr() -> None:
    """Also when the scheduler is stepped past the end of the run."""
    optimizer, schedule = scheduler(num_training_steps=4, min_lr=LR / 4)
    for _ in range(9):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 4, rel=1e-12)


def test_min_lr_equal_to_lr_is_constant() -> None:
    """The published setting of the 70B runs."""
    assert rates(7, lr=1e-7, min_lr=1e-7) == [1e-7] * 7


def test_without_settings_the_cosine_starts_at_the_peak() -> None:
    """4 steps: (1 + cos(k pi / 4)) / 2 of lr for k = 0..3."""
    expected = [LR * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates(4) == pytest.approx(expected, rel=1e-12)


def test_state_dict_continues_where_it_stopped() -> None:
    """5 of 10 steps, saved, loaded into a fresh scheduler: the sixth rate is the same."""
    settings = {"num_training_steps": 10, "warmup_steps": 2, "min_lr": 1e-6}
    optimizer, schedule = scheduler(**settings)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    resumed_optimizer, resumed = scheduler(**settings)
    resumed.load_state_dict(schedule.state_dict())
    for each in (optimizer, schedule, resumed_optimizer, resumed):
        each.step()
    assert resumed_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_run_shorter_than_its_parts_keeps_the_warm_up() -> None:
    """Of 10 steps 6 warm up; what is left holds min_lr, there is no room for the cosine."""
    found = rates(10, lr=1.0, warmup_steps=6, constant_steps=5, min_lr=0.1)
    assert found == pytest.approx([k / 7 for k in range(1, 7)] + [0.1] * 4)


def test_min_lr_above_lr_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr_scheduler\.min_lr=1.0 is above optimizer\.lr=0.5"):
        scheduler(lr=0.5, num_training_steps=10, min_lr=1.0)
