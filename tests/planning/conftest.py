"""Jobs of small models, as their recipes would have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ready_made import recipe_config
from steerlm2._tune import RECIPES
from steerlm2.planning.jobs import JOBS, Job

RECIPE_OF = {config: recipe for recipe, configs in RECIPES.items() for config in configs}

MakeJob = Callable[..., Job[Any]]


@pytest.fixture(scope="session")
def make_job() -> MakeJob:
    """`make_job("tiny/sft", "dtype=bf16")`: the job of a ready-made config with overrides."""

    def make(config: str, *overrides: str) -> Job[Any]:
        recipe = RECIPE_OF[config]
        return JOBS[recipe](recipe_config(recipe, config, *overrides))

    return make
