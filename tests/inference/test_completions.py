"""The completions engine, against a server that answers as vLLM does.

tests/recipes/test_vllm.py has the real one.
"""

from __future__ import annotations

from typing import Any

import pytest

from steerlm2.inference import server_client
from steerlm2.inference.completions import CompletionsEngine
from steerlm2.inference.engines import Request, Sample, SamplingSettings

SETTINGS = SamplingSettings(
    n=3, temperature=0.7, top_p=0.9, max_new_tokens=16, stop_id=3, forbidden_ids=(0, 1, 2)
)
REQUESTS = [Request([7, 8, i], 1000 * i) for i in range(12)]


def answer_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Completion j of a prompt: its last token and j, then the stop token, but for the last."""
    choices = []
    for j in range(body["n"]):
        ids = [body["prompt"][-1] + 10, j + 10]
        ended = j < body["n"] - 1
        ids += body["stop_token_ids"] if ended else []
        choices.append(
            {
                "index": j,
                "text": " ".join(map(str, ids[:2])),
                "finish_reason": "stop" if ended else "length",
                "token_ids": ids,
                "logprobs": {"token_logprobs": [-0.5 * (j + 1)] * len(ids)},
            }
        )
    return choices


def expected(request: Request) -> list[Sample]:
    first = request.prompt[-1] + 10
    return [
        Sample([first, 10, 3], "stop", -1.5),
        Sample([first, 11, 3], "stop", -3.0),
        Sample([first, 12], "length", -3.0),
    ]


@pytest.fixture
def server(fake_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)
    fake_vllm.choices = answer_of
    return fake_vllm


def connected(server: Any, **options: Any) -> CompletionsEngine:
    engine = CompletionsEngine(
        server.url, SETTINGS, lambda text: [int(word) for word in text.split()], **options
    )
    engine.connect(max_seq_len=512)
    return engine


def test_samples_come_in_the_order_of_the_requests(server: Any) -> None:
    """Each prompt is asked for once, by several threads."""
    assert connected(server, concurrency=4).sample(REQUESTS) == [expected(r) for r in REQUESTS]
    assert sorted(body["prompt"] for body in server.bodies) == [r.prompt for r in REQUESTS]


def test_what_is_asked_for(server: Any) -> None:
    """Everything that decides the distribution is said, nothing left to the server's defaults."""
    connected(server).sample(REQUESTS[2:3])
    assert server.bodies == [
        {
            "model": "served",
            "prompt": [7, 8, 2],
            "n": 3,
            "seed": 2000,
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 16,
            "stop_token_ids": [3],
            "logit_bias": {"0": -100, "1": -100, "2": -100},
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
    ]


def test_choices_in_another_order(server: Any) -> None:
    server.choices = lambda body: answer_of(body)[::-1]
    assert connected(server).sample(REQUESTS[:1]) == [expected(REQUESTS[0])]


def texts_alone(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {key: choice[key] for key in ("index", "text", "finish_reason")}
        for choice in answer_of(body)
    ]


def test_a_server_without_token_ids(server: Any) -> None:
    """The text is there, with what it encodes to; its log-probs are not known, nor whether "stop"
    means the stop token."""
    server.choices = texts_alone
    wanted = [
        sample._replace(log_prob=None, text=text, end_known=sample.finish_reason != "stop")
        for sample, text in zip(expected(REQUESTS[0]), ("10 10", "10 11", "10 12"), strict=True)
    ]
    assert connected(server).sample(REQUESTS[:1]) == [wanted]


@pytest.mark.parametrize("stop_reason", [None, 9, "\n"])
def test_without_token_ids_the_stop_reason_tells_the_end(
    server: Any, stop_reason: int | str | None
) -> None:
    """Null is the model's own end of text, another id or text isn't ours either."""
    server.choices = lambda body: [
        choice | {"stop_reason": 3 if choice["index"] else stop_reason}
        for choice in texts_alone(body)
    ]
    (samples,) = connected(server).sample(REQUESTS[:1])
    assert [sample.finish_reason for sample in samples] == ["other_stop", "stop", "length"]
    assert samples[0].tokens == [10, 10]
    assert all(sample.end_known for sample in samples)


def test_half_a_character_of_a_server_without_token_ids_is_broken(server: Any) -> None:
    """JSON holds half a surrogate pair, no file of ours does; a whole pair is a character."""
    texts = ["a \ud83d", "\ude00 b", "\ud83d\ude00"]
    server.choices = lambda body: [
        choice | {"text": text} for choice, text in zip(texts_alone(body), texts, strict=True)
    ]
    engine = connected(server)
    engine.encode = lambda text: list(text.encode())
    (samples,) = engine.sample(REQUESTS[:1])
    assert [sample.text for sample in samples] == ["a \ufffd", "\ufffd b", "\U0001f600"]


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_other_reasons_stay_with_and_without_token_ids(server: Any, reason: str) -> None:
    for choices in (answer_of, texts_alone):
        server.choices = lambda body, choices=choices: [
            choice | {"finish_reason": reason, "stop_reason": None} for choice in choices(body)
        ]
        (samples,) = connected(server).sample(REQUESTS[:1])
        assert {sample.finish_reason for sample in samples} == {reason}


@pytest.mark.parametrize(
    "logprob", [None, float("nan"), float("-inf"), -9999.0, 3.0, "-0.5", True], ids=str
)
def test_a_log_prob_that_is_none_is_not_known(server: Any, logprob: Any) -> None:
    """Of one token, so of its response; the others' are. vLLM clamps to -9999."""

    def one_unknown(body: dict[str, Any]) -> list[dict[str, Any]]:
        choices = answer_of(body)
        choices[1]["logprobs"]["token_logprobs"][1] = logprob
        return choices

    server.choices = one_unknown
    (samples,) = connected(server).sample(REQUESTS[:1])
    assert [sample.log_prob for sample in samples] == [-1.5, None, -3.0]


def test_an_end_at_another_token_is_no_stop(server: Any) -> None:
    """vLLM says "stop" at the model's own end of text too."""

    def other_end(body: dict[str, Any]) -> list[dict[str, Any]]:
        choices = answer_of(body)
        choices[0]["token_ids"] = [20, 9]
        return choices

    server.choices = other_end
    (samples,) = connected(server).sample(REQUESTS[:1])
    assert [sample.finish_reason for sample in samples] == ["other_stop", "stop", "length"]


def test_what_may_pass_is_tried_again(server: Any) -> None:
    server.statuses = [503, 429]
    samples = connected(server, concurrency=1, retries=2).sample(REQUESTS)
    assert samples == [expected(request) for request in REQUESTS]


def test_retries_end_in_one_clear_error(server: Any) -> None:
    server.statuses = [503] * 100
    with pytest.raises(ConnectionError, match=r"doesn't answer, tried 2 times .*the same command"):
        connected(server, concurrency=1, retries=1).sample(REQUESTS)
    assert server.bodies == []


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "gave 0 completions instead of 3"),
        ([{"index": 0}], "doesn't answer as a vLLM server does"),
        (None, "doesn't answer as a vLLM server does"),
    ],
)
def test_other_answers_are_refused(server: Any, choices: Any, message: str) -> None:
    server.choices = lambda body: choices
    with pytest.raises(ValueError, match=message):
        connected(server).sample(REQUESTS[:1])
