"""Numbers and labels in the cells of a table, and cells that say that there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from steerlm2.data.sources.layout_rows import NotParallel, rating

_NOT_KNOWN = {"", "n/a", "na", "nan", "none", "null", "-"}
"""What tables have where there is no value."""

_LABEL_LIKE = re.compile(r"\s*[\w.-]+\s*[:=]\s*-?\d+(\.\d+)?\s*([,;]|$)")


def number_in(value: Any, where: str) -> float | None:
    """The number that a cell has, or spells; None where there is none.

    Raises:
        ValueError: for anything else.
    """
    value = rating(value)
    if isinstance(value, NotParallel):
        raise ValueError(f"{where} {value}")
    if is_nothing(value):
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


def is_nothing(value: Any) -> bool:
    """Whether a cell says that there is no value."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _NOT_KNOWN)


def is_numeric(values: Iterable[Any]) -> bool:
    """Whether most of the values that there are are numbers."""
    numbers, others = 0, 0
    for value in values:
        try:
            numbers += number_in(value, "") is not None
        except ValueError:
            others += 1
    return numbers > others


def has_label(values: Iterable[Any]) -> bool:
    """Whether a text among the values begins like a label, however it goes on."""
    return any(isinstance(value, str) and _LABEL_LIKE.match(value) for value in values)


def is_truth(value: Any) -> bool:
    """Whether it is true or false, as a value or as text."""
    return isinstance(value, bool) or str(value).lower() in ("true", "false")
