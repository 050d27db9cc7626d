"""All that is used of torchtune 0.6.1 although its names are private.

Another version may have it elsewhere: then this is the only file to change (`_tune` apart, which
names torchtune's modules without importing them).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torchtune
from omegaconf import DictConfig

try:
    from torchtune._recipe_registry import Recipe, get_all_recipes
    from torchtune.config._utils import _merge_yaml_and_cli_args
    from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
except ImportError as error:
    raise ImportError(
        f"steerlm2 needs torchtune 0.6.1, and this version, {torchtune.__version__}, lacks a part "
        f"({error}): pip install torchtune==0.6.1"
    ) from error

__all__ = ["Llama3ScaledRoPE", "Recipe", "get_all_recipes", "merge_arguments"]


def merge_arguments(values: Mapping[str, Any], arguments: Sequence[str]) -> DictConfig:
    """A config's values with those of the command line, as `tune run` merges them.

    Args:
        values: of the YAML.
        arguments: `key=value` and `~key`.

    Raises:
        ValueError: for arguments that can't be merged.
    """
    return _merge_yaml_and_cli_args(argparse.Namespace(**values), list(arguments))
