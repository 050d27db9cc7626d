"""Laying a model out over the processes of a run, and reducing and clipping its gradients.

Tensor parallel, activation checkpointing, compile and FSDP2 are applied to torchtune's decoders
without changes of the model code.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
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

from steerlm2.config.keys import ActivationCheckpointing
from steerlm2.distributed.world import World
from steerlm2.models.attention import attend_blocks
from steerlm2.models.decoders import (
    divide_heads,
    end_at_hidden_states,
    gpu_problems,
    tensor_parallel_plan,
    tensor_parallel_problems,
    unsupported_parts,
)
from steerlm2.models.nf4 import is_nf4, nf4_problems, quantize_frozen

RECOMPILE_LIMIT = 64
"""Compilations of one function before torch falls back to eager mode. Its default of 8 is too few:
training, validation and scoring each compile static and dynamic lengths. A choice: 64 is enough for
them, and still ends a loop of recompilations."""

PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    attend_blocks._opoverload,
    torch.ops.higher_order.flex_attention,
)
"""Operations whose outputs "selective" activation checkpointing keeps; the others are recomputed,
which takes little time."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def free_memory() -> None:
    """Free the memory of models that aren't used any more.

    A decoder is part of a reference cycle, so its memory is freed only by garbage collection.
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
    and are cast to `dtype` for the computation; gradients are reduced in float32.

    Args:
        activation_checkpointing: which operations of a layer are recomputed in the backward: all
            ("full"), or all but matrix products and attention ("selective"; with FlexAttention only
            in compiled layers).

    Raises:
        ValueError: where the model can't be split over the tensor-parallel ranks, or has parts that
            are not supported, or heads that a GPU's attention doesn't take.
    """
    shards = world.mesh["dp_shard"].size() if world.mesh is not None else 1
    problems = [
        *unsupported_parts(decoder),
        *(gpu_problems(decoder) if world.device.type == "cuda" else ()),
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
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # FlexAttention is always compiled
    for i, layer in enumerate(decoder.layers):
        if activation_checkpointing == "full":
            layer = checkpoint_wrapper(layer, preserve_rng_state=False)
        elif activation_checkpointing == "selective":
            layer = checkpoint_wrapper(layer, preserve_rng_state=False, context_fn=keep_products)
        decoder.layers[i] = layer
        if compile:
            # Packed sequences have many lengths: the second one compiles dynamic shapes.
            # dynamic=True from the start fails under tensor parallel without grouped-query
            # attention (torch 2.13).
            layer.compile(backend=os.environ.get("TORCH_COMPILE_BACKEND", "inductor"))
    if world.mesh is not None:
        _shard(decoder, world.mesh, dtype, reshard_after_forward, cpu_offload)


def reduce_gradients(
    decoder: TransformerDecoder, world: World, last: bool, every_time: bool
) -> None:
    """Set, before a backward, whether FSDP2 reduces gradients in it.

    Args:
        last: whether it is the step's last micro-batch.
        every_time: True: reduce-scatter in every micro-batch, and all-reduce between replicas only
            in the last one. False: both only in the last one, which saves traffic and costs memory:
            until then every rank keeps unsharded gradients in float32.
    """
    if world.mesh is not None:
        decoder.set_requires_gradient_sync(last or every_time)
        decoder.set_requires_all_reduce(last)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """The norm of all gradients together, [], on every rank; they are scaled down to `max_norm`.

    Args:
        max_norm: None: don't scale them.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in with_grad if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm is not None:
        clip_grads_with_norm_(with_grad, max_norm, norm)
    return norm


def keep_products() -> Any:
    """The contexts of selective checkpointing: products are kept, all else computed again."""
    return create_selective_checkpoint_contexts(list(PRODUCTS))


def check_finite(grad_norm: Tensor, step: int, last_checked: int) -> None:
    """Check that the gradient norm of a step is a finite number.

    On a GPU the check waits for the step's kernels, so not every step is checked; after a broken
    update all following norms are broken too.

    Args:
        grad_norm: [], of all gradients together.
        step: counted from 1; its update has not been made yet.
        last_checked: the step that was checked before.

    Raises:
        ValueError: where it is infinite or not a number.
    """
    if torch.isfinite(grad_norm):
        return
    weights = "the weights are as before this step"
    if step - last_checked > 1:
        weights = f"it was finite at step {last_checked}, and checkpoints up to there are sound"
    raise ValueError(
        f"step {step}: the gradient norm is {grad_norm.item()}; {weights}. Lower lr, or set "
        "dtype=fp32 to find the cause."
    )


def local_part(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """What this rank has of a tensor, and its offset in each dimension of the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, [0] * tensor.dim()
    (chunk,) = tensor.__create_chunk_list__()
    with torch.no_grad():
        return tensor.to_local(), list(chunk.offsets)


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
    # With a mesh of one rank FSDP2 loses NF4 tensors, which have several parts (torch 2.13).
    ignored = (
        {p for p in decoder.parameters() if is_nf4(p)} if mesh["dp_shard"].size() == 1 else None
    )
    for layer in decoder.layers:
        fully_shard(
            layer,
            mesh=dp_mesh,
            mp_policy=precision,
            reshard_after_forward=reshard_after_forward,
            offload_policy=offload,
            ignored_params=ignored,
        )
    # The log-prob layer reads the output matrix after the root's forward, so it stays unsharded.
    fully_shard(
        decoder,
        mesh=dp_mesh,
        mp_policy=precision,
        reshard_after_forward=False,
        offload_policy=offload,
        ignored_params=ignored,
    )
