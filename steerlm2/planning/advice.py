"""Changes of a config that make a run fit into memory, the cheapest first."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchtune.modules.peft import get_adapter_params

from steerlm2.config.loader import takes
from steerlm2.models.decoders import tensor_parallel_problems
from steerlm2.planning.jobs import Job

SMALLEST_BUDGET = 1024
"""The smallest token budget of a micro-batch that is suggested. A choice: with fewer tokens a GPU
isn't busy, and many responses don't fit."""
LORA = (
    "model.lora_attn_modules=[q_proj,k_proj,v_proj,output_proj]",
    "model.apply_lora_to_mlp=true",
    "model.lora_rank=16",
    "model.lora_alpha=32",
)


@dataclass(frozen=True)
class Change:
    """Overrides of the config, and their price in words."""

    overrides: tuple[str, ...]
    price: str
    shrinks_state: bool
    """Whether parameters, gradients or optimizer state shrink, not only activations."""
    more_gpus: int = 1
    """Factor of the number of GPUs."""


def changes(job: Job[Any], gpus_per_node: int) -> Iterator[Change]:
    """Changes in the order of their price: time, then what is trained, then GPUs."""
    cfg = job.cfg
    if not cfg.fsdp_reshard_after_forward:
        yield Change(
            ("fsdp_reshard_after_forward=true",), "layers are gathered twice a micro-batch", False
        )
    if cfg.data_parallel_replicate_dim > 1:
        yield Change(("data_parallel_replicate_dim=1",), "more traffic between nodes", True)
    budgets = [job.budget // 2, job.budget // 4]
    smaller = [f"{job.budget_key}={budget}" for budget in budgets if budget >= SMALLEST_BUDGET]
    checkpointing = "enable_activation_checkpointing=true"
    for budget in smaller[:1]:
        yield Change((budget,), "more micro-batches", False)
    if not cfg.enable_activation_checkpointing:
        yield Change(
            (checkpointing, "ac_mode=selective"),
            "all operations but matrix products and attention run twice",
            False,
        )
        yield Change((checkpointing,), "every forward runs twice", False)
        for budget in smaller[:1]:
            yield Change((checkpointing, budget), "both of these", False)
    elif cfg.ac_mode == "selective":
        yield Change(("ac_mode=full",), "every forward runs twice", False)
    for budget in smaller[1:]:
        more = () if cfg.enable_activation_checkpointing else (checkpointing,)
        yield Change((*more, budget), "many more micro-batches", False)
    tp = cfg.tensor_parallel_dim * 2
    if tp <= gpus_per_node and not list(tensor_parallel_problems(job.build(), tp)):
        price = "more traffic within a node"
        yield Change((f"tensor_parallel_dim={tp}",), price, False)
    if cfg.optimizer["_component_"] in ("torch.optim.AdamW", "torch.optim.Adam"):
        eight_bit = ["optimizer=torchao.optim.AdamW8bit"]
        eight_bit += [f"~optimizer.{key}" for key in ("fused", "foreach") if key in cfg.optimizer]
        yield Change(tuple(eight_bit), "optimizer moments of 8 bits", True)
    if not cfg.fsdp_cpu_offload and cfg.device == "cuda":
        yield Change(
            ("fsdp_cpu_offload=true",), "the optimizer runs on the CPU, in the host's memory", True
        )
    module, _, builder = cfg.model["_component_"].rpartition(".")
    adapters = "only adapters are trained"
    if hasattr(importlib.import_module(module), f"lora_{builder}"):
        yield Change((f"model={module}.lora_{builder}", *LORA), adapters, True)
    elif takes(cfg.model, "lora_rank") and not get_adapter_params(job.build()):
        yield Change(LORA, adapters, True)
    yield Change((), "twice as many GPUs", True, more_gpus=2)
