"""Chat data: every layout in every container, and how a layout is found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from chat_rows import (
    CONTAINERS,
    GZIPPED,
    SCHEMA,
    TOLD_A,
    Json,
    as_parquet,
    labels,
    messages,
    own,
    read_all,
    scored,
    sharegpt,
    texts,
    told,
    write,
)

from steerlm2.data.sources import chat_data
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT, SplitRecord


class Case(NamedTuple):
    """Four rows of a layout: a good one, one to be left out, a bad one, a good one."""

    rows: list[Json]
    texts: list[list[list[str]]]
    """Of each unit, each conversation, each turn of the good ones."""
    left_out: str
    problem: str


CASES = {
    "messages": Case(
        [
            {"messages": [told("developer", "Be brief."), *messages("Q", "A", "R", "B")]},
            {"messages": [*messages("Q", "A"), told("tool", "12")]},
            {"messages": [*messages("Q"), told("robot", "A")]},
            {"messages": messages("S", "C")},
        ],
        [[["Q", "A", "R", "B"]], [["S", "C"]]],
        "1 with tool calls or tool turns",
        "unknown role 'robot'",
    ),
    "sharegpt": Case(
        [
            {"conversations": [{"from": "system", "value": "Be brief."}, *sharegpt("Q", "A")]},
            {"conversations": sharegpt("Q", " ")},
            {"conversations": [{"from": "alien", "value": "Q"}, *sharegpt("Q", "A")]},
            {"conversations": sharegpt("S", "C", "T")},
        ],
        [[["Q", "A"]], [["S", "C", "T"]]],
        "1 with an empty answer",
        "unknown role 'alien'",
    ),
    "alpaca": Case(
        [
            {"instruction": "Add.", "input": "1, 2", "output": "3", "length": 1},
            {"instruction": "Add.", "input": "", "output": "", "length": 1},
            {"instruction": "Add.", "input": "", "output": "A", "length": 77},
            {"instruction": "Sing.", "input": "", "output": "La", "length": None},
        ],
        [[["Add.\n\n1, 2", "3"]], [["Sing.", "La"]]],
        "1 with an empty answer",
        "length must be a whole number from 0 to 10, got 77",
    ),
    "prompt_response": Case(
        [
            {"question": 'Say "a, b";\n', "answer": "c\td", "formality": 3},
            {"question": " ", "answer": "A", "formality": 3},
            {"question": "Q", "answer": "A", "formality": -1},
            {"question": "R", "answer": "B", "formality": 10},
        ],
        [[['Say "a, b";\n', "c\td"]], [["R", "B"]]],
        "1 without a prompt",
        "formality must be a whole number from 0 to 10, got -1",
    ),
    "conversational prompt_response": Case(
        [
            {"prompt": [told("system", "Be brief."), *messages("Q")], "completion": TOLD_A},
            {"prompt": messages("Q"), "completion": [told("function", "f()")]},
            {"prompt": [told("nobody", "Q")], "completion": TOLD_A},
            {"prompt": messages("Q", "A", "R"), "completion": TOLD_A},
        ],
        [[["Q", "A"]], [["Q", "A", "R", "A"]]],
        "1 with tool calls or tool turns",
        "prompt[0]: unknown role 'nobody'",
    ),
    "preference": Case(
        [
            {"prompt": "Q", "chosen": "good", "rejected": "bad"},
            {"prompt": "Q", "chosen": "same", "rejected": "same"},
            {"prompt": "Q", "chosen": '[{"role": "nobody", "content": "x"}]', "rejected": "bad"},
            {"prompt": "R", "chosen": "fine", "rejected": "poor"},
        ],
        [[["Q", "good"], ["Q", "bad"]], [["R", "fine"], ["R", "poor"]]],
        "1 whose two answers are the same",
        "chosen[0]: unknown role 'nobody'",
    ),
    "conversational preference": Case(
        [
            {"chosen": messages("Q", "A", "R", "good"), "rejected": messages("Q", "A", "R", "bad")},
            {"chosen": messages("Q", "good"), "rejected": messages("R", "bad")},
            {"chosen": [*messages("Q"), told("nobody", "A")], "rejected": messages("Q", "bad")},
            {"chosen": messages("S", "fine"), "rejected": messages("S", "poor")},
        ],
        [[["Q", "A", "R", "good"], ["Q", "A", "R", "bad"]], [["S", "fine"], ["S", "poor"]]],
        "1 whose two conversations differ before their last answers",
        "chosen[1]: unknown role 'nobody'",
    ),
    "spelled preference": Case(
        [
            {
                "chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: good",
                "rejected": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: bad",
            },
            {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q"},
            {"chosen": "Q: what\nA: good", "rejected": "Q: what\nA: bad"},
            {"chosen": "Human: S\n\nAssistant: a", "rejected": "Human: S\n\nAssistant: b"},
        ],
        [[["Q", "A", "R", "good"], ["Q", "A", "R", "bad"]], [["S", "a"], ["S", "b"]]],
        "1 without an answer",
        "'chosen' is one text and there is no prompt column",
    ),
    "responses": Case(
        [
            {"prompt": "Q", "responses": [scored("A", 1), scored(" ", 2), scored("B", 3)]},
            {"prompt": "", "responses": [scored("A", 1), scored("B", 2)]},
            {"prompt": "R", "responses": [scored("A", 1), scored("B", 12)]},
            {"prompt": "S", "responses": [scored("C", 4)]},
        ],
        [[["Q", "A"], ["Q", "B"]], [["S", "C"]]],
        "1 answers without text, 1 without a prompt",
        "formality must be a whole number from 0 to 10, got 12",
    ),
    "prompts": Case(
        [{"prompt": "Q"}, {"prompt": " "}, {"prompt": [told("nobody", "x")]}, {"prompt": "R"}],
        [[["Q"]], [["R"]]],
        "1 without a prompt",
        "prompt[0]: unknown role 'nobody'",
    ),
    "conversations": Case(
        [
            {"system": "Be brief.", "conversations": own("Q", "A", "R", "B")},
            {"system": "", "conversations": own("Q", "")},
            {"system": "", "conversations": [{"from": "Robot", "value": "Q"}]},
            {"system": "", "conversations": own("S", "C")},
        ],
        [[["Q", "A", "R", "B"]], [["S", "C"]]],
        "1 with an empty answer",
        "conversations[0]: 'from' must be 'User' or 'Assistant', got 'Robot'",
    ),
}
CASES["prompts"].rows[2]["prompt"] = json.dumps(CASES["prompts"].rows[2]["prompt"])


@pytest.mark.parametrize("container", [*CONTAINERS, *GZIPPED])
@pytest.mark.parametrize("layout", CASES)
def test_good_rows_are_read_in_order_and_others_are_counted_or_named(
    tmp_path: Path, layout: str, container: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The bad row is the third: line 4 of a table whose cells have no line breaks, because the
    first line has the names."""
    case = CASES[layout]
    path = write(tmp_path / container, case.rows)
    units, error = read_all(path, schema=SCHEMA)
    assert texts(units) == case.texts
    is_table = "csv" in container or "tsv" in container
    line_breaks = sum(
        value.count("\n")
        for row in case.rows[:2]
        for value in row.values()
        if isinstance(value, str)
    )
    number = 4 + line_breaks if is_table else 3
    assert error.startswith(f"{path}:{number}: ")
    assert case.problem in error
    assert len(error.splitlines()) == 1
    assert f"{path}: read as {layout.split()[-1]} (" in caplog.text
    assert "rows: 4; " in caplog.text
    assert f"left out: {case.left_out}; bad: 1" in caplog.text


@pytest.mark.parametrize(
    ("layout", "system"),
    [
        ("messages", "Be brief."),
        ("sharegpt", "Be brief."),
        ("conversational prompt_response", "Be brief."),
        ("conversations", "Be brief."),
        ("alpaca", DEFAULT_SYSTEM_PROMPT),
    ],
)
def test_system_texts_are_the_rows_own_where_it_has_one(
    tmp_path: Path, layout: str, system: str
) -> None:
    (unit,) = chat_data(write(tmp_path / "data.jsonl", CASES[layout].rows[:1]))
    assert unit.conversations[0].system == system


def test_a_system_column_is_used_and_an_empty_cell_is_none(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "response": "A", "system": text} for text in ("Be brief.", "")]
    units = chat_data(write(tmp_path / "data.csv", rows), system_prompt="Hello.")
    assert [unit.conversations[0].system for unit in units] == ["Be brief.", "Hello."]


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "with tool calls"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "with tool calls"),
        ({"role": "function", "content": "3"}, "with tool calls"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "with content that isn't text"),
        ({"role": "system", "content": "Now be brief."}, "with a system message after"),
        ({"role": "assistant", "content": "A", "weight": 0}, "with an answer of weight 0"),
        ({"role": "assistant", "content": None}, "with an empty answer"),
    ],
)
def test_messages_that_no_conversation_can_hold_are_left_out_by_cause(
    tmp_path: Path, message: Json, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": [*messages("Q", "A"), message]}, {"messages": messages("R", "B")}]
    units, error = read_all(write(tmp_path / "data.jsonl", rows))
    assert (texts(units), error) == ([[["R", "B"]]], "")
    assert f"left out: 1 {cause}" in caplog.text


def test_parts_of_text_are_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    row = {"messages": [{"role": "user", "content": parts}, *TOLD_A]}
    assert texts(chat_data(write(tmp_path / "data.jsonl", [row]))) == [[["Hello", "A"]]]


def test_a_list_that_pandas_has_written_into_a_table_is_read(tmp_path: Path) -> None:
    row = {"messages": str(messages("It's", "A"))}
    assert "'" in row["messages"]
    assert texts(chat_data(write(tmp_path / "data.csv", [row]))) == [[["It's", "A"]]]


def test_alpacas_history_comes_first(tmp_path: Path) -> None:
    row = {"instruction": "R", "input": "", "output": "B", "history": [["Q", "A"]]}
    assert texts(chat_data(write(tmp_path / "data.jsonl", [row]))) == [[["Q", "A", "R", "B"]]]


def test_a_prompt_that_both_conversations_repeat_is_there_once(tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": messages("Q", "good"), "rejected": messages("Q", "bad")}
    units = chat_data(write(tmp_path / "data.parquet", [row]))
    assert texts(units) == [[["Q", "good"], ["Q", "bad"]]]


# What a layout is found from


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": " good", "rejected": " bad"},
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
    ],
)
def test_a_prompt_that_spells_its_turns_is_split(tmp_path: Path, row: Json) -> None:
    rows = [{"prompt": "\n\nHuman: Q\n\nAssistant:", **row}]
    units = chat_data(write(tmp_path / "data.jsonl", rows))
    assert texts(units) == [[["Q", "good"], ["Q", "bad"]]]


def test_bad_rows_at_the_beginning_do_not_hide_the_layout(tmp_path: Path) -> None:
    rows = [{"prompt": "Q"}, {"prompt": 3, "response": "A"}]
    rows += [{"prompt": "Q", "response": "A"}] * 3
    units, error = read_all(write(tmp_path / "data.jsonl", rows))
    assert len(units) == 3
    assert "data.jsonl:1: has no 'response'" in error
    assert "data.jsonl:2: 'prompt' must be text, got 3" in error


@pytest.mark.parametrize("container", ["data.jsonl", "data.parquet", "data.csv"])
def test_null_is_an_empty_cell(
    tmp_path: Path, container: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("Q", None), (None, "A"), ("Q", "A")]
    path = write(tmp_path / container, [{"prompt": p, "response": r} for p, r in rows])
    assert texts(chat_data(path)) == [[["Q", "A"]]]
    assert "left out: 1 with an empty answer, 1 without a prompt" in caplog.text


ANSWERED = [{"prompt": "Q", "response": "A"}] * 100
"""As many rows as tell the columns."""


def test_a_column_that_only_later_rows_have_is_read_as_one_of_the_first(tmp_path: Path) -> None:
    rows = [*ANSWERED, {"prompt": "Q", "response": "A", "system": "Be brief.", "Humor": 3}]
    *_, last = chat_data(write(tmp_path / "data.jsonl", rows))
    assert last.conversations[0].system == "Be brief."
    assert last.conversations[0].turns[-1].label == "humor:3"


def test_an_attribute_whose_first_cells_are_empty_is_a_label(tmp_path: Path) -> None:
    rows = [*({**row, "humor": None} for row in ANSWERED), {**ANSWERED[0], "humor": 3}]
    *_, last = chat_data(write(tmp_path / "data.csv", rows))
    assert labels([last]) == [["humor:3"]]


def test_a_column_that_only_later_rows_have_is_named_if_it_has_no_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ANSWERED, {**ANSWERED[0], "note": "x"}]
    list(chat_data(write(tmp_path / "data.jsonl", rows)))
    assert "columns that the first 100 rows lack, not used: note (data.jsonl:101)" in caplog.text


def test_answers_that_only_later_rows_have_are_refused_among_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "Q"}] * 100 + [*ANSWERED[:1]])
    _, error = read_all(path)
    assert error.startswith(f"{path}:101: has 'response', which the first 100 rows lack")
    units, error = read_all(path, format="prompts")
    assert (len(units), error) == (101, "")


def test_a_bad_input_is_no_reason_to_ignore_the_inputs(tmp_path: Path) -> None:
    """Alpaca with numbers for inputs isn't instruction and output alone."""
    rows = [{"instruction": "Q", "input": 5, "output": "A"}] * 3
    assert read_all(write(tmp_path / "data.jsonl", rows))[0] == []


def test_a_format_and_columns_that_are_given_are_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "P", "Text (user)": "Q", "model_output": "A", "x": 2.0}]
    options: Json = {
        "format": "prompt_response",
        "columns": {"prompt": "Text (user)", "response": "model_output", "formality": "x"},
    }
    path = write(tmp_path / "data.csv", rows)
    (unit,) = chat_data(path, schema=SCHEMA, **options)
    assert texts([unit]) == [[["Q", "A"]]]
    assert labels([unit]) == [["formality:2"]]
    assert "(prompt=Text (user), response=model_output)" in caplog.text
    assert "labels: formality=x; no column for length; not used: prompt" in caplog.text


NOT_UNDERSTOOD: list[tuple[Json, str]] = [
    ({"prompt": "Q", "model_output": "A"}, "with the columns prompt, model_output; a row: {'pro"),
    ({"chosen": "The sky is blue.", "rejected": "The sky is red."}, "columns prompt, chosen,"),
    ({"text": "Once upon a time"}, "builder.columns={prompt: NAME, response: NAME}"),
    ({"prompt": {"role": "prompter", "text": "Q"}}, "The config data/oasst"),
    ({"context": messages("Q"), "response1": "A", "overall_preference": 1}, "data/helpsteer3"),
    ({"prompt": "Q", "response_1": "A", "preference_strength": 1}, "preference=true reads it"),
    ({"text": "<extra_id_0>System", "label": [1.0]}, "It is the regression format"),
    ({"prompt": "Q", "completion": "A", "label": True}, "true or false (unpaired preferences"),
]


@pytest.mark.parametrize(("row", "said"), NOT_UNDERSTOOD)
def test_what_is_not_understood_is_described_with_what_is(
    tmp_path: Path, row: Json, said: str
) -> None:
    items, error = read_all(write(tmp_path / "data.jsonl", [row] * 200))
    assert items == []
    assert said in error
    assert len(error) < 2000
    if "KTO" not in error:
        assert "data.jsonl isn't understood: JSONL with the columns " in error
        assert all(f"\n  {name.split()[-1]} " in error for name in CASES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "mesages"}, "format must be auto, "),
        ({"make": "triples"}, "make must be auto, conversations, pairs, groups"),
        ({"attributes": ["formality"]}, "attributes: formality not in the schema (quality, "),
        ({"columns": {"reponse": "x"}}, "columns: unknown reponse; known: "),
        ({"strength": 4}, "strength must be from 1 to 3, got 4"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"label": "kindness:4"}, "label must be 'sampled', 'best' or a label string"),
    ],
)
def test_arguments_are_checked_before_a_file_is_read(
    tmp_path: Path, options: Json, said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        chat_data(tmp_path / "not read", **options)


@pytest.mark.parametrize("columns", [{"prompt": "q"}, {"formality": "f"}])
def test_columns_that_are_not_there_are_named_with_those_that_are(
    tmp_path: Path, columns: Json
) -> None:
    path = write(tmp_path / "data.csv", [{"prompt": "Q", "response": "A", "x": 1}])
    items, error = read_all(path, columns=columns, schema=SCHEMA)
    assert items == []
    assert "builder.columns: " in error
    assert "x" in error.split("column")[-1]


# Our own formats


def test_our_conversations_keep_their_labels_and_unknown_keys(tmp_path: Path) -> None:
    turns = own("Q", "A")
    turns[1] |= {"label": "humor:1", "id": 5}
    path = write(tmp_path / "data.jsonl", [{"conversations": turns, "source": "s"}])
    (unit,) = chat_data(path)
    (conversation,) = unit.conversations
    assert conversation.extra == {"source": "s"}
    assert (conversation.turns[1].label, conversation.turns[1].extra) == ("humor:1", {"id": 5})


def test_labels_of_our_conversations_must_be_of_the_schema(tmp_path: Path) -> None:
    turns = own("Q", "A")
    turns[1]["label"] = "humor:1"
    path = write(tmp_path / "data.jsonl", [{"conversations": turns}])
    assert "unknown attribute 'humor'" in read_all(path, schema=SCHEMA)[1]


def test_labels_are_written_in_the_schemas_order(tmp_path: Path) -> None:
    turns = own("Q", "A", "R", "B")
    turns[1]["label"] = turns[3]["label"] = "length:1,formality:2"
    (unit,) = chat_data(write(tmp_path / "data.jsonl", [{"conversations": turns}]), schema=SCHEMA)
    assert [turn.label for turn in unit.conversations[0].turns[1::2]] == [
        "formality:2,length:1"
    ] * 2
    row = {"prompt": "Q", "response": "A", "label": "length:1,formality:2"}
    assert labels(chat_data(write(tmp_path / "data.csv", [row]), schema=SCHEMA)) == [
        ["formality:2,length:1"]
    ]


def test_labels_of_our_records_must_be_of_the_schema(tmp_path: Path) -> None:
    record = {"system": "S", "prompt_turns": own("Q"), "responses": []}
    rows = [{**record, "label": f"length:2,formality:{value}"} for value in (3, 30)]
    records, error = read_all(write(tmp_path / "data.jsonl", rows), schema=SCHEMA)
    assert [record.label for record in records] == ["formality:3,length:2"]
    assert "data.jsonl:2: label 'length:2,formality:30': formality must be" in error


def test_our_records_stay_as_they_are(tmp_path: Path) -> None:
    response = {"from": "Assistant", "value": "A", "log(P(a|x,y))": -1.5, "id": 3}
    row = {"system": "S", "prompt_turns": own("Q"), "label": None, "responses": [response] * 2}
    (record,) = chat_data(write(tmp_path / "data.jsonl", [row | {"x": 1}]))
    assert isinstance(record, SplitRecord)
    assert record.extra == {"x": 1}
    assert [(r.log_p_attributes, r.extra) for r in record.responses] == [(-1.5, {"id": 3})] * 2


# Splits


def test_splits_of_other_names_can_be_named(tmp_path: Path) -> None:
    for name, text in (("train_sft", "Q"), ("test_sft", "R"), ("train_gen", "S")):
        (tmp_path / f"{name}-00000-of-00001.parquet").write_bytes(
            as_parquet([{"prompt": text, "response": "A"}])
        )
    units = chat_data(tmp_path, splits={"train": "train_sft", "validation": "test_sft"})
    found = [(unit.conversations[0].turns[0].value, unit.split) for unit in units]
    assert found == [("Q", "train"), ("R", "validation")]


def test_groups_have_the_split_of_their_file(tmp_path: Path) -> None:
    row = {"prompt": "Q", "responses": [scored("A", 1), scored("B", 2)]}
    for name in ("train", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    records = chat_data(tmp_path, make="groups", schema=SCHEMA)
    assert [record.split for record in records] == ["train", "validation"]
