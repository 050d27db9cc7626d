"""The grammar as a source: its splits hold out pairs, or nothing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import pytest
from scipy.stats import chisquare

from steerlm2.data.grammar import answers, grammar_pairs, grammar_prompts, prompts
from steerlm2.data.sources.grammar import grammar_draws, grammar_pairs_to_ask
from steerlm2.data.sources.rows import Split
from steerlm2.data.synthetic import score_text

Draw = tuple[str, str, str]


def draws(source: str, num: int, num_val: int, **options: Any) -> dict[Split, list[Draw]]:
    """Split -> (question, label, answer) of every conversation, in order."""
    found: dict[Split, list[Draw]] = {"train": [], "validation": []}
    for unit in grammar_draws(source, num=num, num_val=num_val, **options):
        ((question, answer),) = (conversation.turns for conversation in unit.conversations)
        assert unit.split is not None
        found[unit.split].append((question.value, answer.label or "", answer.value))
    return found


def test_held_out_pairs_are_for_validation_only() -> None:
    found = draws("held_out", 2000, 1000)
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 2000,
        "validation": 1000,
    }
    for split, rows in found.items():
        own = {(question, label) for question, label, _ in rows}
        assert own <= set(grammar_pairs(split))


def test_all_pairs_are_for_both_and_the_draws_differ() -> None:
    """Of 500 pairs, validation draws have held-out ones and training ones: so have training draws.
    The same seed twice gives the same, and the two splits of one seed aren't the same draws."""
    found = draws("all", 1000, 1000)
    held_out = set(grammar_pairs("validation"))
    for rows in found.values():
        own = [(question, label) in held_out for question, label, _ in rows]
        assert 0 < sum(own) < 1000
    assert found["train"] != found["validation"]
    assert found == draws("all", 1000, 1000)
    assert found["train"] != draws("all", 1000, 1000, seed=1)["train"]


@pytest.mark.parametrize(("source", "labels"), [("all", "sampled"), ("held_out", None)])
def test_answers_are_those_of_p_where_nothing_is_left_out(source: str, labels: Any) -> None:
    """P(humor score | x) of one question over 6,000 draws of 20 questions; an answer is left out of
    the training data only with the label of a held-out pair."""
    question = prompts()[0]
    table = answers(question)
    expected: dict[float, float] = defaultdict(float)
    for text, log_p in zip(table.texts, table.log_p_N.tolist(), strict=True):
        expected[score_text(text)["humor"]] += math.exp(log_p)
    drawn = Counter(
        score_text(answer)["humor"]
        for asked, _, answer in draws(source, 6000, 0, labels=labels)["train"]
        if asked == question
    )
    total = sum(drawn.values())
    assert total > 200
    observed = [drawn[score] for score in expected]
    assert chisquare(observed, [p * total for p in expected.values()]).pvalue > 0.001


def test_without_labels_there_are_none() -> None:
    assert {label for _, label, _ in draws("held_out", 50, 0, labels=None)["train"]} == {""}


def test_no_validation_draws() -> None:
    assert draws("held_out", 3, 0)["validation"] == []


def test_prompts_are_the_pairs_of_each_split_in_order() -> None:
    records = list(grammar_pairs_to_ask("held_out"))
    assert [record.split for record in records] == ["train"] * 400 + ["validation"] * 100
    expected = [*grammar_prompts("train"), *grammar_prompts("validation")]
    assert [(r.prompt_turns, r.label, r.responses) for r in records] == [
        (r.prompt_turns, r.label, r.responses) for r in expected
    ]
    everything = list(grammar_pairs_to_ask("all"))
    assert [record.split for record in everything] == ["train"] * 500
    assert [(r.prompt_turns[0].value, r.label) for r in everything] == grammar_pairs("all")


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("train", {}, "source must be 'held_out' or 'all'"),
        ("all", {"num": 0}, "num must be at least 1 and num_val at least 0, got 0 and 1"),
        ("all", {"num_val": -1}, "num must be at least 1 and num_val at least 0, got 1 and -1"),
        ("all", {"labels": "drawn"}, "labels must be 'sampled', 'rounded' or null, got 'drawn'"),
    ],
)
def test_mistakes_are_named_at_once(source: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grammar_draws(source, **({"num": 1, "num_val": 1} | changes))


def test_another_source_of_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="source must be 'held_out' or 'all'"):
        grammar_pairs_to_ask("validation")
