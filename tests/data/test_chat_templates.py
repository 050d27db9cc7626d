"""What transformers makes of an export's chat template is what models are trained on, id by id."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from steerlm2.attributes import AttributeSchema, parse_label
from steerlm2.checkpoints.side_files import TrainedText, write_tokenizer
from steerlm2.data.chat_templates import messages_of
from steerlm2.data.records import ASSISTANT, USER, Turn
from steerlm2.data.templates import encode_for_scoring, encode_prompt, response_end
from steerlm2.facts import Kind, ModelFacts
from tests.data.test_templates import PAIRS

SCHEMA = AttributeSchema(("humor", "verbosity"))
DEFAULT = "humor:1,verbosity:2"
SYSTEM = "Be terse.\n"
SPELLED = [token for template, _ in PAIRS.values() for token in template.control_tokens]

each_pair = pytest.mark.parametrize("pair", PAIRS)

contents = st.text("ab.,:?! \n\t<|>{}é😀", max_size=12).filter(
    lambda text: not any(token in text for token in SPELLED)
)
labels = st.builds("humor:{},verbosity:{}".format, st.integers(0, 4), st.integers(0, 4))
questions = st.builds(Turn, st.just(USER), contents)
answers = st.builds(Turn, st.just(ASSISTANT), contents, st.none() | labels)
conversations = st.builds(
    lambda pairs, last: [*(turn for pair in pairs for turn in pair), last],
    st.lists(st.tuples(questions, answers), max_size=2),
    questions,
)


@functools.cache
def exported(pair: str, kind: Kind = "language model", *, labels: bool = True) -> Any:
    """The tokenizer as transformers loads it from the folder that an export has."""
    template, tokenizer = PAIRS[pair]
    facts = ModelFacts(
        kind=kind,
        template={},
        schema=SCHEMA if labels else None,
        default_label=DEFAULT if labels else None,
        system=SYSTEM,
    )
    stop_id = response_end(template, tokenizer)[1]
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), TrainedText(tokenizer, template, stop_id), 0, facts)
        return AutoTokenizer.from_pretrained(folder)


def ids(pair: str, messages: list[dict[str, Any]], **arguments: Any) -> list[int]:
    arguments = {"add_generation_prompt": True} | arguments
    tokenizer = arguments.pop("tokenizer", None) or exported(pair)
    return list(tokenizer.apply_chat_template(messages, return_dict=False, **arguments))


def ours(pair: str, system: str, turns: list[Turn], label: str | None) -> list[int]:
    template, tokenizer = PAIRS[pair]
    return encode_prompt(template, tokenizer, system, turns, label)


QUESTION = [Turn(USER, "Why?")]
MESSAGES = [{"role": "user", "content": "Why?"}]


@each_pair
@given(system=contents, turns=conversations, label=labels)
def test_a_prompt_has_the_ids_that_are_trained_on(
    pair: str, system: str, turns: list[Turn], label: str
) -> None:
    messages = messages_of(system, turns)
    expected = ours(pair, system, turns, label)
    assert ids(pair, messages, attributes=parse_label(label)) == expected
    assert ids(pair, messages, attributes=label) == expected


@each_pair
def test_what_is_not_said_is_as_in_training(pair: str) -> None:
    """The usual system text, and the usual values."""
    assert ids(pair, MESSAGES) == ours(pair, SYSTEM, QUESTION, DEFAULT)
    assert ids(pair, MESSAGES, attributes={"verbosity": 4}) == ours(
        pair, SYSTEM, QUESTION, "humor:1,verbosity:4"
    )


@each_pair
def test_there_need_be_no_label_and_no_system_text(pair: str) -> None:
    messages = [{"role": "system", "content": ""}, *MESSAGES]
    assert ids(pair, messages, attributes="") == ours(pair, "", QUESTION, None)


@each_pair
def test_a_message_can_say_the_label(pair: str) -> None:
    """For tools that pass no arguments."""
    label = {"role": "attributes", "content": "verbosity:0,humor:4"}
    assert ids(pair, [*MESSAGES, label]) == ours(pair, SYSTEM, QUESTION, "humor:4,verbosity:0")


@each_pair
def test_a_model_without_labels_has_none(pair: str) -> None:
    tokenizer = exported(pair, labels=False)
    assert ids(pair, MESSAGES, tokenizer=tokenizer) == ours(pair, SYSTEM, QUESTION, None)
    with pytest.raises(Exception, match="unknown attribute humor"):
        ids(pair, MESSAGES, tokenizer=tokenizer, attributes={"humor": 1})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"humour": 1}, "unknown attribute humour, known: humor, verbosity"),
        ({"humor": 5}, "humor must be a whole number from 0 to 4, got 5"),
        ({"humor": -1}, "humor must be a whole number from 0 to 4, got -1"),
        ({"humor": 1.5}, "humor must be a whole number"),
        ({"humor": True}, "humor must be a whole number"),
        ({"humor": "4"}, "humor must be a whole number"),
        ("humor:5", "humor must be a whole number"),
        ("humor", "humor is not of the form name:number"),
        ("humor:04", "humor:04 is not of the form name:number"),
        ("humor:4 ,verbosity:1", "humor:4  is not of the form name:number"),
    ],
)
def test_other_attributes_are_refused(attributes: Any, message: str) -> None:
    with pytest.raises(Exception, match=message):
        ids("llama3", MESSAGES, attributes=attributes)


@pytest.mark.parametrize("role", ["tool", "function", "User"])
def test_other_roles_are_refused(role: str) -> None:
    with pytest.raises(Exception, match=f"unknown role {role}"):
        ids("llama3", [*MESSAGES, {"role": role, "content": "x"}])


@each_pair
def test_a_whole_conversation_ends_with_the_stop_token(pair: str) -> None:
    template, tokenizer = PAIRS[pair]
    answer = {"role": "assistant", "content": "So.", "attributes": {"humor": 0}}
    whole = ids(pair, [*MESSAGES, answer], add_generation_prompt=False)
    prompt = ours(pair, SYSTEM, QUESTION, "humor:0,verbosity:2")
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == response_end(template, tokenizer)[1]


@each_pair
@given(system=contents, turns=conversations, answer=contents)
def test_an_attribute_model_reads_what_it_was_trained_on(
    pair: str, system: str, turns: list[Turn], answer: str
) -> None:
    """Whatever labels the messages have."""
    template, tokenizer = PAIRS[pair]
    group, _ = encode_for_scoring(template, tokenizer, system, turns, [answer], 10_000)
    messages = messages_of(system, [*turns, Turn(ASSISTANT, answer, "humor:1,verbosity:1")])
    assert ids(pair, messages, tokenizer=exported(pair, "attribute model")) == [
        *group.prompt,
        *group.responses[0],
    ]


def test_an_attribute_model_needs_an_answer() -> None:
    with pytest.raises(Exception, match="the last message must be the assistant's"):
        ids("llama3", MESSAGES, tokenizer=exported("llama3", "attribute model"))
