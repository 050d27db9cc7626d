"""Texts of data, users and models where characters mean something: on a terminal, in Markdown.

HTML is escaped by its Jinja templates (page_templates).
"""

from __future__ import annotations

import re

from steerlm2.masking import masked

_REPLACEMENT = "\ufffd"
_CONTROLS = {i: _REPLACEMENT for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}
"""Instead of characters that would move a terminal's cursor, or do more."""
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"[\\`*\[\]|$~]|(?<!\w)_|_(?!\w)")
"""With "_" where it isn't inside of a word; "$" is for formulas."""


def printable(text: str) -> str:
    """A text without control characters, except newlines and tabs: a terminal obeys them."""
    return text.translate(_CONTROLS)


def shown(text: str) -> str:
    """A message for people: without secrets, and without what a terminal would obey."""
    return printable(masked(text))


def one_line(text: str, most: int = 200) -> str:
    """The beginning of a server's text as a message can have it: on one line, and without what
    can't be seen or encoded, such as marks of direction and single surrogates."""
    words = " ".join(text[: 4 * most].split())
    shown = "".join(each if each.isprintable() else _REPLACEMENT for each in words)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def markdown_text(text: str) -> str:
    """A text on one line that Markdown shows as it is, also in a table's cell."""
    line = printable(" ".join(text.split()))
    escaped = _MARKUP.sub(lambda match: "\\" + match[0], line)
    return "".join(_ENTITIES.get(char, char) for char in escaped)
