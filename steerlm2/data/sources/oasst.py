"""Open Assistant conversation trees (the published export of OASST1 and OASST2).

One tree a line: `prompt` with nested `replies`; a message has `role` (prompter or assistant),
`text`, and human `labels`: name -> {"value": 0..1, "count": raters}.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm2.attributes import (
    AttributeSchema,
    as_schema,
    beta_log_prob,
    encode_label,
    parse_label,
)
from steerlm2.data.records import (
    ASSISTANT,
    USER,
    LineProblems,
    Record,
    Response,
    Turn,
    iter_json_lines,
)
from steerlm2.data.sources import DEFAULT_SYSTEM_PROMPT

ROLES = {"prompter": USER, "assistant": ASSISTANT}

_log = logging.getLogger(__name__)


def oasst_groups(
    source: str | Path,
    *,
    label: str = "sampled",
    schema: AttributeSchema | Mapping[str, Any] | None = None,
    seed: int = 0,
    concentration: float = 24.0,
    bins: str = "midpoint",
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> Iterator[Record]:
    """Every prompter message with at least 2 human-labelled replies, as a SteerLM2 record.

    The human labels, scaled to the schema's range and not rounded, become the `scores` of a
    response, and log P(a|x,y) is their Beta likelihood (`beta_log_prob`). log P(y|x) and
    log Q'(y|a,x) stay open. A record's label names only attributes that every reply of the group
    has a score for; a group without any is left out, and the log says how many were.

    Args:
        source: .jsonl or .jsonl.gz; read as a stream, one tree at a time.
        label: the label a: "sampled" takes the rounded human labels of one reply of the group,
            drawn with `seed`; "best" those of the reply with the highest quality; anything else
            is a label string for all groups.
        schema: the attributes to keep and their range (a mapping in a config).
        seed: a group's draw depends on it and on the group's message id alone.
        concentration: of the Beta likelihood.
        bins: of the Beta likelihood.
        system_prompt: of every record.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for arguments that make no sense; after the last record, naming the lines that
            aren't conversation trees.
    """
    schema = as_schema(schema)
    if label not in ("sampled", "best"):
        try:
            encode_label(parse_label(label), schema)
        except ValueError as error:
            raise ValueError(
                f"label must be 'sampled', 'best' or a label string: {error}"
            ) from error
    return _groups(source, label, schema, seed, concentration, bins, system_prompt)


def _groups(
    source: str | Path,
    label: str,
    schema: AttributeSchema,
    seed: int,
    concentration: float,
    bins: str,
    system_prompt: str,
) -> Iterator[Record]:
    problems = LineProblems(source)
    num_left_out = 0
    for line_number, tree in iter_json_lines(source, problems):
        try:
            threads = list(_threads(tree))
        except ValueError as error:
            problems.add(line_number, str(error))
            continue
        for thread in threads:
            replies = [
                reply
                for reply in thread.replies
                if _scores(reply, schema) and reply["text"].strip()
            ]
            if len(replies) < 2:
                continue
            scores = [_scores(reply, schema) for reply in replies]
            values = _label_values(label, scores, schema, f"{seed}:{thread.message_id}")
            if not values:
                num_left_out += 1
                continue
            log_p = beta_log_prob(
                [[score[name] for name in values] for score in scores],
                [*values.values()],
                concentration,
                bins,
                schema,
            ).sum(dim=-1)
            yield Record(
                system=system_prompt,
                prompt_turns=thread.turns,
                label=encode_label(values, schema),
                responses=[
                    Response(
                        value=reply["text"],
                        log_p_attributes=log_p_attributes,
                        scores=score,
                        extra={"message_id": reply.get("message_id")},
                    )
                    for reply, score, log_p_attributes in zip(
                        replies, scores, log_p.tolist(), strict=True
                    )
                ],
                extra={"message_id": thread.message_id},
            )
    if num_left_out:
        _log.warning(
            "%s: left out %d prompts whose replies share no score for the label",
            source,
            num_left_out,
        )
    problems.raise_if_any()


@dataclass
class _Thread:
    """A prompter message, the turns that lead to it (it is the last one), and its replies."""

    message_id: str | None
    turns: list[Turn]
    replies: list[dict[str, Any]]


def _threads(tree: object) -> Iterator[_Thread]:
    """All prompter messages of a tree with the assistant's replies, in the order of the file.

    Raises:
        ValueError: for the first place where the tree isn't one.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("prompt"), dict):
        raise ValueError("a conversation tree must be a JSON object with a 'prompt' object")
    pending: list[tuple[dict[str, Any], list[Turn], str]] = [(tree["prompt"], [], "prompt")]
    while pending:
        message, before, where = pending.pop()
        expected = ("prompter", "assistant")[len(before) % 2]
        role, text, replies = (message.get(key) for key in ("role", "text", "replies"))
        if role != expected:
            raise ValueError(f"{where}: 'role' must be {expected!r} here, got {role!r}")
        if not isinstance(text, str):
            raise ValueError(f"{where}: 'text' must be text, got {text!r}")
        replies = replies or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise ValueError(f"{where}: 'replies' must be a list of messages")
        _check_labels(message, where)
        turns = [*before, Turn(ROLES[role], text)]
        if role == "prompter":
            yield _Thread(message.get("message_id"), turns, replies)
        pending += [
            (reply, turns, f"{where}.replies[{i}]") for i, reply in reversed([*enumerate(replies)])
        ]


def _check_labels(message: dict[str, Any], where: str) -> None:
    labels = message.get("labels") or {}
    if not isinstance(labels, dict):
        raise ValueError(f"{where}: 'labels' must be an object")
    for name, entry in labels.items():
        value = entry.get("value") if isinstance(entry, dict) else None
        if not isinstance(value, int | float) or not 0 <= value <= 1:  # NaN fails too
            raise ValueError(f"{where}: the label {name!r} must have a value from 0 to 1")


def _scores(reply: dict[str, Any], schema: AttributeSchema) -> dict[str, float]:
    """The reply's human labels on the scale of the schema, in its order."""
    labels = reply.get("labels") or {}
    span = schema.max_value - schema.min_value
    return {
        name: schema.min_value + labels[name]["value"] * span
        for name in schema.names
        if name in labels
    }


def _label_values(
    label: str, scores: list[dict[str, float]], schema: AttributeSchema, draw_seed: str
) -> dict[str, int]:
    """The values of the record's label, for the attributes that all replies have a score for."""
    shared = [name for name in schema.names if all(name in score for score in scores)]
    if label == "sampled":
        chosen = random.Random(draw_seed).choice(scores)
    elif label == "best":
        chosen = max(scores, key=lambda score: score.get("quality", -math.inf))
    else:
        chosen = {name: float(value) for name, value in parse_label(label).items()}
    return {name: round(chosen[name]) for name in shared if name in chosen}
