"""Where the checkpoint is: a Hugging Face folder, or the folder of a run that exported some; and
whether it is still the same."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

INDEX_FILE = "model.safetensors.index.json"

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".distcp")

LARGE_FILE = 2**26
"""Bytes; of a larger file of weights only pieces are read for its digest."""

PIECES, PIECE = 64, 4096

_EXPORT = re.compile(r"epoch_(\d+)")


def resolve_checkpoint_dir(
    path: str | Path, key: str = "checkpoint_dir", *, missing_ok: bool = False
) -> Path:
    """The Hugging Face folder that a path means: itself, or the newest export of a run.

    Args:
        path: a folder with a config.json; or the output_dir of a run, of whose epoch_N folders the
            complete one of the highest N is meant.
        key: what the path was given as, for the error.
        missing_ok: give the path itself where it is neither.

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
    """Whether it is a folder that `resolve_checkpoint_dir` knows."""
    try:
        folder = resolve_checkpoint_dir(path, missing_ok=True)
        return (folder / "config.json").is_file()
    except OSError:  # too long to be a path
        return False


def newest_export(run_dir: Path) -> Path | None:
    """The complete epoch_N folder of a run that has the highest N; None where there is none."""
    found = [
        (int(match[1]), folder)
        for folder in run_dir.glob("epoch_*")
        if (match := _EXPORT.fullmatch(folder.name)) and is_complete(folder)
    ]
    return max(found)[1] if found else None


def is_complete(folder: Path) -> bool:
    """Whether an export is written to its end: config.json comes last."""
    return (folder / "config.json").is_file() and not missing_weights(folder)


def weight_files(folder: Path) -> list[str]:
    """Names of the files of weights, by the index where there is one."""
    index = folder / INDEX_FILE
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return sorted(file.name for file in folder.glob("*.safetensors"))


def missing_weights(folder: Path) -> list[str]:
    """Names of the files of weights that aren't there."""
    names = weight_files(folder)
    return [name for name in names if not (folder / name).is_file()] if names else ["*.safetensors"]


def file_digest(path: str | Path) -> str:
    """Of a file's content; of many weights, of pieces of it: training moves all of them."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= LARGE_FILE or path.suffix not in WEIGHT_SUFFIXES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size}\n".encode())
        for i in range(PIECES):
            file.seek(size * i // PIECES)
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def weights_digest(checkpoint_dir: str | Path) -> str:
    """Of a checkpoint's weights: another one where a model was trained again into the same folder.

    Args:
        checkpoint_dir: its folder, or that of a run: see `resolve_checkpoint_dir`.

    Raises:
        FileNotFoundError: where there is no checkpoint.
    """
    folder = resolve_checkpoint_dir(checkpoint_dir)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES]
    digests = [f"{path.name}:{file_digest(path)}\n" for path in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
