"""Decoders of the supported families: the one that a checkpoint's config.json describes, and more.

`from_checkpoint` is for `_component_` in YAML files. It is imported on first use: what computes
log-probs doesn't need torchtune.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerlm2.models.hf_builder import from_checkpoint

__all__ = ["from_checkpoint"]


def __getattr__(name: str) -> Any:
    if name != "from_checkpoint":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from steerlm2.models import hf_builder

    return hf_builder.from_checkpoint
