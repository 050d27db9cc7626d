"""The versions that CI installs are those that pyproject.toml asks for, each of them pinned."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_constraints_are_one_choice_of_what_is_asked_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(text for extra in extras for text in extra)]
    lines = (REPOSITORY / ".ci" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in map(Requirement, asked):
        version = pins.get(canonicalize_name(requirement.name), "")
        if requirement.name != "pip":  # the environment's own
            assert requirement.specifier.contains(version), requirement
