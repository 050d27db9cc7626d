"""All that is used of torchtune 0.6.1 although its names are private.

Another version may have it elsewhere: then this is the only file to change (`_tune` apart, which
names torchtune's modules without importing them).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torchtune
from omegaconf import DictConfig

try:
    from torchtune._recipe_registry import Recipe, get_all_recipes
    from torchtune.config._parse import TuneRecipeArgumentParser
    from torchtune.config._utils import _merge_yaml_and_cli_args
    from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
except ImportError as error:
    raise ImportError(
        f"steerlm2 needs torchtune 0.6.1, and this version, {torchtune.__version__}, lacks a part "
        f"({error}): pip install torchtune==0.6.1"
    ) from error

__all__ = ["Llama3ScaledRoPE", "Recipe", "get_all_recipes", "merge_arguments", "parse_arguments"]


def merge_arguments(values: Mapping[str, Any], arguments: Sequence[str]) -> DictConfig:
    """A config's values with those of the command line, as `tune run` merges them.

    But `schema={...}` replaces the config's schema: of two lists of attributes, merged, neither
    order would be left.

    Args:
        values: of the YAML.
        arguments: `key=value` and `~key`.

    Raises:
        ValueError: for arguments that can't be merged.
    """
    words = [_KeyValue(argument) for argument in arguments]
    if any(argument.startswith("schema={") for argument in arguments):
        values = {key: value for key, value in values.items() if key != "schema"}
    return _merge_yaml_and_cli_args(argparse.Namespace(**values), words)


def parse_arguments(arguments: Sequence[str]) -> DictConfig:
    """What a recipe is given, `--config FILE key=value ...`, as `torchtune.config.parse` reads it.

    The file's name may begin with "~/".

    Raises:
        ValueError: for arguments that can't be merged.
        SystemExit: where there is no `--config`.
    """
    words = [os.path.expanduser(a) if a.startswith("~/") else a for a in arguments]
    values, overrides = TuneRecipeArgumentParser().parse_known_args(words)
    return merge_arguments(vars(values), overrides)


class _KeyValue(str):
    """An argument that is split at its first "=": paths and texts may have others."""

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = 1) -> list[str]:
        return super().split(sep, maxsplit)
