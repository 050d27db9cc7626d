"""A training step with fake tensors: the real layout, on a fake process group.

The model is built on the meta device and laid out by `steerlm2.distributed.parallelize.parallelize`
over a fake process group, of which this process is rank 0 (which has the largest shards, where they
are uneven). Then the optimizer's update, a micro-batch's forward and backward, and the gradient
norm run under FakeTensorMode: every operation and every collective, without data.

Differences from the real run: it isn't compiled, so memory that compiled kernels save is counted;
attention is that of the CPU, which keeps its inputs, its output and one number a token for the
backward, like that of the GPU.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtune.modules import TransformerDecoder

from steerlm2.config.keys import TrainingKeys
from steerlm2.distributed.parallelize import clip_gradients, parallelize, reduce_gradients
from steerlm2.distributed.world import World, mesh_shape
from steerlm2.models import logprobs
from steerlm2.models.nf4 import finish_empty
from steerlm2.planning.jobs import Job
from steerlm2.planning.tracker import Collective, Kind, StepTracker, Traffic

MESH = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Trace:
    """Bytes and FLOPs of one rank's step of one micro-batch with `tokens` tokens."""

    peak: dict[Kind, float]
    """Bytes by kind at the moment of the highest use."""
    state: dict[Kind, float]
    """Bytes of parameters, gradients and optimizer, whether or not they are in `peak`."""
    flops: dict[str, float]
    """By phase: forward, backward, update."""
    attention_flops: dict[str, float]
    traffic: dict[Collective, Traffic]
    tokens: int
    pairs: int
    """Pairs of a token and a token that it attends to."""

    @property
    def peak_bytes(self) -> float:
        return sum(self.peak.values())


@contextlib.contextmanager
def fake_world(world_size: int, cfg: TrainingKeys) -> Iterator[World]:
    """Rank 0 of `world_size` fake processes, with the mesh of the config.

    Raises:
        ValueError: where the config's parallel dimensions don't multiply to `world_size`.
    """
    if world_size < 1:
        raise ValueError(f"'world_size' must be at least 1, got {world_size}")
    shape = mesh_shape(
        world_size,
        cfg.data_parallel_replicate_dim,
        cfg.data_parallel_shard_dim,
        cfg.tensor_parallel_dim,
    )
    mixed = (cfg.param_dtype or cfg.dtype) != cfg.dtype or cfg.fsdp_cpu_offload
    if world_size == 1 and not mixed:
        yield World(torch.device("cpu"))  # as init_world does: no mesh, no FSDP2
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield World(torch.device("cpu"), init_device_mesh("cpu", shape, mesh_dim_names=MESH))
    finally:
        dist.destroy_process_group()
        # DTensor caches its plans by the shape of a mesh, but they hold the groups of this one.
        _clear_sharding_prop_cache()
        clear_redistribute_planner_cache()


def trace_step(
    job: Job[Any],
    records: Sequence[Any],
    world: World,
    *,
    accumulates: bool,
    num_layers: int | None = None,
) -> Trace:
    """Trace a step of one micro-batch after the first step, so that the optimizer has its state.

    Args:
        records: of the micro-batch.
        accumulates: whether the step has earlier micro-batches, whose gradients are kept.
        num_layers: use only so many layers of the model; None: all.

    Raises:
        ValueError: where the model can't be laid out as the config says.
    """
    cfg = job.cfg
    decoder = job.build()
    if num_layers is not None:
        decoder.layers = decoder.layers[:num_layers]
    parallelize(
        decoder,
        world,
        dtype=job.dtype,
        activation_checkpointing=cfg.ac_mode if cfg.enable_activation_checkpointing else None,
        reshard_after_forward=cfg.fsdp_reshard_after_forward,
    )
    with torch.device("cpu"):
        for module in decoder.modules():
            if hasattr(module, "rope_init"):
                module.to_empty(device="cpu")
                module.rope_init()  # reads values, so its tensors must be real

    pairs = sum(record.num_pairs for record in records)
    tracker = StepTracker(dimensions=_dimensions(world), attention_pairs=pairs)
    on_gpu = _gpu_logits() if cfg.device == "cuda" else contextlib.nullcontext()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _quiet(), torch.compiler.set_stance("force_eager"), on_gpu:
        _first_use(job)
        with fake, tracker:
            return _traced(job, decoder, records, world, tracker, accumulates)


def _traced(
    job: Job[Any],
    decoder: TransformerDecoder,
    records: Sequence[Any],
    world: World,
    tracker: StepTracker,
    accumulates: bool,
) -> Trace:
    _materialize(decoder)
    tracker.mark([*decoder.parameters(), *decoder.buffers()], "parameters")
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    optimizer = job.optimizer(parameters)
    decoder.train()
    # The trace begins with the previous step's update, which creates the optimizer's state.
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    tracker.mark(_gradients(parameters), "gradients")
    tracker.forget_the_past()
    tracker.phase = "update"
    optimizer.step()
    tracker.mark(_states(optimizer), "optimizer")
    state = tracker.now()
    every_time = job.cfg.fsdp_reduce_every_microbatch
    if not (accumulates and every_time):
        optimizer.zero_grad(set_to_none=True)
    if accumulates and not every_time:  # its gradients stay unsharded
        tracker.phase = "earlier"
        reduce_gradients(decoder, world, last=False, every_time=False)
        job.forward(decoder, records, world)()
        reduce_gradients(decoder, world, last=True, every_time=False)

    tracker.phase = "forward"
    backward = job.forward(decoder, records, world)
    tracker.phase = "backward"
    backward()
    tracker.mark(_gradients(parameters), "gradients")
    tracker.phase = "update"
    clip_gradients(parameters, job.cfg.clip_grad_norm)
    peak = cast(dict[Kind, float], dict(tracker.at_peak()))
    tokens = sum(record.num_tokens for record in records)
    return Trace(
        peak,
        {kind: state[kind] for kind in ("parameters", "gradients", "optimizer")},
        dict(tracker.flops),
        dict(tracker.attention_flops),
        tracker.traffic,
        tokens,
        tracker.attention_pairs,
    )


def _first_use(job: Job[Any]) -> None:
    """Update a small real matrix: torchao computes its quantization tables once, from values."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.zeros(64, 64)
    job.optimizer([parameter]).step()


def _materialize(decoder: TransformerDecoder) -> None:
    """Allocate the tensors of the meta device on the (fake) device."""
    for module in decoder.modules():
        if not hasattr(module, "rope_init"):
            # nn.Module's method: LoRALinear's own leaves its weight out
            nn.Module.to_empty(module, device="cpu", recurse=False)
    finish_empty(decoder, torch.device("cpu"))


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def _dimensions(world: World) -> dict[str, tuple[str, int]]:
    """The mesh dimension of each process group and its size, by the group's name."""
    if world.mesh is None:
        return {}
    assert dist.group.WORLD is not None
    groups = {"all": dist.group.WORLD} | {name: world.mesh[name].get_group() for name in MESH}
    return {str(group.group_name): (name, group.size()) for name, group in groups.items()}


def _gpu_logits() -> Any:
    """Make `token_logps` compute as on a GPU, with the GPU's chunk size.

    There a matrix product of bfloat16 inputs has a float32 result; on a CPU the inputs are copied
    to float32 instead, which would count as memory.
    """

    def logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
        if hidden_CD.dtype == torch.float32:
            return hidden_CD @ weight_VD.t()
        return torch.mm(hidden_CD, weight_VD.t(), out_dtype=torch.float32)

    return mock.patch.multiple(
        logprobs,
        _logits=logits,
        _exact=lambda weight_VD: weight_VD,
        CHUNK_BYTES=logprobs.CHUNK_BYTES | {"cpu": logprobs.CHUNK_BYTES["cuda"]},
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # NF4's
        logger = logging.getLogger("torch.distributed.tensor._redistribute")
        level = logger.level
        logger.setLevel(logging.ERROR)  # warns of a gradient norm over two mesh dimensions
        try:
            yield
        finally:
            logger.setLevel(level)
