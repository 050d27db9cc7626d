"""`${oc.env:NAME}` is resolved for the run, and stands as it is in what the run writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from steerlm2.config.environment import escaped, resolved, variables_in, with_variables_kept
from steerlm2.config.loader import as_yaml, load_config, to_plain, to_public
from steerlm2.masking import masked


@dataclass(kw_only=True)
class Config:
    output_dir: str = "${oc.env:ENV_FOLDER}/x"
    url: str | None = None
    size: int = 1
    parts: dict[str, Any] = field(default_factory=dict)


VALUES = {
    "base": "http://al:${oc.env:ENV_WORD}@h",
    "url": "${base}/v1",
    "size": "${oc.decode:${oc.env:ENV_SIZE}}",
    "other": {"list": ["${url}", 1, None], "same": "${..url}"},
    "whole": "${other}",
    "default": "${oc.env:ENV_NONE,plain}",
    "missing": "???",
    "escaped": r"\${oc.env:ENV_WORD}",
}
KEPT = "http://al:${oc.env:ENV_WORD}@h"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENV_WORD", "plantedword")
    monkeypatch.setenv("ENV_SIZE", "3")
    monkeypatch.setenv("ENV_FOLDER", "plantedfolder")
    monkeypatch.delenv("ENV_NONE", raising=False)


def test_only_the_variables_are_left_unresolved() -> None:
    other = {"list": [f"{KEPT}/v1", 1, None], "same": f"{KEPT}/v1"}
    assert with_variables_kept(OmegaConf.create(VALUES)) == {
        "base": KEPT,
        "url": f"{KEPT}/v1",
        "size": 3,
        "other": other,
        "whole": other,
        "default": "plain",
        "missing": "???",
        "escaped": "${oc.env:ENV_WORD}",
    }


def test_what_is_kept_resolves_to_the_same() -> None:
    values = OmegaConf.create(VALUES)
    again = OmegaConf.create(with_variables_kept(values) | {"escaped": VALUES["escaped"]})
    assert resolved(again) == resolved(values)


def test_escaped_values_stay_as_they_stand() -> None:
    values = {"a": ["${oc.env:ENV_WORD}", {"b": "${x}"}, 1]}
    assert OmegaConf.to_container(OmegaConf.create(escaped(values)), resolve=True) == values


def test_variables_are_found_however_deep_they_stand() -> None:
    assert variables_in([{"a": "${oc.env:B}${oc.env:A,x}"}, ("${oc.env:'C'}",)]) == ["B", "A", "C"]


@pytest.mark.parametrize(
    "given", ["${ oc.env:ENV_WORD }", "${oc.env : 'ENV_WORD'}", "${oc.decode:${oc.env: ENV_WORD}}"]
)
def test_a_variable_is_kept_however_it_is_spelled(given: str) -> None:
    values = OmegaConf.create({"url": given})
    assert resolved(values) == {"url": "plantedword"}
    assert with_variables_kept(values) == {"url": "${oc.env:ENV_WORD}"}
    assert masked("got plantedword") == "got ${oc.env:ENV_WORD}"


@pytest.mark.parametrize("given", ["${oc.env:${name}}", "${oc.env:ENV_${half}}", "${oc.${env}:A}"])
def test_a_variable_whose_name_is_made_is_refused(given: str) -> None:
    """Its value couldn't be kept out of what is written."""
    values = OmegaConf.create({"url": [given], "name": "ENV_WORD", "half": "WORD", "env": "env"})
    with pytest.raises(ValueError, match=r"write \$\{oc.env:NAME\} with the name itself"):
        load_config(Config, values)


def test_a_config_is_written_with_its_variables() -> None:
    """The run has the values; what it writes can be run again."""
    given = {"url": KEPT, "parts": {"a": [KEPT], "b": 2}, "output_dir": "${oc.env:ENV_FOLDER}/x"}
    config = load_config(Config, OmegaConf.create(given))
    assert config.url == "http://al:plantedword@h"
    assert to_plain(config)["parts"] == {"a": [config.url], "b": 2}
    written = as_yaml(config)
    assert "planted" not in written
    assert load_config(Config, OmegaConf.create(yaml.safe_load(written))) == config
    assert to_public(config) == given | {"size": 1}


def test_a_key_in_a_config_is_refused_unless_it_is_a_variables() -> None:
    """Config and command line are read by others; the message doesn't repeat it."""
    parts: dict[str, Any] = {
        "a": [{"api_key": "S3CR"}],
        "password": "${oc.env:ENV_WORD}",
        "eos_token": "<eos>",
    }
    with pytest.raises(ValueError, match=r"- 'parts\.a\.api_key' is a secret") as error:
        load_config(Config, OmegaConf.create({"output_dir": "x", "parts": parts}))
    assert "S3CR" not in str(error.value)
    parts["a"] = {"password": 12345678}
    with pytest.raises(ValueError, match=r"- 'parts\.a\.password' is a secret"):
        load_config(Config, OmegaConf.create({"output_dir": "x", "parts": parts}))
    parts["a"] = []
    config = load_config(Config, OmegaConf.create({"output_dir": "x", "parts": parts}))
    assert config.parts["password"] == "plantedword"


def test_values_are_masked_in_messages_but_paths() -> None:
    resolved(OmegaConf.create({"size": "${oc.env:ENV_WORD}", "output_dir": "${oc.env:ENV_FOLDER}"}))
    assert masked("got plantedword in plantedfolder") == "got ${oc.env:ENV_WORD} in plantedfolder"
