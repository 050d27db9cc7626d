"""A config's `${oc.env:NAME}`: its value is for the run alone, and never written or printed.

What a run writes of its config has the interpolation as it stands, so that it can be run again
where the variable is.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steerlm2.masking import mask_variables

IN_ENVIRONMENT = "${oc.env:"
_READS = re.compile(r"\$\{\s*oc\.env\s*:")
_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*(?P<quote>['\"]?)(?P<name>[\w.-]+)(?P=quote)\s*[,}]")
_MADE_NAME = re.compile(r"\$\{[^{}:]*\$\{[^{}]*\}[^{}]*:")
"""A resolver whose name is interpolated itself."""
_NAMES_A_PATH = re.compile(r"(?:.*_)?(?:dir|path|folder|files?|input|outputs?|source)")


def variables_in(value: Any) -> list[str]:
    """The variables that the texts of a nested value interpolate, each once."""
    return list(dict.fromkeys(name for _, text in _texts(value) for name in _names_in(text)))


def resolved(values: DictConfig) -> dict[str, Any]:
    """The plain values of a config, interpolations resolved.

    From then on what its variables hold is masked in messages, unless a key says that it is a path.

    Raises:
        OmegaConfBaseException: for an interpolation that can't be resolved.
        ValueError: for one that doesn't tell the name of its variable.
    """
    raw = _unresolved(values)
    mask_variables(
        name
        for key, text in _texts(raw)
        if not _NAMES_A_PATH.fullmatch(key)
        for name in _names_in(text)
    )
    return cast(dict[str, Any], OmegaConf.to_container(values, resolve=True))


def with_variables_kept(values: DictConfig) -> dict[str, Any]:
    """The plain values of a config, interpolations resolved, except that `${oc.env:NAME}` stands
    where a text has the variable's value.

    Raises:
        OmegaConfBaseException, ValueError: as `resolved`.
    """
    names = variables_in(_unresolved(values))
    real = cast(dict[str, Any], OmegaConf.to_container(values, resolve=True))
    marks = {f"__variable_{i}__": name for i, name in enumerate(names) if name in os.environ}
    return cast(dict[str, Any], _kept(values, real, marks)) if marks else real


def escaped(value: Any) -> Any:
    """A nested value whose interpolations OmegaConf leaves as they stand."""
    if isinstance(value, str):
        return value.replace("${", r"\${")
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list) else value


def _unresolved(values: DictConfig) -> Any:
    """The plain values with their interpolations.

    Raises:
        ValueError: for a variable of the environment whose name isn't told: its value couldn't be
            kept out of what is written.
    """
    raw = OmegaConf.to_container(values, resolve=False)
    for key, text in _texts(raw):
        if len(_READS.findall(text)) > len(_names_in(text)) or _MADE_NAME.search(text):
            raise ValueError(
                f"'{key}' makes the name of a variable or of a resolver ({text}): write "
                "${oc.env:NAME} with the name itself"
            )
    return raw


def _names_in(text: str) -> list[str]:
    """The variables that a text interpolates."""
    return [match["name"] for match in _VARIABLE.finditer(text)]


def _kept(node: Any, real: Any, marks: Mapping[str, str]) -> Any:
    """
    Args:
        real: the same, resolved.
        marks: what variables have instead of their values -> their names.
    """
    if isinstance(real, dict):
        return {key: _kept_child(node, key, item, marks) for key, item in real.items()}
    if isinstance(real, list):
        return [_kept_child(node, index, item, marks) for index, item in enumerate(real)]
    return real


def _kept_child(node: Any, key: Any, real: Any, marks: Mapping[str, str]) -> Any:
    try:
        with _variables({name: mark for mark, name in marks.items()}):
            child = node[key]
    except OmegaConfBaseException:  # a missing value, or one that depends on a variable's
        return real
    if not isinstance(child, str):
        return _kept(child, real, marks)
    text, value = child, child
    for mark, name in marks.items():
        text = text.replace(mark, f"{IN_ENVIRONMENT}{name}}}")
        value = value.replace(mark, os.environ[name])
    return text if value == real else real


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Other values of variables, which all have one."""
    before = {name: os.environ[name] for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.update(before)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(name of the value, text) of all texts in nested values."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)
