"""The HTTP interface, in this process: answers, refusals, and what they say."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from steerlm2.attributes import AttributeSchema
from steerlm2.data.conversations import Conversation
from steerlm2.data.packing import RewardGroup
from steerlm2.data.records import Turn
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT
from steerlm2.data.templates import EXTRA_ID_TOKENS, extra_id_template
from steerlm2.data.tokenizers import HFTokenizer, tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.inference.attribute_model import AttributeModel, load_attribute_model
from steerlm2.serving.batcher import score_texts
from steerlm2.serving.http import RequestError, Strict, parse_body
from steerlm2.serving.reward_server import Limits, create_app, encode

Json = dict[str, Any]

MAX_SEQ_LEN = 160
LIMITS = Limits(max_body_bytes=20_000, max_items=8)
USER, ASSISTANT = {"from": "User", "value": "What is it?"}, {"from": "Assistant", "value": "Good."}
GOOD: Json = {"conversations": [USER, ASSISTANT]}


def load_model() -> AttributeModel:
    return load_attribute_model(
        {
            "_component_": "torchtune.models.llama3.llama3",
            **{"vocab_size": 512, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
            **{"embed_dim": 128, "intermediate_dim": 384, "max_seq_len": 2048},
        },
        None,
        tiny_tokenizer(),
        extra_id_template(),
        AttributeSchema(("humor", "verbosity")),
        World(torch.device("cpu")),
        max_seq_len=MAX_SEQ_LEN,
        max_tokens_per_microbatch=512,
        dtype=torch.float32,
    )


MODEL = load_model()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(MODEL, "mine", limits=LIMITS)) as client:
        yield client


def expected(system: str, turns: Sequence[Turn], response: str) -> dict[str, Any]:
    """The scores of one conversation alone, by the model's own interface."""
    group, _ = MODEL.encode(system, turns, [response])
    ((scores,),) = MODEL.score([group])
    return pytest.approx(dict(zip(("humor", "verbosity"), scores, strict=True)), abs=1e-5)


def error_of(response: Any, status: int) -> str:
    """The message of an answer, which has the one shape that all errors have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["type", "message", "param", "code"]
    return body["error"]["message"]


def test_conversations_get_named_scores_in_order(client: TestClient) -> None:
    """With a system text and without, of one turn and of three; labels make no difference."""
    labelled = {"from": "Assistant", "value": "No.", "label": "humor:4"}
    items = [
        {"system": "Be brief.", "conversations": [USER, ASSISTANT], "mask": "User"},
        {"conversations": [USER, labelled, USER, ASSISTANT | {"label": "humor:1"}]},
        {"conversations": [ASSISTANT], "type": "VALUE_TO_TEXT"},
    ]
    answer = client.post("/v1/attributes", json={"conversations": items}).json()
    asks, says = Turn("User", "What is it?"), Turn("Assistant", "No.")
    assert answer == {
        "model": "mine",
        "attributes": ["humor", "verbosity"],
        "scores": [
            expected("Be brief.", [asks], "Good."),
            expected(DEFAULT_SYSTEM_PROMPT, [asks, says, asks], "Good."),
            expected(DEFAULT_SYSTEM_PROMPT, [], "Good."),
        ],
    }
    assert len({scores["humor"] for scores in answer["scores"]}) == 3


def test_texts_are_answers_without_a_question(client: TestClient) -> None:
    texts = ["Good.", "Ünï\u2028\x00 <extra_id_1>User\n", "Good. " * 10]
    answer = client.post("/v1/attributes", json={"texts": texts}).json()
    assert answer["scores"] == [expected(DEFAULT_SYSTEM_PROMPT, [], text) for text in texts]
    assert client.post("/v1/attributes", json={"texts": texts[:1]}).json()["scores"] == [
        expected(DEFAULT_SYSTEM_PROMPT, [], "Good.")
    ]


def conversation(*turns: object, **keys: object) -> bytes:
    return json.dumps({"conversations": [GOOD, {"conversations": list(turns)} | keys]}).encode()


REFUSED = {
    "malformed": (b'{"texts": ["a"', 400, "the body is no valid JSON: Expecting ','"),
    "empty body": (b"", 400, "no valid JSON"),
    "not UTF-8": (b'{"texts": ["\xff"]}', 400, "'utf-8' codec can't decode byte 0xff"),
    "NaN": (b'{"texts": [NaN]}', 400, "NaN is no JSON"),
    "infinite": (b'{"texts": [-Infinity]}', 400, "-Infinity is no JSON"),
    "too deep": (b"[" * 15_000, 400, "nested too deeply"),
    "endless number": (b'{"texts": [' + b"1" * 9000 + b"]}", 400, "no valid JSON"),
    "no object": (b'["a"]', 422, "must be an object with one key, 'conversations' or 'texts'"),
    "no key": (b"{}", 422, "one key, 'conversations' or 'texts'"),
    "both keys": (b'{"texts": ["a"], "conversations": []}', 422, "'texts', 'conversations'"),
    "unknown key": (b'{"texts": ["a"], "model": "x"}', 422, "got 'texts', 'model'"),
    "unknown key alone": (b'{"text": ["a"]}', 422, "got 'text'"),
    "texts no list": (b'{"texts": "a"}', 422, "texts: Input should be a valid list, got 'a'"),
    "no texts": (b'{"texts": []}', 422, "texts: List should have at least 1 item"),
    "no conversations": (b'{"conversations": []}', 422, "conversations: List should have at"),
    "null": (b'{"conversations": null}', 422, "conversations: Input should be a valid list"),
    "text of another type": (
        b'{"texts": ["a", 3]}',
        422,
        "texts[1]: Input should be a valid string, got 3",
    ),
    "empty text": (b'{"texts": ["a", " \\n"]}', 422, "texts[1]: is empty"),
    "half surrogate": (b'{"texts": ["a", "\\ud800"]}', 422, "texts[1]: holds half of"),
    "too many": (
        json.dumps({"texts": ["a"] * 9}).encode(),
        413,
        "at most 8 items after validation, not 9 (max_items)",
    ),
    "conversation no object": (
        b'{"conversations": [3]}',
        422,
        "conversations[0]: Input should be an object",
    ),
    "empty conversation": (conversation(), 422, "conversations[1].conversations: List should have"),
    "no turns": (b'{"conversations": [{}]}', 422, "conversations[0].conversations: Field required"),
    "turn no object": (conversation("a"), 422, "[1].conversations[0]: Input should be an object"),
    "from": (
        conversation(USER | {"from": "user"}, ASSISTANT),
        422,
        "conversations[1].conversations[0].from: Input should be 'User' or 'Assistant', got 'user'",
    ),
    "value": (
        conversation(USER, ASSISTANT | {"value": None}),
        422,
        "conversations[1].conversations[1].value: Input should be a valid string, got None",
    ),
    "half surrogate in a turn": (
        conversation(USER | {"value": "\ud800"}, ASSISTANT),
        422,
        "conversations[1].conversations[0].value: holds half of a surrogate pair",
    ),
    "empty turn": (
        conversation(USER | {"value": ""}, ASSISTANT),
        422,
        "conversations[1].conversations[0].value: is empty",
    ),
    "user's turn last": (conversation(ASSISTANT, USER), 422, "must be from 'Assistant'"),
    "system": (conversation(ASSISTANT, system=3), 422, "conversations[1].system: Input should be"),
    "half surrogate in the system text": (
        conversation(ASSISTANT, system="\ud800"),
        422,
        "conversations[1].system: holds half of a surrogate pair",
    ),
    "mask": (conversation(ASSISTANT, mask="Assistant"), 422, "[1].mask: Input should be 'User'"),
    "label that is none": (
        conversation(ASSISTANT | {"label": "humor=1"}),
        422,
        "conversations[1].conversations[0].label: label 'humor=1': 'humor=1' is not of the form",
    ),
    "label of a user's turn": (
        conversation(USER | {"label": "humor:1"}, ASSISTANT),
        422,
        "conversations[1].conversations[0].label: only turns of 'Assistant' can have a label",
    ),
    "unknown key of a conversation": (
        conversation(ASSISTANT, temperature=0),
        422,
        "conversations[1].temperature: Extra inputs are not permitted",
    ),
    "unknown key of a turn": (
        conversation(ASSISTANT | {"weight": 1}),
        422,
        "conversations[1].conversations[0].weight: Extra inputs are not permitted",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_told_what_is_wrong_and_where(client: TestClient, name: str) -> None:
    body, status, message = REFUSED[name]
    response = client.post(
        "/v1/attributes", content=body, headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert message in error_of(response, status)


def test_all_problems_of_a_request_are_named_and_long_ones_cut(client: TestClient) -> None:
    """One long and 7 short; what is quoted from the request doesn't swell the answer."""
    bad = {"conversations": [{"from": "x" * 5000, "value": "a"}]}
    response = client.post("/v1/attributes", json={"conversations": [bad, *([{}] * 7)]})
    message = error_of(response, 422)
    assert [f"conversations[{i}].conversations" in message for i in range(8)] == [True] * 8
    assert len(message) < 2000


def test_so_many_problems_are_counted() -> None:
    """10,001 bad texts are one more than can be listed; of 9,999 the first ones have room."""
    with TestClient(create_app(MODEL, "mine", limits=Limits(max_items=20_000))) as client:
        for number, text in ((10_001, "10001 problems, too many"), (9_999, "and 9990 more")):
            response = client.post("/v1/attributes", json={"texts": [3] * number})
            message = error_of(response, 422)
            assert text in message
            assert len(message) <= 500


def test_of_many_bad_turns_the_first_is_named(client: TestClient) -> None:
    """6,000 of them in two conversations."""
    items = [{"conversations": [USER, *([{}] * 3000), ASSISTANT]}] * 2
    message = error_of(client.post("/v1/attributes", json={"conversations": items}), 422)
    assert "conversations[0].conversations[1].from: Field required" in message
    assert "conversations[1].conversations[1].from: Field required" in message
    assert "conversations[2]" not in message.replace("conversations[0]", "")


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types_are_refused(client: TestClient, content_type: str | None) -> None:
    """A web page may send these to 127.0.0.1 without asking, JSON only where the server agrees."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = client.post("/v1/attributes", content=b'{"texts": ["a"]}', headers=headers)
    assert "send Content-Type: application/json" in error_of(response, 415)


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused(client: TestClient, chunked: bool) -> None:
    """One byte over 20,000; exactly 20,000 are read (and are no JSON)."""
    for size, status in ((20_001, 413), (20_000, 400)):
        body = b" " * size
        response = client.post(
            "/v1/attributes",
            content=iter([body[:9000], body[9000:]]) if chunked else body,
            headers={"Content-Type": "application/json"},
        )
        message = error_of(response, status)
    assert "no valid JSON" in message


def test_reading_stops_at_the_limit(client: TestClient) -> None:
    """A body without Content-Length and without an end."""
    given_out = 0

    def endless() -> Iterator[bytes]:
        nonlocal given_out
        while given_out < 1000:
            given_out += 1
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/attributes", content=endless(), headers=headers)
    assert "more than 20000 bytes" in error_of(response, 413)


def test_long_texts_are_refused_with_their_length(client: TestClient) -> None:
    """The same text is 1 token short of the limit, at it, and beyond it."""

    def text_of(num_tokens: int) -> str:
        group, _ = MODEL.encode(DEFAULT_SYSTEM_PROMPT, [], ["a"])
        return "a" + " a" * (num_tokens - group.num_tokens)

    texts = [text_of(MAX_SEQ_LEN), text_of(MAX_SEQ_LEN + 1), "a", text_of(MAX_SEQ_LEN + 20)]
    message = error_of(client.post("/v1/attributes", json={"texts": texts}), 413)
    assert message == "more than 160 tokens: [1] has 161 tokens; [3] has 180 tokens"
    assert client.post("/v1/attributes", json={"texts": texts[::2]}).status_code == 200


class CountingTokenizer(HFTokenizer):
    """The tiny tokenizer, which notes the lengths and threads of what it encodes."""

    def __init__(self) -> None:
        vars(self).update(vars(tiny_tokenizer()))
        self.seen: list[tuple[int, str]] = []

    def encode(self, text: str) -> list[int]:
        self.seen.append((len(text), threading.current_thread().name))
        return super().encode(text)


@pytest.mark.parametrize("truncate", [False, True])
def test_large_bodies_are_tokenised_once_and_aside(truncate: bool) -> None:
    """A body of 20 KB, of a text that may fit in 1600 tokens: in a thread for such bodies."""
    tokenizer = CountingTokenizer()
    model = dataclasses.replace(MODEL, tokenizer=tokenizer, max_seq_len=1600)
    limits = Limits(truncate=truncate)
    with TestClient(create_app(model, "mine", limits=limits)) as client:
        tokenizer.seen.clear()
        answer = client.post("/v1/attributes", json={"texts": ["word " * 4000]})
        assert answer.status_code == (200 if truncate else 413)
    (long,) = [thread for length, thread in tokenizer.seen if length > 19_000]
    assert long.startswith("intake")


def test_what_cannot_fit_is_not_tokenised() -> None:
    """160 tokens of at most 13 bytes are 2080 bytes; it is still said which texts are too long."""
    tokenizer = CountingTokenizer()
    model = dataclasses.replace(MODEL, tokenizer=tokenizer)
    with TestClient(create_app(model, "mine", limits=LIMITS)) as client:
        tokenizer.seen.clear()
        answer = client.post("/v1/attributes", json={"texts": ["a", "word " * 1000]})
    message = error_of(answer, 413)
    assert re.fullmatch(r"more than 160 tokens: \[1\] has \d+ characters", message)
    assert max(length for length, _ in tokenizer.seen) < 2080


@pytest.mark.parametrize(
    "sent",
    [
        {"content": b'{"' + b"k" * 15_000 + b'": 1}'},
        {"content": b'{"texts": ["a"], "' + b"k" * 15_000 + b'": 1}'},
        {"content": json.dumps({"conversations": [{"x" * 9000: 1}] * 2}).encode()},
        {"content": json.dumps({"conversations": [{"mask": "x" * 9000}]}).encode()},
        {"content": conversation(ASSISTANT | {"label": "humor:" + "9" * 9000})},
        {"content": b"{}", "headers": {"Content-Type": "a" * 9000}},
        {"content": json.dumps({"texts": {f"k{i}": 1 for i in range(1000)}}).encode()},
    ],
)
def test_refusals_echo_little(client: TestClient, sent: Any) -> None:
    sent = {"headers": {"Content-Type": "application/json"}} | sent
    response = client.post("/v1/attributes", **sent)
    assert 400 <= response.status_code < 500
    assert len(response.json()["error"]["message"]) <= 500
    assert len(response.text) < 1000


def test_long_paths_and_methods_are_cut_in_answers(client: TestClient) -> None:
    for response in (client.get("/" + "a" * 9000), client.request("FOO" * 99, "/v1/attributes")):
        assert 400 <= response.status_code < 500
        assert len(response.text) < 1000


def test_objects_of_very_many_keys_are_refused(client: TestClient) -> None:
    item = {f"k{i}": 1 for i in range(1000)} | GOOD
    message = error_of(client.post("/v1/attributes", json={"conversations": [item]}), 422)
    assert message == "conversations[0]: an object has at most 100 keys, got 1001"


def test_a_key_that_is_given_twice_is_found_among_very_many() -> None:
    """In a time that doesn't grow with their square, which is most of a minute."""
    keys = [f'"{i}":0' for i in range(40_000)]
    body = "{" + ",".join([*keys, keys[-1]]) + "}"
    started = time.monotonic()
    with pytest.raises(RequestError, match="key '39999' is given twice"):
        parse_body(body.encode(), Strict)
    assert time.monotonic() < started + 5


def test_truncate_scores_the_end_and_says_so() -> None:
    """A body of over 16 KiB, so that it is tokenised in a thread."""
    question = Turn("User", "What is it? " * 2000)
    with TestClient(create_app(MODEL, "mine", limits=Limits(truncate=True))) as client:
        item = {"conversations": [{"from": "User", "value": question.value}, ASSISTANT]}
        answer = client.post("/v1/attributes", json={"conversations": [GOOD, item]}).json()
    assert answer["truncated"] == [1]
    assert answer["scores"][1] == expected(DEFAULT_SYSTEM_PROMPT, [question], "Good.")


PIECES = st.sampled_from([*EXTRA_ID_TOKENS, "<extra_id_", "1>", "\n", "User\n", "<pad>", "a"])
TEXTS = st.lists(PIECES | st.text(max_size=3), min_size=1, max_size=8).map("".join)


@given(system=TEXTS, question=TEXTS, response=TEXTS)
def test_no_text_becomes_a_control_token(system: str, question: str, response: str) -> None:
    """The control tokens are those of the same conversation with plain contents, in its order."""
    turns = [Turn("User", question), Turn("Assistant", response)]
    plain = [Turn("User", "a"), Turn("Assistant", "a")]
    ((ids,), _) = encode(MODEL, [Conversation(turns, system)], truncate=True)
    ((plain_ids,), _) = encode(MODEL, [Conversation(plain, "a")], truncate=True)
    tokenizer = tiny_tokenizer()
    control = {tokenizer.token_id(f"<extra_id_{i}>") for i in range(8)} | {tokenizer.pad_id}
    found = [token for token in ids if token in control]
    assert found == [token for token in plain_ids if token in control][-len(found) :]
    assert len(ids) == MAX_SEQ_LEN or len(found) == 4


def test_scores_do_not_depend_on_the_batch() -> None:
    """30 texts together and each alone: shared prefixes, other batches, the same scores to 1e-5."""
    items = [
        Conversation([Turn("User", "is it " * (i % 7)), Turn("Assistant", "a " * i)], system)
        for i in range(1, 16)
        for system in ("Answer.", DEFAULT_SYSTEM_PROMPT)
    ]
    texts, _ = encode(MODEL, items, truncate=False)
    together = score_texts(MODEL, texts)
    for text, scores in zip(texts, together, strict=True):
        ((alone,),) = MODEL.score([RewardGroup(text[:-1], [text[-1:]])])
        assert scores == pytest.approx(alone, abs=1e-5)


class OtherModel(AttributeModel):
    """The model, but texts with "boom" break it and texts with "slow" take a while."""

    def score(self, groups: Sequence[RewardGroup]) -> list[list[list[float]]]:
        text = self.tokenizer.decode([token for group in groups for token in group.prompt])
        if "boom" in text:
            raise RuntimeError("a secret of the inside")
        if "slow" in text:
            time.sleep(1.5)
        return super().score(groups)


@pytest.fixture
def other_client() -> Iterator[TestClient]:
    limits = Limits(request_timeout=1, max_queue=2)
    app = create_app(OtherModel(**vars(MODEL)), "other", limits=limits)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_errors_of_the_model_are_answered_and_survived(
    other_client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    response = other_client.post("/v1/attributes", json={"texts": ["boom"]})
    assert error_of(response, 500) == "the model failed: RuntimeError"
    assert "a secret of the inside" in caplog.text
    assert other_client.post("/v1/attributes", json={"texts": ["fine"]}).status_code == 200


def test_errors_of_our_own_are_answered_without_their_text(
    other_client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("a secret of the inside")

    monkeypatch.setattr("steerlm2.serving.reward_server.encode", fail)
    response = other_client.post("/v1/attributes", json={"texts": ["a"]})
    assert error_of(response, 500) == "KeyError; the server's log has more"


def test_slow_answers_time_out(other_client: TestClient) -> None:
    response = other_client.post("/v1/attributes", json={"texts": ["slow"]})
    assert "not answered within 1 seconds" in error_of(response, 504)


class HeldModel(AttributeModel):
    """The model, but it scores nothing before `go` is set."""

    go: threading.Event

    def score(self, groups: Sequence[RewardGroup]) -> list[list[list[float]]]:
        self.go.wait(20)
        return super().score(groups)


async def status_for(app: FastAPI, text: str, gone: asyncio.Event) -> int:
    """The status that a caller gets who goes away once `gone` is set."""
    body = iter([{"type": "http.request", "body": json.dumps({"texts": [text]}).encode()}])
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/attributes"}
    scope |= {"query_string": b"", "headers": [(b"content-type", b"application/json")]}
    statuses: list[int] = []

    async def receive() -> Any:
        if (request := next(body, None)) is not None:
            return request
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    await app(scope, receive, send)
    return statuses[0]


def test_texts_of_a_caller_who_has_gone_are_withdrawn() -> None:
    """They would keep those of others waiting."""
    model = HeldModel(**vars(MODEL))
    model.go = threading.Event()
    app = create_app(model, "held", limits=LIMITS)

    async def talk() -> tuple[int, int]:
        async with app.router.lifespan_context(app):
            scored = asyncio.create_task(status_for(app, "scored first", asyncio.Event()))
            await asyncio.sleep(0.2)
            gone = asyncio.Event()
            waits = asyncio.create_task(status_for(app, "withdrawn", gone))
            await asyncio.sleep(0.2)
            gone.set()
            try:
                return await asyncio.wait_for(waits, 5), 200
            finally:
                model.go.set()
                assert await scored == 200

    assert asyncio.run(talk()) == (499, 200)


def test_a_full_queue_is_answered_with_when_to_come_back(other_client: TestClient) -> None:
    response = other_client.post("/v1/attributes", json={"texts": ["a", "b", "c"]})
    assert "too many texts wait" in error_of(response, 503)
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/v1/attributes/", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/attributes", 405),
        ("POST", "/health", 405),
    ],
)
def test_unknown_paths_and_methods(client: TestClient, method: str, path: str, status: int) -> None:
    message = error_of(client.request(method, path), status)
    assert message.startswith(f"{method} {path}: ")
    assert "/v1/attributes, /v1/model, /health, /metrics" in message


def test_health_and_description(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/model").json() == {
        **{"model": "mine", "attributes": ["humor", "verbosity"], "min_value": 0, "max_value": 4},
        "ranges": {"humor": [0, 4], "verbosity": [0, 4]},
        **{"max_seq_len": 160, "truncate": False, "max_items": 8, "max_body_bytes": 20_000},
    }
    paths = client.get("/openapi.json").json()["paths"]
    assert paths.keys() == {"/v1/attributes", "/v1/model", "/health", "/metrics"}


def test_openapi_describes_what_is_checked(client: TestClient) -> None:
    """The limit of this server, required keys, and parts that exist under their names."""
    document = client.get("/openapi.json").json()
    post = document["paths"]["/v1/attributes"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    parts = document["components"]["schemas"]
    texts, conversations = schema["properties"]["texts"], schema["properties"]["conversations"]
    assert (schema["minProperties"], schema["maxProperties"]) == (1, 1)
    assert schema["additionalProperties"] is False
    assert (texts["minItems"], texts["maxItems"]) == (1, 8)
    assert conversations["items"] == {"$ref": "#/components/schemas/ConversationItem"}
    assert (conversations["minItems"], conversations["maxItems"]) == (1, 8)
    assert parts["ConversationItem"]["required"] == ["conversations"]
    turns = parts["ConversationItem"]["properties"]["conversations"]
    assert turns["items"] == {"$ref": "#/components/schemas/TurnItem"}
    assert parts["TurnItem"]["required"] == ["from", "value"]
    assert parts["TurnItem"]["properties"]["from"]["enum"] == ["User", "Assistant"]


def test_metrics_count_requests_and_texts() -> None:
    """Two requests of 1 + 3 texts, one refused, two of paths that don't exist."""
    with TestClient(create_app(MODEL, "mine", limits=LIMITS)) as client:
        client.post("/v1/attributes", json={"texts": ["a"]})
        client.post("/v1/attributes", json={"texts": ["a", "b", "c"]})
        client.post("/v1/attributes", json={"texts": []})
        client.get("/one")
        client.get("/two")
        lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['steerlm2_requests_total{path="/v1/attributes",status="200"}'] == "2.0"
    assert values['steerlm2_requests_total{path="/v1/attributes",status="422"}'] == "1.0"
    assert values['steerlm2_requests_total{path="other",status="404"}'] == "2.0"
    assert values["steerlm2_texts_total"] == "4.0"
    assert values["steerlm2_batch_texts_sum"] == "4.0"
    assert values["steerlm2_waiting_texts"] == "0.0"
    assert values['steerlm2_request_seconds_count{path="/v1/attributes"}'] == "3.0"
    assert not re.search("/one|/two", "\n".join(lines))


def test_nothing_is_logged_for_users_mistakes(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise a caller could fill the disk."""
    with caplog.at_level(logging.WARNING):
        client.post("/v1/attributes", content=b"{", headers={"Content-Type": "application/json"})
    assert caplog.records == []


def test_ranges_that_differ_have_no_common_ends() -> None:
    schema = AttributeSchema(("humor", "verbosity"), ((0, 10), (1, 5)))
    model = dataclasses.replace(MODEL, schema=schema)
    with TestClient(create_app(model, "mine", limits=LIMITS)) as client:
        described = client.get("/v1/model").json()
    assert described["ranges"] == {"humor": [0, 10], "verbosity": [1, 5]}
    assert (described["min_value"], described["max_value"]) == (None, None)


def test_an_api_key_is_asked_for() -> None:
    """But for the health, which whoever starts the server asks for."""
    with TestClient(create_app(MODEL, "mine", limits=LIMITS, api_key="s3cret")) as client:
        body = {"texts": ["Good."]}
        assert "send the header" in error_of(client.post("/v1/attributes", json=body), 401)
        assert client.get("/health").status_code == 200
        headers = {"Authorization": "Bearer s3cret"}
        assert client.post("/v1/attributes", json=body, headers=headers).status_code == 200
