"""Chat data: several answers to a prompt, as conversations, pairs and groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_rows import SCHEMA, Json, labels, read_all, scored, texts, write

from steerlm2.attributes import as_schema, label_log_probs, parse_label
from steerlm2.data.records import Record
from steerlm2.data.sources import chat_data


def ultrafeedback(*answers: tuple[str, Any, float]) -> Json:
    completions = [
        {
            "model": "m",
            "principle": "helpfulness",
            "custom_system_prompt": "Be helpful.",
            "response": text,
            "annotations": {
                "honesty": {"Rating": rating, "Rationale": "..."},
                "helpfulness": {"Rating": rating, "Rationale": "...", "Type": ["1"]},
            },
            "fine-grained_score": 3.25,
            "critique": "...",
            "overall_score": overall,
        }
        for text, rating, overall in answers
    ]
    return {"source": "s", "instruction": "Q", "models": ["m"], "completions": completions}


UF_SCHEMA = {"names": ["helpfulness", "honesty"], "min_value": 1, "max_value": 5}
UF_ROW = ultrafeedback(("A", "5", 8.0), ("B", "1", 9.0), ("C", "N/A", 2.0), ("D", "3", 5.0))


@pytest.mark.parametrize("container", ["data.jsonl", "array.json.gz", "data.csv", "data.parquet"])
def test_ultrafeedbacks_ratings_are_labels(tmp_path: Path, container: str) -> None:
    (unit,) = chat_data(write(tmp_path / container, [UF_ROW]), schema=UF_SCHEMA)
    assert texts([unit]) == [[["Q", text] for text in "ABCD"]]
    assert labels([unit]) == [
        ["helpfulness:5,honesty:5", "helpfulness:1,honesty:1", None, "helpfulness:3,honesty:3"]
    ]


@pytest.mark.parametrize(("by", "best", "worst"), [(None, "A", "B"), ("overall_score", "B", "C")])
def test_the_best_answers_are_those_of_the_highest_labels_or_of_a_column(
    tmp_path: Path, by: str | None, best: str, worst: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "data.jsonl", [UF_ROW])
    options: Json = {"schema": UF_SCHEMA, "by": by}
    assert texts(chat_data(path, keep=1, **options)) == [[["Q", best]]]
    assert "left out: 3 answers that aren't among the best" in caplog.text
    (pair,) = chat_data(path, make="pairs", strength=2, **options)
    assert texts([pair]) == [[["Q", best], ["Q", worst]]]
    assert labels([pair]) == [["helpfulness:-2"] * 2]
    assert pair.is_pair


def test_a_prompt_without_responses_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some rows of UltraFeedback have none."""
    rows = [UF_ROW | {"completions": []}, UF_ROW]
    path = write(tmp_path / "data.jsonl", rows)
    assert len(list(chat_data(path, schema=UF_SCHEMA))) == 1
    assert "left out: 1 without an answer" in caplog.text


def test_two_kept_answers_stay_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [UF_ROW])
    assert texts(chat_data(path, keep=2, schema=UF_SCHEMA)) == [[["Q", "A"], ["Q", "D"]]]


def test_a_column_to_sort_by_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [UF_ROW])
    assert "builder.by='overal' is no column" in read_all(path, by="overal", schema=UF_SCHEMA)[1]


def test_ultrafeedback_as_a_group(tmp_path: Path) -> None:
    """best: by the mean of the labels it is A. C has no rating, so the label can name nothing that
    all answers have; without C it can."""
    path = write(tmp_path / "data.jsonl", [UF_ROW])
    assert list(chat_data(path, make="groups", label="best", schema=UF_SCHEMA)) == []
    row = UF_ROW | {"completions": [c for c in UF_ROW["completions"] if c["response"] != "C"]}
    path = write(tmp_path / "data.jsonl", [row])
    (record,) = chat_data(path, make="groups", label="best", schema=UF_SCHEMA)
    assert isinstance(record, Record)
    assert record.label == "helpfulness:5,honesty:5"
    assert [turn.value for turn in record.prompt_turns] == ["Q"]
    scores = [{"helpfulness": value, "honesty": value} for value in (5.0, 1.0, 3.0)]
    assert [response.scores for response in record.responses] == scores
    expected = label_log_probs(scores, parse_label(record.label), schema=as_schema(UF_SCHEMA))
    assert [r.log_p_attributes for r in record.responses] == pytest.approx(expected, rel=1e-12)


def test_groups_keep_scores_that_are_not_whole_and_round_their_labels(tmp_path: Path) -> None:
    row = {"prompt": "Q", "responses": [scored("A", 2.6), scored("B", 2.4)]}
    (record,) = chat_data(
        write(tmp_path / "data.jsonl", [row]), make="groups", label="best", schema=SCHEMA
    )
    assert record.label == "formality:3"
    assert [response.scores for response in record.responses] == [
        {"formality": 2.6},
        {"formality": 2.4},
    ]


def test_a_label_may_be_given_to_groups_without_scores(tmp_path: Path) -> None:
    row = {"prompt": "Q", "responses": ["A", "B"]}
    path = write(tmp_path / "data.jsonl", [row])
    assert list(chat_data(path, make="groups")) == []
    (record,) = chat_data(path, make="groups", label="quality:4")
    assert record.label == "quality:4"
    assert [(r.value, r.log_p_attributes) for r in record.responses] == [("A", None), ("B", None)]


def test_a_drawn_label_depends_on_the_prompt_and_the_seed_alone(tmp_path: Path) -> None:
    rows = [
        {"prompt": str(i), "responses": [scored(str(v), v) for v in range(10)]} for i in range(9)
    ]
    options: Json = {"make": "groups", "schema": SCHEMA}
    path = write(tmp_path / "data.jsonl", rows)
    drawn = [record.label for record in chat_data(path, **options)]
    assert len({*drawn}) > 3
    assert [record.label for record in chat_data(path, seed=1, **options)] != drawn
    path = write(tmp_path / "data.jsonl", rows[4:])
    assert [record.label for record in chat_data(path, **options)] == drawn[4:]


def test_scores_may_be_lists_beside_the_responses(tmp_path: Path) -> None:
    row = {"prompt": "Q", "responses": ["A", "B"], "formality": [1, 2], "length": [3, 4]}
    path = write(tmp_path / "data.csv", [row])
    assert labels(chat_data(path, schema=SCHEMA)) == [
        ["formality:1,length:3", "formality:2,length:4"]
    ]


def test_a_list_beside_the_responses_must_be_as_long(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "responses": ["A", "B"], "formality": values, "topics": ["x"]}
        for values in ([9, 2], [9])
    ]
    units, error = read_all(write(tmp_path / "data.jsonl", rows), schema=SCHEMA)
    assert labels(units) == [["formality:9", "formality:2"]]
    assert error.endswith("data.jsonl:2: formality has 1 values for 2 responses")


def test_a_response_without_text_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "Q", "responses": [None, {"text": None}, {"text": "A"}]}]
    assert texts(chat_data(write(tmp_path / "data.jsonl", rows))) == [[["Q", "A"]]]
    assert "left out: 2 answers without text" in caplog.text


def test_rows_in_succession_with_one_prompt_are_a_group_or_a_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As HelpSteer2 has two rows of each prompt."""
    rows = [
        {"prompt": prompt, "response": text, "formality": value}
        for prompt, text, value in [("Q", "A", 1), ("Q", "B", 5), ("R", "C", 2), ("Q", "D", 3)]
    ]
    path = write(tmp_path / "data.csv", rows)
    (record,) = chat_data(path, make="groups", schema=SCHEMA)
    assert [response.value for response in record.responses] == ["A", "B"]
    assert "groups: 1, in the order of the rows; answers with a label: 2 (" in caplog.text
    assert "left out: 2 with fewer than two answers" in caplog.text
    (pair,) = chat_data(path, make="pairs", schema=SCHEMA)
    assert texts([pair]) == [[["Q", "B"], ["Q", "A"]]]


def test_equally_good_answers_are_no_pair(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "Q", "responses": [scored("A", 2), scored("B", 2)]}
    path = write(tmp_path / "data.jsonl", [row])
    assert list(chat_data(path, make="pairs", schema=SCHEMA)) == []
    assert "left out: 1 whose answers are equally good" in caplog.text


def test_a_chosen_answer_is_a_conversation_and_a_rejected_one_only_under_a_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    path = write(tmp_path / "data.jsonl", [row])
    assert texts(chat_data(path, make="conversations")) == [[["Q", "good"]]]
    assert "left out: 1 rejected answers without a label" in caplog.text
    rated_row = row | {"formality_chosen": 4, "formality_rejected": 1}
    path = write(tmp_path / "data.jsonl", [rated_row])
    (unit,) = chat_data(path, make="conversations", schema=SCHEMA)
    assert texts([unit]) == [[["Q", "good"], ["Q", "bad"]]]
    assert labels([unit]) == [["formality:4", "formality:1"]]


def test_preferences_are_no_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "Q", "chosen": "good", "rejected": "bad"}])
    assert "preferences can't be groups" in read_all(path, make="groups")[1]
