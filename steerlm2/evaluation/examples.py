"""A few requests with the answer of each model, side by side.

They are SteerLM2 records with one response a model, which has the model's name as its `model`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from steerlm2.data.records import Record

MODEL = "model"
"""JSON key of a response: who gave it."""


def request_of(record: Record) -> tuple[Any, ...]:
    """What a record asks for: system text, turns and label."""
    turns = tuple((turn.role, turn.value) for turn in record.prompt_turns)
    return record.system, turns, record.label


def choose_examples(records: Mapping[str, Sequence[Record]], count: int = 6) -> list[Record]:
    """So many requests, evenly spaced in the order of the first models; no score has a say in it.

    Requests that the most models answered are chosen; the first answer of each is taken.

    Args:
        records: the answers of each model, by its name.
    """
    found: dict[tuple[Any, ...], Record] = {}
    for model, own in records.items():
        for record in own:
            if not record.responses:
                continue
            alone = Record(record.system, record.prompt_turns, record.label, [])
            together = found.setdefault(request_of(record), alone)
            if all(answer.extra[MODEL] != model for answer in together.responses):
                first = record.responses[0]
                named = dataclasses.replace(
                    first, token_ids=None, extra={**first.extra, MODEL: model}
                )
                together.responses.append(named)
    most = max((len(record.responses) for record in found.values()), default=0)
    candidates = [record for record in found.values() if len(record.responses) == most]
    chosen = min(count, len(candidates))
    return [candidates[i * len(candidates) // chosen] for i in range(chosen)]
