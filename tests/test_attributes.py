"""Labels are exact strings; the Beta likelihood is a finite, normalised, precise probability."""

from __future__ import annotations

import json
import math
import random
import shlex
import subprocess
import sys
from collections import Counter
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
import yaml

from steerlm2.attributes import (
    DEFAULT_SCHEMA,
    AttributeSchema,
    UnknownAttributes,
    as_schema,
    beta_log_prob,
    check_same_attributes,
    draw_label,
    encode_label,
    label_log_probs,
    label_of_scores,
    parse_label,
    read_label,
    schema_argument,
    schema_to_json,
    value_problems,
)

SMALLEST = math.log(5e-324)


def test_label_follows_schema_order_not_argument_order() -> None:
    assert encode_label({"verbosity": 2, "quality": 4, "humor": 0.0}) == (
        "quality:4,humor:0,verbosity:2"
    )


def test_parse_label_inverts_encode_label() -> None:
    values = {name: i % 5 for i, name in enumerate(DEFAULT_SCHEMA.names)}
    assert parse_label(encode_label(values), DEFAULT_SCHEMA) == values


def test_own_schema_gives_names_order_and_range() -> None:
    schema = AttributeSchema.sharing(("warmth", "rigor"), -1, 1)
    assert encode_label({"rigor": 1, "warmth": -1}, schema) == "warmth:-1,rigor:1"
    assert parse_label("warmth:-1,rigor:1", schema) == {"warmth": -1, "rigor": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "at least one"),
        ({"kindness": 1}, "unknown attribute 'kindness'; known: quality, toxicity"),
        ({"quality": 5}, "quality must be a whole number from 0 to 4, got 5"),
        ({"quality": -1}, "got -1"),
        ({"quality": 2.5}, "got 2.5"),
        ({"quality": math.nan}, "got nan"),
        ({"quality": True}, "got True"),
        ({"quality": "4"}, "got '4'"),
    ],
)
def test_encode_label_refuses(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_label(values)


def test_encode_label_names_all_problems() -> None:
    with pytest.raises(ValueError, match=r"'kindness'.*quality must"):
        encode_label({"kindness": 1, "quality": 9})


@pytest.mark.parametrize(
    "piece",
    [
        *("", "quality", "quality:", ":4", "quality:4.0", "quality: 4", " quality:4", "quality:04"),
        *("quality:+4", "quality:4_0", "quality:four", "quality:-0", "quality:4\n", "a b:4", "q:٤"),
    ],
)
def test_malformed_piece_is_named(piece: str) -> None:
    with pytest.raises(ValueError, match="not of the form name:number") as error:
        parse_label(f"humor:1,{piece}")
    assert repr(piece) in str(error.value)
    assert "'humor:1' is not" not in str(error.value)


def test_unknown_names_alone_are_an_error_of_their_own() -> None:
    """With another mistake in the label it is a bad label."""
    with pytest.raises(UnknownAttributes, match="unknown attribute 'wit'") as error:
        parse_label("wit:9,quality:1,grace:1", DEFAULT_SCHEMA)
    assert error.value.names == ("wit", "grace")
    with pytest.raises(ValueError, match=r"unknown attribute 'wit'.*from 0 to 4") as other:
        parse_label("wit:9,quality:5", DEFAULT_SCHEMA)
    assert type(other.value) is ValueError


def test_nan_scores_have_no_label() -> None:
    schema = AttributeSchema(("wit", "rigor", "grace"))
    with pytest.raises(ValueError, match="the score of rigor, grace is NaN"):
        label_of_scores([1.0, math.nan, math.nan], schema)
    assert label_of_scores([1.0, math.inf, -math.inf], schema) == "wit:1,rigor:4,grace:0"


def test_parse_label_refuses_duplicates() -> None:
    with pytest.raises(ValueError, match="'humor' is given twice"):
        parse_label("humor:1,quality:2,humor:1")


def test_parse_label_checks_names_and_range_only_with_a_schema() -> None:
    assert parse_label("kindness:17") == {"kindness": 17}
    with pytest.raises(ValueError, match=r"unknown attribute 'kindness'.*got 9"):
        parse_label("kindness:17,humor:9", DEFAULT_SCHEMA)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ()}, "at least one"),
        ({"names": "quality"}, "must be a list"),
        ({"names": ("a", "a")}, "differ"),
        ({"names": ("a:b",)}, "'a:b'"),
        ({"names": ("a b",)}, "'a b'"),
        ({"names": ("",)}, "''"),
        ({"min_value": 4}, "min_value 4 must be below max_value 4"),
        ({"max_value": 4.5}, "max_value must be a whole number"),
        ({"names": ["a"], "maximum": 4}, "unknown keys maximum; known: names"),
        ({"maximum": 4}, r"the range of maximum must be \[lowest, highest\], .* got 4"),
        ({"a": [0, 1, 2]}, "range of a must be"),
        ({"a": [0, 4.0]}, r"two whole numbers, got \[0, 4.0\]"),
        ({"a": [False, True]}, "two whole numbers"),
        ({"a": "04"}, "two whole numbers, got '04'"),
        ({"a": [4, 4]}, "range of a must begin below its end, got 4 to 4"),
        ({"a": [0, 1], "b": [2, 1]}, "range of b must begin below"),
        ({"a": [-100, 0]}, "range of a, -100 to 0, holds -100, which stands for 'not labelled'"),
        ({"min_value": -101, "max_value": 9}, "range of all attributes, -101 to 9, holds"),
        ({"a b": [0, 4]}, "'a b'"),
        ({True: [0, 4]}, "the name True must be text of"),
        ({'"><script>alert(1)</script>': [0, 4]}, "must be text of at most 64 letters, digits"),
        ({"a|b": [0, 4]}, r"the name 'a\|b' must be"),
        ({"a$b$": [0, 4]}, "must be text of"),
        ({"\x1b[31mred": [0, 4]}, r"the name '\\x1b\[31mred' must be"),
        ({"%s{}": [0, 4]}, "must be text of"),
        ({"a" * 65: [0, 4]}, "at most 64"),
        ({".hidden": [0, 4]}, "must be text of"),
        ({"names": [0, 4], "a": [0, 4]}, "can't be called names, min_value, max_value or ranges"),
        ({"names": ["a", "b"], "ranges": [[0, 1]]}, "2 names need as many ranges, got 1"),
        ({"names": ["a"], "ranges": [[0, 1]], "min_value": 0}, "ranges, or min_value"),
    ],
)
def test_schema_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_schema(arguments)


def test_names_are_words_of_any_script() -> None:
    names = ("漢字", "überlänge", "follows-3.5_rules", "_x")
    assert as_schema({name: [0, 4] for name in names}).names == names


def test_schema_from_a_config_section() -> None:
    schema = as_schema({"names": ["warmth"], "max_value": 2})
    assert schema == AttributeSchema.sharing(("warmth",), 0, 2)
    assert as_schema(None) is DEFAULT_SCHEMA
    assert as_schema(schema) is schema


def test_beta_log_prob_by_hand() -> None:
    """score 2 of 0..4: r = 0.5; concentration 2: alpha = beta = 1, the uniform distribution.

    midpoint edges 0, 1/8, 3/8, 5/8, 7/8, 1 -> 1/8, 1/4, 1/4, 1/4, 1/8; five equal bins -> 1/5.
    """
    scores = torch.full((5, 1), 2.0, dtype=torch.float64)
    values = torch.arange(5)[:, None]
    midpoint = beta_log_prob(scores, values, concentration=2.0).exp()
    uniform = beta_log_prob(scores, values, concentration=2.0, bins="uniform").exp()
    torch.testing.assert_close(
        midpoint[:, 0], torch.tensor([1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8], dtype=torch.float64)
    )
    torch.testing.assert_close(uniform[:, 0], torch.full((5,), 0.2, dtype=torch.float64))


SCORES = np.array([-3.0, 0.0, 0.001, 0.4, 1.0, 1.7, 2.0, 2.9, 3.3, 3.999, 4.0, 7.0])
EDGES = {
    "midpoint": [0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1],
    "uniform": [0, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1],
}


def _all_values(scores: np.ndarray, **arguments: Any) -> torch.Tensor:
    """[scores, 5]: the log-probability of every value for every score."""
    scores_NA = torch.tensor(scores, dtype=torch.float64)[:, None].expand(-1, 5)
    return beta_log_prob(scores_NA, torch.arange(5), **arguments)


@pytest.mark.parametrize("bins", ["midpoint", "uniform"])
def test_beta_log_prob_matches_scipy_stats(bins: str) -> None:
    """P = CDF(upper) - CDF(lower) of Beta(24 r, 24 - 24 r), from scipy.stats, to 1e-12 absolute."""
    ratio = np.clip(SCORES / 4, 1e-6, 1 - 1e-6)[:, None]
    cdf = scipy.stats.beta.cdf(EDGES[bins], 24 * ratio, 24 - 24 * ratio)
    np.testing.assert_allclose(
        _all_values(SCORES, bins=bins).exp().numpy(), np.diff(cdf), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("bins", ["midpoint", "uniform"])
def test_beta_log_prob_is_precise_in_both_tails(bins: str) -> None:
    """log P against 60-digit arithmetic, also where P is 1e-28 and 1 - CDF would be zero."""
    got = _all_values(SCORES, bins=bins).numpy()
    with mpmath.workdps(60):
        for i, score in enumerate(SCORES):
            ratio = min(max(score / 4, 1e-6), 1 - 1e-6)
            alpha = 24.0 * ratio
            for k in range(5):
                low, high = EDGES[bins][k], EDGES[bins][k + 1]
                exact = mpmath.betainc(alpha, 24.0 - alpha, low, high, regularized=True)
                assert got[i, k] == pytest.approx(float(mpmath.log(exact)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("bins", ["midpoint", "uniform"])
@pytest.mark.parametrize("concentration", [0.5, 24.0, 5000.0])
def test_probabilities_sum_to_one(bins: str, concentration: float) -> None:
    total = _all_values(SCORES, bins=bins, concentration=concentration).exp().sum(dim=1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bins", ["midpoint", "uniform"])
def test_the_value_that_the_score_equals_is_likeliest(bins: str) -> None:
    log_p = _all_values(np.arange(5.0), bins=bins)
    assert log_p.argmax(dim=1).tolist() == [0, 1, 2, 3, 4]


def test_impossible_values_get_the_floor_not_infinity() -> None:
    """Concentration 1e6 leaves no mass 4 steps away: the smallest positive double, ln = -744.44."""
    log_p = beta_log_prob(torch.tensor([[0.0, 4.0]]), torch.tensor([[4, 0]]), concentration=1e6)
    assert log_p.tolist() == [[pytest.approx(SMALLEST), pytest.approx(SMALLEST)]]


@pytest.mark.parametrize("score", [-math.inf, -3.0, 0.0, 4.0, 7.0, math.inf])
def test_scores_outside_the_range_are_clipped_into_it(score: float) -> None:
    inside = min(max(score, 0.0), 4.0)
    log_p = _all_values(np.array([score]))
    assert torch.isfinite(log_p).all()
    assert torch.equal(log_p, _all_values(np.array([inside])))


def test_mirror_symmetry() -> None:
    """P(a=k | score s) = P(a=4-k | score 4-s): both tails are computed equally well."""
    mirrored = _all_values(4 - SCORES[1:-1]).flip(1)
    torch.testing.assert_close(_all_values(SCORES[1:-1]), mirrored, rtol=1e-9, atol=1e-12)


def test_own_range_is_the_default_one_shifted() -> None:
    """Range -2..2 is 0..4 shifted by 2: the same probabilities."""
    schema = AttributeSchema.sharing(("a",), -2, 2)
    shifted = beta_log_prob(torch.tensor([[-0.7]]), torch.tensor([[1]]), schema=schema)
    torch.testing.assert_close(shifted, beta_log_prob(torch.tensor([[1.3]]), torch.tensor([[3]])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_result_has_the_dtype_of_the_scores_but_the_precision_of_float64(
    dtype: torch.dtype,
) -> None:
    scores = torch.tensor([[1.5, 0.25]], dtype=dtype)
    log_p = beta_log_prob(scores, torch.tensor([[3, 4]]))
    assert log_p.dtype == dtype
    exact = beta_log_prob(scores.double(), torch.tensor([[3, 4]]))
    assert torch.equal(log_p, exact.to(dtype))


def test_python_floats_count_as_float64_and_values_broadcast() -> None:
    log_p = beta_log_prob([[1.5, 0.25], [4, 2]], [3, 4])
    expected = beta_log_prob(
        torch.tensor([[1.5, 0.25], [4, 2]], dtype=torch.float64), torch.tensor([[3, 4], [3, 4]])
    )
    assert log_p.dtype == torch.float64
    assert torch.equal(log_p, expected)


@pytest.mark.parametrize(
    ("scores", "values", "arguments", "message"),
    [
        ([[1.0, math.nan]], [[1, 1]], {}, "1 of 2 scores are NaN"),
        ([[1.0]], [[5]], {}, "whole numbers from 0 to 4, got 5"),
        ([[1.0]], [[-1]], {}, "got -1"),
        ([[1.0]], [[1.5]], {}, "got 1.5"),
        ([[1.0]], [[math.nan]], {}, "got nan"),
        ([[1.0]], [[1, 2]], {}, r"values of shape \(1, 2\) don't fit scores of \(1, 1\)"),
        ([[1.0]], [[1]], {"bins": "equal"}, "'midpoint' or 'uniform', got 'equal'"),
        ([[1.0]], [[1]], {"concentration": 0.0}, "positive number, got 0.0"),
        ([[1.0]], [[1]], {"concentration": math.nan}, "positive number, got nan"),
        ([[math.nan]], [[9]], {"bins": "?"}, "bins.*NaN.*got 9"),
    ],
)
def test_beta_log_prob_refuses(scores: list, values: list, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beta_log_prob(torch.tensor(scores), torch.tensor(values), **arguments)


def test_label_of_scores_clips_and_rounds() -> None:
    """-0.7 -> 0, 1.49 -> 1, 1.51 -> 2, 7 -> 4: all attributes, in the order of the schema."""
    schema = AttributeSchema(("a", "b", "c", "d"))
    assert label_of_scores([-0.7, 1.49, 1.51, 7.0], schema) == "a:0,b:1,c:2,d:4"


def test_label_of_scores_in_another_range() -> None:
    """-3 to 3: -9 -> -3, -0.4 -> 0."""
    schema = AttributeSchema.sharing(("a", "b"), -3, 3)
    assert label_of_scores([-9.0, -0.4], schema) == "a:-3,b:0"


@pytest.mark.parametrize("bins", ["midpoint", "uniform"])
def test_drawn_labels_follow_the_beta_rule(bins: str) -> None:
    """Scores 0.8 and 1.3 of a scale from 0 to 2: each of 3 x 3 labels is drawn as often as the
    product of P(a = i | 0.8) and P(b = j | 1.3) says. Chi-square on 3,000 draws, 8 degrees of
    freedom: 26.1 is exceeded once in 1,000 times.
    """
    schema = AttributeSchema.sharing(("a", "b"), 0, 2)
    scores, values = [0.8, 1.3], range(3)
    drawn = [draw_label(scores, random.Random(f"{i}"), 4.0, bins, schema) for i in range(3000)]
    expected = {
        f"a:{i},b:{j}": 3000
        * beta_log_prob([scores], [[i, j]], 4.0, bins, schema).sum().exp().item()
        for i in values
        for j in values
    }
    assert min(expected.values()) > 5
    assert sum(expected.values()) == pytest.approx(3000)
    chi_square = sum((drawn.count(label) - n) ** 2 / n for label, n in expected.items())
    assert chi_square < 26.1


def test_a_drawn_label_follows_from_its_random_numbers() -> None:
    scores = [1.5] * len(DEFAULT_SCHEMA.names)
    one, again, other = (draw_label(scores, random.Random(seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert tuple(parse_label(one, DEFAULT_SCHEMA)) == DEFAULT_SCHEMA.names


def test_label_log_probs_add_up_what_the_label_names() -> None:
    """log P(verbosity = 3 | 2.6) + log P(humor = 0 | 1.2); the score of quality doesn't count."""
    scores = [{"quality": 4.0, "humor": 1.2, "verbosity": 2.6}, {"humor": 0.0, "verbosity": 3.0}]
    expected = [
        beta_log_prob([own["verbosity"]], [3.0]).item()
        + beta_log_prob([own["humor"]], [0.0]).item()
        for own in scores
    ]
    assert label_log_probs(scores, {"verbosity": 3, "humor": 0}) == pytest.approx(
        expected, rel=1e-15
    )


# Ranges of their own

MIXED = AttributeSchema(("formality", "length"), ((0, 10), (1, 5)))


def test_a_schema_is_the_same_in_every_form() -> None:
    mixed = {"formality": [0, 10], "length": [1, 5]}
    assert as_schema(mixed) == MIXED == as_schema({"names": [*mixed], "ranges": [*mixed.values()]})
    assert as_schema({"humor": [0, 4], "wit": [0, 4]}) == as_schema({"names": ["humor", "wit"]})
    assert as_schema({name: [0, 4] for name in DEFAULT_SCHEMA.names}) == DEFAULT_SCHEMA
    assert as_schema({"length": [1, 5], "formality": [0, 10]}) != MIXED
    assert as_schema(mixed | {"length": [1, 6]}) != MIXED


@pytest.mark.parametrize(
    "schema", [DEFAULT_SCHEMA, MIXED, AttributeSchema.sharing(("names", "max_value"), -2, 9)]
)
def test_json_gives_the_schema_again_whatever_sorts_its_keys(schema: AttributeSchema) -> None:
    text = json.dumps(schema_to_json(schema), sort_keys=True)
    assert as_schema(json.loads(text)) == schema


def test_a_part_of_a_schema_has_its_ranges_in_the_order_asked_for() -> None:
    assert MIXED.select(["length", "formality"]) == as_schema(
        {"length": [1, 5], "formality": [0, 10]}
    )
    assert MIXED.select(["length"]).shared_range == (1, 5)
    with pytest.raises(UnknownAttributes, match="unknown attribute 'wit'; known: formality, len"):
        MIXED.select(["length", "wit"])


def test_labels_have_the_range_of_each_attribute() -> None:
    assert encode_label({"length": 5, "formality": 10}, MIXED) == "formality:10,length:5"
    both = "formality must be a whole number from 0 to 10, got 11; length must be .* 1 to 5, got 0"
    with pytest.raises(ValueError, match=both):
        parse_label("formality:11,length:0", MIXED)
    assert label_of_scores([11.2, 0.2], MIXED) == "formality:10,length:1"
    assert value_problems("length", 4.5, MIXED, whole=False) == []
    assert value_problems("length", 0.5, MIXED, whole=False) == [
        "length must be a number from 1 to 5, got 0.5"
    ]


def test_a_label_is_read_in_the_order_of_the_schema() -> None:
    assert read_label("length:5,formality:0", MIXED) == "formality:0,length:5"
    assert read_label("length:5,formality:0", None) == "length:5,formality:0"


@pytest.mark.parametrize("bins", ["midpoint", "uniform"])
def test_beta_rule_of_each_attribute_matches_scipy_stats(bins: str) -> None:
    """Every column by itself in float64: r = (score - low) / (high - low), K = high - low + 1 bins;
    their inner edges lie at (k - 1/2) / (K - 1), or at k / K.
    """
    scores = np.array([[0.0, 1.0], [2.7, 1.2], [5.0, 3.0], [9.99, 4.4], [12.0, 0.0]])
    values = np.array([[0, 1], [3, 2], [4, 5], [10, 4], [9, 1]])
    got = beta_log_prob(scores, values, bins=bins, schema=MIXED).exp().numpy()
    for a, (low, high) in enumerate(MIXED.ranges):
        num = high - low + 1
        inner = [(k - 0.5) / (num - 1) if bins == "midpoint" else k / num for k in range(1, num)]
        edges = np.array([0, *inner, 1])
        ratio = np.clip((scores[:, a] - low) / (high - low), 1e-6, 1 - 1e-6)
        beta = scipy.stats.beta(24 * ratio, 24 - 24 * ratio)
        k = values[:, a] - low
        expected = beta.cdf(edges[k + 1]) - beta.cdf(edges[k])
        np.testing.assert_allclose(got[:, a], expected, rtol=0, atol=1e-12)


def test_columns_of_different_ranges_are_the_attributes() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 1\) need one .*: formality 0 to 10, len"):
        beta_log_prob([[1.0]], [[1]], schema=MIXED)
    with pytest.raises(ValueError, match="whole numbers from 1 to 5, got 6"):
        beta_log_prob([[1.0, 1.0]], [[6, 6]], schema=MIXED)


def test_label_log_probs_take_each_attributes_range_whatever_the_labels_order() -> None:
    scores = [{"formality": 7.3, "length": 2.2}]
    expected = [
        beta_log_prob([[scores[0][name]]], [[value]], schema=MIXED.select([name])).item()
        for name, value in (("length", 2), ("formality", 7))
    ]
    (got,) = label_log_probs(scores, {"length": 2, "formality": 7}, schema=MIXED)
    assert got == pytest.approx(sum(expected), rel=1e-15)
    (got,) = label_log_probs(scores, {"length": 2}, schema=MIXED)
    assert got == expected[0]
    with pytest.raises(UnknownAttributes, match="'wit'"):
        label_log_probs([{"wit": 1.0}], {"wit": 1}, schema=MIXED)


def test_drawn_values_stay_in_the_range_of_each_attribute() -> None:
    """Of 600 draws at concentration 2, uniform over each range: all 11 and all 5 values occur."""
    rng = random.Random(0)
    drawn = [parse_label(draw_label([5, 3], rng, 2.0, "uniform", MIXED)) for _ in range(600)]
    assert {own["formality"] for own in drawn} == set(range(11))
    assert {own["length"] for own in drawn} == set(range(1, 6))
    counts = Counter(own["length"] for own in drawn)
    assert all(abs(number - 120) < 50 for number in counts.values())  # 5 standard deviations


def test_errors_of_all_attributes_weigh_alike_as_shares_of_their_ranges() -> None:
    """Widths 10 and 4: mean 7, so 7/10 and 7/4; equal widths: exactly 1."""
    assert MIXED.error_scales == (0.7, 1.75)
    assert set(DEFAULT_SCHEMA.error_scales) == {1.0}
    assert AttributeSchema(("a", "b", "c"), ((0, 7), (-3, 4), (1, 8))).error_scales == (1, 1, 1)


def test_other_attributes_than_trained_are_refused_with_both_lists() -> None:
    check_same_attributes(MIXED, MIXED, "it")
    check_same_attributes(MIXED, ["formality", "length"], "it")
    with pytest.raises(ValueError, match="it scores length, formality; the schema has formality, "):
        check_same_attributes(MIXED, ["length", "formality"], "it")
    wider = as_schema({"formality": [0, 10], "length": [1, 6]})
    with pytest.raises(ValueError, match="length 1 to 6; the schema has formality 0 to 10, leng"):
        check_same_attributes(MIXED, wider, "it")


def test_a_schema_as_an_argument_gives_it_again() -> None:
    assert schema_argument(AttributeSchema(("a", "b"))) == "schema.names=[a,b]"
    (word,) = shlex.split(schema_argument(MIXED))
    assert as_schema(yaml.safe_load(word.removeprefix("schema="))) == MIXED


def test_import_loads_neither_torch_nor_scipy() -> None:
    code = (
        "import sys, steerlm2.attributes, steerlm2.data.records\n"
        "print(sorted({'torch', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
