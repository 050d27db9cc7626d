"""What a row of each layout says: a `Sample`, turns and the answers to them.

The functions `read_*` take the parts of a row by their names in the layout, and its other columns.
They raise LeftOut for what no conversation can hold, and ValueError for mistakes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from steerlm2.data.conversations import has_empty_answer, parse_conversation
from steerlm2.data.records import ASSISTANT, USER, Record, Turn, is_blank, parse_record
from steerlm2.data.sources.turns import (
    APART,
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    LATE_SYSTEM,
    NO_ANSWER,
    Json,
    LeftOut,
    drop_space,
    is_list_of,
    short,
    spelled_turns,
    structure,
    text_of,
    turn_list,
    turns_of,
    turns_of_messages,
)


@dataclass
class Answer:
    """An answer, and everything that the row has besides it, in which its scores may be."""

    value: str
    fields: Json = field(default_factory=dict)
    label: str | None = None
    """A label that stands with the message."""


@dataclass
class Sample:
    """What a row says: one answer, several, or the chosen one and the rejected one."""

    system: str | None
    turns: list[Turn]
    """Before the answers; the whole conversation if there are none."""
    answers: list[Answer]
    fields: Json = field(default_factory=dict)
    """What the row has besides turns that no answer follows, or whose last is the answer."""
    extra: Json = field(default_factory=dict)
    """Kept with a conversation."""
    record: Record | None = None
    """The row itself, if it is a SteerLM2 record."""


def read_messages(parts: Json, others: Json) -> Sample:
    """A whole conversation."""
    system, turns = turns_of_messages(parts["messages"], "messages")
    return _answered(_system_of(parts, system), turns, others)


def read_prompt_response(parts: Json, others: Json) -> Sample:
    """A prompt and its answer."""
    system, before = turns_of(parts["prompt"], USER, "prompt")
    own, answer = turns_of(parts["response"], ASSISTANT, "response")
    if own is not None:
        raise LeftOut(LATE_SYSTEM)
    drop_space(parts["prompt"], answer[-1])
    return _answered(_system_of(parts, system), before + answer, others)


def read_prompt(parts: Json, others: Json) -> Sample:
    """A prompt alone."""
    system, turns = turns_of(parts["prompt"], USER, "prompt")
    return Sample(_system_of(parts, system), turns, [], others)


def read_alpaca(parts: Json, others: Json) -> Sample:
    """An instruction with its input, after earlier questions and answers."""
    _, asked = turns_of(parts["instruction"], USER, "instruction")
    _, answer = turns_of(parts["output"], ASSISTANT, "output")
    extra = parts.get("input")
    if extra is not None and text_of(extra, "'input'").strip():
        asked[0].value += f"\n\n{extra}"
    turns: list[Turn] = []
    for i, pair in enumerate(structure(parts.get("history")) or []):
        where = f"history[{i}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{where} must be a question and its answer, got {short(pair)}")
        turns += turns_of(pair[0], USER, where)[1] + turns_of(pair[1], ASSISTANT, where)[1]
    return _answered(_system_of(parts), [*turns, *asked, *answer], others)


def read_preference(parts: Json, others: Json) -> Sample:
    """A chosen answer and a rejected one."""
    sides = [_side(parts[name], name, parts.get("prompt")) for name in ("chosen", "rejected")]
    (system, before, chosen), (other_system, other_before, rejected) = sides
    if (system, _spoken(before)) != (other_system, _spoken(other_before)):
        raise LeftOut(APART)
    asked_system, asked = None, before
    if parts.get("prompt") is not None:
        asked_system, prompt = turns_of(parts["prompt"], USER, "prompt")
        # Most repeat the prompt in both conversations.
        said, asking = _spoken(before), _spoken(prompt)
        repeated = said[: len(asking)] == asking or (len(asking) == 1 and asking[0] in said)
        asked = before if repeated else prompt + before
    if not asked:
        raise ValueError("has no prompt: neither a column nor turns that both conversations share")
    answers = [
        Answer(turn.value, fields_of_side(others, name) | turn.extra, turn.label)
        for name, turn in (("chosen", chosen), ("rejected", rejected))
    ]
    return Sample(_system_of(parts, system if system is not None else asked_system), asked, answers)


def _spoken(turns: Iterable[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.value) for turn in turns]


def _side(content: Any, name: str, prompt: Any) -> tuple[str | None, list[Turn], Turn]:
    """(system text, turns before the answer, answer)."""
    is_text = turn_list(content) is None and isinstance(content, str)
    spelled = spelled_turns(content) if is_text else []
    if is_text and prompt is None and not spelled:
        raise ValueError(
            f"{name!r} is one text and there is no prompt column: name it with builder.columns="
            "{prompt: NAME}"
        )
    if spelled and (prompt is None or (len(spelled) > 1 and spelled[0].role == USER)):
        system, turns = None, spelled
    else:
        system, turns = turns_of(content, ASSISTANT, name)
        drop_space(prompt, turns[-1])
    if turns[-1:] and turns[-1].role == ASSISTANT and not is_blank(turns[-1].value):
        return system, turns[:-1], turns[-1]
    raise LeftOut(EMPTY_ANSWER if turns[-1:] and turns[-1].role == ASSISTANT else NO_ANSWER)


def has_prompt(content: Any) -> bool:
    """Whether a side of a preference has turns before its answer."""
    return turn_list(content) is not None or bool(spelled_turns(content))


def fields_of_side(others: Json, name: str) -> Json:
    """`score_chosen`, `chosen_score`, `chosen-score` -> `score`."""
    found = {}
    for key, value in others.items():
        words = re.split(r"[\W_]+", key)
        if name in words and len(words) > 1:
            found["_".join(word for word in words if word != name)] = value
    return found


_TEXT_KEYS = ("response", "value", "text", "content", "completion", "answer", "output")
NESTED = ("scores", "label", "labels", "attributes", "annotations", "ratings")
_RATING_KEYS = ("Rating", "rating", "score", "value")


def is_responses(value: Any) -> bool:
    """Whether it is a list of answers, texts or objects with a text."""
    value = structure(value)
    if not isinstance(value, list) or not value or turn_list(value) is not None:
        return False
    return all(
        each is None
        or isinstance(each, str)
        or (isinstance(each, dict) and _text_key(each) is not None)
        for each in value
    )


def _text_key(item: Json) -> str | None:
    """The key of a response's text, which may be null."""
    given = (key for key in _TEXT_KEYS if isinstance(item.get(key), str))
    return next(given, next((key for key in _TEXT_KEYS if key in item and item[key] is None), None))


def read_responses(parts: Json, others: Json) -> Sample:
    """Several answers to a prompt, with values in them or in lists beside them."""
    system, turns = turns_of(parts["prompt"], USER, "prompt")
    items = structure(parts["responses"])
    if not isinstance(items, list):
        raise ValueError(f"'responses' must be a list, got {short(items)}")
    if not items:
        raise LeftOut(NO_ANSWER)
    lists = {k: value for k, raw in others.items() if isinstance(value := structure(raw), list)}
    answers = []
    for i, item in enumerate(items):
        key = _text_key(item) if isinstance(item, dict) else None
        text = item[key] if isinstance(item, dict) and key else item
        text = "" if text is None else text
        own = {k: v for k, v in item.items() if k != key} if isinstance(item, dict) else {}
        fields = {
            name: values[i] if len(values) == len(items) else NotParallel(len(values), len(items))
            for name, values in lists.items()
        }
        answers.append(Answer(text_of(text, f"responses[{i}]"), fields | own))
    return Sample(_system_of(parts, system), turns, answers)


@dataclass(frozen=True)
class NotParallel:
    """What a list beside the responses gives a response where their lengths differ: no value, and
    an error for those who take the list for an attribute."""

    num_values: int
    num_responses: int

    def __str__(self) -> str:
        return f"has {self.num_values} values for {self.num_responses} responses"


def flat_fields(fields: Json) -> Json:
    """The fields, and those in objects such as `scores` and `labels`."""
    nested = [fields[key] for key in NESTED if key in fields]
    found = {key: value for key, value in fields.items() if key not in NESTED}
    for value in map(structure, nested):
        if isinstance(value, dict):
            found |= value
    for key in NESTED:
        if key in fields and not isinstance(structure(fields[key]), dict):
            found[key] = fields[key]
    return found


def rating(value: Any) -> Any:
    """The number in an annotation such as {"Rating": "4", "Rationale": ...}; else the value."""
    if isinstance(value, dict):
        return next((value[key] for key in _RATING_KEYS if key in value), value)
    return value


def is_own(value: Any) -> bool:
    """Whether it is the turns of our own format."""
    return is_list_of(value, "from", "value") and all(
        turn["from"] in (USER, ASSISTANT) for turn in value
    )


def read_own(parts: Json, others: Json) -> Sample:
    """A conversation of our own format."""
    own = others | {"conversations": structure(parts["conversations"])}
    conversation = parse_conversation(own, default_system="", allow_empty=True)
    if has_empty_answer(conversation):
        raise LeftOut(EMPTY_ANSWER)
    extra = conversation.extra
    return Sample(own.get("system"), conversation.turns, [], fields=extra, extra=extra)


def read_record(parts: Json, others: Json) -> Sample:
    """A SteerLM2 record."""
    own = {part: structure(value) for part, value in parts.items()}
    record = parse_record(others | own, require=(), min_responses=0)
    answers = [Answer(response.value, dict(response.scores or {})) for response in record.responses]
    return Sample(record.system, record.prompt_turns, answers, record=record)


def _answered(system: str | None, turns: list[Turn], fields: Json) -> Sample:
    """A sample of a conversation; what it ends with is the answer if it is the assistant's."""
    if not turns:
        raise LeftOut(EMPTY_PROMPT)
    if turns[-1].role != ASSISTANT:
        return Sample(system, turns, [], fields)
    last = turns[-1]
    return Sample(system, turns[:-1], [Answer(last.value, fields | last.extra, last.label)])


def _system_of(parts: Json, own: str | None = None) -> str | None:
    """The system text of a message, else of the column, in which "" is none."""
    if own is not None:
        return own
    system = parts.get("system")
    if system is None or system == "":
        return None
    return text_of(system, "'system'")
