"""Labelled texts and preference pairs for attribute models."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from steerlm2.attributes import DEFAULT_SCHEMA, AttributeSchema, as_schema
from steerlm2.data.conversations import Conversation, conversation_to_json, regression_records
from steerlm2.data.records import Turn
from steerlm2.data.sources.helpsteer import strengths_of
from steerlm2.data.synthetic import score_text
from steerlm2.data.templates import (
    llama3_template,
)
from steerlm2.data.tokenizers import HFTokenizer, tiny_tokenizer
from steerlm2.datasets import (
    RewardDataset,
    attribute_dataset,
    synthetic_attribute_dataset,
)


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return tiny_tokenizer()


def as_file(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


SMALL = AttributeSchema(("helpfulness", "verbosity"))


def conversation(*spoken: str, labels: Mapping[int, str], system: str = "S") -> Conversation:
    """User and assistant in turn; `labels` by place."""
    roles = itertools.cycle(["User", "Assistant"])
    turns = [Turn(next(roles), text, labels.get(i)) for i, text in enumerate(spoken)]
    return Conversation(turns, system)


def labelled(answer: str, label: str, question: str = "Q") -> dict[str, Any]:
    return conversation_to_json(conversation(question, answer, labels={1: label}))


def texts_of(tokenizer: HFTokenizer, dataset: RewardDataset) -> list[str]:
    return [tokenizer.decode([*g.prompt, *r]) for g in dataset for r in g.responses]


def read(folder: Path, tokenizer: HFTokenizer, *lines: dict[str, Any], **options: Any) -> Any:
    options = {"max_seq_len": 256} | options
    return attribute_dataset(tokenizer, source=as_file(folder, *lines), **options)


@pytest.fixture
def conversations() -> list[Conversation]:
    """One with a label in the middle and at the end, one without a system text."""
    return [
        conversation("Q", "A", "Q2\n", "A2", labels={1: "helpfulness:4", 3: "verbosity:0"}),
        conversation("R", "B", labels={1: "verbosity:2,helpfulness:1"}, system=""),
    ]


def test_both_formats_are_the_same_data_set(
    conversations: list[Conversation], tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """Conversations, and the regression records that are made of them: tokens and labels."""
    as_text = [r for c in conversations for r in regression_records(c, SMALL)]
    first = read(tmp_path, tokenizer, *map(conversation_to_json, conversations), schema=SMALL)
    second = read(tmp_path, tokenizer, *as_text, schema=SMALL)
    assert first.groups == second.groups
    assert len(first) == 3


def test_every_labelled_turn_is_a_text_with_its_labels(
    conversations: list[Conversation], tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """In the schema's order, -100 where there is no label; each up to the label-start token."""
    dataset = read(tmp_path, tokenizer, *map(conversation_to_json, conversations), schema=SMALL)
    assert [group.labels for group in dataset] == [[[4, -100]], [[-100, 0]], [[1, 2]]]
    start = "<extra_id_0>System\nS\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\nA\n"
    assert texts_of(tokenizer, dataset)[:2] == [
        start + "<extra_id_2>",
        start + "<extra_id_1>User\nQ2\n\n<extra_id_1>Assistant\nA2\n<extra_id_2>",
    ]


def test_turns_without_a_label_are_no_texts(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """A conversation without any gives none, and a file of those is an error."""
    without = labelled("A", "")
    dataset = read(tmp_path, tokenizer, without, labelled("B", "verbosity:1"), schema=SMALL)
    assert [group.labels for group in dataset] == [[[-100, 1]]]
    with pytest.raises(ValueError, match=r"records\.jsonl holds no labelled text; .*'schema'"):
        read(tmp_path, tokenizer, without, schema=SMALL)


def test_formats_may_be_mixed_in_one_file(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    first = conversation("Q", "A", labels={1: "verbosity:3"})
    lines = [conversation_to_json(first), *regression_records(first, SMALL)]
    dataset = read(tmp_path, tokenizer, *lines, schema=SMALL)
    assert dataset[0] == dataset[1]


def test_labels_that_the_schema_lacks_are_left_out_and_named(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """quality:9 may be out of the range of what the model scores: nobody trains on it."""
    lines = [labelled("A", "humor:1,verbosity:2"), labelled("B", "quality:9,verbosity:3")]
    dataset = read(tmp_path, tokenizer, *lines, schema=AttributeSchema(("verbosity",)))
    assert [group.labels for group in dataset] == [[[2]], [[3]]]
    assert dataset.summary(AttributeSchema(("verbosity",))) == (
        "2 texts with labels of verbosity 2 (cut at the beginning, being too long: 0 texts; "
        "labels left out: humor, quality)"
    )


def test_a_summary_without_ignored_labels_names_none(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    dataset = read(tmp_path, tokenizer, labelled("A", "verbosity:2"), schema=SMALL)
    assert dataset.summary(SMALL) == (
        "1 texts with labels of helpfulness 0, verbosity 1 "
        "(cut at the beginning, being too long: 0 texts)"
    )


def test_labels_are_counted_by_attribute(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """A text may lack some; the value 0 is a label."""
    lines = [labelled("A", "helpfulness:0,verbosity:2"), labelled("B", "verbosity:0")]
    dataset = read(tmp_path, tokenizer, *lines, schema=SMALL)
    assert dataset.num_labels(SMALL) == {"helpfulness": 1, "verbosity": 2}
    dataset.refuse_unlabelled(SMALL)


def test_attributes_without_any_label_are_refused(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """A head without a label is noise; the message has the schema that there are labels for."""
    schema = AttributeSchema(("humor", "helpfulness", "quality", "verbosity"))
    lines = [labelled("A", "helpfulness:1"), labelled("B", "verbosity:3")]
    dataset = read(tmp_path, tokenizer, *lines, schema=schema)
    with pytest.raises(
        ValueError, match=r"label of humor, quality.*schema\.names=\[helpfulness,verbosity\]"
    ):
        dataset.refuse_unlabelled(schema)


def test_texts_of_other_attributes_are_one_table(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """Thirty lines of one mistake, after the line that has another one."""
    lines = [labelled("A", "humor:1,wit:2"), labelled("B", "humor:1")] * 15
    with pytest.raises(ValueError, match="set schema, which has helpfulness, verb") as error:
        read(tmp_path, tokenizer, *lines, labelled("A", "verbosity:9"), schema=SMALL)
    reported = str(error.value).splitlines()
    assert reported[0].endswith("records.jsonl:31: verbosity must be a number from 0 to 4, got 9")
    assert [line.split()[:2] for line in reported[2:]] == [
        ["attribute", "labels"],
        ["humor", "30"],
        ["wit", "15"],
    ]


def test_a_published_file_of_nine_columns_is_read_for_one_attribute(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """The columns are the default schema's, and helpfulness is the fifth of them."""
    line = next(regression_records(conversation("Q", "A", labels={1: "humor:1,helpfulness:3"})))
    assert len(line["label"]) == 9
    dataset = read(tmp_path, tokenizer, line, schema=AttributeSchema(("helpfulness",)))
    assert dataset[0].labels == [[3]]
    assert dataset.ignored == {"humor"}


def test_long_texts_lose_their_beginning_and_are_counted(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    lines = [labelled("yes", "verbosity:1", "word " * 90), labelled("no", "verbosity:2")]
    dataset = read(tmp_path, tokenizer, *lines, schema=SMALL, max_seq_len=64)
    assert dataset.num_cut == 1
    assert dataset.longest() == 64
    assert texts_of(tokenizer, dataset)[0].endswith("Assistant\nyes\n<extra_id_2>")
    assert "too long: 1 texts" in dataset.summary(SMALL)


def test_the_template_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"<\|eot_id\|> is no token of this tokenizer"):
        read(
            tmp_path,
            tiny_tokenizer(),
            labelled("A", "verbosity:2"),
            schema=SMALL,
            template=llama3_template(),
        )


REGRESSION = {"text": "<extra_id_0>System\nS\n<extra_id_1>Assistant\nthe answer\n<extra_id_2>"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (REGRESSION | {"label": [-100.0, -100]}, "nothing of helpfulness, verbosity.*'the answer'"),
        (labelled("the answer", "humor:1"), "nothing of helpfulness, verbosity.*'the answer'"),
        (labelled("A", "verbosity:5"), "verbosity must be a number from 0 to 4, got 5"),
        (REGRESSION | {"label": [1, -0.25]}, r"verbosity must be a number from 0 to 4, got -0\.25"),
        (REGRESSION | {"label": [1, math.nan]}, "verbosity must be a number from 0 to 4, got nan"),
        (REGRESSION | {"label": [1, math.inf]}, "verbosity must be a number from 0 to 4, got inf"),
        (REGRESSION | {"label": [1, 2, 3]}, "'label' must be a list of 2 or 9 numbers"),
        (REGRESSION, "'label' must be a list of 2 numbers"),
        (REGRESSION | {"label": "1,2"}, "'label' must be a list of 2 numbers"),
        (REGRESSION | {"label": [1, "2"]}, "'label' must be a list of numbers"),
        (REGRESSION | {"label": [1, True]}, "'label' must be a list of numbers"),
        ({"text": 3, "label": [1, 2]}, "'text' must be text"),
        (
            {"text": REGRESSION["text"].replace("the answer", " "), "label": [1, 2]},
            "the response text is empty",
        ),
        (labelled(" ", "verbosity:1"), "the response text is empty"),
        ({"text": "Hi.", "label": [1, 2]}, "isn't of the regression format"),
        ({"prompt": "Q"}, "missing 'system'"),
        (labelled("A", "verbosity=1"), "'verbosity=1' is not of the form name:number"),
    ],
)
def test_a_bad_labelled_text_is_named_with_its_line(
    line: dict[str, Any], message: str, tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """Between two good lines."""
    good = labelled("A", "verbosity:2")
    with pytest.raises(ValueError, match=rf"records\.jsonl:2: .*{message}") as error:
        read(tmp_path, tokenizer, good, line, good, schema=SMALL)
    assert len(str(error.value).splitlines()) == 1


def test_all_bad_labelled_texts_are_named_at_once(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """12 of 13: the first ten, and how many more."""
    lines = [labelled("A", "verbosity:2"), *[labelled("A", "verbosity:7")] * 12]
    with pytest.raises(ValueError, match="got 7") as error:
        read(tmp_path, tokenizer, *lines, schema=SMALL)
    reported = str(error.value).splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in reported[:10]] == [
        str(number) for number in range(2, 12)
    ]
    assert reported[10:] == ["... and 2 more bad lines"]


@pytest.mark.parametrize(("pairs", "what"), [(False, "labelled text"), (True, "pair")])
def test_an_empty_file_is_named(
    pairs: bool, what: str, tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    with pytest.raises(ValueError, match=rf"records\.jsonl holds no {what}; prepare_data"):
        read(tmp_path, tokenizer, pairs=pairs)


def pair(strength: int, *answers: str, question: str = "Q") -> list[dict[str, Any]]:
    """As prepare_data writes HelpSteer2's preferences."""
    return [labelled(answer, f"quality:{strength}", question) for answer in answers]


def test_two_adjacent_lines_are_a_pair(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """One group of two responses, with the strength under whatever name; ties too."""
    lines = [*pair(-3, "A", "B"), *pair(0, "C", "D", question="R")]
    dataset = read(tmp_path, tokenizer, *lines, pairs=True, schema=SMALL)
    assert [(len(g.responses), g.strength, g.labels) for g in dataset] == [
        (2, -3, None),
        (2, 0, None),
    ]
    answers = [text.rpartition("Assistant\n")[2] for text in texts_of(tokenizer, dataset)]
    assert answers == [f"{letter}\n<extra_id_2>" for letter in "ABCD"]
    assert dataset.summary(SMALL) == "2 pairs (cut at the beginning, being too long: 0 texts)"


@pytest.mark.parametrize(("pairs", "left"), [(False, 3), (True, 1)])
def test_answers_of_broken_utf8_are_not_scored_and_counted(
    pairs: bool, left: int, tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    lines = [*pair(1, "A", "B\ufffd"), *pair(1, "A", "B", question="\ufffd?")]
    schema = AttributeSchema(("quality",))
    dataset = read(tmp_path, tokenizer, *lines, pairs=pairs, schema=schema)
    assert len(dataset) == left
    assert "; 1 left out: an answer with U+FFFD, not valid UTF-8)" in dataset.summary(schema)
    with pytest.raises(ValueError, match=r"holds no .*; 1 left out: an answer with U\+FFFD"):
        read(tmp_path, tokenizer, *lines[:2] if pairs else lines[1:2], pairs=pairs, schema=schema)


@pytest.mark.parametrize("strength", range(-3, 4))
def test_strengths_of_both_formats_are_read(
    strength: int, tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """Negative ones are outside the range of labels, and are no mistake here."""
    turns = [conversation("Q", text, labels={1: f"quality:{strength}"}) for text in "AB"]
    schema = strengths_of(DEFAULT_SCHEMA)
    as_text = [record for c in turns for record in regression_records(c, schema)]
    first = read(tmp_path, tokenizer, *map(conversation_to_json, turns), pairs=True)
    second = read(tmp_path, tokenizer, *as_text, pairs=True)
    assert first.groups == second.groups
    assert first[0].strength == strength


def test_labels_have_the_range_of_each_attribute(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """In both formats; the mistakes of a line are named together."""
    schema = AttributeSchema(("tone", "wit"), ((0, 9), (1, 3)))
    good = [labelled("A", "wit:3,tone:9"), REGRESSION | {"label": [8.5, 1]}]
    dataset = read(tmp_path, tokenizer, *good, schema=schema)
    assert [group.labels for group in dataset] == [[[9, 3]], [[8.5, 1]]]
    bad = [labelled("A", "wit:4,tone:9"), REGRESSION | {"label": [10, 0.5]}]
    with pytest.raises(ValueError, match="wit must be a number from 1 to 3, got 4") as error:
        read(tmp_path, tokenizer, *bad, schema=schema)
    second = "tone must be a number from 0 to 9, got 10; wit must be a number from 1 to 3, got 0.5"
    assert second in str(error.value)


@pytest.mark.parametrize("schema", [{"humor": [0, 10], "wit": [0, 4]}, {"verbosity": [1, 5]}])
def test_computed_labels_have_a_scale_of_their_own(schema: Any, tokenizer: HFTokenizer) -> None:
    with pytest.raises(ValueError, match=r"with values from 0 to 4, the schema has (hum|verb)"):
        synthetic_attribute_dataset(
            tokenizer,
            num_records=1,
            responses_per_prompt=1,
            max_seq_len=256,
            schema=as_schema(schema),
        )


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (pair(1, "B", question="R")[0], "makes a pair with line 1, but has another conversation"),
        (pair(2, "B")[0], "or another preference strength"),
        (labelled("B", "humor:1,quality:1"), "preference strength alone, got humor:1, quality:1"),
        (labelled("B", "humor:1"), "or another preference strength"),
        (
            conversation_to_json(conversation("Q", "B", labels={1: "quality:1"}, system="T")),
            "has another conversation",
        ),
    ],
)
def test_lines_that_are_no_pair_are_named(
    second: dict[str, Any], message: str, tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    with pytest.raises(ValueError, match=rf"records\.jsonl:2: .*{message}"):
        read(tmp_path, tokenizer, *pair(1, "A"), second, pairs=True)


def test_the_lines_after_a_bad_pair_are_still_pairs(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """A 1, B 2 | C 1, D 1: one problem, not three."""
    lines = [*pair(1, "A"), *pair(2, "B"), *pair(1, "C", "D")]
    with pytest.raises(ValueError, match="another preference strength") as error:
        read(tmp_path, tokenizer, *lines, pairs=True)
    assert len(str(error.value).splitlines()) == 1


def test_an_odd_last_line_is_named(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    with pytest.raises(ValueError, match=r"records\.jsonl:3: the last text has no partner"):
        read(tmp_path, tokenizer, *pair(1, "A", "B", "C"), pairs=True)


def test_a_long_pair_is_cut_together_and_counts_as_two(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    lines = pair(1, "yes", "no, never", question="word " * 90)
    dataset = read(tmp_path, tokenizer, *lines, pairs=True, max_seq_len=64)
    assert (dataset.num_cut, dataset.longest()) == (2, 64)


def test_synthetic_texts_are_labelled_with_what_counts(tokenizer: HFTokenizer) -> None:
    """Against `score_text` of the text between the last header and the label-start token."""
    schema = AttributeSchema(("verbosity", "quality", "humor"))
    dataset = synthetic_attribute_dataset(
        tokenizer, num_records=6, responses_per_prompt=3, max_seq_len=256, schema=schema
    )
    assert len(dataset) == 18
    for text, group in zip(texts_of(tokenizer, dataset), dataset, strict=True):
        scores = score_text(text.rpartition("Assistant\n")[2].removesuffix("\n<extra_id_2>"))
        assert group.labels == [[scores["verbosity"], -100, scores["humor"]]]


def test_synthetic_texts_need_an_attribute_that_can_be_counted(tokenizer: HFTokenizer) -> None:
    with pytest.raises(ValueError, match=r"labelled with humor, verbosity, none of which is in"):
        synthetic_attribute_dataset(
            tokenizer,
            num_records=2,
            responses_per_prompt=2,
            max_seq_len=256,
            schema=AttributeSchema(("kindness",)),
        )
