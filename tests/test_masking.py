"""Secrets are taken out of texts and values, and what isn't one stays."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

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
        ("'server.url=http://al:S3'\"'\"'CR@h:1'", "'server.url=http://***@h:1'"),  # by shlex
        ('http://al:S3"CR@h', "http://***@h"),
        ("'logger.api_key=S3'\"'\"'CR' y=1", "'logger.api_key=***' y=1"),
        ("logger.api_token=S3CR passphrase: S3CR", "logger.api_token=*** passphrase: ***"),
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
        '{"url": "http://h", "mail":"a@b"}',
        '{"url":"http://h","mail":"a@b"}',
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert masked(text) == text


def test_values_of_variables_that_are_called_a_key_are_masked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """But no short word such as "false", and no path: of a key's file."""
    monkeypatch.setenv("SOME_API_KEY", "plantedvalue")
    monkeypatch.setenv("SOME_TOKEN", "false")
    monkeypatch.setenv("OTHER_KEY", str(tmp_path))
    monkeypatch.setenv("PLAIN", "ordinaryvalue")
    text = f"false plantedvalue {tmp_path} ordinaryvalue"
    assert masked(text) == f"false *** {tmp_path} ordinaryvalue"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "/abC+defGHIjkl0123"),  # base64 may begin like a path
        ("SOME_API_KEY", "123456789012"),
        ("PGPASSWORD", "plantedvalue"),
        ("MYSQL_PWD", "plantedvalue"),
        ("MYTOKEN", "plantedvalue"),
        ("GITHUB_PAT", "plantedvalue"),
        ("SSH_PASSPHRASE", "plantedvalue"),
    ],
)
def test_keys_look_like_anything_and_are_called_many_things(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert masked(f"got {value}.") == "got ***."


def as_yaml(text: str) -> str:
    return yaml.safe_dump(text, allow_unicode=True)


@pytest.mark.parametrize("write", [str, repr, shlex.quote, json.dumps, as_yaml])
def test_a_key_is_masked_however_it_is_quoted(
    write: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("planted'value", 'planted"value', 'it\'s "planted"', "plant\\ed", "plantéd!"):
        monkeypatch.setenv("SOME_API_KEY", value)
        assert "plant" not in masked(write(value))


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
        "secret": False,
        "passwd": [12345678],
    }
    assert masked_values(values) == values | {
        "logger": {"api_key": "***", "token": "***", "project": "p"},
        "urls": ["http://***@h"],
        "passwd": ["***"],
    }


def test_values_that_differ_stay_different_without_telling_how() -> None:
    one, other = ({"source": f"http://a:{word}@h/x"} for word in ("S3CR", "OTHER"))
    assert comparable_values(one) != comparable_values(other)
    assert comparable_values(one) == comparable_values(dict(one))
    assert "S3CR" not in str(comparable_values(one))
    assert comparable_values({"lr": 0.1, "a": ["b"]}) == {"lr": 0.1, "a": ["b"]}


def test_long_texts_take_no_time() -> None:
    """20,000 parts: a time that grows with their square is ten seconds."""
    quoted = "'\"'\"'"
    for part in ("a_", "a:", "a-", "a.b ", "a=b&", "http://a:b ", "?a", quoted, f"token={quoted}"):
        started = time.monotonic()
        masked("http://" + part * 20000)
        assert time.monotonic() < started + 2
