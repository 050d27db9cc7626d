"""The keys of the recipes, as their users read them: `tune run RECIPE --help` and KEYS.md.

A key is described where it is declared: by the docstring that follows the field, or, where there is
none, by the comment behind it.

    python -m steerlm2.config.docs      # writes recipe_configs/KEYS.md anew
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import shutil
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from steerlm2._tune import RECIPES, recipe_directories
from steerlm2.config.loader import (
    CONFIG_CLASS,
    REST,
    TYPE_NAMES,
    Component,
    field_types,
    is_union,
    load_recipe,
    module_globals,
    to_plain,
    yaml_key,
)

KEYS_FILE = recipe_directories()[1] / "KEYS.md"
REQUIRED = "required"
ANY_OTHER_KEY = "any other key"
INTRODUCTION = """\
# Keys

Written by `python -m steerlm2.config.docs` from the docstrings of the recipes' keys, which
`tune run RECIPE --help` prints too.

A key with a dot belongs to a section: `data.shuffle=false` on the command line, or `shuffle: false`
under `data:` in the file. NAME is a name of your choice. A component is a mapping with
`_component_`, the dotpath of what to build, and its arguments.
"""


@dataclasses.dataclass(frozen=True)
class KeyDoc:
    """What there is to know about one key of a config."""

    key: str
    """In full: `lr`, `generation.top_p`; `models.NAME.server` under a name of the user's choice."""
    values: str
    """What may be given, in words."""
    default: str
    """As YAML; REQUIRED where there is none, empty for a section whose keys have their defaults."""
    text: str
    """Its meaning, empty where nobody has described it."""
    owner: type
    """The class that declares it; of a section's key, the class that declares the section."""


def keys_of(config_class: type, namespace: dict[str, Any] | None = None) -> list[KeyDoc]:
    """Every key of a config dataclass in the order of definition, its sections' keys included.

    Args:
        namespace: the globals of a recipe that is run as a script, as in `load_config`.
    """
    return list(_keys(config_class, namespace, "", None, None))


def help_text(
    recipe: str,
    docstring: str | None,
    keys: Iterable[KeyDoc],
    values: Mapping[str, Any] | None = None,
    width: int | None = None,
) -> str:
    """What `tune run RECIPE --help` prints.

    Args:
        recipe: as `tune run` takes it.
        docstring: the recipe's; its first paragraph is shown.
        values: of the given config, to stand beside the defaults.
        width: columns; none: the terminal's.
    """
    width = max(width or shutil.get_terminal_size().columns, 40)
    lines = [f"usage: tune run [TORCHRUN-OPTIONS] {recipe} --config CONFIG [KEY=VALUE ...]", ""]
    lines += [_wrapped(_first_paragraph(docstring), width, ""), ""]
    if RECIPES.get(recipe):
        lines += [_wrapped(f"Configs: {', '.join(RECIPES[recipe])}", width, "  ", first=""), ""]
    lines += ["Keys, in the config or as KEY=VALUE:", ""]
    for doc in keys:
        value = None if values is None else _value_text(doc, values)
        about = [doc.values, _default_text(doc), f"this config: {value}" if value else ""]
        about_text = f"{doc.key}: {'; '.join(filter(None, about))}"
        lines.append(_wrapped(about_text, width, "      ", first="  "))
        if doc.text:
            lines.append(_wrapped(doc.text, width, "      "))
    return "\n".join(lines) + "\n"


def ready_made_recipes() -> dict[str, tuple[str | None, type]]:
    """The docstring and the config class of each, in the order of the pipeline."""
    folder = recipe_directories()[0]
    modules = {recipe: load_recipe(folder / f"{recipe}.py") for recipe in RECIPES}
    return {name: (m.__doc__, getattr(m.main, CONFIG_CLASS)) for name, m in modules.items()}


def keys_file_text(recipes: Mapping[str, tuple[str | None, type]]) -> str:
    """KEYS.md: a table for each recipe, and one for each class that several recipes inherit.

    Args:
        recipes: docstring and config class by name, as `ready_made_recipes` returns them.
    """
    inherited = [
        base
        for _, cls in recipes.values()
        for base in reversed(cls.__mro__)
        if _declares_keys(base)
    ]
    shared = [base for base in dict.fromkeys(inherited) if inherited.count(base) > 1]
    parts = [INTRODUCTION]
    for recipe, (docstring, cls) in recipes.items():
        parts.append(f"## {recipe}\n\n{_first_paragraph(docstring)}\n")
        links = [f"[{b.__name__}](#{b.__name__.lower()})" for b in cls.__mro__ if b in shared]
        if links:
            parts.append(f"Also the keys of {', '.join(links)} that aren't listed here.\n")
        parts.append(_table(doc for doc in keys_of(cls) if doc.owner not in shared))
    for base in shared:
        parts.append(f"## {base.__name__}\n\n{_first_paragraph(base.__doc__)}\n")
        parts.append(_table(doc for doc in keys_of(base) if doc.owner is base))
    return "\n".join(parts)


def _keys(
    cls: type,
    namespace: dict[str, Any] | None,
    prefix: str,
    owner: type | None,
    instance: Any,
) -> Iterator[KeyDoc]:
    """The keys of a class; their defaults are what `instance` has, where one is given."""
    hints = field_types(cls, namespace)
    texts = _descriptions(cls, namespace)
    for field in dataclasses.fields(cls):
        hint, belongs_to = hints[field.name], owner or _declaring_class(cls, field.name)
        text = texts.get(field.name, "")
        if field.metadata.get(REST):
            yield KeyDoc(prefix + ANY_OTHER_KEY, "anything", "", text, belongs_to)
            continue
        key = prefix + yaml_key(field)
        default = _default(field) if instance is None else getattr(instance, field.name)
        section, name = _section(hint)
        if section is not None and not text:
            text = _first_paragraph(section.__doc__)
        yield KeyDoc(key, _type_text(hint), _default_yaml(default), text, belongs_to)
        if section is not None:
            filled = default if dataclasses.is_dataclass(default) else None
            yield from _keys(section, namespace, f"{key}{name}.", belongs_to, filled)


def _declaring_class(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in inspect.get_annotations(base))


def _declares_keys(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) and bool(inspect.get_annotations(cls))


def _section(hint: Any) -> tuple[type | None, str]:
    """The dataclass in a field's type, and what stands between the field's key and its keys."""
    for option in typing.get_args(hint) if is_union(hint) else (hint,):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        inner = arguments[-1] if origin in (dict, list) else option
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            return inner, ".NAME" if origin is dict else "[N]" if origin is list else ""
    return None, ""


def _type_text(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_union(hint):
        options = [_type_text(option) for option in arguments if option is not types.NoneType]
        comma = "," if " or " in options[-1] or options[-1].startswith("one of ") else ""
        return " or ".join(options) + f"{comma} or null" * (types.NoneType in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"list of {_plural(arguments[0])}"
    if origin is dict:
        return f"{_plural(arguments[1])} by name" if _section(hint)[0] else "mapping"
    if hint is Component:
        return "component"
    if hint is Any:
        return "anything"
    return "section" if dataclasses.is_dataclass(hint) else TYPE_NAMES.get(hint, str(hint))


def _plural(item: Any) -> str:
    special = {int: "whole numbers", float: "numbers", bool: "true or false", Any: "anything"}
    if item in special:
        return special[item]
    choice = typing.get_origin(item) is Literal
    return _type_text(item).removeprefix("one of ") if choice else f"{_type_text(item)}s"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _default_yaml(default: Any) -> str:
    if default is dataclasses.MISSING:
        return REQUIRED
    if dataclasses.is_dataclass(default):
        return ""
    if isinstance(default, Component) and default.keys() == {"_component_"}:
        return str(default["_component_"])  # torchtune's shorthand: key=dotpath
    return _flow_yaml(default)


def _flow_yaml(value: Any) -> str:
    """A value on one line, as it may stand in a YAML file."""
    plain = to_plain(value) if dataclasses.is_dataclass(value) else value
    if isinstance(plain, Mapping):
        plain = dict(plain)
    text = yaml.safe_dump(
        plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _default_text(doc: KeyDoc) -> str:
    return f"default {doc.default}" if doc.default not in (REQUIRED, "") else doc.default


def _value_text(doc: KeyDoc, values: Any) -> str | None:
    """What the config says of a key; none where it says nothing."""
    for part in doc.key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    if isinstance(values, Mapping) and "section" in doc.values:
        return f"with {', '.join(map(str, values))}"  # whose values follow, key by key
    return _flow_yaml(values)


def _descriptions(cls: type, namespace: dict[str, Any] | None) -> dict[str, str]:
    """Field name -> its docstring, or else the comment behind it; inherited ones included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        file = module_globals(base, namespace).get("__file__")
        if file and _declares_keys(base):
            found |= _descriptions_in(str(file)).get(base.__qualname__, {})
    return found


@functools.cache
def _descriptions_in(file: str) -> dict[str, dict[str, str]]:
    """Qualified class name -> field name -> description."""
    source = Path(file).read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.strip() != token.string
    }
    return dict(_described_classes(ast.parse(source).body, "", comments))


def _described_classes(
    body: list[ast.stmt], prefix: str, comments: Mapping[int, str]
) -> Iterator[tuple[str, dict[str, str]]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, dict(_described_fields(node.body, comments))
            yield from _described_classes(node.body, f"{prefix}{node.name}.", comments)
        elif isinstance(node, ast.FunctionDef):
            yield from _described_classes(node.body, f"{prefix}{node.name}.<locals>.", comments)


def _described_fields(
    body: list[ast.stmt], comments: Mapping[int, str]
) -> Iterator[tuple[str, str]]:
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        match following:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.target.id, " ".join(text.split())
            case _:
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                yield node.target.id, " ".join(comments[n] for n in lines if n in comments)


def _first_paragraph(docstring: str | None) -> str:
    return " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())


def _wrapped(text: str, width: int, indent: str, first: str | None = None) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(docs: Iterable[KeyDoc]) -> str:
    rows = [
        f"| `{doc.key}` | {doc.values} | "
        f"{doc.default if doc.default in (REQUIRED, '') else f'`{doc.default}`'} | {doc.text} |"
        for doc in (_escaped(doc) for doc in docs)
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _escaped(doc: KeyDoc) -> KeyDoc:
    return dataclasses.replace(
        doc, default=doc.default.replace("|", r"\|"), text=doc.text.replace("|", r"\|")
    )


if __name__ == "__main__":
    KEYS_FILE.write_text(keys_file_text(ready_made_recipes()), encoding="utf-8")
    print(f"written to {KEYS_FILE}")
