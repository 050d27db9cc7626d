"""Texts that are written by Jinja templates, which lie beside the modules that use them."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from steerlm2.escaping import printable


def page_template(package: str, name: str, cell: Callable[..., str]) -> Template:
    """A template of a package, whose names must all be given; only HTML is escaped, and what a
    terminal would obey is left out of all texts.

    Args:
        package: whose folder has it, such as "steerlm2.evaluation".
        name: its file, such as "report.html.jinja".
        cell: the filter `cell`: what stands for a value in a table.
    """
    environment = Environment(
        loader=PackageLoader(package, ""),
        autoescape=name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    environment.filters["cell"] = cell
    return environment.get_template(name)


def _printable(value: object) -> object:
    return printable(value) if isinstance(value, str) else value
