"""Sampling with the decoder itself: answers to many prompts, decoded together.

Dimension letters: P cached sequences (one a prompt), M slots of a sequence for samples, L live
answers, A answers whose likeliest tokens are asked for, D hidden, V vocabulary.

`Decoding` is the loop over tokens: answers join it and leave it at any time. `LocalEngine` samples
with it what is known from the start; `steerlm2.inference.local_streaming` serves with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from steerlm2.data.records import LENGTH, STOP
from steerlm2.inference.engines import Request, Sample, SamplingSettings
from steerlm2.inference.sampling import draw_tokens
from steerlm2.inference.shared_prompts import (
    EMPTY,
    STEPS_BETWEEN_COMPACTIONS,
    SharedPromptDecoder,
)
from steerlm2.inference.streaming import GenerationSettings, Piece, TokenLogProb

STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 16}
"""A check which answers have ended makes the host wait for a GPU; without one ended answers are
computed further, at most so many steps."""


class LocalEngine:
    """Samples with a decoder on one device. It changes the decoder, which can't be used otherwise.

    Args:
        decoder: with its weights, not sharded, on this device.
        settings: of every response.
        max_cache_tokens: prompts are sampled together while their tokens and those of all their
            samples at full length are at most so many. A single prompt may have more.
    """

    def __init__(
        self, decoder: TransformerDecoder, settings: SamplingSettings, *, max_cache_tokens: int
    ) -> None:
        self.settings = settings
        self.max_cache_tokens = max_cache_tokens
        self.decoding = Decoding(
            decoder, stop_id=settings.stop_id, forbidden_ids=settings.forbidden_ids
        )

    def sample(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """[request][n] samples, in the order of the requests.

        The samples of a request don't depend on the other requests, up to rounding: a draw within
        rounding of the boundary between two tokens can go either way.

        Raises:
            ValueError: where the model's probabilities are not finite.
        """
        found: dict[int, list[Sample]] = {}
        for batch in self._batches(requests):
            found |= zip(batch, self._sample_together([requests[i] for i in batch]), strict=True)
        return [found[i] for i in range(len(requests))]

    def close(self) -> None:
        self.decoding.clear()

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Indices of the requests that are sampled together, the longest prompts first."""
        sample_tokens = self.settings.n * self.settings.max_new_tokens
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt))
        while order:
            size = max(1, self.max_cache_tokens // (len(requests[order[0]].prompt) + sample_tokens))
            yield order[:size]
            order = order[size:]

    def _sample_together(self, requests: Sequence[Request]) -> list[list[Sample]]:
        wanted = self.settings
        generations = [
            Generation(
                request.prompt,
                GenerationSettings(
                    wanted.max_new_tokens,
                    n=wanted.n,
                    temperature=wanted.temperature,
                    top_p=wanted.top_p,
                    seed=request.seed,
                    top_log_probs=0,
                ),
            )
            for request in requests
        ]
        pieces: dict[Generation, list[list[Piece]]] = {
            generation: [[] for _ in range(wanted.n)] for generation in generations
        }
        news = self.decoding.join(generations)
        while news:
            for generation, piece in news:
                pieces[generation][piece.answer].append(piece)
            news = self.decoding.advance()
        return [[_sample_of(each) for each in pieces[generation]] for generation in generations]


def _sample_of(pieces: Sequence[Piece]) -> Sample:
    """A whole answer, of pieces with log-probs."""
    tokens = [token for piece in pieces for token in piece.tokens]
    log_prob = sum(one.log_prob for piece in pieces for one in piece.log_probs or ())
    drawn_with = sum(one.sampler_log_prob or 0 for piece in pieces for one in piece.log_probs or ())
    assert pieces[-1].finish_reason is not None
    return Sample(tokens, pieces[-1].finish_reason, log_prob, sampler_log_prob=drawn_with)


@dataclass(eq=False)
class Generation:
    """A prompt whose answers are generated."""

    prompt: Sequence[int]
    settings: GenerationSettings
    cancelled: bool = False
    """Set to True at any time, from any thread: then its answers end without a last piece."""

    @property
    def cache_tokens(self) -> int:
        """Tokens of the prompt and of all answers at full length."""
        return len(self.prompt) + self.settings.n * self.settings.max_new_tokens


@dataclass(eq=False)
class Answer:
    """One of the answers of a generation, as far as it is known."""

    generation: Generation
    number: int
    num_tokens: int = 0
    last_token: int = -1
    finished: bool = False
    uniform: np.ndarray = field(init=False)
    """For each of its tokens a number from [0, 1)."""

    def __post_init__(self) -> None:
        settings = self.generation.settings
        self.uniform = _uniform(settings.seed + self.number, settings.max_new_tokens)

    @property
    def remaining(self) -> int:
        """Tokens that it may still have."""
        return self.generation.settings.max_new_tokens - self.num_tokens

    @property
    def live(self) -> bool:
        """Whether it goes on."""
        return not self.finished and not self.generation.cancelled


class Drawn(NamedTuple):
    """The next token of each answer, on the decoder's device."""

    token_L: Tensor
    most_L: Tensor
    """The highest logit, which is not finite where any isn't, or all are -inf."""
    log_prob_L: Tensor | None
    sampler_log_prob_L: Tensor | None
    top_log_prob_AN: Tensor | None
    top_token_AN: Tensor | None


class Decoding:
    """Answers that are generated together. It changes the decoder, which can't be used otherwise.

    The tokens of an answer depend on its prompt, its settings and its number alone, up to rounding.

    Args:
        decoder: with its weights, not sharded, on this device.
        stop_id: the token that ends an answer.
        forbidden_ids: tokens that aren't chosen; the probabilities of the others are renormalised.
        steps_between_checks: tokens that are generated before the host looks at them, by the type
            of the device.
    """

    def __init__(
        self,
        decoder: TransformerDecoder,
        *,
        stop_id: int,
        forbidden_ids: Sequence[int],
        steps_between_checks: dict[str, int] = STEPS_BETWEEN_CHECKS,
    ) -> None:
        self.decoder = SharedPromptDecoder(decoder.eval())
        self.stop_id = stop_id
        device = self.decoder.device
        self._forbidden = torch.tensor(forbidden_ids, dtype=torch.long, device=device)
        self._steps_between_checks = steps_between_checks[device.type]
        self.clear()

    def clear(self) -> None:
        """Forget all answers and free the cache."""
        self.decoder.clear()
        self._slots: list[list[Answer | None]] = []
        self._steps_since_compaction = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is cached: all answers have ended, and `advance` has noticed it."""
        return not self._slots

    @property
    def generations(self) -> list[Generation]:
        """Those with live answers."""
        return [live[0].generation for slots in self._slots if (live := _live(slots))]

    @torch.no_grad()
    def join(self, generations: Sequence[Generation]) -> list[tuple[Generation, Piece]]:
        """Begin the answers to some prompts, which are computed together; the first token of each.

        Raises:
            ValueError: where the model's probabilities are not finite.
        """
        if not generations:
            return []
        hidden_PD = self.decoder.prefill([generation.prompt for generation in generations])
        slots = [[Answer(each, j) for j in range(each.settings.n)] for each in generations]
        row_L = [row for row, answers in enumerate(slots) for _ in answers]
        answers = [answer for each in slots for answer in each]
        logits_LV = self.decoder.logits(hidden_PD)[row_L]
        drawn = self._draw(logits_LV, answers, self._uniform(answers, 1)[0])
        self._slots += [list(each) for each in slots]
        pieces = self._pieces(answers, [drawn])
        self._compact()
        return pieces

    @torch.no_grad()
    def advance(self) -> list[tuple[Generation, Piece]]:
        """The next tokens of all answers; none where all have ended.

        Raises:
            ValueError: where the model's probabilities are not finite.
        """
        self._slots = [
            [answer if answer and answer.live else None for answer in slots]
            for slots in self._slots
        ]
        if self._steps_since_compaction == STEPS_BETWEEN_COMPACTIONS or not self.generations:
            self._compact()
        places = [
            (p, m, answer)
            for p, slots in enumerate(self._slots)
            for m, answer in enumerate(slots)
            if answer is not None
        ]
        if not places:
            return []
        answers = [answer for _, _, answer in places]
        steps = min(
            self._steps_between_checks,
            STEPS_BETWEEN_COMPACTIONS - self._steps_since_compaction,
            *(answer.remaining for answer in answers),
        )
        device = self.decoder.device
        row_L, column_L = torch.tensor([place[:2] for place in places]).t().to(device)
        sample_PM = self._sample_PM()
        uniform_TL = self._uniform(answers, steps)
        token_L = torch.tensor([answer.last_token for answer in answers]).to(device)
        drawn = []
        for uniform_L in uniform_TL:
            token_PM = torch.zeros_like(sample_PM).index_put((row_L, column_L), token_L)
            hidden_LD = self.decoder.step(token_PM, sample_PM)[row_L, column_L]
            drawn.append(self._draw(self.decoder.logits(hidden_LD), answers, uniform_L))
            token_L = drawn[-1].token_L
        self._steps_since_compaction += steps
        return self._pieces(answers, drawn)

    def _draw(self, logits_LV: Tensor, answers: Sequence[Answer], uniform_L: Tensor) -> Drawn:
        """The log-probs are those before temperature, cuts and forbidden tokens.

        It changes the logits. Nothing here waits for a GPU.
        """
        settings = [answer.generation.settings for answer in answers]
        most_L = logits_LV.amax(dim=-1)
        asking = [row for row, each in enumerate(settings) if each.top_log_probs is not None]
        normalizer_L = logits_LV.logsumexp(dim=-1) if asking else None
        top_log_prob_AN = top_token_AN = None
        if num_top := max((each.top_log_probs or 0 for each in settings), default=0):
            assert normalizer_L is not None
            asking_A = torch.tensor(asking).to(logits_LV.device, non_blocking=True)
            top_log_prob_AN, top_token_AN = logits_LV[asking_A].topk(num_top)
            top_log_prob_AN = top_log_prob_AN - normalizer_L[asking_A, None]
        token_L, sampler_log_prob_L = draw_tokens(
            logits_LV.index_fill_(-1, self._forbidden, -torch.inf),
            torch.tensor([each.temperature for each in settings]),
            torch.tensor([each.top_p for each in settings], dtype=torch.float64),
            uniform_L,
            torch.tensor([each.top_k for each in settings]),
            with_log_probs=bool(asking),
        )
        log_prob_L = None
        if normalizer_L is not None:
            log_prob_L = logits_LV.gather(1, token_L[:, None]).squeeze(1) - normalizer_L
        return Drawn(token_L, most_L, log_prob_L, sampler_log_prob_L, top_log_prob_AN, top_token_AN)

    def _pieces(
        self, answers: Sequence[Answer], drawn: Sequence[Drawn]
    ) -> list[tuple[Generation, Piece]]:
        """What was drawn, up to the stop tokens. Here the host waits for a GPU."""
        if not torch.stack([each.most_L for each in drawn]).isfinite().all():
            raise ValueError("the model's probabilities are not finite: its weights are damaged, "
                             "or dtype is too small for them")  # fmt: skip
        tokens_LT = torch.stack([each.token_L for each in drawn], dim=1).tolist()
        log_probs_LT = _log_probs(answers, drawn)
        pieces = []
        for answer, tokens, log_probs in zip(answers, tokens_LT, log_probs_LT, strict=True):
            if self.stop_id in tokens:
                tokens = tokens[: tokens.index(self.stop_id) + 1]
            answer.num_tokens += len(tokens)
            answer.last_token = tokens[-1]
            reason: str | None = None
            if answer.last_token == self.stop_id:
                reason = STOP
            elif answer.remaining == 0:
                reason = LENGTH
            answer.finished = reason is not None
            known = None if log_probs is None else log_probs[: len(tokens)]
            pieces.append((answer.generation, Piece(answer.number, tokens, known, reason)))
        return pieces

    def _compact(self) -> None:
        """Give the columns of finished answers back, and new sequences their place."""
        live = [_live(slots) for slots in self._slots]
        kept = [p for p, answers in enumerate(live) if answers]
        if not kept:
            self.clear()
            return
        self._steps_since_compaction = 0
        most = max(len(answers) for answers in live)
        self._slots = [[*live[p], *[None] * (most - len(live[p]))] for p in kept]
        kept_P = torch.tensor(kept).to(self.decoder.device)
        self.decoder.compact(kept_P, self._sample_PM())

    def _sample_PM(self) -> Tensor:
        numbers = [
            [EMPTY if answer is None else answer.number for answer in slots]
            for slots in self._slots
        ]
        return torch.tensor(numbers).to(self.decoder.device)

    def _uniform(self, answers: Sequence[Answer], steps: int) -> Tensor:
        """[T, L] the numbers of the answers' next tokens."""
        numbers = [
            answer.uniform[answer.num_tokens : answer.num_tokens + steps] for answer in answers
        ]
        return torch.from_numpy(np.stack(numbers, axis=1)).to(self.decoder.device)


def _live(slots: Sequence[Answer | None]) -> list[Answer]:
    return [answer for answer in slots if answer is not None and answer.live]


def _log_probs(
    answers: Sequence[Answer], drawn: Sequence[Drawn]
) -> Iterator[list[TokenLogProb] | None]:
    """Those of each answer, where it asks for them."""
    log_prob_TL = _on_host([each.log_prob_L for each in drawn])
    sampler_log_prob_TL = _on_host([each.sampler_log_prob_L for each in drawn])
    top_log_prob_TAN = _on_host([each.top_log_prob_AN for each in drawn])
    top_token_TAN = _on_host([each.top_token_AN for each in drawn])
    place = 0
    for row, answer in enumerate(answers):
        num_top = answer.generation.settings.top_log_probs
        if num_top is None:
            yield None
            continue
        found = []
        for step, log_prob_L in enumerate(log_prob_TL):
            top: tuple[tuple[int, float], ...] = ()
            if num_top:
                pairs = zip(top_token_TAN[step][place], top_log_prob_TAN[step][place], strict=True)
                top = tuple(pairs)[:num_top]
            found.append(TokenLogProb(log_prob_L[row], top, sampler_log_prob_TL[step][row]))
        yield found
        place += 1


def _on_host(steps: Sequence[Tensor | None]) -> list:
    """Numbers of all steps, [T]...; empty where they weren't computed."""
    known = [each for each in steps if each is not None]
    return torch.stack(known).tolist() if known else []


def _uniform(seed: int, count: int) -> np.ndarray:
    """[count] numbers from [0, 1) with 53 bits: an independent stream for every seed."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)
