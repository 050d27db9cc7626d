"""Ready-made configs for tests that run a recipe in their own process, without `tune`'s seconds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from steerlm2.config.loader import load_config
from steerlm2.runs.entry import CONFIG_CLASS

ROOT = Path(__file__).resolve().parents[2]


def recipe_config(recipe: str, config: str, *overrides: str) -> Any:
    """What `tune run recipe --config config key=value ...` hands to the recipe."""
    values = OmegaConf.merge(
        OmegaConf.load(ROOT / "recipe_configs" / f"{config}.yaml"),
        OmegaConf.from_dotlist(list(overrides)),
    )
    config_class = getattr(importlib.import_module(recipe).main, CONFIG_CLASS)
    return load_config(config_class, cast(DictConfig, values))
