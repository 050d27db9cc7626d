"""The rows of a source: a data set of the Hugging Face hub, a file, or a folder laid out as there.

Local files are read as streams. A data set of the hub is loaded with `datasets`, which keeps it on
disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from steerlm2.data.jsonl import LineProblems, iter_json_lines

Split = Literal["train", "validation"]

# Names of a split in file names, and patterns of its files in a folder; the first match is taken.
_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val"),
}
_PATTERNS = (
    "{}.jsonl.gz",
    "{}.jsonl",
    "{}.parquet",
    "{}-*.parquet",
    "data/{}-*.parquet",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_NAME = re.compile(r".*\.(jsonl?|gz|parquet)")


class Row(NamedTuple):
    """One row of a source, with its file, its number from 1, and the split of its file."""

    path: str | Path
    number: int
    value: Any
    split: Split | None = None


def iter_rows(source: str | Path, problems: LineProblems, subset: str = "") -> Iterator[Row]:
    """All rows of a source: those of the training split, then those of the validation split.

    Lines that aren't JSON go to `problems`, which the caller raises at the end.

    Args:
        source: a .jsonl, .jsonl.gz or .parquet file; a folder with train.jsonl.gz and
            validation.jsonl.gz (or .jsonl, or .parquet, also in shards); or a hub id.
        subset: read this sub-folder of the folder or of the data set on the hub. It may have one
            file of its own name for both splits.

    Raises:
        FileNotFoundError: if there is no such file, or none of these in the folder.
        ValueError: if the hub's data set can't be loaded.
    """
    path = Path(source)
    if path.is_dir():
        files = _files_of_folder(path, subset)
    elif path.exists() or _FILE_NAME.fullmatch(path.name) or not _HUB_ID.fullmatch(str(source)):
        files = [(path, None)]
    else:
        yield from _rows_of_hub(str(source), subset)
        return
    for file, split in files:
        problems.path = file
        rows = _parquet_rows(file) if file.suffix == ".parquet" else iter_json_lines(file, problems)
        for number, value in rows:
            yield Row(file, number, value, split)


def _files_of_folder(folder: Path, subset: str) -> list[tuple[Path, Split | None]]:
    base = folder if folder.name == subset else folder / subset
    files: list[tuple[Path, Split | None]] = []
    for split, names in _SPLIT_NAMES.items():
        files += [(file, split) for file in _first_match(base, names)]
    if subset and not files:
        files = [(file, None) for file in _first_match(base, (subset,))]
    if not files:
        wanted = f"{subset}.jsonl.gz or train.jsonl.gz" if subset else "train.jsonl.gz"
        raise FileNotFoundError(
            f"{base.absolute()} holds no {wanted} (nor .jsonl, nor .parquet): give a folder laid "
            "out as the data set on the hub, or a file"
        )
    return files


def _first_match(base: Path, names: Iterable[str]) -> list[Path]:
    """The file, or its shards, that match the first matching pattern."""
    for name in names:
        for pattern in _PATTERNS:
            if found := sorted(base.glob(pattern.format(name))):
                return found
    return []


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import datasets

    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()} does not exist")
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from enumerate(rows, start=1)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path} can't be read as Parquet: {error}") from error


def _rows_of_hub(source: str, subset: str) -> Iterator[Row]:
    import datasets

    try:
        splits = datasets.load_dataset(source, data_dir=subset or None)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source} is no local file or folder, and can't be loaded from the hub ({error}). "
            "Without internet, download its files elsewhere and give their folder as 'source'"
        ) from error
    found = [split for split in _SPLIT_NAMES if split in splits]
    if not found:
        raise ValueError(f"{source} has no split 'train', only {', '.join(map(repr, splits))}")
    for split in found:
        for number, value in enumerate(splits[split], start=1):
            yield Row(f"{source} [{split}]", number, value, split)
