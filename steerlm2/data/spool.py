"""A temporary file for data that is read once more, in another order."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass
class Spool:
    """Objects in a file; only the offset of each is kept in memory. See `open_spool`."""

    _file: IO[bytes]

    def add(self, obj: Any) -> int:
        """Append an object that can be pickled; returns its offset, for `read`."""
        offset = self._file.seek(0, os.SEEK_END)
        pickle.dump(obj, self._file, pickle.HIGHEST_PROTOCOL)
        return offset

    def read(self, offset: int) -> Any:
        """The object that `add` wrote at this offset."""
        self._file.seek(offset)
        return pickle.load(self._file)


@contextlib.contextmanager
def open_spool(directory: Path) -> Iterator[Spool]:
    """A spool in an existing directory.

    Its file has no name, so nothing is left of it, also if the process is killed.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        yield Spool(file)
