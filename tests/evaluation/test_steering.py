"""What a model's answers come to, by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from steerlm2.attributes import AttributeSchema
from steerlm2.data.records import SAMPLER_LOG_PROB, Record, Response, Sampling, Turn
from steerlm2.evaluation.steering import (
    compare,
    independent_metrics,
    reference_metrics,
    steering_result,
    unequal_requests,
)

SCHEMA = AttributeSchema(("humor",))


def record(*answers: Response, label: str = "humor:2", prompt: str = "Q") -> Record:
    return Record("S", [Turn("User", prompt)], label, list(answers))


def scored(humor: float) -> Response:
    return Response("some words", scores={"humor": humor})


def drawn(log_prob: float | None, reference: float | None) -> Response:
    extra = {} if log_prob is None else {SAMPLER_LOG_PROB: log_prob}
    return Response("a", log_p_response=reference, extra=extra)


def test_the_error_is_over_answers_and_its_standard_error_over_requests() -> None:
    """Errors 0 and 1 of one request, 2 and 2 of another: mean 1.25; of 0.5 and 2 the standard error
    is 1.5 / sqrt(2) / sqrt(2)."""
    records = [record(scored(2), scored(3)), record(scored(4), scored(0))]
    metrics = steering_result(records, SCHEMA, further={}).metrics
    assert metrics["steering_mae"] == 1.25
    assert metrics["steering_mae_se"] == pytest.approx(0.75)


def test_a_change_has_the_standard_error_of_paired_differences() -> None:
    """Both requests are better by 1, so that the change is certain, though the errors differ."""
    records = {
        "old": [record(scored(1), prompt="A"), record(scored(0), prompt="B")],
        "new": [record(scored(2), prompt="A"), record(scored(1), prompt="B")],
    }
    results = {name: steering_result(own, SCHEMA, further={}) for name, own in records.items()}
    compare(results, records, "old", SCHEMA)
    assert results["new"].change["steering_mae"] == -1
    assert results["new"].change["steering_mae_se"] == 0
    assert results["old"].change == {}


def test_models_that_did_not_answer_the_same_requests_are_told() -> None:
    """Records without answers are of prompts too long, or of empty answers."""
    one = [record(scored(1), prompt="A"), record(scored(0), prompt="B")]
    two = [record(scored(2), prompt="A"), record(prompt="B")]
    assert list(unequal_requests({"one": one, "two": one[::-1]})) == []
    (told,) = unequal_requests({"one": one, "two": two})
    assert told.startswith("WARNING: models.two has no answer to 1 of the 2 requests")


def test_how_many_were_empty_is_known_where_they_are_counted() -> None:
    """sample_responses leaves them out, sometimes with their record; evaluate_steering counts."""
    ended = dataclasses.replace(scored(2), finish_reason="stop")
    counted = dataclasses.replace(record(ended), extra={"empty_answers": 3})
    assert steering_result([counted], SCHEMA, further={}).metrics["empty"] == 3 / 4
    sampled = dataclasses.replace(record(ended), sampling=Sampling(1, 1.0, 1.0))
    assert "empty" not in steering_result([sampled], SCHEMA, further={}).metrics


def test_the_other_attribute_models_error() -> None:
    records = [record(scored(2), scored(3)), record(scored(4), scored(0))]
    assert independent_metrics(records, SCHEMA) == {
        "independent_mae": 1.25,
        "independent_mae_se": pytest.approx(0.75),
    }


def test_kl_is_the_mean_log_ratio_and_its_standard_error_is_over_requests() -> None:
    """Ratios 1 and 3 of one request, 4 of another: mean 8/3; of 2 and 4 the standard error is 1."""
    records = [record(drawn(-2, -3), drawn(-2, -5)), record(drawn(-1, -5))]
    assert reference_metrics(records) == {
        "kl_reference": pytest.approx(8 / 3),
        "kl_reference_se": pytest.approx(1),
        "kl_reference_answers": 3,
    }


def test_answers_of_unknown_log_probs_do_not_count() -> None:
    records = [record(drawn(-2, -3), drawn(None, -5)), record(drawn(-1, None))]
    assert reference_metrics(records) == {"kl_reference": 1, "kl_reference_answers": 1}
    assert reference_metrics([record(drawn(None, -5))]) == {}


def test_a_kl_is_that_of_the_distribution_sampled_from() -> None:
    """S is 3/4, 1/4 over two answers, P is half and half: KL(S || P) = log 2 - H(S)."""
    s, p = (0.75, 0.25), math.log(0.5)
    answers = [drawn(math.log(s[i]), p) for i in (0, 0, 0, 1)]  # as often as S draws them
    entropy = -sum(each * math.log(each) for each in s)
    found = reference_metrics([record(*answers)])
    assert found["kl_reference"] == pytest.approx(math.log(2) - entropy)
