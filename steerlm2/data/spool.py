"""A place on disk for data that must be read once more, in another order."""

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
    """Objects in a file: what stays in memory is the place of each, a number. See `open_spool`."""

    _file: IO[bytes]

    def add(self, obj: Any) -> int:
        """Append an object that can be pickled; its place, for `read`."""
        place = self._file.seek(0, os.SEEK_END)
        pickle.dump(obj, self._file, pickle.HIGHEST_PROTOCOL)
        return place

    def read(self, place: int) -> Any:
        """The object that `add` put there."""
        self._file.seek(place)
        return pickle.load(self._file)


@contextlib.contextmanager
def open_spool(directory: Path) -> Iterator[Spool]:
    """A spool in an existing directory, as a file without a name: nothing is left of it afterwards,
    also if the process is killed."""
    with tempfile.TemporaryFile(dir=directory) as file:
        yield Spool(file)
