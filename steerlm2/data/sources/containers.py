"""The values in a file, whatever container they are in: JSON lines, JSON, CSV, Parquet.

Each may be compressed with gzip, under a name that ends in .gz.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from steerlm2.data.jsonl import (
    START,
    LineProblems,
    is_unicode,
    iter_json_lines,
    json_hint,
    open_for_reading,
    refuse_what_is_no_text,
    unique_keys,
)

_Values = Iterator[tuple[int, Any]]
"""Number from 1, and value."""

_DELIMITERS = ",;\t"
_TURN_KEYS = {"role", "from"}
_PROMPT_KEYS = {"prompt", "prompt_turns", "instruction", "question"}

_DAMAGED = "the compressed file is damaged or cut off"


def container_of(path: Path) -> str:
    """The name's ending that tells the container: ".jsonl", ".json", ".csv", ...; "" without."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def iter_values(path: Path, problems: LineProblems) -> _Values:
    """The values of a file with their line (of CSV: where it begins) or their number, from 1.

    A file whose name tells no container is read as JSON lines. What can't be read among values that
    can goes to `problems`, which the caller raises at the end. JSON that isn't lines is read whole,
    everything else is a stream.

    Raises:
        FileNotFoundError: with the absolute path.
        ValueError: where the file isn't what its name says.
    """
    yield from _READERS.get(container_of(path), iter_json_lines)(path, problems)


def _json_values(path: Path, problems: LineProblems) -> _Values:
    """The objects of an array, of an object's only list, or of JSON lines."""
    with open_for_reading(path, ".json or .json.gz") as file:
        try:
            refuse_what_is_no_text(path, file.peek(START))
            first_line = next((line for line in file if line.strip()), b"")
            more = next((line for line in file if line.strip()), b"")
            if more and _is_object(first_line):
                yield from iter_json_lines(path, problems)
                return
            file.seek(0)
            content = json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=unique_keys)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: {_DAMAGED} ({error})") from error
        except (ValueError, RecursionError) as error:
            where = f"line {error.lineno}, " if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"{path}: not valid JSON ({where}{json_hint(error)})") from error
    yield from enumerate(_rows_of(content, path), start=1)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _rows_of(content: object, path: Path) -> list[Any]:
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON array, or an object with a list of objects")
    if _has_columns(content):
        raise ValueError(
            f"{path}: is a table by columns ({', '.join(map(repr, content))}); write it by rows, "
            "with pandas: df.to_json(PATH, orient='records', lines=True)"
        )
    lists = [
        value
        for value in content.values()
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    ]
    if _PROMPT_KEYS & content.keys() or (lists and _TURN_KEYS & lists[0][0].keys()):
        return [content]
    if len(lists) == 1:
        return lists[0]
    raise ValueError(
        f"{path}: must be a JSON array, or an object with one list of objects; it is an object "
        f"with {len(lists)} such lists and the keys {', '.join(map(repr, content))}"
    )


def _has_columns(content: dict[str, Any]) -> bool:
    """Whether an object's values are columns: equally long lists, or cells by their number."""
    lists = all(isinstance(column, list) for column in content.values())
    lists = lists and any(isinstance(cell, str) for column in content.values() for cell in column)
    numbered = all(isinstance(column, dict) and "0" in column for column in content.values())
    lengths = {len(column) for column in content.values() if isinstance(column, list | dict)}
    return (lists or numbered) and len(content) > 1 and len(lengths) == 1


def _csv_values(path: Path, problems: LineProblems) -> _Values:
    """Rows as mappings from the names in the first line to text."""
    with open_for_reading(path, "CSV") as file:
        try:
            refuse_what_is_no_text(path, file.peek(START))
            text = io.TextIOWrapper(
                file, encoding="utf-8-sig", errors="surrogateescape", newline=""
            )
            yield from _csv_rows(text, path, problems)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: {_DAMAGED} ({error})") from error


def _csv_rows(text: io.TextIOWrapper, path: Path, problems: LineProblems) -> _Values:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long conversation
    first_line = next((line for line in text if line.strip()), "")
    delimiter = "\t" if container_of(path) == ".tsv" else _delimiter(first_line)
    reader = csv.reader(itertools.chain([first_line], text), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problems.add(line, f"not valid CSV ({error})")
            continue
        if cells is None:
            return
        if not names:
            names = _column_names(cells, path)
        elif not any(cells):
            continue
        elif len(cells) != len(names):
            problems.add(line, f"has {len(cells)} cells, the first line has {len(names)}")
        elif not all(map(is_unicode, cells)):
            problems.add(line, "not UTF-8 (save the table as CSV UTF-8)")
        else:
            yield line, dict(zip(names, cells, strict=True))


def _delimiter(first_line: str) -> str:
    """Spreadsheets write ';' in many countries: what the first line has most of."""
    return max(_DELIMITERS, key=first_line.count)


def _column_names(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() or f"column {i}" for i, cell in enumerate(cells, start=1)]
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise ValueError(f"{path}: its first line names columns twice: {', '.join(twice)}")
    return names


def _parquet_values(path: Path, problems: LineProblems) -> _Values:
    import datasets

    with open_for_reading(path, "Parquet") as file, tempfile.TemporaryDirectory() as folder:
        try:
            plain = path
            if path.suffix == ".gz":  # Parquet is read from its end
                plain = Path(folder) / "rows.parquet"
                with open(plain, "wb") as unpacked:
                    shutil.copyfileobj(file, unpacked)
            rows = datasets.load_dataset(
                "parquet", data_files=str(plain), split="train", streaming=True
            )
            # Decoded, a picture or a recording would be fetched from wherever its cell says.
            yield from enumerate(rows.decode(False), start=1)
        except (
            *(ValueError, OSError, EOFError, zlib.error),
            datasets.exceptions.DatasetsError,
        ) as error:
            raise ValueError(f"{path} can't be read as Parquet: {error}") from error


_READERS: dict[str, Callable[[Path, LineProblems], _Values]] = {
    ".json": _json_values,
    ".csv": _csv_values,
    ".tsv": _csv_values,
    ".parquet": _parquet_values,
}
CONTAINERS = (".jsonl", *_READERS)
"""Endings of names."""
