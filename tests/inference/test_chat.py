"""The chat in the terminal, with an engine that says which prompt it was given."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import pytest

from steerlm2.attributes import AttributeSchema
from steerlm2.data.templates import extra_id_template, response_end
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.inference.chat import COMMANDS, Chat, InputDroppedError, whole_lines
from steerlm2.inference.steered import SteeredModel
from steerlm2.inference.streaming import GenerationSettings, Piece

TEMPLATE, TOKENIZER = extra_id_template(), tiny_tokenizer()
STOP_ID = response_end(TEMPLATE, TOKENIZER)[1]
SCHEMA = AttributeSchema(("humor", "verbosity"))


class Echo:
    """Answers "LABEL #SEED", a token at a time; a question with "stop" is interrupted midway."""

    max_seq_len = 200

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def generate(
        self, prompt: Sequence[int], settings: GenerationSettings
    ) -> AsyncGenerator[Piece]:
        self.prompts.append(TOKENIZER.decode(prompt))
        label = self.prompts[-1].rpartition("<extra_id_2>")[2].strip()
        for answer in range(settings.n):
            ids = TOKENIZER.encode(f"{label} #{settings.seed + answer}\n")
            if "silence" in self.prompts[-1]:
                ids = []
            for i, token in enumerate(ids):
                if "stop" in self.prompts[-1] and i == len(ids) // 2:
                    raise KeyboardInterrupt
                yield Piece(answer, [token], None, None)
            yield Piece(answer, [STOP_ID], None, "stop")

    async def close(self) -> None: ...


class Scorer:
    """Gives an answer the scores [j, j] where "#j" stands in it."""

    schema, template, tokenizer, max_seq_len = SCHEMA, TEMPLATE, TOKENIZER, 200

    def score(self, groups: Sequence[Any]) -> list[list[list[float]]]:
        def number(ids: Sequence[int]) -> float:
            return float(TOKENIZER.decode(ids).rpartition("#")[2].split("\n")[0])

        return [[[number(text)] * 2 for text in group.responses] for group in groups]


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def chat() -> Chat:
    engine: Any = Echo()
    model = SteeredModel(TEMPLATE, TOKENIZER, SCHEMA, "humor:1,verbosity:2", "S.", engine)
    model.attribute_model = Scorer()  # type: ignore[assignment]
    return Chat(model, GenerationSettings(64), io.StringIO())


def said(chat: Chat, loop: asyncio.Runner, *lines: str) -> list[str]:
    """What the last line has printed."""
    for line in lines:
        chat.output = io.StringIO()
        assert chat.take(line, loop.run)
    return chat.output.getvalue().splitlines()


def test_a_question_is_answered_under_what_is_set(chat: Chat, loop: asyncio.Runner) -> None:
    """The usual values stand for the others; each answer has its own random numbers."""
    assert said(chat, loop, "Why?") == ["humor:1,verbosity:2 #0"]
    assert said(chat, loop, "/set verbosity=4") == ["humor:1,verbosity:4"]
    assert said(chat, loop, "And?") == ["humor:1,verbosity:4 #1"]
    assert said(chat, loop, "/set humor:0, verbosity:3", "/unset verbosity", "So?") == [
        "humor:0,verbosity:2 #2"
    ]


def test_an_answer_without_text_is_told(chat: Chat, loop: asyncio.Runner) -> None:
    """An empty line alone looks as if nothing had been answered."""
    assert said(chat, loop, "silence?") == ["(empty)"]
    assert chat.messages[-1]["content"] == ""


def test_a_conversation_goes_on(chat: Chat, loop: asyncio.Runner) -> None:
    """With the label that each answer was given under; until it is begun anew."""
    said(chat, loop, "One?", "/set humor=3", "Two?", "//three?")
    prompt = chat.model.engine.prompts[-1]  # type: ignore[attr-defined]
    for part in ("S.", "One?", "<extra_id_2>humor:1,verbosity:2\n", "Two?", "\n/three?\n"):
        assert prompt.count(part) == 1, part
    assert said(chat, loop, "/undo", "/history") == [
        *("you: One?", "model (humor:1,verbosity:2): humor:1,verbosity:2 #0"),
        *("you: Two?", "model (humor:3,verbosity:2): humor:3,verbosity:2 #1"),
    ]
    said(chat, loop, "/new", "/system Be brief.", "Four?")
    prompt = chat.model.engine.prompts[-1]  # type: ignore[attr-defined]
    assert "Be brief." in prompt
    assert "One?" not in prompt
    assert said(chat, loop, '/system ""') == ["system: (none)"]


def test_settings_are_compared_on_the_last_question(chat: Chat, loop: asyncio.Runner) -> None:
    """What is set stays for what they don't name; the conversation stays as it was."""
    said(chat, loop, "/set humor=3", "Why?")
    before = [*chat.messages]
    assert said(chat, loop, "/compare verbosity=0 verbosity=4,humor=0") == [
        *("--- humor:3,verbosity:0", "humor:3,verbosity:0 #1"),
        *("--- humor:0,verbosity:4", "humor:0,verbosity:4 #2"),
    ]
    assert chat.messages == before


def test_the_nearest_of_several_answers_is_taken(chat: Chat, loop: asyncio.Runner) -> None:
    """verbosity 3 is asked for; of the answers #1 to #4 the third has it."""
    said(chat, loop, "/set verbosity=3", "Why?")
    text, *scores = said(chat, loop, "/best 4")
    assert text == "humor:1,verbosity:3 #3"
    assert scores == said(chat, loop, "/scores")
    assert [line.split() for line in scores] == [
        ["humor", "█" * 15, "3.00", "asked", "1", "(usual)"],
        ["verbosity", "█" * 15, "3.00", "asked", "3"],
    ]
    assert said(chat, loop, "And?") == ["humor:1,verbosity:3 #5"]
    assert len(said(chat, loop, "/scores on", "Last?")) == 3


def test_an_interrupted_answer_ends_and_the_chat_does_not(chat: Chat, loop: asyncio.Runner) -> None:
    """What was said so far stands; in a script the interruption ends the chat."""
    (line,) = said(chat, loop, "stop here?")
    assert line.startswith("humor:1")
    assert line.endswith(" (stopped)")
    assert chat.messages[-1]["content"] == line.removesuffix(" (stopped)")
    said(chat, loop, "/new", "Go on?")
    chat.by_person = False
    with pytest.raises(KeyboardInterrupt):
        chat.take("stop again?", loop.run)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/compar verbosity=1", "unknown command /compar: did you mean /compare?"),
        ("/COMPARE", "unknown command /COMPARE: did you mean /compare?"),
        ("/new Other?", "/new takes nothing, got Other?"),
        ("/undo 2", "/undo takes nothing, got 2"),
        ("/compare humor=0 , verbosity=4", "a space between two settings, and none inside of one"),
        ("/set humour=1", "unknown attribute"),
        ("/set humor=5", "humor"),
        ("/set humor", "expected NAME=NUMBER, such as verbosity=1, got humor"),
        ("/unset humor", "humor isn't set"),
        ("/compare verbosity=0", "needs two settings"),
        ("/compare verbosity=0 verbosity=9", "verbosity"),
        ("/best many", "takes a number of answers, such as 4, got many"),
        ("/scores maybe", "takes on, off or nothing"),
        ("word " * 300, "max_seq_len is 200: /new begins another one"),
    ],
)
def test_what_is_wrong_with_a_line_changes_nothing(
    chat: Chat, loop: asyncio.Runner, line: str, message: str
) -> None:
    said(chat, loop, "Why?")
    before = ([*chat.messages], chat.attributes, chat.system)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        chat.take(line, loop.run)
    assert ([*chat.messages], chat.attributes, chat.system) == before


@pytest.mark.parametrize("line", ["/undo", "/compare humor=0 humor=1", "/scores", "/best 2"])
def test_before_a_question_there_is_none(chat: Chat, loop: asyncio.Runner, line: str) -> None:
    with pytest.raises(ValueError, match="nothing was asked yet"):
        chat.take(line, loop.run)


@pytest.mark.parametrize("line", ["/scores", "/best 2"])
def test_scores_need_an_attribute_model(chat: Chat, loop: asyncio.Runner, line: str) -> None:
    chat.model.attribute_model = None
    with pytest.raises(ValueError, match="needs an attribute model"):
        chat.take(line, loop.run)


def test_help_names_every_command(chat: Chat, loop: asyncio.Runner) -> None:
    text = "\n".join(said(chat, loop, "/help"))
    assert all(f"  {name} " in text for name in COMMANDS)
    assert not chat.take("/quit", loop.run)


def test_an_interrupted_comparison_ends(chat: Chat, loop: asyncio.Runner) -> None:
    """Not only the answer that is just written."""
    said(chat, loop, "stop?")
    assert len(said(chat, loop, "/compare humor=0 humor=1 humor=2")) == 2


def test_dropped_lines_take_those_before_with_them() -> None:
    given: Iterator[str | type[Exception]] = iter(
        ['"""a', InputDroppedError, "b\\", InputDroppedError, InputDroppedError, "c", EOFError]
    )

    def read(goes_on: bool) -> str:
        line = next(given)
        if isinstance(line, str):
            return line
        raise line

    assert [*whole_lines(read)] == ["c"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_answer_cannot_command_a_terminal(chat: Chat, loop: asyncio.Runner) -> None:
    """A file has the characters as they are."""
    said(chat, loop, "Why?")
    chat.messages[-1]["content"] = "a\x1b[2J\x9b1m\r\tb"
    chat.output = Terminal()
    chat.take("/history", loop.run)
    assert chat.output.getvalue().endswith("a\ufffd[2J\ufffd1m\ufffd\tb\n")
    assert said(chat, loop, "/history")[-1].endswith("a\x1b[2J\x9b1m\r\tb".splitlines()[-1])


def test_help_fits_a_terminal(chat: Chat, loop: asyncio.Runner) -> None:
    assert max(map(len, said(chat, loop, "/help"))) <= 80


def test_lines_that_go_on_are_put_together() -> None:
    """By a backslash, by quotes; at the end of a file what was begun is all of it."""
    given = iter(["one", "two \\", "more\\", "end", '"""a', "", 'b"""', '"""c"""', '"""open', "x"])

    def read(goes_on: bool) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    assert [*whole_lines(read)] == [
        *("one", "two \nmore\nend", "a\n\nb", "c", "open\nx"),
    ]
