"""Of scored responses the nearest to the label are kept, if they are near enough."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from steerlm2.data.sources.base import Unit
from steerlm2.data.sources.best_of import best_of_responses

Json = dict[str, Any]
SCHEMA = {"names": ["humor", "verbosity"]}


def response(text: str, humor: float, verbosity: float, **more: Any) -> Json:
    scores = {"humor": humor, "verbosity": verbosity}
    return {"from": "Assistant", "value": text, "scores": scores} | more


def record(label: str | None, *responses: Json, **more: Any) -> Json:
    turns = [{"from": "User", "value": "Q"}]
    known = {"system": "S", "prompt_turns": turns, "label": label, "responses": [*responses]}
    return known | more


def write(path: Path, *records: Json) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def answers(units: list[Unit]) -> list[list[tuple[str, str | None]]]:
    """Unit -> (text, label) of the last turn of each of its conversations."""
    return [[(c.turns[-1].value, c.turns[-1].label) for c in unit.conversations] for unit in units]


def best_of(path: Path, *records: Json, **options: Any) -> list[list[tuple[str, str | None]]]:
    source = write(path / "scored.jsonl", *records)
    return answers(list(best_of_responses(source, **({"schema": SCHEMA} | options))))


THREE = [response("far", 2.0, 2.0), response("near", 3.5, 0.3), response("next", 3.4, 0.4)]
"""From humor:4,verbosity:0: (2.0 + 2.0) / 2 = 2, (0.5 + 0.3) / 2 = 0.4, (0.6 + 0.4) / 2 = 0.5."""


@pytest.mark.parametrize(
    ("keep", "max_distance", "kept"),
    [
        (1, 0.5, ["near"]),
        (2, 0.51, ["near", "next"]),
        (3, 0.51, ["near", "next"]),
        (3, 0.45, ["near"]),
        (3, 2.0, ["near", "next", "far"]),
    ],
)
def test_the_nearest_are_kept(
    tmp_path: Path, keep: int, max_distance: float, kept: list[str]
) -> None:
    options = {"keep": keep, "max_distance": max_distance}
    (unit,) = best_of(tmp_path, record("humor:4,verbosity:0", *THREE), **options)
    assert [text for text, _ in unit] == kept


def test_only_what_the_label_names_counts(tmp_path: Path) -> None:
    """verbosity:2 alone: "far" has it exactly."""
    (unit,) = best_of(tmp_path, record("verbosity:2", *THREE))
    assert unit == [("far", "humor:2,verbosity:2")]


def test_distances_are_shares_of_each_attributes_range(tmp_path: Path) -> None:
    """From humor:10,verbosity:1: "a" is 3 of 10 and 0 of 4 points away, "b" 0 and 1.5. In shares,
    0.3 and 0.375, "a" is nearer; the mean width is 7, so its distance is 0.3 / 2 * 7 = 1.05."""
    mixed = {"humor": [0, 10], "verbosity": [1, 5]}
    answers_ = [response("b", 10, 2.5), response("a", 7, 1)]
    for max_distance, kept in ((1.06, [[("a", "humor:7,verbosity:1")]]), (1.0, None)):
        options = {"schema": mixed, "max_distance": max_distance}
        if kept:
            assert best_of(tmp_path, record("humor:10,verbosity:1", *answers_), **options) == kept
        else:
            with pytest.raises(ValueError, match=r"the nearest is 1\.05 away"):
                best_of(tmp_path, record("humor:10,verbosity:1", *answers_), **options)


def test_scores_beyond_the_range_are_at_its_end(tmp_path: Path) -> None:
    """5.5 and -1 are as near to 4 and 0 as can be, and of two that are the first is kept."""
    responses = [response("b", 3.9, 0.1), response("c", 5.5, -1.0), response("d", 4.0, 0.0)]
    (unit,) = best_of(tmp_path, record("humor:4,verbosity:0", *responses), max_distance=0)
    assert unit == [("c", "humor:4,verbosity:0")]


def test_the_label_is_that_of_the_responses_own_scores(tmp_path: Path) -> None:
    """Of all attributes of the schema that it has, in the schema's order: not the one asked for."""
    scored = response("a", 3.4, 1.4, scores={"verbosity": 1.4, "extra": 9.0, "humor": 3.4})
    asked = record("humor:4", scored)
    (unit,) = best_of(tmp_path, asked, max_distance=1)
    assert unit == [("a", "humor:3,verbosity:1")]
    (unit,) = best_of(tmp_path, asked, max_distance=1, schema=None)
    assert unit == [("a", "humor:3,verbosity:1")]


@pytest.mark.parametrize("reason", ["length", "other_stop", "abort", "error"])
def test_responses_that_were_cut_off_do_not_count(tmp_path: Path, reason: str) -> None:
    responses = [
        response("cut", 4, 0, finish_reason=reason),
        response("whole", 3.6, 0, finish_reason="stop"),
    ]
    (unit,) = best_of(tmp_path, record("humor:4,verbosity:0", *responses), keep=2)
    assert [text for text, _ in unit] == ["whole"]


def test_texts_that_are_not_valid_utf_8_do_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half an emoji. The character U+FFFD itself does, sampled as the tokens that it encodes to."""
    sampled = {"finish_reason": "stop", "token_ids": [1, 2]}
    responses = [
        response("half \ufffd", 4, 0, encodes_otherwise=True, **sampled),
        response("unknown \ufffd", 4, 0, finish_reason="stop"),
        response("cut", 4, 0, finish_reason="abort"),
        response("whole \ufffd", 3.6, 0, **sampled),
    ]
    with caplog.at_level(logging.WARNING):
        (unit,) = best_of(tmp_path, record("humor:4,verbosity:0", *responses), keep=4)
    assert [text for text, _ in unit] == ["whole \ufffd"]
    assert "of the responses: 1 cut off, 2 not valid UTF-8; those" in caplog.text


def test_prompt_and_unknown_keys_come_along(tmp_path: Path) -> None:
    turns = [
        {"from": "User", "value": "Q1"},
        {"from": "Assistant", "value": "A1", "label": "humor:1"},
        {"from": "User", "value": "Q2"},
    ]
    asked = record("humor:4", response("a", 4, 0), prompt_turns=turns, id=7, mask="not ours")
    (unit,) = best_of_responses(write(tmp_path / "scored.jsonl", asked))
    (conversation,) = unit.conversations
    assert [(t.role, t.value, t.label) for t in conversation.turns] == [
        ("User", "Q1", None),
        ("Assistant", "A1", "humor:1"),
        ("User", "Q2", None),
        ("Assistant", "a", "humor:4,verbosity:0"),
    ]
    assert (conversation.system, conversation.extra) == ("S", {"id": 7})


def test_a_folders_split_is_kept(tmp_path: Path) -> None:
    for name, text in (("train", "a"), ("val", "b")):
        write(tmp_path / f"{name}.jsonl", record("humor:4", response(text, 4, 0)))
    units = list(best_of_responses(tmp_path))
    assert [unit.split for unit in units] == ["train", "validation"]
    assert [[text for text, _ in unit] for unit in answers(units)] == [["a"], ["b"]]


def test_records_without_a_near_response_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far = record("humor:4", response("far", 1, 0))
    cut = record("humor:4", response("cut", 4, 0, finish_reason="length"))
    with caplog.at_level(logging.WARNING):
        kept = best_of(tmp_path, far, record("humor:4", response("a", 4, 0)), cut)
    assert [[text for text, _ in unit] for unit in kept] == [["a"]]
    assert "left out 2 of 3 records, none of whose responses is within 0.5" in caplog.text


def test_nothing_left_is_an_error_that_says_how_near_it_came(tmp_path: Path) -> None:
    """|1 - 4| = 3 and |2.75 - 4| = 1.25."""
    with pytest.raises(ValueError, match=r"of its 2 records .*; the nearest is 1\.25 away"):
        best_of(
            tmp_path,
            record("humor:4", response("a", 1, 0)),
            record("humor:4", response("b", 2.75, 0)),
        )


def test_only_cut_responses_are_an_error(tmp_path: Path) -> None:
    cut = record("humor:4", response("cut", 4, 0, finish_reason="length"))
    with pytest.raises(ValueError, match=r"all responses of its 1 records were .*\(1 cut off\)"):
        best_of(tmp_path, cut)


def test_bad_records_are_named_together(tmp_path: Path) -> None:
    unscored = {"from": "Assistant", "value": "a"}
    bad = [record(None, response("a", 4, 0)), record("humor:4", response("a", 4, 0), unscored),
           record("quality:4", response("a", 4, 0)), {"conversations": []}]  # fmt: skip
    with pytest.raises(ValueError, match=r"scored.jsonl:2: no label") as error:
        best_of(tmp_path, record("humor:4", response("good", 4, 0)), *bad)
    for problem in (
        "scored.jsonl:3: no score for humor (recipe annotate_attributes adds it)",
        "scored.jsonl:4: label 'quality:4': unknown attribute 'quality'; known: humor, verbosity",
        "scored.jsonl:5: missing 'system'",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize("options", [{"keep": 0}, {"max_distance": -0.1}])
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1 and max_distance at least 0"):
        best_of_responses("anything", **options)
