"""Ready-made configs for tests that run a recipe in their own process, without `tune`'s seconds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from steerlm2.config.loader import load_config
from steerlm2.runs.entry import CONFIG_CLASS
from steerlm2.torchtune_private import merge_arguments

ROOT = Path(__file__).resolve().parents[2]


def recipe_config(recipe: str, config: str, *overrides: str) -> Any:
    """What `tune run recipe --config config key=value ...` hands to the recipe."""
    file = ROOT / "recipe_configs" / f"{config}.yaml"
    plain = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    values = merge_arguments(cast(dict[str, Any], plain), overrides)
    config_class = getattr(importlib.import_module(recipe).main, CONFIG_CLASS)
    return load_config(config_class, values)
