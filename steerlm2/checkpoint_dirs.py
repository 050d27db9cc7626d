"""Finding a checkpoint (a Hugging Face folder, or the newest export of a run), its config.json and
its digest."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

from steerlm2.escaping import shown
from steerlm2.files import has_changed, parse_json, read_sums, sha256

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".distcp")

LARGE_FILE = 2**26
"""64 MiB; of a larger file of weights only pieces are read for its digest. A choice: every smaller
file is hashed in well under a second."""

PIECES, PIECE = 64, 4096
"""Pieces that are read of a large file, and bytes of each. A choice: 256 KiB are read at once, and
training changes nearly every weight, so each piece would show it."""

_EXPORT = re.compile(r"epoch_(\d+)")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        ValueError: where it is damaged, naming it; as `read_own`.
    """
    content = read_own(file)
    try:
        values = parse_json(content)
    except ValueError as error:
        raise ValueError(
            f"{file.absolute()} is damaged or cut off ({error}): download it again"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{file.absolute()} must hold a JSON object: download it again")
    return values


def read_own(file: Path) -> bytes:
    """The content of one of a checkpoint's small files, which an export may repeat.

    Raises:
        ValueError: where it is a link to something else, which its owner may not want to publish.
    """
    if not _is_own(file):
        raise ValueError(
            f"{file.absolute()} is a link to {file.resolve()}, which is another file of another "
            "folder: an export would publish it. Remove the link, or copy the file if it is meant"
        )
    content = file.read_bytes()
    expected = read_sums(file.parent).get(file.name)
    if expected is not None and sha256(content) != expected:
        _warn(f"WARNING: {has_changed(file.parent, [file.name])}")
    return content


def _is_own(file: Path) -> bool:
    """Whether what a link leads to is a file of the folder, or one of the same name elsewhere.

    In the Hub's cache `snapshots/REVISION` consists of links to `blobs` beside `snapshots`.
    """
    folder, target = file.parent.resolve(), file.resolve()
    return (
        target.is_relative_to(folder)
        or target.name == file.name
        or any(
            snapshots.name == "snapshots" and target.parent == snapshots.parent / "blobs"
            for snapshots in folder.parents
        )
    )


@functools.cache
def _warn(text: str) -> None:
    """Once."""
    print(shown(text), file=sys.stderr)


def resolve_checkpoint_dir(
    path: str | Path, key: str = "checkpoint_dir", *, missing_ok: bool = False
) -> Path:
    """The Hugging Face folder for a path: the path itself, or the newest export of a run.

    Args:
        path: a folder with a config.json; or the output_dir of a run: then the result is its
            complete epoch_N folder with the highest N.
        key: the config key of the path, for the error.
        missing_ok: return the path itself where it is neither.

    Raises:
        FileNotFoundError: where it is neither.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    export = newest_export(folder)
    if export is None and not missing_ok:
        raise FileNotFoundError(
            f"{folder.absolute()} has no config.json: {key} must be a Hugging Face checkpoint "
            "(`tune download NAME --output-dir DIR`), an export, or the output_dir of a run that "
            "has a complete epoch_N folder"
        )
    return export or folder


def is_checkpoint(path: str) -> bool:
    """Whether `resolve_checkpoint_dir` finds a checkpoint for the path."""
    try:
        folder = resolve_checkpoint_dir(path, missing_ok=True)
        return (folder / "config.json").is_file()
    except OSError:  # too long to be a path
        return False


def newest_export(run_dir: Path) -> Path | None:
    """The complete epoch_N folder of a run with the highest N; None where there is none."""
    found = [
        (int(match[1]), folder)
        for folder in run_dir.glob("epoch_*")
        if (match := _EXPORT.fullmatch(folder.name)) and is_complete(folder)
    ]
    return max(found)[1] if found else None


def is_complete(folder: Path) -> bool:
    """Whether an export is complete: config.json is written last."""
    return (folder / "config.json").is_file() and not missing_weights(folder)


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's files of weights, as transformers chooses them: model.safetensors, else
    the files of the index. Without either there are none, whatever else lies there.

    Raises:
        ValueError: for an index that can't be read, or that names other things than files of the
            folder.
    """
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        return []
    content = read_own(index)
    try:
        names = set(parse_json(content)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index.absolute()} is damaged or cut off ({error!r}): download it again"
        ) from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(
                f"{index.absolute()}: weight_map must name files of that folder, got {name!r}"
            )
    return sorted(names)


def missing_weights(folder: Path) -> list[str]:
    """Names of a folder's files of weights that don't exist.

    Raises:
        ValueError: as in `weight_files`.
    """
    names = weight_files(folder) or [f"{SINGLE_FILE} (or {INDEX_FILE} and its files)"]
    return [name for name in names if not (folder / name).is_file()]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Of a large file of weights only its size and pieces count, since training changes all weights.
    """
    path = Path(path)
    size = path.stat().st_size
    if size <= LARGE_FILE or path.suffix not in WEIGHT_SUFFIXES:
        return sha256(path)
    with path.open("rb") as file:
        digest = hashlib.sha256(f"{size}\n".encode())
        for i in range(PIECES):
            file.seek(size * i // PIECES)
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def weights_digest(checkpoint_dir: str | Path) -> str:
    """SHA-256 of a checkpoint's weights: it changes when a model is trained again into its folder.

    Args:
        checkpoint_dir: a checkpoint's folder, or that of a run (`resolve_checkpoint_dir`).

    Raises:
        FileNotFoundError: where there is no checkpoint.
    """
    folder = resolve_checkpoint_dir(checkpoint_dir)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES]
    digests = [f"{path.name}:{file_digest(path)}\n" for path in files]
    return sha256("".join(digests).encode())
