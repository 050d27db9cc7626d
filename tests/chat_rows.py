"""Rows of chat data in any container, and what `chat_data` makes of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from steerlm2.data.sources import chat_data
from steerlm2.data.sources.base import Unit

Json = dict[str, Any]
Text = list[tuple[str, str, str | None]]

SCHEMA = {"names": ["formality", "length"], "min_value": 0, "max_value": 10}


# Containers


def as_table(rows: list[Json], delimiter: str) -> str:
    """As a spreadsheet has it: what isn't text is JSON, and nothing is an empty cell."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(names)
    for row in rows:
        cells = (row.get(name) for name in names)
        writer.writerow(
            "" if c is None else c if isinstance(c, str) else json.dumps(c) for c in cells
        )
    return text.getvalue()


def as_parquet(rows: list[Json]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


CONTAINERS: dict[str, Callable[[list[Json]], str | bytes]] = {
    "data.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "lines.json": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "array.json": json.dumps,
    "indented.json": lambda rows: json.dumps(rows, indent=2),
    "object.json": lambda rows: json.dumps({"version": "1.0", "data": rows}),
    "data.csv": lambda rows: as_table(rows, ","),
    "semicolons.csv": lambda rows: as_table(rows, ";"),
    "data.tsv": lambda rows: as_table(rows, "\t"),
    "data.parquet": as_parquet,
}
GZIPPED = [f"{name}.gz" for name in ("data.jsonl", "array.json", "data.csv", "data.parquet")]


def write(path: Path, rows: list[Json]) -> Path:
    content = CONTAINERS[path.name.removesuffix(".gz")](rows)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


# Layouts


def messages(*texts: str, **more: Any) -> list[Json]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text, **more} for i, text in enumerate(texts)]


def sharegpt(*texts: str) -> list[Json]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def own(*texts: str) -> list[Json]:
    return [{"from": ("User", "Assistant")[i % 2], "value": text} for i, text in enumerate(texts)]


def told(role: str, content: str) -> Json:
    return {"role": role, "content": content}


def scored(text: str, formality: Any) -> Json:
    return {"text": text, "scores": {"formality": formality}}


TOLD_A = [told("assistant", "A")]


def read_all(path: Path, **options: Any) -> tuple[list[Any], str]:
    """What a source gives before it ends, and the error that it ends with, "" without."""
    items: list[Any] = []
    try:
        items.extend(chat_data(path, **options))
    except ValueError as error:
        return items, str(error)
    return items, ""


def texts(units: Iterable[Unit]) -> list[list[list[str]]]:
    return [[[turn.value for turn in c.turns] for c in unit.conversations] for unit in units]


def labels(units: Iterable[Unit]) -> list[list[str | None]]:
    return [[c.turns[-1].label for c in unit.conversations] for unit in units]
