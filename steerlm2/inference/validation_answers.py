"""Answers that a training run samples at its validations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torchtune.modules import TransformerDecoder

from steerlm2.config.keys import GenerationOptions
from steerlm2.data.conversations import Conversation
from steerlm2.data.records import ASSISTANT, USER, Turn
from steerlm2.data.templates import Template, encode_prompt
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.distributed.world import World
from steerlm2.inference.engines import response_end
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


def answer_questions(
    decoder: TransformerDecoder,
    questions: Sequence[Question],
    options: GenerationOptions | None,
    template: Template,
    tokenizer: Tokenizer,
    world: World,
    *,
    step: int,
    seed: int,
    samples: JsonLines,
) -> dict[str, float]:
    """Sample an answer to every question, and append it to `samples.jsonl`. Called by all ranks.

    The texts are without the template's end of turn and stop token.

    Args:
        samples: the file.

    Returns:
        The values of the functions in `options.metrics` for the answers, the same on all ranks.
    """
    if options is None:
        return {}
    end_of_turn, stop_id = response_end(template, tokenizer)
    answers = sample_tokens(
        decoder,
        [question.tokens for question in questions],
        world,
        stop_id=stop_id,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=seed + step,
    )
    prompts = [question.prompt for question in questions]
    labels = [question.label for question in questions]
    responses = [tokenizer.decode(answer).removesuffix(end_of_turn) for answer in answers]
    if world.is_main:
        for prompt, label, response in zip(prompts, labels, responses, strict=True):
            samples.append({"step": step, "label": label, "prompt": prompt, "response": response})
    # On one rank only, because a metric function may send requests to a server.
    metrics = world.on_main(lambda: answer_metrics(options.metrics, prompts, labels, responses))
    return world.from_main(metrics) or {}
