"""Texts that are written by Jinja templates, which lie beside the modules that use them."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def page_template(package: str, name: str, cell: Callable[..., str]) -> Template:
    """A template of a package, whose names must all be given; only HTML is escaped.

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
    )
    environment.filters["cell"] = cell
    return environment.get_template(name)
