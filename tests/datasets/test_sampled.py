"""What the records say of the sampling, against what the loss needs; tempered samples.

S is what was drawn from: Q' at another temperature, renormalised. Y answers of a world.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from steerlm2.data.packing import Group, targets_of
from steerlm2.data.records import Record, Response, Sampling, Turn, record_to_json
from steerlm2.data.records import parse_record as parse
from steerlm2.datasets.sampled import SamplingRules, as_sampled
from steerlm2.losses import SteerLM2Loss, target_weights

LOG_S = [-2.0, -3.0]
PLAIN = Sampling(drawn=4, temperature=1.0, top_p=1.0)


def record(sampling: Sampling | None, log_s: list[float | None] | None = None) -> Record:
    extras: list[dict[str, Any]] = [
        {} if each is None else {"sampler_log_prob": each} for each in log_s or LOG_S
    ]
    responses = [Response(text, extra=extra) for text, extra in zip("ab", extras, strict=True)]
    return Record("", [Turn("User", "?")], None, responses, sampling=sampling)


def group(index: int = 0) -> Group:
    return Group(
        [1], [[2, 3], [4, 3]], index, [0, 1], log_p_attributes=[-1.0, -0.5],
        log_p_response=[-4.0, -5.0], log_q=[-2.5, -3.5], weights=[0.4, 0.6],
    )  # fmt: skip


def sampled(sampling: Sampling | None, **rules: Any) -> tuple[Group, list[str]]:
    (found,), warnings = as_sampled([group()], [record(sampling)], SamplingRules(**rules), "FILE")
    return found, warnings


@pytest.mark.parametrize("sampling", [None, PLAIN, dataclasses.replace(PLAIN, temperature=0.7)])
def test_the_papers_loss_takes_all_samples_as_they_are(sampling: Sampling | None) -> None:
    assert sampled(sampling) == (group(), [])


def test_samples_of_the_model_itself_are_taken_with_any_share() -> None:
    assert sampled(PLAIN, baseline=0.5) == (group(), [])


@pytest.mark.parametrize(
    ("sampling", "found"),
    [
        (None, "unknown settings"),
        (dataclasses.replace(PLAIN, temperature=0.7), "temperature 0.7, top_p 1"),
        (dataclasses.replace(PLAIN, top_p=0.9), "temperature 1, top_p 0.9"),
        (dataclasses.replace(PLAIN, top_k=50), "top_k 50"),
    ],
)
def test_other_samples_are_refused_for_a_smaller_share(
    sampling: Sampling | None, found: str
) -> None:
    with pytest.raises(ValueError, match=f"FILE: loss.baseline=0.5 .*1 groups of 1 .*{found}"):
        sampled(sampling, baseline=0.5)
    assert sampled(sampling, baseline=0.5, assume_samples_of_q=True) == (group(), [])


def test_duplicates_that_are_not_corrected_for_are_told() -> None:
    sampling = dataclasses.replace(PLAIN, left_out={"duplicates": 2})
    (warning,) = sampled(sampling, baseline=0.5)[1]
    assert "FILE: 2 duplicates of 4 draws" in warning
    assert sampled(sampling, baseline=0.5, samples_per_prompt="recorded")[1] == []


@pytest.mark.parametrize(("number", "drawn"), [("recorded", 4), (9, 9)])
def test_a_number_goes_before_the_recorded_one(number: Any, drawn: int) -> None:
    found, _ = sampled(PLAIN, samples_per_prompt=number)
    assert targets_of([found]).drawn_G.tolist() == [drawn]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sampling", "number", "message"),
    [
        (None, "recorded", "no `sampling`"),
        (dataclasses.replace(PLAIN, distinct=False), "recorded", "distinct: false"),
        (dataclasses.replace(PLAIN, drawn=1), "recorded", "1 draws can't give the 2"),
    ],
)
def test_numbers_of_draws_that_cannot_be_are_refused(
    sampling: Sampling | None, number: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"FILE, record 1: loss.samples_per_prompt.*{message}"):
        sampled(sampling, samples_per_prompt=number)


def test_the_samplers_log_probs_stand_for_log_q() -> None:
    """In w' and in the loss's argument; log Q' stays, for the check of the start weights."""
    tempered = dataclasses.replace(PLAIN, temperature=1.3)
    found, _ = sampled(tempered, baseline=0.5, use_sampler_log_probs=True)
    targets = targets_of([found])
    assert targets.log_q_N is not None
    assert targets.log_q_N.tolist() == LOG_S
    expected = torch.tensor([-1 - 4 + 2.0, -0.5 - 5 + 3.0], dtype=torch.float64).softmax(0)
    assert found.weights == pytest.approx(expected.tolist())
    assert found.log_q == group().log_q


@pytest.mark.parametrize(
    "sampling",
    [None, dataclasses.replace(PLAIN, top_p=0.9), dataclasses.replace(PLAIN, temperature=0)],
)
def test_a_sampler_that_cannot_give_all_answers_is_refused(sampling: Sampling | None) -> None:
    with pytest.raises(ValueError, match=r"FILE: steerlm2\.use_sampler_log_probs needs"):
        sampled(sampling, use_sampler_log_probs=True)


@pytest.mark.parametrize("unknown", [None, math.nan, "-2", True, 0.5])
def test_responses_without_the_samplers_log_prob_are_refused(unknown: Any) -> None:
    own = record(PLAIN, [-2.0, unknown])
    rules = SamplingRules(use_sampler_log_probs=True)
    with pytest.raises(ValueError, match=r"FILE, record 1: .* 1 have none"):
        as_sampled([group()], [own], rules, "FILE")


# The key in files


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(3, 0.7, 0.9, 5, False, {"empty": 1})])
def test_the_sampling_survives_a_file(sampling: Sampling) -> None:
    assert parse(record_to_json(record(sampling)), require=()).sampling == sampling


@pytest.mark.parametrize(
    "other",
    ["nucleus", 3, None, [], {"method": "beam"}, {"drawn": "4", "temperature": 1, "top_p": 1},
     {"drawn": 4, "temperature": 1, "top_p": 1, "left_out": 3}],
)  # fmt: skip
def test_another_programs_key_of_that_name_is_kept_and_tells_nothing(other: Any) -> None:
    obj = record_to_json(record(None)) | {"sampling": other}
    found = parse(obj, require=())
    assert found.sampling is None
    assert record_to_json(found) == obj


# The enumerable world


@pytest.mark.parametrize("baseline", [0, 0.5])
def test_tempered_samples_have_the_gradient_of_plain_ones(baseline: float) -> None:
    """The mean gradient from 64 draws at temperature 1.5, with S in the ratios, is that of draws
    from Q' itself, which with Q' in them it isn't. 4,000 groups, 12 answers.
    """
    generator = torch.Generator().manual_seed(0)
    logits_Y, change_Y, noise_Y = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    log_q_Y, log_s_Y = (1.5 * logits_Y).log_softmax(0), logits_Y.log_softmax(0)
    log_p_Y, log_theta_Y = log_q_Y + noise_Y, (log_q_Y + 0.5 * change_Y).log_softmax(0)
    sizes = torch.full((4000,), 64)

    def gradient_Y(drawn_from_Y: torch.Tensor, proposal_Y: torch.Tensor) -> torch.Tensor:
        drawn_N = torch.multinomial(
            drawn_from_Y.exp().expand(4000, 12), 64, replacement=True, generator=generator
        ).flatten()
        logps_N = log_theta_Y[drawn_N].requires_grad_()
        log_q_N = proposal_Y[drawn_N]
        w_N = target_weights(log_p_Y[drawn_N], torch.zeros_like(log_q_N), log_q_N, sizes)
        loss = SteerLM2Loss("none", baseline)
        loss(logps_N, log_q_N, w_N, sizes, torch.ones_like(drawn_N)).backward()
        assert logps_N.grad is not None
        return torch.zeros(12).double().index_add(0, drawn_N, logps_N.grad)

    expected_Y = gradient_Y(log_q_Y, log_q_Y)
    error = (gradient_Y(log_s_Y, log_s_Y) - expected_Y).abs().sum()
    with_log_q = (gradient_Y(log_s_Y, log_q_Y) - expected_Y).abs().sum()
    assert error < 0.2 * with_log_q
