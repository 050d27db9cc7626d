"""Agreement with human labels: by hand, and by the definitions that go over all pairs."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm2.attributes import NOT_LABELLED, AttributeSchema
from steerlm2.evaluation.agreement import (
    CONFIDENCE_EDGES,
    attribute_calibration,
    attribute_metrics,
    cross_talk,
    errors_by_request,
    mean_baseline,
    preference_calibration,
    preference_metrics,
    standard_error,
    steering_curve,
    steering_metrics,
    table_text,
)

NO = NOT_LABELLED
ONE = AttributeSchema(("humor",))
TWO = AttributeSchema(("humor", "verbosity"))


def of_one(scores: list[float], labels: list[float]) -> dict[str, float]:
    """Metrics of a single attribute, by their names without it."""
    metrics = attribute_metrics([[s] for s in scores], [[v] for v in labels], ONE)
    return {name.removesuffix("_humor"): value for name, value in metrics.items()}


def test_pearson_by_hand() -> None:
    """Scores 1 2 4 5, labels 0 2 1 3: means 3 and 1.5, deviations -2 -1 1 2 and -1.5 .5 -.5 1.5.

    sum of products 3 - .5 - .5 + 3 = 5; squares 10 and 5: 5 / sqrt(50).
    """
    assert of_one([1, 2, 4, 5], [0, 2, 1, 3])["pearson"] == pytest.approx(5 / math.sqrt(50))


def test_spearman_by_hand() -> None:
    """The same order with a wild last score: ranks 1 2 3 4 and 1 3 2 4, 1 - 6 * 2 / (4 * 15)."""
    assert of_one([1, 2, 4, 500], [0, 2, 1, 3])["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_spearman_gives_equal_labels_their_mean_rank() -> None:
    """Scores 1 2 3: ranks 1 2 3. Labels 1 1 4: ranks 1.5 1.5 3. Deviations -1 0 1, -.5 -.5 1:
    1.5 / sqrt(2 * 1.5).
    """
    assert of_one([1, 2, 3], [1, 1, 4])["spearman"] == pytest.approx(1.5 / math.sqrt(3))


def test_mean_squared_error_by_hand() -> None:
    """((1 - 0)^2 + (2 - 4)^2) / 2."""
    assert of_one([1, 2], [0, 4])["mse"] == 2.5


def test_pairwise_accuracy_by_hand() -> None:
    """Labels 0 1 1 2, scores 1 3 1 2. Of 5 pairs with different labels 0<1 is right, 0<1 a draw,
    0<2 right, 1<2 wrong (3 > 2), 1<2 right: 3.5 / 5.
    """
    assert of_one([1, 3, 1, 2], [0, 1, 1, 2])["pairwise_accuracy"] == 3.5 / 5


@given(st.lists(st.tuples(st.integers(-2, 6), st.integers(0, 4)), min_size=2, max_size=30))
def test_pairwise_accuracy_is_its_definition(pairs: list[tuple[int, int]]) -> None:
    """Over all pairs of texts with different labels; few values, so that there are many ties."""
    credits = [
        0.5 if a == b else float((a > b) == (label_a > label_b))
        for (a, label_a), (b, label_b) in itertools.combinations(pairs, 2)
        if label_a != label_b
    ]
    scores, labels = zip(*pairs, strict=True)
    accuracy = of_one(list(scores), list(labels)).get("pairwise_accuracy")
    if credits:
        assert accuracy == pytest.approx(sum(credits) / len(credits), abs=1e-12)
    else:
        assert accuracy is None


def test_equal_labels_leave_only_the_error() -> None:
    """Neither a correlation nor an order: 0 / 0 isn't reported as nan."""
    assert of_one([1, 3], [2, 2]) == {"mse": 1}


def test_equal_scores_have_no_correlation_and_half_the_pairs() -> None:
    assert of_one([2, 2], [0, 4]) == {"mse": 4, "pairwise_accuracy": 0.5}


def test_a_single_text_has_only_its_error() -> None:
    assert of_one([1.5], [1]) == {"mse": 0.25}


def test_unlabelled_values_do_not_count() -> None:
    """humor: texts 1 and 3; verbosity: none of them, so it has no metrics."""
    metrics = attribute_metrics([[1, 9], [50, 9], [2, 9]], [[0, NO], [NO, NO], [4, NO]], TWO)
    assert metrics == {
        "mse_humor": 2.5,
        "pearson_humor": pytest.approx(1),
        "spearman_humor": pytest.approx(1),
        "pairwise_accuracy_humor": 1,
    }


def test_every_attribute_has_its_own_column() -> None:
    metrics = attribute_metrics([[0, 1], [0, 3]], [[1, 1], [1, 1]], TWO)
    assert metrics == {"mse_humor": 1, "mse_verbosity": 2}


def test_no_texts_have_no_metrics() -> None:
    assert attribute_metrics([], [], TWO) == {}
    assert attribute_calibration([], [], TWO) == []


def test_mean_baseline_predicts_the_training_mean() -> None:
    """Training labels 1 and 3, mean 2: ((0 - 2)^2 + (3 - 2)^2) / 2. verbosity isn't in training,
    so there is nothing to predict it with.
    """
    train = [[1, NO], [3, NO], [NO, NO]]
    assert mean_baseline(train, [[0, 1], [3, 2]], TWO) == {"mse_of_mean_humor": 2.5}


def test_calibration_of_attributes_by_hand() -> None:
    """Scores rounded: 0.2 -> 0; 0.6 and 1.4 -> 1; 9 -> 4, the range's end; -3 -> 0."""
    scores = [[0.2], [0.6], [1.4], [9.0], [-3.0]]
    labels = [[0.0], [1.0], [3.0], [4.0], [1.0]]
    rows = attribute_calibration(scores, labels, ONE)
    assert [tuple(row.values()) for row in rows] == [
        ("humor", 0, 2, pytest.approx(-1.4), 0.5),
        ("humor", 1, 2, pytest.approx(1.0), 2.0),
        ("humor", 4, 1, 9.0, 4.0),
    ]


def test_calibration_counts_every_labelled_text_once() -> None:
    """3 labels of humor, 2 of verbosity."""
    scores = [[0.5, 1.5], [2.5, 3.5], [4.0, 0.0]]
    rows = attribute_calibration(scores, [[0, 0], [1, NO], [2, 2]], TWO)
    counts = {
        name: sum(int(row["responses"]) for row in rows if row["attribute"] == name)
        for name in TWO.names
    }
    assert counts == {"humor": 3, "verbosity": 2}


def test_calibration_uses_the_range_of_the_schema() -> None:
    """-2 to 2: a score of -7 is rounded to -2."""
    schema = AttributeSchema.sharing(("mood",), -2, 2)
    (row,) = attribute_calibration([[-7.0]], [[-2.0]], schema)
    assert row["rounded_score"] == -2


def test_preference_accuracy_by_hand() -> None:
    """Below 0 the first is preferred. right, wrong, equal rewards (half), right; the tie is left
    out: 2.5 / 4.
    """
    rewards = [[2, 1], [2, 1], [1, 1], [0, 5], [9, 0]]
    assert preference_metrics(rewards, [-1, 3, 2, 1, 0]) == {"pairwise_accuracy": 2.5 / 4}


@pytest.mark.parametrize("strengths", [[], [0, 0]])
def test_ties_alone_have_no_accuracy(strengths: list[float]) -> None:
    rewards = [[1, 2]] * len(strengths)
    assert preference_metrics(rewards, strengths) == {}
    assert preference_calibration(rewards, strengths) == []


def test_calibration_of_preferences_by_hand() -> None:
    """sigmoid(|d|): d = 0 -> 0.5; ln 3 -> 0.75 twice, one of them wrong; 800 -> 1 exactly, which
    belongs to the last bin; ln 1.5 -> 0.6 begins the second.
    """
    ln3 = math.log(3)
    rewards = [[0, 0], [ln3, 0], [ln3, 0], [0, 800], [0.0, math.log(1.5) + 1e-9]]
    rows = preference_calibration(rewards, [1, -2, 2, 3, 1])
    assert [tuple(row.values()) for row in rows] == [
        ("0.5 to 0.6", 1, 0.5, 0.5),
        ("0.6 to 0.7", 1, pytest.approx(0.6), 1.0),
        ("0.7 to 0.8", 2, pytest.approx(0.75), 0.5),
        ("0.9 to 1.0", 1, 1.0, 1.0),
    ]


@given(st.lists(st.tuples(st.floats(-50, 50), st.integers(-3, 3)), max_size=30))
def test_every_decided_pair_is_in_one_bin(pairs: list[tuple[float, int]]) -> None:
    rows = preference_calibration([[0, gap] for gap, _ in pairs], [s for _, s in pairs])
    assert sum(int(row["pairs"]) for row in rows) == sum(strength != 0 for _, strength in pairs)
    assert len(rows) < len(CONFIDENCE_EDGES)


def test_calibration_as_text() -> None:
    rows = attribute_calibration([[0.25]], [[1.0]], ONE)
    assert table_text(rows).splitlines() == [
        "attribute  rounded_score  responses  mean_score  mean_label",
        "-" * 59,
        "    humor              0          1       0.250       1.000",
    ]
    assert table_text([]) == ""


# Steering: answers against the labels that they were asked for

PAIR = AttributeSchema(("humor", "verbosity"))


def test_steering_metrics_by_hand() -> None:
    """humor: |1 - 0|, |3.4 - 3| = 1, 0.4; verbosity, asked for once: |2 - 4| = 2. Only 3.4 rounds
    to what was asked for: half of humor, none of verbosity. Both attributes count the same."""
    metrics = steering_metrics([[1, 9], [3.4, 2]], [[0, NOT_LABELLED], [3, 4]], PAIR)
    assert metrics["mae_humor"] == pytest.approx(0.7)
    assert metrics["mae_verbosity"] == pytest.approx(2.0)
    assert metrics["steering_mae"] == pytest.approx((0.7 + 2.0) / 2)
    assert (metrics["exact_match_humor"], metrics["exact_match_verbosity"]) == (0.5, 0.0)
    assert metrics["steering_exact_match"] == pytest.approx(0.25)
    assert metrics["pearson_humor"] == pytest.approx(1.0)
    assert "pearson_verbosity" not in metrics


def test_steering_needs_something_asked_for() -> None:
    with pytest.raises(ValueError, match="no label names an attribute"):
        steering_metrics([[1, 2]], [[NOT_LABELLED, NOT_LABELLED]], PAIR)


def test_errors_by_request_by_hand() -> None:
    """Request 3: |1 - 0|, |2 - 4| and |3 - 3| (verbosity isn't asked for): 1; request 5: 0.5, 0."""
    scores, requested = [[1, 2], [3, 9], [0.5, 4]], [[0, 4], [3, NOT_LABELLED], [0, 4]]
    assert errors_by_request(scores, requested, [3, 3, 5], PAIR) == pytest.approx({3: 1.0, 5: 0.25})


def test_standard_error_by_hand() -> None:
    """Of 1, 2, 3: standard deviation 1, over the root of 3. One value has none."""
    assert standard_error([1, 2, 3]) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(standard_error([1]))


def test_cross_talk_is_the_slope_with_the_other_attribute_held() -> None:
    """score = asked humor + 0.5 asked verbosity for humor, 0.25 asked verbosity for verbosity, on a
    grid in which both are asked for together."""
    requested = [[float(h), float(v)] for h in range(5) for v in range(5) if abs(h - v) < 3]
    scores = [[h + 0.5 * v, 0.25 * v + 1] for h, v in requested]
    slopes = cross_talk(scores, requested, PAIR)
    assert slopes["humor"] == pytest.approx({"humor": 1.0, "verbosity": 0.0}, abs=1e-9)
    assert slopes["verbosity"] == pytest.approx({"humor": 0.5, "verbosity": 0.25}, abs=1e-9)


def test_cross_talk_leaves_out_what_is_always_the_same() -> None:
    requested = [[0.0, 2.0], [4.0, 2.0]]
    assert list(cross_talk([[0, 1], [4, 1]], requested, PAIR)) == ["humor"]


def test_steering_curve_has_a_row_a_requested_value() -> None:
    rows = steering_curve([[1, 0], [3, 0], [4, 0]], [[2, 0], [2, 0], [4, 0]], PAIR)
    assert rows[0] == {
        "attribute": "humor",
        "requested": 2,
        "answers": 2,
        "mean_score": 2.0,
        "std_score": 1.0,
    }
    assert [(row["attribute"], row["requested"]) for row in rows[1:]] == [
        ("humor", 4),
        ("verbosity", 0),
    ]


MIXED = AttributeSchema(("formality", "length"), ((0, 10), (1, 5)))


def test_attributes_of_different_ranges_weigh_alike_in_the_mean_error() -> None:
    """formality: |7 - 8|, |2 - 0| of a width of 10, length: |1 - 3|, |5 - 5| of 4: shares 0.15 and
    0.25, of the mean width of 7. Each attribute's own errors stay points. Scores are rounded within
    the range: 11 to 10."""
    scores, requested = [[7, 1], [2, 5]], [[8, 3], [0, 5]]
    metrics = steering_metrics(scores, requested, MIXED)
    assert (metrics["mae_formality"], metrics["mae_length"]) == (1.5, 1.0)
    assert metrics["steering_mae"] == pytest.approx((0.15 + 0.25) / 2 * 7)
    by_request = errors_by_request(scores, requested, [0, 1], MIXED)
    assert by_request == pytest.approx({0: (0.1 + 0.5) / 2 * 7, 1: (0.2 + 0) / 2 * 7})
    assert steering_metrics([[11, 1]], [[10, 1]], MIXED)["exact_match_formality"] == 1


def test_an_error_of_one_attribute_alone_is_in_its_points() -> None:
    """Nothing is asked of formality, so its width counts nowhere."""
    scores, requested = [[7, 1], [2, 5]], [[NOT_LABELLED, 3], [NOT_LABELLED, 5]]
    assert steering_metrics(scores, requested, MIXED)["steering_mae"] == 1
    assert errors_by_request(scores, requested, [0, 1], MIXED) == {0: 2, 1: 0}


def test_calibration_rounds_within_each_range() -> None:
    rows = attribute_calibration([[10.8, 0.3]], [[10, 1]], MIXED)
    assert [(row["attribute"], row["rounded_score"]) for row in rows] == [
        ("formality", 10),
        ("length", 1),
    ]
