"""Writing a training state, with the SHA-256 of its files computed while they are written."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Generator
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem


class HashingWriter(FileSystemWriter):
    """`torch.distributed.checkpoint`'s writer of a folder's files.

    Attributes:
        sums: SHA-256 of the files that this rank has written, by name.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _HashingFiles()

    @property
    def sums(self) -> dict[str, str]:
        return cast(_HashingFiles, self.fs).sums


class _HashingFiles(FileSystem):
    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(
        self, path: str | PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            hashing = _HashingStream(stream)
            yield cast(io.IOBase, hashing)
        self.sums[Path(path).name] = hashing.digest.hexdigest()

    def rename(self, path: str | PathLike[str], new_path: str | PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(fspath(new_path)).name] = self.sums.pop(Path(path).name)


class _HashingStream:
    """A file that is written from its start to its end."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return int(self._file.write(content))

    def tell(self) -> int:
        return int(self._file.tell())

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return int(self._file.fileno())

    def close(self) -> None:
        self._file.close()
