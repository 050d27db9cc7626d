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
from steerlm2.datasets.sampled import (
    SamplingRules,
    as_sampled,
    as_stored,
    share_missing,
    unlike_samples_of_q,
)
from steerlm2.losses import SteerLM2Loss, target_weights

LOG_Q = [-2.5, -3.5]
LOG_S = [-2.45, -3.55]
"""0.025 nats a token from log Q', within the tolerance."""
PLAIN = Sampling(drawn=2, temperature=1.0, top_p=1.0)


def record(sampling: Sampling | None, log_s: list[float | None] | None = None) -> Record:
    extras: list[dict[str, Any]] = [
        {} if each is None else {"sampler_log_prob": each} for each in log_s or LOG_S
    ]
    responses = [Response(text, extra=extra) for text, extra in zip("ab", extras, strict=True)]
    return Record("", [Turn("User", "?")], None, responses, sampling=sampling)


def group(index: int = 0) -> Group:
    return Group(
        [1], [[2, 3], [4, 3]], index, [0, 1], log_p_attributes=[-1.0, -0.5],
        log_p_response=[-4.0, -5.0], log_q=LOG_Q, weights=[0.4, 0.6],
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
    with pytest.raises(ValueError, match=f"FILE: loss.baseline=0.5 .*1 of 1 groups .*{found}"):
        sampled(sampling, baseline=0.5)
    assert sampled(sampling, baseline=0.5, assume_samples_of_q=True) == (group(), [])


@pytest.mark.parametrize(
    "sampling", [dataclasses.replace(PLAIN, temperature=0.7), dataclasses.replace(PLAIN, top_p=0.9)]
)
@pytest.mark.parametrize("number", ["recorded", 2])
def test_other_samples_are_refused_for_the_correction_of_the_papers_loss(
    sampling: Sampling, number: Any
) -> None:
    """It weighs by the probability that an answer was drawn with, which isn't Q' then."""
    with pytest.raises(ValueError, match=f"FILE: loss.samples_per_prompt={number} needs samples"):
        sampled(sampling, samples_per_prompt=number)
    found, _ = sampled(sampling, samples_per_prompt=number, assume_samples_of_q=True)
    assert found.drawn == 2


def test_a_number_of_draws_is_enough_for_the_papers_loss_where_records_say_nothing() -> None:
    assert sampled(None, samples_per_prompt=8)[0].drawn == 8


@pytest.mark.parametrize("rules", [{"baseline": 0.5}, {"samples_per_prompt": "recorded"}])
def test_samples_of_another_model_than_has_scored_are_refused(rules: dict[str, Any]) -> None:
    """Whose start weights pass the check against log Q'. By (2 + 1) / 2 / 2 tokens here."""
    own = record(PLAIN, [LOG_Q[0] + 2, LOG_Q[1] - 1])
    with pytest.raises(ValueError, match=r"FILE: loss\..* differ from log Q' by 0.75 nats a token"):
        as_sampled([group()], [own], SamplingRules(**rules), "FILE")
    for more in ({"log_q_tolerance": 0.8}, {"assume_samples_of_q": True}):
        as_sampled([group()], [own], SamplingRules(**rules, **more), "FILE")


def test_a_few_groups_of_another_model_are_told() -> None:
    """One of 20, that is off by 0.25 nats a token; 0.04 in the mean of all."""
    records = [record(PLAIN) for _ in range(19)] + [record(PLAIN, [LOG_Q[0], LOG_Q[1] - 1])]
    rules = SamplingRules(baseline=0.5, log_q_tolerance=0.1)
    _, (warning,) = as_sampled([group(i) for i in range(20)], records, rules, "FILE")
    assert "in 1 of 20 groups: were these sampled from another model?" in warning


@pytest.mark.parametrize(("nats", "told"), [(0.08, True), (0.04, False), (-0.08, False)])
def test_samples_of_an_earlier_state_are_told_by_their_kl(nats: float, told: bool) -> None:
    """Of 5 tokens, so 0.4 nats an answer: within the tolerance. Noise averages out."""
    few = [Group(**{**vars(group(i)), "responses": [[2] * 4 + [3]] * 2}) for i in range(8)]
    noise = [0.2, -0.2] * 4
    records = [record(PLAIN, [q + 5 * nats + each for q in LOG_Q]) for each in noise]
    rules = SamplingRules(baseline=0.5, log_q_tolerance=0.2)
    _, warnings = as_sampled(few, records, rules, "FILE")
    assert len(warnings) == told
    assert all("0.4 nats an answer higher when they were drawn" in warning for warning in warnings)


def test_samples_without_a_log_prob_to_compare_are_told() -> None:
    own = record(PLAIN, [None, None])
    _, (note,) = as_sampled([group()], [own], SamplingRules(baseline=0.5), "FILE")
    assert "FILE: whether these are samples of Q' itself can't be seen" in note


@pytest.mark.parametrize(("drawn", "left_out"), [(4, {}), (2, {"empty": 1}), (16, {"cut_off": 13})])
@pytest.mark.parametrize(
    "rules",
    [
        {"baseline": 0.5},
        {"baseline": 0.5, "use_sampler_log_probs": True},
        {"samples_per_prompt": "recorded"},
    ],
)
def test_groups_whose_responses_were_chosen_after_the_sampling_are_refused(
    rules: dict[str, Any], drawn: int, left_out: dict[str, int]
) -> None:
    """2 responses are there; what was drawn is there, or is counted as left out."""
    sampling = dataclasses.replace(PLAIN, drawn=drawn, left_out=left_out)
    with pytest.raises(ValueError, match="FILE: 1 of 1 groups have other numbers of responses"):
        sampled(sampling, **rules)
    assert sampled(sampling)[0] == group()


def test_responses_that_do_not_fit_were_drawn_all_the_same() -> None:
    """A third one is in the record, but not in the group: 3 draws are right, and 2 can't be."""
    own = record(dataclasses.replace(PLAIN, drawn=3))
    own.responses.append(Response("too long", extra={"sampler_log_prob": -90.0}))
    rules = SamplingRules(baseline=0.5, samples_per_prompt="recorded")
    (found,), warnings = as_sampled([group()], [own], rules, "FILE")
    assert found.drawn == 3
    assert "of 3 draws 1 aren't there (1 not used here)" in warnings[0]
    rules = SamplingRules(baseline=0.5, samples_per_prompt=2)
    with pytest.raises(ValueError, match="2 draws can't give the 3 distinct responses"):
        as_sampled([group()], [own], rules, "FILE")


def test_duplicates_that_are_not_corrected_for_are_told() -> None:
    sampling = dataclasses.replace(PLAIN, drawn=4, left_out={"duplicates": 2})
    (warning,) = sampled(sampling, baseline=0.5)[1]
    assert "FILE: 2 duplicates of 4 draws" in warning
    assert sampled(sampling, baseline=0.5, samples_per_prompt="recorded")[1] == []


@pytest.mark.parametrize("rules", [{}, {"baseline": 0.5, "samples_per_prompt": "recorded"}])
def test_what_else_was_left_out_is_told_with_what_it_does_to_the_mean_ratio(
    rules: dict[str, Any],
) -> None:
    """Answers of probability 3/5 remain, so that Q_theta may give them 5/3 of what Q' gives."""
    left_out = {"cut_off": 3, "empty": 1, "duplicates": 4}
    sampling = dataclasses.replace(PLAIN, drawn=10, left_out=left_out)
    (told,) = sampled(sampling, **rules)[1]
    assert "of 10 draws 4 aren't there (3 cut_off, 1 empty)" in told
    assert told.endswith("mean_ratio may come to 1.667")


@pytest.mark.parametrize(("number", "drawn"), [("recorded", 2), (9, 9)])
def test_a_number_goes_before_the_recorded_one(number: Any, drawn: int) -> None:
    found, warnings = sampled(PLAIN, samples_per_prompt=number)
    assert targets_of([found]).drawn_G.tolist() == [drawn]  # type: ignore[union-attr]
    told = ["records of 1 of 1 groups say that another number" in warning for warning in warnings]
    assert told == [True] * (number == 9)


@pytest.mark.parametrize(
    ("sampling", "number", "message"),
    [
        (None, "recorded", "no `sampling`"),
        (dataclasses.replace(PLAIN, distinct=False), "recorded", "distinct: false"),
        (None, 1, "1 draws can't give the 2"),
    ],
)
def test_numbers_of_draws_that_cannot_be_are_refused(
    sampling: Sampling | None, number: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"FILE, record 1: loss.samples_per_prompt.*{message}"):
        sampled(sampling, samples_per_prompt=number)


@pytest.mark.parametrize(("finished", "refused"), [("stop", True), ("length", False)])
def test_duplicates_that_are_there_cannot_be_corrected_for(finished: str, refused: bool) -> None:
    """Each would count as if it stood for all draws of its text: one that ended is another answer
    than one that was cut off."""
    own = record(PLAIN)
    own.responses = [
        dataclasses.replace(response, value="a", finish_reason=reason)
        for response, reason in zip(own.responses, ("stop", finished), strict=True)
    ]
    rules = SamplingRules(samples_per_prompt="recorded")
    if not refused:
        as_sampled([group()], [own], rules, "FILE")
        return
    with pytest.raises(ValueError, match=r"FILE, record 1: .*but 1 of the responses are there"):
        as_sampled([group()], [own], rules, "FILE")


def test_the_samplers_log_probs_stand_for_log_q() -> None:
    """In w' and in the loss's argument; log Q' stays, for the check of the start weights."""
    tempered = dataclasses.replace(PLAIN, temperature=1.3)
    found, _ = sampled(tempered, baseline=0.5, use_sampler_log_probs=True)
    targets = targets_of([found])
    assert targets.log_q_N is not None
    assert targets.log_q_N.tolist() == LOG_S
    expected = torch.tensor([-1 - 4 + 2.45, -0.5 - 5 + 3.55], dtype=torch.float64).softmax(0)
    assert found.weights == pytest.approx(expected.tolist())
    assert found.log_q == LOG_Q


@pytest.mark.parametrize(
    "sampling",
    [None, dataclasses.replace(PLAIN, top_p=0.9), dataclasses.replace(PLAIN, temperature=0)],
)
def test_a_sampler_that_cannot_give_all_answers_is_refused(sampling: Sampling | None) -> None:
    with pytest.raises(ValueError, match=r"FILE: steerlm2\.use_sampler_log_probs needs"):
        sampled(sampling, use_sampler_log_probs=True)
    found, _ = sampled(sampling, use_sampler_log_probs=True, assume_samples_of_q=True)
    assert found.log_proposal == LOG_S


@pytest.mark.parametrize("unknown", [None, math.nan, "-2", True, 0.5])
def test_responses_without_the_samplers_log_prob_are_refused(unknown: Any) -> None:
    own = record(PLAIN, [-2.0, unknown])
    rules = SamplingRules(use_sampler_log_probs=True)
    with pytest.raises(ValueError, match=r"FILE, record 1: .* 1 have none"):
        as_sampled([group()], [own], rules, "FILE")


@pytest.mark.parametrize(
    ("sampling", "found"),
    [
        (PLAIN, ""),
        (dataclasses.replace(PLAIN, temperature=1.3), "1 of 2 groups at temperature 1.3, top_p 1"),
        (None, "1 of 2 groups at unknown settings"),
    ],
)
def test_how_other_samples_were_drawn_is_said_in_words(
    sampling: Sampling | None, found: str
) -> None:
    words = unlike_samples_of_q([group(0), group(1)], [record(PLAIN), record(sampling)])
    assert words.startswith(found)
    assert bool(words) == bool(found)


@pytest.mark.parametrize(("others", "told"), [(5, False), (6, True)])
def test_a_few_other_samples_do_not_count(others: int, told: bool) -> None:
    records = [record(None)] * others + [record(PLAIN)] * (100 - others)
    assert bool(unlike_samples_of_q([group(i) for i in range(100)], records)) == told


def test_what_a_run_was_trained_on_is_told_without_log_probs_of_its_own() -> None:
    """log Q' from the start weights isn't part of it; what the file says of the sampling is."""
    file = dataclasses.replace(group(), log_q=None, weights=None)
    scored = dataclasses.replace(group(), log_proposal=LOG_S, drawn=4)
    assert [*as_stored([file], [scored])] == [
        dataclasses.replace(file, log_proposal=LOG_S, drawn=4)
    ]


def test_the_share_of_the_draws_that_is_missing() -> None:
    """2 of 8 cut off, and 1 of the other record's 2 isn't in its group; the duplicate counts as
    there, and a record that says nothing doesn't count."""
    sampling = Sampling(5 + 3, 1.0, 1.0, left_out={"cut_off": 2, "duplicates": 4})
    used = dataclasses.replace(group(1), responses=[[2, 3]], responses_kept=[0])
    groups = [group(0), used, group(2)]
    records = [record(sampling), record(PLAIN), record(None)]
    assert share_missing(groups, records) == (2 + 1) / (8 + 2)
    assert share_missing([group()], [record(None)]) == 0


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
