"""The processes of a run, and the mesh that they form.

One process without a launcher has no mesh and a plain module. Processes started by torchrun form
a mesh (dp_replicate, dp_shard, tp): tensor parallel within a node, FSDP2 over dp_shard, replicas
over dp_replicate (HSDP). `distributed.parallelize` lays a model out over it.
"""

from __future__ import annotations

import atexit
import datetime
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

ObjectT = TypeVar("ObjectT")

TIMEOUT = datetime.timedelta(hours=1)
"""Default timeout of collectives. A choice: the other ranks wait while rank 0 reads or writes the
weights of a large model, which takes longer than torch's 10 minutes on slow file systems."""
GPU_CAPABILITY = (8, 0)
"""Ampere (A100): the first with bfloat16 products. What runs on older ones hasn't been tried."""
FLEX_BLOCK_TOKENS = 128
"""Queries and keys of a block in FlexAttention's masks (its default); a multiple of the 16 rows
that float8 products need."""
TENSOR_PARALLEL_TOKENS = 64
"""A choice. Of 10 steps on two CPU ranks a third was spent on layouts for new lengths."""


@dataclass(frozen=True)
class World:
    """This process's rank in the mesh of all processes; without a mesh it is the only one."""

    device: torch.device
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    """Group of all processes for the exchanges below; None: the default group, as in training."""
    timeout: datetime.timedelta = TIMEOUT
    """After this time a collective that isn't complete ends the run."""

    @property
    def size(self) -> int:
        return self.mesh.size() if self.mesh is not None else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.mesh is not None else 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def tp_size(self) -> int:
        return self.mesh["tp"].size() if self.mesh is not None else 1

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """The tensor-parallel group; None without tensor parallel."""
        return self.mesh["tp"].get_group() if self.mesh is not None and self.tp_size > 1 else None

    @property
    def padding_multiple(self) -> int:
        """The length of a packed sequence is a multiple of this (`multiple_of` of `pack`).

        On a GPU it is whole blocks of FlexAttention, which spares its kernels the checks at the
        end, and is what float8 products need. Tensor-parallel ranks hold equal parts of it; each
        new length costs them DTensor's propagation of layouts, so there are few lengths.
        """
        blocks = FLEX_BLOCK_TOKENS if self.device.type == "cuda" else 1
        lengths = 1 if self.tp_size == 1 else TENSOR_PARALLEL_TOKENS
        return math.lcm(blocks, lengths, self.tp_size)

    @property
    def dp_size(self) -> int:
        return self.size // self.tp_size

    @property
    def dp_rank(self) -> int:
        """The data-parallel rank; ranks of one tensor-parallel group share it, and their data."""
        return self.rank // self.tp_size

    @property
    def restarted(self) -> bool:
        """Whether torchrun has restarted the processes after a loss. Called by all ranks."""
        count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # of this node's launcher
        return bool(self.max(torch.tensor(float(count), device=self.device)).item())

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum of a tensor [...] over the data-parallel ranks, on every rank."""
        if self.mesh is None:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.tp_size  # tensor-parallel ranks hold the same values

    def max(self, values: Tensor) -> Tensor:
        """The element-wise maximum of a tensor [...] over all ranks, on every rank."""
        if self.mesh is None:
            return values
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def from_main(self, value: ObjectT) -> ObjectT:
        """Rank 0's picklable value, on every rank."""
        if self.mesh is None:
            return value
        holder: list[Any] = [value]
        dist.broadcast_object_list(holder, src=0, group=self.group)
        return holder[0]

    def gather(self, value: ObjectT) -> list[ObjectT]:
        """The picklable values of all ranks, in their order, on every rank."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_main(self, action: Callable[[], ObjectT]) -> ObjectT | None:
        """Run an action on rank 0 only; returns its result there, and None on the others.

        Raises:
            ValueError: on every rank, where the action raised ValueError or OSError on rank 0.
                Otherwise the others would wait for it until their timeout.
        """
        result, problem = None, None
        if self.is_main:
            try:
                result = action()
            except (ValueError, OSError) as error:
                if self.mesh is None:
                    raise
                problem = str(error)
        if (problem := self.from_main(problem)) is not None:
            raise ValueError(problem)
        return result

    def computed_on_main(self, action: Callable[[], ObjectT]) -> ObjectT:
        """What rank 0 computes, a picklable value, on every rank.

        Raises:
            ValueError: as `on_main`.
        """
        return cast(ObjectT, self.from_main(self.on_main(action)))

    def on_all(self, action: Callable[[], ObjectT]) -> ObjectT:
        """Run an action on every rank that may fail on some of them.

        Raises:
            ValueError: on every rank, where the action raised ValueError or OSError on any; the
                message names the ranks.
        """
        if self.mesh is None:
            return action()
        problem, result = None, None
        try:
            result = action()
        except (ValueError, OSError) as error:
            problem = str(error)
        problems = self.gather(problem)
        if any(problems):
            raise ValueError(_by_rank(problems))
        return cast(ObjectT, result)

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier(group=self.group)


def init_world(
    device: str,
    *,
    tensor_parallel_dim: int = 1,
    data_parallel_replicate_dim: int = 1,
    data_parallel_shard_dim: int = -1,
    needs_mesh: bool = False,
    timeout_seconds: float | None = None,
    flight_records: Path | None = None,
) -> World:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device: "cpu" or "cuda"; a rank takes the GPU of its local rank.
        tensor_parallel_dim: ranks that split each matrix; best kept within a node.
        data_parallel_replicate_dim: replicas of the sharded model (HSDP).
        data_parallel_shard_dim: ranks that shard one replica's parameters; -1: all that are left.
        needs_mesh: make a mesh also for a single process: mixed precision and CPU offload need
            FSDP2, which needs a mesh.
        timeout_seconds: after which a collective that isn't complete ends the run; None: TIMEOUT.
        flight_records: a folder for the files of NCCL's flight recorder at a timeout
            (`nccl_trace_rank_*`, for torchfrtrace), if the environment names no other.

    Raises:
        ValueError: where the number of processes is not the product of the three dimensions, or
            CUDA is asked for and this rank has no GPU that can train.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        check_gpu(local_rank)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    shape = mesh_shape(
        size, data_parallel_replicate_dim, data_parallel_shard_dim, tensor_parallel_dim
    )
    own_device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own_device)
    launched = "RANK" in os.environ
    if not launched and not needs_mesh:
        return World(own_device)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    timeout = TIMEOUT if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
    if flight_records is not None:
        _record_flights(flight_records)
    if launched:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    names = ("dp_replicate", "dp_shard", "tp")
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    public = getattr(dist, "set_timeout", None)  # torch 2.14 and later warn of the private one
    set_timeout = public or dist.distributed_c10d._set_pg_timeout
    for group in mesh.get_all_groups():  # torch sets their timeout to 10 minutes
        set_timeout(timeout, group)
    return World(own_device, mesh, timeout=timeout)


def check_gpu(local_rank: int) -> None:
    """Refuse a rank without a GPU that can train.

    Raises:
        ValueError: where there is no GPU for this rank, an older one than FlexAttention and
            bfloat16 need, or no Triton to compile for it.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "device is cuda, but PyTorch sees no GPU here; set device=cpu dtype=fp32 "
            "(and compile=false, where the config has it)"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK is {local_rank}, but PyTorch sees {count} GPU(s) here: start at most "
            f"{count} process(es) on a node (--nproc_per_node), or look at CUDA_VISIBLE_DEVICES"
        )
    found = torch.cuda.get_device_capability(local_rank)
    if found < GPU_CAPABILITY:
        name = torch.cuda.get_device_name(local_rank)
        raise ValueError(
            f"this GPU ({name}) has compute capability {found[0]}.{found[1]}; bfloat16 and "
            "FlexAttention need 8.0 or more (A100, L40S, H100, ...): set device=cpu, or take "
            "another GPU"
        )
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "FlexAttention is compiled with Triton, which is not installed here: install PyTorch's "
            "build for CUDA, which brings it along, or set device=cpu"
        )


def close_world() -> None:
    """Leave the process group together: gloo can abort a rank that leaves before the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def end_rank(status: int = 0) -> None:
    """Close the world and end the process. Without a process group it does nothing.

    The interpreter isn't finalized, only the functions of `atexit` are called: gloo's threads can
    still hold tensors of the last collectives, and releasing them during the finalization aborts
    the process (pytorch/pytorch#190489), so that a complete run would count as failed.

    Args:
        status: the exit status; unless it is 0, it doesn't wait for the other ranks.
    """
    if not dist.is_initialized():
        return
    if status == 0:
        close_world()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _by_rank(problems: Sequence[str | None]) -> str:
    """Each problem once, with its ranks if not all ranks have it."""
    ranks: dict[str, list[str]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None:
            ranks.setdefault(problem, []).append(str(rank))
    return "\n".join(
        text if len(having) == len(problems) else f"on rank {', '.join(having)}: {text}"
        for text, having in ranks.items()
    )


def _record_flights(folder: Path) -> None:
    """Set the flight recorder's environment variables, unless one or its older name is set."""
    for names, value in (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
        (
            ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
            str(folder.absolute() / "nccl_trace_rank_"),
        ),
    ):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def mesh_shape(size: int, replicate: int, shard: int, tp: int) -> tuple[int, int, int]:
    """The mesh's shape (dp_replicate, dp_shard, tp) for so many processes; `shard` may be -1.

    Raises:
        ValueError: where their product is not the number of processes.
    """
    if min(replicate, tp) < 1 or (shard < 1 and shard != -1):
        raise ValueError(
            "tensor_parallel_dim and data_parallel_replicate_dim must be at least 1, "
            "data_parallel_shard_dim at least 1 or -1 (all ranks that are left)"
        )
    if shard == -1 and size % (replicate * tp) == 0:
        shard = size // (replicate * tp)
    if replicate * shard * tp != size:
        raise ValueError(
            f"{size} process(es) can't form data_parallel_replicate_dim={replicate} x "
            f"data_parallel_shard_dim={shard} x tensor_parallel_dim={tp}: the product must be the "
            "number of processes that `tune run --nproc_per_node N` starts, or plan_memory's "
            "world_size (data_parallel_shard_dim=-1 takes what is left, where it divides)"
        )
    return replicate, shard, tp
