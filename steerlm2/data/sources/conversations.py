"""Conversations in the conversation format: a user's own, or those of an earlier run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steerlm2.attributes import AttributeSchema, as_schema, parse_label
from steerlm2.data.conversations import Conversation, parse_conversation
from steerlm2.data.jsonl import LineProblems
from steerlm2.data.records import ASSISTANT
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT, Unit
from steerlm2.data.sources.helpsteer import strengths_of
from steerlm2.data.sources.rows import iter_rows


def labelled_conversations(
    source: str | Path,
    *,
    schema: AttributeSchema | Mapping[str, Any] | None = None,
    preference: bool = False,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> Iterator[Unit]:
    """One conversation a line. Turns may have no label; unknown keys are kept.

    Args:
        source: a file, or a folder of train.jsonl and val.jsonl (or other names that `iter_rows`
            knows).
        schema: the attributes that labels may name, and their range (a mapping in a config).
        preference: two lines are a pair: the same turns but for the last, an assistant's, which
            has the same label in both, one attribute with a value from -3 (the first is much
            better) to 3.
        system_prompt: of a conversation that has none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: after the last conversation, naming the bad ones, among them those with an
            empty answer, and the attributes that the schema lacks.
    """
    schema = as_schema(schema)
    if preference:
        schema = strengths_of(schema)
    return _units(source, schema, 2 if preference else 1, system_prompt)


def _units(
    source: str | Path, schema: AttributeSchema, unit_size: int, system_prompt: str
) -> Iterator[Unit]:
    problems = LineProblems(source)
    rows = iter_rows(source, problems)
    while unit_rows := list(itertools.islice(rows, unit_size)):
        first, last = unit_rows[0], unit_rows[-1]
        try:
            if len(unit_rows) < unit_size or first.path != last.path:
                raise ValueError("the second line of this pair is missing")
            conversations = [
                parse_conversation(row.value, schema=schema, default_system=system_prompt)
                for row in unit_rows
            ]
            if unit_size == 2:
                _check_pair(*conversations)
        except ValueError as error:
            problems.add(first.number, error, first.path)
        else:
            yield Unit(conversations, first.split, is_pair=unit_size == 2)
    problems.raise_if_any()


def _check_pair(first: Conversation, second: Conversation) -> None:
    label = first.turns[-1].label
    if first.turns[-1].role != ASSISTANT or not label or len(parse_label(label)) != 1:
        raise ValueError("a pair must end with an assistant's turn whose label has one attribute")
    if (first.system, first.turns[:-1], label) != (
        second.system,
        second.turns[:-1],
        second.turns[-1].label,
    ):
        raise ValueError("the two lines of a pair must differ in their last text only")
