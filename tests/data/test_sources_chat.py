"""The chat data that people have: every layout in every container, labels, pairs and groups."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steerlm2.attributes import as_schema, label_log_probs, parse_label
from steerlm2.data.records import Record
from steerlm2.data.sources import chat_data
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT, SplitRecord, Unit

Json = dict[str, Any]
Text = list[tuple[str, str, str | None]]

SCHEMA = {"names": ["formality", "length"], "min_value": 0, "max_value": 10}


# Containers


def as_table(rows: list[Json], delimiter: str) -> str:
    """As a spreadsheet has it: what isn't text is JSON, and nothing is an empty cell."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(names)
    for row in rows:
        cells = (row.get(name) for name in names)
        writer.writerow(
            "" if c is None else c if isinstance(c, str) else json.dumps(c) for c in cells
        )
    return text.getvalue()


def as_parquet(rows: list[Json]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


CONTAINERS: dict[str, Callable[[list[Json]], str | bytes]] = {
    "data.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "lines.json": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "array.json": json.dumps,
    "indented.json": lambda rows: json.dumps(rows, indent=2),
    "object.json": lambda rows: json.dumps({"version": "1.0", "data": rows}),
    "data.csv": lambda rows: as_table(rows, ","),
    "semicolons.csv": lambda rows: as_table(rows, ";"),
    "data.tsv": lambda rows: as_table(rows, "\t"),
    "data.parquet": as_parquet,
}
GZIPPED = [f"{name}.gz" for name in ("data.jsonl", "array.json", "data.csv", "data.parquet")]


def write(path: Path, rows: list[Json]) -> Path:
    content = CONTAINERS[path.name.removesuffix(".gz")](rows)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


# Layouts


def messages(*texts: str, **more: Any) -> list[Json]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text, **more} for i, text in enumerate(texts)]


def sharegpt(*texts: str) -> list[Json]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def own(*texts: str) -> list[Json]:
    return [{"from": ("User", "Assistant")[i % 2], "value": text} for i, text in enumerate(texts)]


def told(role: str, content: str) -> Json:
    return {"role": role, "content": content}


def scored(text: str, formality: Any) -> Json:
    return {"text": text, "scores": {"formality": formality}}


TOLD_A = [told("assistant", "A")]


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


def read_all(path: Path, **options: Any) -> tuple[list[Any], str]:
    """What a source gives before it ends, and the error that it ends with, "" without."""
    items: list[Any] = []
    try:
        items.extend(chat_data(path, **options))
    except ValueError as error:
        return items, str(error)
    return items, ""


def texts(units: Iterable[Unit]) -> list[list[list[str]]]:
    return [[[turn.value for turn in c.turns] for c in unit.conversations] for unit in units]


def labels(units: Iterable[Unit]) -> list[list[str | None]]:
    return [[c.turns[-1].label for c in unit.conversations] for unit in units]


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
    assert "columns that the first 100 rows lack, not used: note (row 101)" in caplog.text


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


# Attributes


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


# Several answers


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
    path = write(tmp_path / "data.jsonl", CASES["preference"].rows[:1])
    assert "preferences can't be groups" in read_all(path, make="groups")[1]


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
