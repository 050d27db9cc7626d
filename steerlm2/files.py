"""Files that are whole after a power cut and are no others' files, and digests that show damage.

After a power cut a file system may leave a new file empty, cut off, or filled with NULs, unless the
program had waited (fsync) until the file, and its name in the folder, were on the disk.

`SHA256SUMS` in a training state and in an export has the SHA-256 of its files, as `sha256sum -c`
reads it. It shows accidents: whoever may write to the folder may write to it too. A file that isn't
in it isn't checked.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

SUMS_FILE = "SHA256SUMS"
FILES_AT_ONCE = 4
"""That are hashed: a choice. SHA-256 takes a core 1 to 2 GB/s."""

_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""What some network file systems answer where it is asked of a folder."""

_LINE = re.compile(r"([0-9a-f]{64})  ([^/\0]+)")


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, and wait until it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # a link's target would be written over
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    replace_durably(partial, path)


def replace_durably(temporary: Path, path: Path) -> None:
    """Give a complete file its final name, in the same folder, once it is on the disk."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def open_own(path: Path, mode: str) -> IO[Any]:
    """Open a file to write into it as it stands, as `open` does.

    Raises:
        ValueError: where it is a link: whoever made the folder chose the file that it leads to.
    """

    def without_links(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    try:
        return open(path, mode, opener=without_links)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(
            f"{path.absolute()} is a link, and what is written into it would go into another file: "
            "remove it"
        ) from error


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text that may be damaged.

    Raises:
        ValueError: where it isn't JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path, names: Iterable[str]) -> None:
    """Wait until files of a folder, by relative path, and all folders between are on the disk."""
    files = [folder / name for name in names]
    for path in (*files, *{parent for file in files for parent in file.parents}):
        if path.exists() and path.is_relative_to(folder):
            sync(path)


def sha256(source: Path | bytes) -> str:
    """Of all of a file, or of what one will hold, in hexadecimal."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write SHA256SUMS: the digests of files of the folder, by name."""
    lines = (f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    write_durably(folder / SUMS_FILE, "".join(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """What SHA256SUMS says of the files of a folder, by name; of no file where there is none.

    Raises:
        ValueError: where it is damaged, naming it.
    """
    file = folder / SUMS_FILE
    if not file.is_file():
        return {}
    lines = file.read_bytes().decode(errors="replace").split("\n")
    found = [_LINE.fullmatch(line) for line in lines[:-1]]
    if not found or lines[-1] or not all(found):
        raise ValueError(
            f"{file.absolute()} is damaged: copy or download it again, or remove it, and nothing "
            "is checked"
        )
    return {match[2]: match[1] for match in found if match is not None}


def changed(folder: Path, names: Collection[str] | None = None) -> list[str]:
    """Names of files of a folder that aren't what SHA256SUMS says.

    Args:
        names: of the files to look at, where they exist; None: all that SHA256SUMS names.

    Raises:
        ValueError: where SHA256SUMS is damaged.
        OSError: where a file can't be read.
    """
    sums = read_sums(folder)
    asked = sums if names is None else [name for name in names if (folder / name).is_file()]
    known = [name for name in asked if name in sums]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        digests = pool.map(sha256, map(folder.joinpath, known))
        return [n for n, digest in zip(known, digests, strict=True) if digest != sums[n]]


def check_unchanged(folder: Path, names: Collection[str]) -> None:
    """Check that files of a folder are what they were when SHA256SUMS was written.

    Raises:
        ValueError: naming those that aren't.
    """
    if found := changed(folder, names):
        raise ValueError(has_changed(folder, found))


def has_changed(folder: Path, names: Collection[str]) -> str:
    """The message about files that aren't what SHA256SUMS says."""
    return (
        f"{folder.absolute()}: {', '.join(names)} changed since {SUMS_FILE} was written beside it. "
        "If that was a change of your own, remove the file's line there; if not, the file is "
        "damaged: copy or download it again"
    )
