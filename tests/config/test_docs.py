"""What `tune run RECIPE --help` and KEYS.md say of a config's keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from steerlm2._tune import RECIPES
from steerlm2.config.docs import (
    KEYS_FILE,
    KeyDoc,
    help_text,
    keys_file_text,
    keys_of,
    ready_made_recipes,
)
from steerlm2.config.keys import LabelOptions
from steerlm2.config.loader import REST, Component


@dataclass(kw_only=True)
class Section:
    """Answers sampled at every validation."""

    top_p: float = 0.9
    """Share of the probability
    that is sampled from."""
    prompts: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Base:
    """What both have."""

    output_dir: str
    """Folder."""
    strategy: Literal["auto", "two_pass"] | None = None  # of a step


@dataclass(kw_only=True)
class Config(Base):
    section: Section = field(default_factory=lambda: Section(top_p=0.5))
    optional: Section | None = None
    """Its own words."""
    named: dict[str, Section] = field(default_factory=dict)
    listed: list[Section] = field(default_factory=list)
    builder: Component = field(default_factory=lambda: Component(_component_="math.sqrt"))
    values: dict[str, Any] = field(default_factory=dict)
    only: str | list[str] | None = None
    switch: bool | None = None
    start: int = field(default=3, metadata={"key": "from"})
    adopt: bool = False  # the comment that the formatter has moved
    rest: dict[str, Any] = field(metadata={REST: True}, default_factory=dict)


KEYS = {doc.key: doc for doc in keys_of(Config)}


def test_keys_come_in_the_order_of_definition_with_those_of_sections_in_full() -> None:
    assert list(KEYS) == [
        *("output_dir", "strategy", "section", "section.top_p", "section.prompts"),
        *("optional", "optional.top_p", "optional.prompts"),
        *("named", "named.NAME.top_p", "named.NAME.prompts"),
        *("listed", "listed[N].top_p", "listed[N].prompts"),
        *("builder", "values", "only", "switch", "from", "adopt", "any other key"),
    ]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("output_dir", "text"),
        ("strategy", "one of auto, two_pass, or null"),
        ("section", "section"),
        ("section.top_p", "a number"),
        ("section.prompts", "list of texts"),
        ("optional", "section or null"),
        ("named", "sections by name"),
        ("listed", "list of sections"),
        ("builder", "component"),
        ("values", "mapping"),
        ("only", "text or list of texts or null"),
        ("switch", "true or false, or null"),
        ("from", "a whole number"),
    ],
)
def test_types_are_in_a_users_words(key: str, values: str) -> None:
    assert KEYS[key].values == values


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("output_dir", "required"),
        ("strategy", "null"),
        ("section", ""),
        ("section.top_p", "0.5"),
        ("optional.top_p", "0.9"),
        ("section.prompts", "[]"),
        ("builder", "math.sqrt"),
        ("adopt", "false"),
    ],
)
def test_defaults_are_yaml_and_those_of_the_section_itself(key: str, default: str) -> None:
    assert KEYS[key].default == default


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("output_dir", "Folder."),
        ("section.top_p", "Share of the probability that is sampled from."),
        ("strategy", "of a step"),
        ("adopt", "the comment that the formatter has moved"),
        ("section", "Answers sampled at every validation."),
        ("optional", "Its own words."),
        ("only", ""),
    ],
)
def test_meanings_are_docstrings_or_comments_or_those_of_the_section(key: str, text: str) -> None:
    assert KEYS[key].text == text


def test_owner_is_the_class_that_declares_the_key_or_its_section() -> None:
    owners = [KEYS[key].owner for key in ("output_dir", "only", "section.top_p")]
    assert owners == [Base, Config, Config]


def test_a_script_run_as_main_is_read_from_its_own_file(tmp_path: Path) -> None:
    """The library's class from the library's."""
    source = (
        "from dataclasses import dataclass\n"
        "from steerlm2.config.keys import LabelOptions\n"
        "@dataclass\n"
        "class Mine(LabelOptions):\n"
        "    mine: int = 3\n"
        '    """Of the script."""\n'
    )
    script = tmp_path / "mine.py"
    script.write_text(source)
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    exec(source, namespace)
    *inherited, own = keys_of(namespace["Mine"], namespace)
    assert (own.key, own.values, own.text) == ("mine", "a whole number", "Of the script.")
    label_keys = [(doc.key, doc.values, doc.default, doc.text) for doc in keys_of(LabelOptions)]
    assert [(d.key, d.values, d.default, d.text) for d in inherited] == label_keys


def help_lines(values: dict[str, Any] | None = None, width: int = 80) -> list[str]:
    docstring = "What it does,\nin short.\n\nAnd at length."
    return help_text("mine.py", docstring, keys_of(Config), values, width).splitlines()


def test_help_begins_with_usage_and_the_docstrings_first_paragraph() -> None:
    assert help_lines()[:3] == [
        "usage: tune run [TORCHRUN-OPTIONS] mine.py --config CONFIG [KEY=VALUE ...]",
        "",
        "What it does, in short.",
    ]
    assert not any("at length" in line for line in help_lines())


def test_help_has_type_default_and_meaning_of_a_key() -> None:
    lines = help_lines()
    at = lines.index("  section.top_p: a number; default 0.5")
    assert lines[at + 1] == "      Share of the probability that is sampled from."


def test_help_with_a_config_has_its_values() -> None:
    """Of a section, the keys that are set; their values follow at these keys."""
    lines = help_lines({"output_dir": "out", "section": {"top_p": 0.7}, "only": ["a", "b"]})
    assert "  output_dir: text; required; this config: out" in lines
    assert "  section: section; this config: with top_p" in lines
    assert "  section.top_p: a number; default 0.5; this config: 0.7" in lines
    assert "  only: text or list of texts or null; default null; this config: [a, b]" in lines
    assert "  from: a whole number; default 3" in lines


def test_help_shows_values_as_they_stand_there_even_wrong_ones() -> None:
    values = {"section": 5, "output_dir": None, "only": "${names.stage}"}
    lines = help_lines(values, width=200)
    assert "  section: section; this config: 5" in lines
    assert "  output_dir: text; required; this config: null" in lines
    (only,) = (line for line in lines if line.startswith("  only:"))
    assert only.endswith("; this config: ${names.stage}")


@pytest.mark.parametrize("width", [50, 100])
def test_help_is_wrapped_to_the_width(width: int) -> None:
    lines = help_text("mine", "word " * 100, keys_of(Config), width=width).splitlines()[1:]
    assert width - 10 < max(map(len, lines)) <= width


def test_keys_file_is_current() -> None:
    message = f"{KEYS_FILE} is not current: run python -m steerlm2.config.docs"
    assert KEYS_FILE.read_text(encoding="utf-8") == keys_file_text(ready_made_recipes()), message


def test_keys_file_describes_every_recipe_in_the_pipelines_order() -> None:
    text = keys_file_text(ready_made_recipes())
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings[: len(RECIPES)] == list(RECIPES)


@dataclass(kw_only=True)
class Other(Base):
    """Of another recipe."""

    strategy: Literal["auto", "two_pass"] | None = "auto"
    """Of a step|run."""


def test_keys_that_several_recipes_inherit_stand_there_once() -> None:
    """A key that a recipe declares anew, here with another default, stands under the recipe."""
    text = keys_file_text({"one": ("First.\n\nMore.", Config), "two": ("Second.", Other)})
    _, one, two, base = text.split("\n## ")
    assert one.startswith(
        "one\n\nFirst.\n\nAlso the keys of [Base](#base) that aren't listed here.\n"
    )
    assert "output_dir" not in one
    assert two.endswith(
        "|---|---|---|---|\n"
        "| `strategy` | one of auto, two_pass, or null | `auto` | Of a step\\|run. |\n"
    )
    assert base == (
        "Base\n\nWhat both have.\n\n"
        "| key | type | default | meaning |\n"
        "|---|---|---|---|\n"
        "| `output_dir` | text | required | Folder. |\n"
        "| `strategy` | one of auto, two_pass, or null | `null` | of a step |\n"
    )


def keys_of_recipe(recipe: str) -> list[KeyDoc]:
    _, config_class = ready_made_recipes()[recipe]
    return keys_of(config_class)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_of_a_recipe_has_a_description(recipe: str) -> None:
    assert [doc.key for doc in keys_of_recipe(recipe) if not doc.text] == []
