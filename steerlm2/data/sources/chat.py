"""The chat data that people have, in the layouts of `steerlm2.data.sources.layouts`.

What its rows say becomes conversations with labels, pairs with a preference, or SteerLM2 groups.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlm2.attributes import AttributeSchema, as_schema
from steerlm2.data.jsonl import LineProblems
from steerlm2.data.records import ASSISTANT, Record
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT, Unit
from steerlm2.data.sources.cells import has_label, is_nothing, is_numeric, is_truth
from steerlm2.data.sources.chat_making import MAKERS
from steerlm2.data.sources.chat_reading import NUM_FIRST, Item, Make, Options, Reading
from steerlm2.data.sources.chat_texts import not_understood, reading_text, result_text
from steerlm2.data.sources.layout_rows import flat_fields
from steerlm2.data.sources.layouts import Match, find_column, match_of
from steerlm2.data.sources.rows import Row, iter_rows
from steerlm2.data.sources.turns import LeftOut

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
    options = Options(
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


def _items(
    source: str | Path, rows: Iterator[Row], problems: LineProblems, options: Options
) -> Iterator[Any]:
    first = list(itertools.islice(rows, NUM_FIRST))
    if not first:
        problems.raise_if_any()
        return
    reading = _reading_of(source, first, options)
    samples = _samples(itertools.chain(first, rows), reading, problems)
    for item in MAKERS[reading.make](samples, reading):
        reading.tally.items += 1
        yield item
    _log.warning("%s: %s", source, result_text(reading, problems.count))
    problems.raise_if_any()
    _check_named(source, reading)


def _samples(rows: Iterable[Row], reading: Reading, problems: LineProblems) -> Iterator[Item]:
    for row in rows:
        reading.tally.rows += 1
        try:
            yield reading.item(row)
        except LeftOut as cause:
            reading.tally.left_out[str(cause)] += 1
        except ValueError as error:
            problems.add(row.number, error, row.path)


def _reading_of(source: str | Path, first: list[Row], options: Options) -> Reading:
    values = [row.value for row in first]
    _check_columns(source, values, options)
    match = match_of(values, options.layouts(), options.columns)
    if match is None or (options.format == "auto" and _ignores_text(match, values)):
        raise ValueError(not_understood(source, first))
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
        if explicit or (found is not None and is_numeric(fields[found])):
            attributes[name] = found or column
    label_field = find_column(fields, ["label"])
    if label_field is not None and not has_label(fields[label_field]):
        label_field = None
    if label_field is None and "label" in fields and all(map(is_truth, fields["label"])):
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
    filled = {key for key, own in fields.items() if not all(map(is_nothing, own))}
    reading = Reading(match, attributes, label_field, by, make, options, filled, names)
    text = reading_text(reading, fields, values, in_turns)
    _log.warning("%s: %s", source, text)
    return reading


def _check_columns(source: str | Path, rows: Iterable[Any], options: Options) -> None:
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


def _check_named(source: str | Path, reading: Reading) -> None:
    """Raises ValueError for attributes that were asked for and that no answer has a value of."""
    asked = () if reading.make == "pairs" else reading.options.attributes or ()
    if lacking := [name for name in asked if not reading.tally.values[name]]:
        raise ValueError(
            f"{source}: no answer has a value of {', '.join(lacking)}: name the columns with "
            "builder.columns={ATTRIBUTE: NAME}"
        )
