"""A model that is steered by attributes: chat messages in, answers out while they are generated.

    model = SteeredModel(...)
    async for delta in model.stream(messages, {"verbosity": 1}, GenerationSettings(64)):
        print(delta.text, end="")

Prompts are made of token ids (`templates.encode_prompt`), so no message can spell a control token,
and they are the ids that the model's own chat template gives (`chat_templates`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from steerlm2.attributes import AttributeSchema, encode_label, parse_label
from steerlm2.data.packing import RewardGroup
from steerlm2.data.records import ASSISTANT, REPLACEMENT, STOP, USER, Turn
from steerlm2.data.templates import (
    Template,
    encode_prompt,
    groups_for_scoring,
    reserved_ids,
    response_end,
)
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.inference.attribute_model import AttributeModel
from steerlm2.inference.engines import OTHER_STOP
from steerlm2.inference.streaming import GenerationSettings, Piece, StreamingEngine, TokenLogProb

Attributes = Mapping[str, Any] | str | None
"""Wanted values: a mapping; a label, "" for none; or None: not said."""

ScoreGroups = Callable[[Sequence[RewardGroup]], Awaitable[list[list[list[float]]]]]
"""[group][response][attribute] scores."""

ROLES = ("system", "developer", "user", "assistant", "attributes")


@dataclass(frozen=True)
class Question:
    """A conversation that is to be answered, with the label of the answer."""

    system: str
    turns: list[Turn]
    label: str | None
    requested: frozenset[str]
    """The attributes that were asked for by name; the label's others are the usual ones."""

    @property
    def attributes(self) -> dict[str, int]:
        """All values that the model is shown."""
        return parse_label(self.label) if self.label else {}


class TextToken(NamedTuple):
    """A token of an answer's text."""

    token_id: int
    log_prob: TokenLogProb | None


class Delta(NamedTuple):
    """What has become known of one answer."""

    answer: int
    """Its number, from 0 to n - 1."""
    text: str
    """The next part of its text, whole characters."""
    tokens: list[TextToken]
    """Those whose text is out, without the stop token."""
    num_tokens: int
    """Tokens that were generated for it, the stop token included."""
    finish_reason: str | None
    """With its end: `records.STOP` (at the stop token or a stop text), `records.LENGTH`, or
    `engines.OTHER_STOP`."""


@dataclass
class SteeredModel:
    """A language model with all that is needed to ask it."""

    template: Template
    tokenizer: Tokenizer
    schema: AttributeSchema | None
    """Of its labels; None: it was trained without labels, or nothing says with which."""
    usual_label: str | None
    """Has the values of attributes that a request leaves out (`ModelFacts.default_label`)."""
    system: str
    """System text of conversations without one."""
    engine: StreamingEngine
    attribute_model: AttributeModel | None = None
    score_groups: ScoreGroups | None = None
    """Scores in place of `attribute_model.score`, in a server where several requests share it."""

    def question(self, messages: Sequence[Mapping[str, Any]], *attributes: Attributes) -> Question:
        """A conversation in chat messages, and the label of its answer.

        Messages have `role` (ROLES) and `content`, a text or a list of parts {"type": "text",
        "text": ...}. A message of the role `attributes` says the label of the answer after it; one
        of the assistant may have `attributes`, the label that it was given under.

        Args:
            attributes: of the answer, said in several places; those that say something must agree.

        Raises:
            ValueError: for messages that are none, unknown attributes and values, and places that
                contradict each other.
        """
        system, turns, in_messages = self._read(messages)
        said = [given for given in (*attributes, *in_messages) if given is not None]
        label = self._agreed(said) if said else self.label({})
        requested = {name for given in said for name in _names(given)}
        return Question(system, turns, label, frozenset(requested))

    def label(self, attributes: Mapping[str, Any] | str) -> str | None:
        """The whole label that some wanted values stand for; None: no label.

        Raises:
            ValueError: for unknown attributes and values out of range.
        """
        if isinstance(attributes, str) and not attributes:
            return None
        given = _values(attributes)
        if self.schema is None:
            if given:
                raise ValueError(
                    f"attributes: unknown attribute {', '.join(given)}; the model was trained "
                    "without labels, as far as its folder and the config say (schema)"
                )
            return None
        usual = parse_label(self.usual_label) if self.usual_label else {}
        values = usual | given
        try:
            return encode_label(values, self.schema) if values else None
        except ValueError as error:
            raise ValueError(f"attributes: {error}") from None

    def prompt_of(self, question: Question) -> list[int]:
        """The token ids of a question, up to where the answer begins."""
        return encode_prompt(
            self.template, self.tokenizer, question.system, question.turns, question.label
        )

    def prompt_ids(
        self, messages: Sequence[Mapping[str, Any]], attributes: Attributes = None
    ) -> list[int]:
        """The token ids of messages; raises as `question`."""
        return self.prompt_of(self.question(messages, attributes))

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        attributes: Attributes,
        settings: GenerationSettings,
        *,
        stop: Sequence[str] = (),
    ) -> AsyncGenerator[Delta]:
        """The answers to messages, piece by piece; arguments and errors as of `stream_ids`."""
        return self.stream_ids(self.prompt_ids(messages, attributes), settings, stop=stop)

    async def stream_ids(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        *,
        stop: Sequence[str] = (),
        whole: bool = False,
    ) -> AsyncGenerator[Delta]:
        """The answers to a prompt, piece by piece; closing it ends the generation.

        Args:
            stop: texts that end an answer, which isn't given from there on.
            whole: give the end too: the stop text, or the end of turn and the stop token.

        Raises:
            ValueError: where the engine can't do what is asked.
            ConnectionError: where a server that it asks doesn't answer.
        """
        answers = [AnswerText(self, stop, whole=whole) for _ in range(settings.n)]
        pieces = cast("AsyncGenerator[Piece]", self.engine.generate(prompt, settings))
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                answer = answers[piece.answer]
                if answer.finish_reason is not None:
                    continue  # it has come to a stop text, which the engine doesn't know of
                delta = answer.add(piece)
                if delta.text or delta.tokens or delta.num_tokens or delta.finish_reason:
                    yield delta
                if all(each.finish_reason is not None for each in answers):
                    return
        raise ConnectionError("the engine ended before the answers did")

    async def scores(self, question: Question, answers: Sequence[str]) -> list[dict[str, float]]:
        """The attribute model's scores of answers, by name. Long texts lose their beginning."""
        model = self.attribute_model
        assert model is not None, "whoever asks for scores checks that there is an attribute model"
        groups, _ = await asyncio.to_thread(
            groups_for_scoring,
            model.template,
            model.tokenizer,
            question.system,
            question.turns,
            answers,
            model.max_seq_len,
        )
        if self.score_groups is not None:
            scores = await self.score_groups(groups)
        else:
            scores = await asyncio.to_thread(model.score, groups)
        names = model.schema.names
        return [dict(zip(names, own, strict=True)) for group in scores for own in group]

    def distance(self, question: Question, scores: Mapping[str, float]) -> float:
        """How far scores are from what was asked for: the mean absolute error, in points.

        The attributes that were named count, or all of the label where none was, as far as they
        have scores. Errors count by their share of the attribute's range.
        """
        wanted = question.attributes
        named = [name for name in wanted if name in question.requested] or list(wanted)
        counted = [name for name in named if name in scores]
        if not counted or self.schema is None:
            return 0.0
        scales = dict(zip(self.schema.names, self.schema.error_scales, strict=True))
        errors = [abs(scores[name] - wanted[name]) * scales[name] for name in counted]
        return sum(errors) / len(errors)

    def _agreed(self, said: Sequence[Mapping[str, Any] | str]) -> str | None:
        """The label that several places say, if they all say the same; None: no label."""
        labels = dict.fromkeys(map(self.label, said))
        if len(labels) > 1:
            shown = " and ".join(repr(label or "") for label in labels)
            raise ValueError(f"attributes: given in several places that contradict: {shown}")
        return next(iter(labels), None)

    def _read(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[str, list[Turn], list[Mapping[str, Any] | str]]:
        """System text, turns, and what the messages say of the answer's label."""
        system, turns = self.system, []
        said: list[Mapping[str, Any] | str] = []
        for i, message in enumerate(messages):
            role = message.get("role")
            text = text_of(message.get("content"), f"messages[{i}].content")
            own = message.get("attributes")
            if own is not None and role != "assistant":
                raise ValueError(
                    f"messages[{i}].attributes: a message has those that it was given under, so "
                    "only the assistant's; the next answer's belong into the request's attributes"
                )
            if role in ("system", "developer"):
                if i > 0:
                    raise ValueError(
                        f"messages[{i}].role: a {role} message must be the first, and the only one"
                    )
                system = text
            elif role == "user":
                turns.append(Turn(USER, text))
            elif role == "attributes":
                said.append(text)
            elif role == "assistant":
                said += [] if own is None else [own]
                turns.append(Turn(ASSISTANT, text, self._agreed(said)))
                said = []
            else:
                raise ValueError(
                    f"messages[{i}].role: unknown role {role!r}, known: {', '.join(ROLES)}"
                )
        if not turns or turns[-1].role != USER:
            raise ValueError(
                "messages: the last one must be the user's (but for one with the role attributes): "
                "it is the one that is answered"
            )
        return system, turns, said


def text_of(content: object, where: str) -> str:
    """The text of a message's content: a text, or parts that are lines of it.

    Raises:
        ValueError: for parts that aren't texts.
    """
    if isinstance(content, str):
        return content
    if (
        isinstance(content, list)
        and content
        and all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        )
    ):
        return "\n".join(part["text"] for part in content)
    raise ValueError(f"{where} must be a text, or a list of parts {{'type': 'text', 'text': ...}}")


def _names(attributes: Mapping[str, Any] | str) -> list[str]:
    return list(_values(attributes)) if attributes else []


def _values(attributes: Mapping[str, Any] | str) -> dict[str, Any]:
    try:
        return parse_label(attributes) if isinstance(attributes, str) else dict(attributes)
    except ValueError as error:
        raise ValueError(f"attributes: {error}") from None


class AnswerText:
    """The text of one answer while its tokens come in.

    What may still change, or be taken back, is held: bytes of a character whose others are missing,
    the beginning of a stop text, and the end of turn before the stop token.
    """

    def __init__(self, model: SteeredModel, stop: Sequence[str], *, whole: bool = False) -> None:
        self.tokenizer = model.tokenizer
        self.stop = [text for text in stop if text]
        self.whole = whole
        self.end_of_turn, self.stop_id = response_end(model.template, model.tokenizer)
        self.no_content = reserved_ids(model.template, model.tokenizer)
        self.finish_reason: str | None = None
        self._ids: list[int] = []
        self._window, self._read = 0, 0
        """Places in `_ids`: texts are decoded from the first; up to the second they are known."""
        self._text = ""
        self._given = 0
        self._tokens: list[tuple[TextToken, int]] = []
        """Those that aren't given yet, with the length of the text that ends in them."""
        self._tokens_end = 0
        """The length of the text that ends in the last token that is given."""

    def add(self, piece: Piece) -> Delta:
        """What the next tokens make known."""
        log_probs: Sequence[TokenLogProb | None] = piece.log_probs or [None] * len(piece.tokens)
        num_tokens, cut, complete = 0, None, False
        for token_id, log_prob in zip(piece.tokens, log_probs, strict=True):
            num_tokens += 1
            if token_id >= self.tokenizer.vocab_size or token_id in self.no_content:
                complete = token_id == self.stop_id
                self.finish_reason = STOP if complete else OTHER_STOP
                break
            self._ids.append(token_id)
            self._text += self._decoded()
            self._tokens.append((TextToken(token_id, log_prob), len(self._text)))
            cut = self._stop_text()
            if cut is not None:
                self.finish_reason = STOP
                break
        if self.finish_reason is None:
            self.finish_reason = piece.finish_reason
        if self.finish_reason is not None and cut is None:
            self._text += self._decoded(final=True)
            cut = self._stop_text()
        if cut is None:
            cut = self._end(complete=complete)
        text, self._given = self._text[self._given : cut], max(cut, self._given)
        return Delta(piece.answer, text, self._tokens_until(cut), num_tokens, self.finish_reason)

    def _decoded(self, *, final: bool = False) -> str:
        """The text of the tokens that aren't decoded yet, if it is whole characters."""
        known = self.tokenizer.decode(self._ids[self._window : self._read])
        now = self.tokenizer.decode(self._ids[self._window :])
        if now.endswith(REPLACEMENT) and not final:
            return ""
        self._window, self._read = self._read, len(self._ids)
        return now[len(known) :]

    def _stop_text(self) -> int | None:
        """Where the text ends by the first stop text in it."""
        # What is given holds no stop text, and no beginning of one.
        found = [(self._text.find(text, self._given), len(text)) for text in self.stop]
        places = [(at, length) for at, length in found if at >= 0]
        if not places:
            return None
        at, length = min(places)
        return at + length if self.whole else at

    def _end(self, *, complete: bool) -> int:
        """How much of the text can be given."""
        if complete and self.whole:
            self._text += self.tokenizer.decode([self.stop_id])
        elif complete and self._text.endswith(self.end_of_turn):
            return len(self._text) - len(self.end_of_turn)
        if self.finish_reason is not None:
            return len(self._text)
        # What is given holds no beginning of a stop text.
        open_text = self._text[self._given :]
        held = max(_overlap(open_text, text) for text in (*self.stop, self.end_of_turn))
        return len(self._text) - held

    def _tokens_until(self, cut: int) -> list[TextToken]:
        """Those whose text is out; at the answer's end also the one that the end cuts."""
        ended = self.finish_reason is not None
        given: list[TextToken] = []
        while self._tokens and (self._tokens[0][1] <= cut or (ended and self._tokens_end < cut)):
            token, self._tokens_end = self._tokens.pop(0)
            given.append(token)
        return given


def _overlap(text: str, other: str) -> int:
    """The length of the longest end of one text that another begins with."""
    most = min(len(text), len(other))
    return next((n for n in range(most, 0, -1) if text.endswith(other[:n])), 0)
