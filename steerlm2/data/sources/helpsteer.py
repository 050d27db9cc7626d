"""HelpSteer, HelpSteer2, HelpSteer3: answers with human scores, pairs with a preference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from steerlm2.attributes import AttributeSchema, encode_label
from steerlm2.data.conversations import Conversation, has_empty_answer, is_text, turns_in
from steerlm2.data.jsonl import LineProblems
from steerlm2.data.records import ASSISTANT, USER, Turn
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT, Unit
from steerlm2.data.sources.rows import Row, iter_rows

HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

PREFERENCE_ATTRIBUTE = "quality"
"""The published data has a pair's preference strength as the value of this attribute."""

MAX_STRENGTH = 3
"""Of a preference; below 0 the first response of a pair is the better one."""

_SUBSET = "preference"
_ROLES = {"user": USER, "assistant": ASSISTANT}

_log = logging.getLogger(__name__)


def helpsteer_conversations(
    source: str | Path,
    *,
    only_helpfulness: bool = False,
    preference: bool = False,
    split_turns: bool = True,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> Iterator[Unit]:
    """HelpSteer and HelpSteer2: one prompt and one scored response a row.

    Rows with an empty response, and those whose turns don't alternate between user and assistant,
    are left out, and their numbers are logged.

    Args:
        source: a file, folder or hub id (`iter_rows`).
        only_helpfulness: the label names no other attribute.
        preference: HelpSteer2's pairs instead, read from `preference/`. Both responses of a pair
            become a conversation, one after the other, and have the same label: the strength, from
            -3 (the first is much better) to 3 (the second is), under `PREFERENCE_ATTRIBUTE`.
        split_turns: HelpSteer2 writes a prompt of several turns as one text with
            "<extra_id_1>Assistant" between them. True: split it into its turns. False: leave it one
            text, as the published conversation files do. The regression files are the same in both
            cases, so that their texts are other ones to a model than those of the conversations;
            the number of such prompts is logged.
        system_prompt: of every conversation.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for both options together; after the last row, naming the bad ones.
    """
    if preference and only_helpfulness:
        raise ValueError(
            "'only_helpfulness' does not apply to preference pairs, which have one value: set one "
            "of 'preference' and 'only_helpfulness'"
        )
    names = HELPSTEER_ATTRIBUTES[:1] if only_helpfulness else HELPSTEER_ATTRIBUTES

    def prompt_turns(prompt: str) -> list[Turn]:
        return turns_in(prompt) if split_turns else [Turn(USER, prompt)]

    def scored(row: Row) -> Unit:
        prompt, response = _texts(row.value, "prompt", "response")
        label = encode_label({name: row.value[name] for name in names if name in row.value})
        turns = [*prompt_turns(prompt), Turn(ASSISTANT, response, label)]
        return Unit([Conversation(turns, system_prompt)], row.split)

    def pair(row: Row) -> Unit:
        prompt, first, second = _texts(row.value, "prompt", "response_1", "response_2")
        before = Conversation(prompt_turns(prompt), system_prompt)
        unit = _pair(before, first, second, row.value.get("preference_strength"))
        split = row.value.get("split")  # one file holds both
        unit.split = row.split if split is None else "train" if split == "train" else "validation"
        return unit

    convert, subset = (pair, _SUBSET) if preference else (scored, "")
    return _units(source, convert, subset, as_published=not split_turns)


def helpsteer3_conversations(
    source: str | Path,
    *,
    preference: bool = True,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> Iterator[Unit]:
    """HelpSteer3's preference pairs; their contexts are lists of chat messages.

    Pairs with an empty response, or an empty answer before it, and those whose context doesn't
    alternate from a user's turn to a user's, are left out, and their numbers are logged. Labels and
    the order of a pair are those of `helpsteer_conversations`.

    Args:
        source: a file, folder or hub id (`iter_rows`).
        preference: must be true, because HelpSteer3 has no scored responses.
        system_prompt: of a conversation that doesn't begin with a system message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for `preference` false; after the last row, naming the bad ones.
    """
    if not preference:
        raise ValueError("HelpSteer3 has preference pairs only: set 'preference' to true")

    def pair(row: Row) -> Unit:
        first, second = _texts(row.value, "response1", "response2")
        before = _context(row.value.get("context"), system_prompt)
        unit = _pair(before, first, second, row.value.get("overall_preference"))
        unit.split = row.split
        return unit

    return _units(source, pair, _SUBSET)


def _units(
    source: str | Path,
    convert: Callable[[Row], Unit],
    subset: str = "",
    as_published: bool = False,
) -> Iterator[Unit]:
    problems = LineProblems(source)
    num_empty, num_out_of_order, num_several_turns = 0, 0, 0
    for row in iter_rows(source, problems, subset):
        try:
            unit = convert(row)
        except ValueError as error:
            problems.add(row.number, str(error), row.path)
            continue
        if any(map(has_empty_answer, unit.conversations)):
            num_empty += 1
            continue
        if not all(map(_alternates, unit.conversations)):
            num_out_of_order += 1
            continue
        unit.as_published = as_published
        num_several_turns += as_published and len(turns_in(_prompt(unit))) > 1
        yield unit
    problems.raise_if_any()
    if num_empty:
        _log.warning("%s: left out %d rows with an empty response", source, num_empty)
    if num_out_of_order:
        _log.warning(
            "%s: left out %d rows whose turns before the response don't alternate between user and "
            "assistant, from a user's to a user's",
            source,
            num_out_of_order,
        )
    if num_several_turns:
        _log.warning(
            "%s: %d prompts of several turns are one text in the conversation files and turns in "
            "the regression files, so models read them differently (builder.split_turns=true: "
            "turns in both)",
            source,
            num_several_turns,
        )


def _alternates(conversation: Conversation) -> bool:
    """Whether the turns are the user's and the assistant's in turn, from the user's first."""
    roles = [turn.role for turn in conversation.turns]
    return len(roles) % 2 == 0 and roles == [USER, ASSISTANT] * (len(roles) // 2)


def strengths_of(schema: AttributeSchema) -> AttributeSchema:
    """The schema of pairs, whose labels have a preference's strength as an attribute's value."""
    return AttributeSchema.sharing(schema.names, -MAX_STRENGTH, MAX_STRENGTH)


def _prompt(unit: Unit) -> str:
    return unit.conversations[0].turns[0].value


def _pair(before: Conversation, first: str, second: str, strength: Any) -> Unit:
    if strength not in range(-MAX_STRENGTH, MAX_STRENGTH + 1) or isinstance(strength, bool):
        raise ValueError(
            f"the preference must be a whole number from {-MAX_STRENGTH} to {MAX_STRENGTH}, "
            f"got {strength!r}"
        )
    label = f"{PREFERENCE_ATTRIBUTE}:{int(strength)}"
    return Unit(
        [
            Conversation([*before.turns, Turn(ASSISTANT, response, label)], before.system)
            for response in (first, second)
        ],
        is_pair=True,
    )


def _context(messages: Any, system_prompt: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'context' must be a list of messages")
    turns = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES and not (role == "system" and i == 0):
            raise ValueError(f"context[{i}]: 'role' must be 'user' or 'assistant', got {role!r}")
        (text,) = _texts(message, "content", where=f"context[{i}]: ")
        if role == "system":
            system_prompt = text
        else:
            turns.append(Turn(_ROLES[role], text))
    return Conversation(turns, system_prompt)


def _texts(obj: Any, *keys: str, where: str = "") -> list[str]:
    """The texts under these keys.

    Raises:
        ValueError: naming every key that has none.
    """
    if not isinstance(obj, dict):
        raise ValueError("a row must be a JSON object")
    wrong = [repr(key) for key in keys if not is_text(obj.get(key))]
    if wrong:
        raise ValueError(f"{where}{', '.join(wrong)} must be text")
    return [obj[key] for key in keys]
