"""The interface of sources of data. Each source is a module with one or two functions.

    NAME_groups(source, *, system_prompt=..., ...) -> Iterator[Record]
        SteerLM2 groups: prompts with several responses whose log P(a|x,y) is known (as a
        `SplitRecord` if the source has splits)
    NAME_conversations(source, *, system_prompt=..., ...) -> Iterator[Unit]
        labelled conversations, for supervised fine-tuning and the attribute model

A source reads its input as a stream, keeps the order of its input, and reports all bad lines
together, after its last good record (`LineProblems`). Its output depends on its arguments only. The
recipe prepare_data calls the function that its config names as `builder`, which may also be outside
of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steerlm2.data.records import Record

if TYPE_CHECKING:
    from steerlm2.data.conversations import Conversation
    from steerlm2.data.sources.rows import Split

DEFAULT_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The system prompt of the published SteerLM models."""


@dataclass
class Unit:
    """Conversations that are kept together, in order, such as a pair or the threads of a tree."""

    conversations: list[Conversation]
    split: Split | None = None
    """The source's split; None if it has no splits."""
    as_published: bool = False
    """Whether contents that spell markers of the regression format are written into it as they
    are: HelpSteer2 has several turns in one text so."""
    is_pair: bool = False
    """Whether the labels are the strength of a preference, from -3 to 3, not attribute values."""


@dataclass
class SplitRecord(Record):
    """A SteerLM2 record of a source that has splits."""

    split: Split | None = None
