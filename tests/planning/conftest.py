"""Jobs of small models, as their recipes would have them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from omegaconf import DictConfig, OmegaConf

from steerlm2._tune import RECIPES
from steerlm2.planning.jobs import JOBS, Job
from steerlm2.training.config import CONFIG_CLASS, load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPE_OF = {config: recipe for recipe, configs in RECIPES.items() for config in configs}

MakeJob = Callable[..., Job[Any]]


def recipe_module(recipe: str) -> ModuleType:
    name = f"recipe_planned_{recipe}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{recipe}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def make_job() -> MakeJob:
    """`make_job("tiny/sft", "dtype=bf16")`: the job of a ready-made config with overrides."""

    def make(config: str, *overrides: str) -> Job[Any]:
        values = OmegaConf.merge(
            OmegaConf.load(ROOT / "recipe_configs" / f"{config}.yaml"),
            OmegaConf.from_dotlist(list(overrides)),
        )
        recipe = RECIPE_OF[config]
        config_class = getattr(recipe_module(recipe).main, CONFIG_CLASS)
        return JOBS[recipe](load_config(config_class, cast(DictConfig, values)))

    return make
