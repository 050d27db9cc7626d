"""Scores and log-probs of answers that were sampled already, by models that are loaded for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from steerlm2.attributes import AttributeSchema
from steerlm2.data.packing import Group
from steerlm2.data.records import Record
from steerlm2.data.templates import (
    Template,
    encode_prompt,
    groups_for_scoring,
    token_ids_digest,
)
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.datasets.groups import ResponseEncoder
from steerlm2.distributed.world import World
from steerlm2.inference.attribute_model import AttributeModel
from steerlm2.inference.language_model import LanguageModel
from steerlm2.inference.server_client import ClassifyClient


def with_attribute_scores(
    records: Sequence[Record],
    model: AttributeModel | ClassifyClient,
    tokenizer: Tokenizer,
    template: Template,
    schema: AttributeSchema,
    world: World,
    *,
    max_seq_len: int,
) -> list[Record]:
    """The records with an attribute model's `scores` of all answers; nothing beside the main rank
    where a server scores.

    Raises:
        ValueError: for scores that aren't finite.
    """
    groups = [
        group
        for record in records
        if record.responses
        for group in groups_for_scoring(
            template,
            tokenizer,
            record.system,
            record.prompt_turns,
            [answer.value for answer in record.responses],
            max_seq_len=max_seq_len,
        )[0]
    ]
    if isinstance(model, ClassifyClient):
        tokens = [[*group.prompt, *text] for group in groups for text in group.responses]
        rows = iter(world.on_main(lambda: model.classify(tokens)) or [])
        if not world.is_main:
            return []
    else:
        rows = (row for group in model.score(groups) for row in group)
    scored = []
    for record in records:
        scores = [dict(zip(schema.names, next(rows), strict=True)) for _ in record.responses]
        for each in scores:
            check_scores(each, schema)
        scored.append(with_scores(record, scores))
    return scored


def check_scores(scores: dict[str, float], schema: AttributeSchema) -> None:
    """Check that an answer has a finite score for each attribute.

    Raises:
        ValueError: saying what else could score it.
    """
    if lacking := [name for name in schema.names if name not in scores]:
        raise ValueError(
            f"a response has no score for {', '.join(lacking)}: give an attribute_model or an "
            "exact_scorer, or set schema.names"
        )
    if not all(math.isfinite(scores[name]) for name in schema.names):
        raise ValueError(f"the scores of a response are not finite: {scores}")


def with_scores(record: Record, scores: Sequence[dict[str, float]]) -> Record:
    answers = [
        dataclasses.replace(answer, scores=own)
        for answer, own in zip(record.responses, scores, strict=True)
    ]
    return dataclasses.replace(record, responses=answers)


def with_reference_log_probs(
    records: Sequence[Record], model: LanguageModel, *, max_seq_len: int
) -> list[Record]:
    """The records with log P(y|x) of the answers, without a label in the prompt.

    Sampled tokens of the model's own template and tokenizer are taken as they are, also where their
    text isn't whole; other answers as `steerlm2.datasets.ResponseEncoder` does. It is None where
    that one leaves an answer out, or it doesn't fit into `max_seq_len`.
    """
    encoder = ResponseEncoder(model.template, model.tokenizer)
    digest = token_ids_digest(model.template, model.tokenizer)
    groups = []
    for index, record in enumerate(records):
        turns = [dataclasses.replace(turn, label=None) for turn in record.prompt_turns]
        prompt = encode_prompt(model.template, model.tokenizer, record.system, turns, None)
        texts: dict[int, Sequence[int]] = {}
        for i, answer in enumerate(record.responses):
            tokens: Sequence[int] | None = answer.token_ids
            if tokens is None or record.token_ids_digest != digest:
                tokens, _ = encoder.encode(record, answer)
            if tokens and len(prompt) + len(tokens) <= max_seq_len:
                texts[i] = tokens
        if texts:
            groups.append(Group(prompt, [*texts.values()], index, [*texts]))
    found = [
        dataclasses.replace(
            record,
            responses=[dataclasses.replace(each, log_p_response=None) for each in record.responses],
        )
        for record in records
    ]
    for group, log_probs in zip(groups, model.score(groups), strict=True):
        for i, log_prob in zip(group.responses_kept, log_probs, strict=True):
            found[group.index].responses[i].log_p_response = log_prob
    return found
