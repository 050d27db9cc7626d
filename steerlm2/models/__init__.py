"""Llama decoders: torchtune's, and the one that a checkpoint's config.json describes."""

from steerlm2.models.from_checkpoint import from_checkpoint

__all__ = ["from_checkpoint"]
