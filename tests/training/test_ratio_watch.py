"""The warning about m, the mean of Q_theta / Q' over the samples."""

from __future__ import annotations

import pytest

from steerlm2.training.ratio_watch import STEPS, RatioWatch


def warnings(
    ratios: list[float],
    baseline: float = 0.5,
    validation: float | None = None,
    unlike_q: str = "",
) -> list[str]:
    watch = RatioWatch(baseline, unlike_q)
    found = []
    for ratio in ratios:
        if validation is not None:
            watch.validated(validation)
        if (warning := watch.trained(ratio)) is not None:
            found.append(warning)
    return found


@pytest.mark.parametrize("ratio", [0.72, 1.0, 1.38])
def test_a_ratio_near_one_is_no_news(ratio: float) -> None:
    assert warnings([ratio] * 100) == []


def test_single_steps_far_off_are_no_news() -> None:
    assert warnings([1.0, 30.0, 1.0, 0.01, 1.0] * 20) == []


def test_a_few_steps_are_no_news() -> None:
    assert warnings([0.3] * (STEPS - 1)) == []


@pytest.mark.parametrize(
    ("later", "baseline", "validation", "cause"),
    [
        (0.5, 1.0, None, "leaks to strings that nobody sampled: lower loss.baseline"),
        (0.5, 0.0, None, "leaks to strings that nobody sampled: lower lr"),
        (1.8, 0.0, 1.1, "being memorised. Raise loss.baseline"),
        (1.8, 0.0, None, "dataset_val would tell"),
        (1.8, 0.5, 1.7, "So it is on validation groups"),
    ],
)
def test_the_cause_is_named(
    later: float, baseline: float, validation: float | None, cause: str
) -> None:
    (warning,) = warnings([1.0] + [later] * 60, baseline, validation)
    assert cause in warning
    assert f"is {later:.2g}" in warning


@pytest.mark.parametrize(("ratio", "cause"), [(0.3, "leaks"), (5.0, "memorised")])
def test_samples_of_something_else_are_named_as_a_cause(ratio: float, cause: str) -> None:
    """Which m at the first step can't show: it is 1 at the start weights under any sampler."""
    drawn = "40 groups of 40 at temperature 1.3, top_p 1"
    (warning,) = warnings([1.0] + [ratio] * 60, unlike_q=drawn)
    assert cause in warning
    assert f"the samples aren't from Q' itself, but were drawn at: {drawn}." in warning


@pytest.mark.parametrize("ratio", [0.3, 5.0])
def test_a_ratio_that_is_off_from_the_first_step_has_the_same_causes(ratio: float) -> None:
    """A resumed run begins where an earlier one was stopped."""
    assert warnings([ratio] * 60) == warnings([1.0] + [ratio] * 60)


def test_each_cause_is_said_once() -> None:
    """Whatever the number of the last validation."""
    watch = RatioWatch(0.0)
    found = []
    for step in range(100):
        watch.validated(1.0 + step / 1000)
        found.append(watch.trained(1.8))
    assert len([warning for warning in found if warning is not None]) == 1
