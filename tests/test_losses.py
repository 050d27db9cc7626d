"""The weights and the loss: NeMo-Aligner's numbers, closed forms, and what must not happen.

Notation as in `steerlm2.losses`: w' target weights, b' baseline weights, G groups, N responses.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerlm2.losses import (
    METRIC_NAMES,
    SteerLM2Loss,
    baseline_weights,
    effective_sample_size,
    kl_distance,
    max_weight,
    metric_sums,
    target_weights,
)

NUM_CASES = 5


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(params=range(NUM_CASES))
def case(request: pytest.FixtureRequest, shared_dir: Path) -> dict[str, Any]:
    cases = json.loads((shared_dir / "vectors" / "steerlm2_step.json").read_text())
    assert len(cases) == NUM_CASES
    return cases[request.param]


@pytest.fixture
def ragged() -> dict[str, Any]:
    """Three groups of 2, 1 and 4 responses with random values in float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = [2, 1, 4]
    logps_N, log_q_N, log_p_N = 5 * torch.randn(3, 7, generator=generator, dtype=torch.float64)
    return {
        "logps_N": logps_N,
        "log_q_N": log_q_N,
        "w_N": target_weights(log_p_N, torch.zeros(7).double(), log_q_N, sizes),
        "group_sizes": sizes,
        "response_lengths": [3, 8, 1, 1, 9, 4, 2],
    }


def case_weights(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    sizes = case["group_sizes"]
    log_q_N = f64(case["log_q"])
    w_N = target_weights(f64(case["log_p_attributes"]), f64(case["log_p_response"]), log_q_N, sizes)
    return w_N, baseline_weights(f64(case["response_logprobs"]), log_q_N, sizes)


def case_gradient(case: dict[str, Any]) -> Tensor:
    """Of SteerLM2Loss with respect to the response log-probs, by autograd."""
    logps_N = f64(case["response_logprobs"]).requires_grad_()
    w_N, _ = case_weights(case)
    loss = SteerLM2Loss()(
        logps_N, f64(case["log_q"]), w_N, case["group_sizes"], case["response_lengths"]
    )
    return torch.autograd.grad(loss, logps_N)[0]


def test_target_weights_are_nemo_aligners(case: dict[str, Any]) -> None:
    """w' = softmax over the group of log P(a|x,y) + log P(y|x) - log Q'."""
    assert_equal(case_weights(case)[0], case["expected"]["target_weights"], 1e-6)


def test_baseline_weights_are_nemo_aligners(case: dict[str, Any]) -> None:
    """b' = softmax over the group of log Q_theta - log Q'."""
    assert_equal(case_weights(case)[1], case["expected"]["baseline_weights"], 1e-6)


def test_weight_difference_is_nemo_aligners(case: dict[str, Any]) -> None:
    """w' - b', what weighs a response's gradient."""
    w_N, b_N = case_weights(case)
    assert_equal(w_N - b_N, case["expected"]["weights"], 1e-6)


def test_distance_is_nemo_aligners(case: dict[str, Any]) -> None:
    """Mean over groups of sum_i (w' + 1e-8) log((w' + 1e-8) / (b' + 1e-8))."""
    distance = kl_distance(*case_weights(case), case["group_sizes"])
    assert_equal(distance, case["expected"]["distance"], 1e-6)


def test_gradient_is_nemo_aligners(case: dict[str, Any]) -> None:
    """NeMo differentiates the weighted log-probs with w' - b' held fixed, we differentiate the KL:
    d loss / d log Q_theta(y_i) = -(w'_i - b'_i) / mean length of the group / number of groups.
    """
    assert_equal(case_gradient(case), case["expected"]["grad_wrt_response_logprobs"], 1e-6)


def test_gradient_times_log_probs_is_nemo_aligners_loss(case: dict[str, Any]) -> None:
    """NeMo reports what it differentiates, with w' - b' held fixed: the mean over groups of
    sum_i -(w'_i - b'_i) log Q_theta(y_i) / mean length. (Its mean over micro-batches of m of a
    group's n responses is that, as each is scaled by n / m.) The factors of log Q_theta are our
    gradient, so the value is the scalar product of the two.
    """
    reported = (case_gradient(case) * f64(case["response_logprobs"])).sum()
    assert_equal(reported, case["expected"]["reported_loss"], 1e-6)


def test_two_responses_by_hand() -> None:
    """w' = softmax(ln 3, 0) = (3/4, 1/4), b' = softmax(0, ln 4) = (1/5, 4/5); lengths 2 and 4.

    KL = 3/4 ln(3/4 / 1/5) + 1/4 ln(1/4 / 4/5); loss = KL / 3.
    """
    w_N = target_weights(f64([math.log(3), 0]), f64([0, 0]), f64([0, 0]), [2])
    assert_equal(w_N, [0.75, 0.25])
    loss = SteerLM2Loss()(f64([0, math.log(4)]), f64([0, 0]), w_N, [2], [2, 4])
    kl = 0.75 * math.log(0.75 / 0.2) + 0.25 * math.log(0.25 / 0.8)
    assert_equal(loss, kl / 3)


def test_gradient_of_two_responses_by_hand() -> None:
    """-(w' - b') / mean length = -(3/4 - 1/5) / 3 = -11/60 for the first, +11/60 for the other."""
    logps_N = f64([0, math.log(4)]).requires_grad_()
    SteerLM2Loss()(logps_N, f64([0, 0]), f64([0.75, 0.25]), [2], [2, 4]).backward()
    assert logps_N.grad is not None
    assert_equal(logps_N.grad, [-11 / 60, 11 / 60])


def test_log_q_is_subtracted_in_both_weights() -> None:
    """log Q' = (ln 2, 0) halves the first response's odds: softmax(0 - ln 2, 0) = (1/3, 2/3)."""
    log_q_N = f64([math.log(2), 0])
    assert_equal(target_weights(f64([0, 0]), f64([0, 0]), log_q_N, [2]), [1 / 3, 2 / 3])
    assert_equal(baseline_weights(f64([0, 0]), log_q_N, [2]), [1 / 3, 2 / 3])


def test_gradient_has_its_closed_form(ragged: dict[str, Any]) -> None:
    """-(w'_i - b'_i) / mean length of i's group / 3 groups; mean lengths 11/2, 1 and 16/4."""
    ragged["logps_N"].requires_grad_()
    SteerLM2Loss()(**ragged).backward()
    b_N = baseline_weights(ragged["logps_N"].detach(), ragged["log_q_N"], [2, 1, 4])
    lengths_N = f64([11 / 2] * 2 + [1] + [16 / 4] * 4)
    assert_equal(ragged["logps_N"].grad, (b_N - ragged["w_N"]) / lengths_N / 3)


@pytest.mark.parametrize("normalize", ["mean_response_length", "none"])
def test_gradient_agrees_with_finite_differences(normalize: Any, ragged: dict[str, Any]) -> None:
    """(loss(x + h) - loss(x - h)) / 2h in float64, for every log-prob."""
    logps_N = ragged.pop("logps_N").requires_grad_()
    loss = SteerLM2Loss(normalize)
    assert torch.autograd.gradcheck(lambda logps_N: loss(logps_N, **ragged), logps_N)


def test_without_normalisation_the_loss_is_the_mean_kl(ragged: dict[str, Any]) -> None:
    """The paper's form: mean over groups of sum_i w'_i (ln w'_i - ln b'_i), whatever the lengths.

    (kl_distance differs by its 1e-8.)
    """
    loss = SteerLM2Loss("none")(**ragged)
    b_N = baseline_weights(ragged["logps_N"], ragged["log_q_N"], ragged["group_sizes"])
    terms_N = ragged["w_N"] * (ragged["w_N"].log() - b_N.log())
    assert_equal(loss, terms_N.sum() / 3)


def test_unknown_normalisation_is_refused() -> None:
    unknown: Any = "length"
    with pytest.raises(ValueError, match="'mean_response_length' or 'none', got 'length'"):
        SteerLM2Loss(unknown)


def test_weights_sum_to_one_in_each_group(ragged: dict[str, Any]) -> None:
    """Groups of 2, 1 and 4: cumulative sums 1, 2 and 3 where the groups end."""
    b_N = baseline_weights(ragged["logps_N"], ragged["log_q_N"], ragged["group_sizes"])
    assert_equal(b_N.cumsum(0)[[1, 2, 6]], [1, 2, 3])


def test_groups_do_not_leak(ragged: dict[str, Any]) -> None:
    """Groups together have the loss of groups alone: the mean of the three single losses."""
    single = []
    for part in (slice(0, 2), slice(2, 3), slice(3, 7)):
        values = {name: ragged[name][part] for name in ("logps_N", "log_q_N", "w_N")}
        lengths = ragged["response_lengths"][part]
        single.append(
            SteerLM2Loss()(**values, group_sizes=[len(lengths)], response_lengths=lengths)
        )
    assert_equal(SteerLM2Loss()(**ragged), sum(single) / 3)


def test_a_groups_common_factor_cancels(ragged: dict[str, Any]) -> None:
    """Softmax: a constant added to all log-probs of a group changes nothing in it or elsewhere."""
    shift_N = f64([700.0] * 2 + [0.0] * 5)
    b_N = baseline_weights(ragged["logps_N"], ragged["log_q_N"], ragged["group_sizes"])
    shifted = baseline_weights(
        ragged["logps_N"] + shift_N, ragged["log_q_N"], ragged["group_sizes"]
    )
    assert_equal(shifted, b_N)


def test_group_sizes_may_be_a_tensor(ragged: dict[str, Any]) -> None:
    as_tensors = ragged | {
        name: torch.tensor(ragged[name]) for name in ("group_sizes", "response_lengths")
    }
    assert_equal(SteerLM2Loss()(**as_tensors), SteerLM2Loss()(**ragged), 0)


def test_group_sizes_must_cover_the_responses() -> None:
    with pytest.raises(AssertionError, match="add up to 2, not to the 3 responses"):
        baseline_weights(torch.zeros(3), torch.zeros(3), [2])


def test_extreme_log_ratios_stay_finite() -> None:
    """Log ratios of -1e4 and +1e4 in float32, all weight on the first: KL = -ln b'_1 = 2e4 exactly,
    lengths 5 and 15, so the loss is 2e3.
    """
    loss = SteerLM2Loss()(
        torch.tensor([-1e4, 1e4]), torch.zeros(2), torch.tensor([1.0, 0.0]), [2], [5, 15]
    )
    assert loss.item() == 2e3


def test_extreme_log_ratios_have_a_finite_gradient() -> None:
    """w' = (1, 0), b' = (e^-20000, 1) = (0, 1), mean length 10: gradient -1/10 and 1/10."""
    logps_N = torch.tensor([-1e4, 1e4]).requires_grad_()
    SteerLM2Loss()(logps_N, torch.zeros(2), torch.tensor([1.0, 0.0]), [2], [5, 15]).backward()
    assert logps_N.grad is not None
    assert_equal(logps_N.grad, [-0.1, 0.1], 1e-8)


def test_extreme_log_probs_give_one_hot_target_weights() -> None:
    """softmax(1e4, -1e4, 0) is (1, 0, 0) in float32: exp(-1e4) underflows, nothing overflows."""
    w_N = target_weights(torch.tensor([1e4, -1e4, 0.0]), torch.zeros(3), torch.zeros(3), [3])
    assert w_N.tolist() == [1, 0, 0]


def test_a_group_far_below_another_keeps_its_weights() -> None:
    """(0, 0) and (-1e4, -1e4): halves in both, as each group is shifted by its own maximum."""
    b_N = baseline_weights(torch.tensor([0, 0, -1e4, -1e4]), torch.zeros(4), [2, 2])
    assert b_N.tolist() == [0.5] * 4


def test_distance_of_opposite_one_hot_weights_is_finite() -> None:
    """w' = (1, 0), b' = (0, 1), e = 1e-8: (1 + e) ln((1 + e) / e) + e ln(e / (1 + e)) = -ln e
    up to 1e-8 * 18, that is 18.42068.
    """
    assert_equal(kl_distance(f64([1, 0]), f64([0, 1]), [2]), -math.log(1e-8), 1e-6)


def test_distance_is_the_mean_over_groups() -> None:
    """Equal weights in one group (0), (3/4, 1/4) against (1/4, 3/4) in the other: 1/2 ln 3;
    the mean of both is 1/4 ln 3.
    """
    w_N, b_N = f64([0.5, 0.5, 0.75, 0.25]), f64([0.5, 0.5, 0.25, 0.75])
    assert_equal(kl_distance(w_N, b_N, [2, 2]), math.log(3) / 4, 1e-7)


def test_no_groups_give_a_loss_of_zero_with_a_gradient_of_zero() -> None:
    """An empty micro-batch still needs a backward, through which it changes nothing."""
    parameter = torch.ones(3, requires_grad=True)
    logps_N = parameter[:0]
    loss = SteerLM2Loss()(logps_N, torch.zeros(0), torch.zeros(0), [], [])
    loss.backward()
    assert loss.item() == 0
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0, 0, 0]


def test_no_groups_give_metrics_of_zero() -> None:
    nothing = torch.zeros(0)
    assert metric_sums(nothing, nothing, nothing, []).tolist() == [0] * len(METRIC_NAMES)


def test_effective_sample_size_by_hand() -> None:
    """1 / (1/4 + 1/4) = 2 of 2; one-hot: 1 of 2; 1 / (1/4 + 1/16 + 1/16) = 8/3 of 3."""
    w_N = f64([0.5, 0.5, 1, 0, 0.5, 0.25, 0.25])
    assert_equal(effective_sample_size(w_N, [2, 2, 3]), [1, 1 / 2, 8 / 9])


def test_max_weight_is_of_each_group() -> None:
    assert max_weight(f64([0.4, 0.6, 0.1, 0.2, 0.7]), [2, 3]).tolist() == [0.6, 0.7]


def test_metric_sums_by_hand() -> None:
    """Two groups of two. log Q_theta - log Q' = (ln 3, 0) and (1, 1), so b' = (3/4, 1/4) and
    (1/2, 1/2); w' = (1/4, 3/4) and (1, 0).

    distance: 1/2 ln 3, and ln 2 + 1e-8-terms. ESS of w': 1 / (1/16 + 9/16) / 2 = 4/5, and 1/2.
    ESS of b': 4/5, and 1. One-hot: the second. Mean log ratio: ln 3 / 2, and 1.
    """
    w_N = f64([0.25, 0.75, 1, 0])
    logps_N = f64([math.log(3) - 7, -7, -4, -2])
    sums = metric_sums(logps_N, f64([-7, -7, -5, -3]), w_N, [2, 2])
    expected = {
        "distance": math.log(3) / 2 + math.log(2),
        "ess_target": 4 / 5 + 1 / 2,
        "ess_baseline": 4 / 5 + 1,
        "share_one_hot_target": 1,
        "mean_log_ratio": math.log(3) / 2 + 1,
    }
    assert tuple(expected) == METRIC_NAMES
    assert_equal(sums, list(expected.values()), 1e-6)


def test_metric_sums_add_up_over_micro_batches(ragged: dict[str, Any]) -> None:
    """Groups of 2, 1 | 4 in two micro-batches have the sums of all three in one."""

    def sums_of(part: slice, sizes: list[int]) -> Tensor:
        return metric_sums(
            ragged["logps_N"][part], ragged["log_q_N"][part], ragged["w_N"][part], sizes
        )

    parts = sums_of(slice(0, 3), [2, 1]) + sums_of(slice(3, 7), [4])
    assert_equal(sums_of(slice(0, 7), [2, 1, 4]), parts)
