"""Registers steerlm2's recipes with torchtune's `tune`.

Every install puts `_tune.pth` into site-packages, as steerlm2_tune.pth. Its one line of code runs
whenever an interpreter starts, so it imports nothing: it only puts a finder into sys.meta_path.
When, and only when, torchtune's registry of recipes is imported, that calls `find_registry`, which
then also looks out for `tune run`, so that `tune run RECIPE --help` reaches the recipe.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

# Recipe NAME is the file recipes/NAME.py, config NAME is recipe_configs/NAME.yaml.
RECIPES: dict[str, list[str]] = {
    "steerlm2_pipeline": [
        "tiny/quickstart",
        "tiny/oasst_pipeline",
        "pipeline",
        "llama3_2/1B_pipeline",
        "llama3_2/3B_pipeline",
        "llama3_1/8B_pipeline",
        "llama3_1/70B_pipeline",
    ],
    "prepare_data": [
        "data/oasst",
        "data/helpsteer",
        "data/helpsteer2",
        "data/helpsteer3",
        "data/oasst_helpsteer",
        "data/conversations",
        "data/chat",
        "data/ultrafeedback",
        "data/ultrafeedback_groups",
        "data/oasst_groups",
        "data/best_of",
        "data/grammar",
        "data/grammar_prompts",
    ],
    "reward_distributed": [
        "tiny/reward",
        "any/reward",
        "llama3_2/1B_reward",
        "llama3_2/3B_reward",
        "qwen2_5/7B_reward",
        "llama3_1/8B_reward",
        "llama2/13B_reward",
        "llama3/70B_reward_multinode",
        "llama3_1/70B_reward_helpfulness_multinode",
        "llama3_1/70B_reward_scaled_bt_multinode",
    ],
    "annotate_attributes": [
        "tiny/annotate_attributes",
        "any/annotate_attributes",
        "llama3_2/1B_annotate_attributes",
        "llama3_2/3B_annotate_attributes",
        "qwen2_5/7B_annotate_attributes",
        "llama3_1/8B_annotate_attributes",
        "llama3/70B_annotate_attributes_multinode",
    ],
    "serve_reward": [
        "tiny/serve_reward",
        "any/serve_reward",
        "llama3_1/8B_serve_reward",
    ],
    "serve_steerlm": [
        "tiny/serve_steerlm",
        "any/serve_steerlm",
        "llama3_1/8B_serve_steerlm",
    ],
    "chat": [
        "tiny/chat",
        "any/chat",
    ],
    "sample_responses": [
        "tiny/sample_responses",
        "any/sample_responses",
        "llama3_2/1B_sample_responses",
        "llama3_2/3B_sample_responses",
        "qwen2_5/7B_sample_responses",
        "llama3_1/8B_sample_responses",
        "llama3_1/70B_sample_responses_vllm",
    ],
    "evaluate_steering": [
        "tiny/evaluate_steering",
        "any/evaluate_steering",
        "llama3_2/1B_evaluate_steering",
        "llama3_2/3B_evaluate_steering",
        "qwen2_5/7B_evaluate_steering",
        "llama3_1/8B_evaluate_steering",
    ],
    "score_responses": [
        "tiny/score_responses",
        "any/score_responses",
        "llama3_2/1B_score_responses",
        "llama3_2/3B_score_responses",
        "qwen2_5/7B_score_responses",
        "llama3_1/8B_score_responses",
        "llama3_1/70B_score_responses_multinode",
    ],
    "sft_distributed": [
        "tiny/sft",
        "tiny/acsft",
        "any/sft",
        "any/acsft",
        "llama3_2/1B_acsft",
        "llama3_2/3B_acsft",
        "qwen2_5/7B_acsft",
        "llama3_1/8B_acsft",
        "llama3_1/8B_acsft_lora",
        "llama3/70B_sft_multinode",
        "llama3/70B_acsft_multinode",
        "llama2/70B_acsft_multinode",
    ],
    "steerlm2_distributed": [
        "tiny/steerlm2",
        "any/steerlm2",
        "llama3_2/1B_steerlm2",
        "llama3_2/3B_steerlm2",
        "qwen2_5/7B_steerlm2",
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
SINGLE_PROCESS_RECIPES = {
    *("prepare_data", "serve_reward", "serve_steerlm", "chat", "steerlm2_pipeline", "plan_memory")
}

INTERRUPTED = 130
"""Exit status of what Ctrl-C ended, as a shell has it."""


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


def adapt_run(cli_run: ModuleType) -> None:
    """What `tune run` does otherwise for our recipes; torchtune's own are left alone, and so is a
    `cli_run` module of another shape than that of 0.6.1.

    - `--help` reaches the recipe: torchtune asks for `--config` first, and goes on with an empty
      one. For recipes that aren't in the registry, too.
    - Ctrl-C ends it in one line while its imports last; from then on it sees to it itself.
    """
    try:
        run_command = cli_run.Run._run_cmd
        recipes = cli_run.get_all_recipes
    except AttributeError:
        return

    def adapted(self: Any, args: argparse.Namespace) -> None:
        theirs = {recipe.name for recipe in recipes()} - RECIPES.keys()
        asks = not {"-h", "--help"}.isdisjoint(args.recipe_args)
        if asks and "--config" not in args.recipe_args and args.recipe not in theirs:
            args.recipe_args += ["--config", ""]
        try:
            run_command(self, args)
        except KeyboardInterrupt:
            if args.recipe not in RECIPES:
                raise
            print("SIGINT: stopped", file=sys.stderr)
            sys.exit(INTERRUPTED)

    cli_run.Run._run_cmd = adapted


class _PatchingLoader(SourceFileLoader):
    """Loads a module and then calls `patch` on it."""

    def __init__(self, name: str, path: str, patch: Callable[[ModuleType], None]) -> None:
        super().__init__(name, path)
        self.patch = patch

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self.patch(module)


def _find_patched(
    name: str, path: Sequence[str] | None, patch: Callable[[ModuleType], None]
) -> ModuleSpec | None:
    spec = PathFinder.find_spec(name, path)
    if spec is not None and isinstance(spec.loader, SourceFileLoader):
        spec.loader = _PatchingLoader(spec.loader.name, spec.loader.path, patch)
    return spec


class _RunFinder:
    """In sys.meta_path: finds the module of `tune run`, which is imported after the registry."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchtune._cli.run":
            return None
        return _find_patched(name, path, adapt_run)


def find_registry(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Find torchtune's registry `name` on its package's `path`; loading it will add our recipes.

    With STEERLM2_NO_TUNE set (to anything but 0) the answer is None: Python imports it unchanged.
    """
    if os.environ.get("STEERLM2_NO_TUNE", "0") not in ("", "0"):
        return None
    if _RunFinder not in sys.meta_path:
        sys.meta_path.insert(0, _RunFinder)
    return _find_patched(name, path, add_recipes)
