"""A chat in a pseudo-terminal: run as a script, it types, and checks what is to be seen."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import signal
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 60.0
"""That a step may take; it ends as soon as its text is there."""
CTRL_C, CTRL_D, UP, BACKSPACE = "\x03", "\x04", "\x1b[A", "\x7f"
PROMPT, GOES_ON = "\r\n> ", "\r\n... "

STEPS = (
    # typed, what must then appear
    ("Grüße? 😀\n", "echo: Grüße? 😀" + PROMPT),
    (UP + BACKSPACE * 2 + "!\n", "echo: Grüße?!" + PROMPT),
    ("stop here\n", "echo: "),
    (CTRL_C, "(stopped)" + PROMPT),
    ("/history\n", "model: echo: " + PROMPT),
    ("dropped", "dropped"),
    (CTRL_C, PROMPT),
    ('"""two\n', GOES_ON),
    (CTRL_C, PROMPT),
    ('"""two\n', GOES_ON),
    ('lines"""\n', "echo: two\r\nlines" + PROMPT),
    ("\\033[2J\n", "echo: \ufffd[2J" + PROMPT),
    ("/set humour=4\n", "as far as its folder and the config say (schema)" + PROMPT),
    (
        "/compare\n",
        "/compare needs two settings: /compare verbosity=0 verbosity=4,humor=1" + PROMPT,
    ),
    ("/comapre\n", "did you mean /compare?" + PROMPT),
    (CTRL_D, "\r\n"),
)


def chat() -> None:
    """The recipe, with an engine that repeats the question; "stop" waits for Ctrl-C."""
    sys.path.insert(0, str(REPOSITORY / "recipes"))
    from chat import ChatRecipe
    from steerlm2.data.templates import extra_id_template, response_end
    from steerlm2.data.tokenizers import tiny_tokenizer
    from steerlm2.inference.chat import Chat
    from steerlm2.inference.steered import SteeredModel
    from steerlm2.inference.streaming import GenerationSettings, Piece

    template, tokenizer = extra_id_template(), tiny_tokenizer()

    class Echo:
        max_seq_len = 400

        async def generate(
            self, prompt: Sequence[int], settings: GenerationSettings
        ) -> AsyncGenerator[Piece]:
            question = tokenizer.decode(prompt).rpartition("User\n")[2].partition("\n<")[0]
            yield Piece(0, tokenizer.encode("echo: "), None, None)
            if "stop" in question:
                await asyncio.Event().wait()
            text = question.replace("\\033", "\033") + "\n"
            yield Piece(0, tokenizer.encode(text), None, None)
            yield Piece(0, [response_end(template, tokenizer)[1]], None, "stop")

        async def close(self) -> None: ...

    engine: Any = Echo()
    model = SteeredModel(template, tokenizer, None, None, "", engine)
    recipe = ChatRecipe.__new__(ChatRecipe)  # without a config: its model is this one
    recipe.chat = Chat(model, GenerationSettings(64), sys.stdout)
    recipe.run()


def type_and_look(terminal: int) -> None:
    """Go through STEPS in a terminal, after its first prompt."""
    received = b""
    for typed, expected in (("", PROMPT), *STEPS):
        if typed == CTRL_C:
            time.sleep(0.3)  # between a prompt and the reading after it the signal would be missed
        os.write(terminal, typed.encode())
        seen, end = "", time.monotonic() + SECONDS
        while expected not in seen:
            assert time.monotonic() < end, f"typed {typed!r}: {expected!r} is not in {seen!r}"
            if select.select([terminal], [], [], 1.0)[0]:
                received += os.read(terminal, 1 << 16)
            text = received.decode("utf-8", "ignore")
            seen, received = seen + text, received[len(text.encode()) :]


def main() -> None:
    process, terminal = pty.fork()
    if process == 0:
        os.environ["TERM"] = "dumb"
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
        chat()
        sys.stdout.flush()
        os._exit(0)
    type_and_look(terminal)
    assert os.waitpid(process, 0)[1] == 0


if __name__ == "__main__":
    main()
