"""SteerLM2Loss beyond the paper: a share of the baseline, and samples without their duplicates.

Notation as in `steerlm2.losses`: w' target weights, b' baseline weights, r = Q_theta / Q', c shares
of the samples, m = sum c r, G groups, N responses. Worlds have Y answers, of which D are drawn.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from steerlm2.losses import (
    METRIC_NAMES,
    SteerLM2Loss,
    baseline_weights,
    group_logsumexp,
    log_shares,
    metric_sums,
    shared_weights,
    target_weights,
)

SIZES = [2, 1, 4]
DRAWN = [5, 3, 8]


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture
def ragged() -> dict[str, Any]:
    """Three groups of 2, 1 and 4 responses with random values in float64; some are likely."""
    generator = torch.Generator().manual_seed(0)
    log_q_N = -3 * torch.rand(7, generator=generator, dtype=torch.float64)
    change_N, log_p_N = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return {
        "logps_N": log_q_N + change_N,
        "log_q_N": log_q_N,
        "w_N": target_weights(log_p_N, torch.zeros(7).double(), log_q_N, SIZES),
        "group_sizes": SIZES,
        "response_lengths": [3, 8, 1, 1, 9, 4, 2],
    }


def value_and_gradient(loss: SteerLM2Loss, logps_N: Tensor, **others: Any) -> tuple[float, Tensor]:
    logps_N = logps_N.detach().requires_grad_()
    value = loss(logps_N, **others)
    return value.item(), torch.autograd.grad(value, logps_N)[0]


def share_by_hand(log_q: float, n: int) -> float:
    """q / (1 - (1 - q)^n)."""
    q = math.exp(log_q)
    return q / (1 - (1 - q) ** n)


def loss_by_hand(arguments: dict[str, Any], baseline: float, drawn: list[int] | None) -> float:
    """Mean over groups of [ sum w' log w' - sum w' (log c + log r) + baseline * log sum c r ]
    / mean length, in a loop, with w' times c and renormalised where duplicates were taken out.
    """
    losses, start = [], 0
    for g, size in enumerate(SIZES):
        part = range(start, start + size)
        start += size
        log_q = [arguments["log_q_N"][i].item() for i in part]
        r = [math.exp(arguments["logps_N"][i].item() - q) for i, q in zip(part, log_q, strict=True)]
        c = [1 / size if drawn is None else share_by_hand(q, drawn[g]) for q in log_q]
        w = [arguments["w_N"][i].item() for i in part]
        if drawn is not None:
            w = [
                a * b / sum(map(math.prod, zip(w, c, strict=True)))
                for a, b in zip(w, c, strict=True)
            ]
        m = sum(map(math.prod, zip(c, r, strict=True)))
        loss = baseline * math.log(m)
        loss += sum(a * (math.log(a) - math.log(b * d)) for a, b, d in zip(w, c, r, strict=True))
        losses.append(loss / (sum(arguments["response_lengths"][i] for i in part) / size))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("drawn", [None, DRAWN])
@pytest.mark.parametrize("baseline", [0, 0.5, 1])
def test_the_loss_is_its_formula(
    baseline: float, drawn: list[int] | None, ragged: dict[str, Any]
) -> None:
    loss = SteerLM2Loss(baseline=baseline, samples_per_prompt=drawn and "recorded")
    assert_equal(loss(**ragged, drawn_G=drawn), loss_by_hand(ragged, baseline, drawn))


@pytest.mark.parametrize("drawn", [None, DRAWN])
@pytest.mark.parametrize("baseline", [0, 0.25, 1])
def test_the_values_gradient_is_the_analytic_one(
    baseline: float, drawn: list[int] | None, ragged: dict[str, Any]
) -> None:
    """-(w' - baseline b') / mean length / 3 groups by autograd, and autograd's of the value by
    finite differences.
    """
    loss = SteerLM2Loss(baseline=baseline, samples_per_prompt=drawn and "recorded")
    _, gradient_N = value_and_gradient(loss, **ragged, drawn_G=drawn)
    w_N, b_N = ragged["w_N"], baseline_weights(ragged["logps_N"], ragged["log_q_N"], SIZES)
    if drawn is not None:
        log_c_N = log_shares(ragged["log_q_N"], SIZES, f64(drawn))
        w_N, b_N = (shared_weights(each, log_c_N, SIZES) for each in (w_N, b_N))
    lengths_N = f64([11 / 2] * 2 + [1] + [16 / 4] * 4)
    assert_equal(gradient_N, -(w_N - baseline * b_N) / lengths_N / 3)
    logps_N = ragged.pop("logps_N").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, **ragged, drawn_G=drawn), logps_N)


def test_two_responses_by_hand() -> None:
    """w' = (3/4, 1/4), r = (1, 4), c = 1/2: m = 5/2, b' = (1/5, 4/5).

    Loss: 3/4 ln(3/4) + 1/4 ln(1/4) - 3/4 ln(1/2) - 1/4 ln(2) + 1/2 ln(5/2); gradient:
    -(3/4 - 1/10) and -(1/4 - 4/10).
    """
    loss = SteerLM2Loss("none", baseline=0.5)
    value, gradient_N = value_and_gradient(
        loss, f64([-1, math.log(4) - 2]), log_q_N=f64([-1, -2]), w_N=f64([0.75, 0.25]),
        group_sizes=[2], response_lengths=[2, 4],
    )  # fmt: skip
    entropy = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    cross = 0.75 * math.log(0.5) + 0.25 * math.log(2)
    assert value == pytest.approx(entropy - cross + 0.5 * math.log(2.5), abs=1e-12)
    assert_equal(gradient_N, [-0.65, 0.15])


def test_a_baseline_of_one_is_the_papers_loss_bit_for_bit(ragged: dict[str, Any]) -> None:
    default, explicit = SteerLM2Loss(), SteerLM2Loss(baseline=1.0, samples_per_prompt=None)
    value, gradient_N = value_and_gradient(default, **ragged)
    other, other_N = value_and_gradient(explicit, **ragged, drawn_G=DRAWN)
    assert (value, gradient_N.tolist()) == (other, other_N.tolist())


def test_a_factor_of_all_ratios_costs_what_the_share_leaves(ragged: dict[str, Any]) -> None:
    """All r of a group times e^k: KL(w' || b') stays, log m grows by k: -(1 - 1/4) k, and nothing
    for the paper's loss.
    """
    moved = ragged | {"logps_N": ragged["logps_N"] + f64([2.0] * 2 + [0.0] * 5)}
    for baseline, cost in ((0.25, -0.75 * 2 / 5.5 / 3), (1, 0)):
        loss = SteerLM2Loss(baseline=baseline)
        assert_equal(loss(**moved) - loss(**ragged), cost)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [None, 16])
@pytest.mark.parametrize("baseline", [0, 0.5, 1])
def test_log_ratios_of_hundreds_of_nats_have_a_bounded_gradient(
    baseline: float, samples: int | None, dtype: torch.dtype
) -> None:
    """One-hot w' = (1, 0, 0); r = e^-700, e^900 and 1, whose exp under- and overflow: b' is one-hot
    too, and the gradient -(w' - baseline b').
    """
    loss = SteerLM2Loss("none", baseline, samples)
    value, gradient_N = value_and_gradient(
        loss, torch.tensor([-2000.0, -400.0, -1300.0], dtype=dtype),
        log_q_N=torch.tensor([-1300.0, -1300.0, -1300.0], dtype=dtype),
        w_N=torch.tensor([1.0, 0.0, 0.0], dtype=dtype), group_sizes=[3],
        response_lengths=[1, 1, 1],
    )  # fmt: skip
    n = samples or 3
    assert value == pytest.approx(700 + math.log(n) + baseline * (900 - math.log(n)), rel=1e-6)
    assert gradient_N.tolist() == [-1, baseline, 0]


@pytest.mark.parametrize("n", [2, 4, 100])
@pytest.mark.parametrize("log_q", [0.0, -1e-9, -0.1, -3.0, -19.9])
def test_shares_of_distinct_samples_are_their_formula(log_q: float, n: int) -> None:
    """q / (1 - (1 - q)^n), in exact fractions of the float q."""
    q = Fraction(math.exp(log_q))
    expected = q / (1 - (1 - q) ** n)
    assert log_shares(f64([log_q]), [1], n).exp().item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("log_q", [-20.1, -800.0, -1e5])
def test_rare_samples_count_alike(log_q: float) -> None:
    """q underflows below -745; 1/n is the limit."""
    assert_equal(log_shares(f64([log_q]), [1], 16), [-math.log(16)])


def test_a_probability_that_rounding_put_above_one_is_one() -> None:
    assert_equal(log_shares(f64([5e-4]), [1], 16), [0.0])


def test_single_draws_count_as_independent_ones() -> None:
    """Without a correction 1 / size of the group."""
    assert_equal(log_shares(f64([-1] * 7), SIZES).exp(), [1 / 2] * 2 + [1] + [1 / 4] * 4)


@pytest.mark.parametrize("n", [2, 9])
def test_one_number_holds_for_all_groups(n: int, ragged: dict[str, Any]) -> None:
    number = SteerLM2Loss(samples_per_prompt=n)(**ragged)
    assert number == SteerLM2Loss(samples_per_prompt="recorded")(**ragged, drawn_G=[n] * 3)


def test_micro_batches_have_the_loss_of_the_whole(ragged: dict[str, Any]) -> None:
    """Of 2, 1 | 4 responses: (2 first + 1 second) / 3, each group with its own number of draws."""
    loss = SteerLM2Loss(baseline=0.5, samples_per_prompt="recorded")
    parts = []
    for responses, groups in ((slice(3), slice(2)), (slice(3, 7), slice(2, 3))):
        values = {name: ragged[name][responses] for name in ragged if name != "group_sizes"}
        parts.append(loss(**values, group_sizes=SIZES[groups], drawn_G=DRAWN[groups]))
    assert_equal(loss(**ragged, drawn_G=DRAWN), (2 * parts[0] + parts[1]) / 3)


@pytest.mark.parametrize("baseline", [0, 0.5])
def test_no_groups_have_a_loss_and_a_gradient_of_zero(baseline: float) -> None:
    parameter = torch.ones(3, requires_grad=True)
    loss = SteerLM2Loss(baseline=baseline, samples_per_prompt=4)
    loss(parameter[:0], torch.zeros(0), torch.zeros(0), [], []).backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("baseline", [-0.1, 1.01, math.nan, True, "0.5", None])
def test_other_shares_are_refused(baseline: Any) -> None:
    with pytest.raises(ValueError, match="baseline must be a number from 0 to 1, got"):
        SteerLM2Loss(baseline=baseline)


@pytest.mark.parametrize("samples", [0, 1, -4, 2.5, True, "many"])
def test_other_numbers_of_samples_are_refused(samples: Any) -> None:
    with pytest.raises(ValueError, match="samples_per_prompt must be"):
        SteerLM2Loss(samples_per_prompt=samples)


def test_recorded_numbers_must_be_given(ragged: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="drawn_G"):
        SteerLM2Loss(samples_per_prompt="recorded")(**ragged)


def test_metrics_of_distinct_samples_by_hand() -> None:
    """q = (1/2, 1/4), n = 2: pi = (3/4, 7/16), c = (2/3, 4/7); r = (1/2, 2).

    m = (2/3 * 1/2 + 4/7 * 2) / (2/3 + 4/7) = (1/3 + 8/7) / (26/21) = 31/26, b' = (7/31, 24/31).
    w' = (1/2, 1/2) times c: (14/26, 12/26).
    """
    log_q_N = f64([0.5, 0.25]).log()
    sums = metric_sums(f64([0.25, 0.5]).log(), log_q_N, f64([0.5, 0.5]), [2], 2)
    found = dict(zip(METRIC_NAMES, sums.tolist(), strict=True))
    assert found["mean_ratio"] == pytest.approx(31 / 26)
    assert found["log_mean_ratio"] == pytest.approx(math.log(31 / 26))
    assert found["mean_log_ratio"] == pytest.approx(0)
    w, b = (14 / 26, 12 / 26), (7 / 31, 24 / 31)
    assert found["ess_target"] == pytest.approx(1 / (w[0] ** 2 + w[1] ** 2) / 2)
    assert found["ess_baseline"] == pytest.approx(1 / (b[0] ** 2 + b[1] ** 2) / 2)
    kl = w[0] * math.log(w[0] / b[0]) + w[1] * math.log(w[1] / b[1])
    assert found["distance"] == pytest.approx(kl, abs=1e-7)


@pytest.mark.parametrize("drawn", [None, 8])
def test_the_mean_ratio_starts_at_one(drawn: int | None, ragged: dict[str, Any]) -> None:
    sums = metric_sums(ragged["log_q_N"], ragged["log_q_N"], ragged["w_N"], SIZES, drawn)
    found = dict(zip(METRIC_NAMES, sums.tolist(), strict=True))
    assert found["mean_ratio"] == pytest.approx(3, abs=1e-12)
    assert found["log_mean_ratio"] == pytest.approx(0, abs=1e-12)


def test_a_mean_ratio_beyond_all_numbers_is_reported_finite() -> None:
    sums = metric_sums(f64([-10.0, -10.0]), f64([-2000.0, -2000.0]), f64([0.5, 0.5]), [2])
    found = dict(zip(METRIC_NAMES, sums.tolist(), strict=True))
    assert found["mean_ratio"] == pytest.approx(math.exp(80))
    assert found["log_mean_ratio"] == 1990


# The enumerable world: 24 answers, with exact expectations

NUM_ANSWERS, NUM_DRAWS, NUM_REPEATS = 24, 8, 10_000


class World:
    """P, Q' and Q_theta over 24 answers, and samples of 8 draws from Q', 10,000 times."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(3, NUM_ANSWERS, generator=generator, dtype=torch.float64)
        self.log_q_Y = (1.5 * logits[0]).log_softmax(dim=0)
        self.log_p_Y = (logits[0] + 0.5 * logits[1]).log_softmax(dim=0)
        self.log_theta_Y = (logits[0] + 0.5 * logits[2]).log_softmax(dim=0)
        size = (NUM_REPEATS, NUM_DRAWS)
        probs_RY = self.log_q_Y.exp().expand(NUM_REPEATS, NUM_ANSWERS)
        self.drawn_RD = torch.multinomial(probs_RY, size[1], replacement=True, generator=generator)
        seen_RY = torch.zeros(NUM_REPEATS, NUM_ANSWERS).scatter_(1, self.drawn_RD, 1.0) > 0
        self.distinct_N = seen_RY.nonzero()[:, 1]
        self.distinct_sizes = seen_RY.sum(dim=1)
        self.independent_N = self.drawn_RD.flatten()
        self.independent_sizes = torch.full((NUM_REPEATS,), NUM_DRAWS)

    def mean_ratio(self, *, distinct: bool, drawn: int | None) -> float:
        """The mean over the repeats of sum c Q_theta / Q'."""
        answers_N = self.distinct_N if distinct else self.independent_N
        sizes = self.distinct_sizes if distinct else self.independent_sizes
        log_c_N = log_shares(self.log_q_Y[answers_N], sizes, drawn)
        log_r_N = (self.log_theta_Y - self.log_q_Y)[answers_N]
        return group_logsumexp(log_c_N + log_r_N, sizes).exp().mean().item()

    def gradient(self, loss: SteerLM2Loss, *, distinct: bool) -> Tensor:
        """[Y] the mean gradient with respect to log Q_theta of the answers."""
        answers_N = self.distinct_N if distinct else self.independent_N
        sizes = self.distinct_sizes if distinct else self.independent_sizes
        log_q_N = self.log_q_Y[answers_N]
        w_N = target_weights(self.log_p_Y[answers_N], torch.zeros_like(log_q_N), log_q_N, sizes)
        logps_N = self.log_theta_Y[answers_N].requires_grad_()
        loss(logps_N, log_q_N, w_N, sizes, torch.ones_like(answers_N)).backward()
        assert logps_N.grad is not None
        return torch.zeros(NUM_ANSWERS).double().index_add(0, answers_N, logps_N.grad)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_the_correction_makes_distinct_samples_unbiased(world: World) -> None:
    """E sum c f over 10,000 samples is within 1% of sum_y q(y) f(y), for f = Q_theta / Q'
    whose mean is 1; so is the average over all draws. The plain average over distinct
    answers isn't: rare answers count too much.
    """
    assert world.mean_ratio(distinct=False, drawn=None) == pytest.approx(1, abs=0.01)
    assert world.mean_ratio(distinct=True, drawn=NUM_DRAWS) == pytest.approx(1, abs=0.01)
    assert abs(world.mean_ratio(distinct=True, drawn=None) - 1) > 0.03


def test_every_answer_has_its_probability_in_the_mean(world: World) -> None:
    """f = 1 for one answer: E c = q(y), within 1% of the probabilities altogether."""
    log_c_N = log_shares(world.log_q_Y[world.distinct_N], world.distinct_sizes, NUM_DRAWS)
    mean_Y = torch.zeros(NUM_ANSWERS).double().index_add(0, world.distinct_N, log_c_N.exp())
    assert (mean_Y / NUM_REPEATS - world.log_q_Y.exp()).abs().sum() < 0.01


@pytest.mark.parametrize("baseline", [0, 0.5, 1])
def test_the_gradient_from_distinct_samples_is_that_from_all_draws(
    world: World, baseline: float
) -> None:
    """In the mean, up to what renormalising so few samples costs (both do it): nearer than without
    the correction by far.
    """
    expected_Y = world.gradient(SteerLM2Loss("none", baseline), distinct=False)
    corrected = SteerLM2Loss("none", baseline, samples_per_prompt=NUM_DRAWS)
    error = (world.gradient(corrected, distinct=True) - expected_Y).abs().sum()
    plain = (world.gradient(SteerLM2Loss("none", baseline), distinct=True) - expected_Y).abs().sum()
    assert error < 0.5 * plain


def test_the_paper_is_blind_to_mass_and_a_smaller_share_is_not(world: World) -> None:
    """The sum over the answers of the gradient is what their probabilities' common factor feels:
    nothing from the paper's loss, 1 upwards at a share of 0 and half of that at 0.5.
    """
    for baseline, pull in ((1, 0), (0.5, 0.5), (0, 1)):
        total = world.gradient(SteerLM2Loss("none", baseline), distinct=False).sum()
        assert_equal(total, -pull, 1e-9)
