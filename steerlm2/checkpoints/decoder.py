"""From a config's `model` to a decoder that is laid out over the processes and has its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from steerlm2.checkpoints.weights import Checkpointer, load_weights
from steerlm2.config.keys import ActivationCheckpointing, DistributedKeys
from steerlm2.config.loader import instantiate, takes
from steerlm2.distributed.parallelize import DTYPES, parallelize
from steerlm2.distributed.world import World
from steerlm2.models.reward_head import add_reward_head

CHECKPOINT_DIR = "checkpoint_dir"


def checkpoint_dir_of(model: Mapping[str, Any], checkpointer: Mapping[str, Any] | None) -> str:
    """The folder whose config.json a `model` section is built from: its own or its checkpointer's;
    "" where there is neither."""
    return model.get(CHECKPOINT_DIR) or (checkpointer or {}).get(CHECKPOINT_DIR) or ""


def build_decoder(
    model: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    checkpointer: Mapping[str, Any] | None = None,
    param_dtype: torch.dtype | None = None,
    num_attributes: int | None = None,
) -> TransformerDecoder:
    """The decoder of a config section, on the meta device.

    Of a LoRA model only the adapters are trained, and a reward head; the rest is in `dtype`.

    Args:
        dtype: of the computation.
        checkpointer: section of the model's checkpointer, whose folder a `from_checkpoint` without
            one of its own reads.
        param_dtype: of the trained weights; none: `dtype`.
        num_attributes: of an attribute model, whose reward head replaces the output layer.

    Raises:
        ValueError: where the arguments don't go together, or `from_checkpoint` has no folder.
        FileNotFoundError: where its folder doesn't exist.
    """
    arguments = dict(model)
    if takes(model, CHECKPOINT_DIR):
        arguments[CHECKPOINT_DIR] = checkpoint_dir_of(model, checkpointer)
        if not arguments[CHECKPOINT_DIR]:
            arguments.pop("planned_as", None)  # a plan has a folder that is still to come
    with torch.device("meta"):
        decoder = instantiate(arguments)
        if num_attributes is not None:
            add_reward_head(decoder, num_attributes)
        decoder = decoder.to(param_dtype or dtype)
    if adapters := get_adapter_params(decoder):
        set_trainable_params(decoder, adapters)
        if num_attributes is not None:
            decoder.output.requires_grad_()
        for parameter in decoder.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return decoder


def lay_out(
    decoder: TransformerDecoder,
    checkpointer: Checkpointer | None,
    world: World,
    keys: DistributedKeys,
    *,
    activation_checkpointing: ActivationCheckpointing | None = None,
    fresh_head: bool = False,
) -> None:
    """Lay a decoder on the meta device out over the processes, and fill it with weights.

    Args:
        checkpointer: on rank 0; None on the others.
        keys: the layout, `dtype`, `compile` and `seed`.
        activation_checkpointing: as of `parallelize`.
        fresh_head: the output layer starts from the seed, also if the checkpoint has one.

    Raises:
        ValueError: on every rank, where model, layout and checkpoint don't fit together.
    """
    parallelize(
        decoder,
        world,
        dtype=DTYPES[keys.dtype],
        activation_checkpointing=activation_checkpointing,
        compile=keys.compile,
        reshard_after_forward=keys.fsdp_reshard_after_forward,
        cpu_offload=keys.fsdp_cpu_offload,
    )
    load_weights(
        decoder,
        checkpointer,
        world,
        seed=keys.seed,
        fresh_head=fresh_head,
        cpu_offload=keys.fsdp_cpu_offload,
    )
