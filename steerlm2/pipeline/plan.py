"""The plan of a pipeline: its stages in order, each a `tune run` command with its own folder.

Overrides of a stage may have placeholders, which `plan_stages` fills in:

    {here}         the stage's own folder
    {NAME}         the folder of stage NAME; inside the loop and after it, the latest iteration's
    {proposal}     the folder of the model to sample from: the latest before this stage
    {iteration}    in the loop: 1, 2, ...
    {stage}        the stage's name, with its iteration
    {output_dir}   the pipeline's
    {checkpoint}   in `launch`: the stage's own checkpointer.checkpoint_dir

After the loop, an override whose key has {iteration} in it is given once for each iteration.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torchtune
import yaml
from omegaconf import DictConfig, OmegaConf

from steerlm2._tune import RECIPES
from steerlm2.torchtune_private import Recipe, get_all_recipes

PLACEHOLDER = re.compile(r"\{(\w+)\}")
_REPLACED = ("schema", "_label")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_PLAIN_KEY = re.compile(r"[\w.{}<>|/-]+")
TORCHTUNE = Path(torchtune.__file__).parents[1]
"""The folder that the paths of torchtune's registry are relative to; ours are absolute."""

RESERVED_NAMES = {"here", "proposal", "iteration", "output_dir", "stage", "checkpoint"}

CHECKPOINT_DIR = "checkpointer.checkpoint_dir"


@dataclass(kw_only=True)
class StageOptions:
    """One entry of the `stages:` section."""

    recipe: str
    """Name or file of the recipe."""
    config: str
    """Name or file of its config."""
    use: list[dict[str, Any]] = field(default_factory=list)
    """Overrides that stages share, as ${NAME} of the pipeline's; `overrides` wins over them."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values of the config that are set otherwise, nested or dotted; {PLACE}s are filled in."""
    remove: list[str] = field(default_factory=list)
    """Keys of the config that don't apply."""
    each_iteration: bool = False
    """Run it in every iteration; such stages stand one after the other."""
    when: bool | None = None
    """false: it is left out."""
    torchrun: str | None = None
    """Arguments of torchrun; null: the pipeline's, where the recipe runs on several processes."""
    launch: str | None = None
    """What stands before `tune run`; null: the pipeline's, where there are torchrun arguments."""


@dataclass(frozen=True)
class Stage:
    """One command of the plan."""

    name: str
    folder: Path
    recipe: str
    config: str
    arguments: tuple[str, ...]
    """The recipe's arguments: key=value and ~key."""
    needs: tuple[str, ...]
    """Names of the stages whose folders it reads."""
    command: str
    """The whole command, for a shell."""


def plan_stages(
    options: Mapping[str, StageOptions],
    *,
    output_dir: str,
    iterations: int,
    proposal: Sequence[str] = (),
    torchrun: str = "",
    launch: str = "",
) -> list[Stage]:
    """The stages in the order of `options`; those with `each_iteration` are a loop.

    Args:
        output_dir: of the pipeline: stage NAME gets the folder output_dir/NAME, and in iteration k
            of the loop output_dir/NAME_iterk.
        iterations: of the loop.
        proposal: stages that train a model to sample from.
        torchrun: arguments for recipes that can run on several processes.
        launch: put before `tune run` in commands that have torchrun arguments.

    Raises:
        ValueError: naming all problems.
    """
    chosen = {name: stage for name, stage in options.items() if stage.when is not False}
    problems = list(_order_problems(chosen))
    if problems:
        raise ValueError("the stages have problems:\n  - " + "\n  - ".join(problems))

    planned: list[Stage] = []
    latest: dict[str, Stage] = {}  # the latest stage of each name
    of_iteration: dict[int, dict[str, Stage]] = {}

    def add(name: str, iteration: int | None) -> None:
        own = options[name]
        full_name = name if iteration is None else f"{name}_iter{iteration}"
        filler = _Filler(full_name, output_dir, iteration, latest)
        arguments = [f"~{key}" for key in own.remove]
        overrides: dict[str, Any] = {}
        for values in (*own.use, own.overrides):
            overrides |= dict(_flat(values))
        for key, value in overrides.items():
            if "{iteration}" in key and iteration is None and (of_iteration or not iterations):
                for k, stages in of_iteration.items():
                    once = _Filler(full_name, output_dir, k, stages)
                    arguments.append(f"{once.fill(key)}={once.argument(value)}")
                    filler.needs += once.needs
                    filler.problems += once.problems
            else:
                arguments.append(f"{filler.fill(key)}={filler.argument(value)}")
        if CHECKPOINT_DIR in overrides:
            filler.own["checkpoint"] = filler.fill(str(overrides[CHECKPOINT_DIR]))
        start = filler.fill(_start(own, torchrun, launch), quoted=True)
        problems.extend(filler.problems)
        problems.extend(_unquoted(full_name, overrides, {"here", "proposal"} | options.keys()))
        problems.extend(
            f"'{full_name}': {argument} has more than one '=', which torchtune's recipes refuse"
            for argument in arguments
            if argument.count("=") > 1 and find_recipe(own.recipe) and own.recipe not in RECIPES
        )
        words = [own.recipe, "--config", own.config, *arguments]
        stage = Stage(
            full_name,
            Path(output_dir) / full_name,
            own.recipe,
            own.config,
            tuple(arguments),
            tuple(dict.fromkeys(filler.needs)),
            f"{start} {shlex.join(words)}",
        )
        planned.append(stage)
        latest[name] = stage
        if name in proposal:
            latest["proposal"] = stage

    loop = [name for name, stage in chosen.items() if stage.each_iteration]
    names = list(chosen)
    first, end = (names.index(loop[0]), names.index(loop[-1]) + 1) if loop else (len(names),) * 2
    for name in names[:first]:
        add(name, None)
    for k in range(1, iterations + 1):
        for name in loop:
            add(name, k)
        of_iteration[k] = dict(latest)
    for name in names[end:]:
        add(name, None)
    if problems:
        raise ValueError("the stages have problems:\n  - " + "\n  - ".join(problems))
    return planned


def select(
    plan: Sequence[Stage], only: str | Sequence[str] | None, first: str | None
) -> list[Stage]:
    """The stages of the names `only`, or those from `first` on.

    A name without an iteration stands for all iterations.

    Raises:
        ValueError: for a name that no stage has.
    """
    wanted = [only] if isinstance(only, str) else list(only or [])
    known = {stage.name for stage in plan} | {_base(stage.name) for stage in plan}
    if unknown := [name for name in [*wanted, *([first] if first else [])] if name not in known]:
        raise ValueError(
            f"there is no stage {', '.join(unknown)}; the plan has "
            f"{', '.join(stage.name for stage in plan)}"
        )
    if first is not None:
        start = next(i for i, s in enumerate(plan) if first in (s.name, _base(s.name)))
        plan = plan[start:]
    if wanted:
        plan = [s for s in plan if s.name in wanted or _base(s.name) in wanted]
    return list(plan)


def find_recipe(name: str) -> Recipe | None:
    """The recipe of a name in `tune`'s registry; None for a path."""
    return next((recipe for recipe in get_all_recipes() if recipe.name == name), None)


def config_file(recipe: str, config: str) -> Path:
    """The YAML file that `tune run RECIPE --config CONFIG` would take."""
    own = find_recipe(recipe)
    for known in [*([own] if own else []), *get_all_recipes()]:
        for entry in known.configs:
            if entry.name == config:
                return TORCHTUNE / "recipes" / "configs" / entry.file_path
    return Path(config)


def extended(values: DictConfig, recipe: str) -> DictConfig:
    """A parsed config together with the one that its key `extends` names.

    Mappings are merged, but a schema or a label replaces the other one's.

    Raises:
        ValueError: where configs extend each other.
        FileNotFoundError: where there is no config of that name.
    """
    chain = [values]
    names: list[str] = []
    while name := chain[-1].get("extends"):
        if name in names:
            raise ValueError(f"configs extend each other: {' -> '.join([*names, name])}")
        names.append(name)
        file = config_file(recipe, name)
        if not file.is_file():
            raise FileNotFoundError(f"'extends': there is no config {name} (`tune ls` lists them)")
        chain.append(cast(DictConfig, OmegaConf.load(file)))
    given: set[str] = set()
    for each in chain:
        own = [str(key) for key in each if str(key).endswith(_REPLACED)]
        for key in given.intersection(own):
            del each[key]
        given |= set(own)
    return cast(DictConfig, OmegaConf.merge(*reversed(chain)))


def unused_values(config: DictConfig, known: Collection[str]) -> list[str]:
    """Which of a config's values for its stages, as ${KEY} or ${names.NAME}, stand nowhere in it.

    Args:
        known: keys that mean something by themselves.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    texts = list(_texts(plain))
    referred = {match[1] for text in texts for match in _REFERENCE.finditer(text)}
    values = [key for key in map(str, plain) if key not in known]
    values += [f"names.{name}" for name in plain.get("names") or {}]
    unused = [
        key
        for key in values
        if not any(f"{own}.".startswith(f"{key}.") or own == "names" for own in referred)
    ]
    return [
        f"no stage uses '{key}'" + _nearest(key, [*known, *(v for v in values if v not in unused)])
        for key in unused
    ]


def _nearest(key: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
    return f": did you mean '{found[0]}'?" if found else ": correct its name, or remove it"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def recipe_file(name: str) -> Path:
    """The Python file of a recipe, by its name or path."""
    recipe = find_recipe(name)
    if recipe is None:
        return Path(name).with_suffix(".py")
    return TORCHTUNE / "recipes" / recipe.file_path


def _base(name: str) -> str:
    return re.sub(r"_iter\d+$", "", name)


def _start(stage: StageOptions, torchrun: str, launch: str) -> str:
    """The command up to the recipe."""
    recipe = find_recipe(stage.recipe)
    can = recipe is None or recipe.supports_distributed
    arguments = stage.torchrun if stage.torchrun is not None else torchrun if can else ""
    before = stage.launch if stage.launch is not None else launch if arguments else ""
    return " ".join(part for part in (before, "tune run", arguments) if part)


def _flat(overrides: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; empty mappings say nothing.

    A schema stays whole, since it replaces a config's own, and so do mappings with keys that a
    command line would read otherwise.
    """
    for key, value in overrides.items():
        if (
            isinstance(value, Mapping)
            and key != "schema"
            and all(_PLAIN_KEY.fullmatch(str(own)) for own in value)
        ):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _unquoted(name: str, overrides: Mapping[str, Any], known: Collection[str]) -> Iterator[str]:
    """Placeholders that YAML has read as mappings of one key, by the flat overrides of a stage."""
    for key, value in overrides.items():
        above, _, last = key.rpartition(".")
        alone = sum(other.startswith(f"{above}.") for other in overrides) == 1
        if above and alone and value is None and last in known:
            yield (
                f"'{name}': '{above}' is {{{last}}} without quotes, a mapping in YAML: write "
                f'{above}: "{{{last}}}", on the command line \'{above}="{{{last}}}"\''
            )


def _order_problems(chosen: Mapping[str, StageOptions]) -> Iterator[str]:
    if not chosen:
        yield "there are none"
    for name, stage in chosen.items():
        if not re.fullmatch(r"[a-z]\w*", name) or name in RESERVED_NAMES or _base(name) != name:
            yield (
                f"'{name}' can't be a stage's name: letters, digits and _, not ending in _iterN, "
                f"and none of {', '.join(sorted(RESERVED_NAMES))}"
            )
        recipe = find_recipe(stage.recipe)
        if stage.torchrun and recipe is not None and not recipe.supports_distributed:
            yield f"'{name}': {stage.recipe} runs in one process and can't have 'torchrun'"
    loop = [stage.each_iteration for stage in chosen.values()]
    if any(loop) and not all(loop[loop.index(True) : len(loop) - loop[::-1].index(True)]):
        yield "the stages with 'each_iteration' must follow each other"


class _Filler:
    """Fills in the placeholders of one stage's texts, and collects the stages that they name."""

    def __init__(
        self,
        name: str,
        output_dir: str,
        iteration: int | None,
        stages: Mapping[str, Stage],
    ) -> None:
        self.name = name
        self.stages = stages
        self.needs: list[str] = []
        self.problems: list[str] = []
        self.own = {
            "here": str(Path(output_dir) / name),
            "output_dir": output_dir,
            "stage": name,
        }
        if iteration is not None:
            self.own["iteration"] = str(iteration)

    def fill(self, text: str, *, quoted: bool = False) -> str:
        """A text with its placeholders filled in.

        Args:
            quoted: quote the values for a shell.
        """
        if quoted:
            return PLACEHOLDER.sub(lambda match: shlex.quote(self._value(match)), text)
        return PLACEHOLDER.sub(self._value, text)

    def argument(self, value: Any) -> str:
        """A YAML value as an argument: text, or JSON, which is YAML too."""
        if not isinstance(value, str):
            return self.fill(json.dumps(value))
        text = self.fill(value)
        try:
            same = yaml.safe_load(text) == text or value == "{iteration}"  # that is a number
            return text if same else json.dumps(text)
        except yaml.YAMLError:
            return json.dumps(text)

    def _value(self, match: re.Match[str]) -> str:
        name = match[1]
        if name in self.own:
            return self.own[name]
        if name in self.stages:
            self.needs.append(self.stages[name].name)
            return str(self.stages[name].folder)
        known = ", ".join(f"{{{key}}}" for key in [*self.own, *self.stages])
        self.problems.append(
            f"'{self.name}' has the unknown placeholder {match[0]}; it can be {known}"
        )
        return match[0]
