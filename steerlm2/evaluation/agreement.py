"""Agreement of attribute scores with human labels and preferences, and with requested labels.

Dimension letters: N responses, A attributes, P pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import scipy  # which imports scipy.stats when it is used: that takes a second

from steerlm2.attributes import NOT_LABELLED, AttributeSchema

CONFIDENCE_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Bins of sigmoid(|d|), the model's confidence, for the calibration of preferences."""

Table = list[dict[str, float | int | str]]
"""Rows, each with its values by column."""


def attribute_metrics(
    scores_NA: Sequence[Sequence[float]],
    labels_NA: Sequence[Sequence[float]],
    schema: AttributeSchema,
) -> dict[str, float]:
    """`mse_NAME`, `pearson_NAME`, `spearman_NAME` and `pairwise_accuracy_NAME` of every attribute.

    Pairwise accuracy is the share of pairs of responses with different labels that the scores order
    in the same way; equal scores count as half. An attribute without labels has no metrics, one
    whose labels (or scores) are all equal has no correlation.

    Args:
        scores_NA: [N, A] of the model.
        labels_NA: [N, A], NOT_LABELLED where there is none.
    """
    metrics = {}
    for name, scores_N, labels_N in _labelled(scores_NA, labels_NA, schema):
        metrics[f"mse_{name}"] = float(np.mean((scores_N - labels_N) ** 2))
        if np.ptp(scores_N) > 0 and np.ptp(labels_N) > 0:
            metrics[f"pearson_{name}"] = float(scipy.stats.pearsonr(scores_N, labels_N).statistic)
            metrics[f"spearman_{name}"] = float(scipy.stats.spearmanr(scores_N, labels_N).statistic)
        if np.ptp(labels_N) > 0:
            metrics[f"pairwise_accuracy_{name}"] = _concordance(scores_N, labels_N)
    return metrics


def mean_baseline(
    train_labels_NA: Sequence[Sequence[float]],
    labels_NA: Sequence[Sequence[float]],
    schema: AttributeSchema,
) -> dict[str, float]:
    """`mse_of_mean_NAME`: the error of always predicting the mean of the training labels."""
    means = {
        name: labels_N.mean()
        for name, _, labels_N in _labelled(train_labels_NA, train_labels_NA, schema)
    }
    return {
        f"mse_of_mean_{name}": float(np.mean((labels_N - means[name]) ** 2))
        for name, _, labels_N in _labelled(labels_NA, labels_NA, schema)
        if name in means
    }


def attribute_calibration(
    scores_NA: Sequence[Sequence[float]],
    labels_NA: Sequence[Sequence[float]],
    schema: AttributeSchema,
) -> Table:
    """For every attribute and rounded score: the number of responses, mean score and mean label."""
    rows: Table = []
    for name, scores_N, labels_N in _labelled(scores_NA, labels_NA, schema):
        rounded_N = np.clip(np.rint(scores_N), *schema.range_of(name))
        for value in np.unique(rounded_N):
            chosen_N = rounded_N == value
            rows.append(
                {
                    "attribute": name,
                    "rounded_score": int(value),
                    "responses": int(chosen_N.sum()),
                    "mean_score": float(scores_N[chosen_N].mean()),
                    "mean_label": float(labels_N[chosen_N].mean()),
                }
            )
    return rows


def preference_metrics(
    rewards_P2: Sequence[Sequence[float]], strength_P: Sequence[float]
) -> dict[str, float]:
    """`pairwise_accuracy`: the share of pairs whose preferred response has the higher reward.

    Ties (strength 0) don't count, equal rewards count as half.
    """
    right_P, _ = _decided(rewards_P2, strength_P)
    return {"pairwise_accuracy": float(right_P.mean())} if len(right_P) else {}


def preference_calibration(
    rewards_P2: Sequence[Sequence[float]], strength_P: Sequence[float]
) -> Table:
    """For every bin of the model's confidence, sigmoid(|d|): how often people prefer its choice."""
    right_P, confidence_P = _decided(rewards_P2, strength_P)
    rows: Table = []
    for low, high in itertools.pairwise(CONFIDENCE_EDGES):
        chosen_P = (confidence_P >= low) & ((confidence_P < high) | (high == 1))
        if chosen_P.any():
            rows.append(
                {
                    "confidence": f"{low:.1f} to {high:.1f}",
                    "pairs": int(chosen_P.sum()),
                    "mean_confidence": float(confidence_P[chosen_P].mean()),
                    "share_right": float(right_P[chosen_P].mean()),
                }
            )
    return rows


def steering_metrics(
    scores_NA: Sequence[Sequence[float]],
    requested_NA: Sequence[Sequence[float]],
    schema: AttributeSchema,
) -> dict[str, float]:
    """Errors of the answers' scores against the requested values, by attribute and over all.

    `mae_NAME` is the mean |score - requested value|, `exact_match_NAME` the share of scores that
    round to it, `pearson_NAME` their correlation; `steering_mae` and `steering_exact_match` are the
    means over the requested attributes. Errors of an attribute are in its own points; in
    `steering_mae` those of attributes with ranges of different widths weigh alike, by
    `AttributeSchema.error_scales` of the requested ones: points of a range of their mean width.

    Args:
        scores_NA: [N, A] of the answers, by the attribute model.
        requested_NA: [N, A] values of the answers' labels, NOT_LABELLED where a label doesn't name
            the attribute.

    Raises:
        ValueError: where no attribute was requested.
    """
    metrics = {}
    errors: dict[str, float] = {}
    hits = []
    for name, scores_N, requested_N in _labelled(scores_NA, requested_NA, schema):
        rounded_N = np.clip(np.rint(scores_N), *schema.range_of(name))
        errors[name] = float(np.abs(scores_N - requested_N).mean())
        hits.append(float((rounded_N == requested_N).mean()))
        metrics[f"mae_{name}"] = errors[name]
        metrics[f"exact_match_{name}"] = hits[-1]
        if np.ptp(scores_N) > 0 and np.ptp(requested_N) > 0:
            pearson = scipy.stats.pearsonr(scores_N, requested_N)
            metrics[f"pearson_{name}"] = float(pearson.statistic)
    if not errors:
        raise ValueError("no label names an attribute of the schema")
    scales = schema.select(errors).error_scales
    scaled = [error * scale for error, scale in zip(errors.values(), scales, strict=True)]
    means = {"steering_mae": np.mean(scaled), "steering_exact_match": np.mean(hits)}
    return {name: float(mean) for name, mean in means.items()} | metrics


def errors_by_request(
    scores_NA: Sequence[Sequence[float]],
    requested_NA: Sequence[Sequence[float]],
    request_N: Sequence[int],
    schema: AttributeSchema,
) -> dict[int, float]:
    """For every request, the mean |score - requested value| of its answers and attributes.

    Errors are scaled as in `steering_mae` of `steering_metrics`.

    Args:
        request_N: [N] the answers' requests; answers of one request are not independent.
    """
    requested = np.asarray(requested_NA, dtype=np.float64)
    error_NA = np.abs(np.asarray(scores_NA, dtype=np.float64) - requested)
    error_NA[requested == NOT_LABELLED] = np.nan
    asked = [a for a in range(len(schema.names)) if (requested[:, a] != NOT_LABELLED).any()]
    error_NA[:, asked] *= schema.select(schema.names[a] for a in asked).error_scales
    requests_N = np.asarray(request_N)
    return {
        int(request): float(np.nanmean(error_NA[requests_N == request]))
        for request in np.unique(requests_N)
    }


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of independent values; NaN of fewer than two."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def cross_talk(
    scores_NA: Sequence[Sequence[float]],
    requested_NA: Sequence[Sequence[float]],
    schema: AttributeSchema,
) -> dict[str, dict[str, float]]:
    """[requested][obtained] slopes: the change of a score for one more point of a requested value.

    They are least-squares slopes over all requested attributes at once, so that correlations
    between the requested values don't count. Ideal is 1 for an attribute itself and 0 for others.
    Points are each attribute's own, whatever its range.
    Only attributes that all labels request, with more than one value, are included.
    """
    scores = np.asarray(scores_NA, dtype=np.float64)
    requested = np.asarray(requested_NA, dtype=np.float64)
    varied = [
        a
        for a in range(len(schema.names))
        if (requested[:, a] != NOT_LABELLED).all() and np.ptp(requested[:, a]) > 0
    ]
    design = np.column_stack([requested[:, varied], np.ones(len(requested))])
    slopes, *_ = np.linalg.lstsq(design, scores, rcond=None)
    return {
        schema.names[a]: dict(zip(schema.names, slopes[row].tolist(), strict=True))
        for row, a in enumerate(varied)
    }


def steering_curve(
    scores_NA: Sequence[Sequence[float]],
    requested_NA: Sequence[Sequence[float]],
    schema: AttributeSchema,
) -> Table:
    """For every attribute and requested value: the number of answers, mean score and spread."""
    rows: Table = []
    for name, scores_N, requested_N in _labelled(scores_NA, requested_NA, schema):
        for value in np.unique(requested_N):
            chosen_N = scores_N[requested_N == value]
            rows.append(
                {
                    "attribute": name,
                    "requested": int(value),
                    "answers": len(chosen_N),
                    "mean_score": float(chosen_N.mean()),
                    "std_score": float(chosen_N.std()),
                }
            )
    return rows


def table_text(rows: Table) -> str:
    """The table as text; empty where there are no rows."""
    if not rows:
        return ""
    cells = [list(rows[0])] + [
        [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _labelled(
    scores_NA: Sequence[Sequence[float]],
    labels_NA: Sequence[Sequence[float]],
    schema: AttributeSchema,
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, scores, labels) of every attribute with labels, over the responses that have one."""
    shape = (-1, len(schema.names))
    scores = np.asarray(scores_NA, dtype=np.float64).reshape(shape)
    labels = np.asarray(labels_NA, dtype=np.float64).reshape(shape)
    known = labels != NOT_LABELLED
    return [
        (name, scores[known[:, a], a], labels[known[:, a], a])
        for a, name in enumerate(schema.names)
        if known[:, a].any()
    ]


def _concordance(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Pairwise accuracy by the Mann-Whitney statistic of every two label values, in O(N log N)."""
    groups = [scores_N[labels_N == value] for value in np.unique(labels_N)]
    right, pairs = 0.0, 0
    for lower, higher in itertools.combinations(groups, 2):
        ranks = scipy.stats.rankdata(np.concatenate([higher, lower]))[: len(higher)]
        right += ranks.sum() - len(higher) * (len(higher) + 1) / 2
        pairs += len(higher) * len(lower)
    return float(right / pairs)


def _decided(
    rewards_P2: Sequence[Sequence[float]], strength_P: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """For pairs that aren't ties: whether the rewards agree (0, 0.5 or 1), and sigmoid(|d|)."""
    rewards = np.asarray(rewards_P2, dtype=np.float64).reshape(-1, 2)
    strength = np.asarray(strength_P, dtype=np.float64)
    gap_P = (rewards[:, 1] - rewards[:, 0])[strength != 0]
    agreement_P = np.sign(gap_P) * np.sign(strength[strength != 0])
    return (agreement_P + 1) / 2, 1 / (1 + np.exp(-np.abs(gap_P)))
