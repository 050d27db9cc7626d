"""A config is checked whole: every problem is named, with the fix, before anything is built."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_config import GOOD, TEMPLATE, Config, Inner
from omegaconf import OmegaConf

from steerlm2.config.loader import (
    Component,
    as_yaml,
    instantiate,
    load_config,
    load_recipe,
    to_plain,
)

ANY = "torchtune.training.metric_logging.WandBLogger"
"""Takes any arguments."""
SCHEDULE = "steerlm2.training.warmup_cosine_hold"


def load(**values: Any) -> Config:
    return load_config(Config, GOOD | values)


def problems_of(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ValueError, match="the config has problems") as error:
        load_config(Config, values)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def problems_with(**values: Any) -> list[str]:
    return problems_of(GOOD | values)


def test_defaults_fill_what_is_left_out() -> None:
    assert load() == Config("out", Component(_component_=TEMPLATE))


def test_given_values_are_used() -> None:
    config = load(lr=2, steps=3, prompts=["a"], steerlm2={"strategy": "two_pass"})
    assert (config.lr, config.steps, config.prompts) == (2.0, 3, ["a"])
    assert config.steerlm2 == Inner(strategy="two_pass")


def test_sections_under_free_names_are_built_and_checked() -> None:
    config = load(named={"a": {"max_tokens": 7}, "b": {}})
    assert config.named == {"a": Inner(max_tokens=7), "b": Inner()}
    assert to_plain(config)["named"]["a"]["max_tokens"] == 7
    assert problems_with(named={"a": {"max_tokns": 7}, "b": 3}) == [
        "unknown key 'named.a.max_tokns' (did you mean 'max_tokens'?)",
        "'named.b' must be a mapping of keys, got 3",
    ]


def test_an_optional_section_is_built_where_given() -> None:
    assert load(validation={"max_tokens": 7}).validation == Inner(max_tokens=7)


def test_null_is_none_where_none_is_allowed() -> None:
    assert load(validation=None, lr=None).validation is None


def test_an_unknown_key_names_the_nearest() -> None:
    assert problems_with(step=3) == ["unknown key 'step' (did you mean 'steps'?)"]


def test_a_key_of_a_section_is_told_its_place() -> None:
    assert problems_with(strategy="auto") == [
        "unknown key 'strategy' (did you mean 'steerlm2.strategy'?)"
    ]


def test_an_unknown_key_in_a_section_is_named_with_its_place() -> None:
    assert problems_with(steerlm2={"strateggy": "auto"}) == [
        "unknown key 'steerlm2.strateggy' (did you mean 'strategy'?)"
    ]


def test_an_unknown_key_without_a_near_one_lists_the_known() -> None:
    assert problems_with(steerlm2={"zzz": 1}) == [
        "unknown key 'steerlm2.zzz' (known keys: max_tokens, strategy, tolerance)"
    ]


def test_an_unknown_argument_of_a_component_names_the_nearest() -> None:
    model = {"_component_": TEMPLATE, "control_token": {}}
    assert problems_with(model=model) == [
        "unknown key 'model.control_token' (did you mean 'control_tokens'?);"
        " ~model.control_token on the command line removes it"
    ]


def test_a_dotpath_alone_is_a_component() -> None:
    """`model=DOTPATH` on the command line, as in torchtune."""
    assert load(model=TEMPLATE) == load()


def test_a_component_that_takes_any_argument_is_not_checked_for_names() -> None:
    config = load(model={"_component_": "argparse.Namespace", "anything": 1})
    assert config.model["anything"] == 1


def test_a_missing_key_says_how_to_give_it() -> None:
    assert problems_of({"model": GOOD["model"]}) == [
        "'output_dir' is missing: add output_dir=... to the command line"
    ]


def test_question_marks_are_a_missing_key() -> None:
    """`output_dir: ???` marks what every user must set."""
    assert problems_with(output_dir="???") == [
        "'output_dir' is missing: add output_dir=... to the command line"
    ]


def test_question_marks_are_missing_in_a_section_too() -> None:
    assert problems_with(steerlm2={"max_tokens": "???"}) == [
        "'steerlm2.max_tokens' is missing: add steerlm2.max_tokens=... to the command line"
    ]


def test_question_marks_are_missing_in_a_component_too() -> None:
    """`checkpoint_dir: ???` must not be taken for a folder of that name."""
    (problem,) = problems_with(model={"_component_": TEMPLATE, "control_tokens": "???"})
    assert "'model.control_tokens' is missing" in problem


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("steps", "many", "'steps' must be a whole number, got 'many'"),
        ("steps", 2.5, "'steps' must be a whole number, got 2.5"),
        ("steps", True, "'steps' must be a whole number, got True"),
        ("lr", "high", "'lr' must be a number, got 'high'"),
        ("lr", True, "'lr' must be a number, got True"),
        ("lr", [1], "'lr' must be a number, got [1]"),
        ("compile", "yes", "'compile' must be true or false, got 'yes'"),
        ("compile", 1, "'compile' must be true or false, got 1"),
        ("compile", None, "'compile' must be true or false, got None"),
        ("output_dir", 5, "'output_dir' must be text, got 5"),
        ("prompts", "Hello?", "'prompts' must be a list, got 'Hello?'"),
        ("prompts", ["a", 5], "'prompts[1]' must be text, got 5"),
        ("steerlm2", 5, "'steerlm2' must be a mapping of keys, got 5"),
        ("steerlm2", None, "'steerlm2' must be a mapping of keys, got None"),
        ("model", 5, "'model' must be a mapping of keys, got 5"),
        (
            "validation",
            {"max_tokens": "x"},
            "'validation.max_tokens' must be a whole number, got 'x'",
        ),
        (
            "steerlm2",
            {"strategy": "fast"},
            "'steerlm2.strategy' must be one of auto, two_pass, got 'fast'",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_named(key: str, value: Any, problem: str) -> None:
    assert problems_with(**{key: value}) == [problem]


@pytest.mark.parametrize(("text", "value"), [("1e-7", 1e-7), ("2E-6", 2e-6), ("3", 3.0)])
def test_numbers_that_yaml_takes_for_text_are_numbers(text: str, value: float) -> None:
    """YAML 1.1 wants 1.0e-7; people write 1e-7."""
    assert load(lr=text).lr == value


def test_a_whole_number_is_a_number() -> None:
    assert isinstance(load(lr=1).lr, float)


def test_all_problems_are_reported_at_once() -> None:
    problems = problems_of(
        {
            "model": {"_component_": "torch.nothing"},
            "stepps": 1,
            "lr": "x",
            "steerlm2": {"strategy": "fast", "tolerence": 1},
        }
    )
    named = ["stepps", "output_dir", "model._component_", "lr", "steerlm2.strategy", "tolerence"]
    assert len(problems) == len(named)
    assert all(any(name in problem for problem in problems) for name in named)


def test_problems_come_in_the_same_order_every_time() -> None:
    """Unknown keys as they stand in the file (a set of names has another order in every run)."""
    wrong = {f"unknown_{letter}": 1 for letter in "qwertyuiop"}
    assert [problem.split("'")[1] for problem in problems_with(**wrong)] == list(wrong)


def test_problems_between_keys_are_asked_for() -> None:
    assert problems_with(steps=5) == ["'steps' and 'lr' go together"]


def test_problems_between_keys_wait_until_each_is_right() -> None:
    assert problems_with(steps=5, compile=3) == ["'compile' must be true or false, got 3"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("steerlm2.nothing.builder", "No module named 'steerlm2.nothing'"),
        ("steerlm2.losses.builder", "has no attribute 'builder'"),
        ("nodots", "Empty module name"),
        ("steerlm2.losses.DISTANCE_EPS", "steerlm2.losses.DISTANCE_EPS is not callable"),
    ],
)
def test_a_component_that_cannot_be_imported_is_named(path: str, reason: str) -> None:
    (problem,) = problems_with(model={"_component_": path})
    assert problem.startswith("'model._component_': ")
    assert path in problem
    assert reason in problem


@pytest.mark.parametrize("component", [{}, {"name": "x"}, {"_component_": 5}])
def test_a_section_without_a_component_says_what_it_needs(component: dict[str, Any]) -> None:
    assert problems_with(model=component) == [
        "'model' needs 'model._component_' (the dotpath of what to build)"
    ]


def test_components_are_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copied recipe's own builder beside it, as torchtune allows."""
    (tmp_path / "my_builders.py").write_text("def build(size):\n    return [0] * size\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert instantiate({"_component_": "my_builders.build", "size": 3}) == [0, 0, 0]


def test_interpolations_are_resolved() -> None:
    config = load_config(Config, OmegaConf.create(GOOD | {"prompts": ["in ${output_dir}"]}))
    assert config.prompts == ["in out"]


def test_a_broken_interpolation_is_named() -> None:
    with pytest.raises(ValueError, match=r"broken interpolation: .*outputdir"):
        load_config(Config, OmegaConf.create(GOOD | {"prompts": ["${outputdir}"]}))


def test_keys_that_others_refer_to_are_missing_under_their_own_names() -> None:
    values = GOOD | {"output_dir": "???", "prompts": ["${output_dir}"]}
    with pytest.raises(ValueError, match=r"has problems:\n  - 'output_dir' is missing: [^\n]*$"):
        load_config(Config, OmegaConf.create(values))


def test_instantiate_joins_the_configs_and_the_callers_arguments() -> None:
    """fractions.Fraction(numerator, denominator)"""
    component = {"_component_": "fractions.Fraction", "denominator": 4}
    assert instantiate(component, 3) == 0.75


def test_instantiate_leaves_the_component_as_it_is() -> None:
    component = Component(_component_="fractions.Fraction", denominator=4)
    instantiate(component, 3)
    assert component == {"_component_": "fractions.Fraction", "denominator": 4}


def test_callers_keyword_arguments_go_first() -> None:
    component = {"_component_": "argparse.Namespace", "lr": 1}
    assert instantiate(component, lr=2).lr == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_training_steps": 3, "steps": 5}, "got an unexpected keyword argument 'steps'"),
        ({}, "missing a required argument: 'num_training_steps'"),
    ],
)
def test_arguments_that_do_not_fit_are_a_users_mistake(
    arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^{SCHEDULE}: {reason}"):
        instantiate({"_component_": SCHEDULE} | arguments, object())


def test_type_errors_inside_a_component_are_no_signature_errors() -> None:
    """They are bugs: a traceback must show where."""
    with pytest.raises(TypeError):
        instantiate({"_component_": "math.sqrt"}, "text")


def test_yaml_of_a_config_is_that_config() -> None:
    """With all defaults filled in; YAML 1.1 reads 1e-7 as text, so it is written as 1.0e-07."""
    config = load(lr=1e-7, prompts=["Grüße?"], validation={"max_tokens": 3})
    assert load_config(Config, yaml.safe_load(as_yaml(config))) == config


SCRIPT = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Literal as OneOf
from steerlm2.config.keys import LabelOptions

@dataclass
class Part:
    size: OneOf["small", "large"] = "small"

@dataclass
class Mine(LabelOptions):
    part: Part = field(default_factory=Part)

    def problems(self) -> list[str]:
        return []
"""
"""As a user's own recipe: LabelOptions' annotations use Literal, which isn't imported here."""


def test_classes_of_a_script_are_looked_up_there_and_inherited_ones_in_their_module() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(SCRIPT, namespace)
    values = {"kind": "uniform", "part": {"size": "large"}}
    config = load_config(namespace["Mine"], values, namespace)
    assert (config.kind, config.part.size) == ("uniform", "large")
    with pytest.raises(ValueError, match=r"'part\.size' must be one of small, large") as error:
        load_config(namespace["Mine"], {"kind": "any", "part": {"size": "any"}}, namespace)
    assert "'kind' must be one of record, fixed," in str(error.value)


def test_classes_of_a_recipe_loaded_from_its_file_are_looked_up_there(tmp_path: Path) -> None:
    file = tmp_path / "my_recipe.py"
    file.write_text(SCRIPT)
    recipe = load_recipe(file)
    assert load_config(recipe.Mine, {"part": {"size": "large"}}).part.size == "large"
    assert load_recipe(file) is recipe


def test_recipes_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    files = [tmp_path / folder / "my_recipe.py" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text(f"folder = {file.parent.name!r}")
    assert [load_recipe(file).folder for file in files] == ["a", "b"]


def test_a_recipe_that_fails_to_load_is_loaded_anew(tmp_path: Path) -> None:
    file = tmp_path / "my_recipe.py"
    file.write_text("done = False\nraise KeyError")
    with pytest.raises(KeyError):
        load_recipe(file)
    file.write_text("done = True")
    assert load_recipe(file).done


def test_plain_configs_hold_nothing_but_plain_values() -> None:
    plain = to_plain(load(validation={}))
    assert type(plain["model"]) is dict
    assert plain["validation"] == {"strategy": "auto", "max_tokens": 4096, "tolerance": 0.05}


def test_paths_in_the_home_folder_are_written_out_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of keys, of components' arguments, however deep; prompts and other lists of texts stay."""
    monkeypatch.setenv("HOME", "/home/me")
    given = {"_component_": ANY, "path": "~/base", "files": {"a": ["~/b", "a~/c"]}}
    config = load(output_dir="~/runs/a", model=given, prompts=["~/x?"])
    assert config.output_dir == "/home/me/runs/a"
    assert config.model == given | {
        "path": "/home/me/base",
        "files": {"a": ["/home/me/b", "a~/c"]},
    }
    assert config.prompts == ["~/x?"]


@dataclass
class Seeded:
    seed: int = 0
    dataset: Component | None = None


@pytest.mark.parametrize("seed", [0, 20261127120000, 2**63 - 1])
def test_seeds_that_every_generator_takes(seed: int) -> None:
    dataset = {"_component_": ANY, "seed": seed}
    assert load_config(Seeded, {"seed": seed, "dataset": dataset}).seed == seed


def test_seeds_that_no_generator_takes_are_named_at_once() -> None:
    """-1 would draw what 1 draws in Python's generator, 2^63 overflows in torch's."""
    dataset = {"_component_": ANY, "seed": 1.5}
    with pytest.raises(ValueError, match="the config has problems") as error:
        load_config(Seeded, {"seed": 2**63, "dataset": dataset})
    assert str(error.value).splitlines()[1:] == [
        "  - 'seed' must be a whole number from 0 to 2**63 - 1, got 9223372036854775808",
        "  - 'dataset.seed' must be a whole number from 0 to 2**63 - 1, got 1.5",
    ]
    with pytest.raises(ValueError, match=r"'seed' must be a whole number from 0 .*, got -1"):
        load_config(Seeded, {"seed": -1})
