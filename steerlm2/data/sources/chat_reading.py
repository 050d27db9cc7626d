"""How each row of chat data is read, once it is known which columns have what.

A `Reading` makes an `Item` of every row: its turns, and its answers with their values.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from steerlm2.attributes import (
    AttributeSchema,
    encode_label,
    parse_label,
    read_label,
    value_problems,
)
from steerlm2.data.conversations import turns_in
from steerlm2.data.records import ASSISTANT, USER, is_blank
from steerlm2.data.sources.cells import has_label, is_nothing, is_numeric, number_in
from steerlm2.data.sources.helpsteer import MAX_STRENGTH
from steerlm2.data.sources.layout_rows import Answer, Sample, flat_fields
from steerlm2.data.sources.layouts import BY_NAME, LAYOUTS, Layout, Match, find_column, normalised
from steerlm2.data.sources.rows import Row
from steerlm2.data.sources.turns import EMPTY_ANSWER, Json, LeftOut, is_content

Make = Literal["auto", "conversations", "pairs", "groups"]

NUM_FIRST = 100
"""Rows that tell the layout and the attributes."""

_NOT_ANSWERED = "labels of rows that end with the user's turn"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `chat_data`."""

    format: str
    columns: dict[str, str]
    attributes: Sequence[str] | None
    has_schema: bool
    schema: AttributeSchema
    make: Make
    round_scores: bool
    split_turns: bool
    system_prompt: str
    by: str | None
    keep: int | None
    strength: int
    label: str
    seed: int
    concentration: float
    bins: str

    def check(self) -> None:
        """Raises ValueError with all problems."""
        problems = []
        if self.format not in ("auto", *BY_NAME):
            problems.append(f"format must be auto, {', '.join(BY_NAME)}, got {self.format!r}")
        if self.make not in get_args(Make):
            problems.append(f"make must be {', '.join(get_args(Make))}, got {self.make!r}")
        if self.strength not in range(1, MAX_STRENGTH + 1):
            problems.append(f"strength must be from 1 to {MAX_STRENGTH}, got {self.strength!r}")
        if self.keep is not None and self.keep < 1:
            problems.append(f"keep must be at least 1, got {self.keep}")
        names = ", ".join(self.schema.names)
        if unknown := [n for n in self.attributes or () if n not in self.schema.names]:
            problems.append(
                f"attributes: {', '.join(map(str, unknown))} not in the schema ({names}): "
                "state them with their ranges in 'schema'"
            )
        known = {part for layout in self.layouts() or LAYOUTS for part in layout.parts}
        if unknown := sorted({*self.columns} - known - {*self.schema.names}):
            problems.append(
                f"columns: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))} and the "
                f"schema's {names}"
            )
        if self.label not in ("sampled", "best"):
            try:
                encode_label(parse_label(self.label), self.schema)
            except ValueError as error:
                problems.append(f"label must be 'sampled', 'best' or a label string: {error}")
        if problems:
            raise ValueError("\n".join(problems))

    def layouts(self) -> list[Layout]:
        """Those that the source may have."""
        return [each for each in LAYOUTS if self.format in ("auto", each.name)]


@dataclass
class Scored:
    """An answer with its values."""

    value: str
    values: dict[str, float]
    label: str | None
    """From whole values; None: it has none, or groups keep values that aren't whole."""
    goodness: float
    """NaN: not known."""


class Item(NamedTuple):
    """A sample with its answers, and the row it is from."""

    row: Row
    sample: Sample
    answers: list[Scored]


@dataclass
class Tally:
    """What became of the rows."""

    rows: int = 0
    items: int = 0
    conversations: int = 0
    labelled: int = 0
    values: Counter[str] = field(default_factory=Counter)
    """Attribute -> answers that have a value of it."""
    late: dict[str, str] = field(default_factory=dict)
    """Column that the first rows lack -> the file and row that first has it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Cause -> rows, or what the cause names."""


@dataclass
class Reading:
    """How the rows of a source are read."""

    match: Match
    attributes: dict[str, str]
    """Attribute -> the field of an answer that has its value."""
    label_field: str | None
    by: str | None
    """The field that tells how good an answer is."""
    make: str
    options: Options
    fields: set[str]
    """Those of the answers so far."""
    sought: Sequence[str]
    """The attributes that columns may have."""
    tally: Tally = field(default_factory=Tally)

    def item(self, row: Row) -> Item:
        """Raises LeftOut for a row that no conversation can hold, ValueError for mistakes."""
        sample = self.match.read(row.value)
        if self.options.split_turns:
            turns = [turns_in(turn.value) if turn.role == USER else [turn] for turn in sample.turns]
            sample = dataclasses.replace(sample, turns=[*itertools.chain.from_iterable(turns)])
        if self.make != "conversations" and not sample.answers and sample.turns[-1].role != USER:
            *before, last = sample.turns
            answer = Answer(last.value, sample.fields | last.extra, last.label)
            sample = dataclasses.replace(sample, turns=before, answers=[answer], fields={})
        self._meet(row)
        self._label_turns(sample)
        if sample.record is not None and sample.record.label is not None:
            sample.record.label = read_label(sample.record.label, self.options.schema)
        answers = []
        for answer in sample.answers:
            if is_blank(answer.value) and self.match.layout.name == "responses":
                self.tally.left_out["answers without text"] += 1
            elif is_blank(answer.value):
                raise LeftOut(EMPTY_ANSWER)
            else:
                answers.append(self._scored(answer.value, answer.fields, answer.label))
        if sample.answers and not answers:
            raise LeftOut(EMPTY_ANSWER)
        ends_with_user = sample.turns[-1].role == USER
        if ends_with_user and sample.fields and self._scored("", sample.fields, None).values:
            self.tally.left_out[_NOT_ANSWERED] += 1
        return Item(row, sample, answers)

    def _meet(self, row: Row) -> None:
        """Count the columns that the first rows lack, and that no part of the layout is in."""
        if row.value.keys() <= self.match.seen:
            return
        used = {*self.match.columns_of(row.value).values()}
        only_prompts = self.match.layout.name == "prompts" != self.options.format
        for column in row.value.keys() - self.match.seen - used - self.tally.late.keys():
            value = row.value[column]
            if is_nothing(value):
                continue
            self.tally.late[column] = f"{Path(row.path).name}:{row.number}"
            if only_prompts and is_content(value):
                raise ValueError(
                    f"has {column!r}, which the first {NUM_FIRST} rows lack: prompts without "
                    "answers need a file of their own, or builder.format=prompts"
                )

    def _meet_fields(self, fields: Json) -> None:
        """Labels may be in fields that the first answers lack."""
        if fields.keys() <= self.fields:
            return
        for key in fields.keys() - self.fields:
            if is_nothing(fields[key]):
                continue
            self.fields.add(key)
            for name in self.sought:
                known = self.attributes.get(name) in self.fields - {key}
                named = find_column([key], [self.options.columns.get(name, name)])
                if named and not known and (name in self.attributes or is_numeric([fields[key]])):
                    self.attributes[name] = key
            is_label = normalised(key) == "label" and has_label([fields[key]])
            if is_label and self.label_field is None:
                self.label_field = key

    def _label_turns(self, sample: Sample) -> None:
        """Give the turns before the answers their labels, and take away what else they have."""
        layout, schema = self.match.layout.name, self.options.schema
        for i, turn in enumerate(sample.turns):
            fields: Json = {}
            if layout != "steerlm2" and turn.role == ASSISTANT:
                last = i == len(sample.turns) - 1
                fields = sample.fields | turn.extra if last else turn.extra
            if fields or turn.label:
                scored = self._scored(turn.value, fields, turn.label)
                turn.label = scored.label or (turn.label and read_label(turn.label, schema))
            if layout not in ("steerlm2", "conversations"):
                turn.extra = {}

    def _scored(self, text: str, fields: Json, label: str | None) -> Scored:
        schema = self.options.schema
        fields = flat_fields(fields)
        self._meet_fields(fields)
        label = label or (fields.get(self.label_field) if self.label_field else None)
        values: dict[str, float] = {}
        if label is not None and not is_nothing(label):
            if not isinstance(label, str):
                raise ValueError(f"{self.label_field} must be a label or an object, got {label!r}")
            values |= parse_label(label, schema)
        problems = []
        for name, key in self.attributes.items():
            try:
                value = number_in(fields.get(key), key)
            except ValueError as error:
                problems.append(str(error))
                continue
            if value is not None and values.get(name, value) != value:
                problems.append(f"its label has {name}:{values[name]}, its column {key} {value}")
            if value is not None:
                values[name] = value
        problems += [
            problem
            for name, value in values.items()
            for problem in value_problems(name, value, schema, whole=float(value).is_integer())
        ]
        whole = {name: round(value) for name, value in values.items()}
        if self.make == "conversations" and self.options.round_scores:
            values = dict(whole)
        elif self.make == "conversations":
            problems += [
                f"{name} must be a whole number, got {value!r} (builder.round_scores=true rounds)"
                for name, value in values.items()
                if value != whole[name]
            ]
        if problems:
            raise ValueError("; ".join(problems))
        own_label = encode_label(whole, schema) if values and self.make != "pairs" else None
        return Scored(text, values, own_label, self._goodness(values, fields))

    def _goodness(self, values: Mapping[str, float], fields: Json) -> float:
        if self.by is not None:
            value = number_in(fields.get(self.by), self.by)
            return math.nan if value is None else value
        schema = self.options.schema
        shares = [_share(value, name, schema) for name, value in values.items()]
        return sum(shares) / len(shares) if shares else math.nan


def _share(value: float, name: str, schema: AttributeSchema) -> float:
    """Where a value is in its attribute's range, from 0 to 1."""
    low, high = schema.range_of(name)
    return (value - low) / (high - low)
