"""Groups drawn as text, "prompt|response response", each letter a token; and groups of any size."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from steerlm2.data.packing import Group


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def text(tokens: Any) -> str:
    return "".join(chr(token) for token in tokens)


def group(drawn: str, index: int = 0, **values: Any) -> Group:
    prompt, responses = drawn.split("|")
    return Group(ids(prompt), [ids(response) for response in responses.split()], index, **values)


def two_groups() -> list[Group]:
    return [group("ab|cde f"), group("g|hi jk lmn")]


lengths = st.integers(min_value=1, max_value=7)


groups_of_any_size = st.lists(
    st.builds(
        lambda prompt, responses: Group([1] * prompt, [[2] * length for length in responses]),
        lengths,
        st.lists(lengths, min_size=2, max_size=6),
    ),
    max_size=12,
).map(lambda groups: [Group(g.prompt, g.responses, index) for index, g in enumerate(groups)])
