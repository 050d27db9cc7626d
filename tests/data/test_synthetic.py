"""The synthetic data: deterministic, honest, varied, and small enough for a first run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from steerlm2.attributes import DEFAULT_SCHEMA, beta_log_prob, parse_label
from steerlm2.data.records import parse_record, record_to_json
from steerlm2.data.synthetic import (
    ATTRIBUTES,
    MAX_RESPONSES,
    build_tiny_tokenizer,
    score_text,
    steering_metrics,
    synthetic_records,
)
from steerlm2.data.templates import encode_prompt, encode_response, extra_id_template
from steerlm2.data.tokenizers import TINY_TOKENIZER_DIR, tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "humor", "verbosity"),
    [
        ("Paris.", 0, 0),  # 1 word
        ("", 0, 0),
        ("Wow! Paris. Ha ha!", 2, 0),  # exclamations aren't words
        ("The capital of France is Paris.", 0, 1.25),  # 6 words: (6 - 1) / 4
        ("It is Rome. That is all. Yay!", 1, 1.25),
        ("a " * 17, 0, 4),  # (17 - 1) / 4
        ("a " * 50 + "!!!!!!", 4, 0),  # capped; and one long exclamation
        ("a " * 50, 0, 4),
    ],
)
def test_score_text_counts(text: str, humor: float, verbosity: float) -> None:
    assert score_text(text) == {"humor": humor, "verbosity": verbosity}


def test_records_are_valid_and_say_that_they_are_synthetic() -> None:
    for record in synthetic_records(50, 6, seed=0):
        obj = record_to_json(record)
        assert obj["synthetic"] is True
        assert parse_record(obj, require=("log_p_attributes",), schema=DEFAULT_SCHEMA) == record


def test_log_p_attributes_is_the_likelihood_of_the_label_given_the_text() -> None:
    for record in synthetic_records(20, 5, seed=1):
        wanted = parse_label(record.label or "")
        assert tuple(wanted) == ATTRIBUTES
        for response in record.responses:
            scores = score_text(response.value)
            assert response.scores == scores
            log_p = beta_log_prob([[scores[a] for a in ATTRIBUTES]], [[*wanted.values()]]).sum()
            assert response.log_p_attributes == pytest.approx(log_p.item(), rel=1e-12)
            assert (response.log_p_response, response.log_q) == (None, None)


@pytest.mark.parametrize("n", [2, 7, MAX_RESPONSES])
def test_a_group_has_n_different_responses(n: int) -> None:
    for record in synthetic_records(20, n, seed=2):
        assert len({response.value for response in record.responses}) == n


def test_the_same_seed_gives_the_same_records_and_another_seed_others() -> None:
    assert synthetic_records(30, 4, seed=5) == synthetic_records(30, 4, seed=5)
    first, other = synthetic_records(30, 4, seed=5), synthetic_records(30, 4, seed=6)
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_splits_share_no_prompt_with_its_label_whatever_the_seed() -> None:
    def pairs(seed: int, split: Literal["train", "validation"]) -> set[tuple[str, str | None]]:
        records = synthetic_records(4000, 2, seed, split)
        return {(record.prompt_turns[0].value, record.label) for record in records}

    train, validation = pairs(0, "train"), pairs(1, "validation")
    assert len(train) > 3000
    assert len(validation) > 300
    assert train.isdisjoint(validation)


def test_labels_and_responses_cover_the_whole_range() -> None:
    records = synthetic_records(500, 8, seed=0)
    labels = [parse_label(record.label or "") for record in records]
    scores = [response.scores or {} for record in records for response in record.responses]
    for name in ATTRIBUTES:
        assert {label[name] for label in labels} == {0, 1, 2, 3, 4}
        assert {round(score[name]) for score in scores} == {0, 1, 2, 3, 4}


def test_texts_are_short_in_tokens() -> None:
    """Prompts 40 to 80 tokens, responses (stop token included) 4 to 50."""
    tokenizer, template = tiny_tokenizer(), extra_id_template()
    for record in synthetic_records(300, 8, seed=0):
        prompt = encode_prompt(
            template, tokenizer, record.system, record.prompt_turns, record.label
        )
        assert 40 <= len(prompt) <= 80
        for response in record.responses:
            assert 4 <= len(encode_response(template, tokenizer, response.value)) <= 50


def test_all_problems_of_the_arguments_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"split.*num_records.*from 2 to 100, got 1"):
        synthetic_records(0, 1, 0, "test")  # type: ignore[arg-type]


def test_the_shipped_tokenizer_is_the_one_that_the_generator_trains(tmp_path: Path) -> None:
    """After a change of the synthetic texts: build_tiny_tokenizer(TINY_TOKENIZER_DIR)."""
    build_tiny_tokenizer(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        file.name for file in TINY_TOKENIZER_DIR.iterdir()
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        built, shipped = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for folder in (tmp_path, TINY_TOKENIZER_DIR)
        )
        assert built == shipped


def test_steering_metrics_are_mean_absolute_errors() -> None:
    """humor: |2 - 1| and |0 - 2|, mean 1.5. verbosity: |1 - 0| (one word) alone. The answer whose
    label names neither, and the one without a label, count for nothing."""
    answers = [
        ("humor:2,verbosity:1", "Paris. Wow!"),
        ("humor:0", "Wow! Yay! Rome."),
        ("quality:4", "Yay! Yay! Yay!"),
        (None, "Yay!"),
    ]
    labels, responses = zip(*answers, strict=True)
    metrics = steering_metrics(["?"] * 4, labels, responses)
    assert metrics == {"mae_humor": 1.5, "mae_verbosity": 1.0}


def test_steering_metrics_of_answers_without_labels_are_none() -> None:
    assert steering_metrics(["?"], [None], ["Paris."]) == {}


def test_steering_metrics_want_a_label_for_each_response() -> None:
    with pytest.raises(ValueError, match="zip"):
        steering_metrics(["?"], [None], ["Paris.", "Rome."])
