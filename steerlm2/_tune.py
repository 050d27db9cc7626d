"""Registers steerlm2's recipes with torchtune's `tune`.

Every install puts `_tune.pth` into site-packages, as steerlm2_tune.pth. Its one line of code runs
whenever an interpreter starts, so it imports nothing: it only puts a finder into sys.meta_path.
When, and only when, torchtune's registry of recipes is imported, that calls `find_registry`.
"""

import os
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

# Recipe NAME is the file recipes/NAME.py, config NAME is recipe_configs/NAME.yaml.
RECIPES: dict[str, list[str]] = {
    "steerlm2_pipeline": [
        "tiny/quickstart",
        "tiny/oasst_pipeline",
        "llama3_1/70B_pipeline",
    ],
    "prepare_data": [
        "data/oasst",
        "data/helpsteer",
        "data/helpsteer2",
        "data/helpsteer3",
        "data/oasst_helpsteer",
        "data/conversations",
        "data/oasst_groups",
        "data/best_of",
        "data/grammar",
        "data/grammar_prompts",
    ],
    "reward_distributed": [
        "tiny/reward",
        "llama3_1/8B_reward",
        "llama2/13B_reward",
        "llama3/70B_reward_multinode",
        "llama3_1/70B_reward_helpfulness_multinode",
        "llama3_1/70B_reward_scaled_bt_multinode",
    ],
    "annotate_attributes": [
        "tiny/annotate_attributes",
        "llama3_1/8B_annotate_attributes",
        "llama3/70B_annotate_attributes_multinode",
    ],
    "serve_reward": [
        "tiny/serve_reward",
        "llama3_1/8B_serve_reward",
    ],
    "sample_responses": [
        "tiny/sample_responses",
        "llama3_1/8B_sample_responses",
        "llama3_1/70B_sample_responses_vllm",
    ],
    "evaluate_steering": [
        "tiny/evaluate_steering",
        "llama3_1/8B_evaluate_steering",
    ],
    "score_responses": [
        "tiny/score_responses",
        "llama3_1/8B_score_responses",
        "llama3_1/70B_score_responses_multinode",
    ],
    "sft_distributed": [
        "tiny/sft",
        "tiny/acsft",
        "llama3_1/8B_acsft",
        "llama3_1/8B_acsft_lora",
        "llama3/70B_sft_multinode",
        "llama3/70B_acsft_multinode",
        "llama2/70B_acsft_multinode",
    ],
    "steerlm2_distributed": [
        "tiny/steerlm2",
        "llama3_1/8B_steerlm2",
        "llama3_1/8B_steerlm2_lora",
        "llama3_1/70B_steerlm2_qlora",
        "llama3_1/70B_steerlm2_multinode",
        "llama3_3/70B_steerlm2_multinode",
        "llama2/70B_steerlm2_multinode",
    ],
    "plan_memory": [],  # takes the configs of the three training recipes
}
# `tune run` refuses torchrun's arguments for these.
SINGLE_PROCESS_RECIPES = {"prepare_data", "serve_reward", "steerlm2_pipeline", "plan_memory"}


def recipe_directories() -> tuple[Path, Path]:
    """Return the absolute folders of the recipes and of their configs.

    A wheel carries them inside the package, since torchtune's wheel owns the import name `recipes`;
    in an editable install they lie next to the package, as in the repository.
    """
    package = Path(__file__).resolve().parent
    if (package / "_recipes").is_dir():
        return package / "_recipes", package / "_recipe_configs"
    return package.parent / "recipes", package.parent / "recipe_configs"


def add_recipes(registry: ModuleType) -> None:
    """Append `RECIPES` to torchtune's `registry` module.

    `tune` joins an entry's path to its own folder, which an absolute path overrides. A registry
    that differs from torchtune 0.6.1's stays unchanged, with a warning: `tune` must go on working.
    """
    recipes, configs = recipe_directories()
    try:
        entries = [
            registry.Recipe(
                name=recipe,
                file_path=str(recipes / f"{recipe}.py"),
                configs=[
                    registry.Config(name=config, file_path=str(configs / f"{config}.yaml"))
                    for config in config_names
                ],
                supports_distributed=recipe not in SINGLE_PROCESS_RECIPES,
            )
            for recipe, config_names in RECIPES.items()
        ]
        registry._ALL_RECIPES.extend(entries)
    except (AttributeError, TypeError) as error:
        warnings.warn(
            f"`tune` can't list steerlm2's recipes: its registry isn't that of 0.6.1 ({error})."
            " Install torchtune==0.6.1.",
            stacklevel=2,
        )


class _RegistryLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        add_recipes(module)


def find_registry(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Find torchtune's registry `name` on its package's `path`; loading it will add our recipes.

    With STEERLM2_NO_TUNE set (to anything but 0) the answer is None: Python imports it unchanged.
    """
    if os.environ.get("STEERLM2_NO_TUNE", "0") not in ("", "0"):
        return None
    spec = PathFinder.find_spec(name, path)
    if spec is not None and isinstance(spec.loader, SourceFileLoader):
        spec.loader = _RegistryLoader(spec.loader.name, spec.loader.path)
    return spec
