"""The layouts that chat data comes in: which one a file has, and which columns have its parts.

A layout names its parts ("prompt", "response", ...). The column that has a part is found by the
usual names, or given. `steerlm2.data.sources.layout_rows` reads the rows.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerlm2.data.records import USER, is_blank
from steerlm2.data.sources.layout_rows import (
    Sample,
    has_prompt,
    is_own,
    is_responses,
    read_alpaca,
    read_messages,
    read_own,
    read_preference,
    read_prompt,
    read_prompt_response,
    read_record,
    read_responses,
)
from steerlm2.data.sources.turns import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    Json,
    LeftOut,
    is_content,
    is_list_of,
    short,
    structure,
)

_LONGEST_ROW = 400
"""Characters of a row in a message."""


@dataclass(frozen=True)
class Layout:
    """One way in which people write chat data."""

    name: str
    parts: Mapping[str, tuple[str, ...]]
    """Part -> usual names of its column, in lower case."""
    required: tuple[str, ...]
    fits: Callable[[Json], bool]
    """Whether the values of a row's parts are of the kinds that this layout has."""
    read: Callable[[Json, Json], Sample]
    """The sample of a row, from its parts and the other columns.

    Raises LeftOut for what no conversation can hold, and ValueError for mistakes."""
    looks: str
    """For messages."""


_SYSTEM_NAMES = ("system", "system_prompt", "system_message")
_MESSAGES_NAMES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input", "user")
_RESPONSE_NAMES = (*("response", "completion", "answer", "output", "reply", "assistant", "target"),)
LAYOUTS = (
    Layout(
        "preference",
        {
            "prompt": _PROMPT_NAMES,
            "chosen": ("chosen", "chosen_response", "chosen_answer"),
            "rejected": ("rejected", "rejected_response", "rejected_answer"),
            "system": _SYSTEM_NAMES,
        },
        ("chosen", "rejected"),
        lambda parts: all(
            is_content(parts[name]) and (parts.get("prompt") is not None or has_prompt(parts[name]))
            for name in ("chosen", "rejected")
        ),
        read_preference,
        "columns prompt, chosen, rejected (texts, or lists of messages)",
    ),
    Layout(
        "steerlm2",
        {"prompt_turns": ("prompt_turns",), "responses": ("responses",)},
        ("prompt_turns", "responses"),
        lambda parts: all(isinstance(structure(value), list) for value in parts.values()),
        read_record,
        "our records with prompt_turns and responses",
    ),
    Layout(
        "conversations",
        {"conversations": ("conversations",)},
        ("conversations",),
        lambda parts: is_own(structure(parts["conversations"])),
        read_own,
        'our conversations, [{"from": "User", "value": "..."}, {"from": "Assistant", ...}]',
    ),
    Layout(
        "messages",
        {"messages": _MESSAGES_NAMES, "system": _SYSTEM_NAMES},
        ("messages",),
        lambda parts: is_list_of(structure(parts["messages"]), "role"),
        read_messages,
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}',
    ),
    Layout(
        "sharegpt",
        {"messages": _MESSAGES_NAMES, "system": _SYSTEM_NAMES},
        ("messages",),
        lambda parts: is_list_of(structure(parts["messages"]), "from", "value"),
        read_messages,
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}',
    ),
    Layout(
        "responses",
        {
            "prompt": _PROMPT_NAMES,
            "responses": (
                *("responses", "completions", "answers", "candidates", "generations", "outputs"),
            ),
            "system": _SYSTEM_NAMES,
        },
        ("prompt", "responses"),
        lambda parts: is_content(parts["prompt"]) and is_responses(parts["responses"]),
        read_responses,
        'columns prompt, responses ([{"text": "...", "scores": {...}}, ...], or a list of texts)',
    ),
    Layout(
        "alpaca",
        {
            "instruction": ("instruction",),
            "input": ("input", "context"),
            "output": ("output", "response"),
            "history": ("history",),
            "system": _SYSTEM_NAMES,
        },
        ("instruction", "output"),
        lambda parts: all(isinstance(parts[name], str) for name in ("instruction", "output")),
        read_alpaca,
        "columns instruction, input (may be empty), output; system, history",
    ),
    Layout(
        "prompt_response",
        {"prompt": _PROMPT_NAMES, "response": _RESPONSE_NAMES, "system": _SYSTEM_NAMES},
        ("prompt", "response"),
        lambda parts: is_content(parts["prompt"]) and is_content(parts["response"]),
        read_prompt_response,
        "columns prompt, response (texts, or lists of messages)",
    ),
    Layout(
        "prompts",
        {"prompt": _PROMPT_NAMES, "system": _SYSTEM_NAMES},
        ("prompt",),
        lambda parts: is_content(parts["prompt"]),
        read_prompt,
        "column prompt, without answers",
    ),
)

_ANSWER_PARTS = {"response", "responses", "output", "chosen", "rejected"}
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def normalised(name: str) -> str:
    """A column's name for comparison: "Formality Score " -> "formality_score"."""
    # Some systems write an accent as a character of its own.
    return re.sub(r"\W+", "_", unicodedata.normalize("NFC", name).strip().lower()).strip("_")


def find_column(names: Iterable[str], usual: Iterable[str]) -> str | None:
    """The first of the names that is, as it is or normalised, the first possible of the usual."""
    names = list(names)
    by_normal = {normalised(name): name for name in reversed(names)}
    for each in usual:
        if each in names:
            return each
        if (found := by_normal.get(normalised(each))) is not None:
            return found
    return None


@dataclass(frozen=True)
class Match:
    """A layout, and the columns that have its parts."""

    layout: Layout
    columns: Mapping[str, str]
    """Part -> column, as the first rows have them."""
    seen: frozenset[str]
    """All columns of the first rows."""

    def columns_of(self, row: Json) -> Mapping[str, str]:
        """Part -> column, of a row that may have columns which the first rows lack."""
        if row.keys() <= self.seen:
            return self.columns
        columns = dict(self.columns)
        late = [name for name in row if name not in self.seen and row[name] is not None]
        for part, usual in self.layout.parts.items():
            if late and part not in columns and (name := find_column(late, usual)):
                columns[part] = name
                late.remove(name)
        return columns

    def parts(self, row: Json) -> Json:
        """The row's values by part, without those that it lacks."""
        return {part: row[name] for part, name in self.columns_of(row).items() if name in row}

    def fits(self, row: Any) -> bool:
        """Whether a row is of this layout."""
        if not isinstance(row, dict):
            return False
        parts = self.parts(row)
        return all(name in parts for name in self.layout.required) and self.layout.fits(parts)

    def read(self, row: Any) -> Sample:
        """The sample of a row.

        Raises:
            LeftOut: for a row that no conversation can hold.
            ValueError: for a row of another layout, and for mistakes.
        """
        if not isinstance(row, dict):
            raise ValueError(f"must be an object, got {short(row)}")
        parts = self.parts(row)
        required = self.layout.required
        if lacking := [self.columns[part] for part in required if part not in parts]:
            raise ValueError(f"has no {' and no '.join(map(repr, lacking))}")
        if null := [part for part in required if parts[part] is None]:
            raise LeftOut(EMPTY_ANSWER if null[0] in _ANSWER_PARTS else EMPTY_PROMPT)
        used = {*self.columns_of(row).values()}
        others = {key: value for key, value in row.items() if key not in used}
        sample = self.layout.read(parts, others)
        if not any(turn.role == USER and not is_blank(turn.value) for turn in sample.turns):
            raise LeftOut(EMPTY_PROMPT)
        return sample


def match_of(
    rows: Sequence[Any], layouts: Iterable[Layout], given: Mapping[str, str]
) -> Match | None:
    """The first layout that at least half as many rows fit as the one that most fit.

    Prompts alone are what all layouts with prompts have, so they come last.

    Args:
        rows: the first rows of a file.
        layouts: those that it may have.
        given: part -> column, where it isn't one of the usual names.
    """
    keys = dict.fromkeys(itertools.chain.from_iterable(r for r in rows if isinstance(r, dict)))
    found: list[tuple[int, Match]] = []
    for layout in layouts:
        columns: dict[str, str] = {}
        for part, usual in layout.parts.items():
            left = [key for key in keys if key not in columns.values()]
            column = given.get(part) or find_column(left, usual)
            if column is not None:
                columns[part] = column
        match = Match(layout, columns, frozenset(keys))
        if all(name in columns for name in layout.required) and (
            count := sum(map(match.fits, rows))
        ):
            found.append((count, match))
    better = [each for each in found if each[1].layout.name != "prompts"] or found
    most = max((count for count, _ in better), default=0)
    return next((match for count, match in better if 2 * count >= most), None)


def what_was_found(rows: Sequence[Any], container: str) -> str:
    """A file's container, its columns and a row, for the message that it isn't understood."""
    objects = [row for row in rows if isinstance(row, dict)]
    if not objects:
        kinds = Counter(type(row).__name__ for row in rows)
        return f"{container} whose rows are no objects: {short(rows[0])} ({dict(kinds)})"
    keys = dict.fromkeys(itertools.chain.from_iterable(objects))
    row = short(objects[0])
    row = row if len(row) <= _LONGEST_ROW else row[:_LONGEST_ROW] + "..."
    return f"{container} with the columns {', '.join(map(str, keys))}; a row: {row}"


def fitting_config(rows: Sequence[Any]) -> str | None:
    """What to do with a published layout that isn't one of LAYOUTS."""
    row = next((row for row in rows if isinstance(row, dict)), {})
    config = None
    if isinstance(row.get("prompt"), dict) or "message_tree_id" in row:
        config = "data/oasst (or data/oasst_groups)"
    elif "overall_preference" in row:
        config = "data/helpsteer3"
    elif "preference_strength" in row:
        config = "data/helpsteer2 with preference=true"
    elif isinstance(row.get("text"), str) and isinstance(row.get("label"), list):
        return (
            "It is the regression format, which prepare_data writes: reward_distributed reads it "
            "as it is (steerlm2.datasets.attribute_dataset)."
        )
    return None if config is None else f"The config {config} reads it."
