"""Digests of training data and of templates: whether a resumed run goes on with the same ones."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence

from steerlm2.data.packing import Dialogue, Group, RewardGroup
from steerlm2.data.records import ASSISTANT, Turn
from steerlm2.data.templates import Template

TOKENS, LABELS, LOG_PROBS = PARTS = ("tokens", "labels", "log-probs")
ORDER = "order"
"""The only digest that depends on the order of the records."""


def data_digests(records: Iterable[Dialogue | Group | RewardGroup]) -> dict[str, str]:
    """Digests of what a model is trained on: of each kind in PARTS, and of the whole in its ORDER.

    Weights w' aren't part of it: they follow from the log-probs. `drawn` counts among these.
    """
    sums, in_order = dict.fromkeys(PARTS, 0), hashlib.sha256()
    for record in records:
        own = {part: hashlib.sha256() for part in PARTS}
        for part, content in _contents(record):
            own[part].update(content)
        for part, digest in own.items():
            sums[part] += int.from_bytes(digest.digest())  # in any order the same
            in_order.update(digest.digest())
    of_parts = {part: f"{total % 2**256:064x}" for part, total in sums.items()}
    return of_parts | {ORDER: in_order.hexdigest()}


def template_digest(template: Template) -> str:
    """SHA-256 of what a template makes of a conversation with every part that one can have.

    It is of texts, so that a training state goes on with another version of the tokenizers package;
    the ids that a run is trained on are in `data_digests`. Ids that stand in a file need the
    tokenizer too: `templates.token_ids_digest`.
    """
    turns = [Turn("User", "1"), Turn(ASSISTANT, "2", "humor:3"), Turn("User", "4")]
    segments = [
        *template.prompt("5", turns, "humor:0"),
        *template.prompt("", turns[:1], None),
        *template.response("6"),
        *template.scored_response("7"),
    ]
    parts = [*template.control_tokens, *(f"{s.control}:{s.text}" for s in segments)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _contents(record: Dialogue | Group | RewardGroup) -> Iterator[tuple[str, bytes]]:
    if isinstance(record, Dialogue):
        yield TOKENS, _integers(record.tokens)
        yield TOKENS, _integers(record.target_positions)
        return
    yield TOKENS, _integers([len(record.responses)])
    for text in (record.prompt, *record.responses):
        yield TOKENS, _integers(text)
    if isinstance(record, RewardGroup):
        for values in record.labels or ():
            yield LABELS, _numbers(values)
        yield LABELS, _numbers(None if record.strength is None else [record.strength])
    else:
        for log_probs in (record.log_p_attributes, record.log_p_response, record.log_q):
            yield LOG_PROBS, _numbers(log_probs)
        if record.log_proposal is not None:
            yield LOG_PROBS, _numbers(record.log_proposal)
        if record.drawn is not None:
            yield LOG_PROBS, _integers([record.drawn])


def _integers(values: Sequence[int]) -> bytes:
    """With their number in front, so that no two lists of lists have the same bytes."""
    return array("q", [len(values)]).tobytes() + array("i", values).tobytes()


def _numbers(values: Sequence[float] | None) -> bytes:
    if values is None:
        return array("q", [-1]).tobytes()
    return array("q", [len(values)]).tobytes() + array("d", values).tobytes()
