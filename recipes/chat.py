"""A chat with a steered model in the terminal.

    tune run chat --config tiny/chat
    tune run chat --config any/chat checkpointer.checkpoint_dir=steerlm2

    > What is the capital of France?
    > /set verbosity=1 humor=4
    > /compare verbosity=0 verbosity=4
    > /help

Answers appear while they are generated; Ctrl-C stops one, Ctrl-D leaves. Lines that come through a
pipe are answered in the same way, without prompts, and what is wrong in them ends the chat:

    printf 'Who are you?\\n' | tune run chat --config any/chat checkpointer.checkpoint_dir=steerlm2

With an attribute model `/scores` says what an answer has, and `/best 4` takes the nearest of four.
The model is a checkpoint, in this process, or a vLLM server.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from steerlm2.attributes import parse_label
from steerlm2.config.keys import SteeredKeys
from steerlm2.distributed.world import init_world
from steerlm2.escaping import shown
from steerlm2.inference.chat import Chat, InputDroppedError, whole_lines
from steerlm2.inference.load_steered import load_steered_model
from steerlm2.inference.streaming import GenerationSettings
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.processes import use_cores_in_other_threads


@dataclass(kw_only=True)
class ChatConfig(SteeredKeys):
    """The keys of chat."""

    attributes: str | None = None
    """What is set at the beginning: a label such as verbosity:1; null: the usual values."""
    show_scores: bool = False
    """Give the attribute model's scores after each answer."""
    temperature: float = 0.7
    """0 takes the most likely token."""
    top_p: float = 0.9
    """Tokens that together have this probability are sampled from."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.temperature < 0:
            found.append(f"'temperature' must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            found.append(f"'top_p' must be above 0 and at most 1, got {self.top_p}")
        if self.show_scores and self.attribute_model is None:
            found.append("'show_scores' needs 'attribute_model': what scores")
        return found


class ChatRecipe:
    """The run: setup -> chat."""

    def __init__(self, cfg: ChatConfig) -> None:
        self.cfg = cfg
        self.world = init_world("cpu" if cfg.server and not cfg.attribute_model else cfg.device)

    def setup(self) -> None:
        cfg = self.cfg
        use_cores_in_other_threads()
        model = load_steered_model(cfg, self.world)
        wanted = parse_label(cfg.attributes) if cfg.attributes else {}
        model.label(wanted)
        settings = GenerationSettings(
            cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed
        )
        by_person = sys.stdin.isatty()
        self.chat = Chat(model, settings, sys.stdout, wanted, cfg.show_scores, by_person)

    def run(self) -> None:
        """Answer lines until their end."""
        by_person = self.chat.by_person
        # One event loop: an engine goes on in it from answer to answer.
        with asyncio.Runner() as loop:
            try:
                for line in self._lines():
                    try:
                        if not self.chat.take(line, loop.run):
                            break
                    except (ValueError, ConnectionError) as error:
                        if not by_person:
                            raise
                        print(shown(str(error)), file=sys.stderr)
                    except KeyboardInterrupt:  # of what isn't an answer
                        if not by_person:
                            raise
                        print()
            finally:
                loop.run(self.chat.model.engine.close())

    def _lines(self) -> Iterator[str]:
        if not self.chat.by_person:
            return whole_lines(lambda goes_on: input())
        with contextlib.suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # gives input() arrow keys and the lines before
        # Where answers go into a file, what is only for the person doesn't.
        aside = sys.stdout if sys.stdout.isatty() else sys.stderr

        def typed(goes_on: bool) -> str:
            prompt = "... " if goes_on else "> "
            try:
                if aside is sys.stdout:
                    return input(prompt)
                print(prompt, end="", file=aside, flush=True)
                return input()
            except KeyboardInterrupt:
                print(file=aside)
                raise InputDroppedError from None
            except EOFError:
                print(file=aside)
                raise

        label = self.chat.model.label(self.chat.attributes) or "no attributes"
        print(f"{label}; /help lists the commands", file=aside)
        return whole_lines(typed)


@recipe_main(ChatConfig)
def main(cfg: ChatConfig) -> None:
    recipe = ChatRecipe(cfg)
    recipe.setup()
    recipe.run()


if __name__ == "__main__":
    main()
