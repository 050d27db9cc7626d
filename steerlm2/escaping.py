"""Texts of data, users and models where characters mean something: on a terminal, in Markdown.

HTML is escaped by its Jinja templates (page_templates).
"""

from __future__ import annotations

import re

_CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}
"""Instead of characters that would move a terminal's cursor, or do more."""
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"[\\`*\[\]|$~]|(?<!\w)_|_(?!\w)")
"""With "_" where it isn't inside of a word; "$" is for formulas."""


def printable(text: str) -> str:
    """A text without control characters, except newlines and tabs: a terminal obeys them."""
    return text.translate(_CONTROLS)


def markdown_text(text: str) -> str:
    """A text on one line that Markdown shows as it is, also in a table's cell."""
    line = printable(" ".join(text.split()))
    escaped = _MARKUP.sub(lambda match: "\\" + match[0], line)
    return "".join(_ENTITIES.get(char, char) for char in escaped)
