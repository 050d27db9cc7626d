"""Answers that a training run samples at its validations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torchtune.modules import TransformerDecoder

from steerlm2.config.keys import GenerationOptions
from steerlm2.data.conversations import Conversation
from steerlm2.data.records import ASSISTANT, USER, Turn
from steerlm2.data.templates import Template, encode_prompt, response_end
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.distributed.world import World
from steerlm2.inference.sampling import sample_tokens
from steerlm2.runs.metrics import JsonLines, answer_metrics


class Question(NamedTuple):
    """A prompt to be answered, as text and as tokens."""

    prompt: str
    label: str | None
    tokens: list[int]


def questions_of(
    options: GenerationOptions | None,
    template: Template,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
) -> list[Question]:
    """The questions of every validation: the section's prompts, then the first conversations.

    Args:
        options: None: no questions.
        conversations: the validation data; the last turn of each is to be answered.
    """
    if options is None:
        return []
    asked = [
        Conversation([Turn(USER, text), Turn(ASSISTANT, "", options.label)], options.system)
        for text in options.prompts
    ]
    asked += conversations[: options.from_dataset_val]
    questions = []
    for conversation in asked:
        *turns, answer = conversation.turns
        tokens = encode_prompt(template, tokenizer, conversation.system, turns, answer.label)
        prompt = "\n".join(turn.value for turn in turns)
        questions.append(Question(prompt, answer.label, tokens))
    return questions


class ValidationAnswers:
    """Samples an answer to every question at each validation, into `samples.jsonl`.

    Args:
        options: None: no questions.
        conversations: the validation data; the last turn of each is to be answered.
        samples: the file.

    Attributes:
        longest: tokens of the longest question with its answer.
    """

    def __init__(
        self,
        options: GenerationOptions | None,
        template: Template,
        tokenizer: Tokenizer,
        conversations: Sequence[Conversation],
        samples: JsonLines,
    ) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.samples = samples
        self.questions = questions_of(options, template, tokenizer, conversations)
        self.end_of_turn, self.stop_id = response_end(template, tokenizer)
        generated = options.max_new_tokens if options else 0
        self.longest = max((len(q.tokens) + generated for q in self.questions), default=0)

    def sample(
        self, decoder: TransformerDecoder, world: World, *, step: int, seed: int
    ) -> dict[str, float]:
        """Answer all questions with the weights after a step. Called by all ranks.

        The texts are without the template's end of turn and stop token.

        Returns:
            The values of the functions in `options.metrics` for the answers, the same on all
            ranks.
        """
        options = self.options
        if options is None:
            return {}
        answers = sample_tokens(
            decoder,
            [question.tokens for question in self.questions],
            world,
            stop_id=self.stop_id,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=seed + step,
        )
        prompts = [question.prompt for question in self.questions]
        labels = [question.label for question in self.questions]
        texts = [self.tokenizer.decode(answer).removesuffix(self.end_of_turn) for answer in answers]
        if world.is_main:
            for prompt, label, text in zip(prompts, labels, texts, strict=True):
                entry = {"step": step, "label": label, "prompt": prompt, "response": text}
                self.samples.append(entry)
        # On one rank only, because a metric function may send requests to a server.
        metrics = world.on_main(lambda: answer_metrics(options.metrics, prompts, labels, texts))
        return world.from_main(metrics) or {}
