"""What is said of chat data: how it is read, why it isn't understood, what became of its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steerlm2.data.records import causes_text
from steerlm2.data.sources.cells import is_nothing, is_numeric
from steerlm2.data.sources.chat_making import pair_label
from steerlm2.data.sources.chat_reading import NUM_FIRST, Reading
from steerlm2.data.sources.containers import CONTAINERS, container_of
from steerlm2.data.sources.layout_rows import NESTED, fields_of_side
from steerlm2.data.sources.layouts import LAYOUTS, Match, fitting_config, what_was_found
from steerlm2.data.sources.rows import Row


def reading_text(
    reading: Reading, fields: Mapping[str, list[Any]], rows: Iterable[Any], in_turns: bool
) -> str:
    """How a source is read, and what of it isn't used.

    Args:
        fields: of the answers of the first rows, with their values.
        rows: the first rows.
        in_turns: whether turns have labels of their own.
    """
    match, attributes = reading.match, reading.attributes
    parts = ", ".join(f"{part}={name}" for part, name in match.columns.items())
    text = f"read as {match.layout.name} ({parts}), to make {reading.make}"
    if reading.make == "pairs":
        text += f" labelled {pair_label(reading.options)} (the first is better)"
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
    # An empty cell of a column whose others have objects.
    left = [key for key in left if key not in NESTED or not all(map(is_nothing, fields[key]))]
    numbers = [key for key in left if is_numeric(fields[key])]
    if numbers and reading.make != "pairs":
        text += (
            f"; numbers that are no labels: {', '.join(numbers)} (state them with their ranges in "
            "'schema' to make them some)"
        )
        left = [key for key in left if key not in numbers]
    # Fields have other names than columns where several answers are in a row.
    left += [
        key
        for key in _other_columns(match, rows)
        if key not in fields and not _is_source(key, fields)
    ]
    if others := [*dict.fromkeys(left)]:
        text += f"; not used: {', '.join(others)}"
    return text


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


def _is_source(column: str, fields: Iterable[str]) -> bool:
    """Whether fields come from this column, one of nested objects or of a side of a preference."""
    own = {name for side in ("chosen", "rejected") for name in fields_of_side({column: ""}, side)}
    return column in NESTED or not own.isdisjoint(fields)


def not_understood(source: str | Path, first: list[Row]) -> str:
    """That a source is of no known layout: what was found in it, and what is understood."""
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


def result_text(reading: Reading, num_bad: int) -> str:
    """What became of a source's rows."""
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
    if unused := [f"{name} ({where})" for name, where in late.items() if name not in used]:
        text += f"; columns that the first {NUM_FIRST} rows lack, not used: {', '.join(unused)}"
    return text + (f"; bad: {num_bad}" if num_bad else "")
