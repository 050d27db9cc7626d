"""Secrets are taken out of texts and values, and what isn't one stays."""

from __future__ import annotations

import time

import pytest

from steerlm2.masking import comparable_values, mask_variables, masked, masked_values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the server at http://al:S3CR@h:1/v1 fails", "the server at http://***@h:1/v1 fails"),
        ("got 'https://S3CR@h'", "got 'https://***@h'"),
        ("http://al:S3C@R@h", "http://***@h"),  # quoted wrongly, as people do
        ("http://al:S3/CR@h/x", "http://***@h/x"),
        ("server.url=al:S3CR@h:80", "server.url=***@h:80"),
        ('{"url":"postgres://al:S3CR@h"}', '{"url":"postgres://***@h"}'),
        ("https://h/x?a=1&token=S3CR&b=2", "https://h/x?a=1&token=***&b=2"),
        ("s3://h/x?X-Amz-Signature=S3CR'", "s3://h/x?X-Amz-Signature=***'"),
        ("https://h/x?api_key=S3CR#y", "https://h/x?api_key=***#y"),
        ("tune run x metric_logger.api_key=S3CR y=1", "tune run x metric_logger.api_key=*** y=1"),
        ('logger={"api_key": "S3CR"}', 'logger={"api_key": "***"}'),
        ('logger={"token": "S3CR"}', 'logger={"token": "***"}'),
        ("metric_logger.token=S3CR", "metric_logger.token=***"),
        ("password: 'S3CR'", "password: '***'"),
        ("env HF_TOKEN=S3CR tune run", "env HF_TOKEN=*** tune run"),
        ("Authorization: Bearer S3CR-56789", "Authorization: Bearer ***"),
    ],
)
def test_secrets_in_texts_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8000/v1/models",
        "http://h:8000/org/model@v2 and a@b.example",
        "git@github.com:org/repo.git",
        "http://al:${oc.env:PASSWORD}@h",
        "helpfulness:4,verbosity:1",
        "template.eos_token=<eos> max_tokens_per_microbatch=4096 tokenizer.path=x",
        "set WANDB_API_KEY, or metric_logger=null",
        "stop token: 5, eos_token=<eos>, eos_token: 5",
        "metric_logger.api_key=${oc.env:KEY}",
        "https://h/x?split=train&page=2",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert masked(text) == text


def test_values_of_variables_that_are_called_a_key_are_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But no short word such as "false", and no path: of a key's file."""
    monkeypatch.setenv("SOME_API_KEY", "plantedvalue")
    monkeypatch.setenv("SOME_TOKEN", "false")
    monkeypatch.setenv("OTHER_KEY", "/home/keyfolder")
    monkeypatch.setenv("PLAIN", "ordinaryvalue")
    text = "false plantedvalue /home/keyfolder ordinaryvalue"
    assert masked(text) == "false *** /home/keyfolder ordinaryvalue"


def test_an_interpolated_variable_stands_for_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKING_TEST", "plantedvalue")
    assert masked("got plantedvalue") == "got plantedvalue"
    mask_variables(["MASKING_TEST"])
    assert masked("got plantedvalue") == "got ${oc.env:MASKING_TEST}"
    monkeypatch.setenv("MASKING_TEST", "plantedvalue2")
    assert masked("got plantedvalue2") == "got ${oc.env:MASKING_TEST}"


def test_values_are_masked_by_their_keys() -> None:
    values = {
        "logger": {"api_key": "S3CR", "token": "S3CR", "project": "p"},
        "password": "${oc.env:X}",
        "urls": ["http://a:S3CR@h"],
        "tokenizer": {"path": "x", "eos_token": "<eos>"},
        "max_tokens": 3,
    }
    assert masked_values(values) == values | {
        "logger": {"api_key": "***", "token": "***", "project": "p"},
        "urls": ["http://***@h"],
    }


def test_values_that_differ_stay_different_without_telling_how() -> None:
    one, other = ({"source": f"http://a:{word}@h/x"} for word in ("S3CR", "OTHER"))
    assert comparable_values(one) != comparable_values(other)
    assert comparable_values(one) == comparable_values(dict(one))
    assert "S3CR" not in str(comparable_values(one))
    assert comparable_values({"lr": 0.1, "a": ["b"]}) == {"lr": 0.1, "a": ["b"]}


def test_long_texts_take_no_time() -> None:
    """20,000 parts: a time that grows with their square is ten seconds."""
    for part in ("a_", "a:", "a-", "a.b ", "a=b&", "http://a:b ", "?a"):
        started = time.monotonic()
        masked("http://" + part * 20000)
        assert time.monotonic() < started + 2
