"""Sources of labelled conversations: Open Assistant, HelpSteer 1 to 3, and files of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest

from steerlm2.data.records import Turn
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT, Unit
from steerlm2.data.sources.conversations import labelled_conversations
from steerlm2.data.sources.helpsteer import helpsteer3_conversations, helpsteer_conversations
from steerlm2.data.sources.oasst import oasst_conversations, oasst_groups

Json = dict[str, Any]


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(units: Iterable[Unit]) -> list[list[list[tuple[str, str | None]]]]:
    """For each unit and conversation: (text, label) of each turn."""
    return [[[(t.value, t.label) for t in c.turns] for c in unit.conversations] for unit in units]


# Open Assistant


def prompter(text: str, *replies: Json) -> Json:
    return {"role": "prompter", "text": text, "message_id": text, "replies": list(replies)}


def assistant(text: str, *replies: Json, **labels: float) -> Json:
    entries = {name: {"value": value, "count": 3} for name, value in labels.items()}
    message = {"role": "assistant", "text": text, "message_id": text, "replies": list(replies)}
    return message | {"labels": entries}


TREE = {
    "message_tree_id": "Q",
    "prompt": prompter(
        "Q",
        assistant("A", prompter("Q2", assistant("B", humor=0.5)), prompter("Q3"), quality=1.0),
        assistant("C", creativity=0.1, toxicity=0.9, helpfulness=1.0, quality=0.4),
    ),
}


def test_every_path_to_a_message_without_replies_is_a_conversation(tmp_path: Path) -> None:
    """round(4 v): 1.0 -> 4, 0.5 -> 2, 0.4 -> 1.6 -> 2, 0.9 -> 3.6 -> 4, 0.1 -> 0. The label's order
    is that of the attributes, and helpfulness is none of Open Assistant's four."""
    (unit,) = oasst_conversations(write(tmp_path / "t.jsonl", TREE))
    a = ("A", "quality:4")
    assert turns([unit]) == [
        [
            [("Q", None), a, ("Q2", None), ("B", "humor:2")],
            [("Q", None), a, ("Q3", None)],
            [("Q", None), ("C", "quality:2,toxicity:4,creativity:0")],
        ]
    ]
    assert {c.system for c in unit.conversations} == {DEFAULT_SYSTEM_PROMPT}
    assert [t.role for t in unit.conversations[0].turns] == ["User", "Assistant"] * 2
    assert unit.split is None


def test_a_tree_without_replies_is_an_empty_unit(tmp_path: Path) -> None:
    """It counts: the published split is over all trees of the file."""
    path = write(tmp_path / "t.jsonl", {"prompt": prompter("alone")}, TREE)
    assert [len(unit.conversations) for unit in oasst_conversations(path)] == [0, 3]


def test_halves_round_to_even_as_in_the_published_data(tmp_path: Path) -> None:
    """0.125 * 4 = 0.5 -> 0 and 0.375 * 4 = 1.5 -> 2."""
    tree = {"prompt": prompter("Q", assistant("A", quality=0.125, humor=0.375))}
    assert turns(oasst_conversations(write(tmp_path / "t.jsonl", tree))) == [
        [[("Q", None), ("A", "quality:0,humor:2")]]
    ]


def test_no_labels_give_no_label_and_foreign_ones_an_empty_label(tmp_path: Path) -> None:
    unlabelled = assistant("A")
    del unlabelled["labels"]
    tree = {"prompt": prompter("Q", unlabelled, assistant("B", spam=0.0))}
    assert turns(oasst_conversations(write(tmp_path / "t.jsonl", tree))) == [
        [[("Q", None), ("A", None)], [("Q", None), ("B", "")]]
    ]


def test_attributes_and_system_prompt_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", TREE)
    (unit,) = oasst_conversations(
        path, attributes=["helpfulness", "quality"], system_prompt="Be brief."
    )
    last = unit.conversations[-1]
    assert (last.turns[-1].label, last.system) == ("helpfulness:4,quality:2", "Be brief.")


DELETED, REJECTED = {"deleted": True}, {"review_result": False}
UNMARKED: list[Json] = [
    {},
    {"deleted": False, "review_result": True},
    {"deleted": None, "review_result": None},
]


def marked(message: Json, **marks: Any) -> Json:
    return message | marks


def test_deleted_and_rejected_messages_are_left_out_with_what_answers_them_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the thread that continues below the deleted answer nothing is left, the one that ends with
    a rejected question ends with the answer before it, and a message with both marks counts once.
    """
    answers = [
        marked(assistant("gone", prompter("why?", assistant("so", quality=1.0))), **DELETED),
        marked(assistant("no"), **DELETED | REJECTED),
        assistant("A", marked(prompter("spam"), **REJECTED), quality=1.0),
        *(marked(assistant(f"kept {i}"), **marks) for i, marks in enumerate(UNMARKED)),
    ]
    trees = [
        {"prompt": prompter("Q", *answers)},
        {"prompt": marked(prompter("R", assistant("B")), **REJECTED)},
    ]
    path = write(tmp_path / "t.jsonl", *trees)
    first, second = oasst_conversations(path)
    assert [[text for text, _ in thread] for thread in turns([first])[0]] == [
        ["Q", "A"],
        *(["Q", f"kept {i}"] for i in range(len(UNMARKED))),
    ]
    assert second.conversations == []
    counted = "2 deleted, 2 rejected by the reviewers, 3 replies to those"
    assert f"{path}: left out messages: {counted}" in caplog.text


def test_deleted_and_rejected_messages_can_be_kept(tmp_path: Path) -> None:
    tree = {"prompt": prompter("Q", marked(assistant("A"), **DELETED), assistant("B"))}
    path = write(tmp_path / "t.jsonl", tree)
    (unit,) = oasst_conversations(path, keep_rejected=True)
    assert [c.turns[1].value for c in unit.conversations] == ["A", "B"]


def test_groups_have_no_deleted_or_rejected_reply(tmp_path: Path) -> None:
    good = [assistant(text, quality=1.0) for text in ("A", "B")]
    bad = [
        marked(assistant("C", quality=1.0), **DELETED),
        marked(assistant("D", quality=0.0), **REJECTED),
    ]
    path = write(tmp_path / "t.jsonl", {"prompt": prompter("Q", *bad, *good)})
    (record,) = oasst_groups(path)
    assert [response.value for response in record.responses] == ["A", "B"]


def test_answers_without_text_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = {"prompt": prompter("Q", assistant(" \n", prompter("R")), assistant("A"))}
    path = write(tmp_path / "t.jsonl", tree)
    (unit,) = oasst_conversations(path, keep_rejected=True)
    assert [c.turns[1].value for c in unit.conversations] == ["A"]
    assert "left out messages: 1 replies to those, 1 without text" in caplog.text


def test_a_mark_that_is_neither_true_nor_false_is_named(tmp_path: Path) -> None:
    tree = {"prompt": prompter("Q", marked(assistant("A"), deleted="false"))}
    with pytest.raises(ValueError, match=r"prompt\.replies\[0\]: 'deleted' must be true, false or"):
        list(oasst_conversations(write(tmp_path / "t.jsonl", tree)))


def message_table(tree: Json, labels_as_lists: bool) -> list[Json]:
    """The rows of a tree, as the message export has them or as the hub's table has."""
    rows = []

    def visit(message: Json, parent: str | None) -> None:
        labels = message.get("labels")
        if labels is not None and labels_as_lists:
            labels = {
                "name": [*labels],
                "value": [entry["value"] for entry in labels.values()],
                "count": [3] * len(labels),
            }
        rows.append(
            {key: message[key] for key in ("role", "text", "message_id")}
            | {key: message.get(key) for key in ("deleted", "review_result")}
            | {"parent_id": parent, "labels": labels}
            | {"message_tree_id": tree["prompt"]["message_id"]}
        )
        for reply in message["replies"]:
            visit(reply, message["message_id"])

    visit(tree["prompt"], None)
    return rows


OTHER = {
    "prompt": prompter(
        "other",
        assistant("yes", quality=0.0),
        assistant("no", quality=1.0),
        marked(assistant("gone", quality=1.0), **DELETED),
    )
}


@pytest.mark.parametrize("form", ["messages.jsonl", "table.jsonl", "table.parquet"])
def test_the_message_table_gives_the_same_as_the_tree_export(tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    lists = form.startswith("table")
    rows = message_table(TREE, lists) + message_table(OTHER, lists)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        write(path, *rows)
    trees = write(tmp_path / "trees.jsonl", TREE, OTHER)
    assert list(oasst_conversations(path)) == list(oasst_conversations(trees))
    assert list(oasst_groups(path)) == list(oasst_groups(trees))


def test_a_message_table_in_another_order_is_refused(tmp_path: Path) -> None:
    first, second = message_table(TREE, False), message_table(OTHER, False)
    path = write(tmp_path / "t.jsonl", *first[:2], *second, *first[2:])
    with pytest.raises(ValueError, match=r":7: the parent .* sort the table by 'message_tree_id'"):
        list(oasst_conversations(path))


def test_a_tree_needs_one_root_and_ids_that_differ(tmp_path: Path) -> None:
    rows = message_table(OTHER, False)
    two_roots = [*rows, rows[0] | {"message_id": "x"}]
    for number, bad in enumerate((two_roots, [*rows, rows[1]])):
        path = write(tmp_path / f"{number}.jsonl", *bad)
        with pytest.raises(ValueError, match=r"\.jsonl:1: the 5 messages of this tree need ids"):
            list(oasst_conversations(path))


# HelpSteer

SCORES = {"verbosity": 1, "coherence": 3, "helpfulness": 4, "complexity": 2, "correctness": 0}
LABEL = "helpfulness:4,correctness:0,coherence:3,complexity:2,verbosity:1"


def scored(prompt: str, **changes: Any) -> Json:
    return {"prompt": prompt, "response": f"re {prompt}"} | SCORES | changes


def test_scores_become_a_label_in_the_order_of_the_attributes(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", scored("a"), scored("b", helpfulness=3.0))
    units = list(helpsteer_conversations(path, system_prompt="S"))
    assert turns(units) == [
        [[("a", None), ("re a", LABEL)]],
        [[("b", None), ("re b", LABEL.replace("helpfulness:4", "helpfulness:3"))]],
    ]
    assert units[0].conversations[0].turns[0] == Turn("User", "a")
    assert units[0].conversations[0].system == "S"


def test_only_helpfulness(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", scored("a"))
    (unit,) = helpsteer_conversations(path, only_helpfulness=True)
    assert unit.conversations[0].turns[1].label == "helpfulness:4"


MANY_TURNS = "Hi\n\n<extra_id_1>Assistant\nHello.\n\n<extra_id_1>User\nA river?"


@pytest.mark.parametrize("preference", [False, True])
def test_prompts_of_several_turns_are_split_unless_told_otherwise_which_is_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, preference: bool
) -> None:
    rows = [scored(prompt) | pair("train", 1) | {"prompt": prompt} for prompt in (MANY_TURNS, "a")]
    path = write(tmp_path / "preference.jsonl", *rows)
    first, second = helpsteer_conversations(path, preference=preference)
    before = [(turn.role, turn.value) for turn in first.conversations[-1].turns[:-1]]
    assert before == [("User", "Hi\n"), ("Assistant", "Hello.\n"), ("User", "A river?")]
    assert (len(second.conversations[0].turns), first.as_published) == (2, False)
    assert not caplog.text
    first, _ = helpsteer_conversations(path, preference=preference, split_turns=False)
    assert [turn.value for turn in first.conversations[-1].turns[:-1]] == [MANY_TURNS]
    assert first.as_published
    assert "1 prompts of several turns are one text in the conversation files" in caplog.text


def test_rows_with_an_empty_response_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pair as a whole; an empty answer among a prompt's turns counts too."""
    rows = [scored("a"), scored("b", response=" "), scored(MANY_TURNS.replace("Hello.\n", ""))]
    path = write(tmp_path / "rows.jsonl", *rows)
    assert len(list(helpsteer_conversations(path))) == 1
    pairs = [pair("train", 1), pair("train", 1) | {"response_2": "\n"}]
    path = write(tmp_path / "preference" / "preference.jsonl", *pairs)
    assert len(list(helpsteer_conversations(tmp_path, preference=True))) == 1
    context = messages(("user", "Q"), ("assistant", ""), ("user", "Q2"))
    row = {"response1": "1", "response2": "2", "overall_preference": 1, "context": context}
    path = write(tmp_path / "3.jsonl", row, row | {"context": context[2:]})
    assert len(list(helpsteer3_conversations(path))) == 1
    counts = [record.args for record in caplog.records]
    assert [args[1] for args in counts if isinstance(args, tuple)] == [2, 1, 1]


def pair(split: str, strength: object) -> Json:
    return {
        "split": split,
        "prompt": "P",
        "response_1": "1",
        "response_2": "2",
        "preference_strength": strength,
    }


def test_both_responses_of_a_pair_are_one_unit_with_the_strength_as_label(tmp_path: Path) -> None:
    rows = [pair("train", -3), pair("val", 0), pair("validation", 3), pair("train", 1)]
    write(tmp_path / "preference" / "preference.jsonl", *rows)
    units = list(helpsteer_conversations(tmp_path, preference=True))
    assert turns(units) == [
        [[("P", None), ("1", f"quality:{s}")], [("P", None), ("2", f"quality:{s}")]]
        for s in (-3, 0, 3, 1)
    ]
    assert [unit.split for unit in units] == ["train", "validation", "validation", "train"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], "a row must be a JSON object"),
        ({"prompt": "a"} | SCORES, "'response' must be text"),
        (scored("a", helpfulness=5), "helpfulness must be a whole number from 0 to 4, got 5"),
        (scored("a", coherence=None), "coherence must be a whole number from 0 to 4, got None"),
        ({"prompt": "a", "response": "b"}, "a label needs at least one attribute"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", scored("good"), row)
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {message}"):
        list(helpsteer_conversations(path))


@pytest.mark.parametrize("strength", [None, 4, 0.5, "1", True])
def test_bad_strengths_are_named(tmp_path: Path, strength: object) -> None:
    path = write(tmp_path / "pairs.jsonl", pair("train", strength))
    with pytest.raises(ValueError, match="the preference must be a whole number from -3 to 3"):
        list(helpsteer_conversations(path, preference=True))


def test_options_that_exclude_each_other_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set one of 'preference' and 'only_helpfulness'"):
        helpsteer_conversations(tmp_path / "not read", preference=True, only_helpfulness=True)
    with pytest.raises(ValueError, match="preference pairs only"):
        helpsteer3_conversations(tmp_path / "not read", preference=False)


def messages(*turns_: tuple[str, Any]) -> list[Json]:
    return [{"role": role, "content": content} for role, content in turns_]


def test_helpsteer3_pairs_have_all_turns_before_them(tmp_path: Path) -> None:
    chat = [("user", "Q"), ("assistant", "A"), ("user", "Q2")]
    row = {"response1": "1", "response2": "2", "overall_preference": -2}
    write(tmp_path / "preference" / "train.jsonl", row | {"context": messages(*chat)})
    with_system = row | {"context": messages(("system", "S"), *chat[2:])}
    write(tmp_path / "preference" / "validation.jsonl", with_system)
    units = list(helpsteer3_conversations(tmp_path))
    before = [("Q", None), ("A", None), ("Q2", None)]
    assert turns(units) == [
        [[*before, ("1", "quality:-2")], [*before, ("2", "quality:-2")]],
        [[before[-1], ("1", "quality:-2")], [before[-1], ("2", "quality:-2")]],
    ]
    assert [c.system for unit in units for c in unit.conversations] == [
        *[DEFAULT_SYSTEM_PROMPT] * 2,
        *["S"] * 2,
    ]
    assert [unit.split for unit in units] == ["train", "validation"]


Q, A, SYSTEM = ("user", "Q"), ("assistant", "A"), ("system", "S")


@pytest.mark.parametrize(
    "context",
    [(Q, A), (A, Q), (A,), (SYSTEM, A, Q), (SYSTEM, Q, A), (Q, Q), (Q, A, A, Q), (SYSTEM,)],
    ids=lambda context: "-".join(role for role, _ in context),
)
def test_contexts_that_do_not_alternate_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, context: Any
) -> None:
    """A response after an assistant's turn answers nobody."""
    row = {"response1": "1", "response2": "2", "overall_preference": 1}
    rows = [row | {"context": messages(*chat)} for chat in ((Q,), context, (SYSTEM, Q, A, Q))]
    assert len(list(helpsteer3_conversations(write(tmp_path / "3.jsonl", *rows)))) == 2
    assert "left out 1 rows whose turns before the response don't alternate" in caplog.text


def test_prompts_in_one_text_that_do_not_alternate_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends_with_an_answer = MANY_TURNS + "\n<extra_id_1>Assistant\nMore."
    path = write(tmp_path / "rows.jsonl", scored("a"), scored(ends_with_an_answer))
    assert len(list(helpsteer_conversations(path))) == 1
    assert "left out 1 rows whose turns" in caplog.text
    assert len(list(helpsteer_conversations(path, split_turns=False))) == 2


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "'context' must be a list"),
        ([], "'context' must be a list"),
        (messages(("user", "Q"), ("system", "S")), r"context\[1\]: 'role' must be"),
        (messages(("user", 3)), r"context\[0\]: 'content' must be text"),
        (["Q"], r"context\[0\]: 'role' must be"),
    ],
)
def test_bad_contexts_are_named(tmp_path: Path, context: object, message: str) -> None:
    row = {"context": context, "response1": "1", "response2": "2", "overall_preference": 1}
    with pytest.raises(ValueError, match=message):
        list(helpsteer3_conversations(write(tmp_path / "rows.jsonl", row)))


# Files of one's own


def own(answer: str, label: str | None, **more: Any) -> Json:
    turns_ = [{"from": "User", "value": "Q"}, {"from": "Assistant", "value": answer}]
    return {"conversations": [turns_[0], turns_[1] | {"label": label}]} | more


def test_own_conversations_are_checked_and_kept(tmp_path: Path) -> None:
    rows = [own("a", "quality:4", id=7), own("b", None, system="S")]
    units = list(labelled_conversations(write(tmp_path / "own.jsonl", *rows), system_prompt="D"))
    assert turns(units) == [
        [[("Q", None), ("a", "quality:4")]],
        [[("Q", None), ("b", None)]],
    ]
    (first,), (second,) = (unit.conversations for unit in units)
    assert (first.system, first.extra, second.system) == ("D", {"id": 7}, "S")


def test_own_schema(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", own("a", "wit:9"))
    (unit,) = labelled_conversations(path, schema={"names": ["wit"], "max_value": 9})
    assert unit.conversations[0].turns[1].label == "wit:9"
    with pytest.raises(ValueError, match=r"own\.jsonl:1: .*unknown attribute 'wit'"):
        list(labelled_conversations(path))


def test_own_ranges_and_order(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", own("a", "wit:2,tone:9"), own("b", "tone:0,wit:4"))
    schema = {"tone": [0, 9], "wit": [1, 3]}
    message = r"own\.jsonl:2: .*wit must be a whole number from 1 to 3, got 4"
    units = labelled_conversations(path, schema=schema)
    assert next(units).conversations[0].turns[1].label == "tone:9,wit:2"
    with pytest.raises(ValueError, match=message):
        list(units)


def test_labels_of_another_schema_are_one_table(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", *[own("a", "wit:1")] * 30, own("b", "humor:1,zest:2"))
    with pytest.raises(ValueError, match=r"31 labels .* set schema, which") as error:
        list(labelled_conversations(path, schema={"names": ["humor"]}))
    _, _, *rows = str(error.value).splitlines()
    assert [row.split() for row in rows] == [
        ["wit", "30", f"{path}:1"],
        ["zest", "1", f"{path}:31"],
    ]


def test_own_conversations_with_an_empty_answer_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", own("a", None), own(" ", "quality:1"))
    with pytest.raises(ValueError, match=r"own\.jsonl:2: .*the response text is empty"):
        list(labelled_conversations(path))


def test_own_pairs_are_units_of_two_lines(tmp_path: Path) -> None:
    rows = [
        own("a", "quality:-3"),
        own("b", "quality:-3"),
        own("c", "humor:0"),
        own("d", "humor:0"),
    ]
    units = list(labelled_conversations(write(tmp_path / "own.jsonl", *rows), preference=True))
    assert [[c.turns[1].value for c in unit.conversations] for unit in units] == [
        ["a", "b"],
        ["c", "d"],
    ]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([], "the second line of this pair is missing"),
        ([own("b", "quality:2")], "must differ in their last text only"),
        ([own("b", "quality:1", system="other")], "must differ in their last text only"),
        ([own("b", "quality:4")], "quality must be a whole number from -3 to 3"),
    ],
)
def test_bad_pairs_are_named(tmp_path: Path, second: list[Json], message: str) -> None:
    path = write(tmp_path / "own.jsonl", own("a", "quality:1"), *second)
    with pytest.raises(ValueError, match=rf"own\.jsonl:1: .*{message}"):
        list(labelled_conversations(path, preference=True))


def test_a_pair_needs_a_label_of_one_attribute(tmp_path: Path) -> None:
    for label in (None, "quality:1,humor:1"):
        path = write(tmp_path / "own.jsonl", own("a", label), own("b", label))
        with pytest.raises(ValueError, match="whose label has one attribute"):
            list(labelled_conversations(path, preference=True))
