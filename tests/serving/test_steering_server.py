"""The HTTP interface of a steered model, in this process: OpenAI's API, attributes, refusals."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from scripted_engine import ScriptedEngine

from steerlm2.attributes import AttributeSchema
from steerlm2.data.records import Turn
from steerlm2.data.templates import (
    encode_prompt,
    encode_response,
    extra_id_template,
    response_end,
)
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.inference.attribute_model import AttributeModel, load_attribute_model
from steerlm2.inference.steered import SteeredModel
from steerlm2.inference.streaming import GenerationSettings
from steerlm2.serving.chat_route import ChatWork
from steerlm2.serving.completion_routes import CompletionWork
from steerlm2.serving.http import json_by_items
from steerlm2.serving.steering_server import SteeringLimits, create_app

Json = dict[str, Any]

TEMPLATE, TOKENIZER = extra_id_template(), tiny_tokenizer()
STOP_ID = response_end(TEMPLATE, TOKENIZER)[1]
SCHEMA = AttributeSchema(("humor", "verbosity"))
USUAL, SYSTEM = "humor:0,verbosity:2", "Be kind."
LIMITS = SteeringLimits(max_body_bytes=20_000, max_items=4, max_n=4, max_new_tokens=64)
ASKS = [{"role": "user", "content": "Why?"}]
CHAT: Json = {"messages": ASKS}
PATH = "/v1/chat/completions"


def load_scorer() -> AttributeModel:
    return load_attribute_model(
        {
            "_component_": "torchtune.models.llama3.llama3",
            **{"vocab_size": 512, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1},
            **{"embed_dim": 32, "intermediate_dim": 64, "max_seq_len": 512},
        },
        None,
        TOKENIZER,
        TEMPLATE,
        SCHEMA,
        World(torch.device("cpu")),
        max_seq_len=256,
        max_tokens_per_microbatch=512,
        dtype=torch.float32,
    )


SCORER = load_scorer()


def words(prompt: Sequence[int], settings: GenerationSettings, j: int) -> list[int]:
    """The answer of every seed is another one; a temperature of 0 makes them one."""
    seed = 0 if settings.temperature == 0 else settings.seed + j
    return encode_response(TEMPLATE, TOKENIZER, f"Because of {seed} 😀 reasons.")


def steered(script: Any = words, *, scored: bool = True, **more: Any) -> SteeredModel:
    engine = ScriptedEngine(script, STOP_ID, **more)
    scorer = SCORER if scored else None
    return SteeredModel(TEMPLATE, TOKENIZER, SCHEMA, USUAL, SYSTEM, engine, scorer)


def engine_of(model: SteeredModel) -> ScriptedEngine:
    assert isinstance(model.engine, ScriptedEngine)
    return model.engine


MODEL = steered()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(MODEL, "mine", limits=LIMITS)) as client:
        yield client


def events_in(response: httpx.Response) -> list[Json]:
    """The objects of a stream, which ends with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def streamed_texts(events: list[Json]) -> dict[int, str]:
    found: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            i = choice["index"]
            found[i] = found.get(i, "") + choice["delta"].get("content", "")
    return found


def error_of(response: httpx.Response, status: int) -> Json:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert list(error) == ["type", "message", "param", "code"]
    return error


# Chats


def test_an_answer_has_openais_shape_and_the_attributes(client: TestClient) -> None:
    body = CHAT | {"attributes": {"verbosity": 4}, "seed": 7, "n": 2}
    answer = client.post(PATH, json=body).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert abs(answer.pop("created") - time.time()) < 60
    (prompt, settings) = engine_of(MODEL).asked[-1]
    assert prompt == encode_prompt(
        TEMPLATE, TOKENIZER, SYSTEM, [Turn("User", "Why?")], "humor:0,verbosity:4"
    )
    assert settings == GenerationSettings(64, n=2, seed=7)
    texts = ["Because of 7 😀 reasons.", "Because of 8 😀 reasons."]
    generated = sum(len(encode_response(TEMPLATE, TOKENIZER, text)) for text in texts)
    assert answer == {
        "object": "chat.completion",
        "model": "mine",
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
            for i, text in enumerate(texts)
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": generated,
            "total_tokens": len(prompt) + generated,
        },
        "attributes": {"humor": 0, "verbosity": 4},
    }


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"stop": ["reas", "x"]}, {"max_tokens": 5}])
def test_streams_give_what_whole_answers_give(client: TestClient, more: Json) -> None:
    body = CHAT | {"seed": 3} | more
    whole = client.post(PATH, json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = events_in(client.post(PATH, json=body | options))
    assert streamed_texts(events) == {
        choice["index"]: choice["message"]["content"] for choice in whole["choices"]
    }
    reasons = {
        choice["index"]: choice["finish_reason"]
        for event in events
        for choice in event["choices"]
        if choice["finish_reason"]
    }
    assert reasons == {choice["index"]: choice["finish_reason"] for choice in whole["choices"]}
    assert events[0]["attributes"] == whole["attributes"]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("attributes" not in event for event in events[1:])
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], whole["usage"])
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len(events) > 3


PLACES: dict[str, Json] = {
    "field": {"attributes": {"verbosity": 4, "humor": 1}},
    "label": {"attributes": "verbosity:4,humor:1"},
    "template argument": {"chat_template_kwargs": {"attributes": {"verbosity": 4, "humor": 1}}},
    "model's name": {"model": "mine@verbosity:4,humor:1"},
    "message": {"messages": [*ASKS, {"role": "attributes", "content": "verbosity:4,humor:1"}]},
    "several that agree": {
        "model": "mine@humor:1,verbosity:4",
        "attributes": {"humor": 1, "verbosity": 4},
    },
}


@pytest.mark.parametrize("more", PLACES.values(), ids=PLACES)
def test_attributes_may_stand_in_several_places(client: TestClient, more: Json) -> None:
    answer = client.post(PATH, json=CHAT | more).json()
    assert answer["attributes"] == {"humor": 1, "verbosity": 4}
    label = TOKENIZER.encode("humor:1,verbosity:4\n")
    assert engine_of(MODEL).asked[-1][0][-len(label) :] == label


def test_no_label_can_be_asked_for(client: TestClient) -> None:
    answer = client.post(PATH, json=CHAT | {"attributes": ""}).json()
    assert answer["attributes"] == {}
    assert TOKENIZER.token_id("<extra_id_2>") not in engine_of(MODEL).asked[-1][0]


def test_sampling_is_passed_on(client: TestClient) -> None:
    body = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_completion_tokens": 9, "seed": -1}
    client.post(PATH, json=CHAT | body)
    assert engine_of(MODEL).asked[-1][1] == GenerationSettings(
        9, temperature=0.5, top_p=0.9, top_k=7, seed=2**62 - 1
    )


def test_temperatures_too_low_to_divide_by_take_the_most_likely_token(client: TestClient) -> None:
    client.post(PATH, json=CHAT | {"temperature": 1e-50})
    client.put("/generate", json={"sentences": ["a"], "temperature": 1e-50})
    assert [settings.temperature for _, settings in engine_of(MODEL).asked[-2:]] == [0, 0]


def test_answers_without_a_seed_differ(client: TestClient) -> None:
    asked = [client.post(PATH, json=CHAT).json() for _ in range(2)]
    first, second = (answer["choices"][0]["message"]["content"] for answer in asked)
    assert first != second


def test_the_default_length_is_what_fits(client: TestClient) -> None:
    """The limit of an answer that doesn't say, or the room that the prompt leaves."""
    client.post(PATH, json=CHAT)
    assert engine_of(MODEL).asked[-1][1].max_new_tokens == 64
    long = {"messages": [{"role": "user", "content": "a " * 450}]}
    client.post(PATH, json=long)
    prompt, settings = engine_of(MODEL).asked[-1]
    assert settings.max_new_tokens == 512 - len(prompt) < 64


def test_log_probs_come_with_their_tokens(client: TestClient) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 2, "seed": 1}
    choice = client.post(PATH, json=body).json()["choices"][0]
    text = "Because of 1 😀 reasons."
    ids = TOKENIZER.encode(text)
    found = choice["logprobs"]["content"]
    assert [token["token"] for token in found] == [TOKENIZER.decode([each]) for each in ids]
    assert {token["logprob"] for token in found} == {-0.5}
    assert [each["token"] for each in found[0]["top_logprobs"]] == [
        TOKENIZER.decode([40]),
        TOKENIZER.decode([41]),
    ]
    whole = [token for token in found if token["bytes"] is not None]
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in whole)
    assert len(found) - len(whole) == 4, "the parts of the emoji have no text of their own"
    events = events_in(client.post(PATH, json=body | {"stream": True}))
    parts = [c["logprobs"]["content"] for e in events for c in e["choices"] if c["logprobs"]]
    assert [token for part in parts for token in part] == found


# Scores


def scores_of(text: str) -> Json:
    group, _ = SCORER.encode(SYSTEM, [Turn("User", "Why?")], [text])
    ((scores,),) = SCORER.score([group])
    return dict(zip(SCHEMA.names, scores, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_scores_are_the_attribute_models(client: TestClient, stream: bool) -> None:
    body = CHAT | {"scores": True, "n": 2, "seed": 5, "stream": stream}
    answer = client.post(PATH, json=body)
    events = events_in(answer) if stream else [answer.json()]
    scores = {
        choice["index"]: choice["scores"]
        for event in events
        for choice in event["choices"]
        if choice["finish_reason"]
    }
    for i in range(2):
        expected = scores_of(f"Because of {5 + i} 😀 reasons.")
        assert scores[i] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("n", [None, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_best_of_gives_the_nearest_first(client: TestClient, stream: bool, n: int | None) -> None:
    """By the attribute that was named, each with its scores; all of them unless n says fewer."""
    body = CHAT | {"best_of": 4, "n": n, "seed": 5, "stream": stream}
    answer = client.post(PATH, json=body | {"attributes": {"humor": 4}})
    texts = [f"Because of {5 + j} 😀 reasons." for j in range(4)]
    nearest = sorted(texts, key=lambda text: abs(scores_of(text)["humor"] - 4))[:n]
    if stream:
        events = events_in(answer)
        assert streamed_texts(events) == dict(enumerate(nearest))
        choices = [c for event in events for c in event["choices"] if c["finish_reason"]]
    else:
        choices = answer.json()["choices"]
        assert [choice["message"]["content"] for choice in choices] == nearest
        generated = sum(len(encode_response(TEMPLATE, TOKENIZER, text)) for text in texts)
        assert answer.json()["usage"]["completion_tokens"] == generated
    for choice, text in zip(choices, nearest, strict=True):
        assert choice["scores"] == pytest.approx(scores_of(text), abs=1e-5)


def test_texts_are_scored_as_by_the_reward_server(client: TestClient) -> None:
    turns = [{"from": "User", "value": "Why?"}, {"from": "Assistant", "value": "So."}]
    answer = client.post("/v1/attributes", json={"conversations": [{"conversations": turns}]})
    assert answer.json()["scores"] == [pytest.approx(scores_of("So."), abs=1e-5)]


def test_without_an_attribute_model_there_are_no_scores() -> None:
    with TestClient(create_app(steered(scored=False), "mine", limits=LIMITS)) as client:
        assert client.get("/v1/models").json()["data"][0]["scores"] is False
        assert client.post("/v1/attributes", json={"texts": ["a"]}).status_code == 404
        for more in ({"scores": True}, {"best_of": 2}):
            answer = client.post(PATH, json=CHAT | more)
            error = error_of(answer, 400)
            assert error["param"] in more
            assert "this server has no attribute model" in error["message"]


# Refusals

REFUSED: dict[str, tuple[Json, str, str | None]] = {
    "no messages": ({"messages": []}, "messages: List should have at least 1 item", "messages"),
    "no list": ({"messages": "hi"}, "messages: Input should be a valid list", "messages"),
    "no role": ({"messages": [{"content": "hi"}]}, "messages[0].role: Field required", "messages"),
    "a tool's role": (
        {"messages": [{"role": "tool", "content": "", "tool_call_id": "1"}]},
        "messages[0].role: unknown role 'tool', known: system, developer, user, assistant",
        "messages",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content must be a text",
        "messages",
    ),
    "tool calls": (
        {"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]},
        "messages[0]: this server doesn't do tool_calls",
        "messages",
    ),
    "no parts": (
        {"messages": [{"role": "user", "content": []}]},
        "messages[0].content must be a text, or a list of parts",
        "messages",
    ),
    "no text": (
        {"messages": [{"role": "user", "content": None}]},
        "messages[0].content: Input should be a text, or a list of parts, got None",
        "messages",
    ),
    "no message": ({"messages": ["hi"]}, "messages[0]: Input should be an object, got", "messages"),
    "no attributes": (
        {"attributes": ["humor"]},
        "attributes: Input should be an object, or a label such as 'helpfulness:4,verbosity:1'",
        "attributes",
    ),
    "a long label": ({"attributes": "x" * 5000}, "xxx...", "attributes"),
    "half surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate", None),
    "unknown field": (
        {"temprature": 1},
        "temprature: Extra inputs are not permitted",
        "temprature",
    ),
    "several fields": (
        {"tools": [{}], "frequency_penalty": 0.5, "response_format": {"type": "json_object"}},
        "this server doesn't do frequency_penalty, response_format, tools: leave",
        None,
    ),
    "OpenAI's verbosity": ({"verbosity": "low"}, "an attribute of that name goes into", None),
    "unknown attribute": (
        {"attributes": {"charm": 1}},
        "unknown attribute 'charm'; known: humor, verbosity",
        "attributes",
    ),
    "out of range": (
        {"attributes": "humor:7"},
        "humor must be a whole number from 0 to 4, got 7",
        "attributes",
    ),
    "contradiction": (
        {"attributes": {"humor": 1}, "model": "mine@humor:2"},
        "attributes: given in several places that contradict",
        "attributes",
    ),
    "contradicting messages": (
        {"messages": [*ASKS, *({"role": "attributes", "content": f"humor:{i}"} for i in (1, 2))]},
        "attributes: given in several places that contradict: 'humor:1,verbosity:2' and 'humor:2",
        "attributes",
    ),
    "attributes of a question": (
        {"messages": [ASKS[0] | {"attributes": {"humor": 1}}]},
        "messages[0].attributes: a message has those that it was given under",
        "messages",
    ),
    "bad suffix": (
        {"model": "mine@humor=2"},
        "'humor=2' is not of the form name:number",
        "attributes",
    ),
    "too many answers": ({"n": 5}, "n must be at most 4 (max_n), got 5", "n"),
    "too many to choose from": ({"best_of": 5}, "best_of must be at most 4 (max_n)", "best_of"),
    "fewer than asked": ({"best_of": 2, "n": 3}, "best_of (2) must be at least n (3)", None),
    "no answers": ({"n": 0}, "n: Input should be greater than or equal to 1", "n"),
    "hot": (
        {"temperature": 2.5},
        "temperature: Input should be less than or equal to 2",
        "temperature",
    ),
    "cold": (
        {"temperature": -1},
        "temperature: Input should be greater than or equal to 0",
        "temperature",
    ),
    "text for a number": (
        {"temperature": "1"},
        "temperature: Input should be a valid number",
        "temperature",
    ),
    "top_k": (
        {"top_k": 10**30},
        "top_k: Input should be less than or equal to 2147483647",
        "top_k",
    ),
    "top_p": ({"top_p": 0}, "top_p: Input should be greater than 0", "top_p"),
    "tokens": (
        {"max_tokens": 0},
        "max_tokens: Input should be greater than or equal to 1",
        "max_tokens",
    ),
    "two limits": ({"max_tokens": 5, "max_completion_tokens": 6}, "differ: send one of them", None),
    "no stop": ({"stop": 5}, "stop: Input should be a text, or a list of texts, got 5", "stop"),
    "stops": ({"stop": ["a"] * 17}, "stop: at most 16 texts", "stop"),
    "top without log-probs": ({"top_logprobs": 2}, "top_logprobs needs logprobs: true", None),
    "options without stream": ({"stream_options": {}}, "stream_options are for stream: true", None),
    "no room": (
        {"max_tokens": 600},
        "and 600 tokens of an answer are more than the model's 512",
        "messages",
    ),
}


@pytest.mark.parametrize("stream", [{}, {"stream": True}], ids=["whole", "stream"])
@pytest.mark.parametrize(("more", "message", "param"), REFUSED.values(), ids=REFUSED)
def test_refused(
    client: TestClient, more: Json, message: str, param: str | None, stream: Json
) -> None:
    """Before anything is generated, also where a stream was asked for."""
    if "stream_options" in more and stream:
        return
    asked = len(engine_of(MODEL).asked)
    body = json.dumps(CHAT | more | stream).encode()
    headers = {"Content-Type": "application/json"}
    error = error_of(client.post(PATH, content=body, headers=headers), 400)
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(engine_of(MODEL).asked) == asked


def test_a_long_conversation_is_told_by_its_code(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "a " * 600}]}
    error = error_of(client.post(PATH, json=body), 400)
    assert error["code"] == "context_length_exceeded"


def test_another_model_is_not_found(client: TestClient) -> None:
    for name in ("yours", "yours@humor:1", "mine@x@humor:1"):
        error = error_of(client.post(PATH, json=CHAT | {"model": name}), 404)
        assert error["code"] == "model_not_found"
        assert "only mine (or mine@NAME:VALUE,...)" in error["message"]


NEUTRAL: Json = {
    **{
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "user": "me",
    },
    **{"tool_choice": "none", "response_format": {"type": "text"}, "metadata": {"a": "b"}},
    **{"store": False, "parallel_tool_calls": True, "seed": None, "n": None, "stop": None},
    **{
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "top_k": -1,
        "ignore_eos": False,
        "functions": None,
    },
    **{"logprobs": False, "top_logprobs": 0, "unknown": None},
}


def test_what_changes_nothing_is_accepted(client: TestClient) -> None:
    answer = client.post(PATH, json=CHAT | NEUTRAL)
    assert answer.status_code == 200, answer.text
    kept = {"refusal": None, "annotations": [], "tool_calls": None, "function_call": None}
    kept["provider_specific_fields"] = {"refusal": None}
    said = {"role": "assistant", "content": "So."} | kept
    answer = client.post(PATH, json={"messages": [*ASKS, said, *ASKS]})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "method"),
    [("/v1/chat/completions", "POST"), ("/v1/completions", "POST"), ("/generate", "PUT")],
)
def test_bodies_that_are_none(client: TestClient, path: str, method: str) -> None:
    headers = {"Content-Type": "application/json"}
    for content, status in ((b"{", 400), (b"[]", 400), (b'{"n": NaN}', 400), (b" " * 30_000, 413)):
        error_of(client.request(method, path, content=content, headers=headers), status)
    error_of(client.request(method, path, content=b"{}"), 415)


def test_a_key_that_is_given_twice_is_refused(client: TestClient) -> None:
    """Which of the two is meant isn't known."""
    body = json.dumps(CHAT | {"attributes": {"humor": 1}}).replace("1}", '1, "humor": 4}')
    headers = {"Content-Type": "application/json"}
    answer = client.post(PATH, content=body, headers=headers)
    assert "key 'humor' is given twice" in error_of(answer, 400)["message"]


# Texts


def test_texts_are_continued_without_control_tokens(client: TestClient) -> None:
    body = {"prompt": ["<extra_id_1>User\n", "b"], "max_tokens": 40, "seed": 2, "n": 2}
    answer = client.post("/v1/completions", json=body).json()
    prompts = [prompt for prompt, _ in engine_of(MODEL).asked[-2:]]
    assert prompts == [TOKENIZER.encode("<extra_id_1>User\n"), TOKENIZER.encode("b")]
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [f"Because of {2 + j} 😀 reasons." for j in (0, 1, 0, 1)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[1])
    events = events_in(client.post("/v1/completions", json=body | {"stream": True}))
    streamed = ["", "", "", ""]
    for event in events:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts
    order = [event["choices"][0]["index"] // 2 for event in events if event["choices"]]
    assert order != sorted(order), "one prompt's answers were held back until the other's ended"


def test_token_ids_are_taken_as_they_are(client: TestClient) -> None:
    for prompt in ([3, 4, 5], [[3, 4, 5]]):
        client.post("/v1/completions", json={"prompt": prompt})
        asked, settings = engine_of(MODEL).asked[-1]
        assert asked == [3, 4, 5]
        assert settings.max_new_tokens == 16, "OpenAI's default"


def test_log_probs_of_texts(client: TestClient) -> None:
    body = {"prompt": "a", "max_tokens": 4, "logprobs": 1, "seed": 2}
    found = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    ids = TOKENIZER.encode("Because of 2")[:4]
    assert found["tokens"] == [TOKENIZER.decode([each]) for each in ids]
    assert found["token_logprobs"] == [-0.5] * 4
    assert found["top_logprobs"] == [{TOKENIZER.decode([40]): -0.25}] * 4
    assert found["text_offset"] == [len(TOKENIZER.decode(ids[:i])) for i in range(4)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": []}, "prompt: is empty"),
        ({"prompt": ["a"] * 5}, "at most 4 prompts (max_items), got 5"),
        ({"prompt": [1, 512]}, "token ids go from 0 to 511, got 512"),
        (
            {"prompt": ["a", 1]},
            "prompt: should be a text, token ids, or a list of texts or of lists",
        ),
        ({"prompt": "a", "attributes": {"humor": 1}}, "doesn't do attributes (they are for chats"),
        ({"prompt": [-1]}, "token ids go from 0 to 511, got -1"),
        ({"prompt": "a", "echo": True}, "doesn't do echo"),
        ({"prompt": "a", "suffix": "b"}, "doesn't do suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of is for chats"),
        ({"prompt": "a", "model": "mine@humor:1"}, "attributes are for chats"),
        ({"prompt": "a", "max_tokens": 600}, "more than the model's 512"),
    ],
)
def test_refused_texts(client: TestClient, more: Json, message: str) -> None:
    assert message in error_of(client.post("/v1/completions", json=more), 400)["message"]


# NeMo's interface


def guide_prompt(question: str, label: str) -> str:
    """As the SteerLM guide's client builds it."""
    return (
        f"<extra_id_0>System\n{SYSTEM}\n<extra_id_1>User\n{question}\n<extra_id_1>Assistant\n"
        f"<extra_id_2>{label}\n"
    )


GUIDES: dict[str, Json] = {
    "guide": {"top_k": 1, "end_strings": ["<extra_id_1>"]},
    "model card": {
        **{"temperature": 1.0, "add_BOS": False, "top_k": 0, "top_p": 1.0, "all_probs": False},
        **{"repetition_penalty": 1.0, "min_tokens_to_generate": 1},
        "end_strings": ["<|endoftext|>", "<extra_id_1>", "\x11", "<extra_id_1>User"],
    },
}
"""What the clients of the SteerLM guide, and of the published models' cards, send."""


@pytest.mark.parametrize("fields", GUIDES.values(), ids=GUIDES)
def test_the_guides_clients_get_their_answers(client: TestClient, fields: Json) -> None:
    prompt = guide_prompt("Why?", "humor:4,verbosity:1")
    body = fields | {"sentences": [prompt], "tokens_to_generate": 100, "greedy": True}
    (sentence,) = client.put("/generate", json=body).json()["sentences"]
    assert sentence == f"{prompt}Because of 0 😀 reasons.\n<extra_id_1>"
    asked, settings = engine_of(MODEL).asked[-1]
    assert asked == MODEL.prompt_ids(ASKS, {"humor": 4, "verbosity": 1})
    assert (settings.temperature, settings.max_new_tokens) == (0.0, 100)


def test_nemos_fields(client: TestClient) -> None:
    """What changes nothing is accepted; several sentences; an end string of plain text."""
    body = {
        **{"sentences": ["a", "<extra_id_1>b"], "tokens_to_generate": 32, "temperature": 0.7},
        **{"top_p": 0.0, "top_k": 5, "end_strings": ["reas"], "random_seed": 3, "add_BOS": True},
        **{"all_probs": False, "repetition_penalty": 1.0, "min_tokens_to_generate": 0},
    }
    sentences = client.put("/generate", json=body).json()["sentences"]
    assert sentences == ["aBecause of 3 😀 reas", "<extra_id_1>bBecause of 4 😀 reas"]
    assert engine_of(MODEL).asked[-1][1] == GenerationSettings(32, 1, 0.7, 1.0, 5, 4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sentences": []}, "sentences: List should have at least 1 item"),
        ({"sentences": ["a"] * 5}, "at most 4 sentences (max_items), got 5"),
        ({"repetition_penalty": 1.2}, "doesn't do repetition_penalty"),
        ({"all_probs": True, "compute_logprob": True}, "doesn't do all_probs, compute_logprob"),
        ({"min_tokens_to_generate": 2}, "doesn't do min_tokens_to_generate"),
        ({"temperature": 0}, "temperature: Input should be greater than 0"),
        ({"tokens_to_generate": 600}, "more than the model's 512"),
        ({"max_len": 5}, "max_len: Extra inputs"),
        ({"end_strings": ["a"] * 17}, "end_strings: at most 16 texts, got 17"),
    ],
)
def test_what_nemos_server_does_and_this_one_doesnt(
    client: TestClient, more: Json, message: str
) -> None:
    body = {"sentences": ["a"]} | more
    assert message in error_of(client.put("/generate", json=body), 400)["message"]


def test_reserved_tokens_stand_in_for_the_published_ones() -> None:
    """A client that knows only the published names asks a model with others, and gets its own."""
    names = {f"<extra_id_{i}>": f"<extra_id_{i + 3}>" for i in range(3)}
    template = extra_id_template(names)

    def script(prompt: Sequence[int], settings: GenerationSettings, j: int) -> list[int]:
        return encode_response(template, TOKENIZER, "So.")

    stop_id = response_end(template, TOKENIZER)[1]
    engine = ScriptedEngine(script, stop_id)
    model = SteeredModel(template, TOKENIZER, SCHEMA, USUAL, SYSTEM, engine)
    with TestClient(create_app(model, "mine", limits=LIMITS)) as client:
        prompt = guide_prompt("Why?", "humor:0,verbosity:2")
        body = {"sentences": [prompt], "end_strings": ["<extra_id_1>"]}
        (sentence,) = client.put("/generate", json=body).json()["sentences"]
    assert sentence == f"{prompt}So.\n<extra_id_1>"
    assert engine.asked[0][0] == model.prompt_ids(ASKS)


# What is served


def test_the_model_is_described(client: TestClient) -> None:
    (described,) = client.get("/v1/models").json()["data"]
    assert abs(described.pop("created") - time.time()) < 600
    assert described == {
        "id": "mine",
        "object": "model",
        "owned_by": "steerlm2",
        "max_model_len": 512,
        "max_n": 4,
        "attributes": [
            {"name": "humor", "min": 0, "max": 4, "default": 0},
            {"name": "verbosity", "min": 0, "max": 4, "default": 2},
        ],
        "system": SYSTEM,
        "scores": True,
    }
    assert client.get("/v1/models/mine").json()["id"] == "mine"
    assert client.get("/v1/models/yours").status_code == 404
    assert client.get("/v1/model").json()["max_n"] == 4


def test_the_page_is_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "steerlm2" in page.text


def test_metrics_count_requests_and_tokens(client: TestClient) -> None:
    client.post(PATH, json=CHAT)
    text = client.get("/metrics").text
    assert 'steerlm2_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "steerlm2_running_requests 0.0" in text
    generated = re.search(r"^steerlm2_generated_tokens_total (\S+)$", text, re.MULTILINE)
    assert generated is not None
    assert float(generated[1]) > 0


def test_the_interface_for_machines_knows_the_bodies(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    chat = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    fields = chat["application/json"]["schema"]["properties"]
    assert {"messages", "attributes", "best_of", "scores"} <= set(fields)
    assert {"ChatMessage", "ConversationItem"} <= set(described["components"]["schemas"])


def test_an_api_key_is_asked_for() -> None:
    """But for the health and the page, which a browser opens without one."""
    with TestClient(create_app(steered(), "mine", limits=LIMITS, api_key="s3cret")) as client:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "s3cret"}):
            error = error_of(client.get("/v1/models", headers=headers), 401)
            assert error["code"] == "invalid_api_key"
            assert client.post(PATH, json=CHAT, headers=headers).status_code == 401
            assert client.put("/generate", json={}, headers=headers).status_code == 401
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        headers = {"Authorization": "Bearer s3cret"}
        assert client.get("/v1/models", headers=headers).status_code == 200


# A real server, with OpenAI's client


@contextmanager
def listening(model: SteeredModel, **limits: Any) -> Iterator[tuple[str, uvicorn.Server]]:
    """A uvicorn server of this process, with its address."""
    app = create_app(model, "mine", limits=SteeringLimits(**{"max_new_tokens": 64} | limits))
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def openai_client() -> Iterator[openai.OpenAI]:
    with listening(steered()) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_openais_client(openai_client: openai.OpenAI) -> None:
    """n, seed, attributes as an extra field, usage, and the list of models."""
    assert [model.id for model in openai_client.models.list()] == ["mine"]
    answer = openai_client.chat.completions.create(
        model="mine",
        messages=[{"role": "user", "content": "Why?"}],
        n=2,
        seed=4,
        extra_body={"attributes": {"humor": 3}, "scores": True},
    )
    contents = [choice.message.content for choice in answer.choices]
    assert contents == [f"Because of {seed} 😀 reasons." for seed in (4, 5)]
    assert answer.model_extra == {"attributes": {"humor": 3, "verbosity": 2}}
    extra = answer.choices[0].model_extra
    assert extra is not None
    assert set(extra["scores"]) == {"humor", "verbosity"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    text = openai_client.completions.create(model="mine", prompt="a", seed=4, max_tokens=40)
    assert text.choices[0].text == "Because of 4 😀 reasons."


def test_openais_client_streams(openai_client: openai.OpenAI) -> None:
    chunks = list(
        openai_client.chat.completions.create(
            model="mine@humor:3",
            messages=[{"role": "user", "content": "Why?"}],
            seed=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    parts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(parts) == "Because of 4 😀 reasons."
    assert len([part for part in parts if part]) > 3
    assert chunks[-1].usage is not None


def test_openais_client_raises_its_own_errors(openai_client: openai.OpenAI) -> None:
    asks: Any = [{"role": "user", "content": "Why?"}]
    create = openai_client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="mine", messages=asks, extra_body={"attributes": {"humor": 9}})
    assert refused.value.param == "attributes"
    with pytest.raises(openai.BadRequestError) as too_long:
        create(model="mine", messages=[{"role": "user", "content": "a " * 600}], stream=True)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        create(model="yours", messages=asks)


@pytest.mark.parametrize("stream", [False, True])
def test_generation_ends_when_the_caller_goes_away(stream: bool) -> None:
    model = steered(gate=asyncio.Event())
    engine = engine_of(model)
    with listening(model) as (url, _):
        body = CHAT | {"stream": stream}
        with httpx.Client() as client:
            if stream:
                with client.stream("POST", f"{url}{PATH}", json=body) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    assert engine.running == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{url}{PATH}", json=body, timeout=0.2)
                assert engine.asked
        wait_until(lambda: engine.running == 0)
        wait_until(lambda: "running_requests 0.0" in httpx.get(f"{url}/metrics").text)
    assert engine.is_closed


def test_a_late_answer_is_a_timeout_and_a_late_stream_ends_with_an_error() -> None:
    model = steered(gate=asyncio.Event())
    with listening(model, request_timeout=0.3) as (url, _):
        error = error_of(httpx.post(f"{url}{PATH}", json=CHAT), 504)
        assert "not answered within 0.3 seconds (request_timeout)" in error["message"]
        stream = httpx.post(f"{url}{PATH}", json=CHAT | {"stream": True})
        assert stream.status_code == 200
        assert json.loads(stream.text.strip().split("\n\n")[-1][6:])["error"] == error
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asks: Any = ASKS
        with pytest.raises(openai.APIError, match="not answered within"):
            list(client.chat.completions.create(model="mine", messages=asks, stream=True))
    assert engine_of(model).running == 0


def test_more_requests_than_there_are_places_get_503() -> None:
    model = steered(gate=asyncio.Event())
    with listening(model, max_queue=2, request_timeout=10.0) as (url, _):
        body = CHAT | {"stream": True}
        with httpx.Client() as client, client.stream("POST", f"{url}{PATH}", json=body) as first:
            lines = first.iter_lines()  # a dropped iterator would close the connection
            next(lines)
            with client.stream("POST", f"{url}{PATH}", json=body) as second:
                more_lines = second.iter_lines()
                next(more_lines)
                answer = httpx.post(f"{url}{PATH}", json=body)
                assert "(the limit is 2): try again" in error_of(answer, 503)["message"]
                assert answer.headers["Retry-After"] == "1"


def test_the_bodies_of_streams_are_pending_until_their_end() -> None:
    """A stream goes on with what its request has asked for."""
    model = steered(gate=asyncio.Event())
    with listening(model, max_pending_bytes=1000) as (url, _), httpx.Client() as client:
        body = CHAT | {"stream": True, "user": "u" * 600}
        with client.stream("POST", f"{url}{PATH}", json=body) as first:
            lines = first.iter_lines()  # a dropped iterator would close the connection
            next(lines)
            refused = httpx.post(f"{url}{PATH}", json=body)
            assert "max_pending_bytes" in error_of(refused, 503)["message"]
        wait_until(lambda: engine_of(model).running == 0)
        with client.stream("POST", f"{url}{PATH}", json=body) as second:
            assert second.status_code == 200


def test_streams_come_to_their_end_when_the_server_is_told_to_stop() -> None:
    gate = asyncio.Event()
    model = steered(gate=gate)
    with listening(model) as (url, server), httpx.Client() as client:
        body = CHAT | {"stream": True, "seed": 1}
        with client.stream("POST", f"{url}{PATH}", json=body) as answer:
            lines = answer.iter_lines()
            text = next(lines)
            server.should_exit = True
            time.sleep(0.2)
            loop = server.servers[0].get_loop()
            loop.call_soon_threadsafe(gate.set)
            text = "\n".join([text, *lines])
    assert text.rstrip().endswith("data: [DONE]")
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert streamed_texts(events) == {0: "Because of 1 😀 reasons."}


def failing(error: Exception) -> SteeredModel:
    class Failing(ScriptedEngine):
        async def generate(self, prompt: Any, settings: Any) -> Any:
            raise error
            yield

    return dataclasses.replace(MODEL, engine=Failing(words, STOP_ID))


@pytest.mark.parametrize(
    ("error", "status", "message", "health"),
    [
        (ConnectionError("the server at X doesn't answer"), 502, "X doesn't answer", 200),
        (RuntimeError("the engine has stopped: no memory"), 503, "no memory; restart", 503),
        (ValueError("more than the engine has room for"), 400, "more than the engine", 200),
    ],
    ids=["unreachable", "ended", "refusing"],
)
def test_an_engine_that_fails_is_named(
    error: Exception, status: int, message: str, health: int
) -> None:
    """Also where a stream was asked for; one that has ended makes the server unhealthy."""
    with TestClient(create_app(failing(error), "mine", limits=LIMITS)) as client:
        assert client.get("/health").status_code == 200
        for stream in (False, True):
            answer = client.post(PATH, json=CHAT | {"stream": stream})
            assert message in error_of(answer, status)["message"]
        assert client.get("/health").status_code == health


def test_the_page_is_in_the_package() -> None:
    """Beside the module that serves it, so that a wheel has it too."""
    import steerlm2.serving.steering_server as module

    assert (Path(module.__file__).with_name("page") / "index.html").is_file()


# Too much


LONG = "word " * 3000
"""15,000 bytes: 512 tokens of at most 13 bytes can't be so many."""


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", PATH, {"messages": [{"role": "user", "content": LONG}]}),
        ("POST", PATH, {"messages": [{"role": "system", "content": LONG}, *ASKS]}),
        ("POST", "/v1/completions", {"prompt": LONG}),
        ("POST", "/v1/completions", {"prompt": ["a", LONG]}),
        ("PUT", "/generate", {"sentences": [LONG]}),
    ],
)
def test_prompts_that_cannot_fit_are_not_tokenised(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: Json
) -> None:
    seen: list[int] = []
    encode = type(TOKENIZER).encode

    def noted(self: Any, text: str) -> list[int]:
        seen.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(type(TOKENIZER), "encode", noted)
    error = error_of(client.request(method, path, json=body), 400)
    assert error["code"] == "context_length_exceeded"
    assert "shorten the" in error["message"]
    assert max(seen, default=0) < len(LONG)


@pytest.mark.parametrize(
    ("path", "work", "body"),
    [
        (PATH, ChatWork, CHAT | {"logprobs": True, "top_logprobs": 20}),
        ("/v1/completions", CompletionWork, {"prompt": "a", "max_tokens": 64, "logprobs": 20}),
    ],
)
def test_large_answers_are_put_together_aside(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, work: Any, body: Json
) -> None:
    """Those of 20 log-probs a token, which take seconds for 16 answers of 1,000 tokens."""
    threads: list[str] = []
    whole = work._whole

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return whole(*arguments)

    monkeypatch.setattr(work, "_whole", noted)
    assert len(client.post(path, json=body | {"n": 4}).json()["choices"]) == 4
    assert threads[0].startswith("intake")


def test_json_by_items_is_json() -> None:
    value = {"a": [1, {"b": [2.5, None]}], "ü": '"\n', "c": [], "d": {"e": [True]}, "f": [[]]}
    assert json_by_items(value) == json.dumps(value)
    assert json_by_items({}) == "{}"
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_by_items({"a": [float("nan")]})


@pytest.mark.parametrize(
    "body",
    [
        CHAT | {"model": "m" * 9000},
        CHAT | {"k" * 9000: 1},
        CHAT | {"attributes": {"a" * 9000: 1}},
        CHAT | {"attributes": "humor:" + "9" * 9000},
        {"messages": [{"role": "r" * 9000, "content": "a"}]},
        {"messages": [{"role": "user", "content": "a", "k" * 9000: 1}]},
        CHAT | {"n": "9" * 9000},
    ],
)
def test_refusals_echo_little(client: TestClient, body: Json) -> None:
    response = client.post(PATH, json=body)
    assert 400 <= response.status_code < 500
    assert len(response.json()["error"]["message"]) <= 500
    assert len(response.text) < 1000


@pytest.mark.parametrize(
    "prompt", [[{}], [1, "a"], [[1], "a"], [[1, "a"]], [True], {}, 3, None, [[1], 2], [1.5]]
)
def test_prompts_of_other_kinds_are_refused(client: TestClient, prompt: Any) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": prompt}), 400)
    assert "should be a text, token ids, or a list" in error["message"]
