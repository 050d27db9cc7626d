"""serve_steerlm from its command line: a process that is asked over HTTP, and ended by a signal."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import serve_steerlm
from steerlm2.config.loader import load_config

CONFIG = yaml.safe_load(
    (Path(serve_steerlm.__file__).parents[1] / "recipe_configs/tiny/serve_steerlm.yaml").read_text()
)


@contextmanager
def serving(tune: Any, *overrides: str) -> Iterator[tuple[Any, str]]:
    """The process, and its address."""
    process = tune.start(*("serve_steerlm", "--config", "tiny/serve_steerlm", "port=0"), *overrides)
    try:
        url = None
        while url is None:
            line = process.stdout.readline()
            assert line, process.communicate()
            url = re.fullmatch(r"serving \S+ on (http://127\.0\.0\.1:\d+)/\n", line)
        yield process, url[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_serves_exports_until_sigterm_and_ends_streams(
    tune: Any, acsft_model: Path, attribute_model: Path
) -> None:
    """A stream that runs at SIGTERM comes to its end, a greedy answer's; then the status is 0."""
    checkpoints = (
        f"checkpointer.checkpoint_dir={acsft_model}",
        f"attribute_model.checkpointer.checkpoint_dir={attribute_model}",
    )
    with serving(tune, *checkpoints) as (process, url), httpx.Client(timeout=60) as client:
        (described,) = client.get(f"{url}/v1/models").json()["data"]
        assert [each["name"] for each in described["attributes"]] == ["humor", "verbosity"]
        assert described["scores"] is True

        def ask(verbosity: int, **more: Any) -> Any:
            body = {
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                **{"attributes": {"verbosity": verbosity}, "temperature": 0, "max_tokens": 64},
                **more,
            }
            return client.build_request("POST", f"{url}/v1/chat/completions", json=body)

        answer = client.send(ask(4, scores=True)).json()
        assert answer["attributes"]["verbosity"] == 4
        assert set(answer["choices"][0]["scores"]) == {"humor", "verbosity"}
        content = answer["choices"][0]["message"]["content"]

        stream = client.send(ask(4, stream=True), stream=True)
        lines = stream.iter_lines()
        text = next(lines)
        process.send_signal(signal.SIGTERM)
        text = "\n".join([text, *lines])
        assert text.rstrip().endswith("data: [DONE]")
        events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
        parts = [c["delta"].get("content", "") for event in events for c in event["choices"]]
        assert "".join(parts) == content
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (0, "")


def test_an_attribute_model_has_no_answers(tune: Any, attribute_model: Path) -> None:
    result = tune(
        *("serve_steerlm", "--config", "tiny/serve_steerlm", "port=0", "attribute_model=null"),
        f"checkpointer.checkpoint_dir={attribute_model}",
        check=False,
    )
    assert result.returncode == 1
    assert "which gives scores but no answers: put it under" in result.stderr


def test_problems_of_the_config_are_named_at_once() -> None:
    values = CONFIG | {
        **{"port": 70000, "max_n": 0, "max_new_tokens": 0, "request_timeout": 0},
        **{"attribute_model": {}, "server": {"url": "http://127.0.0.1", "concurrency": 0}},
        **{"schema": {"humor": [0, 4]}, "default_label": "humor:9", "device": "cpu"},
        **{"tokenizer": {"_component_": "steerlm2.data.tiny_tokenizer"}, "checkpointer": None},
    }
    with pytest.raises(ValueError, match="the config has problems") as caught:
        load_config(serve_steerlm.ServeConfig, values)
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  - 'attribute_model.checkpointer' is missing: the folder of what scores",
        "  - 'default_label': label 'humor:9': humor must be a whole number from 0 to 4, got 9 (a "
        "label looks like 'quality:4,humor:0')",
        "  - 'max_n' must be at least 1, got 0",
        "  - 'max_new_tokens' must be at least 1, got 0",
        "  - 'port' must be 0 to 65535, got 70000",
        "  - 'request_timeout' must be above 0, got 0.0",
        "  - 'server.concurrency' must be at least 1, got 0",
    ]
