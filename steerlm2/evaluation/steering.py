"""What a model's answers come to: requested against obtained attributes, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from steerlm2.attributes import NOT_LABELLED, AttributeSchema, parse_label
from steerlm2.data.records import BROKEN, OTHER_TOKENS, UNKNOWN_TOKENS, Record, count_flaws
from steerlm2.evaluation.agreement import (
    cross_talk,
    errors_by_request,
    standard_error,
    steering_curve,
    steering_metrics,
)
from steerlm2.evaluation.examples import request_of
from steerlm2.evaluation.report import SteeringResult
from steerlm2.evaluation.texts import text_metrics

STANDARD_ERROR = "steering_mae_se"
FLAWS = {
    "not_utf8": BROKEN,
    "encoded_otherwise": OTHER_TOKENS,
    "unknown_tokens": UNKNOWN_TOKENS,
}
"""Metric -> what makes an answer another one than was sampled; the metric counts them."""
NOT_COMPARED = {
    STANDARD_ERROR,
    "independent_mae_se",
    "kl_reference_se",
    "kl_reference_answers",
    "answers",
    "left_out",
    "exact_least_steering_mae",
    *FLAWS,
}

EMPTY, TOO_LONG = "empty_answers", "prompt_too_long"
"""Keys of a record of answers: its number of empty answers, and whether its prompt is too long."""


def steering_result(
    records: Sequence[Record],
    schema: AttributeSchema,
    *,
    further: Mapping[str, float],
    sees_labels: bool = True,
) -> SteeringResult:
    """The result of one model.

    Args:
        records: its answers, with `scores` of all attributes.
        further: metrics that stand behind those of steering.
        sees_labels: whether it was asked with the labels.
    """
    answers = [answer for record in records for answer in record.responses]
    scores_NA, requested_NA, _ = _scores_and_requests(records, schema)
    metrics = steering_metrics(scores_NA, requested_NA, schema)
    errors = list(_errors(records, schema).values())
    if len(errors) > 1:
        error = {"steering_mae": metrics.pop("steering_mae")}
        metrics = error | {STANDARD_ERROR: standard_error(errors)} | metrics
    metrics |= further
    metrics |= text_metrics([answer.value for answer in answers])
    metrics["answers"] = len(answers)
    ended = [answer for answer in answers if answer.finish_reason is not None]
    if ended:
        metrics["truncated"] = sum(answer.is_cut_off for answer in ended) / len(ended)
        if all(record.sampling is None for record in records):  # sample_responses leaves them out
            empty = sum(record.extra.get(EMPTY, 0) for record in records)
            metrics["empty"] = empty / (len(answers) + empty)
    flaws = count_flaws(answers)
    metrics |= {name: flaws[cause] for name, cause in FLAWS.items() if flaws[cause]}
    if left_out := sum(record.extra.get(TOO_LONG, False) for record in records):
        metrics["left_out"] = left_out
    return SteeringResult(
        metrics,
        steering_curve(scores_NA, requested_NA, schema),
        cross_talk(scores_NA, requested_NA, schema),
        sees_labels=sees_labels,
    )


def compare(
    results: Mapping[str, SteeringResult],
    records: Mapping[str, Sequence[Record]],
    baseline: str,
    schema: AttributeSchema,
) -> None:
    """Add the changes from the baseline's metrics to the other models' results.

    Where both answered the same requests, the change of steering_mae has the standard error of the
    paired differences, which vary less than either error.
    """
    theirs = results[baseline].metrics
    for name, result in results.items():
        if name == baseline:
            continue
        result.baseline = baseline
        result.change = {
            key: value - theirs[key]
            for key, value in result.metrics.items()
            if key in theirs and key not in NOT_COMPARED
        }
        if [*map(request_of, records[name])] == [*map(request_of, records[baseline])]:
            ours, base = (_errors(records[each], schema) for each in (name, baseline))
            both = [ours[i] - base[i] for i in ours.keys() & base.keys()]
            if len(both) > 1:
                change = {"steering_mae": result.change.pop("steering_mae")}
                result.change = change | {STANDARD_ERROR: standard_error(both)} | result.change


def unequal_requests(records: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    """Warnings of models without an answer to a request that another model answered.

    A model that answers only what is easy for it would look better than those that answer all.

    Args:
        records: the answers of each model, by its name.
    """
    answered = {
        name: {request_of(record) for record in own if record.responses}
        for name, own in records.items()
    }
    asked = set().union(*answered.values())
    for name, own in answered.items():
        if missing := len(asked - own):
            yield (
                f"WARNING: models.{name} has no answer to {missing} of the {len(asked)} requests "
                "that the models answered: its metrics are of the others, and not comparable with "
                "theirs"
            )


def independent_metrics(records: Sequence[Record], schema: AttributeSchema) -> dict[str, float]:
    """`independent_mae` and `independent_mae_se`: the steering error by another attribute model.

    A model that was trained to please one attribute model can please it by what that one gets
    wrong (Gao et al. 2023, scaling laws for reward model overoptimization); one that was trained on
    other labels doesn't get the same wrong.

    Args:
        records: answers with that model's `scores`.
    """
    scores_NA, requested_NA, _ = _scores_and_requests(records, schema)
    mean = steering_metrics(scores_NA, requested_NA, schema)["steering_mae"]
    return {"independent_mae": mean} | _error_of(
        "independent_mae", list(_errors(records, schema).values())
    )


def reference_metrics(records: Sequence[Record]) -> dict[str, float]:
    """`kl_reference`: KL in nats of what was sampled, S(y|a,x), from a reference model P(y|x).

    The mean over answers y of log S(y|a,x) - log P(y|x), with S as it was sampled from: tempered
    and cut where the sampling was. An answer that was cut off counts up to there. Its standard
    error is over requests.

    Args:
        records: answers with `log_p_response`; those without a `sampler_log_prob` don't count.

    Returns:
        Nothing where no answer counts.
    """
    by_request = [
        [
            answer.sampler_log_prob - answer.log_p_response
            for answer in record.responses
            if answer.sampler_log_prob is not None and answer.log_p_response is not None
        ]
        for record in records
    ]
    ratios = [ratio for own in by_request for ratio in own]
    if not ratios:
        return {}
    means = [sum(own) / len(own) for own in by_request if own]
    mean = sum(ratios) / len(ratios)
    error = _error_of("kl_reference", means)
    return {"kl_reference": mean} | error | {"kl_reference_answers": len(ratios)}


def _error_of(metric: str, by_request: Sequence[float]) -> dict[str, float]:
    return {f"{metric}_se": standard_error(by_request)} if len(by_request) > 1 else {}


def _errors(records: Sequence[Record], schema: AttributeSchema) -> dict[int, float]:
    return errors_by_request(*_scores_and_requests(records, schema), schema)


def _scores_and_requests(
    records: Sequence[Record], schema: AttributeSchema
) -> tuple[list[list[float]], list[list[float]], list[int]]:
    """Each answer's scores [N, A], requested values [N, A] and index of its record [N]."""
    scores_NA, requested_NA, index_N = [], [], []
    for index, record in enumerate(records):
        wanted = parse_label(str(record.label), schema)
        for answer in record.responses:
            scores = answer.scores or {}
            scores_NA.append([float(scores[name]) for name in schema.names])
            requested_NA.append([float(wanted.get(name, NOT_LABELLED)) for name in schema.names])
            index_N.append(index)
    return scores_NA, requested_NA, index_N
