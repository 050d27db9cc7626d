"""The weights and the loss: NeMo-Aligner's numbers, closed forms, and what must not happen.

Notation as in `steerlm2.losses`: w' target weights, b' baseline weights, G groups, N responses.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerlm2.attributes import NOT_LABELLED
from steerlm2.losses import (
    METRIC_NAMES,
    PairLoss,
    SteerLM2Loss,
    baseline_weights,
    bradley_terry_sum,
    effective_sample_size,
    kl_distance,
    max_weight,
    metric_sums,
    num_labelled,
    squared_error_sum,
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
    with pytest.raises(AssertionError, match="don't add up to the 3 responses"):
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
    ESS of b': 4/5, and 1. One-hot: the second. Mean log ratio: ln 3 / 2, and 1. Mean ratio:
    (3 + 1) / 2 and e.
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
        "mean_ratio": 2 + math.e,
        "log_mean_ratio": math.log(2) + 1,
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


# Attribute models: regression

NO = NOT_LABELLED


def mean_squared_error_by_hand(scores: list[list[float]], labels: list[list[float]]) -> float:
    """sum of (score - label)^2 over labelled values / number of labelled values, in a loop."""
    squares = [
        (score - label) ** 2
        for row, row_labels in zip(scores, labels, strict=True)
        for score, label in zip(row, row_labels, strict=True)
        if label != NO
    ]
    return math.fsum(squares) / len(squares)


def random_regression(seed: int = 0) -> tuple[list[list[float]], list[list[float]]]:
    """7 texts and 3 attributes, about a third of the labels missing."""
    drawn = random.Random(seed)
    scores = [[drawn.gauss(2, 2) for _ in range(3)] for _ in range(7)]
    labels = [[drawn.choice([0.0, 1.0, 2.0, 3.0, 4.0, NO, NO]) for _ in range(3)] for _ in range(7)]
    return scores, labels


def test_squared_errors_by_hand() -> None:
    """(1 - 3)^2 + (2.5 - 2)^2 + (-1 - 0)^2 = 4 + 0.25 + 1; two of five values aren't labelled."""
    scores_NA = f64([[1.0, 7.0], [2.5, -1.0], [9.0, 4.0]])
    labels_NA = f64([[3.0, NO], [2.0, 0.0], [NO, 4.0]])
    assert squared_error_sum(scores_NA, labels_NA).item() == 4 + 0.25 + 1
    assert num_labelled(labels_NA) == 4


@pytest.mark.parametrize("seed", range(5))
def test_mean_squared_error_equals_a_loop_over_labelled_values(seed: int) -> None:
    scores, labels = random_regression(seed)
    loss = squared_error_sum(f64(scores), f64(labels)) / num_labelled(f64(labels))
    assert_equal(loss, mean_squared_error_by_hand(scores, labels))


def test_gradient_of_the_squared_error_by_hand() -> None:
    """2 (score - label) where there is a label, 0 elsewhere: 2 (1 - 3) = -4, 2 (2.5 - 2) = 1."""
    scores_NA = f64([[1.0, 7.0], [2.5, -1.0]]).requires_grad_()
    squared_error_sum(scores_NA, f64([[3.0, NO], [2.0, NO]])).backward()
    assert scores_NA.grad is not None
    assert scores_NA.grad.tolist() == [[-4, 0], [1, 0]]


def test_an_unlabelled_score_that_overflowed_harms_nothing() -> None:
    """inf where there is no label: the sum and the other gradients stay what they are."""
    scores_NA = f64([[1.0, math.inf]]).requires_grad_()
    loss = squared_error_sum(scores_NA, f64([[3.0, NO]]))
    loss.backward()
    assert scores_NA.grad is not None
    assert (loss.item(), scores_NA.grad.tolist()) == (4, [[-4, 0]])


def test_squared_errors_are_added_up_in_float64() -> None:
    """float32 scores: (1 + 2^-23 - 0)^2 isn't a float32, it is a float64."""
    scores_NA = torch.tensor([[1 + 2**-23]])
    assert squared_error_sum(scores_NA, f64([[0.0]])).item() == (1 + 2**-23) ** 2


def test_squared_errors_are_scaled_by_attribute() -> None:
    """(0.5 * (1 - 3))^2 + (2 * (2.5 - 2))^2 = 2; scales of 1 change no bit."""
    scores_NA, labels_NA = f64([[1.0, 2.5], [9.0, 0.1]]), f64([[3.0, 2.0], [NO, 0.1]])
    assert squared_error_sum(scores_NA, labels_NA, f64([0.5, 2.0])).item() == 2
    for seed in range(5):
        scores, labels = map(f64, random_regression(seed))
        ones = torch.ones(3, dtype=torch.float64)
        assert torch.equal(
            squared_error_sum(scores, labels, ones), squared_error_sum(scores, labels)
        )


@pytest.mark.parametrize("cut", range(8))
def test_unequal_parts_of_a_batch_have_its_squared_error(cut: int) -> None:
    """Sums of the first `cut` texts and of the rest, over the labels of both. A part may be empty,
    and the mean of the parts' means would be another number.
    """
    scores, labels = random_regression()
    parts = sum(
        squared_error_sum(f64(scores[part]).view(-1, 3), f64(labels[part]))
        for part in (slice(cut), slice(cut, None))
    )
    count = sum(num_labelled(f64(labels[part])) for part in (slice(cut), slice(cut, None)))
    assert_equal(parts / count, mean_squared_error_by_hand(scores, labels))


def test_no_texts_have_a_squared_error_of_zero() -> None:
    """As an empty row has it: scores [0, A], labels without a shape."""
    scores_NA = torch.zeros(0, 3, requires_grad=True)
    loss = squared_error_sum(scores_NA, torch.tensor([], dtype=torch.float64))
    loss.backward()
    assert scores_NA.grad is not None
    assert (loss.item(), scores_NA.grad.shape) == (0, (0, 3))


# Attribute models: Bradley-Terry

KINDS: tuple[PairLoss, ...] = ("regular_bt", "margin_bt", "scaled_bt")
STRENGTHS = (-3, -2, -1, 1, 2, 3)


def minus_log_sigmoid(x: float) -> float:
    """-log(1 / (1 + e^-x)) = log(1 + e^-x), without overflow for the x of these tests."""
    return math.log1p(math.exp(-x))


def pair_loss_by_hand(first: float, second: float, strength: float, kind: PairLoss) -> float:
    """d = preferred reward - other reward; a tie is half a preference for either.

    regular: -log sigmoid(d); margin: -log sigmoid(d - |s|); scaled: |s| (-log sigmoid(d)).
    """
    if strength == 0:
        halves = [minus_log_sigmoid(first - second), minus_log_sigmoid(second - first)]
        return 0.0 if kind == "scaled_bt" else math.fsum(halves) / 2
    d = first - second if strength < 0 else second - first
    if kind == "margin_bt":
        return minus_log_sigmoid(d - abs(strength))
    return minus_log_sigmoid(d) * (abs(strength) if kind == "scaled_bt" else 1)


def random_pairs(seed: int = 0) -> tuple[list[float], list[float]]:
    """14 pairs, each strength from -3 to 3 twice, in random order."""
    drawn = random.Random(seed)
    strengths = [float(s) for s in [*range(-3, 4)] * 2]
    drawn.shuffle(strengths)
    return [drawn.gauss(0, 3) for _ in range(28)], strengths


def bt(rewards: list[float], strengths: list[float], kind: PairLoss) -> Tensor:
    return bradley_terry_sum(f64(rewards), f64(strengths), kind)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("regular_bt", math.log(1 + 1 / 4)),
        ("margin_bt", math.log(1 + math.exp(2) / 4)),
        ("scaled_bt", 2 * math.log(1 + 1 / 4)),
    ],
)
@pytest.mark.parametrize("strength", [-2.0, 2.0])
def test_a_pair_by_hand(kind: PairLoss, expected: float, strength: float) -> None:
    """d = ln 4, |strength| = 2. -log sigmoid(ln 4) = log(1 + 1/4); with the margin
    log(1 + e^(2 - ln 4)) = log(1 + e^2 / 4); scaled 2 log(1 + 1/4). Below 0 the first is preferred.
    """
    preferred, other = math.log(4) + 1, 1.0
    rewards = [preferred, other] if strength < 0 else [other, preferred]
    assert_equal(bt(rewards, [strength], kind), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_pairs_equal_a_loop_over_pairs(kind: PairLoss, seed: int) -> None:
    rewards, strengths = random_pairs(seed)
    expected = math.fsum(
        pair_loss_by_hand(rewards[2 * p], rewards[2 * p + 1], strength, kind)
        for p, strength in enumerate(strengths)
    )
    assert_equal(bt(rewards, strengths, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_gradient_of_a_pair_by_hand(kind: PairLoss, strength: float) -> None:
    """d/dd of -log sigmoid(d - m) is -(1 - sigmoid(d - m)), times |s| where scaled: for the
    preferred reward; its negative for the other. d = 0.7.
    """
    preferred = 0 if strength < 0 else 1
    rewards = f64([0.0, 0.0])
    rewards[preferred] = 0.7
    rewards.requires_grad_()
    bradley_terry_sum(rewards, f64([strength]), kind).backward()
    margin = abs(strength) if kind == "margin_bt" else 0
    scale = abs(strength) if kind == "scaled_bt" else 1
    slope = -scale * (1 - 1 / (1 + math.exp(-(0.7 - margin))))
    expected = [slope, -slope] if preferred == 0 else [-slope, slope]
    assert rewards.grad is not None
    assert_equal(rewards.grad, expected)


@pytest.mark.parametrize("kind", ["regular_bt", "margin_bt"])
def test_a_tie_draws_the_rewards_together(kind: PairLoss) -> None:
    """d = second - first: the loss is (-log sigmoid(d) - log sigmoid(-d)) / 2, its slope
    sigmoid(d) - 1/2: descending it, the higher reward falls and the lower rises by the same.
    """
    rewards = f64([1.5, -0.5]).requires_grad_()
    bradley_terry_sum(rewards, f64([0.0]), kind).backward()
    slope = 1 / (1 + math.exp(2.0)) - 0.5
    assert rewards.grad is not None
    assert_equal(rewards.grad, [-slope, slope])
    assert rewards.grad[0] > 0


@pytest.mark.parametrize("kind", ["regular_bt", "margin_bt"])
def test_equal_rewards_of_a_tie_stay(kind: PairLoss) -> None:
    rewards = f64([0.3, 0.3]).requires_grad_()
    bradley_terry_sum(rewards, f64([0.0]), kind).backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [0, 0]


def test_scaled_bt_leaves_ties_out() -> None:
    """|0| times anything: no loss and no gradient."""
    rewards = f64([5.0, -5.0]).requires_grad_()
    loss = bradley_terry_sum(rewards, f64([0.0]), "scaled_bt")
    loss.backward()
    assert rewards.grad is not None
    assert (loss.item(), rewards.grad.tolist()) == (0, [0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_exchanging_a_pairs_places_changes_nothing(kind: PairLoss) -> None:
    """(first, second, s) and (second, first, -s) say the same."""
    rewards, strengths = random_pairs()
    exchanged = [r for p in range(14) for r in (rewards[2 * p + 1], rewards[2 * p])]
    assert_equal(bt(exchanged, [-s for s in strengths], kind), bt(rewards, strengths, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_gap_of_the_rewards_counts(kind: PairLoss) -> None:
    rewards, strengths = random_pairs()
    assert_equal(bt([r + 8 for r in rewards], strengths, kind), bt(rewards, strengths, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 1, 5, 14])
def test_unequal_parts_of_a_batch_have_its_pair_loss(kind: PairLoss, cut: int) -> None:
    rewards, strengths = random_pairs()
    parts = bt(rewards[: 2 * cut], strengths[:cut], kind) + bt(
        rewards[2 * cut :], strengths[cut:], kind
    )
    assert_equal(parts / 14, bt(rewards, strengths, kind) / 14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_beyond_the_range_of_exp_stays_finite(kind: PairLoss) -> None:
    """-log sigmoid(-2000) = 2000 to float64, where e^2000 is inf; margin 1 adds 1."""
    rewards = f64([2000.0, 0.0]).requires_grad_()
    loss = bradley_terry_sum(rewards, f64([1.0]), kind)
    loss.backward()
    assert rewards.grad is not None
    assert loss.item() == (2001 if kind == "margin_bt" else 2000)
    assert rewards.grad.tolist() == [1, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_no_pairs_have_a_loss_of_zero(kind: PairLoss) -> None:
    """What a rank with an empty row adds to the step, through a backward that runs."""
    rewards = torch.zeros(0, requires_grad=True)
    loss = bradley_terry_sum(rewards, torch.tensor([], dtype=torch.float64), kind)
    loss.backward()
    assert rewards.grad is not None
    assert (loss.item(), len(rewards.grad)) == (0, 0)
