"""Groups of responses for SteerLM 2.0, tokenised, in memory."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from steerlm2.data.conversations import Conversation
from steerlm2.data.packing import Group
from steerlm2.data.records import (
    ASSISTANT,
    LOG_PROB_KEYS,
    Record,
    Turn,
    read_records,
)
from steerlm2.data.synthetic import synthetic_records
from steerlm2.data.templates import (
    Template,
    encode_prompt,
    encode_response,
    extra_id_template,
)
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.losses import target_weights


@dataclass
class SteerLM2Dataset(Sequence[Group]):
    """Tokenised groups, and the numbers of responses and groups that were dropped.

    A response that doesn't fit into `max_seq_len` is dropped, because a part of it wouldn't match
    its stored log Q'. A group with fewer than two responses is dropped too.
    """

    records: list[Record]
    groups: list[Group]
    tokenizer: Tokenizer
    template: Template
    dropped_responses: int
    dropped_groups: int

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        return self.groups[index]

    def conversations(self) -> list[Conversation]:
        """Each group's prompt, and an empty answer under its label."""
        records = (self.records[group.index] for group in self.groups)
        return [
            Conversation([*r.prompt_turns, Turn(ASSISTANT, "", r.label)], r.system) for r in records
        ]

    def without_label(self) -> list[Group]:
        """The same groups without any labels in their prompts, for log P(y|x)."""
        groups = []
        for group in self.groups:
            record = self.records[group.index]
            turns = [dataclasses.replace(turn, label=None) for turn in record.prompt_turns]
            record = dataclasses.replace(record, prompt_turns=turns, label=None)
            prompt = _prompt(record, self.tokenizer, self.template)
            groups.append(dataclasses.replace(group, prompt=prompt))
        return groups

    def longest(self) -> int:
        """Tokens of the longest prompt with a response."""
        return max(len(g.prompt) + max(map(len, g.responses)) for g in self.groups)

    def summary(self) -> str:
        responses = sum(len(group.responses) for group in self.groups)
        return (
            f"{len(self.groups)} groups with {responses} responses "
            f"(dropped as too long: {self.dropped_responses} responses, "
            f"{self.dropped_groups} groups)"
        )


def steerlm2_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_seq_len: int,
    template: Template | None = None,
    require: Sequence[str] = tuple(LOG_PROB_KEYS),
    num_samples: int | None = None,
    seed: int = 0,
) -> SteerLM2Dataset:
    """SteerLM2 records of a JSONL file.

    Args:
        source: a .jsonl or .jsonl.gz file.
        max_seq_len: tokens of a prompt with one of its responses.
        template: defaults to the extra_id template.
        require: the log-probs that every response must have.
        num_samples: use only so many records, drawn with `seed`; None: all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming every bad line, or where no group is left.
    """
    records = read_records(source, require=require)
    if num_samples is not None and num_samples < len(records):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(records), generator=generator)[:num_samples]
        records = [records[i] for i in sorted(chosen.tolist())]
    return tokenize_records(records, tokenizer, template, max_seq_len, source)


def synthetic_dataset(
    tokenizer: Tokenizer,
    *,
    num_records: int,
    responses_per_prompt: int,
    max_seq_len: int,
    template: Template | None = None,
    split: Literal["train", "validation"] = "train",
    seed: int = 0,
    num_samples: int | None = None,
) -> SteerLM2Dataset:
    """Templated questions and answers with computable attributes, without a file.

    They have log P(a|x,y) only, so the run must score them with its start weights
    (`steerlm2.score_with_start_model`).
    """
    count = num_records if num_samples is None else min(num_records, num_samples)
    records = synthetic_records(count, responses_per_prompt, seed, split=split)
    return tokenize_records(records, tokenizer, template, max_seq_len, "the synthetic data set")


def tokenize_records(
    records: list[Record],
    tokenizer: Tokenizer,
    template: Template | None,
    max_seq_len: int,
    source: str,
) -> SteerLM2Dataset:
    """Records as groups; see `SteerLM2Dataset` for what is dropped.

    Raises:
        ValueError: where no group is left.
    """
    template = template or extra_id_template()
    groups = []
    dropped_responses = 0
    for index, record in enumerate(records):
        prompt = _prompt(record, tokenizer, template)
        responses = [
            _compact(encode_response(template, tokenizer, r.value)) for r in record.responses
        ]
        kept = [i for i, r in enumerate(responses) if len(prompt) + len(r) <= max_seq_len]
        dropped_responses += len(responses) - len(kept)
        if len(kept) >= 2:
            group = Group(prompt, [responses[i] for i in kept], index, kept)
            groups.append(_with_stored_log_probs(group, record))
    if not groups:
        raise ValueError(
            f"{source}: none of its {len(records)} records has two responses that fit into "
            f"max_seq_len={max_seq_len} tokens together with their prompt; raise max_seq_len"
        )
    dropped_groups = len(records) - len(groups)
    return SteerLM2Dataset(records, groups, tokenizer, template, dropped_responses, dropped_groups)


def with_log_probs(
    group: Group, *, log_p_response: Sequence[float], log_q: Sequence[float]
) -> Group:
    """The group with these log-probs, and the target weights w' computed from them."""
    assert group.log_p_attributes is not None
    values = [torch.tensor(v, dtype=torch.float64) for v in
              (group.log_p_attributes, log_p_response, log_q)]  # fmt: skip
    weights = target_weights(values[0], values[1], values[2], [len(group.responses)])
    return dataclasses.replace(
        group, log_p_response=log_p_response, log_q=log_q, weights=weights.tolist()
    )


def _prompt(record: Record, tokenizer: Tokenizer, template: Template) -> Sequence[int]:
    return _compact(
        encode_prompt(template, tokenizer, record.system, record.prompt_turns, record.label)
    )


def _compact(tokens: list[int]) -> Sequence[int]:
    """An array of 4 bytes a token; a list takes 36, and every process has the whole data set."""
    return array("i", tokens)


def _with_stored_log_probs(group: Group, record: Record) -> Group:
    """The group with those log-probs that its record has for all its responses."""
    responses = [record.responses[i] for i in group.responses_kept]
    log_p_attributes = _known([r.log_p_attributes for r in responses])
    log_p_response = _known([r.log_p_response for r in responses])
    log_q = _known([r.log_q for r in responses])
    if log_p_attributes is None:
        return group
    group = dataclasses.replace(group, log_p_attributes=log_p_attributes)
    if log_p_response is None or log_q is None:
        return group
    return with_log_probs(group, log_p_response=log_p_response, log_q=log_q)


def _known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None
