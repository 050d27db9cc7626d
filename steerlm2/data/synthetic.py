"""A synthetic data set for first runs and tests: small, made up, and scored by counting.

It models no human preference. Short questions get templated answers of which two attributes can be
computed from the text alone: the length of an answer (verbosity) and the number of its exclamations
(humor). A record's label has values of both, and log P(a|x,y) is `beta_log_prob` of the computed
scores. Records have no log P(y|x) and log Q'(y|a,x), which depend on the model that is trained.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steerlm2.attributes import DEFAULT_SCHEMA, beta_log_prob, encode_label, parse_label
from steerlm2.data.records import USER, Record, Response, Turn
from steerlm2.data.tokenizers import (
    TINY_SPECIAL_TOKENS,
    TINY_VOCAB_SIZE,
    HFTokenizer,
    train_byte_level_bpe,
)

ATTRIBUTES = ("humor", "verbosity")
"""What `score_text` measures, in the order of the default schema."""

MAX_RESPONSES = 100

SYSTEM_PROMPT = "Answer the question. Follow the label: humor and verbosity go from 0 to 4."

WORDS_PER_STEP = 4
"""An answer of 1 word has verbosity 0, one of 1 + WORDS_PER_STEP words verbosity 1, and so on."""

_VALIDATION_FRACTION = 0.1


@dataclass(frozen=True)
class _Question:
    text: str
    short: str
    full: str


def score_text(text: str) -> dict[str, float]:
    """The attributes of an answer, each from 0 to 4, from its text alone.

    humor is the number of exclamation marks. verbosity is (words - 1) / WORDS_PER_STEP, where
    exclamations aren't counted as words.
    """
    sentences = re.findall(r"[^.!?]+[.!?]?", text)
    words = sum(len(s.split()) for s in sentences if not s.endswith("!"))
    scores = {"humor": float(text.count("!")), "verbosity": (words - 1) / WORDS_PER_STEP}
    return {name: min(max(scores[name], 0.0), 4.0) for name in ATTRIBUTES}


def steering_metrics(
    prompts: Sequence[str], labels: Sequence[str | None], responses: Sequence[str]
) -> dict[str, float]:
    """`mae_NAME`: mean |wanted - counted| over the responses whose label names the attribute.

    A metric function for `generation.metrics` of a training recipe.
    """
    errors: dict[str, list[float]] = {}
    for label, response in zip(labels, responses, strict=True):
        wanted = parse_label(label) if label else {}
        for name, score in score_text(response).items():
            if name in wanted:
                errors.setdefault(name, []).append(abs(wanted[name] - score))
    return {f"mae_{name}": sum(each) / len(each) for name, each in errors.items()}


def synthetic_records(
    num_records: int,
    responses_per_prompt: int,
    seed: int,
    split: Literal["train", "validation"] = "train",
) -> list[Record]:
    """Records of one split; the same arguments give the same records.

    A pair of a question and a label belongs to one split only, for every seed; a question is in
    both splits, with different labels. If there are more records than pairs, pairs are repeated
    with other responses. The responses of a record differ from each other, and their attribute
    values are spread over the whole range.

    Raises:
        ValueError: for an unknown split, no records, and fewer than 2 or too many responses.
    """
    problems = []
    if split not in ("train", "validation"):
        problems.append(f"split must be 'train' or 'validation', got {split!r}")
    if num_records < 1:
        problems.append(f"num_records must be at least 1, got {num_records}")
    if not 2 <= responses_per_prompt <= MAX_RESPONSES:
        problems.append(
            f"responses_per_prompt must be from 2 to {MAX_RESPONSES}, got {responses_per_prompt}"
        )
    if problems:
        raise ValueError("; ".join(problems))

    rng = random.Random(f"{split}:{seed}")
    pairs = list(_pairs(split))
    rng.shuffle(pairs)
    return [
        _record(question, wanted, responses_per_prompt, rng)
        for question, wanted in itertools.islice(itertools.cycle(pairs), num_records)
    ]


def build_tiny_tokenizer(directory: str | Path) -> HFTokenizer:
    """Train the tokenizer that `steerlm2.data.tiny_tokenizer` loads, and save it.

    It is trained on the synthetic records and a page of plain English.
    """
    trained = train_byte_level_bpe(_corpus(), TINY_VOCAB_SIZE, TINY_SPECIAL_TOKENS)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    side_files = {"tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    tokenizer = HFTokenizer(trained.to_str(pretty=True) + "\n", side_files)
    tokenizer.save(directory)
    return tokenizer


def _corpus() -> Iterator[str]:
    for record in synthetic_records(1000, 4, seed=0):
        yield f"System\n{record.system}\n"
        yield f"User\n{record.prompt_turns[0].value}\n"
        yield f"Assistant\n{record.label}\n"
        yield from (response.value + "\n" for response in record.responses)
    for name, value in itertools.product(DEFAULT_SCHEMA.names, range(5)):
        yield from [f"{name}:{value},"] * 40
    yield from [_ENGLISH] * 20


def _record(
    question: _Question, wanted: dict[str, int], num_responses: int, rng: random.Random
) -> Record:
    texts: dict[str, None] = {}
    levels: Iterator[tuple[int, int]] = iter(())
    while len(texts) < num_responses:
        level = next(levels, None)
        if level is None:
            levels = iter(rng.sample(_LEVELS, len(_LEVELS)))
        else:
            texts[_answer(question, *level, rng)] = None
    scores = [score_text(text) for text in texts]
    log_p = beta_log_prob(
        [[score[name] for name in ATTRIBUTES] for score in scores],
        [wanted[name] for name in ATTRIBUTES],
    ).sum(dim=-1)
    return Record(
        system=SYSTEM_PROMPT,
        prompt_turns=[Turn(USER, question.text)],
        label=encode_label(wanted),
        responses=[
            Response(text, log_p_attributes=log_p_attributes, scores=score)
            for text, score, log_p_attributes in zip(texts, scores, log_p.tolist(), strict=True)
        ],
        extra={"synthetic": True},
    )


def _answer(question: _Question, humor: int, verbosity: int, rng: random.Random) -> str:
    """An answer with `humor` exclamations and a length as near `verbosity` as sentences allow."""
    sentences = [question.short if verbosity == 0 else question.full]
    remarks = rng.sample(_REMARKS, len(_REMARKS))
    while score_text(" ".join(sentences))["verbosity"] < verbosity - 0.5:
        sentences.append(remarks.pop())
    for exclamation in rng.sample(_EXCLAMATIONS, humor):
        sentences.insert(rng.randint(0, len(sentences)), exclamation)
    return " ".join(sentences)


def _pairs(split: str) -> Iterator[tuple[_Question, dict[str, int]]]:
    """The pairs of a question and a label that belong to the split."""
    rng = random.Random("the split of the synthetic data")
    for question, level in itertools.product(_questions(), _LEVELS):
        if (rng.random() < _VALIDATION_FRACTION) == (split == "validation"):
            yield question, dict(zip(ATTRIBUTES, level, strict=True))


@functools.cache
def _questions() -> tuple[_Question, ...]:
    capitals = [
        _Question(
            f"What is the capital of {country}?",
            f"{city}.",
            f"The capital of {country} is {city}.",
        )
        for country, city in _split_pairs(_CAPITALS)
    ]
    colors = [
        _Question(
            f"Which color does {thing} have?",
            f"{color.capitalize()}.",
            f"{thing.capitalize()} is {color}.",
        )
        for thing, color in _split_pairs(_COLORS)
    ]
    legs = [
        _Question(
            f"How many legs does a {animal} have?",
            f"{count.capitalize()}.",
            f"A {animal} has {count} legs.",
        )
        for animal, count in _split_pairs(_LEGS)
    ]
    young = [
        _Question(
            f"What is a young {animal} called?",
            f"A {name}.",
            f"A young {animal} is called a {name}.",
        )
        for animal, name in _split_pairs(_YOUNG)
    ]
    opposites = [
        _Question(
            f"What is the opposite of {word}?",
            f"{opposite.capitalize()}.",
            f"The opposite of {word} is {opposite}.",
        )
        for word, opposite in _split_pairs(_OPPOSITES)
    ]
    sums = [
        _Question(
            f"What is {_NUMBERS[a]} plus {_NUMBERS[b]}?",
            f"{_NUMBERS[a + b].capitalize()}.",
            f"{_NUMBERS[a].capitalize()} plus {_NUMBERS[b]} is {_NUMBERS[a + b]}.",
        )
        for a, b in itertools.combinations_with_replacement(range(1, 10), 2)
    ]
    tasks = [
        _Question(f"How do I {task}?", f"{how.capitalize()}.", f"To {task}, {how}.")
        for task, how in _split_pairs(_TASKS)
    ]
    return (*capitals, *colors, *legs, *young, *opposites, *sums, *tasks)


def _split_pairs(text: str) -> list[tuple[str, str]]:
    pairs = [item.split(": ") for item in text.split("; ")]
    return [(key, value) for key, value in pairs]


_LEVELS = list(itertools.product(range(5), range(5)))

_EXCLAMATIONS = ["Ha ha!", "Just kidding!", "Beep boop!", "Ta da!", "Oh boy!", "Wow!", "Yay!"]

_REMARKS = [
    "That is all.",
    "It is easy.",
    "Most people know this.",
    "You can look it up.",
    "I am quite sure.",
    "This is well known.",
    "It is good to know.",
    "Please ask me more.",
    "There is more to say.",
    "I hope this helps you.",
    "We learn it at school.",
    "It has been so for long.",
]

_CAPITALS = (
    "France: Paris; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Germany: Berlin; "
    "Austria: Vienna; Poland: Warsaw; Greece: Athens; Norway: Oslo; Sweden: Stockholm; "
    "Denmark: Copenhagen; "
    "Finland: Helsinki; Ireland: Dublin; Hungary: Budapest; Japan: Tokyo; China: Beijing; "
    "India: Delhi; Egypt: Cairo; Kenya: Nairobi; Ghana: Accra; Peru: Lima; Chile: Santiago; "
    "Cuba: Havana; Canada: Ottawa; Iran: Tehran; Iraq: Baghdad; Nepal: Kathmandu; Vietnam: Hanoi"
)
_COLORS = (
    "a ripe banana: yellow; fresh grass: green; clean snow: white; the clear sky: blue; "
    "a ripe tomato: red; coal: black; a carrot: orange; milk: white; an elephant: gray; "
    "a lemon: yellow; a raven: black; chocolate: brown; a plum: purple; a frog: green; salt: white"
)
_LEGS = (
    "dog: four; cat: four; horse: four; cow: four; mouse: four; lion: four; hen: two; duck: two; "
    "goose: two; robin: two; bee: six; fly: six; beetle: six; moth: six; spider: eight; "
    "scorpion: eight; snake: no; worm: no"
)
_YOUNG = (
    "dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb; goat: kid; hen: chick; "
    "duck: duckling; goose: gosling; bear: cub; lion: cub; deer: fawn; pig: piglet; frog: tadpole"
)
_OPPOSITES = (
    "hot: cold; big: small; up: down; left: right; day: night; old: new; fast: slow; hard: soft; "
    "wet: dry; open: closed; full: empty; high: low; long: short; light: dark; early: late; "
    "loud: quiet; rich: poor; first: last; inside: outside; clean: dirty"
)
_TASKS = (
    "boil an egg: cook it ten minutes; make tea: pour hot water on it; cool a drink: add ice; "
    "dry a shirt: hang it up; clean a window: use warm water; sharpen a pencil: turn it; "
    "light a dark room: open the curtain; stay dry in rain: take an umbrella; "
    "keep milk fresh: keep it cold; grow a plant: give it water and sun; "
    "fall asleep: rest quietly; learn a word: say it often"
)
_NUMBERS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    "eighteen",
]

_ENGLISH = """\
The house stood at the end of the road, and in the evening the light of the sun came in through the
windows. She had been there before, when she was a child, with her mother and her brother, but she
could not remember what the rooms looked like. There was a table, there were some chairs, and on the
wall hung a picture of a ship on the sea. What would they say if they saw her now?

Water boils when it is hot enough. A small amount of salt in the water makes it boil a little later,
which is something that many cooks know. If you want to make a good soup, then you should first cut
the onions, let them cook in butter for about ten minutes, and only then add the other things.

In the first part of this text we will show how the work can be done. The second part explains why
it should be done in this way and not in another. For example, people often think that a longer
answer is a better answer, because it has more information in it. However, this is not always true:
most of the time a short and clear answer is what they are looking for. Do you have any questions?
"""
