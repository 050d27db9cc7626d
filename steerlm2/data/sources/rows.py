"""The rows of a source: a data set of the Hugging Face hub, a file, or a folder laid out as there.

Local files are read as streams (JSON arrays whole). A data set of the hub is loaded with
`datasets`, which keeps it on disk.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from steerlm2.data.jsonl import LineProblems, shortened
from steerlm2.data.sources.containers import CONTAINERS, container_of, iter_values

Split = Literal["train", "validation"]

# Names of a split in file names, and patterns of its files in a folder; the first match is taken.
_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "valid", "dev", "test"),
}
_ENDINGS = [
    ending
    for container in (".jsonl", ".parquet", *CONTAINERS)
    for ending in (f"{container}.gz", container)
]
_PATTERNS = [
    pattern + ending
    for pattern in ("{}", "{}-*", "{}_[0-9]*", "data/{}", "data/{}-*", "data/{}_[0-9]*")
    for ending in dict.fromkeys(_ENDINGS)
]
_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json"}
"""Files that `datasets` writes next to data."""
_SPLITS = "{train: NAME, validation: NAME} reads these"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_NAME = re.compile(r".*\.(jsonl?|gz|parquet|csv|tsv)")

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One row of a source, with its file, its number from 1, and the split of its file."""

    path: str | Path
    number: int
    value: Any
    split: Split | None = None


def iter_rows(
    source: str | Path,
    problems: LineProblems,
    subset: str = "",
    splits: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """All rows of a source: those of the training split, then those of the validation split.

    Lines that can't be read go to `problems`, which the caller raises at the end. A folder's files
    that aren't read are logged.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file, also with .gz; a folder with such
            files named train and validation (or val, valid, dev; test where there is no other),
            also in shards; a folder whose files have other names, which are all read and have no
            split; or a hub id.
        subset: read this sub-folder of the folder or of the data set on the hub. It may have one
            file of its own name for both splits.
        splits: "train" and "validation" -> the names they have in this source.

    Raises:
        FileNotFoundError: if there is no such file, or none of these in the folder.
        ValueError: if the hub's data set can't be loaded.
    """
    path = Path(source)
    names = {
        split: (splits[split],) if splits and split in splits else usual
        for split, usual in _SPLIT_NAMES.items()
        if not splits or split in splits
    }
    if path.is_dir():
        files = _files_of_folder(path, subset, names)
    elif path.exists() or _FILE_NAME.fullmatch(path.name) or not _HUB_ID.fullmatch(str(source)):
        files = [(path, None)]
    else:
        yield from _rows_of_hub(str(source), subset, names)
        return
    for file, split in files:
        problems.path = file
        for number, value in iter_values(file, problems):
            yield Row(file, number, value, split)


_Names = Mapping[Split, tuple[str, ...]]


def _files_of_folder(folder: Path, subset: str, names: _Names) -> list[tuple[Path, Split | None]]:
    base = folder if folder.name == subset else folder / subset
    files: list[tuple[Path, Split | None]] = []
    for split, own_names in names.items():
        files += [(file, split) for file in _first_match(base, own_names)]
    others = _data_files(base)
    if not files and subset:
        files = [(file, None) for file in _first_match(base, (subset,))]
    elif not files and names == _SPLIT_NAMES and not any(map(_names_a_split, others)):
        files = [(file, None) for file in others]
    elif all(split == "validation" for _, split in files):
        files = [pair for pair in files if not pair[0].name.startswith("test")]
    if not files:
        wanted = f"{subset}.jsonl.gz or train.jsonl.gz" if subset else "train.jsonl.gz"
        if names != _SPLIT_NAMES:
            wanted = " and no ".join(name for own in names.values() for name in own)
        raise FileNotFoundError(
            f"{base.absolute()} holds no {wanted} (nor {', '.join(CONTAINERS)}): give a folder "
            f"laid out as the data set on the hub, or a file{_found(base)}"
        )
    if unread := sorted({*others} - {file for file, _ in files}):
        _log.warning("%s: not read: %s", base, ", ".join(file.name for file in unread))
    return files


def _names_a_split(path: Path) -> bool:
    """Whether a file's name begins as a split's, such as train_sft: read together with others, it
    would mix what is to be kept apart."""
    return path.name.startswith(tuple(itertools.chain(*_SPLIT_NAMES.values())))


def _found(base: Path) -> str:
    files = _data_files(base) or _data_files(base / "data")
    names = ", ".join(shortened([file.name for file in files]))
    return f"; it holds {names}: data/chat's builder.splits={_SPLITS}" if files else ""


def _data_files(folder: Path) -> list[Path]:
    """The files of a folder that are in a known container, sorted."""
    if not folder.is_dir():
        return []
    known = (p for p in folder.iterdir() if container_of(p) in CONTAINERS and p.is_file())
    return sorted(p for p in known if p.name not in _ABOUT_DATA and not p.name.startswith("."))


def _first_match(base: Path, names: Iterable[str]) -> list[Path]:
    """The file, or its shards, that match the first matching pattern."""
    for name in names:
        for pattern in _PATTERNS:
            if found := sorted(base.glob(pattern.format(name))):
                return found
    return []


def _rows_of_hub(source: str, subset: str, names: _Names) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, data_dir=subset or None)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source} is no local file or folder, and can't be loaded from the hub ({error}). "
            "Without internet, download its files elsewhere and give their folder as 'source'"
        ) from error
    found = {
        split: name
        for split, own in names.items()
        if (name := next((each for each in own if each in loaded), None))
    }
    if "train" not in found and found.get("validation") in (None, "test"):
        wanted = " or ".join(repr(name) for name in names.get("train", ("train",)))
        raise ValueError(f"{source} has no split {wanted}, only {', '.join(map(repr, loaded))}")
    if unread := sorted({*loaded} - {*found.values()}):
        _log.warning("%s: splits that are not read: %s", source, ", ".join(unread))
    for split, name in found.items():
        # Decoded, a picture or a recording would be fetched from wherever its cell says.
        rows = loaded[name].to_iterable_dataset().decode(False)
        for number, value in enumerate(rows, start=1):
            yield Row(f"{source} [{name}]", number, value, split)
