"""Texts by templates: only HTML is escaped, and no name is left out silently."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from steerlm2.page_templates import page_template


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One with two templates of the same text."""
    folder = tmp_path / "some_templates"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in ("a.html.jinja", "a.md.jinja"):
        (folder / name).write_text("{{ text | cell }}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder.name


def test_only_html_is_escaped(package: str) -> None:
    texts = [
        page_template(package, f"a.{kind}.jinja", str).render(text="<&") for kind in ("html", "md")
    ]
    assert texts == ["&lt;&amp;\n", "<&\n"]


def test_a_terminal_obeys_nothing_in_a_text(package: str) -> None:
    """Reports are looked at there, too; markup and lines stay."""
    text = Markup("<b>\x1b]0;title\x07</b>\n\t\x9b2J")
    for kind in ("html", "md"):
        shown = page_template(package, f"a.{kind}.jinja", lambda value: value).render(text=text)
        assert shown == "<b>\ufffd]0;title\ufffd</b>\n\t\ufffd2J\n"


def test_a_name_that_is_not_given_is_an_error(package: str) -> None:
    with pytest.raises(UndefinedError):
        page_template(package, "a.md.jinja", str).render()
