"""The chat data that people have, in the layouts of `steerlm2.data.sources.layouts`.

What its rows say becomes conversations with labels, pairs with a preference, or SteerLM2 groups.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from steerlm2.attributes import (
    AttributeSchema,
    as_schema,
    encode_label,
    label_log_probs,
    parse_label,
    read_label,
    value_problems,
)
from steerlm2.data.conversations import Conversation, turns_in
from steerlm2.data.jsonl import LineProblems
from steerlm2.data.records import (
    ASSISTANT,
    USER,
    Record,
    Response,
    Turn,
    causes_text,
    is_blank,
)
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT, SplitRecord, Unit
from steerlm2.data.sources.containers import CONTAINERS, container_of
from steerlm2.data.sources.helpsteer import MAX_STRENGTH, PREFERENCE_ATTRIBUTE
from steerlm2.data.sources.layouts import (
    BY_NAME,
    EMPTY_ANSWER,
    LAYOUTS,
    NESTED,
    Answer,
    Json,
    Layout,
    LeftOut,
    Match,
    NotParallel,
    Sample,
    fields_of_side,
    find_column,
    fitting_config,
    flat_fields,
    is_content,
    match_of,
    normalised,
    rating,
    what_was_found,
)
from steerlm2.data.sources.oasst import label_values
from steerlm2.data.sources.rows import Row, iter_rows

Make = Literal["auto", "conversations", "pairs", "groups"]

_NUM_FIRST = 100
"""Rows that tell the layout and the attributes."""

_NOT_KNOWN = {"", "n/a", "na", "nan", "none", "null", "-"}
"""What tables have where there is no value."""

_LABEL_LIKE = re.compile(r"\s*[\w.-]+\s*[:=]\s*-?\d+(\.\d+)?\s*([,;]|$)")

_REJECTED = "rejected answers without a label"
_NOT_BEST = "answers that aren't among the best"
_TIED = "whose answers are equally good"
_EQUAL = "whose two answers are the same"
_ALONE = "with fewer than two answers"
_NOT_ANSWERED = "labels of rows that end with the user's turn"
_NO_SHARED = "whose answers share no attribute of the label"
_ORDER = "whose turns don't alternate between user and assistant"

_log = logging.getLogger(__name__)


def chat_data(
    source: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    attributes: Sequence[str] | None = None,
    schema: AttributeSchema | Mapping[str, Any] | None = None,
    make: Make = "auto",
    round_scores: bool = False,
    split_turns: bool = False,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
    by: str | None = None,
    keep: int | None = None,
    strength: int = 1,
    label: str = "sampled",
    seed: int = 0,
    concentration: float = 24.0,
    bins: str = "midpoint",
    splits: Mapping[str, str] | None = None,
    subset: str = "",
) -> Iterator[Unit] | Iterator[Record]:
    """Chat data in any of the usual layouts, in the order of its rows.

    How it is read, what isn't used of it, and what is left out for which cause is logged.

    Args:
        source: a file, folder or hub id (`iter_rows`).
        format: the layout, "messages", "sharegpt", "alpaca", "prompt_response", "preference",
            "responses", "prompts", "conversations" or "steerlm2" (our own); "auto": the one that
            most of the first 100 rows fit.
        columns: part of the layout, or attribute -> its column, where that has no usual name:
            {response: model_output, formality: "Formality (0-10)"}.
        attributes: the columns that are labels, which the schema must have. None: those that are
            named like an attribute of the schema.
        schema: the attributes and their ranges (a mapping in a config).
        make: "conversations" with labels, a unit for each row; "pairs" of conversations with a
            preference; "groups": SteerLM2 records. For the last two, rows in succession that have
            the same prompt are one. "auto": pairs of preferences, groups of SteerLM2 records,
            conversations of all else.
        round_scores: round values that aren't whole; False: refuse them.
        split_turns: split prompts of several turns in one text, as `helpsteer_conversations` does.
        system_prompt: of a row that has none.
        by: the column, of a row or of a response, that tells which of several answers is better.
            None: the mean of the label's values, each as a share of its range.
        keep: of several answers, the largest number of conversations, those of the best. None: all.
        strength: of every preference, from 1 to 3.
        label: of a group: "sampled": the rounded values of one of its responses, drawn with the
            seed; "best": those of the best; anything else is a label string for all groups.
        seed: a group's draw depends on it and on the group's prompt alone.
        concentration: of the Beta likelihood log P(a|x,y), which groups whose responses have values
            for the label get.
        bins: of the Beta likelihood.
        splits: "train" and "validation" -> their names in this source, such as {train: train_prefs,
            validation: test_prefs}.
        subset: the sub-folder to read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for invalid arguments; for a source of no known layout; after the last row,
            naming the bad ones.
    """
    options = _Options(
        format=format,
        columns=dict(columns or {}),
        attributes=attributes,
        has_schema=schema is not None,
        schema=as_schema(schema),
        make=make,
        round_scores=round_scores,
        split_turns=split_turns,
        system_prompt=system_prompt,
        by=by,
        keep=keep,
        strength=strength,
        label=label,
        seed=seed,
        concentration=concentration,
        bins=bins,
    )
    options.check()
    problems = LineProblems(source)
    return _items(source, iter_rows(source, problems, subset, splits), problems, options)


@dataclass(frozen=True, kw_only=True)
class _Options:
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
        if self.make not in ("auto", *_MAKERS):
            problems.append(f"make must be auto, {', '.join(_MAKERS)}, got {self.make!r}")
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
class _Scored:
    """An answer with its values."""

    value: str
    values: dict[str, float]
    label: str | None
    """From whole values; None: it has none, or groups keep values that aren't whole."""
    goodness: float
    """NaN: not known."""


class _Item(NamedTuple):
    """A sample with its answers, and the row it is from."""

    row: Row
    sample: Sample
    answers: list[_Scored]


@dataclass
class _Tally:
    """What became of the rows."""

    rows: int = 0
    items: int = 0
    conversations: int = 0
    labelled: int = 0
    values: Counter[str] = field(default_factory=Counter)
    """Attribute -> answers that have a value of it."""
    late: dict[str, int] = field(default_factory=dict)
    """Column that the first rows lack -> the first row that has it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Cause -> rows, or what the cause names."""


@dataclass
class _Reading:
    """How the rows of a source are read."""

    match: Match
    attributes: dict[str, str]
    """Attribute -> the field of an answer that has its value."""
    label_field: str | None
    by: str | None
    """The field that tells how good an answer is."""
    make: str
    options: _Options
    fields: set[str]
    """Those of the answers so far."""
    sought: Sequence[str]
    """The attributes that columns may have."""
    tally: _Tally = field(default_factory=_Tally)

    def item(self, row: Row) -> _Item:
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
        return _Item(row, sample, answers)

    def _meet(self, row: Row) -> None:
        """Count the columns that the first rows lack, and that no part of the layout is in."""
        used = {*self.match.columns_of(row.value).values()}
        only_prompts = self.match.layout.name == "prompts" != self.options.format
        for column in row.value.keys() - self.match.seen - used - self.tally.late.keys():
            value = row.value[column]
            if _is_nothing(value):
                continue
            self.tally.late[column] = row.number
            if only_prompts and is_content(value):
                raise ValueError(
                    f"has {column!r}, which the first {_NUM_FIRST} rows lack: prompts without "
                    "answers need a file of their own, or builder.format=prompts"
                )

    def _meet_fields(self, fields: Json) -> None:
        """Labels may be in fields that the first answers lack."""
        for key in fields.keys() - self.fields:
            if _is_nothing(fields[key]):
                continue
            self.fields.add(key)
            for name in self.sought:
                known = self.attributes.get(name) in self.fields - {key}
                named = find_column([key], [self.options.columns.get(name, name)])
                if named and not known and (name in self.attributes or _is_numeric([fields[key]])):
                    self.attributes[name] = key
            is_label = normalised(key) == "label" and _has_label([fields[key]])
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

    def _scored(self, text: str, fields: Json, label: str | None) -> _Scored:
        schema = self.options.schema
        fields = flat_fields(fields)
        self._meet_fields(fields)
        label = label or (fields.get(self.label_field) if self.label_field else None)
        values: dict[str, float] = {}
        if label is not None and not _is_nothing(label):
            if not isinstance(label, str):
                raise ValueError(f"{self.label_field} must be a label or an object, got {label!r}")
            values |= parse_label(label, schema)
        problems = []
        for name, key in self.attributes.items():
            try:
                value = _number(fields.get(key), key)
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
        return _Scored(text, values, own_label, self._goodness(values, fields))

    def _goodness(self, values: Mapping[str, float], fields: Json) -> float:
        if self.by is not None:
            value = _number(fields.get(self.by), self.by)
            return math.nan if value is None else value
        schema = self.options.schema
        shares = [_share(value, name, schema) for name, value in values.items()]
        return sum(shares) / len(shares) if shares else math.nan


def _share(value: float, name: str, schema: AttributeSchema) -> float:
    """Where a value is in its attribute's range, from 0 to 1."""
    low, high = schema.range_of(name)
    return (value - low) / (high - low)


def _number(value: Any, where: str) -> float | None:
    """The number that a cell has, or spells; None where there is none.

    Raises:
        ValueError: for anything else.
    """
    value = rating(value)
    if isinstance(value, NotParallel):
        raise ValueError(f"{where} {value}")
    if _is_nothing(value):
        return None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = math.inf if "_" in str(value) else float(value)
        except (ValueError, OverflowError):
            number = math.inf
        if math.isnan(number):
            return None
        if math.isfinite(number):
            return int(number) if number.is_integer() else number
    raise ValueError(f"{where} must be a number, got {value!r}")


def _is_nothing(value: Any) -> bool:
    """Whether a cell says that there is no value."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _NOT_KNOWN)


def _items(
    source: str | Path, rows: Iterator[Row], problems: LineProblems, options: _Options
) -> Iterator[Any]:
    first = list(itertools.islice(rows, _NUM_FIRST))
    if not first:
        problems.raise_if_any()
        return
    reading = _reading(source, first, options)
    samples = _samples(itertools.chain(first, rows), reading, problems)
    for item in _MAKERS[reading.make](samples, reading):
        reading.tally.items += 1
        yield item
    _log.warning("%s: %s", source, _result_text(reading, problems.count))
    problems.raise_if_any()
    _check_named(source, reading)


def _samples(rows: Iterable[Row], reading: _Reading, problems: LineProblems) -> Iterator[_Item]:
    for row in rows:
        reading.tally.rows += 1
        try:
            yield reading.item(row)
        except LeftOut as cause:
            reading.tally.left_out[str(cause)] += 1
        except ValueError as error:
            problems.add(row.number, error, row.path)


# How a source is read


def _reading(source: str | Path, first: list[Row], options: _Options) -> _Reading:
    values = [row.value for row in first]
    _check_columns(source, values, options)
    match = match_of(values, options.layouts(), options.columns)
    if match is None or (options.format == "auto" and _ignores_text(match, values)):
        raise ValueError(_not_understood(source, first))
    make = options.make
    if make == "auto":
        name = match.layout.name
        make = "pairs" if name == "preference" else "groups" if name == "steerlm2" else make
        make = "conversations" if make == "auto" else make
    if make == "groups" and match.layout.name == "preference":
        raise ValueError(
            f"{source}: preferences can't be groups, which need an attribute's values for every "
            "response; make=pairs or make=conversations"
        )
    fields, in_turns = _fields(match, values)
    explicit = options.attributes is not None or options.has_schema
    names = options.schema.names if options.attributes is None else options.attributes
    attributes = {}
    for name in names:
        column = options.columns.get(name, name)
        found = find_column(fields, [column])
        if name in options.columns and found is None:
            raise ValueError(
                f"{source}: builder.columns: {column!r} is no column of its answers, which have "
                f"{', '.join(fields) or 'none'}"
            )
        if explicit or (found is not None and _is_numeric(fields[found])):
            attributes[name] = found or column
    label_field = find_column(fields, ["label"])
    if label_field is not None and not _has_label(fields[label_field]):
        label_field = None
    if label_field is None and "label" in fields and all(map(_is_truth, fields["label"])):
        raise ValueError(
            f"{source}: its column 'label' is true or false (unpaired preferences, KTO), which is "
            "neither an attribute's value nor one of two answers. Write the rows with true into a "
            "file without that column, for fine-tuning, or give numbers"
        )
    by = None
    if options.by is not None and (by := find_column(fields, [options.by])) is None:
        raise ValueError(
            f"{source}: builder.by={options.by!r} is no column of its answers, which have "
            f"{', '.join(fields) or 'none'}"
        )
    filled = {key for key, own in fields.items() if not all(map(_is_nothing, own))}
    reading = _Reading(match, attributes, label_field, by, make, options, filled, names)
    text = _reading_text(reading, fields, _other_columns(match, values), in_turns)
    _log.warning("%s: %s", source, text)
    return reading


def _check_columns(source: str | Path, rows: Iterable[Any], options: _Options) -> None:
    """Raises ValueError for columns of parts that no row has."""
    columns = {*itertools.chain.from_iterable(row for row in rows if isinstance(row, dict))}
    given = [n for part, n in options.columns.items() if part not in options.schema.names]
    if lacking := [name for name in given if name not in columns]:
        raise ValueError(
            f"{source}: builder.columns: it has no column {', '.join(map(repr, lacking))}, only "
            f"{', '.join(map(repr, sorted(columns)))}"
        )


def _fields(match: Match, rows: Iterable[Any]) -> tuple[dict[str, list[Any]], bool]:
    """Field of the answers -> its values in the rows that can be read, and whether turns have
    labels of their own."""
    found: dict[str, list[Any]] = {}
    in_turns = False
    for row in rows:
        try:
            sample = match.read(row)
        except (LeftOut, ValueError):
            continue
        in_turns |= any(turn.label for turn in sample.turns)
        in_turns |= any(answer.label for answer in sample.answers)
        own = [answer.fields for answer in sample.answers]
        if match.layout.name != "steerlm2":
            own += [turn.extra for turn in sample.turns if turn.role == ASSISTANT]
        if not sample.answers and sample.turns[-1].role == ASSISTANT:
            own.append(sample.fields)
        for fields in own:
            for key, value in flat_fields(fields).items():
                found.setdefault(key, []).append(value)
    return found, in_turns


def _ignores_text(match: Match, rows: Iterable[Any]) -> bool:
    """Whether rows taken for prompts alone have more texts: answers in an unknown column."""
    used = {*match.columns.values()}
    return match.layout.name == "prompts" and any(
        isinstance(value, str | list | dict) and key not in used
        for row in rows
        if isinstance(row, dict)
        for key, value in row.items()
    )


def _is_numeric(values: Iterable[Any]) -> bool:
    """Whether most of the values that there are are numbers."""
    numbers, others = 0, 0
    for value in values:
        try:
            numbers += _number(value, "") is not None
        except ValueError:
            others += 1
    return numbers > others


def _has_label(values: Iterable[Any]) -> bool:
    """Whether a text among the values begins like a label, however it goes on."""
    return any(isinstance(value, str) and _LABEL_LIKE.match(value) for value in values)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or str(value).lower() in ("true", "false")


def _other_columns(match: Match, rows: Iterable[Any]) -> list[str]:
    """The columns that have no part of the layout. Our own formats have a use for all."""
    if _is_kept(match):
        return []
    keys = itertools.chain.from_iterable(row for row in rows if isinstance(row, dict))
    used = {*match.columns.values()}
    return [key for key in dict.fromkeys(keys) if key not in used]


def _is_kept(match: Match) -> bool:
    """Whether rows keep what isn't used of them, as our own formats do."""
    return match.layout.name in ("conversations", "steerlm2")


def _reading_text(
    reading: _Reading, fields: Mapping[str, list[Any]], columns: Sequence[str], in_turns: bool
) -> str:
    match, attributes = reading.match, reading.attributes
    parts = ", ".join(f"{part}={name}" for part, name in match.columns.items())
    text = f"read as {match.layout.name} ({parts}), to make {reading.make}"
    if reading.make == "pairs":
        text += f" labelled {_pair_label(reading.options)} (the first is better)"
    found = {name: key for name, key in attributes.items() if key in fields}
    if reading.make != "pairs":
        labels = [name if key == name else f"{name}={key}" for name, key in found.items()]
        labels += [] if reading.label_field is None else [reading.label_field]
        labels += ["those of the turns"] if in_turns else []
        text += f"; labels: {', '.join(labels) or 'none'}"
        lacking = [name for name in attributes if name not in found]
        if lacking and reading.label_field is None and not in_turns:
            text += f"; no column for {', '.join(lacking)}"
    used = {*found.values(), reading.label_field, reading.by}
    left = [] if _is_kept(match) else [key for key in fields if key not in used]
    numbers = [key for key in left if _is_numeric(fields[key])]
    if numbers and reading.make != "pairs":
        text += (
            f"; numbers that are no labels: {', '.join(numbers)} (state them with their ranges in "
            "'schema' to make them some)"
        )
        left = [key for key in left if key not in numbers]
    # Fields have other names than columns where several answers are in a row.
    left += [key for key in columns if key not in fields and not _is_source(key, fields)]
    if others := [*dict.fromkeys(left)]:
        text += f"; not used: {', '.join(others)}"
    return text


def _is_source(column: str, fields: Iterable[str]) -> bool:
    """Whether fields come from this column, one of nested objects or of a side of a preference."""
    own = {name for side in ("chosen", "rejected") for name in fields_of_side({column: ""}, side)}
    return column in NESTED or not own.isdisjoint(fields)


def _not_understood(source: str | Path, first: list[Row]) -> str:
    values = [row.value for row in first]
    container = container_of(Path(first[0].path))
    container = container[1:].upper() if container in CONTAINERS else "rows"
    known = "\n".join(f"  {layout.name:<16} {layout.looks}" for layout in LAYOUTS)
    fitting = fitting_config(values)
    config = f"\n{fitting}" if fitting else ""
    if container in ("CSV", "TSV"):
        config += "\nThe first line must name the columns."
    return (
        f"{source} isn't understood: {what_was_found(values, container)}\n"
        f"Understood (builder.format):\n{known}\n"
        "Name columns with builder.columns={prompt: NAME, response: NAME}; "
        f"steerlm2/data/README.md has an example of each.{config}"
    )


def _check_named(source: str | Path, reading: _Reading) -> None:
    """Raises ValueError for attributes that were asked for and that no answer has a value of."""
    asked = () if reading.make == "pairs" else reading.options.attributes or ()
    if lacking := [name for name in asked if not reading.tally.values[name]]:
        raise ValueError(
            f"{source}: no answer has a value of {', '.join(lacking)}: name the columns with "
            "builder.columns={ATTRIBUTE: NAME}"
        )


def _result_text(reading: _Reading, num_bad: int) -> str:
    tally = reading.tally
    made = tally.conversations if reading.make == "conversations" else tally.items
    text = f"rows: {tally.rows}; {reading.make}: {made}, in the order of the rows"
    if tally.labelled:
        text += f"; answers with a label: {tally.labelled}"
    gaps = {name: tally.labelled - tally.values[name] for name in reading.attributes}
    if tally.labelled and (some := [f"{n} {gap}" for n, gap in gaps.items() if gap > 0]):
        text += f" (without a value: {', '.join(some)})"
    text += f"; left out: {causes_text(tally.left_out)}"
    used = {*reading.attributes.values(), reading.label_field}
    late = {} if _is_kept(reading.match) else tally.late
    if unused := [f"{name} (row {number})" for name, number in late.items() if name not in used]:
        text += f"; columns that the first {_NUM_FIRST} rows lack, not used: {', '.join(unused)}"
    return text + (f"; bad: {num_bad}" if num_bad else "")


# What is made of samples


def _count(reading: _Reading, answers: Iterable[_Scored]) -> None:
    for answer in answers:
        reading.tally.conversations += 1
        reading.tally.labelled += bool(answer.values)
        reading.tally.values.update(answer.values.keys())


def _system(sample: Sample, options: _Options) -> str:
    return options.system_prompt if sample.system is None else sample.system


def _conversations(items: Iterable[_Item], reading: _Reading) -> Iterator[Unit]:
    options, tally = reading.options, reading.tally
    for row, sample, answers in items:
        system = _system(sample, options)
        if not sample.answers:
            tally.conversations += 1
            labels = [turn.label for turn in sample.turns if turn.label]
            tally.labelled += len(labels)
            for label in labels:
                tally.values.update(parse_label(label).keys())
            yield Unit([Conversation(sample.turns, system, sample.extra)], row.split)
            continue
        if reading.match.layout.name == "preference" and not any(a.values for a in answers):
            tally.left_out[_REJECTED] += 1
            answers = answers[:1]
        if options.keep is not None and len(answers) > options.keep:
            best = sorted(range(len(answers)), key=lambda i: -_known(answers[i].goodness))
            tally.left_out[_NOT_BEST] += len(answers) - options.keep
            answers = [answers[i] for i in sorted(best[: options.keep])]
        _count(reading, answers)
        yield Unit(
            [_conversation(sample.turns, system, a.value, a.label) for a in answers], row.split
        )


def _known(goodness: float) -> float:
    return -math.inf if math.isnan(goodness) else goodness


def _conversation(turns: list[Turn], system: str, answer: str, label: str | None) -> Conversation:
    return Conversation([*turns, Turn(ASSISTANT, answer, label)], system)


def _pairs(items: Iterable[_Item], reading: _Reading) -> Iterator[Unit]:
    options, tally = reading.options, reading.tally
    label = _pair_label(options)
    if reading.match.layout.name != "preference":
        items = _joined(items)
    for row, sample, answers in items:
        if cause := _why_no_pair(reading, answers):
            tally.left_out[cause] += 1
            continue
        if reading.match.layout.name != "preference":
            rated = [a for a in answers if not math.isnan(a.goodness)]
            answers = [
                max(rated, key=lambda a: a.goodness),
                min(rated, key=lambda a: a.goodness),
            ]
        system = _system(sample, options)
        pair = [_conversation(sample.turns, system, a.value, label) for a in answers]
        yield Unit(pair, row.split, is_pair=True)


def _pair_label(options: _Options) -> str:
    names = options.schema.names
    attribute = PREFERENCE_ATTRIBUTE if PREFERENCE_ATTRIBUTE in names else names[0]
    return f"{attribute}:{-options.strength}"


def _why_no_pair(reading: _Reading, answers: Sequence[_Scored]) -> str | None:
    if reading.match.layout.name == "preference":
        return _EQUAL if answers[0].value == answers[1].value else None
    rated = [answer.goodness for answer in answers if not math.isnan(answer.goodness)]
    if len(rated) < 2:
        return _ALONE
    return _TIED if max(rated) == min(rated) else None


def _joined(items: Iterable[_Item]) -> Iterator[_Item]:
    """Items that follow one another and have the same prompt, as one."""

    def prompt(item: _Item) -> Any:
        sample = item.sample
        return item.row.split, sample.system, [(turn.role, turn.value) for turn in sample.turns]

    for _, group in itertools.groupby(items, key=prompt):
        first, *more = group
        yield first._replace(answers=[*first.answers, *(a for each in more for a in each.answers)])


def _groups(items: Iterable[_Item], reading: _Reading) -> Iterator[Record]:
    options, tally = reading.options, reading.tally
    if reading.match.layout.name == "steerlm2":
        yield from _own_records(items, reading)
        return
    for row, sample, answers in _joined(items):
        values: dict[str, int] = {}
        prompt = json.dumps([turn.value for turn in sample.turns])
        if options.label not in ("sampled", "best"):
            values = parse_label(options.label)
        elif len(answers) > 1:
            values = label_values(
                options.label,
                [answer.values for answer in answers],
                [_known(answer.goodness) for answer in answers],
                options.schema,
                f"{options.seed}:{prompt}",
            )
        roles = [turn.role for turn in sample.turns]
        if len(answers) < 2:
            tally.left_out[_ALONE] += 1
        elif not values:
            tally.left_out[_NO_SHARED] += 1
        elif roles != [(USER, ASSISTANT)[i % 2] for i in range(len(roles))] or len(roles) % 2 == 0:
            tally.left_out[_ORDER] += 1
        else:
            _count(reading, answers)
            yield SplitRecord(
                system=_system(sample, options),
                prompt_turns=sample.turns,
                label=encode_label(values, options.schema),
                responses=_responses(answers, values, options),
                split=row.split,
            )


def _responses(
    answers: Sequence[_Scored], values: Mapping[str, int], options: _Options
) -> list[Response]:
    """With log P(a|x,y) where every answer has values for the label."""
    scores = [{name: float(value) for name, value in answer.values.items()} for answer in answers]
    log_p: list[float] | list[None] = [None] * len(answers)
    if all(name in own for own in scores for name in values):
        log_p = label_log_probs(scores, values, options.concentration, options.bins, options.schema)
    return [
        Response(answer.value, log_p_attributes=own_log_p, scores=own or None)
        for answer, own, own_log_p in zip(answers, scores, log_p, strict=True)
    ]


def _own_records(items: Iterable[_Item], reading: _Reading) -> Iterator[Record]:
    for item in items:
        record = item.sample.record
        assert record is not None
        if record.label is not None:
            record.label = read_label(record.label, reading.options.schema)
        _count(reading, item.answers)
        yield SplitRecord(**vars(record), split=item.row.split)


_MAKERS: dict[str, Callable[[Iterable[_Item], _Reading], Iterator[Any]]] = {
    "conversations": _conversations,
    "pairs": _pairs,
    "groups": _groups,
}
