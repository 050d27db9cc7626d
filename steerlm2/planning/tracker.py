"""A dispatch mode that counts memory, FLOPs and collectives, on real or on fake tensors.

Every storage that an operation creates is an allocation with a kind. A log of all changes of
allocations gives the peak and its parts afterwards, when the kinds are known (a gradient, for
example, begins as a buffer of a collective).

Memory that a kernel allocates and frees internally isn't counted.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Kind = Literal[
    "parameters", "gradients", "optimizer", "activations", "logits", "communication", "other"
]
KINDS: tuple[Kind, ...] = (
    *("parameters", "gradients", "optimizer", "activations", "logits", "communication", "other"),
)

_KIND_BY_FILE: dict[str, Kind] = {
    "steerlm2/models/logprobs.py": "logits",
    "torch/distributed/fsdp/": "communication",
    "torch/optim/": "optimizer",
    "torchao/optim/": "optimizer",
    "torch/nn/utils/clip_grad.py": "other",
}
"""The kind of an allocation, by the file of the innermost caller that is listed here."""

_FLOPS_OF_A_PAIR = {"steerlm2::attend_blocks": 4, "steerlm2::attend_blocks_backward": 10}
"""By head and head dimension: 2 products forward, 5 backward (with the scores recomputed), each
of 2 FLOPs."""


@dataclass
class Allocation:
    nbytes: int
    kind: Kind


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind over one dimension of the mesh."""

    phase: str
    operation: Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all"]
    dimension: str


@dataclass
class Traffic:
    count: int = 0
    nbytes: float = 0
    """Bytes of the full tensors that are gathered or reduced."""
    sent: float = 0
    """Bytes that each rank sends with ring algorithms: (n - 1) / n of `nbytes`, twice that for an
    all-reduce."""


@dataclass
class StepTracker(TorchDispatchMode):
    """The dispatch mode; enter it inside of FakeTensorMode.

    Args:
        dimensions: the dimension of the mesh and its size by the name of the process group;
            collectives of other groups aren't counted.
        attention_pairs: pairs of a token and a token that it attends to, in the micro-batch.
    """

    dimensions: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    attention_pairs: int = 0
    phase: str = ""
    """The phase that FLOPs and collectives are counted under."""

    def __post_init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.attention_flops: Counter[str] = Counter()
        """The part of `flops` that is proportional to the pairs, not to the tokens."""
        self.traffic: dict[Collective, Traffic] = {}
        self._live: dict[int, tuple[weakref.ref[UntypedStorage], Allocation]] = {}
        self._log: list[tuple[Allocation, int]] = []
        self._resize = UntypedStorage.resize_

    def __enter__(self) -> StepTracker:
        resize = self._resize

        # FSDP2 resizes storages, which a dispatch mode doesn't see.
        @functools.wraps(resize)
        def tracked(storage: UntypedStorage, size: int) -> UntypedStorage:
            result = resize(storage, size)
            if storage._cdata in self._live:
                allocation = self._live[storage._cdata][1]
                self._note(allocation, storage.nbytes() - allocation.nbytes)
            return result

        UntypedStorage.resize_ = tracked  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(hasattr(t, "__tensor_flatten__") for t in types):
            return NotImplemented  # DTensors and quantized states first become plain tensors
        if func is torch.ops.prim.device.default:
            return func(*args)  # the most frequent one
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if _is_only_for_shapes(sys._getframe(1)):
            return result
        for tensor in tensors:
            self._see(tensor)
        self._count_flops(func, args, kwargs, result)
        self._count_traffic(func, args)
        return result

    def mark(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Set the kind of tensors' allocations, also for the past."""
        for tensor in tensors:
            for part in _plain_parts(tensor):
                self._see(part, kind).kind = kind

    def at_peak(self) -> Counter[Kind]:
        """Bytes by kind at the moment of the highest use."""
        now: Counter[Kind] = Counter()
        highest, total, peak = 0, 0, Counter[Kind]()
        for allocation, delta in self._log:
            now[allocation.kind] += delta
            total += delta
            if total > highest:
                highest, peak = total, now.copy()
        return peak

    def now(self) -> Counter[Kind]:
        """Bytes by kind at present."""
        levels: Counter[Kind] = Counter()
        for _, allocation in self._live.values():
            levels[allocation.kind] += allocation.nbytes
        return levels

    def forget_the_past(self) -> None:
        """Let `at_peak` start from the present allocations."""
        self._log = [(allocation, allocation.nbytes) for _, allocation in self._live.values()]

    def _see(self, tensor: Tensor, kind: Kind | None = None) -> Allocation:
        """The allocation of a tensor's storage; a new one if it isn't known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None and known[0]() is storage:
            return known[1]
        allocation = Allocation(0, kind or _kind_of_caller(sys._getframe(2)))

        def freed(reference: Any) -> None:
            if self._live.get(key, (None,))[0] is reference:
                self._note(allocation, -allocation.nbytes)
                del self._live[key]

        self._live[key] = (weakref.ref(storage, freed), allocation)
        self._note(allocation, storage.nbytes())
        return allocation

    def _note(self, allocation: Allocation, delta: int) -> None:
        allocation.nbytes += delta
        self._log.append((allocation, delta))

    def _count_flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        if packet == torch.ops.aten.addmm_:
            packet = torch.ops.aten.addmm
        if (per_pair := _FLOPS_OF_A_PAIR.get(packet._qualified_op_name)) is not None:
            _, heads, _, head_dim = args[0].shape
            flops = per_pair * heads * head_dim * self.attention_pairs
            self.attention_flops[self.phase] += flops
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        else:
            return
        self.flops[self.phase] += flops

    def _count_traffic(self, func: Any, args: Any) -> None:
        found = _COLLECTIVES.get(func.name().removesuffix(".default"))
        if found is None:
            return
        operation, whole = found
        named = [name for name in map(_group_name, args) if name in self.dimensions]
        if not named:
            return
        dimension, size = self.dimensions[named[0]]
        nbytes = sum(t.numel() * t.element_size() for t in tree_leaves(args[0]))
        if whole == "n x input":
            nbytes *= size
        traffic = self.traffic.setdefault(Collective(self.phase, operation, dimension), Traffic())
        traffic.count += 1
        traffic.nbytes += nbytes
        traffic.sent += nbytes * (size - 1) / size * (2 if operation == "all_reduce" else 1)


_COLLECTIVES: dict[str, tuple[Any, str]] = {
    "_c10d_functional::all_gather_into_tensor": ("all_gather", "n x input"),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", "n x input"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", "input"),
    "_c10d_functional::all_reduce": ("all_reduce", "input"),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", "input"),
    "_c10d_functional::all_to_all_single": ("all_to_all", "input"),
    "_c10d_functional::broadcast": ("broadcast", "input"),
    # Their first argument is the output: of a gather the full tensor, of a scatter a shard.
    "c10d::_allgather_base_": ("all_gather", "input"),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", "n x input"),
    "c10d::allreduce_": ("all_reduce", "input"),
    "c10d::broadcast_": ("broadcast", "input"),
}


def _group_name(argument: Any) -> str:
    if isinstance(argument, torch.ScriptObject):
        try:
            argument = dist.ProcessGroup.unbox(argument)
        except RuntimeError:
            return ""  # another type, such as a reduction
    if isinstance(argument, dist.ProcessGroup):
        return argument.group_name
    return argument if isinstance(argument, str) else ""


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors with storages that a tensor subclass consists of, such as a DTensor's shard."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    parts = [getattr(tensor, name) for name in names]
    return [p for part in parts if isinstance(part, Tensor) for p in _plain_parts(part)]


def _is_only_for_shapes(frame: FrameType | None) -> bool:
    """Whether DTensor's sharding propagation, which infers shapes with fake tensors, called."""
    while frame is not None:
        if frame.f_code.co_filename.endswith("torch/distributed/tensor/_sharding_prop.py"):
            return True
        frame = frame.f_back
    return False


def _kind_of_caller(frame: FrameType | None) -> Kind:
    while frame is not None:
        file = frame.f_code.co_filename
        for part, kind in _KIND_BY_FILE.items():
            if part in file:
                return kind
        frame = frame.f_back
    return "activations"
