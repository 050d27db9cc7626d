"""A chat in the terminal with a steered model: lines in, answers out while they are generated.

A line is a question, or a command that begins with "/" (COMMANDS). Where the lines come from a
person, what is wrong with one is said and the chat goes on; in a script it ends the chat.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import re
import textwrap
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from steerlm2.attributes import parse_label
from steerlm2.data.records import LENGTH
from steerlm2.escaping import printable
from steerlm2.inference.steered import Delta, Question, SteeredModel
from steerlm2.inference.streaming import GenerationSettings

COMMANDS = {
    "/set": ("verbosity=1 humor=4", "what the next answers should have; alone: what is set"),
    "/unset": ("verbosity", "no longer ask for it; alone: for nothing"),
    "/compare": ("verbosity=0 verbosity=4,humor=1", "the last question again, under each of these"),
    "/scores": ("", "what the last answer has, by the attribute model; on, off: after each answer"),
    "/best": ("4", "the last question again: of so many answers the nearest to what is set"),
    "/system": ("TEXT", 'the system text; alone: which it is; "": none'),
    "/history": ("", "the conversation so far"),
    "/undo": ("", "take back the last question and its answer"),
    "/new": ("", "begin another conversation; what is set stays"),
    "/help": ("", "this list"),
    "/quit": ("", "leave; Ctrl-D does, too"),
}
"""Command -> an example of what follows it, and what it does."""

HELP = """\
A line is a question. One that ends with a backslash goes on in the next line;
three quotes, \"\"\", begin and end a text of several lines. Ctrl-C stops an answer
and drops what is typed. A question that begins with / is written with //.
"""
GAP = " " * 44
QUOTES = '"""'
BAR = 20
"""Characters of a full bar. A choice: bar and numbers fit 80 columns."""


@dataclass
class Chat:
    """A conversation, and what is asked for in it."""

    model: SteeredModel
    settings: GenerationSettings
    """Of every answer; each answer has other random numbers."""
    output: TextIO
    attributes: dict[str, int] = field(default_factory=dict)
    """What the user has set; the model's usual values stand for others."""
    scores_each: bool = False
    """Give the scores of each answer."""
    by_person: bool = True
    """Whether Ctrl-C ends an answer; in a script it ends the chat."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """Questions and answers in turn, without the system text."""
    system: str | None = None
    """None: the model's usual one."""
    num_answers: int = 0
    """So far, for the random numbers."""

    def take(self, line: str, run: Callable[[Any], Any] = asyncio.run) -> bool:
        """Answer a question, or do what a command says; returns whether the chat goes on.

        Args:
            line: whole (`whole_lines`).
            run: runs a coroutine to its end, always in the same event loop.

        Raises:
            ValueError: where that can't be done; the conversation stays as it was.
            ConnectionError: where a server that generates doesn't answer.
        """
        text = line.strip()
        if not text:
            return True
        if text.startswith("//"):
            text = text[1:]
        elif text.startswith("/"):
            return self._command(text, run)
        self._ask([*self.messages, {"role": "user", "content": text}], self.attributes, run)
        return True

    # Commands

    def _command(self, text: str, run: Callable[[Any], Any]) -> bool:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if rest and name in ("/history", "/undo", "/new"):
            raise ValueError(f"{name} takes nothing, got {rest}")
        if name == "/help":
            self._help()
        elif name == "/set":
            self._set(rest)
        elif name == "/unset":
            self._unset(rest)
        elif name == "/compare":
            self._compare(rest, run)
        elif name == "/scores":
            self._scores(rest, run)
        elif name == "/best":
            self._best(rest, run)
        elif name == "/system":
            self._set_system(rest)
        elif name == "/history":
            self._history()
        elif name == "/undo":
            self._last_exchange()
            del self.messages[-2:]
        elif name == "/new":
            self.messages.clear()
        else:
            near = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
            raise ValueError(
                f"unknown command {name}"
                + (f": did you mean {near[0]}?" if near else "; /help lists them")
            )
        return True

    def _help(self) -> None:
        self._print(HELP)
        for name, (example, meaning) in COMMANDS.items():
            command = f"  {f'{name} {example}':<42}"
            self._print(textwrap.fill(meaning, 80, initial_indent=command, subsequent_indent=GAP))

    def _set(self, text: str) -> None:
        wanted = self.attributes | _values(text.replace(",", " ").split())
        self.model.label(wanted)
        self.attributes = wanted
        self._print(self._shown(self.attributes))

    def _unset(self, text: str) -> None:
        names = text.replace(",", " ").split()
        if unknown := [name for name in names if name not in self.attributes]:
            raise ValueError(f"{', '.join(unknown)} isn't set")
        gone = names or list(self.attributes)
        self.attributes = {k: v for k, v in self.attributes.items() if k not in gone}
        self._print(self._shown(self.attributes))

    def _compare(self, text: str, run: Callable[[Any], Any]) -> None:
        question, _ = self._last_exchange()
        parts = text.split()
        if any(not part.strip(",") for part in parts):
            raise ValueError("/compare has a space between two settings, and none inside of one")
        settings = [self.attributes | _values(part.split(",")) for part in parts]
        if len(settings) < 2:
            raise ValueError(f"/compare needs two settings: /compare {COMMANDS['/compare'][0]}")
        for wanted in settings:
            self.model.label(wanted)
        for wanted in settings:
            self._print(f"--- {self._shown(wanted)}")
            if not self._ask(question, wanted, run, keep=False):
                break

    def _scores(self, text: str, run: Callable[[Any], Any]) -> None:
        self._check_scorer("/scores")
        if text in ("on", "off"):
            self.scores_each = text == "on"
            return
        if text:
            raise ValueError(f"/scores takes on, off or nothing, got {text}")
        messages, answer = self._last_exchange()
        question = self._question(messages, answer["attributes"], answer["requested"])
        self._print_scores(question, run(self.model.scores(question, [answer["content"]]))[0])

    def _best(self, text: str, run: Callable[[Any], Any]) -> None:
        self._check_scorer("/best")
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"/best takes a number of answers, such as 4, got {text or 'nothing'}")
        messages, _ = self._last_exchange()
        question = self._question(messages, self.attributes)
        answers = [""] * int(text)
        settings = dataclasses.replace(self._next_settings(question), n=int(text))
        run(_collect(self.model.stream_ids(self.model.prompt_of(question), settings), answers))
        self.num_answers += len(answers)
        scores = run(self.model.scores(question, answers))
        distances = [self.model.distance(question, own) for own in scores]
        best = distances.index(min(distances))
        self._print(answers[best])
        self._print_scores(question, scores[best])
        self._keep(messages, question, answers[best])

    def _set_system(self, text: str) -> None:
        if text:
            self.system = "" if text == '""' else text
        system = self.model.system if self.system is None else self.system
        self._print(f"system: {system.strip() or '(none)'}")

    def _history(self) -> None:
        for message in self.messages:
            label = message.get("attributes")
            who = "you" if message["role"] == "user" else f"model ({label})" if label else "model"
            self._print(f"{who}: {message['content']}")

    # Helpers

    def _ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        wanted: Mapping[str, int],
        run: Callable[[Any], Any],
        *,
        keep: bool = True,
    ) -> bool:
        """Print the answer to a conversation; Ctrl-C ends it, and what is there counts.

        Returns:
            Whether it came to its own end.
        """
        question = self._question(messages, wanted)
        settings = self._next_settings(question)
        answers, stopped = [""], False
        deltas = self.model.stream_ids(self.model.prompt_of(question), settings)
        self.num_answers += 1
        try:
            reason = run(_collect(deltas, answers, self._write))
        except KeyboardInterrupt:
            if not self.by_person:
                raise
            reason, stopped = None, True
        if stopped or reason == LENGTH:
            self._print(" (stopped)" if stopped else " (cut off)")
        else:
            self._print("" if answers[0] else "(empty)")
        if keep and not (stopped and not answers[0]):
            self._keep(messages, question, answers[0])
        if self.scores_each and not stopped:
            self._print_scores(question, run(self.model.scores(question, answers))[0])
        return not stopped

    def _question(
        self,
        messages: Sequence[Mapping[str, Any]],
        wanted: Mapping[str, int] | str,
        requested: frozenset[str] | None = None,
    ) -> Question:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        question = self.model.question([*system, *messages], wanted)
        return question if requested is None else dataclasses.replace(question, requested=requested)

    def _next_settings(self, question: Question) -> GenerationSettings:
        """Those of the next answer, as long as it can be.

        Raises:
            ValueError: where the conversation leaves no room for one.
        """
        limit, length = self.model.engine.max_seq_len, len(self.model.prompt_of(question))
        if length >= limit:
            raise ValueError(
                f"the conversation has {length} tokens, and max_seq_len is {limit}: /new begins "
                "another one, /undo takes back the last question"
            )
        return dataclasses.replace(
            self.settings,
            max_new_tokens=min(self.settings.max_new_tokens, limit - length),
            seed=self.settings.seed + self.num_answers,
        )

    def _keep(self, messages: Sequence[Mapping[str, Any]], question: Question, answer: str) -> None:
        said = {"role": "assistant", "content": answer, "attributes": question.label or ""}
        self.messages = [*map(dict, messages), said | {"requested": question.requested}]

    def _last_exchange(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The conversation up to the last question, and its answer."""
        if not self.messages:
            raise ValueError("nothing was asked yet")
        return self.messages[:-1], self.messages[-1]

    def _check_scorer(self, command: str) -> None:
        if self.model.attribute_model is None:
            raise ValueError(
                f"{command} needs an attribute model: attribute_model.checkpointer.checkpoint_dir="
            )

    def _shown(self, wanted: Mapping[str, int]) -> str:
        return self.model.label(wanted) or "no attributes"

    def _print_scores(self, question: Question, scores: Mapping[str, float]) -> None:
        schema = self.model.attribute_model.schema if self.model.attribute_model else None
        assert schema is not None
        for name, score in scores.items():
            low, high = schema.range_of(name)
            filled = round(BAR * (schema.clip(name, score) - low) / (high - low))
            asked = question.attributes.get(name)
            self._print(
                f"  {name:<14}{'█' * filled:<{BAR}} {score:5.2f}"
                + ("" if asked is None else f"  asked {asked}")
                + (" (usual)" if asked is not None and name not in question.requested else "")
            )

    def _write(self, text: str) -> None:
        self.output.write(printable(text) if self.output.isatty() else text)
        self.output.flush()

    def _print(self, text: str) -> None:
        self._write(text + "\n")


async def _collect(
    deltas: AsyncGenerator[Delta],
    answers: list[str],
    write: Callable[[str], None] = lambda text: None,
) -> str | None:
    """Add the parts of answers to their texts; returns the last one's finish reason."""
    reason = None
    async with contextlib.aclosing(deltas):
        async for delta in deltas:
            answers[delta.answer] += delta.text
            write(delta.text)
            reason = delta.finish_reason or reason
    return reason


def _values(parts: Sequence[str]) -> dict[str, int]:
    """{"verbosity": 1} of verbosity=1 or verbosity:1.

    Raises:
        ValueError: for other texts.
    """
    values: dict[str, int] = {}
    for part in filter(None, parts):
        try:
            values |= parse_label(re.sub("=", ":", part, count=1))
        except ValueError:
            raise ValueError(f"expected NAME=NUMBER, such as verbosity=1, got {part}") from None
    return values


class InputDroppedError(Exception):
    """Whoever types has dropped the text that they were typing."""


def whole_lines(read: Callable[[bool], str]) -> Iterator[str]:
    """The lines that `read` gives until it raises EOFError, put together where one goes on.

    Args:
        read: gives the next line, without its end; told whether it goes on from the one before.
            It may raise InputDroppedError, which drops the line and those that it goes on from.
    """
    while True:
        try:
            line = read(False)
            quoted = line.lstrip().startswith(QUOTES)
            if quoted:
                line = line.lstrip().removeprefix(QUOTES)
            with contextlib.suppress(EOFError):  # in the middle of a text: that is all of it
                while quoted and not line.rstrip().endswith(QUOTES):
                    line += "\n" + read(True)
                while not quoted and line.endswith("\\"):
                    line = line.removesuffix("\\") + "\n" + read(True)
        except EOFError:
            return
        except InputDroppedError:
            continue
        yield line.rstrip().removesuffix(QUOTES) if quoted else line
