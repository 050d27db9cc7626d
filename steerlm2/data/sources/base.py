"""Sources: where data comes from. Each is a module of its own with one or two functions.

    NAME_groups(source, *, system_prompt=..., ...) -> Iterator[Record]
        SteerLM2 groups: prompts with several responses whose log P(a|x,y) is known (a `SplitRecord`
        where the source says which are for validation)
    NAME_conversations(source, *, system_prompt=..., ...) -> Iterator[Unit]
        labelled conversations, for supervised fine-tuning and the attribute model

A source reads its input as a stream, keeps the order of its input, and reports all bad lines at
once, after its last good record (`LineProblems`). It depends on its arguments alone. The recipe
prepare_data calls the function that its config names as `builder`; functions outside this package
work as well.
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
"""The published SteerLM models were trained with this one."""


@dataclass
class Unit:
    """Conversations that stay together and in order, such as a pair or the threads of a tree."""

    conversations: list[Conversation]
    split: Split | None = None
    """Where the source has it, if the source has splits."""


@dataclass
class SplitRecord(Record):
    """A SteerLM2 record of a source that has splits."""

    split: Split | None = None
