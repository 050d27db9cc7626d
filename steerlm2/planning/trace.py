"""A training step with fake tensors: the real layout, on a process group that only pretends.

The model is built on the meta device and laid out by `steerlm2.distributed.parallelize.parallelize`
over a fake process group, of which this process is rank 0 (where shards are uneven, the one with
the most). Then the optimizer's update, a micro-batch's forward and backward, and the gradient norm
run under FakeTensorMode: every operation and every collective, without data.

What differs from the real run: compile is off, so memory that compiled kernels save is counted;
attention is the CPU's, which like the GPU's keeps its inputs, its output and a number a token.
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

from steerlm2.distributed.parallelize import clip_gradients, parallelize, reduce_gradients
from steerlm2.distributed.world import World, mesh_shape
from steerlm2.models import logprobs
from steerlm2.models.nf4 import finish_empty
from steerlm2.planning.jobs import Job, TrainingConfig
from steerlm2.planning.tracker import Collective, Kind, StepTracker, Traffic

MESH = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Trace:
    """What one rank's step takes; bytes and FLOPs of one micro-batch of `tokens` tokens."""

    peak: dict[Kind, float]
    """Bytes by kind when most is in use."""
    state: dict[Kind, float]
    """Bytes of parameters, gradients and optimizer, whether or not they are in `peak`."""
    flops: dict[str, float]
    """By phase: forward, backward, update."""
    attention_flops: dict[str, float]
    traffic: dict[Collective, Traffic]
    tokens: int
    pairs: int
    """Pairs of a token and one that it sees."""

    @property
    def peak_bytes(self) -> float:
        return sum(self.peak.values())


@contextlib.contextmanager
def fake_world(world_size: int, cfg: TrainingConfig) -> Iterator[World]:
    """Rank 0 of `world_size` processes that aren't there, laid out as the config says.

    Raises:
        ValueError: where the config's parallel dimensions don't make `world_size`.
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
        # DTensor remembers what it did on a mesh of the same shape, with that mesh's groups.
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
    """Trace a step of one micro-batch in its steady state, the optimizer's state being there.

    Args:
        records: of the micro-batch.
        accumulates: the step has other micro-batches before this one, so that their gradients are
            there too.
        num_layers: of the model, if not all.

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
                module.rope_init()  # looks at values, so it must be real

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
    # A step begins here with the previous one's update: what follows finds the optimizer's state.
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
    if accumulates and not every_time:  # its gradients stay whole
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
    """A real update of a small matrix: torchao's tables are computed, from values, and kept."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.zeros(64, 64)
    job.optimizer([parameter]).step()


def _materialize(decoder: TransformerDecoder) -> None:
    """Storage on the (fake) device for what is on the meta device."""
    for module in decoder.modules():
        if not hasattr(module, "rope_init"):
            # not the module's own method: LoRALinear's leaves its weight out
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
    """`token_logps` lets a GPU's matrix product accumulate and answer in float32; on a CPU it
    makes float32 copies of its inputs instead, which no GPU will hold. Its chunks are larger."""

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
        logger.setLevel(logging.ERROR)  # that a gradient norm is reduced over two dimensions
        try:
            yield
        finally:
            logger.setLevel(level)
