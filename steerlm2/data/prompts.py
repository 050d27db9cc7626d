"""Prompts to be answered, and the labels that are requested for their answers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlm2.attributes import AttributeSchema, encode_label
from steerlm2.data.conversations import parse_conversation
from steerlm2.data.jsonl import LineProblems, iter_json_lines
from steerlm2.data.records import (
    ASSISTANT,
    Record,
    Turn,
    parse_record,
    record_to_json,
)

DrawLabel = Callable[[random.Random], str]

_RECORD_KEYS = {"system", "prompt_turns", "label", "responses"}


@dataclass
class Prompt:
    """A conversation before a response, and the label that the file has for the response."""

    system: str
    turns: list[Turn]
    label: str | None
    extra: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of conversations, or of SteerLM2 records (with or without responses).

    If a conversation's last turn is the assistant's, its prompt is everything before that turn, and
    the label is the turn's; otherwise the prompt is all of it. Labels of earlier turns stay.

    Args:
        limit: read only so many; None: all.

    Raises:
        FileNotFoundError: with the absolute path.
        ValueError: naming the bad lines (the first 10), or an empty file.
    """
    problems = LineProblems(path)
    prompts = []
    for line_number, obj in itertools.islice(iter_json_lines(path, problems), limit):
        try:
            prompts.append(parse_prompt(obj))
        except ValueError as error:
            problems.add(line_number, str(error))
    problems.raise_if_any()
    if not prompts:
        raise ValueError(f"{path} holds no prompts: the file is empty")
    return prompts


def parse_prompt(obj: object) -> Prompt:
    """The prompt of a decoded line, as in `read_prompts`.

    Raises:
        ValueError: with all problems of the line.
    """
    if isinstance(obj, dict) and "conversations" in obj:
        conversation = parse_conversation(obj, allow_empty=True)
        *turns, last = conversation.turns
        label = last.label if last.role == ASSISTANT else None
        if last.role != ASSISTANT:
            turns.append(last)
        record = Record(conversation.system, turns, label, [])
        extra = {k: v for k, v in conversation.extra.items() if k not in _RECORD_KEYS}
        obj = record_to_json(record) | extra
    elif not (isinstance(obj, dict) and "prompt_turns" in obj):
        raise ValueError(
            "neither a conversation (with 'conversations') nor a SteerLM2 record (with "
            "'prompt_turns')"
        )
    record = parse_record(obj | {"responses": []}, require=(), min_responses=0)
    return Prompt(record.system, record.prompt_turns, record.label, record.extra)


def labels_in(path: str | Path) -> list[str]:
    """All labels of a file: of records, or of every assistant turn of conversations.

    Raises:
        FileNotFoundError: with the absolute path.
        ValueError: naming the bad lines (the first 10), or where there are no labels.
    """
    problems = LineProblems(path)
    labels: list[str | None] = []
    for line_number, obj in iter_json_lines(path, problems):
        try:
            if isinstance(obj, dict) and "conversations" in obj:
                conversation = parse_conversation(obj, allow_empty=True)
                labels += [turn.label for turn in conversation.turns]
            else:
                labels.append(parse_prompt(obj).label)
        except ValueError as error:
            problems.add(line_number, str(error))
    problems.raise_if_any()
    found = [label for label in labels if label]
    if not found:
        raise ValueError(f"{path} holds no labels")
    return found


def uniform_labels(attributes: list[str], schema: AttributeSchema) -> DrawLabel:
    """A function that draws values of these attributes, uniformly from the range of each.

    Raises:
        UnknownAttributes: for attributes that the schema doesn't have.
    """
    named = schema.select(attributes)
    values = {name: named.values_of(name) for name in attributes}
    return lambda rng: encode_label({name: rng.choice(values[name]) for name in values}, schema)


def labels_like(labels: Sequence[str]) -> DrawLabel:
    """A function that draws a label of the list, each occurrence with the same probability."""
    return lambda rng: rng.choice(labels)


def draw_labels(draw: DrawLabel, count: int, seed: int, index: int) -> list[str]:
    """`count` different labels for a prompt, which depend only on the seed and its index."""
    rng = random.Random(f"labels:{seed}:{index}")
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw(rng)] = None
    return list(drawn)
