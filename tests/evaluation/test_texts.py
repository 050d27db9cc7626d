"""Length and variety of answers."""

from __future__ import annotations

import pytest

from steerlm2.evaluation.texts import text_metrics


def test_metrics_by_hand() -> None:
    """Of 3 + 2 + 4 words "a a b", "a b", "a b a b": 2 of 9 are different; pairs aa ab | ab | ab ba
    ab: 3 of 6.
    """
    assert text_metrics(["a a b", "a b", "a b a b"]) == pytest.approx(
        {
            "words_mean": 3,
            "words_median": 3,
            "words_p90": 3.8,
            "distinct_1": 2 / 9,
            "distinct_2": 3 / 6,
        }
    )


def test_answers_of_one_word_have_no_pairs() -> None:
    assert "distinct_2" not in text_metrics(["yes", "no"])
