"""Texts mean nothing to a terminal or to Markdown."""

from __future__ import annotations

import pytest

from steerlm2.escaping import markdown_text, one_line, printable


def test_control_characters_are_replaced() -> None:
    """The clear-screen code, the C1 form of it, a bell; umlauts and line ends stay."""
    assert printable("a\x1b[2Jb\x9b2Jc\x07\r") == "a\ufffd[2Jb\ufffd2Jc\ufffd\ufffd"
    assert printable("ä漢\n\tx") == "ä漢\n\tx"


def test_markup_is_text_in_markdown() -> None:
    text = "<script>a|b</script> [x](javascript:y) `c` **d** _e_ $f$ ~~g~~ \\h &lt;"
    assert markdown_text(text) == (
        r"&lt;script&gt;a\|b&lt;/script&gt; \[x\](javascript:y) \`c\` \*\*d\*\* \_e\_ \$f\$ "
        r"\~\~g\~\~ \\h &amp;lt;"
    )


def test_names_stay_readable_in_markdown() -> None:
    for name in ("steering_mae", "meta-llama/Llama-3.2-1B", "0.500", "ac_sft (this model)"):
        assert markdown_text(name) == name


def test_markdown_stays_on_its_line() -> None:
    assert markdown_text("a\n\n# b\r\x1b[0m\u2028c") == "a # b \ufffd\\[0m c"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n b\x1b[0m\ud800", "a b\ufffd[0m\ufffd"),
        ("x" * 300, "x" * 197 + "..."),
        ("é 漢", "é 漢"),
    ],
)
def test_texts_of_servers_are_shown_in_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown
    assert one_line(text).encode()
