"""Moments of torchao's 8-bit, 4-bit and float8 optimizers, in a training state.

They are tensor subclasses of codes and of one scale for each block of codes. Asynchronous saving
can't stage such tensors, and the blocks divide the shard of a parameter that one rank has, so they
depend on the layout. A state therefore holds codes and scales as plain tensors, named after their
shard. A run with the same layout reads its own shards, bit for bit; a run with another layout
dequantizes the overlapping shards and quantizes its own again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchao.optim.adam import _AdamBase
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from steerlm2.checkpoints.state_reader import StateReader, read_state
from steerlm2.distributed.parallelize import local_part

State = dict[str, dict[str, Any]]
"""The state of an optimizer: {parameter: {"exp_avg": ...}}."""

QUANTIZED = {kind.__name__: kind for kind in (OptimState8bit, OptimState4bit, OptimStateFp8)}
NUMBERS = "float"
"""The kind of a shard that is too small to be quantized; other ranks' shards of it may be."""
STATE_KEY = "optimizer.state."

_PART_KEY = re.compile(r"(?P<moment>.+)\.(?P<kind>\w+)@(?P<offsets>[\d,]+)\+(?P<shape>[\d,]+)")


class Part(NamedTuple):
    """A rank's shard of a moment in a state."""

    name: str
    moment: str
    kind: str
    offsets: list[int]
    shape: list[int]


def quantizes(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, _AdamBase) and isinstance(optimizer.block_size, int)


def plain_state(state: State) -> State:
    """A quantizing optimizer's state with its codes and scales as plain tensors (not copied)."""
    return {
        parameter: {
            key: part
            for name, value in moments.items()
            for key, part in _plain(name, value).items()
        }
        for parameter, moments in state.items()
    }


def split_by_form(state: State, stored: Iterable[str], *, quantized: bool) -> tuple[State, State]:
    """The moments that a checkpoint holds in this run's form, and those that must be converted.

    Args:
        stored: the checkpoint's keys.
        quantized: whether the state is of an optimizer that quantizes.
    """
    keys = set(stored)
    known = keys | {part.moment for part in _parts(keys)}
    present: State = {}
    other: State = {}
    for parameter, moments in state.items():
        for name, value in moments.items():
            prefix = f"{STATE_KEY}{parameter}."
            plain = _plain(name, value) if quantized else {name: value}
            if all(prefix + key in keys for key in plain) or prefix + name not in known:
                present.setdefault(parameter, {}).update(plain)
            else:
                other.setdefault(parameter, {})[name] = value
    return present, other


@torch.no_grad()
def read_converted(state: State, reader: StateReader) -> None:
    """Fill moments from a checkpoint that holds them in other shards, or not quantized."""
    if not state:
        return
    metadata = reader.read_metadata().state_dict_metadata
    parts: dict[str, list[Part]] = {}
    for part in _parts(metadata):
        parts.setdefault(part.moment, []).append(part)
    for parameter, moments in state.items():
        for name, value in moments.items():
            moment = f"{STATE_KEY}{parameter}.{name}"
            local, offsets = local_part(value)
            if local.numel() == 0:
                continue
            numbers = torch.zeros(local.shape)
            if moment in parts:
                for part in parts[moment]:
                    _copy_overlap(numbers, offsets, part, reader, signed=name == "exp_avg")
            else:
                read_state({moment: _like(value, numbers)}, reader)
            local.copy_(numbers.to(local.device))


def _plain(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return {name: value}
    local, offsets = local_part(value)
    if local.numel() == 0:
        return {}
    kind = type(local).__name__ if type(local).__name__ in QUANTIZED else NUMBERS
    shard = f"{','.join(map(str, offsets))}+{','.join(map(str, local.shape))}"
    return {f"{name}.{kind}@{shard}.{key}": part for key, part in _tensors(kind, local).items()}


def _tensors(kind: str, local: Tensor) -> dict[str, Tensor]:
    if kind == NUMBERS:
        return {"codes": local}
    return {"codes": cast(Any, local).codes, "scale": cast(Any, local).scale}


def _like(value: Tensor, local: Tensor) -> Tensor:
    if not isinstance(value, DTensor):
        return local
    return DTensor.from_local(
        local,
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def _parts(keys: Iterable[str]) -> Iterator[Part]:
    for key in keys:
        name, _, part = key.rpartition(".")
        found = _PART_KEY.fullmatch(name)
        if part == "codes" and found is not None:
            numbers = ([int(n) for n in found[which].split(",")] for which in ("offsets", "shape"))
            yield Part(name, found["moment"], found["kind"], *numbers)


def _copy_overlap(
    target: Tensor, offsets: list[int], part: Part, reader: StateReader, *, signed: bool
) -> None:
    """Copy the overlap of a stored shard with the shard `target`, which begins at `offsets`."""
    starts = [max(ours, theirs) for ours, theirs in zip(offsets, part.offsets, strict=True)]
    ends = [
        min(ours + n, theirs + m)
        for ours, n, theirs, m in zip(offsets, target.shape, part.offsets, part.shape, strict=True)
    ]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return
    stored = torch.zeros(part.shape)
    if part.kind != NUMBERS:
        scale = reader.read_metadata().state_dict_metadata[f"{part.name}.scale"]
        assert isinstance(scale, TensorStorageMetadata)
        block_size = stored.numel() // scale.size.numel()
        kind = QUANTIZED[part.kind]
        signs = () if kind is OptimStateFp8 else (signed,)
        stored = kind.zeros(part.shape, *signs, block_size=block_size)
    tensors = {f"{part.name}.{key}": value for key, value in _tensors(part.kind, stored).items()}
    read_state(tensors, reader)
    source = stored if part.kind == NUMBERS else stored.dequantize()
    to_copy, stored_slices = (
        tuple(
            slice(start - first, end - first)
            for start, end, first in zip(starts, ends, firsts, strict=True)
        )
        for firsts in (offsets, part.offsets)
    )
    target[to_copy] = source[stored_slices]
