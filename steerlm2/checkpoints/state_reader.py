"""Reading a training state that somebody else may have written: nothing in it is run.

torch.distributed.checkpoint pickles a state's description (`.metadata`) and whatever in it is no
tensor, and unpickles both with everything that pickle can do. Here a description may only hold what
it is made of, by name, and values only what `torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import functools
import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import ReadItem

METADATA = ".metadata"

_CHECKPOINT = "torch.distributed.checkpoint"
_DESCRIPTION = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata"),
            *("TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
"""What a description is made of, as torch 2.11 to 2.15 write it; beside these, types of numbers and
paths."""
_PATH_MODULES = ("pathlib", "pathlib._local")
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


class DamagedError(ValueError):
    """A file of a state isn't what a run wrote."""


class StateReader(dcp.FileSystemReader):
    """Reads the files of one training state, and its description once, not for every tensor.

    Raises:
        ValueError: where the description is none, or names files that aren't the state's.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    @functools.cached_property
    def _metadata(self) -> Metadata:
        file = Path(self.path) / METADATA
        with file.open("rb") as opened:
            found = _DescriptionUnpickler(opened).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"{file} holds no training state")
        for part in (found.storage_data or {}).values():
            if not isinstance(part.relative_path, str) or "/" in part.relative_path:
                raise ValueError(f"{file} names a file that isn't the state's")
        return found

    def check_plain_values(self) -> None:
        """Read all that is no tensor.

        Raises:
            DamagedError: where one of the values isn't plain, naming the file.
        """
        description = self.read_metadata()
        for index, part in (description.storage_data or {}).items():
            kind = description.state_dict_metadata.get(index.fqn)
            if isinstance(kind, BytesStorageMetadata):
                with (Path(self.path) / part.relative_path).open("rb") as file:
                    file.seek(part.offset)
                    content = io.BytesIO(file.read(part.length))
                try:
                    load_plain(content, index.fqn)
                except Exception as error:  # unpickling damage raises anything
                    problem = f"{part.relative_path}: {type(error).__name__}: {error}"
                    raise DamagedError(problem) from error


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DESCRIPTION:
            return super().find_class(module, name)
        if module in _PATH_MODULES and name in _PATHS:
            return PurePath  # of any system: only the text matters
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(
            f"{METADATA} wants to run {module}.{name}, which no training state needs"
        )


class StatePlanner(DefaultLoadPlanner):
    """Reads what is no tensor (an optimizer's settings) as plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(load_plain(value, read_item.storage_index.fqn), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def load_plain(file: io.BytesIO | Path, name: str) -> Any:
    """`torch.load` of tensors, numbers, texts and containers of them.

    Raises:
        pickle.UnpicklingError: naming what holds anything else.
    """
    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError:  # its text says how to run the payload
        raise pickle.UnpicklingError(f"{name} holds more than numbers and text") from None


def read_state(tensors: dict[str, Any], reader: StateReader, *, no_dist: bool = True) -> None:
    """`dcp.load` that runs nothing of what it reads.

    Args:
        tensors: a state dict, which is filled.
        no_dist: this process reads for itself; False: all ranks read together.
    """
    dcp.load(tensors, storage_reader=reader, planner=StatePlanner(), no_dist=no_dist)
