"""serve_reward from its command line: a process that is asked over HTTP, and ended by a signal."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchtune.models.llama3 import llama3

import serve_reward
from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoints.weights import open_reward_checkpointer
from steerlm2.config.loader import load_config
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.models.reward_head import add_reward_head

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
CONFIG = yaml.safe_load((ROOT / "recipe_configs" / "tiny" / "serve_reward.yaml").read_text())

JSON_HEADERS = {"Content-Type": "application/json"}
WORDS = ("a", "the", "of", "and", "is", "to", "it", "has", "you", "for", "this", "capital", "good")


@dataclass
class Server:
    """A running server and what it printed before it served."""

    process: subprocess.Popen[str]
    port: int
    printed: str

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def post(self, body: bytes | Iterator[bytes], path: str = "/v1/attributes") -> tuple[int, Json]:
        with closing(self.connect()) as connection:
            connection.request("POST", path, body, JSON_HEADERS)
            response = connection.getresponse()
            return response.status, json.loads(response.read())


@contextmanager
def serving(tune: Any, *overrides: str) -> Iterator[Server]:
    process = tune.start(*("serve_reward", "--config", "tiny/serve_reward", "port=0"), *overrides)
    try:
        printed, port = "", None
        while port is None:
            line = process.stdout.readline()
            assert line, process.communicate()
            printed += line
            port = re.fullmatch(
                r"serving humor, verbosity on http://127\.0\.0\.1:(\d+)/v1/attributes\n", line
            )
        yield Server(process, int(port[1]), printed)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def server(tune: Any) -> Iterator[Server]:
    with serving(tune) as server:
        yield server


def test_says_that_the_weights_are_untrained_and_how_to_give_others(server: Server) -> None:
    assert "the weights are UNTRAINED (fresh from seed 42)" in server.printed
    assert "checkpointer.checkpoint_dir=DIR" in server.printed
    assert server.post(b'{"texts": ["a"]}')[1]["model"] == "untrained"


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def test_64_clients_get_the_scores_of_one(server: Server) -> None:
    """3 seconds, 1 to 3 conversations a request: each as if it had been asked for alone."""
    rng = random.Random(0)
    items = [
        {
            "conversations": [
                {"from": "User", "value": words(rng, 30)},
                {"from": "Assistant", "value": words(rng, 60)},
            ]
        }
        for _ in range(100)
    ]
    alone = [
        server.post(json.dumps({"conversations": [item]}).encode())[1]["scores"][0]
        for item in items
    ]
    end = time.monotonic() + 3

    def one_client(seed: int) -> int:
        answers, own = 0, random.Random(seed)
        with closing(server.connect()) as connection:
            while time.monotonic() < end:
                places = own.choices(range(100), k=own.randint(1, 3))
                body = json.dumps({"conversations": [items[i] for i in places]})
                connection.request("POST", "/v1/attributes", body, JSON_HEADERS)
                response = connection.getresponse()
                assert response.status == 200
                scores = json.loads(response.read())["scores"]
                assert scores == [pytest.approx(alone[i], abs=1e-5) for i in places]
                answers += 1
        return answers

    with ThreadPoolExecutor(64) as pool:
        assert min(pool.map(one_client, range(64))) > 0
    with closing(server.connect()) as connection:
        connection.request("GET", "/metrics")
        metrics = connection.getresponse().read().decode()
    largest = re.search(r'steerlm2_batch_texts_bucket{le="1.0"} (\S+)', metrics)
    count = re.search(r"steerlm2_batch_texts_count (\S+)", metrics)
    assert largest
    assert count
    assert float(largest[1]) < float(count[1]), "no batch had more than one text"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"texts": ["a"', 400, "no valid JSON"),
        (b'{"texts": ["a"], "temperature": 1}', 422, "got 'texts', 'temperature'"),
        (b'{"conversations": [{"conversations": []}]}', 422, "conversations[0].conversations: "),
        (b'{"texts": ["' + b"a" * 10_000_000 + b'"]}', 413, "more than 1048576 bytes"),
    ],
    ids=["malformed", "unknown field", "empty conversation", "10 MB"],
)
def test_bad_requests_get_a_reason(server: Server, body: bytes, status: int, message: str) -> None:
    found, answer = server.post(body)
    assert found == status
    assert message in answer["error"]["message"]
    assert server.post(b'{"texts": ["a"]}')[0] == 200


def test_10_mb_in_chunks_are_refused(server: Server) -> None:
    """Without Content-Length: the client learns why, instead of losing its connection."""
    found, answer = server.post(b" " * 100_000 for _ in range(100))
    assert found == 413
    assert "more than 1048576 bytes" in answer["error"]["message"]


def test_only_127_0_0_1_is_listened_to(server: Server) -> None:
    """The rest of 127.0.0.0/8 is this machine too; 0.0.0.0 would take it."""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


def test_port_in_use(tune: Any, server: Server) -> None:
    """Said at once, before a model is loaded: in one message."""
    result = tune(
        *("serve_reward", "--config", "tiny/serve_reward", f"port={server.port}"),
        *(
            "tokenizer.path=no_such_folder",
            "tokenizer._component_=steerlm2.data.hf_tokenizer",
        ),
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == (
        f"error: can't listen on host '127.0.0.1', port {server.port}: Address already in use. "
        "Give another host= or port= (port=0 takes any free one)\n"
    )


def test_problems_of_the_config_are_named_at_once() -> None:
    values = CONFIG | {"port": 70000, "max_queue": 5, "request_timeout": 0, "schema": {"names": []}}
    with pytest.raises(ValueError, match="the config has problems") as caught:
        load_config(serve_reward.ServeConfig, values)
    assert str(caught.value).splitlines()[1:] == [
        "  - 'request_timeout' must be above 0, got 0.0",
        "  - 'port' must be 0 to 65535, got 70000",
        "  - 'max_queue' (5) must be at least 'max_items' (64): the texts of a request wait "
        "together",
        "  - 'schema': attribute schema: names must be a list of at least one name, got []",
    ]


def test_problems_of_the_limits_are_named() -> None:
    values = CONFIG | {"max_connections": 1, "header_timeout": 0, "body_timeout": -1}
    values |= {"max_body_bytes": 100, "max_pending_bytes": 99, "allowed_hosts": ["a:80", "b"]}
    with pytest.raises(ValueError, match="the config has problems") as caught:
        load_config(serve_reward.ServeConfig, values)
    assert str(caught.value).splitlines()[1:] == [
        "  - 'header_timeout' must be above 0, got 0.0",
        "  - 'body_timeout' must be above 0, got -1.0",
        "  - 'max_connections' must be at least 2, got 1",
        "  - 'max_pending_bytes' (99) must be at least 'max_body_bytes' (100)",
        "  - 'allowed_hosts' has 'a:80': give names without a port (reward.example, *.example, "
        '"*" for all), addresses, or networks (10.0.0.0/8)',
    ]


def test_lacking_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.util.find_spec

    def without_fastapi(name: str) -> Any:
        return None if name == "fastapi" else installed(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_fastapi)
    message = re.escape('the server needs fastapi: pip install "steerlm2[serve]"')
    with pytest.raises(ValueError, match=message):
        serve_reward.ServeRecipe(load_config(serve_reward.ServeConfig, CONFIG))


def exported_model(folder: Path) -> Path:
    """As reward_distributed leaves it, with fresh weights of seed 7."""
    model = llama3(
        vocab_size=512, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=128,
        intermediate_dim=384, max_seq_len=2048, rope_base=10000, norm_eps=1e-5,
    )  # fmt: skip
    add_reward_head(model, 2)
    exporter = open_reward_checkpointer(
        None,
        model,
        tiny_tokenizer(),
        extra_id_template(),
        AttributeSchema(("humor", "verbosity")),
        seed=7,
        output_dir=str(folder),
        load_head=False,
    )
    exporter.save_checkpoint(exporter.load_checkpoint(), epoch=3)
    return folder / "epoch_3"


def metric(connection: http.client.HTTPConnection, name: str) -> float:
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found
    return float(found[1])


def test_metrics_count_what_no_path_has_seen(tune_command: Any) -> None:
    with serving(tune_command) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as nonsense:
            nonsense.sendall(b"nonsense\r\n\r\n")
            assert nonsense.recv(12) == b"HTTP/1.1 400"
        with closing(server.connect()) as connection:
            assert metric(connection, 'steerlm2_refused_connections_total{status="400"}') == 1
            assert metric(connection, "steerlm2_connections") >= 1


def test_serves_a_checkpoint_and_ends_in_order(tune_command: Any, tmp_path: Path) -> None:
    """SIGTERM while texts of 8 requests wait: all 8 x 64 are answered, then the status is 0."""
    body = json.dumps({"texts": [f"{'a ' * 60} {i}" for i in range(64)]}).encode()
    with serving(
        tune_command,
        "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
        f"checkpointer.checkpoint_dir={exported_model(tmp_path)}",
        "max_tokens_per_microbatch=1",
    ) as server:
        assert "UNTRAINED" not in server.printed
        with ThreadPoolExecutor(8) as pool, closing(server.connect()) as connection:
            answers = [pool.submit(server.post, body) for _ in range(8)]
            begun, waiting = 0.0, 0.0
            while begun + waiting < 8 * 64:
                begun = metric(connection, "steerlm2_batch_texts_count")
                waiting = metric(connection, "steerlm2_waiting_texts")
            assert waiting > 0
            server.process.send_signal(signal.SIGTERM)
            for answer in answers:
                status, content = answer.result()
                assert status == 200
                assert content["model"] == f"{tmp_path.name}/epoch_3"
                assert len(content["scores"]) == 64
        assert ended(server) == (0, "")


def ended(server: Server) -> tuple[int, str]:
    """Exit status and stderr."""
    _, stderr = server.process.communicate(timeout=60)
    return server.process.returncode, stderr


def test_ends_on_sigint_too(server: Server) -> None:
    """The last test of the shared server, which nobody's mistakes made write to stderr."""
    server.process.send_signal(signal.SIGINT)
    assert ended(server) == (0, "")
