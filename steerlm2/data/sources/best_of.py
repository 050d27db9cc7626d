"""Bootstrapping: the sampled answers whose scores are nearest to the requested label.

It is the last step of SteerLM (Dong et al. 2023, https://arxiv.org/abs/2310.05344, step 4): a model
is fine-tuned on its own answers to requested labels, filtered by the attribute model.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steerlm2.attributes import AttributeSchema, as_schema, label_of_scores, parse_label
from steerlm2.data.conversations import Conversation
from steerlm2.data.jsonl import LineProblems
from steerlm2.data.records import (
    ASSISTANT,
    BROKEN,
    CUT_OFF,
    Record,
    Response,
    Turn,
    causes_text,
    count_flaws,
    flaw_of,
    parse_record,
)
from steerlm2.data.sources.base import Unit
from steerlm2.data.sources.rows import iter_rows

_CONVERSATION_KEYS = {"conversations", "system", "mask", "type"}

_log = logging.getLogger(__name__)


def best_of_responses(
    source: str | Path,
    *,
    keep: int = 1,
    max_distance: float = 0.5,
    schema: AttributeSchema | Mapping[str, Any] | None = None,
) -> Iterator[Unit]:
    """The responses of each SteerLM2 record that are nearest to its label, as conversations.

    A response's distance is the mean of |score - wanted value| over the label's attributes, scores
    clipped to their ranges, and where these differ in width scaled to their mean width
    (`AttributeSchema.error_scales` of the label's attributes). Responses that were cut off, or
    aren't valid UTF-8, are left out. A response's turn is labelled with its own rounded scores, for
    all attributes of the schema that it has a score for. The numbers of responses and records that
    were left out are logged.

    Args:
        source: SteerLM2 records with `scores` (sample_responses, then annotate_attributes): a file,
            or a folder of train.jsonl and val.jsonl (`iter_rows`).
        keep: the largest number of responses of a record.
        max_distance: a response further from its label is left out.
        schema: the attributes and their range (a mapping in a config).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for invalid options; after the last record, naming the lines that
            aren't scored records with a label, or where no response is within `max_distance`.
    """
    if keep < 1 or not max_distance >= 0:
        raise ValueError(
            f"keep must be at least 1 and max_distance at least 0, got {keep} and {max_distance}"
        )
    return _units(source, keep, max_distance, as_schema(schema))


def _units(
    source: str | Path, keep: int, max_distance: float, schema: AttributeSchema
) -> Iterator[Unit]:
    problems = LineProblems(source)
    num_records, num_left_out = 0, 0
    nearest = math.inf
    flaws: Counter[str] = Counter()
    for row in iter_rows(source, problems):
        num_records += 1
        try:
            record = parse_record(row.value, require=(), min_responses=1)
            ranked = _by_distance(record, schema)
        except ValueError as error:
            problems.add(row.number, error, row.path)
            continue
        flaws.update(count_flaws(record.responses))
        nearest = min([nearest, *(distance for distance, _ in ranked)])
        chosen = [response for distance, response in ranked[:keep] if distance <= max_distance]
        if chosen:
            yield Unit([_conversation(record, each, schema) for each in chosen], row.split)
        else:
            num_left_out += 1
    problems.raise_if_any()
    if num_records and num_left_out == num_records:
        if nearest == math.inf:
            raise ValueError(
                f"{source}: all responses of its {num_records} records were cut off or aren't "
                f"valid UTF-8 ({causes_text(flaws)})"
            )
        raise ValueError(
            f"{source}: no response of its {num_records} records is within max_distance="
            f"{max_distance:g} of its label; the nearest is {nearest:.2f} away. Raise "
            "max_distance, or sample more responses"
        )
    if flaws:
        _log.warning(
            "%s: of the responses: %s; those that were cut off or aren't valid UTF-8 are left out",
            source,
            causes_text(flaws),
        )
    if num_left_out:
        _log.warning(
            "%s: left out %d of %d records, none of whose responses is within %g of the label",
            source,
            num_left_out,
            num_records,
            max_distance,
        )


def _by_distance(record: Record, schema: AttributeSchema) -> list[tuple[float, Response]]:
    """The complete and valid responses with their distances, sorted by distance (stable).

    Raises:
        ValueError: without a label of the schema, or without the scores of its attributes; for
            labels of earlier turns that the schema doesn't have.
    """
    if record.label is None:
        raise ValueError("no label, so no response can be near it")
    wanted = parse_label(record.label, schema)
    for turn in record.prompt_turns:
        if turn.label is not None:
            parse_label(turn.label, schema)
    lacking = sorted(
        {name for r in record.responses for name in wanted if name not in (r.scores or {})}
    )
    if lacking:
        raise ValueError(f"no score for {', '.join(lacking)} (recipe annotate_attributes adds it)")
    complete = [r for r in record.responses if flaw_of(r) not in (BROKEN, CUT_OFF)]
    distances = [_distance(r.scores or {}, wanted, schema) for r in complete]
    return sorted(zip(distances, complete, strict=True), key=lambda pair: pair[0])


def _distance(
    scores: Mapping[str, float], wanted: Mapping[str, int], schema: AttributeSchema
) -> float:
    scales = schema.select(wanted).error_scales
    errors = [abs(schema.clip(name, scores[name]) - value) for name, value in wanted.items()]
    return sum(e * scale for e, scale in zip(errors, scales, strict=True)) / len(wanted)


def _conversation(record: Record, response: Response, schema: AttributeSchema) -> Conversation:
    scores = response.scores or {}
    names = tuple(name for name in schema.names if name in scores)
    label = label_of_scores([scores[name] for name in names], schema.select(names))
    extra = {key: value for key, value in record.extra.items() if key not in _CONVERSATION_KEYS}
    turns = [*record.prompt_turns, Turn(ASSISTANT, response.value, label)]
    return Conversation(turns, record.system, extra)
