"""Commands that use what a pipeline has trained: a chat in the terminal, a server with a page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from steerlm2.checkpoint_dirs import newest_export
from steerlm2.facts import ModelFacts, read_facts
from steerlm2.pipeline.plan import Stage, config_file

USES = {"chat": "chat with the model", "serve_steerlm": "open its page"}
"""Recipe -> what it is for; of each there are the configs tiny/ and any/."""


def next_steps(plan: Sequence[Stage], values: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What for -> the command, for the last model that is steered by attributes; none without one.

    Where tiny/ names the pipeline's folders, its command is as short as can be.

    Args:
        values: of every stage of the plan.
    """
    found = [(stage, facts) for stage in plan if (facts := _facts(stage)) is not None]
    steered = [stage for stage, facts in found if facts.default_label is not None]
    scorers = [stage for stage, facts in found if facts.kind == "attribute model"]
    if not steered:
        return {}
    folders = {"checkpointer": steered[-1].folder}
    if scorers:
        folders["attribute_model.checkpointer"] = scorers[-1].folder
    overrides = [f"{key}.checkpoint_dir={folder}" for key, folder in folders.items()]
    own = values[steered[-1].name]
    overrides += [f"{key}={own[key]}" for key in ("device", "dtype") if key in own]
    return {
        use: shlex.join(_command(recipe, list(folders.values()), overrides))
        for recipe, use in USES.items()
    }


def _command(recipe: str, folders: Sequence[Path], overrides: Sequence[str]) -> list[str]:
    start = ["tune", "run", recipe, "--config"]
    tiny = cast(dict[str, Any], OmegaConf.load(config_file(recipe, f"tiny/{recipe}")))
    named = [tiny["checkpointer"], (tiny["attribute_model"] or {}).get("checkpointer")]
    theirs = [Path(section["checkpoint_dir"]) for section in named if section]
    if [folder.resolve() for folder in theirs] == [folder.resolve() for folder in folders]:
        return [*start, f"tiny/{recipe}"]
    return [*start, f"any/{recipe}", *overrides]


def _facts(stage: Stage) -> ModelFacts | None:
    """What a stage's export says of itself; None where it left none."""
    export = newest_export(stage.folder)
    return None if export is None else read_facts(export)
