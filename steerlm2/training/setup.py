"""Building a training run's model, checkpointer, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params

from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoints.decoder import build_decoder, lay_out
from steerlm2.checkpoints.weights import (
    Checkpointer,
    check_context,
    open_checkpointer,
    open_reward_checkpointer,
)
from steerlm2.config.keys import TrainingKeys
from steerlm2.config.loader import as_function, instantiate, takes
from steerlm2.data.templates import Template
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.distributed.parallelize import DTYPES
from steerlm2.distributed.world import World
from steerlm2.losses import GroupLoss, check_samples_per_prompt, check_share
from steerlm2.training.float8 import use_float8


def build_model(
    cfg: TrainingKeys,
    *,
    longest: int,
    num_attributes: int | None = None,
) -> TransformerDecoder:
    """The decoder to be trained, on the meta device.

    Args:
        longest: tokens of the longest sequence that it will see.
        num_attributes: of an attribute model, whose reward head replaces the output layer.

    Raises:
        ValueError: where the data don't fit the model, or only adapters are to be saved
            and there are none.
    """
    dtype, param_dtype = DTYPES[cfg.dtype], DTYPES[cfg.param_dtype or cfg.dtype]
    model = build_decoder(
        cfg.model,
        dtype,
        checkpointer=cfg.checkpointer,
        param_dtype=param_dtype,
        num_attributes=num_attributes,
    )
    if cfg.save_adapter_weights_only and not get_adapter_params(model):
        raise ValueError("save_adapter_weights_only needs a `model` with LoRA adapters")
    check_context(model, longest)
    return model


@dataclass(frozen=True)
class RewardHeadOptions:
    """What `open_reward_checkpointer` needs beside the arguments of `open_checkpointer`."""

    template: Template
    schema: AttributeSchema
    load_head: bool
    """Whether the checkpoint that the run starts from must have this head."""


def lay_out_model(
    cfg: TrainingKeys,
    model: TransformerDecoder,
    tokenizer: Tokenizer,
    world: World,
    head: RewardHeadOptions | None = None,
) -> Checkpointer | None:
    """Lay the model out over the processes, and fill it with weights: a checkpoint's or fresh ones.

    Args:
        model: on the meta device.
        head: of an attribute model.

    Returns:
        The checkpointer, which writes the export; None on ranks other than 0.

    Raises:
        ValueError: on every rank, where the folder isn't a checkpoint that can be read, has another
            head than `head` asks for, or doesn't fit the model, or the model doesn't fit the
            layout.
    """
    checkpointer = world.on_main(lambda: _open_checkpointer(cfg, model, tokenizer, head))
    if cfg.float8:
        use_float8(model, world.device)
    lay_out(
        model,
        checkpointer,
        world,
        cfg,
        activation_checkpointing=cfg.ac_mode if cfg.enable_activation_checkpointing else None,
        fresh_head=head is not None and cfg.checkpointer is not None and not head.load_head,
    )
    return checkpointer


def _open_checkpointer(
    cfg: TrainingKeys,
    model: TransformerDecoder,
    tokenizer: Tokenizer,
    head: RewardHeadOptions | None,
) -> Checkpointer:
    if head is None:
        return open_checkpointer(
            cfg.checkpointer, model, tokenizer, seed=cfg.seed, output_dir=cfg.output_dir
        )
    return open_reward_checkpointer(
        cfg.checkpointer,
        model,
        tokenizer,
        head.template,
        head.schema,
        seed=cfg.seed,
        output_dir=cfg.output_dir,
        load_head=head.load_head,
    )


READ = {"baseline": check_share, "samples_per_prompt": check_samples_per_prompt}
"""Attributes that are read of a loss, and what checks them."""


def build_loss(component: Mapping[str, Any], normalize: str) -> GroupLoss:
    """The loss of groups that a config names.

    Args:
        component: a function with `logps_N` among its arguments is the loss itself; anything else
            is called with the config's arguments and returns it.
        normalize: handed to what takes it.

    Raises:
        ValueError: where `normalize` asks for something that the loss doesn't take, or what there
            is isn't a `GroupLoss`, as an example shows.
    """
    name = component["_component_"]
    given = dict(component)
    if takes(component, "normalize"):
        given["normalize"] = normalize
    elif normalize == "none":
        raise ValueError(f"'steerlm2.normalize' is none, but {name} doesn't take `normalize`")
    if takes(component, "logps_N"):
        loss: GroupLoss = as_function(given)
        vars(loss).update({key: given[key] for key in READ if key in given})
    else:
        loss = instantiate(given)
    _check_loss(loss, name)
    return loss


def _check_loss(loss: GroupLoss, name: str) -> None:
    """Try a loss on an example: two groups of 2 and 3 responses, together and one by one."""
    for key, check in READ.items():
        if hasattr(loss, key):
            check(getattr(loss, key), f"`{key}` of {name}")
    logps_N = torch.tensor([-4.5, -4.0, -6.5, -6.0, -9.0], requires_grad=True)
    log_q_N = torch.tensor([-4.0, -5.0, -6.0, -7.0, -8.0], dtype=torch.float64)
    w_N = torch.tensor([0.75, 0.25, 0.5, 0.25, 0.25], dtype=torch.float64)
    lengths_N = torch.tensor([2, 3, 4, 5, 6])

    def of(part: slice, *sizes: int) -> Tensor:
        sizes_G = torch.tensor(sizes)
        drawn = {} if getattr(loss, "samples_per_prompt", None) is None else {"drawn_G": sizes_G}
        return loss(logps_N[part], log_q_N[part], w_N[part], sizes_G, lengths_N[part], **drawn)

    try:
        both = of(slice(5), 2, 3)
        apart = (of(slice(2), 2) + of(slice(2, 5), 3)) / 2
    except (TypeError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"{name} can't be called with (logps_N, log_q_N, w_N, group_sizes, response_lengths), "
            f"as steerlm2.losses.GroupLoss is: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(both, Tensor) or both.dim():
        shape = f"shape {list(both.shape)}" if isinstance(both, Tensor) else type(both).__name__
        raise ValueError(f"{name} must return a scalar tensor, got {shape}")
    if not both.requires_grad:
        raise ValueError(f"{name} has no gradient: it must depend on its first argument, logps_N")
    if not torch.allclose(both, apart, rtol=1e-4, atol=1e-6):  # nan too
        raise ValueError(
            f"{name} must be a mean over groups that each count by themselves, as "
            f"steerlm2.losses.mean_over_groups makes it: of two groups it is {both.item():.6g}, "
            f"of the one and the other {apart.item():.6g} in the mean"
        )


def build_schedule(cfg: TrainingKeys, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """The learning rate schedule of a run of so many steps."""
    return instantiate(cfg.lr_scheduler, optimizer, num_training_steps=total_steps)


def check_schedule(cfg: TrainingKeys, total_steps: int) -> None:
    """Find mistakes in the schedule's arguments before the model is loaded.

    Raises:
        ValueError: where it can't be built.
    """
    build_schedule(cfg, torch.optim.SGD([torch.zeros(1)], lr=cfg.peak_lr), total_steps)


def warmup_note(lr_scheduler: Mapping[str, Any], total_steps: int) -> str:
    """That a run ends within its warm-up, as few data in large batches do; "" where it doesn't."""
    warmup_steps = lr_scheduler.get("warmup_steps", 0)
    if total_steps > warmup_steps:
        return ""
    return (
        f"note: the whole run, {total_steps} step(s), is in the warm-up (lr_scheduler.warmup_steps="
        f"{warmup_steps}), so little is learned: more epochs, a smaller global_batch_size, or a "
        "shorter warm-up"
    )


def build_optimizer(
    cfg: TrainingKeys, model: nn.Module, total_steps: int
) -> tuple[Optimizer, LambdaLR]:
    """The optimizer of a model's trained parameters, and its schedule."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = instantiate(cfg.optimizer, parameters, lr=cfg.peak_lr)
    return optimizer, build_schedule(cfg, optimizer, total_steps)
