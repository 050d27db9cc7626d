"""What the SteerLM 2.0 loss needs to know of how its responses were sampled.

The paper's loss is right under any sampler: of responses drawn from S, w' estimates P S / Q' and b'
Q_theta S / Q', which are equal for Q_theta = P. A `baseline` below 1 isn't, because the mean of
Q_theta / Q' is the mass of Q_theta over samples of Q' only. It needs one of

- samples of Q': temperature 1, and nothing cut off by top_p or top_k;
- log S in the place of log Q', in w' and b'. E_S [Q_theta / S] is the mass of Q_theta over what S
  can give, and E_S [f P / S] is E_P f there: importance sampling with the proposal S, of which
  1 - (1 - S)^n corrects for duplicates too. At another temperature S gives all that Q' gives, so
  both hold. With top_p or top_k it doesn't: the mass of Q_theta over S's few answers would be held
  to what it was, or pulled up, while what was cut is never seen, and no log-prob can make up for
  it. That is refused.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from steerlm2.data.packing import Group
from steerlm2.data.records import Record, causes_text
from steerlm2.losses import target_weights


@dataclass(frozen=True, kw_only=True)
class SamplingRules:
    """What a run takes its responses for."""

    baseline: float = 1.0
    """Share of the baseline of the loss."""
    samples_per_prompt: int | Literal["recorded"] | None = None
    """Responses drawn for each prompt, where the loss corrects for left-out duplicates."""
    use_sampler_log_probs: bool = False
    assume_samples_of_q: bool = False


def as_sampled(
    groups: list[Group], records: Sequence[Record], rules: SamplingRules, where: str
) -> tuple[list[Group], list[str]]:
    """The groups with `drawn`, and `log_proposal` with its w', where the rules ask for them.

    Args:
        groups: with log-probs and w'.
        records: that the groups are of, by their `index`.
        where: the key and file of the groups, for messages.

    Returns:
        The groups, and warnings.

    Raises:
        ValueError: where the records say something else than the rules need, or nothing.
    """
    of_groups = [records[group.index] for group in groups]
    if rules.use_sampler_log_probs:
        _refuse(of_groups, _unlike_all_answers, f"{where}: steerlm2.use_sampler_log_probs needs "
                "answers drawn from all that the model can give, at any temperature above 0, but "
                "these were drawn at: {found}. Sample with top_p=1.")  # fmt: skip
        groups = [_against_sampler(group, records[group.index], where) for group in groups]
    elif rules.baseline < 1 and not rules.assume_samples_of_q:
        _refuse(of_groups, _unlike_q, f"{where}: loss.baseline={rules.baseline:g} needs samples of "
                "Q' at temperature 1 and top_p 1, but these were drawn at: {found}. Sample with "
                "temperature=1 top_p=1; or set steerlm2.use_sampler_log_probs=true where only the "
                "temperature is another and the records have sampler_log_prob; or "
                "steerlm2.assume_samples_of_q=true if you know better.")  # fmt: skip
    warnings = []
    if rules.samples_per_prompt is not None:
        number = rules.samples_per_prompt
        groups = [_with_drawn(group, records[group.index], number, where) for group in groups]
    elif rules.baseline < 1:
        sampling = [record.sampling for record in of_groups if record.sampling is not None]
        duplicates = sum(each.left_out.get("duplicates", 0) for each in sampling)
        if duplicates:
            drawn = sum(each.drawn for each in sampling)
            warnings.append(
                f"WARNING: {where}: {duplicates} duplicates of {drawn} draws were left out: rare "
                "answers count too much, for which loss.samples_per_prompt=recorded corrects"
            )
    return groups, warnings


def _refuse(
    records: Sequence[Record], reason: Callable[[Record], str | None], message: str
) -> None:
    causes = Counter(cause for record in records if (cause := reason(record)) is not None)
    if causes:
        found = causes_text({f"groups of {len(records)} {c}": n for c, n in causes.items()})
        raise ValueError(message.format(found=found))


def _unlike_q(record: Record) -> str | None:
    if record.sampling is None:
        return "at unknown settings (no `sampling` in their records)"
    return None if record.sampling.is_plain else f"at {record.sampling}"


def _unlike_all_answers(record: Record) -> str | None:
    sampling = record.sampling
    if sampling is None or sampling.is_cut or sampling.temperature == 0:
        return _unlike_q(record)
    return None


def _against_sampler(group: Group, record: Record, where: str) -> Group:
    found = [record.responses[i].sampler_log_prob for i in group.responses_kept]
    known = [log_prob for log_prob in found if log_prob is not None]
    if len(known) < len(found):
        raise ValueError(
            f"{where}, record {group.index + 1}: steerlm2.use_sampler_log_probs needs the "
            f"`sampler_log_prob` of every response, and {len(found) - len(known)} have none: "
            "sample_responses records it, but of a vLLM server at temperature 1 only"
        )
    assert group.log_p_attributes is not None
    assert group.log_p_response is not None
    log_p_a, log_p_y, log_s = (
        torch.tensor(each, dtype=torch.float64)
        for each in (group.log_p_attributes, group.log_p_response, known)
    )
    weights = target_weights(log_p_a, log_p_y, log_s, [len(known)]).tolist()
    return dataclasses.replace(group, log_proposal=known, weights=weights)


def _with_drawn(
    group: Group, record: Record, number: int | Literal["recorded"], where: str
) -> Group:
    place = f"{where}, record {group.index + 1}: loss.samples_per_prompt"
    sampling = record.sampling
    if sampling is not None and not sampling.distinct:
        raise ValueError(
            f"{place} corrects for duplicates that were left out, but here they weren't "
            "(distinct: false): set loss.samples_per_prompt=null"
        )
    if number == "recorded":
        if sampling is None:
            raise ValueError(
                f"{place}=recorded, but the record has no `sampling`, which sample_responses "
                "writes: give the number of draws, or null"
            )
        number = sampling.drawn
    if number < len(group.responses):
        raise ValueError(
            f"{place}: {number} draws can't give the {len(group.responses)} distinct responses "
            "that are there"
        )
    return dataclasses.replace(group, drawn=number)
