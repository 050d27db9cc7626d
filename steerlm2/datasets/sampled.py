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

The correction for duplicates weighs a response by the probability that it was drawn with, and so
needs the same of the samples, whatever the share.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import torch

from steerlm2.data.packing import Group
from steerlm2.data.records import DUPLICATES, Record, causes_text
from steerlm2.losses import target_weights

HIGHEST_KL, HIGHEST_KL_A_TOKEN = 0.3, 0.01
"""Nats. Above both KL(S || Q') is worth a warning: more than what two programs compute differently
for one model in bfloat16, 0.003 a token of SmolLM2-135M (half the square of their difference)."""
A_FEW = 0.05
"""Share of the groups below which those that were drawn otherwise don't count."""


@dataclass(frozen=True, kw_only=True)
class SamplingRules:
    """What a run takes its responses for."""

    baseline: float = 1.0
    """Share of the baseline of the loss."""
    samples_per_prompt: int | Literal["recorded"] | None = None
    """Responses drawn for each prompt, where the loss corrects for left-out duplicates."""
    use_sampler_log_probs: bool = False
    assume_samples_of_q: bool = False
    log_q_tolerance: float = 0.05
    """Mean difference between the sampler's log-probs and log Q', nats a token, above which the
    responses are another model's."""

    @property
    def needing_samples_of_q(self) -> str:
        """The keys of the loss that need samples of what the ratios are against; "" for none."""
        share = f"loss.baseline={self.baseline:g}" if self.baseline < 1 else ""
        number = self.samples_per_prompt
        return share or (f"loss.samples_per_prompt={number}" if number is not None else "")


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
    needing = rules.needing_samples_of_q
    warnings: list[str] = []
    if rules.use_sampler_log_probs:
        if not rules.assume_samples_of_q:
            _refuse(of_groups, _unlike_all_answers, f"{where}: steerlm2.use_sampler_log_probs "
                    "needs answers drawn from all that the model can give, but these aren't: "
                    "{found}. Sample at a temperature above 0 with top_p=1; or set "
                    "steerlm2.assume_samples_of_q=true if you know that they are.")  # fmt: skip
        groups = [_against_sampler(group, records[group.index], where) for group in groups]
    elif needing and not rules.assume_samples_of_q:
        # Of the correction alone, what the config says is enough where the records say nothing.
        unlike = _unlike_q if rules.baseline < 1 else _recorded_unlike_q
        _refuse(of_groups, unlike, f"{where}: {needing} needs samples of "
                "Q' at temperature 1 and top_p 1, but these aren't: {found}. Sample with "
                "temperature=1 top_p=1; or set steerlm2.use_sampler_log_probs=true where only the "
                "temperature is another and the records have sampler_log_prob; or "
                "steerlm2.assume_samples_of_q=true if you know better.")  # fmt: skip
        warnings += _another_models(groups, records, rules, where)
    if needing and not rules.assume_samples_of_q:
        _refuse_changed(of_groups, needing, where)
    if rules.samples_per_prompt is not None:
        number = rules.samples_per_prompt
        groups = [_with_drawn(group, records[group.index], number, where) for group in groups]
        warnings += _other_numbers(of_groups, number, where)
    elif rules.baseline < 1:
        warnings += _uncorrected_duplicates(of_groups, where)
    warnings += _missing_text(groups, of_groups, where)
    return groups, warnings


def as_stored(groups: Iterable[Group], sampled: Iterable[Group]) -> Iterator[Group]:
    """The groups as their file has them, and with what `as_sampled` took from it: no log-probs of
    the start weights, which another machine computes a little differently."""
    for own, other in zip(groups, sampled, strict=True):
        yield dataclasses.replace(own, log_proposal=other.log_proposal, drawn=other.drawn)


def unlike_samples_of_q(groups: Sequence[Group], records: Sequence[Record]) -> str:
    """How many groups were drawn otherwise than at temperature 1 and top_p 1, and how; "" for none
    and for A_FEW.

    Args:
        records: that the groups are of, by their `index`.
    """
    of_groups = [records[group.index] for group in groups]
    unlike = sum(_unlike_q(record) is not None for record in of_groups)
    return _found(of_groups, _unlike_q) if unlike > A_FEW * len(of_groups) else ""


def _refuse(
    records: Sequence[Record], reason: Callable[[Record], str | None], message: str
) -> None:
    if found := _found(records, reason):
        raise ValueError(message.format(found=found))


def _found(records: Sequence[Record], reason: Callable[[Record], str | None]) -> str:
    causes = Counter(cause for record in records if (cause := reason(record)) is not None)
    return causes_text({f"of {len(records)} groups {c}": n for c, n in causes.items()}, none="")


def _unlike_q(record: Record) -> str | None:
    if record.sampling is None:
        return "at unknown settings (no `sampling` of ours in their records)"
    return None if record.sampling.is_plain else f"at {record.sampling}"


def _recorded_unlike_q(record: Record) -> str | None:
    return None if record.sampling is None else _unlike_q(record)


def _unlike_all_answers(record: Record) -> str | None:
    sampling = record.sampling
    if sampling is None or sampling.is_cut or sampling.temperature == 0:
        return _unlike_q(record)
    return None


def _another_models(
    groups: Sequence[Group], records: Sequence[Record], rules: SamplingRules, where: str
) -> Iterator[str]:
    """Compare the sampler's log-probs with log Q', which they are at temperature 1 and top_p 1.

    The check of the start weights doesn't see it where another model has sampled than has scored.
    Their mean difference is KL(S || Q') in the mean of all answers, in which noise averages out, so
    that it shows a small change, such as that of an iteration.

    Raises:
        ValueError: where they differ by more than the tolerance in the mean of all groups.
    """
    of_groups = [gaps for group in groups if (gaps := _gaps(group, records[group.index]))]
    if not of_groups:
        yield (
            f"{where}: whether these are samples of Q' itself can't be seen, as none has the "
            "`sampler_log_prob` that it was drawn with"
        )
        return
    means = [fmean(abs(gap) / tokens for gap, tokens in gaps) for gaps in of_groups]
    mean, tolerance = fmean(means), rules.log_q_tolerance
    if not mean <= tolerance:
        raise ValueError(
            f"{where}: {rules.needing_samples_of_q} needs samples of Q', but the log-probs that "
            f"they were drawn with differ from log Q' by {mean:.3g} nats a token, more than "
            f"steerlm2.log_q_tolerance={tolerance:g}: another checkpoint, template or tokenizer "
            "sampled than has scored. Sample with the model that this run starts from; or set "
            "steerlm2.use_sampler_log_probs=true, or steerlm2.assume_samples_of_q=true if you know "
            "better."
        )
    if others := sum(each > tolerance for each in means):
        yield (
            f"WARNING: {where}: the log-probs that the answers were drawn with differ from log Q' "
            f"by more than steerlm2.log_q_tolerance={tolerance:g} nats a token in {others} of "
            f"{len(means)} groups: were these sampled from another model?"
        )
    kls = [fmean(gap for gap, _ in gaps) for gaps in of_groups]
    length = fmean(tokens for gaps in of_groups for _, tokens in gaps)
    highest = max(HIGHEST_KL, HIGHEST_KL_A_TOKEN * length)
    if len(kls) > 1 and (kl := fmean(kls)) > max(highest, 3 * stdev(kls) / math.sqrt(len(kls))):
        yield (
            f"WARNING: {where}: the answers' log-probs were {kl:.2g} nats an answer higher when "
            "they were drawn than they are under Q': by the KL of their sampler to Q', which is 0 "
            "for samples of Q'. Were they sampled with an earlier state of the model? Sample with "
            "the one that this run starts from, or set steerlm2.use_sampler_log_probs=true"
        )


def _gaps(group: Group, record: Record) -> list[tuple[float, int]]:
    """(log S - log Q', tokens) of each response whose sampler's log-prob S is known."""
    assert group.log_q is not None
    found = [record.responses[i].sampler_log_prob for i in group.responses_kept]
    return [
        (log_s - log_q, len(response))
        for log_s, log_q, response in zip(found, group.log_q, group.responses, strict=True)
        if log_s is not None
    ]


def _refuse_changed(records: Sequence[Record], needing: str, where: str) -> None:
    changed = sum(
        record.sampling is not None
        and record.sampling.drawn != len(record.responses) + sum(record.sampling.left_out.values())
        for record in records
    )
    if changed:
        raise ValueError(
            f"{where}: {changed} of {len(records)} groups have other numbers of responses than "
            "their `sampling` says (`drawn` less what was `left_out`): responses were taken out or "
            f"added after the sampling, and {needing} needs all of a prompt's samples. Sample "
            "again, or set steerlm2.assume_samples_of_q=true if you know better."
        )


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
    answers = {(response.value, response.finish_reason) for response in record.responses}
    if twice := len(record.responses) - len(answers):
        raise ValueError(
            f"{place} corrects for duplicates that were left out, but {twice} of the responses are "
            "there already: leave them out (`sampling.left_out.duplicates`), or set "
            "loss.samples_per_prompt=null"
        )
    if number == "recorded":
        if sampling is None:
            raise ValueError(
                f"{place}=recorded, but the record has no `sampling`, which sample_responses "
                "writes: give the number of draws, or null"
            )
        number = sampling.drawn
    if number < len(record.responses):
        raise ValueError(
            f"{place}: {number} draws can't give the {len(record.responses)} distinct responses "
            "that are there"
        )
    return dataclasses.replace(group, drawn=number)


def _other_numbers(
    records: Sequence[Record], number: int | Literal["recorded"], where: str
) -> Iterator[str]:
    known = [record.sampling.drawn for record in records if record.sampling is not None]
    others = sum(drawn != number for drawn in known)
    if number != "recorded" and others:
        yield (
            f"WARNING: {where}: loss.samples_per_prompt={number}, but the records of {others} of "
            f"{len(records)} groups say that another number was drawn: "
            "loss.samples_per_prompt=recorded takes theirs"
        )


def _uncorrected_duplicates(records: Sequence[Record], where: str) -> Iterator[str]:
    left_out, drawn = left_out_of(records)
    if duplicates := left_out[DUPLICATES]:
        yield (
            f"WARNING: {where}: {duplicates} duplicates of {drawn} draws were left out: rare "
            "answers count too much, for which loss.samples_per_prompt=recorded corrects"
        )


def share_missing(groups: Sequence[Group], records: Sequence[Record]) -> float:
    """Of the draws that the records tell of, the share that isn't there, duplicates aside.

    Args:
        records: that the groups are of, by their `index`.
    """
    missing, drawn = _missing(groups, [records[group.index] for group in groups])
    return missing.total() / max(drawn, 1)


def _missing_text(groups: Sequence[Group], records: Sequence[Record], where: str) -> Iterator[str]:
    missing, drawn = _missing(groups, records)
    if count := missing.total():
        yield (
            f"{where}: of {drawn} draws {count} aren't there ({causes_text(missing)}): the loss "
            "takes the others for all that Q' gives, so that mean_ratio may come to "
            f"{drawn / max(drawn - count, 1):.3f}"
        )


def _missing(groups: Sequence[Group], records: Sequence[Record]) -> tuple[Counter[str], int]:
    """[cause] -> draws that aren't there, but for duplicates; and how many were drawn."""
    missing, drawn = left_out_of(records)
    del missing[DUPLICATES]
    missing["not used here"] = sum(
        len(record.responses) - len(group.responses)
        for group, record in zip(groups, records, strict=True)
        if record.sampling is not None
    )
    return missing, drawn


def left_out_of(records: Sequence[Record]) -> tuple[Counter[str], int]:
    """[cause] -> responses that aren't there, and how many were drawn, of records that say it."""
    left_out: Counter[str] = Counter()
    known = [record.sampling for record in records if record.sampling is not None]
    for sampling in known:
        left_out.update(sampling.left_out)
    return left_out, sum(sampling.drawn for sampling in known)
