"""Templates: how a conversation, an attribute label and a response become one text and token ids.

A template yields segments. A control segment is one control token; plain segments between two of
them are tokenised together, apart from the control tokens. So content never becomes one, and the
ids are those that a Hugging Face tokenizer, which splits texts at its control tokens, gives for the
whole. No token spans the boundary between prompt and response.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from array import array
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from steerlm2.data.packing import Dialogue, RewardGroup
from steerlm2.data.records import ASSISTANT, USER, Turn
from steerlm2.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Segment:
    """A piece of a templated text: one control token, or plain text."""

    text: str
    control: bool = False


class Template(Protocol):
    """The interface of templates. Its texts are exactly those that a model is trained on."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """All control tokens that the template uses, as the tokenizer spells them."""

    def prompt(self, system: str, turns: Sequence[Turn], label: str | None) -> list[Segment]:
        """Everything up to where the response begins."""

    def response(self, text: str) -> list[Segment]:
        """The response text, the end-of-turn text and the stop token, which are the targets."""

    def scored_response(self, text: str) -> list[Segment]:
        """The response as an attribute model reads it, up to the token that gives the scores."""


EXTRA_ID_TOKENS = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
"""Start of the system text, start of a turn (and stop token), start of a label."""


@dataclass(frozen=True)
class ExtraIdTemplate:
    r"""The published SteerLM template. Build it with `extra_id_template`.

    <extra_id_0>System\n{system}\n<extra_id_1>User\n{turn}\n<extra_id_1>Assistant\n
    <extra_id_2>{label}\n{response}\n<extra_id_1>, in one piece; the label line appears only where
    there is a label, also in earlier turns.
    """

    control_tokens: tuple[str, ...] = EXTRA_ID_TOKENS

    def prompt(self, system: str, turns: Sequence[Turn], label: str | None) -> list[Segment]:
        """Everything up to where the response begins."""
        segments = [Segment(self.control_tokens[0], control=True), Segment("System\n")]
        segments += [Segment(system), Segment("\n")]
        for turn in turns:
            segments += self._turn_start(turn.role, turn.label)
            segments += [Segment(turn.value), Segment("\n")]
        return segments + self._turn_start(ASSISTANT, label)

    def response(self, text: str) -> list[Segment]:
        """The response, a line break, and the token that starts the next turn."""
        return [Segment(text), Segment("\n"), Segment(self.control_tokens[1], control=True)]

    def scored_response(self, text: str) -> list[Segment]:
        """The response, a line break, and the token that starts a label."""
        return [Segment(text), Segment("\n"), Segment(self.control_tokens[2], control=True)]

    def _turn_start(self, role: str, label: str | None) -> list[Segment]:
        segments = [Segment(self.control_tokens[1], control=True), Segment(f"{role}\n")]
        if label is not None:
            segments += [Segment(self.control_tokens[2], control=True)]
            segments += [Segment(label), Segment("\n")]
        return segments


def extra_id_template(control_tokens: Mapping[str, str] | None = None) -> ExtraIdTemplate:
    """The published SteerLM template, usable as `_component_`.

    Args:
        control_tokens: tokens of the tokenizer to use instead of <extra_id_0>, <extra_id_1> and
            <extra_id_2>. Llama 3: `<|reserved_special_token_0|>` and so on. Llama 2 reserves none,
            but has byte tokens that text doesn't use: `<0x01>`, `<0x02>`, `<0x03>` (the control
            characters U+0001 to U+0003 are then left out of contents). Mistral has either
            `[control_8]` and so on (7B v0.3) or Llama 2's byte tokens (v0.1, v0.2).

    Raises:
        ValueError: for unknown keys, for one token used twice, for byte tokens that text needs.
    """
    given = dict(control_tokens or {})
    problems = [
        f"unknown key {key!r}; known: {', '.join(EXTRA_ID_TOKENS)}"
        for key in given.keys() - set(EXTRA_ID_TOKENS)
    ]
    tokens = tuple(given.get(name, name) for name in EXTRA_ID_TOKENS)
    if len(set(tokens)) < len(tokens):
        problems.append(f"the tokens must differ from each other, got {', '.join(tokens)}")
    problems += [
        f"{token} stands for a character that ordinary text needs; use <0x01> to <0x08>"
        for token in tokens
        if _is_text_byte(token)
    ]
    if problems:
        raise ValueError("control_tokens: " + "; ".join(problems))
    return ExtraIdTemplate(tokens)


def _is_text_byte(token: str) -> bool:
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return match is not None and int(match[1], 16) not in range(0x01, 0x09)


@dataclass(frozen=True)
class Llama3Template:
    r"""Llama 3's own headers. Build it with `llama3_template`.

    <|begin_of_text|>, then per turn
    <|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>, with the label as a turn of the
    role `attributes` right before the assistant's header. No system turn without a system text.
    """

    control_tokens: tuple[str, ...] = (
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )

    def prompt(self, system: str, turns: Sequence[Turn], label: str | None) -> list[Segment]:
        """Everything up to where the response begins."""
        segments = [Segment(self.control_tokens[0], control=True)]
        if system:
            segments += [*self._header("system"), Segment(system), self._end_of_turn]
        for turn in turns:
            segments += self._attributes(turn.label) + self._header(turn.role.lower())
            segments += [Segment(turn.value), self._end_of_turn]
        return segments + self._attributes(label) + self._header(ASSISTANT.lower())

    def response(self, text: str) -> list[Segment]:
        """The response and <|eot_id|>."""
        return [Segment(text), self._end_of_turn]

    def scored_response(self, text: str) -> list[Segment]:
        """The response, <|eot_id|> and the beginning of a label's turn, up to its header's end."""
        return [Segment(text), self._end_of_turn, *self._header("attributes")[:-1]]

    @property
    def _end_of_turn(self) -> Segment:
        return Segment(self.control_tokens[3], control=True)

    def _attributes(self, label: str | None) -> list[Segment]:
        if label is None:
            return []
        return [*self._header("attributes"), Segment(label), self._end_of_turn]

    def _header(self, role: str) -> list[Segment]:
        start, end = self.control_tokens[1:3]
        return [
            Segment(start, control=True),
            Segment(role),
            Segment(end, control=True),
            Segment("\n\n"),
        ]


def llama3_template() -> Llama3Template:
    """Llama 3's own chat format with the label in a turn of its own, usable as `_component_`."""
    return Llama3Template()


@dataclass(frozen=True)
class ChatMLTemplate:
    r"""ChatML, the chat format of Qwen and SmolLM2. Build it with `chatml_template`.

    Per turn <|im_start|>{role}\n{text}<|im_end|>\n, with the label as a turn of the role
    `attributes` right before the assistant's turn. The line break after an answer belongs to the
    next turn.
    """

    default_system: str = ""
    control_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")

    def prompt(self, system: str, turns: Sequence[Turn], label: str | None) -> list[Segment]:
        """Everything up to where the response begins."""
        segments: list[Segment] = []
        if system or self.default_system:
            segments += self._turn("system", system or self.default_system)
        for turn in turns:
            segments += self._attributes(turn.label)
            segments += self._turn(turn.role.lower(), turn.value)
        return segments + self._attributes(label) + self._header(ASSISTANT.lower())

    def response(self, text: str) -> list[Segment]:
        """The response and <|im_end|>."""
        return [Segment(text), self._end_of_turn]

    def scored_response(self, text: str) -> list[Segment]:
        """The response, <|im_end|> and the control token that begins the next turn."""
        return [*self.response(text), Segment("\n"), self._header("attributes")[0]]

    @property
    def _end_of_turn(self) -> Segment:
        return Segment(self.control_tokens[1], control=True)

    def _attributes(self, label: str | None) -> list[Segment]:
        return [] if label is None else self._turn("attributes", label)

    def _turn(self, role: str, text: str) -> list[Segment]:
        return [*self._header(role), Segment(text), self._end_of_turn, Segment("\n")]

    def _header(self, role: str) -> list[Segment]:
        return [Segment(self.control_tokens[0], control=True), Segment(f"{role}\n")]


def chatml_template(default_system: str = "") -> ChatMLTemplate:
    """ChatML with the label in a turn of its own, for Qwen and SmolLM2, usable as `_component_`.

    Args:
        default_system: the system text of conversations without one; none: they have no system
            turn. Qwen2.5's own chat template writes "You are Qwen, created by Alibaba Cloud. You
            are a helpful assistant."
    """
    return ChatMLTemplate(default_system)


def fitting_template(tokens: Container[str]) -> str | None:
    """The template whose control tokens a tokenizer has, as a `_component_`; None: it has none's.

    Args:
        tokens: the tokenizer's added tokens.
    """
    for component, needed in _TOKENS_OF_OURS.items():
        if all(token in tokens for token in needed):
            return component
    return None


_TOKENS_OF_OURS = {
    "steerlm2.data.extra_id_template": EXTRA_ID_TOKENS,
    "steerlm2.data.llama3_template": Llama3Template.control_tokens,
    "steerlm2.data.chatml_template": ChatMLTemplate.control_tokens,
}


def is_ours(component: str) -> bool:
    """Whether a `_component_` is a template of this package, which a checkpoint may name: calling
    it does nothing else."""
    return component in _TOKENS_OF_OURS


def segments_to_text(segments: Iterable[Segment]) -> str:
    """The text of the segments, for people to read; tokenising it could give control tokens."""
    return "".join(segment.text for segment in segments)


def encode_segments(
    segments: Sequence[Segment], tokenizer: Tokenizer, control_tokens: Sequence[str] = ()
) -> list[int]:
    """Token ids of the segments, neighbouring plain ones as one text; no content yields the id of a
    control token.

    Args:
        control_tokens: further control tokens that contents must not yield.

    Raises:
        ValueError: naming the control tokens that the tokenizer lacks or takes for ordinary text.
    """
    own = (segment.text for segment in segments if segment.control)
    ids_of = _control_ids(tokenizer, tuple(dict.fromkeys([*control_tokens, *own])))
    reserved = set(ids_of.values())
    ids: list[int] = []
    for control, neighbours in itertools.groupby(segments, key=lambda segment: segment.control):
        if control:
            ids += (ids_of[segment.text] for segment in neighbours)
        else:
            # This drops only the byte tokens of `extra_id_template`: of other control tokens the
            # tokenizer never yields the ids for plain text.
            text = segments_to_text(neighbours)
            ids += (token_id for token_id in tokenizer.encode(text) if token_id not in reserved)
    return ids


def encode_prompt(
    template: Template,
    tokenizer: Tokenizer,
    system: str,
    turns: Sequence[Turn],
    label: str | None,
) -> list[int]:
    """Token ids of everything before the response, after the tokenizer's bos token if it has one.

    Raises:
        ValueError: naming the control tokens that the tokenizer lacks or takes for ordinary text.
    """
    segments = template.prompt(system, turns, label)
    return _with_bos(encode_segments(segments, tokenizer, template.control_tokens), tokenizer)


def encode_response(template: Template, tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of the response, its end-of-turn text and the stop token.

    Raises:
        ValueError: naming the control tokens that the tokenizer lacks or takes for ordinary text.
    """
    return encode_segments(template.response(text), tokenizer, template.control_tokens)


def token_ids_digest(template: Template, tokenizer: Tokenizer) -> str:
    """Equal where prompts and responses are encoded alike: 16 hex digits.

    It is of the tokenizer, and of a conversation with everything that templates write to language
    models. What differs only makes `token_ids` unknown; that a run can't go on is told by
    `digest.template_digest`, which doesn't depend on the tokenizers package.
    """
    turns = [Turn(USER, "Why?"), Turn(ASSISTANT, "So.", "humor:1"), Turn(USER, " And\n")]
    encoded = [
        encode_prompt(template, tokenizer, "Be terse.", turns, "humor:2,verbosity:0"),
        encode_prompt(template, tokenizer, "", turns[:1], None),
        encode_response(template, tokenizer, "Because."),
    ]
    return hashlib.sha256(f"{tokenizer.digest}:{encoded}".encode()).hexdigest()[:16]


def response_end(template: Template, tokenizer: Tokenizer) -> tuple[str, int]:
    """The template's end of a response: the end-of-turn text, and the stop token's id."""
    *end_of_turn, stop = template.response("")
    text = "".join(segment.text for segment in end_of_turn)
    return text, _control_ids(tokenizer, template.control_tokens)[stop.text]


def reserved_ids(template: Template, tokenizer: Tokenizer) -> frozenset[int]:
    """The control tokens of template and tokenizer: no content is encoded as one of them."""
    of_template = _control_ids(tokenizer, template.control_tokens).values()
    return frozenset(tokenizer.control_ids).union(of_template)


def sampled_text(
    template: Template, tokenizer: Tokenizer, token_ids: Sequence[int], *, complete: bool
) -> tuple[str, bool]:
    """The text of sampled tokens, and whether a response of the template can have all of them.

    The text ends before the first token that no content is encoded as: a control token, the stop
    token too, or an id without a token. A complete response ends in the stop token and has none of
    the others, and its end of turn is no part of its text; one that was cut off has none of them.
    """
    end_of_turn, stop_id = response_end(template, tokenizer)
    reserved, vocab_size = reserved_ids(template, tokenizer), tokenizer.vocab_size
    content = list(
        itertools.takewhile(lambda each: each < vocab_size and each not in reserved, token_ids)
    )
    text = tokenizer.decode(content)
    if not complete:
        return text, len(content) == len(token_ids)
    return text.removesuffix(end_of_turn), [*content, stop_id] == list(token_ids)


def is_encoding(
    template: Template,
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    text: str,
    *,
    complete: bool,
) -> bool:
    """Whether the text of a response is encoded as just these tokens."""
    segments = template.response(text) if complete else [Segment(text)]
    return encode_segments(segments, tokenizer, template.control_tokens) == list(token_ids)


def encode_dialogue(
    template: Template,
    tokenizer: Tokenizer,
    system: str,
    turns: Sequence[Turn],
    *,
    max_seq_len: int | None = None,
    train_on_input: bool = False,
) -> tuple[Dialogue | None, int]:
    """A conversation as a `Dialogue`, up to its last assistant turn that fits.

    The tokens to be predicted are those of every assistant turn's text, end-of-turn text and stop
    token, as in `Template.response`, but not those of labels.

    Args:
        max_seq_len: tokens that the conversation may have; None for any number.
        train_on_input: train on all tokens but the first.

    Returns:
        The dialogue and how many turns it has; (None, 0) where no turn is the assistant's, or not
        even the first of them fits.

    Raises:
        ValueError: naming the control tokens that the tokenizer lacks or takes for ordinary text.
    """
    done: list[Segment] = []
    tokens: list[int] = []
    positions: list[int] = []
    num_turns = 0
    for i, turn in enumerate(turns):
        if turn.role != ASSISTANT:
            continue
        prompt = template.prompt(system, turns[:i], turn.label)
        assert prompt[: len(done)] == done, "a prompt begins with the prompt and answer before it"
        new = encode_segments(prompt[len(done) :], tokenizer, template.control_tokens)
        if not done:
            new = _with_bos(new, tokenizer)
        response = encode_response(template, tokenizer, turn.value)
        if max_seq_len is not None and len(tokens) + len(new) + len(response) > max_seq_len:
            break
        tokens += new
        positions += range(len(tokens), len(tokens) + len(response))
        tokens += response
        done = prompt + template.response(turn.value)
        num_turns = i + 1
    if not tokens:
        return None, 0
    if train_on_input:
        positions = list(range(1, len(tokens)))
    return Dialogue(array("i", tokens), array("i", positions)), num_turns


def encode_for_scoring(
    template: Template,
    tokenizer: Tokenizer,
    system: str,
    turns: Sequence[Turn],
    responses: Sequence[str],
    max_seq_len: int,
) -> tuple[RewardGroup, int]:
    """The texts of a prompt's responses as an attribute model reads them, without any label.

    A text has the end of the prompt with it, from after the last control token, so that its tokens
    are those of the whole text.

    Where the longest text has more than `max_seq_len` tokens, the beginning of the conversation is
    cut off for all of them (the bos token stays), and also that of a response that is longer alone.

    Returns:
        The group, and how many of its texts were cut.

    Raises:
        ValueError: naming the control tokens that the tokenizer lacks or takes for ordinary text.
    """
    bare = [Turn(turn.role, turn.value) for turn in turns]
    segments = template.prompt(system, bare, None)
    shared = 1 + max((i for i, each in enumerate(segments) if each.control), default=-1)
    opened = segments[shared:]
    prompt = _with_bos(
        encode_segments(segments[:shared], tokenizer, template.control_tokens), tokenizer
    )
    texts = [
        encode_segments(
            [*opened, *template.scored_response(text)], tokenizer, template.control_tokens
        )
        for text in responses
    ]
    longest = max(map(len, texts))
    num_cut = len(texts) if len(prompt) + longest > max_seq_len else 0
    bos = prompt[:1] if prompt[:1] == [tokenizer.bos_id] else []
    texts = [text[-(max_seq_len - len(bos)) :] for text in texts]
    if num_cut:
        room = max_seq_len - max(map(len, texts)) - len(bos)
        prompt = bos + prompt[len(prompt) - room :]
    return RewardGroup(array("i", prompt), [array("i", text) for text in texts]), num_cut


def is_too_long(tokenizer: Tokenizer, texts: Iterable[str], max_seq_len: int) -> bool:
    """Whether texts have so many bytes that their tokens can't be as few as `max_seq_len`.

    It tells without tokenising them; False: they may fit or not.
    """
    most = tokenizer.most_bytes_a_token
    return most is not None and sum(len(text.encode("utf-8", "replace")) for text in texts) > (
        max_seq_len * most
    )


def groups_for_scoring(
    template: Template,
    tokenizer: Tokenizer,
    system: str,
    turns: Sequence[Turn],
    responses: Sequence[str],
    max_seq_len: int,
) -> tuple[list[RewardGroup], int]:
    """Like `encode_for_scoring`, but each text is cut independently of the others.

    Where not all responses fit, each is a group of its own, in their order.
    """
    group, num_cut = encode_for_scoring(template, tokenizer, system, turns, responses, max_seq_len)
    if num_cut == 0:
        return [group], 0
    alone = [
        encode_for_scoring(template, tokenizer, system, turns, [response], max_seq_len)
        for response in responses
    ]
    return [own for own, _ in alone], sum(cut for _, cut in alone)


def _with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id]:
        return ids
    return [tokenizer.bos_id, *ids]


@functools.lru_cache(maxsize=64)
def _control_ids(tokenizer: Tokenizer, control_tokens: tuple[str, ...]) -> dict[str, int]:
    ids = {token: tokenizer.token_id(token) for token in control_tokens}
    known = {token: token_id for token, token_id in ids.items() if token_id is not None}
    problems = [f"{token} is no token of this tokenizer" for token in ids if token not in known]
    problems += [
        f"{token} is ordinary text for this tokenizer"
        for token, token_id in known.items()
        if token_id in tokenizer.encode(token)
    ]
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}. Use the template that fits the tokenizer (llama3_template, "
            "chatml_template), or map the control tokens to reserved ones of it: `control_tokens` "
            "of extra_id_template"
        )
    return known
