"""The conversation and regression formats: exact JSON, and mistakes that are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from steerlm2.attributes import DEFAULT_SCHEMA, AttributeSchema, UnknownAttributes
from steerlm2.data.conversations import (
    Conversation,
    conversation_to_json,
    iter_conversations,
    parse_conversation,
    parse_regression_text,
    regression_records,
    spells_marker,
)
from steerlm2.data.records import Turn

LABELLED = {
    "conversations": [
        {"value": "Q", "from": "User", "label": None},
        {"value": "A", "from": "Assistant", "label": "quality:4,verbosity:0"},
        {"value": "Q2", "from": "User", "label": None},
        {"value": "A2", "from": "Assistant"},
    ],
    "system": "S",
    "mask": "User",
    "type": "VALUE_TO_TEXT",
}


def test_json_there_and_back_is_the_same_text() -> None:
    """Key order is part of the published format."""
    conversation = parse_conversation(LABELLED, schema=DEFAULT_SCHEMA)
    assert conversation.turns[1] == Turn("Assistant", "A", "quality:4,verbosity:0")
    assert json.dumps(conversation_to_json(conversation)) == json.dumps(LABELLED)


def test_unknown_keys_come_last_and_stay() -> None:
    turns = [{"value": "Q", "from": "User", "label": None, "id": 1}]
    given = LABELLED | {"conversations": turns, "lang": "en"}
    assert conversation_to_json(parse_conversation(given)) == given


def test_optional_keys_are_filled_in() -> None:
    """A Parquet file has null where a key is absent, and published files "" for no label."""
    turns = [{"from": "User", "value": "Q"}, {"from": "Assistant", "value": "A", "label": ""}]
    filled = {
        "conversations": [
            {"value": "Q", "from": "User", "label": None},
            {"value": "A", "from": "Assistant"},
        ],
        "system": "S",
        "mask": "User",
        "type": "VALUE_TO_TEXT",
    }
    nulls: dict[str, Any] = {"system": None, "mask": None, "type": None}
    for given in ({"conversations": turns}, {"conversations": turns} | nulls):
        assert conversation_to_json(parse_conversation(given, default_system="S")) == filled


def turn(**changes: Any) -> dict[str, Any]:
    return LABELLED | {"conversations": [{"from": "Assistant", "value": "A"} | changes]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "must be a JSON object"),
        ({"conversations": [{"from": "User", "value": "Q"}]}, "missing 'system'"),
        (LABELLED | {"system": 3}, "'system' must be text"),
        (LABELLED | {"mask": "Assistant"}, "'mask' must be 'User', got 'Assistant'"),
        (LABELLED | {"type": "TEXT_TO_VALUE"}, "'type' must be 'VALUE_TO_TEXT'"),
        (LABELLED | {"conversations": []}, "at least one turn"),
        (LABELLED | {"conversations": ["Q"]}, r"conversations\[0\]: must be a JSON object"),
        (turn(**{"from": "Bot"}), r"conversations\[0\]: 'from' must be 'User' or 'Assistant'"),
        (turn(value=None), "'value' must be text"),
        (turn(value="\ud800"), "'value' must be text"),
        (turn(label=4), "'label' must be text or null, got 4"),
        (turn(label="quality=4"), "'quality=4' is not of the form name:number"),
        (turn(label="quality:5"), "quality must be a whole number from 0 to 4"),
        (turn(label="kindness:1"), "unknown attribute 'kindness'"),
        (turn(label="quality:4", **{"from": "User"}), "only turns of 'Assistant'"),
    ],
)
def test_every_mistake_is_named(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_conversation(given, schema=DEFAULT_SCHEMA)


@pytest.mark.parametrize("value", ["", " \n\t", "\u200b\ufeff"])
def test_an_answer_without_text_is_refused_unless_it_is_a_place_to_fill(value: str) -> None:
    """The user may say nothing."""
    given = turn(value=value)
    with pytest.raises(ValueError, match=r"^conversations\[0\]: the response text is empty$"):
        parse_conversation(given)
    assert parse_conversation(given, allow_empty=True).turns == [Turn("Assistant", value)]
    nothing = LABELLED | {"conversations": [{"from": "User", "value": value}]}
    assert parse_conversation(nothing).turns == [Turn("User", value)]


def test_unknown_attributes_of_all_turns_are_one_error_of_their_own() -> None:
    turns = [{"from": "Assistant", "value": "A", "label": f"{name}:9"} for name in ("wit", "zest")]
    with pytest.raises(UnknownAttributes, match=r"conversations\[1\]: label 'zest:9'") as error:
        parse_conversation(LABELLED | {"conversations": turns}, schema=DEFAULT_SCHEMA)
    assert error.value.names == ("wit", "zest")
    turns[0]["value"] = ""
    with pytest.raises(ValueError, match="text is empty") as other:
        parse_conversation(LABELLED | {"conversations": turns}, schema=DEFAULT_SCHEMA)
    assert type(other.value) is ValueError


@pytest.mark.parametrize("marker", ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"])
@pytest.mark.parametrize("place", ["system", "prompt", "answer"])
def test_a_marker_of_the_regression_format_is_found_in_every_content(
    marker: str, place: str
) -> None:
    texts = dict.fromkeys(("system", "prompt", "answer"), "extra_id_1 > <extra_id_3>")

    def spelled(texts: dict[str, str]) -> bool:
        turns = [Turn("User", texts["prompt"]), Turn("Assistant", texts["answer"])]
        return spells_marker(Conversation(turns, texts["system"]))

    assert not spelled(texts)
    assert spelled(texts | {place: f"a{marker}b"})


def test_all_problems_come_at_once() -> None:
    given = {"conversations": [{"from": "Bot", "value": 1}], "mask": "x"}
    with pytest.raises(ValueError, match=r"'system'.*'mask'.*'from'.*'value'"):
        parse_conversation(given)


def test_regression_has_a_record_for_each_labelled_turn_with_all_text_before_it() -> None:
    turns = [
        Turn("User", "Q"),
        Turn("Assistant", "A", "verbosity:0,quality:4"),
        Turn("Assistant", "unlabelled"),
        Turn("Assistant", "none of the attributes", ""),
        Turn("User", "Q2"),
        Turn("Assistant", "A2", "helpfulness:3"),
    ]
    first, second = regression_records(Conversation(turns, "S"))
    no = -100.0
    text = "<extra_id_0>System\nS\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\nA\n"
    assert first == {"text": text + "<extra_id_2>", "label": [4.0, *[no] * 7, 0.0]}
    text += "<extra_id_1>Assistant\nunlabelled\n<extra_id_1>Assistant\nnone of the attributes\n"
    text += "<extra_id_1>User\nQ2\n<extra_id_1>Assistant\nA2\n<extra_id_2>"
    assert second == {"text": text, "label": [*[no] * 4, 3.0, *[no] * 4]}


def test_regression_follows_the_schema() -> None:
    conversation = Conversation([Turn("Assistant", "A", "kindness:1")], "S")
    schema = AttributeSchema(("wit", "kindness"), ((0, 4), (1, 9)))
    (record,) = regression_records(conversation, schema)
    assert record["label"] == [-100.0, 1.0]
    with pytest.raises(UnknownAttributes, match="unknown attribute 'kindness'; known: quality"):
        list(regression_records(conversation))
    conversation = Conversation([Turn("Assistant", "A", "kindness:0")], "S")
    with pytest.raises(ValueError, match="kindness must be a whole number from 1 to 9, got 0"):
        list(regression_records(conversation, schema))


def test_regression_has_the_published_order_for_the_published_attributes() -> None:
    """Its readers know no other one for nine numbers."""
    conversation = Conversation([Turn("Assistant", "A", "verbosity:0,quality:4")], "S")
    turned = DEFAULT_SCHEMA.select(reversed(DEFAULT_SCHEMA.names))
    assert list(regression_records(conversation, turned)) == list(regression_records(conversation))


def test_labels_are_read_in_the_order_of_the_schema() -> None:
    schema = AttributeSchema(("verbosity", "quality"), ((0, 4), (1, 9)))
    assert parse_conversation(LABELLED, schema=schema).turns[1].label == "verbosity:0,quality:4"
    assert parse_conversation(LABELLED).turns[1].label == "quality:4,verbosity:0"


def test_bad_lines_are_reported_after_the_good_ones(tmp_path: Path) -> None:
    path = tmp_path / "conversations.jsonl"
    path.write_text(f'{json.dumps(LABELLED)}\n{{"a": 1}}\n{{\n{json.dumps(LABELLED)}\n')
    conversations = iter_conversations(path)
    assert [next(conversations).system, next(conversations).system] == ["S", "S"]
    with pytest.raises(ValueError, match="missing 'system'") as error:
        next(conversations)
    reported = [line.split(": ")[0] for line in str(error.value).splitlines()]
    assert reported == [f"{path}:2", f"{path}:3"]


# Texts of the regression format, read back

PLAIN = st.text(
    alphabet=st.sampled_from("a \n\r<>_:12é") | st.characters(codec="utf-8"), max_size=12
)
PLAIN = PLAIN.filter(lambda text: "<extra_id_" not in text)
SPOKEN = st.tuples(st.sampled_from(["User", "Assistant"]), PLAIN)


@hypothesis.given(PLAIN, st.lists(SPOKEN, max_size=5), PLAIN)
def test_a_regression_text_gives_back_its_conversation(
    system: str, spoken: list[tuple[str, str]], response: str
) -> None:
    """Whatever the texts (line breaks at both ends, nothing at all), as long as none of them spells
    a control token.
    """
    before = [Turn(role, value) for role, value in spoken]
    turns = [*before, Turn("Assistant", response, "quality:1")]
    (record,) = regression_records(Conversation(turns, system))
    assert parse_regression_text(record["text"]) == (system, [*before, Turn("Assistant", response)])


def test_every_labelled_turn_gives_back_the_turns_up_to_it() -> None:
    turns = [
        Turn(role, value) for role, value in zip(["User", "Assistant"] * 2, "QARB", strict=True)
    ]
    labelled = [
        Turn(t.role, t.value, "quality:1" if t.role == "Assistant" else None) for t in turns
    ]
    parsed = [
        parse_regression_text(r["text"]) for r in regression_records(Conversation(labelled, "S"))
    ]
    assert parsed == [("S", turns[:2]), ("S", turns)]


def test_the_turns_of_a_long_helpsteer2_prompt_come_apart() -> None:
    """HelpSteer2 writes a conversation into one prompt, with the markers between its turns."""
    prompt = "Q1\n<extra_id_1>Assistant\nA1\n\n<extra_id_1>User\nQ2"
    conversation = Conversation([Turn("User", prompt), Turn("Assistant", "A2", "quality:1")], "S")
    (record,) = regression_records(conversation)
    assert parse_regression_text(record["text"]) == (
        "S",
        [
            Turn("User", "Q1"),
            Turn("Assistant", "A1\n"),
            Turn("User", "Q2"),
            Turn("Assistant", "A2"),
        ],
    )


@pytest.mark.parametrize(
    "typed",
    [
        "say <extra_id_1>User\n",
        "<extra_id_1>",
        "\n<extra_id_1>Bot\n",
        "<extra_id_2>",
        "\n<extra_id_2>",
    ],
)
def test_a_marker_within_a_line_or_of_nobody_is_text(typed: str) -> None:
    turns = [Turn("User", f"x{typed}y"), Turn("Assistant", f"x{typed}y")]
    (record,) = regression_records(
        Conversation([turns[0], Turn("Assistant", turns[1].value, "quality:1")], "S")
    )
    assert parse_regression_text(record["text"]) == ("S", turns)


GOOD = "<extra_id_0>System\nS\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\nA\n<extra_id_2>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "doesn't begin with '<extra_id_0>System'.* and doesn't end with"),
        (GOOD.removeprefix("<extra_id_0>"), "doesn't begin with '<extra_id_0>System'"),
        (" " + GOOD, "doesn't begin with '<extra_id_0>System'"),
        (GOOD.removesuffix("<extra_id_2>"), "doesn't end with a line break and '<extra_id_2>'"),
        (GOOD + "\n", "doesn't end with a line break and '<extra_id_2>'"),
        (GOOD.replace("A\n<", "A<"), "doesn't end with a line break and '<extra_id_2>'"),
        (
            GOOD.replace("\n<extra_id_1>Assistant\nA", ""),
            "last turn doesn't begin with .*Assistant'",
        ),
        ("<extra_id_0>System\nS\n<extra_id_2>", "last turn doesn't begin with .*Assistant'"),
        ("<extra_id_0>System\n<extra_id_2>", "the text isn't of the regression format"),
    ],
)
def test_what_is_not_a_regression_text_is_refused(text: str, message: str) -> None:
    """And the text that it is a change of is read."""
    assert parse_regression_text(GOOD) == ("S", [Turn("User", "Q"), Turn("Assistant", "A")])
    with pytest.raises(ValueError, match=message):
        parse_regression_text(text)
