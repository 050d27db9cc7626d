"""Labelled conversations, for supervised fine-tuning and for attribute models.

Two published formats, one JSON object a line:

    conversation  {"conversations": [{"value", "from", "label"}, ...], "system", "mask", "type"}
    regression    {"text": the conversation so far + "<extra_id_2>", "label": [one per attribute]}
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlm2.attributes import (
    DEFAULT_SCHEMA,
    NOT_LABELLED,
    AttributeSchema,
    UnknownAttributes,
    parse_label,
    read_label,
)
from steerlm2.data.jsonl import LineProblems, iter_json_lines
from steerlm2.data.records import ASSISTANT, REPLACEMENT, USER, Turn, is_blank

REGRESSION_MARKERS = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
"""What begins the system text, a turn and a label in a text of the regression format."""

_SYSTEM_START = "<extra_id_0>System\n"
_TURN_START = re.compile(rf"\n<extra_id_1>({USER}|{ASSISTANT})\n")
_LABEL_START = "\n<extra_id_2>"

_TYPE = "VALUE_TO_TEXT"  # the label is before the response
_KNOWN_KEYS = {"conversations", "system", "mask", "type"}
_OTHER_LAYOUTS = " (`prepare_data --config data/chat` reads other layouts)"
_KNOWN_TURN_KEYS = {"value", "from", "label"}


@dataclass
class Conversation:
    """A conversation whose assistant turns may have labels. Roles may come in any order."""

    turns: list[Turn]
    system: str
    extra: dict[str, Any] = field(default_factory=dict)


def parse_conversation(
    obj: object,
    *,
    schema: AttributeSchema | None = None,
    default_system: str | None = None,
    allow_empty: bool = False,
) -> Conversation:
    """Check one decoded JSON object of the conversation format. Unknown keys are kept.

    Args:
        schema: if given, labels may use only its names and values, and come in its order.
        default_system: where the object has no "system"; with None it must have one.
        allow_empty: accept turns of the assistant without text, which a model would learn to end
            at once.

    Raises:
        UnknownAttributes: where the only mistake is attributes that the schema doesn't have.
        ValueError: with all problems of the conversation in one message.
    """
    if not isinstance(obj, dict):
        raise ValueError("a conversation must be a JSON object")
    problems: list[str] = []
    unknown: list[UnknownAttributes] = []
    system = default_system if obj.get("system") is None else obj["system"]
    if not is_text(system):
        problems.append(
            "missing 'system' (`prepare_data --config data/conversations` fills it in)"
            if system is None
            else "'system' must be text"
        )
    if obj.get("mask") not in (USER, None):
        problems.append(f"'mask' must be {USER!r}, got {obj['mask']!r}")
    if obj.get("type") not in (_TYPE, None):
        problems.append(f"'type' must be {_TYPE!r}, got {obj['type']!r}")
    items = obj.get("conversations")
    if not isinstance(items, list) or not items:
        problems.append(f"'conversations' must be a list of at least one turn{_OTHER_LAYOUTS}")
        items = []
    turns = []
    for i, item in enumerate(items):
        own: list[str] = []
        try:
            turns.append(_parse_turn(item, schema, allow_empty, own))
        except UnknownAttributes as error:
            unknown.append(error)
            own.append(str(error))
        problems += [f"conversations[{i}]: {problem}" for problem in own]
    if schema is not None and unknown and len(unknown) == len(problems):
        names = dict.fromkeys(name for error in unknown for name in error.names)
        raise UnknownAttributes("; ".join(problems), names, schema)
    if problems:
        raise ValueError("; ".join(problems))
    return Conversation(turns, str(system), _rest(obj, _KNOWN_KEYS))


def conversation_to_json(conversation: Conversation) -> dict[str, Any]:
    """The published JSON object, its keys in the published order.

    A user's turn always has a label, null; an assistant's without one has no such key.
    """
    turns = [
        {"value": turn.value, "from": turn.role}
        | ({"label": turn.label} if turn.role == USER or turn.label is not None else {})
        | turn.extra
        for turn in conversation.turns
    ]
    known = {"conversations": turns, "system": conversation.system, "mask": USER, "type": _TYPE}
    return known | conversation.extra


def iter_conversations(
    path: str | Path, *, schema: AttributeSchema | None = None, default_system: str | None = None
) -> Iterator[Conversation]:
    """The conversations of a .jsonl or .jsonl.gz file, in constant memory.

    Args:
        path: of the file.
        schema: as in `parse_conversation`.
        default_system: as in `parse_conversation`.

    Raises:
        FileNotFoundError: with the absolute path.
        ValueError: after the last conversation, naming the bad lines (the first 10).
    """
    problems = LineProblems(path)
    for line_number, obj in iter_json_lines(path, problems):
        try:
            conversation = parse_conversation(obj, schema=schema, default_system=default_system)
        except ValueError as error:
            problems.add(line_number, str(error))
        else:
            yield conversation
    problems.raise_if_any()


def regression_records(
    conversation: Conversation, schema: AttributeSchema = DEFAULT_SCHEMA
) -> Iterator[dict[str, Any]]:
    """One record of the regression format for every labelled turn, the text ending with that turn.

    Raises:
        UnknownAttributes: for a label that names an attribute the schema doesn't have.
        ValueError: for a label with a value outside its attribute's range.
    """
    text = f"<extra_id_0>System\n{conversation.system}\n"
    for turn in conversation.turns:
        text += f"<extra_id_1>{turn.role}\n{turn.value}\n"
        if not turn.label:
            continue
        values = parse_label(turn.label, schema)
        label = [float(values.get(name, NOT_LABELLED)) for name in regression_names(schema)]
        yield {"text": f"{text}<extra_id_2>", "label": label}


def regression_names(schema: AttributeSchema) -> tuple[str, ...]:
    """The attributes of a label of the regression format, a list, in their order.

    That of the schema, unless its attributes are those of the published files: theirs then.
    """
    published = set(schema.names) == set(DEFAULT_SCHEMA.names)
    return DEFAULT_SCHEMA.names if published else schema.names


def spells_marker(conversation: Conversation) -> bool:
    """Whether a content spells a marker of the regression format, which takes it for its own."""
    texts = [conversation.system, *(turn.value for turn in conversation.turns)]
    return any(marker in text for text in texts for marker in REGRESSION_MARKERS)


def has_empty_answer(conversation: Conversation) -> bool:
    """Whether a turn of the assistant has nothing to read."""
    return any(t.role == ASSISTANT and is_blank(t.value) for t in conversation.turns)


def has_broken_answer(conversation: Conversation) -> bool:
    """Whether a turn of the assistant has U+FFFD, which decoders write for bytes that are no UTF-8.

    A model would learn to write it.
    """
    return any(t.role == ASSISTANT and REPLACEMENT in t.value for t in conversation.turns)


def turns_in(text: str) -> list[Turn]:
    """The turns of a text, which begin at lines "<extra_id_1>User" and "<extra_id_1>Assistant".

    The text before the first such line is a turn of the user.
    """
    first, *pieces = _TURN_START.split(text)
    later = [Turn(*piece) for piece in zip(pieces[::2], pieces[1::2], strict=True)]
    return [Turn(USER, first), *later]


def parse_regression_text(text: str) -> tuple[str, list[Turn]]:
    """(system, turns) of a text of the regression format; the last turn is the one to be scored.

    The format can't distinguish a turn from a line "<extra_id_1>User" inside a turn: every such
    line begins a turn (HelpSteer2 writes the turns of a long prompt in this way). Conversations
    that `spells_marker` finds need the conversation format.

    Raises:
        ValueError: where the text isn't of that format.
    """
    problems = []
    if not text.startswith(_SYSTEM_START):
        problems.append("doesn't begin with '<extra_id_0>System' and a line break")
    if not text.endswith(_LABEL_START):
        problems.append("doesn't end with a line break and '<extra_id_2>'")
    if not problems:
        body = text.removeprefix(_SYSTEM_START).removesuffix(_LABEL_START)
        system, *turns = turns_in(body)
        if turns and turns[-1].role == ASSISTANT:
            return system.value, turns
        problems.append("its last turn doesn't begin with '<extra_id_1>Assistant'")
    raise ValueError("the text isn't of the regression format: it " + " and ".join(problems))


def _parse_turn(
    item: object, schema: AttributeSchema | None, allow_empty: bool, problems: list[str]
) -> Turn:
    if not isinstance(item, dict):
        problems.append("must be a JSON object")
        return Turn(USER, "")
    role, value, label = item.get("from"), item.get("value"), item.get("label")
    if role not in (USER, ASSISTANT):
        hint = _OTHER_LAYOUTS if role in ("human", "gpt") else ""
        problems.append(f"'from' must be {USER!r} or {ASSISTANT!r}, got {role!r}{hint}")
    if not is_text(value):
        problems.append("'value' must be text")
    elif role == ASSISTANT and not allow_empty and is_blank(str(value)):
        problems.append("the response text is empty")
    if label is not None and not isinstance(label, str):
        problems.append(f"'label' must be text or null, got {label!r}")
    elif label and role == USER:
        problems.append(f"only turns of {ASSISTANT!r} can have a label")
    elif label:
        try:
            label = read_label(label, schema)
        except UnknownAttributes:
            raise
        except ValueError as error:
            problems.append(str(error))
    # Published files say "" where no attribute is labelled; a template would print an empty label.
    return Turn(str(role), str(value), label or None, _rest(item, _KNOWN_TURN_KEYS))


def is_text(value: object) -> bool:
    """Whether `value` is a string that UTF-8 can hold: one without half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _rest(obj: dict[str, Any], known: set[str]) -> dict[str, Any]:
    return {key: value for key, value in obj.items() if key not in known}
