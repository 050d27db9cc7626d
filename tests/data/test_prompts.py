"""Prompts of both formats, and labels drawn for them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from steerlm2.attributes import DEFAULT_SCHEMA, AttributeSchema
from steerlm2.data.jsonl import json_line
from steerlm2.data.prompts import (
    draw_labels,
    labels_in,
    labels_like,
    parse_prompt,
    read_prompts,
    uniform_labels,
)
from steerlm2.data.records import Turn

ASK = {"from": "User", "value": "a"}
ANSWER = {"from": "Assistant", "value": "b", "label": "humor:1"}


def conversation(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"system": "s", "conversations": list(turns), **more}


def test_a_conversation_that_ends_with_an_answer() -> None:
    """The prompt is what comes before it; its label is the prompt's; earlier ones stay."""
    prompt = parse_prompt(conversation(ASK, ANSWER, ASK, ANSWER | {"label": "humor:2"}, lang="en"))
    assert (prompt.system, prompt.label, prompt.extra) == ("s", "humor:2", {"lang": "en"})
    expected = [Turn("User", "a"), Turn("Assistant", "b", "humor:1"), Turn("User", "a")]
    assert prompt.turns == expected


def test_a_conversation_that_ends_with_the_user() -> None:
    prompt = parse_prompt(conversation(ASK, ANSWER, ASK))
    assert (len(prompt.turns), prompt.label) == (3, None)


def test_an_empty_answer_is_a_place_to_fill(tmp_path: Path) -> None:
    lines = [conversation(ASK, ANSWER | {"value": ""})]
    (tmp_path / "p.jsonl").write_bytes(b"".join(map(json_line, lines)))
    assert parse_prompt(lines[0]).label == "humor:1"
    assert labels_in(tmp_path / "p.jsonl") == ["humor:1"]


def test_keys_of_a_record_in_a_conversation_are_not_taken_for_ours() -> None:
    prompt = parse_prompt(conversation(ASK, ANSWER, label="quality:1", responses=["x"]))
    assert (prompt.label, prompt.extra) == ("humor:1", {})


def test_a_record_without_responses_has_a_prompt() -> None:
    record = {"system": "s", "prompt_turns": [ASK], "label": "humor:3", "mine": 1}
    prompt = parse_prompt(record)
    assert (prompt.label, prompt.extra, len(prompt.turns)) == ("humor:3", {"mine": 1}, 1)
    assert parse_prompt(record | {"responses": [{"value": ""}]}) == prompt


@pytest.mark.parametrize(
    ("obj", "problem"),
    [
        (conversation(ANSWER), "odd count, got 0"),
        (conversation(ASK, ASK), "odd count, got 2"),
        ([], "neither a conversation"),
        ({"system": "s", "prompt_turns": [ASK, ANSWER]}, "odd count, got 2"),
    ],
)
def test_what_is_no_prompt(obj: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_prompt(obj)


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_bytes(b"".join(map(json_line, rows)))
    return path


def test_bad_lines_are_named_and_a_limit_ends_the_reading(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", conversation(ASK), conversation(ANSWER))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: "):
        read_prompts(path)
    assert len(read_prompts(path, limit=1)) == 1


def test_an_empty_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(path)
    with pytest.raises(ValueError, match="holds no labels"):
        labels_in(path)


def test_labels_of_a_file(tmp_path: Path) -> None:
    """Of every turn and record that has one, as often as they are there."""
    record = {"system": "s", "prompt_turns": [ASK], "label": "humor:3"}
    rows = [conversation(ASK, ANSWER, ASK, ANSWER), record, record | {"label": None}]
    path = written(tmp_path / "a.jsonl", *rows)
    assert labels_in(path) == ["humor:1", "humor:1", "humor:3"]


def test_uniform_labels_are_uniform() -> None:
    """3 x 3 labels, 9,000 draws: 1,000 each, within 5 standard deviations of 30."""
    schema = AttributeSchema.sharing(("x", "y", "z"), 1, 3)
    draw, rng = uniform_labels(["z", "x"], schema), random.Random(0)
    found = Counter(draw(rng) for _ in range(9000))
    assert set(found) == {f"x:{x},z:{z}" for x in (1, 2, 3) for z in (1, 2, 3)}
    assert all(abs(times - 1000) < 150 for times in found.values())


def test_uniform_labels_have_the_range_of_each_attribute() -> None:
    schema = AttributeSchema(("formality", "length"), ((0, 10), (1, 2)))
    draw, rng = uniform_labels(["length", "formality"], schema), random.Random(0)
    found = {draw(rng) for _ in range(400)}
    assert found == {f"formality:{x},length:{y}" for x in range(11) for y in (1, 2)}


def test_unknown_attributes_are_named() -> None:
    with pytest.raises(ValueError, match="unknown attribute 'size'"):
        uniform_labels(["size"], DEFAULT_SCHEMA)


def test_labels_of_a_prompt_differ_and_follow_from_its_place_and_the_seed() -> None:
    draw = labels_like(["humor:0"] * 8 + ["humor:1", "humor:2"])
    labels = [draw_labels(draw, 2, 0, index) for index in range(200)]
    assert all(len(set(pair)) == 2 for pair in labels)
    assert draw_labels(draw, 2, 0, 150) == labels[150]
    assert [draw_labels(draw, 2, 1, index) for index in range(200)] != labels
    first = Counter(pair[0] for pair in labels)
    assert first["humor:0"] == pytest.approx(160, abs=30)
