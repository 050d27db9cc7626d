"""`tune run RECIPE --help`, and recipes of the user's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

Tune = Any
PREPARE_DATA = Path(__file__).resolve().parents[2] / "recipes" / "prepare_data.py"

OWN_KEYS = """
from steerlm2.config.keys import LabelOptions

@dataclass(kw_only=True)
class OwnConfig(PrepareDataConfig, LabelOptions):
    shout: bool = False
    \"\"\"Whether it is loud.\"\"\"

@recipe_main(OwnConfig)
"""
"""LabelOptions' annotations use Literal, a name that the copy doesn't have."""


@pytest.fixture
def own_recipe(tmp_path: Path) -> Path:
    """A copy of prepare_data, in another folder, whose config inherits a class of the library."""
    text = PREPARE_DATA.read_text().replace("Literal[", "typing.Literal[")
    text = text.replace(
        "from typing import Any, Literal, ", "import typing\nfrom typing import Any, "
    )
    assert text.count("@recipe_main(PrepareDataConfig)\n") == 1
    assert text.count("Literal") == text.count("typing.Literal[")
    own = tmp_path / "mine.py"
    own.write_text(text.replace("@recipe_main(PrepareDataConfig)\n", OWN_KEYS))
    return own


@pytest.mark.parametrize("nproc", [None, 2])
def test_help_of_a_ready_made_recipe(nproc: int | None, tune: Tune) -> None:
    result = tune("sft_distributed", "--help", nproc=nproc)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "usage: tune run [TORCHRUN-OPTIONS] sft_distributed --config CONFIG [KEY=VALUE ...]"
    )
    assert lines[2].startswith("Supervised fine-tuning, plain or attribute-conditioned:")
    assert "  data.shuffle: true or false; default true" in lines


def test_help_of_an_own_recipe(own_recipe: Path, tune: Tune) -> None:
    """Its own keys, those of the recipe it was copied from, and the library's, with the config's
    values."""
    own = dataclasses.replace(tune, cwd=own_recipe.parent)
    result = own("mine.py", "--config", "data/oasst_groups", "--help")
    usage, *lines = result.stdout.splitlines()
    assert usage.split(" --config")[0] == "usage: tune run [TORCHRUN-OPTIONS] mine.py"
    assert lines[lines.index("  shout: true or false; default false") + 1].endswith("it is loud.")
    assert "  kind: one of record, fixed, uniform, empirical, none; default record" in lines
    assert any(line.startswith("  source: text; required; this config: ") for line in lines)


def test_inherited_keys_of_an_own_recipe_are_checked(own_recipe: Path, tune: Tune) -> None:
    own = dataclasses.replace(tune, cwd=own_recipe.parent)
    wrong = ("kind=any", "shout=5", "shoot=1")
    result = own("mine.py", "--config", "data/oasst_groups", *wrong, check=False)
    assert result.returncode == 1
    assert "'kind' must be one of record, fixed, uniform, empirical, none" in result.stderr
    assert "'shout' must be true or false, got 5" in result.stderr
    assert "unknown key 'shoot' (did you mean 'shout'?)" in result.stderr
