"""Typed configurations: one YAML file per run, checked whole before anything is built.

A recipe declares its keys as a dataclass: the field names are the YAML keys, the field defaults
are the only place where a default lives. `load_config` turns the parsed YAML into that dataclass
and reports every problem at once; `steerlm2.runs.entry` is the command-line entry of a recipe.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import types
import typing
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from steerlm2.config.environment import IN_ENVIRONMENT, resolved, with_variables_kept
from steerlm2.masking import masked_values, named_secrets

ConfigT = TypeVar("ConfigT")

LOG = logging.getLogger("steerlm2")
LOG.addHandler(logging.NullHandler())
"""Goes into each rank's file of a recipe that opens one (steerlm2.runs.logs), and nowhere else."""

CONFIG_CLASS = "config_class"
"""Attribute of a recipe's `main`."""
REST = "rest"
"""In the metadata of a dataclass field: a dict of all keys that aren't fields, unchecked."""


_AS_GIVEN = "_as_given"
"""Attribute of a loaded config: its values with `${oc.env:NAME}` where they had it."""

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
"""How messages and `--help` name a type."""


LARGEST_SEED = 2**63 - 1
"""Of every key `seed`: torch's generators take no more in all their uses."""


class Component(dict[str, Any]):
    """A YAML mapping with `_component_` (a dotpath) and the arguments to call it with."""


def load_config(
    config_class: type[ConfigT],
    values: Mapping[str, Any] | DictConfig,
    namespace: dict[str, Any] | None = None,
) -> ConfigT:
    """Check `values` against a dataclass and build it.

    If the dataclass has a static method `expand(values: DictConfig) -> DictConfig`, a parsed YAML
    goes through it, before its interpolations are resolved.
    If the dataclass has a class method `complete(values) -> list[str]`, it fills in what the values
    leave out, and returns problems. If it has a method `problems() -> list[str]`, that is asked for
    problems between keys once every key is right by itself. A text that begins with "~/" is a path
    in the user's home folder; in a list of texts, such as prompts, it stays as it is.

    Args:
        namespace: where to look up the annotations of a class of a recipe that is run as a script.
            `tune run` runs a copied recipe in a way that its own module can't be found by name.

    Raises:
        ValueError: naming every unknown, missing or mistyped key, not only the first.
    """
    as_given: dict[str, Any] = {}
    if isinstance(values, DictConfig):
        try:
            expand = getattr(config_class, "expand", None)
            values = values if expand is None else expand(values)
            as_given = with_variables_kept(values)
            values = resolved(values)
        except InterpolationToMissingValueError as error:
            plain = OmegaConf.to_container(values, resolve=False)
            problems = [_missing(key) for key in _keys_without_value(plain)]
            raise ValueError(
                "the config has problems:\n  - " + "\n  - ".join(problems or [str(error)])
            ) from error
        except OmegaConfBaseException as error:
            raise ValueError(f"the config has a broken interpolation: {error}") from error
    config, problems = _checked(config_class, values, namespace)
    problems += [
        f"'{key}' is a secret, which others can read here: write ${{oc.env:NAME}}, and put it into "
        "that variable of the environment"
        for key in named_secrets(as_given)
    ]
    if problems:
        raise ValueError("the config has problems:\n  - " + "\n  - ".join(problems))
    setattr(config, _AS_GIVEN, as_given)
    return typing.cast(ConfigT, config)


def config_problems(main: Callable[[], None] | None, values: Mapping[str, Any]) -> list[str]:
    """What `load_config` would say to the values of a recipe, given by its `main`; nothing where
    that isn't made by `recipe_main`."""
    config_class = getattr(main, CONFIG_CLASS, None)
    return _checked(config_class, values, None)[1] if config_class is not None else []


def instantiate(component: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call the `_component_` of a config section with its arguments, `args` and `kwargs`.

    Raises:
        ValueError: where the arguments don't fit the component's signature, or it needs a package
            that isn't installed.
    """
    target = _locate(component["_component_"])
    given = {key: value for key, value in component.items() if key != "_component_"} | kwargs
    try:
        inspect.signature(target).bind(*args, **given)
    except TypeError as error:
        raise ValueError(f"{component['_component_']}: {error}") from error
    try:
        return target(*args, **given)
    except ImportError as error:
        raise ValueError(f"{component['_component_']} needs a package: {error}") from error


def as_function(component: Mapping[str, Any]) -> Callable[..., Any]:
    """The `_component_` of a config section with its arguments filled in, to be called later."""
    given = {key: value for key, value in component.items() if key != "_component_"}
    return functools.partial(_locate(component["_component_"]), **given)


def takes(component: Mapping[str, Any], argument: str) -> bool:
    """Whether a component has an argument of that name."""
    return argument in inspect.signature(_locate(component["_component_"])).parameters


def as_yaml(config: Any) -> str:
    """The config with all defaults filled in, as YAML that anybody may read (`to_public`)."""
    return yaml.safe_dump(to_public(config), sort_keys=False, allow_unicode=True)


def to_public(config: Any) -> dict[str, Any]:
    """As `to_plain`, for what is written and logged: `${oc.env:NAME}` as it was given, and without
    the secrets that `masked` knows."""
    as_given = getattr(config, _AS_GIVEN, {})
    return typing.cast(dict[str, Any], masked_values(_with_given(to_plain(config), as_given)))


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain dicts (components included)."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = _plain(getattr(config, field.name))
        plain |= value if field.metadata.get(REST) else {yaml_key(field): value}
    return plain


def _with_given(value: Any, given: Any) -> Any:
    """A value, or what the config had for it where that interpolates a variable."""
    if isinstance(given, str):
        return given if IN_ENVIRONMENT in given else value
    if isinstance(value, dict) and isinstance(given, dict):
        return {key: _with_given(item, given.get(key)) for key, item in value.items()}
    if isinstance(value, list) and isinstance(given, list) and len(value) == len(given):
        return [_with_given(*pair) for pair in zip(value, given, strict=True)]
    return value


def field_types(cls: type, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """The type of every field of a dataclass, inherited ones included.

    Each class's annotations are looked up in the class's own module: a base class may use names
    that the module of the class itself doesn't import.

    Args:
        namespace: the globals of a recipe that is run as a script, as in `load_config`.
    """
    types_of: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        own = types.new_class(base.__name__)
        own.__annotations__ = inspect.get_annotations(base)
        names = dict(vars(base)) | module_globals(base, namespace)
        types_of |= typing.get_type_hints(own, names)
    return types_of


def module_globals(cls: type, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """The globals of the module that defines a class; `namespace`, where that is its script."""
    if namespace is not None and cls.__module__ == namespace.get("__name__"):
        return namespace
    return vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}


def load_recipe(file: Path) -> types.ModuleType:
    """A recipe's module, from its file: recipes aren't modules that could be imported by name.

    The same file is loaded once.
    """
    name = f"_recipe_{file.stem}_{zlib.crc32(os.fsencode(file.resolve())):08x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def yaml_key(field: dataclasses.Field[Any]) -> str:
    """A field's YAML key: its name, or its metadata's "key" where Python reserves the word."""
    return str(field.metadata.get("key", field.name))


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def is_union(hint: Any) -> bool:
    """Whether a type is a choice of several, such as `int | None`."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _checked(
    config_class: type, values: Mapping[str, Any], namespace: dict[str, Any] | None
) -> tuple[Any, list[str]]:
    problems: list[str] = []
    whole = copy.deepcopy(dict(values))
    if hasattr(config_class, "complete"):
        problems += config_class.complete(whole)
    config = _build_dataclass(config_class, whole, "", problems, namespace)
    if not problems and hasattr(config, "problems"):
        problems = config.problems()
    return config, problems


def _build_dataclass(
    cls: type,
    values: dict[str, Any],
    where: str,
    problems: list[str],
    namespace: dict[str, Any] | None,
) -> Any:
    hints = field_types(cls, namespace)
    fields = {yaml_key(field): field for field in dataclasses.fields(cls)}
    rest = next((key for key, field in fields.items() if field.metadata.get(REST)), None)
    arguments: dict[str, Any] = {}
    if rest is not None:
        arguments[fields.pop(rest).name] = {k: v for k, v in values.items() if k not in fields}
    else:
        elsewhere = _keys_of_sections(hints, where)
        for key in values:
            if key not in fields:
                problems.append(_unknown_key(where + str(key), str(key), list(fields), elsewhere))
    for key, field in fields.items():
        if key in values and values[key] != MISSING:
            value = _convert(values[key], hints[field.name], where + key, problems, namespace)
            arguments[field.name] = _in_home(value) if isinstance(value, str) else value
            if isinstance(values[key], int):
                problems.extend(_seed_problems(key, values[key], where))
        elif key in values or is_required(field):
            problems.append(_missing(f"{where}{key}"))
            arguments[field.name] = None
    return cls(**arguments)


def _keys_without_value(values: Any, where: str = "") -> Iterator[str]:
    """The keys that a parsed YAML leaves to its user, as ???, in their order."""
    items = values.items() if isinstance(values, dict) else ()
    for key, value in items:
        if value == MISSING:
            yield f"{where}{key}"
        yield from _keys_without_value(value, f"{where}{key}.")


def _missing(key: str) -> str:
    return f"'{key}' is missing: add {key}=... to the command line"


def _keys_of_sections(hints: dict[str, Any], where: str) -> dict[str, str]:
    """The sections' keys, and what each is in full: `steerlm2.max_tokens_per_microbatch`."""
    return {
        yaml_key(field): f"{where}{section}.{yaml_key(field)}"
        for section, hint in reversed(hints.items())  # the first section with such a key wins
        for option in (hint, *(typing.get_args(hint) if is_union(hint) else ()))
        if isinstance(option, type) and dataclasses.is_dataclass(option)
        for field in dataclasses.fields(option)
    }


def _unknown_key(
    full_name: str, key: str, known: list[str], elsewhere: Mapping[str, str] | None = None
) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if elsewhere and key in elsewhere:
        hint = f"did you mean '{elsewhere[key]}'?"
    elif nearest:
        hint = f"did you mean '{nearest[0]}'?"
    elif known:
        hint = f"known keys: {', '.join(sorted(known))}"
    else:
        hint = "it takes none"
    return f"unknown key '{full_name}' ({hint})"


def _convert(
    value: Any, hint: Any, where: str, problems: list[str], namespace: dict[str, Any] | None
) -> Any:
    """`value` as the type `hint`; what doesn't fit is added to `problems`."""
    origin = typing.get_origin(hint)
    if is_union(hint):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        optional = len(options) < len(typing.get_args(hint))
        # torchtune reads `dataset_val=null` as a null `_component_` of the section in the YAML
        switched_off = isinstance(value, dict) and value.get("_component_", "") is None
        if optional and (value is None or switched_off):
            return None
        attempts: list[list[str]] = []
        for option in options:
            attempts.append([])
            converted = _convert(value, option, where, attempts[-1], namespace)
            if not attempts[-1]:
                return converted
        problems.extend(attempts[0])
        return None
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            problems.append(
                f"'{where}' must be one of {', '.join(map(str, choices))}, got {value!r}"
            )
        return value
    if origin is list:
        if not isinstance(value, list):
            problems.append(f"'{where}' must be a list, got {value!r}")
            return []
        (item,) = typing.get_args(hint)
        return [
            _convert(v, item, f"{where}[{i}]", problems, namespace) for i, v in enumerate(value)
        ]
    if dataclasses.is_dataclass(hint) or hint is Component or origin is dict:
        if hint is Component and isinstance(value, str):
            value = {"_component_": value}  # torchtune's shorthand: key=dotpath
        if not isinstance(value, dict):
            problems.append(f"'{where}' must be a mapping of keys, got {value!r}")
            return value
        if hint is Component:
            problems.extend(_component_problems(value, where))
            return Component(_in_home(value))
        if origin is dict:
            (_, item) = typing.get_args(hint)
            return {
                key: _convert(v, item, f"{where}.{key}", problems, namespace)
                for key, v in value.items()
            }
        return _build_dataclass(typing.cast(type, hint), value, where + ".", problems, namespace)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-7 as a string
        except ValueError:
            pass
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return _in_home(value) if hint is Any else value
    problems.append(f"'{where}' must be {TYPE_NAMES.get(hint, hint.__name__)}, got {value!r}")
    return value


def _component_problems(component: dict[str, Any], where: str) -> Iterator[str]:
    path = component.get("_component_")
    if not isinstance(path, str):
        yield f"'{where}' needs '{where}._component_' (the dotpath of what to build)"
        return
    try:
        parameters = inspect.signature(_locate(path)).parameters
    except ValueError as error:
        yield f"'{where}._component_': {error}"
        return
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key, value in component.items():
        if value == MISSING:
            yield _missing(f"{where}.{key}")
        yield from _seed_problems(key, value, f"{where}.")
        if key not in parameters and key != "_component_" and not takes_any:
            problem = _unknown_key(f"{where}.{key}", str(key), list(parameters))
            yield f"{problem}; ~{where}.{key} on the command line removes it"


def _seed_problems(key: str, value: Any, where: str) -> Iterator[str]:
    """What keeps the value of a key `seed` from being one."""
    if key != "seed" or value in (None, MISSING):
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_SEED:
        yield f"'{where}seed' must be a whole number from 0 to 2**63 - 1, got {value!r}"


def _in_home(value: Any) -> Any:
    """The value with "~/..." written out in its texts, however deep they stand."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if isinstance(value, list):
        return [_in_home(item) for item in value]
    return {key: _in_home(v) for key, v in value.items()} if isinstance(value, dict) else value


def _locate(path: str) -> Callable[..., Any]:
    """The object that a dotpath names; the working directory is searched too, as torchtune does."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {path}: {error}") from error
    if not callable(found):
        raise ValueError(f"{path} is not callable")
    return typing.cast(Callable[..., Any], found)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(v) for key, v in value.items()} if isinstance(value, dict) else value
