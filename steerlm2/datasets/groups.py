"""Groups of responses for SteerLM 2.0, tokenised, in memory."""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from steerlm2.data.conversations import Conversation
from steerlm2.data.packing import Group
from steerlm2.data.records import (
    ASSISTANT,
    BROKEN,
    CUT_OFF,
    LENGTH,
    LOG_PROB_KEYS,
    OTHER_TOKENS,
    UNKNOWN_TOKENS,
    Record,
    Response,
    Turn,
    causes_text,
    flaw_of,
    read_records,
)
from steerlm2.data.synthetic import synthetic_records
from steerlm2.data.templates import (
    Template,
    encode_prompt,
    encode_response,
    extra_id_template,
    sampled_text,
    token_ids_digest,
)
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.losses import target_weights

TOO_LONG = "too long"
OTHER_TOKENIZER = "sampled with another template or tokenizer"


@dataclass
class SteerLM2Dataset(Sequence[Group]):
    """Tokenised groups, and the numbers of responses and groups that were left out.

    A response that doesn't fit into `max_seq_len` is left out, because a part of it wouldn't match
    its stored log Q', and so is one that isn't what was sampled (`ResponseEncoder`). A group with
    fewer than two responses is left out too.
    """

    records: list[Record]
    groups: list[Group]
    tokenizer: Tokenizer
    template: Template
    left_out: Mapping[str, int]
    """[cause] -> responses."""
    dropped_groups: int
    unchecked: Mapping[str, int]
    """[why] -> responses that are kept, though their texts may encode to other tokens than were
    sampled."""

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
        unchecked = f", {causes_text(self.unchecked)}" if self.unchecked else ""
        return (
            f"{len(self.groups)} groups with {responses} responses{unchecked} "
            f"(responses left out: {causes_text(self.left_out)}; groups with too few left: "
            f"{self.dropped_groups})"
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
    *,
    min_responses: int = 2,
) -> SteerLM2Dataset:
    """Records as groups; see `SteerLM2Dataset` for what is left out.

    Args:
        min_responses: of a group; training needs two.

    Raises:
        ValueError: where no group is left.
    """
    template = template or extra_id_template()
    encoder = ResponseEncoder(template, tokenizer)
    groups = []
    left_out: Counter[str] = Counter()
    unchecked: Counter[str] = Counter()
    for index, record in enumerate(records):
        prompt = _prompt(record, tokenizer, template)
        responses: dict[int, Sequence[int]] = {}
        for i, response in enumerate(record.responses):
            tokens, cause = encoder.encode(record, response)
            if cause is None and len(prompt) + len(tokens) > max_seq_len:
                cause = TOO_LONG
            if cause is None:
                responses[i] = _compact(tokens)
            else:
                left_out[cause] += 1
        if len(responses) >= min_responses:
            group = Group(prompt, [*responses.values()], index, [*responses])
            groups.append(_with_stored_log_probs(group, record))
            for i, tokens in responses.items():
                if flaw_of(record.responses[i]) == UNKNOWN_TOKENS:
                    unchecked[UNKNOWN_TOKENS] += 1
                elif record.responses[i].token_ids not in (None, tokens):
                    unchecked[OTHER_TOKENIZER] += 1
    if not groups:
        raise ValueError(
            f"{source}: none of its {len(records)} records has {_number(min_responses)} that fit "
            f"into max_seq_len={max_seq_len} tokens together with their prompt and are what was "
            f"sampled (left out: {causes_text(left_out)}){_remedy(left_out)}"
        )
    dropped_groups = len(records) - len(groups)
    return SteerLM2Dataset(
        records, groups, tokenizer, template, left_out, dropped_groups, unchecked
    )


class ResponseEncoder:
    """The tokens that a response is scored and trained on, or why it is left out.

    A sampled response is a sample of its log Q' only as the very tokens that were sampled:

    1. A text that isn't valid UTF-8 (`Response.is_broken`) is never used.
    2. A response whose `token_ids` are known, and of this template and tokenizer (the record's
       digest says so), is these tokens. One that was cut off at the largest number of tokens is
       used too, without a stop token; it is in a file only where sampling was told to keep it.
       Tokens that aren't those of the record's text (it was edited) are not used.
    3. Any other is what its text encodes to, with end of turn and stop token. It isn't used where
       it is known that something else was sampled: it was cut off, or its text encoded to other
       tokens than were sampled already where it was sampled.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self.template = template
        self.tokenizer = tokenizer

    def encode(self, record: Record, response: Response) -> tuple[Sequence[int], str | None]:
        """The tokens, the stop token included, and None; or nothing, and why it isn't used."""
        template, tokenizer = self.template, self.tokenizer
        if response.is_broken:
            return [], BROKEN
        exact = response.token_ids is not None and record.token_ids_digest == self._digest
        if response.is_cut_off and not (exact and response.finish_reason == LENGTH):
            return [], CUT_OFF
        if response.token_ids is None or not exact:
            if response.encodes_otherwise:
                return [], OTHER_TOKENS
            return encode_response(template, tokenizer, response.value), None
        complete = not response.is_cut_off
        text, whole = sampled_text(template, tokenizer, response.token_ids, complete=complete)
        if not whole or text != response.value:
            return [], OTHER_TOKENS
        return response.token_ids, None

    @functools.cached_property
    def _digest(self) -> str:
        return token_ids_digest(self.template, self.tokenizer)


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


def _number(min_responses: int) -> str:
    words = {1: "a response", 2: "two responses"}
    return words.get(min_responses, f"{min_responses} responses")


def _remedy(left_out: Mapping[str, int]) -> str:
    return "; raise max_seq_len" if left_out.get(TOO_LONG) else ""


def _prompt(record: Record, tokenizer: Tokenizer, template: Template) -> Sequence[int]:
    return _compact(
        encode_prompt(template, tokenizer, record.system, record.prompt_turns, record.label)
    )


def _compact(tokens: Sequence[int]) -> Sequence[int]:
    """An array of 4 bytes a token; a list takes 36, and every process has the whole data set."""
    return tokens if isinstance(tokens, array) else array("i", tokens)


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
