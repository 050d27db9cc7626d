"""Answers at validations: what is asked, and what is written down of the answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder

from steerlm2.config.keys import GenerationOptions
from steerlm2.config.loader import Component
from steerlm2.data.conversations import Conversation
from steerlm2.data.records import Turn
from steerlm2.data.templates import encode_prompt, encode_response, extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.inference import validation_answers
from steerlm2.inference.validation_answers import Question, ValidationAnswers, questions_of
from steerlm2.models.decoders import end_at_hidden_states
from steerlm2.runs.metrics import JsonLines

TEMPLATE, TOKENIZER = extra_id_template(), tiny_tokenizer()
CPU = World(torch.device("cpu"))


def decoder() -> TransformerDecoder:
    return llama3(
        vocab_size=512, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=8,
        intermediate_dim=8, max_seq_len=256,
    )  # fmt: skip


def lengths(prompts: list[str], labels: list[str | None], responses: list[str]) -> dict[str, float]:
    """A user's metric function."""
    return {"mean_length": sum(map(len, responses)) / len(responses)}


def test_prompts_come_first_and_then_the_first_conversations() -> None:
    options = GenerationOptions(prompts=["one"], label="humor:1", system="S", from_dataset_val=1)
    turns = [Turn("User", "two"), Turn("Assistant", "x", "humor:2")]
    left_out = Conversation([Turn("User", "three"), Turn("Assistant", "y")], "U")
    questions = questions_of(options, TEMPLATE, TOKENIZER, [Conversation(turns, "T"), left_out])
    assert questions == [
        Question(
            "one",
            "humor:1",
            encode_prompt(TEMPLATE, TOKENIZER, "S", [Turn("User", "one")], "humor:1"),
        ),
        Question(
            "two",
            "humor:2",
            encode_prompt(TEMPLATE, TOKENIZER, "T", [Turn("User", "two")], "humor:2"),
        ),
    ]


def test_nothing_is_asked_without_the_section(tmp_path: Path) -> None:
    assert questions_of(None, TEMPLATE, TOKENIZER, []) == []
    samples = JsonLines(tmp_path / "samples.jsonl")
    answers = ValidationAnswers(None, TEMPLATE, TOKENIZER, [], samples)
    assert answers.longest == 0
    assert answers.sample(decoder(), CPU, step=1, seed=0) == {}
    assert samples.read() == []


def test_samples_and_metrics_are_of_texts_without_the_end_of_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template ends an answer by a line break and the stop token: neither is text."""
    (*answer, _) = encode_response(TEMPLATE, TOKENIZER, "good")
    assert TOKENIZER.decode(answer) == "good\n"
    monkeypatch.setattr(validation_answers, "sample_tokens", lambda *given, **how: [answer])
    metric = Component(_component_=f"{__name__}.lengths")
    monkeypatch.setattr(
        validation_answers,
        "answer_metrics",
        lambda components, *texts: lengths(*texts) if components == [metric] else {},
    )
    options = GenerationOptions(prompts=["q"], label="humor:4", metrics=[metric])
    samples = JsonLines(tmp_path / "samples.jsonl")
    answers = ValidationAnswers(options, TEMPLATE, TOKENIZER, [], samples)
    metrics = answers.sample(decoder(), CPU, step=3, seed=0)
    assert samples.read() == [{"step": 3, "label": "humor:4", "prompt": "q", "response": "good"}]
    assert metrics == {"mean_length": 4.0}


def test_answers_follow_from_seed_and_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = decoder()
    end_at_hidden_states(model)
    options = GenerationOptions(prompts=["q"], max_new_tokens=5, temperature=1.0, top_p=1.0)
    samples = JsonLines(tmp_path / "samples.jsonl")
    answers = ValidationAnswers(options, TEMPLATE, TOKENIZER, [], samples)
    for step in (1, 1, 2):
        answers.sample(model, CPU, step=step, seed=0)
    first, again, other = (entry["response"] for entry in samples.read())
    assert first == again != other


def test_the_longest_question_has_room_for_its_answer(tmp_path: Path) -> None:
    options = GenerationOptions(prompts=["a", "a a a"], max_new_tokens=7)
    samples = JsonLines(tmp_path / "samples.jsonl")
    answers = ValidationAnswers(options, TEMPLATE, TOKENIZER, [], samples)
    assert answers.longest == len(answers.questions[1].tokens) + 7
