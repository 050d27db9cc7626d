"""Chat data: which values of a row are labels, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_rows import SCHEMA, Json, labels, messages, own, read_all, texts, told, write

from steerlm2.data.sources import chat_data


def rated(*values: Any) -> list[Json]:
    return [{"prompt": f"Q{i}", "response": "A", "formality": v} for i, v in enumerate(values)]


@pytest.mark.parametrize("container", ["data.jsonl", "data.csv"])
def test_whole_numbers_are_labels_however_they_are_written(tmp_path: Path, container: str) -> None:
    path = write(tmp_path / container, rated(3, 4.0, "5", " 6.0 ", "1e1"))
    assert labels(chat_data(path, schema=SCHEMA)) == [
        [f"formality:{value}"] for value in (3, 4, 5, 6, 10)
    ]


def test_answers_without_a_value_have_no_label_of_it_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row | {"length": 1} for row in rated(3, None, "", "N/A", float("nan"))]
    path = write(tmp_path / "data.jsonl", rows)
    assert labels(chat_data(path, schema=SCHEMA)) == [
        ["formality:3,length:1"],
        *[["length:1"]] * 4,
    ]
    assert "answers with a label: 5 (without a value: formality 4)" in caplog.text


def test_labels_of_turns_count_as_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = [("User", "Q", None), ("Assistant", "A", "formality:3,length:1")]
    said += [("User", "Q", None), ("Assistant", "B", "formality:4")]
    turns = [
        {"from": role, "value": text} | ({"label": label} if label else {})
        for role, text, label in said
    ]
    path = write(tmp_path / "data.jsonl", [{"system": "S", "conversations": turns}])
    list(chat_data(path, schema=SCHEMA))
    assert "answers with a label: 2 (without a value: length 1)" in caplog.text


@pytest.mark.parametrize("value", [3.5, "3.5", True, "high", [3], 11, -1, "1e999", "3,5", "1_0"])
def test_other_values_are_refused_with_their_row(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path / "data.jsonl", rated(3, value))
    units, error = read_all(path, schema=SCHEMA)
    assert labels(units) == [["formality:3"]]
    assert error.startswith(f"{path}:2: formality must be a ")


def test_values_are_rounded_only_when_asked_and_only_into_the_range(tmp_path: Path) -> None:
    """Halves to even, as in the published data; 10.4 is beyond the range, whatever it rounds to."""
    path = write(tmp_path / "data.jsonl", rated(2.5, "3.5", 9.6, 10.4, 11))
    units, error = read_all(path, schema=SCHEMA, round_scores=True)
    assert labels(units) == [["formality:2"], ["formality:4"], ["formality:10"]]
    assert "data.jsonl:4: formality must be a number from 0 to 10, got 10.4" in error
    assert "data.jsonl:5: formality must be a whole number from 0 to 10, got 11" in error


def test_columns_of_the_schema_are_labels_whatever_their_case(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"Prompt": "Q", "Response": "A", "Length ": 2, "Formality": 1, "id": 7, "note": "n"}
    (unit,) = chat_data(write(tmp_path / "data.csv", [row]), schema=SCHEMA)
    assert labels([unit]) == [["formality:1,length:2"]]
    assert "labels: formality=Formality, length=Length; numbers that are no labels: id" in (
        caplog.text
    )
    assert "not used: note" in caplog.text


def test_without_a_schema_the_default_attributes_that_have_numbers_are_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """HelpSteer's; a text under an attribute's name is none, and a new name needs its range."""
    row = {"prompt": "Q", "response": "A", "helpfulness": 3, "formality": 9, "quality": "high"}
    (unit,) = chat_data(write(tmp_path / "data.jsonl", [row]))
    assert labels([unit]) == [["helpfulness:3"]]
    assert "numbers that are no labels: formality (state them" in caplog.text
    assert "not used: quality" in caplog.text


def test_attributes_that_are_named_leave_out_the_others(tmp_path: Path) -> None:
    rows = [row | {"length": 2} for row in rated(1)]
    path = write(tmp_path / "data.jsonl", rows)
    assert labels(chat_data(path, schema=SCHEMA, attributes=["length"])) == [["length:2"]]
    assert labels(chat_data(path, schema=SCHEMA, attributes=[])) == [[None]]


def test_an_attribute_that_is_named_and_that_no_answer_has_is_refused(tmp_path: Path) -> None:
    _, error = read_all(
        write(tmp_path / "data.jsonl", rated(1)), schema=SCHEMA, attributes=["length"]
    )
    assert "no answer has a value of length" in error


@pytest.mark.parametrize("key", ["scores", "labels", "attributes", "annotations"])
def test_attributes_in_an_object_are_labels(tmp_path: Path, key: str) -> None:
    rows = [{"prompt": "Q", "response": "A", key: {"formality": 1, "length": 2}}]
    path = write(tmp_path / "data.csv", rows)
    assert labels(chat_data(path, schema=SCHEMA)) == [["formality:1,length:2"]]


def test_a_label_column_and_labels_of_messages_are_labels(tmp_path: Path) -> None:
    row: Json = {"prompt": "Q", "response": "A", "label": "quality:3,humor:0"}
    assert labels(chat_data(write(tmp_path / "data.csv", [row]))) == [["quality:3,humor:0"]]
    turns = [*messages("Q"), {"role": "assistant", "content": "A", "label": "humor:4"}]
    row = {"messages": [*turns, *messages("R"), {**turns[1], "label": "humor:9"}]}
    rows = [{"messages": turns}, row]
    units, error = read_all(write(tmp_path / "data.jsonl", rows))
    assert labels(units) == [["humor:4"]]
    assert "humor must be a whole number from 0 to 4, got 9" in error


def test_values_in_a_message_are_labels_of_its_turn(tmp_path: Path) -> None:
    told_values = {"role": "assistant", "content": "A", "formality": 3, "scores": {"length": "2"}}
    ask = messages("Q")
    rows = [
        {"messages": [*ask, told_values, *ask, told("assistant", "B")]},
        {"messages": [*ask, {"role": "assistant", "content": "A", "label": {"formality": 1}}]},
    ]
    units = list(chat_data(write(tmp_path / "data.parquet", rows), schema=SCHEMA))
    assert [turn.label for turn in units[0].conversations[0].turns] == [
        *(None, "formality:3,length:2"),
        *(None, None),
    ]
    assert labels(units) == [[None], ["formality:1"]]


def test_columns_of_our_conversations_are_labels_of_the_last_answer(tmp_path: Path) -> None:
    rows = [{"conversations": own("Q", "A", "R", "B"), "formality": 3}]
    (unit,) = chat_data(write(tmp_path / "data.jsonl", rows), schema=SCHEMA)
    assert [turn.label for turn in unit.conversations[0].turns[1::2]] == [None, "formality:3"]


def test_what_a_message_has_besides_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thought = {"role": "assistant", "content": "A", "reasoning_content": "Hm."}
    list(chat_data(write(tmp_path / "data.jsonl", [{"messages": [*messages("Q"), thought]}])))
    assert "not used: reasoning_content" in caplog.text


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("formality: 9, length: 2", "'formality: 9' is not of the form name:number"),
        ("length:2,formality:90", "formality must be a whole number from 0 to 10, got 90"),
        ("politeness:3", "unknown attribute 'politeness'"),
        (5, "label must be a label or an object, got 5"),
    ],
)
def test_labels_that_are_wrong_are_refused_not_left_aside(
    tmp_path: Path, label: Any, said: str
) -> None:
    rows = [{"prompt": "Q", "response": "A", "label": text} for text in ("n/a", "length:1", label)]
    units, error = read_all(write(tmp_path / "data.jsonl", rows), schema=SCHEMA)
    assert labels(units) == [[None], ["length:1"]]
    assert f"data.jsonl:3: {said}" in error or f"data.jsonl:3: label '{label}': {said}" in error


def test_a_label_and_a_column_must_not_differ(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "response": "A", "label": "formality:3", "formality": value}
        for value in (3, 9)
    ]
    units, error = read_all(write(tmp_path / "data.jsonl", rows), schema=SCHEMA)
    assert labels(units) == [["formality:3"]]
    assert error.endswith("its label has formality:3, its column formality 9")


def test_labels_without_an_answer_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"messages": messages("Q", "A", "R"), "formality": 3}
    (unit,) = chat_data(write(tmp_path / "data.jsonl", [row]), schema=SCHEMA)
    assert texts([unit]) == [[["Q", "A", "R"]]]
    assert "left out: 1 labels of rows that end with the user's turn" in caplog.text


def test_turns_in_one_text_can_be_split_as_helpsteer2_has_them(tmp_path: Path) -> None:
    prompt = "Q\n<extra_id_1>Assistant\nA\n<extra_id_1>User\nR"
    path = write(tmp_path / "data.jsonl", [{"prompt": prompt, "response": "B", "formality": 1}])
    assert texts(chat_data(path)) == [[[prompt, "B"]]]
    assert texts(chat_data(path, split_turns=True)) == [[["Q", "A", "R", "B"]]]
