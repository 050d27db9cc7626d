"""The warning about m, the mean of Q_theta / Q' over the samples."""

from __future__ import annotations

import pytest

from steerlm2.training.ratio_watch import STEPS, RatioWatch

TEMPERED = "40 groups of 40 at temperature 1.3, top_p 1"


def warnings(
    watch: RatioWatch, ratios: list[float], *, validation: float | None = None
) -> list[str]:
    """What it says in as many steps, before each of which there was a validation or none."""
    found = []
    for ratio in ratios:
        if validation is not None:
            watch.validated(validation)
        if (warning := watch.trained(ratio)) is not None:
            found.append(warning)
    return found


@pytest.mark.parametrize("ratio", [0.72, 1.0, 1.38])
def test_a_ratio_near_one_is_no_news(ratio: float) -> None:
    assert warnings(RatioWatch(0.5), [ratio] * 100) == []


def test_single_steps_far_off_are_no_news() -> None:
    assert warnings(RatioWatch(0.5), [1.0, 30.0, 1.0, 0.01, 1.0] * 20) == []


def test_a_few_steps_are_no_news() -> None:
    assert warnings(RatioWatch(0.5), [0.3] * (STEPS - 1)) == []


@pytest.mark.parametrize(
    ("later", "baseline", "validation", "cause"),
    [
        (0.5, 1.0, None, "leaks to strings that nobody sampled: lower loss.baseline, or"),
        (0.5, 0.0, None, "leaks to strings that nobody sampled: lower lr, or"),
        (1.8, 0.0, 1.1, "On validation groups it is 1.1: the training samples are being memorised"),
        (1.8, 0.0, None, "(a validation now would tell): raise loss.baseline, train for fewer"),
        (1.8, 1.0, 1.1, "memorised; train for fewer"),
        (1.8, 1.0, None, "(a validation now would tell): train for fewer"),
        (1.8, 0.5, 1.7, "The samples lack much of what Q' gives"),
    ],
)
def test_the_cause_is_named(
    later: float, baseline: float, validation: float | None, cause: str
) -> None:
    (warning,) = warnings(RatioWatch(baseline), [1.0] + [later] * 60, validation=validation)
    assert cause in warning
    assert f"is {later:.2g}" in warning


@pytest.mark.parametrize("baseline", [0.5, 1.0])
@pytest.mark.parametrize("ratio", [0.3, 5.0])
def test_samples_of_something_else_tell_nothing(ratio: float, baseline: float) -> None:
    """Which m at the first step can't show: it is 1 at the start weights under any sampler."""
    (warning,) = warnings(RatioWatch(baseline, TEMPERED), [1.0] + [ratio] * 60)
    assert f"the samples aren't from Q' itself ({TEMPERED})" in warning
    assert "loss.baseline" not in warning


def test_what_was_left_out_is_named_before_it_is_taken_for_memorising() -> None:
    """With 60% missing m comes to 2.5 where all probability is moved to the others."""
    (warning,) = warnings(RatioWatch(0.5, missing=0.6), [1.8] * 60)
    assert "cut off or left out: 60% of the draws" in warning
    (warning,) = warnings(RatioWatch(0.5, missing=0.1), [1.8] * 60)
    assert "Probably the training samples are being memorised" in warning


def test_a_validation_at_the_start_weights_is_no_evidence() -> None:
    """m is 1 there by definition."""
    watch = RatioWatch(0.5)
    watch.validated(1.0)
    (warning,) = warnings(watch, [1.8] * STEPS)
    assert "Probably" in warning


@pytest.mark.parametrize(
    ("steps_since", "cause"),
    [(0, "On validation groups it is 1:"), (STEPS, "(a validation now would tell)")],
)
def test_an_old_validation_is_no_evidence(steps_since: int, cause: str) -> None:
    """And what is known isn't said again as a guess, once it has become old."""
    watch = RatioWatch(0.5)
    assert warnings(watch, [1.0] * STEPS, validation=1.0) == []
    assert warnings(watch, [1.0] * steps_since) == []
    (warning,) = warnings(watch, [1.8] * 60)
    assert cause in warning


@pytest.mark.parametrize("ratio", [0.3, 5.0])
def test_a_ratio_that_is_off_from_the_first_step_has_the_same_causes(ratio: float) -> None:
    """A resumed run begins where an earlier one was stopped."""
    later = warnings(RatioWatch(0.5), [1.0] + [ratio] * 60)
    assert warnings(RatioWatch(0.5), [ratio] * 60) == later


def test_each_cause_is_said_once() -> None:
    """Whatever the number of the last validation."""
    watch = RatioWatch(0.0)
    found = []
    for step in range(100):
        watch.validated(1.0 + step / 1000)
        found.append(watch.trained(1.8))
    assert len([warning for warning in found if warning is not None]) == 1
