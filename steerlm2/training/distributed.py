"""The processes of a run, and how a model is laid out over them.

One process without a launcher has no mesh and a plain module. Processes started by torchrun form
a mesh (dp_replicate, dp_shard, tp): tensor parallel within a node, FSDP2 over dp_shard, replicas
over dp_replicate (HSDP). Model code knows nothing of it.
"""

from __future__ import annotations

import atexit
import datetime
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torchtune.modules import TransformerDecoder

from steerlm2.attention import attend_blocks
from steerlm2.models.llama import (
    divide_heads,
    end_at_hidden_states,
    tensor_parallel_plan,
    tensor_parallel_problems,
    unsupported_parts,
)
from steerlm2.models.nf4 import is_nf4, nf4_problems, quantize_frozen

ObjectT = TypeVar("ObjectT")

TIMEOUT = datetime.timedelta(hours=1)
"""The others wait while rank 0 reads or writes the weights of a large model."""

RECOMPILE_LIMIT = 64
"""Training, validation and scoring each compile static and dynamic lengths; torch stops at 8."""

ActivationCheckpointing = Literal["full", "selective"]

PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    attend_blocks._opoverload,
    torch.ops.higher_order.flex_attention,
)
"""What "selective" activation checkpointing keeps. All else is quick to compute again."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class World:
    """This process's place among all processes. Without a mesh it is the only one."""

    device: torch.device
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    """Of all processes, for what is exchanged here; None: the one that training uses."""
    timeout: datetime.timedelta = TIMEOUT
    """After which a collective that isn't complete ends the run."""

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
        """The tensor-parallel group, None where there is nothing to split."""
        return self.mesh["tp"].get_group() if self.mesh is not None and self.tp_size > 1 else None

    @property
    def dp_size(self) -> int:
        return self.size // self.tp_size

    @property
    def dp_rank(self) -> int:
        """Ranks of one tensor-parallel group have the same: they see the same data."""
        return self.rank // self.tp_size

    @property
    def restarted(self) -> bool:
        """Whether torchrun started the processes again, after one was lost. Called by all ranks."""
        count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # of this node's launcher
        return bool(self.max(torch.tensor(float(count), device=self.device)).item())

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the data-parallel ranks, on every rank."""
        if self.mesh is None:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.tp_size  # tensor-parallel ranks hold the same values

    def max(self, values: Tensor) -> Tensor:
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
        """Do something on rank 0 only; None on the others.

        Raises:
            ValueError: on every rank, where the action raised ValueError or OSError on rank 0: the
                others would wait for it until they time out.
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

    def on_all(self, action: Callable[[], ObjectT]) -> ObjectT:
        """Do something on every rank that may fail on some of them.

        Raises:
            ValueError: on every rank, where the action raised ValueError or OSError on any; it
                says on which.
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
        device: "cpu" or "cuda"; a rank takes the GPU of its place on the node.
        tensor_parallel_dim: ranks that split each matrix; best kept within a node.
        data_parallel_replicate_dim: replicas of the sharded model (HSDP).
        data_parallel_shard_dim: ranks that share one copy's parameters; -1: all that are left.
        needs_mesh: make a mesh of one for a single process too: mixed precision and CPU offload
            come with FSDP2.
        timeout_seconds: after which a collective that isn't complete ends the run; None: TIMEOUT.
        flight_records: a folder for what NCCL's flight recorder writes then, if the environment
            names no other place: `nccl_trace_rank_*`, for torchfrtrace.

    Raises:
        ValueError: where the number of processes is not the product of the three dimensions, or
            CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU here; set device=cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    shape = mesh_shape(
        size, data_parallel_replicate_dim, data_parallel_shard_dim, tensor_parallel_dim
    )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    launched = "RANK" in os.environ
    if not launched and not needs_mesh:
        return World(place)
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
    for group in mesh.get_all_groups():  # torch gives those 10 minutes
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    return World(place, mesh, timeout=timeout)


def close_world() -> None:
    """Leave together: a rank that goes while rank 0 still exports can be aborted by gloo."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def end_rank(status: int = 0) -> None:
    """Close the world and end the process with it; one that never joined a world goes on.

    gloo's threads can hold tensors of the last collectives still. One that lets go of them while
    the interpreter finalizes aborts the process (pytorch/pytorch#190489), and a run that is done
    would count as failed: so there is no finalization, only what `atexit` would have called.

    Args:
        status: the exit status; where it isn't 0, the other ranks aren't waited for.
    """
    if not dist.is_initialized():
        return
    if status == 0:
        close_world()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def free_memory() -> None:
    """Make room for the next model after the last use of one.

    A decoder refers to itself, so that it lives on until the garbage is collected.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parallelize(
    decoder: TransformerDecoder,
    world: World,
    *,
    dtype: torch.dtype,
    activation_checkpointing: ActivationCheckpointing | None = None,
    compile: bool = False,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Lay a decoder on the meta device out over the processes, in place.

    NF4 -> tensor parallel -> activation checkpointing -> compile -> FSDP2. Its forward then ends at
    the final norm. Under FSDP2 the parameters keep their own dtype (the optimizer's master weights)
    and compute in `dtype`; gradients are reduced in float32.

    Args:
        activation_checkpointing: what of a layer the backward computes again: all of it ("full"),
            or all but the outputs of matrix products and attention ("selective"; of FlexAttention
            only in compiled layers).

    Raises:
        ValueError: where the model can't be split over the tensor-parallel ranks, or has parts that
            are not supported.
    """
    shards = world.mesh["dp_shard"].size() if world.mesh is not None else 1
    problems = [
        *unsupported_parts(decoder),
        *nf4_problems(decoder, shards, world.tp_size, cpu_offload=cpu_offload),
    ]
    if problems:
        raise ValueError("; ".join(problems))
    quantize_frozen(decoder, dtype)
    if world.tp_size > 1:
        assert world.mesh is not None
        if problems := list(tensor_parallel_problems(decoder, world.tp_size)):
            raise ValueError("; ".join(problems) + ": choose another tensor_parallel_dim")
        frozen = {name for name, p in decoder.named_parameters() if not p.requires_grad}
        parallelize_module(decoder, world.mesh["tp"], tensor_parallel_plan(decoder))
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(name not in frozen)  # SequenceParallel unfreezes the norms
        divide_heads(decoder, world.tp_size)
    end_at_hidden_states(decoder)
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # FlexAttention is compiled anyway
    for i, layer in enumerate(decoder.layers):
        if activation_checkpointing == "full":
            layer = checkpoint_wrapper(layer, preserve_rng_state=False)
        elif activation_checkpointing == "selective":
            layer = checkpoint_wrapper(layer, preserve_rng_state=False, context_fn=_keep_products)
        decoder.layers[i] = layer
        if compile:
            # Rows of many lengths: the second length compiles dynamic shapes. dynamic=True from the
            # start fails under tensor parallel without grouped-query attention (torch 2.13).
            layer.compile()
    if world.mesh is not None:
        _shard(decoder, world.mesh, dtype, reshard_after_forward, cpu_offload)


def reduce_gradients(
    decoder: TransformerDecoder, world: World, *, last: bool, every_time: bool
) -> None:
    """Say before a backward whether FSDP2 reduces gradients in it.

    Args:
        last: whether it is the step's last micro-batch.
        every_time: reduce-scatter in every micro-batch, and only all-reduce between replicas in the
            last. Otherwise both wait for the last, which saves traffic and costs memory: every rank
            keeps whole gradients in float32 until then.
    """
    if world.mesh is not None:
        decoder.set_requires_gradient_sync(last or every_time)
        decoder.set_requires_all_reduce(last)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """The norm of all gradients together, on every rank; they are scaled down to `max_norm`.

    Args:
        max_norm: None leaves them as they are.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(list(PRODUCTS))


def check_finite(grad_norm: Tensor, step: int, looked_at: int) -> None:
    """Raises ValueError where the gradient norm of a step is infinite or not a number.

    On a GPU looking waits for it, so not every step is looked at; after a broken update all
    following norms are broken too.

    Args:
        step: counted from 1; its update has not been made yet.
        looked_at: the step that was looked at before.
    """
    if torch.isfinite(grad_norm):
        return
    weights = "the weights are as before this step"
    if step - looked_at > 1:
        weights = f"it was finite at step {looked_at}, and checkpoints up to there are sound"
    raise ValueError(
        f"step {step}: the gradient norm is {grad_norm.item()}; {weights}. Lower lr, or set "
        "dtype=fp32 to find the cause."
    )


def local_part(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """What this rank has of a tensor, and its place in the whole one."""
    if not isinstance(tensor, DTensor):
        return tensor, [0] * tensor.dim()
    (chunk,) = tensor.__create_chunk_list__()
    with torch.no_grad():
        return tensor.to_local(), list(chunk.offsets)


def _by_rank(problems: Sequence[str | None]) -> str:
    """Each problem once, with the ranks that have it where not all do."""
    ranks: dict[str, list[str]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None:
            ranks.setdefault(problem, []).append(str(rank))
    return "\n".join(
        text if len(having) == len(problems) else f"on rank {', '.join(having)}: {text}"
        for text, having in ranks.items()
    )


def _record_flights(folder: Path) -> None:
    """What is in the environment goes first; some names are older ones of the same."""
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


def _shard(
    decoder: TransformerDecoder,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    replicated = mesh["dp_replicate"].size() > 1
    dp_mesh = mesh["dp_replicate", "dp_shard"] if replicated else mesh["dp_shard"]
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    # A mesh of one gathers nothing, and forgets tensors of several parts (torch 2.13).
    whole = {p for p in decoder.parameters() if is_nf4(p)} if mesh["dp_shard"].size() == 1 else None
    for layer in decoder.layers:
        fully_shard(
            layer,
            mesh=dp_mesh,
            mp_policy=precision,
            reshard_after_forward=reshard_after_forward,
            offload_policy=offload,
            ignored_params=whole,
        )
    # The log-prob layer reads the output matrix after the root's forward, so the root stays whole.
    fully_shard(
        decoder,
        mesh=dp_mesh,
        mp_policy=precision,
        reshard_after_forward=False,
        offload_policy=offload,
        ignored_params=whole,
    )


def mesh_shape(size: int, replicate: int, shard: int, tp: int) -> tuple[int, int, int]:
    """The mesh (dp_replicate, dp_shard, tp) of so many processes; `shard` may be -1.

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
