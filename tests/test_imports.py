"""Imports point downwards, and importing the package costs nothing."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "steerlm2"

FROM_THE_GROUND_UP = (
    (
        "_tune",
        "torchtune_private",
        "attributes",
        "losses",
        "files",
        "masking",
        "escaping",
        "checkpoint_dirs",
        "facts",
        "page_templates",
    ),
    ("models",),
    ("data",),
    ("datasets",),
    ("config",),
    ("distributed",),
    ("checkpoints",),
    ("runs",),
    ("training",),
    ("evaluation",),
    ("inference",),
    ("serving",),
    ("planning",),
    ("pipeline",),
)
"""A module imports from its own part of the package and from parts that stand above it here; and
within the first level as follows."""

LEVELS = {part: level for level, parts in enumerate(FROM_THE_GROUND_UP) for part in parts}
WITHIN_A_LEVEL = {
    ("losses", "attributes"),
    ("facts", "attributes"),
    ("facts", "checkpoint_dirs"),
    ("checkpoint_dirs", "files"),
    ("checkpoint_dirs", "escaping"),
    ("escaping", "masking"),
    ("page_templates", "escaping"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
RECIPES = sorted((REPOSITORY / "recipes").glob("*.py"))


@functools.cache
def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & SOURCES.keys()
            found |= modules or {node.module}
    return found


def part(module: str) -> str:
    """losses of steerlm2.losses, data of steerlm2.data.records."""
    return module.split(".")[1]


def test_every_part_of_the_package_has_its_level() -> None:
    parts = {part(module) for module in SOURCES if module.count(".")}
    assert parts == LEVELS.keys()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downwards(module: str) -> None:
    ours = {name for name in imported_modules(SOURCES[module]) if name.startswith("steerlm2.")}
    if module == "steerlm2":
        assert ours == set()
        return
    others = {part(name) for name in ours} - {part(module)}
    upwards = {
        name
        for name in others
        if LEVELS[name] >= LEVELS[part(module)] and (part(module), name) not in WITHIN_A_LEVEL
    }
    assert upwards == set()


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: imported_modules(path) & SOURCES.keys() for module, path in SOURCES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", [*SOURCES.values(), *RECIPES], ids=lambda path: path.stem)
def test_nothing_imports_a_recipe(path: Path) -> None:
    """A recipe is copied and edited: what two of them need belongs into the library."""
    names = {recipe.stem for recipe in RECIPES} | {"recipes"}
    assert {name.split(".")[0] for name in imported_modules(path)} & names == set()


def private_torchtune_names(path: Path) -> set[str]:
    """What a file imports from torchtune that is private, or in a private module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("torchtune.") and "._" in name}


def test_private_names_of_torchtune_are_imported_in_one_place() -> None:
    importing = {path for path in [*SOURCES.values(), *RECIPES] if private_torchtune_names(path)}
    assert importing == {PACKAGE / "torchtune_private.py"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_recipe_hides_a_module(path: Path) -> None:
    """A script's folder comes first on sys.path: recipes/datasets.py would hide `datasets`."""
    assert path.stem not in sys.stdlib_module_names
    third_party = {name.split(".")[0] for p in SOURCES.values() for name in imported_modules(p)}
    assert path.stem not in third_party | {"datasets", "tokenizers", "wandb"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    """In a fresh interpreter, with the package's start-up hook as it is installed."""
    code = "import sys, steerlm2; print(sorted({m.split('.')[0] for m in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(result.stdout))
    assert "steerlm2" in loaded
    assert loaded & {"torch", "torchtune", "numpy", "scipy", "transformers", "omegaconf"} == set()
