"""sample_responses from its command line: what it writes, kills in between, ranks, mistakes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torchtune.models.llama3 import llama3

import sample_responses
from processes import ranks_with_logs, stopped_until_named
from ready_made import recipe_config
from steerlm2.attributes import parse_label
from steerlm2.checkpoints.checkpointer import HFCheckpointer
from steerlm2.data.jsonl import json_line
from steerlm2.data.records import read_records, write_records
from steerlm2.data.synthetic import synthetic_records
from steerlm2.data.templates import (
    encode_prompt,
    encode_response,
    extra_id_template,
    token_ids_digest,
)
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.inference.engines import Request, Sample

Json = dict[str, Any]

SLICE = 4
NUM_PROMPTS = 40
N = 5
DIGEST = token_ids_digest(extra_id_template(), tiny_tokenizer())


@pytest.fixture(scope="module")
def model(acsft_model: Path) -> Path:
    return acsft_model


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input") / "records.jsonl"
    write_records(path, synthetic_records(NUM_PROMPTS, 2, seed=3))
    return path


def arguments(source: Path, output: Path, model: Path | None, *more: str) -> list[str]:
    weights = [
        "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
        f"checkpointer.checkpoint_dir={model}",
    ]
    return [
        *("sample_responses", "--config", "tiny/sample_responses", f"input={source}"),
        *(f"output={output}", f"records_per_write={SLICE}", f"n={N}", "max_new_tokens=48"),
        *(weights if model else []),
        *more,
    ]


def run_here(source: Path, output: Path, model: Path | None, *more: str) -> list[Json]:
    """The recipe in this process, and what it wrote."""
    name, _, config, *overrides = arguments(source, output, model, *more)
    recipe = sample_responses.SampleRecipe(recipe_config(name, config, *overrides))
    recipe.setup()
    recipe.sample()
    return read_jsonl(output)


def read_jsonl(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_jsonl(path: Path, rows: Sequence[Json]) -> Path:
    path.write_bytes(b"".join(json_line(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def sampled_run(tune_command: Any, records: Path, model: Path) -> tuple[Path, str]:
    """An uninterrupted run on one process: its output file and what it printed."""
    output = records.with_name("sampled.jsonl")
    return output, tune_command(*arguments(records, output, model)).stdout


@pytest.fixture(scope="module")
def sampled(sampled_run: tuple[Path, str]) -> Path:
    return sampled_run[0]


def values(rows: Sequence[Json]) -> list[list[str]]:
    return [[response["value"] for response in row["responses"]] for row in rows]


def test_records_are_the_prompts_with_new_responses(records: Path, sampled: Path) -> None:
    """In input order; everything but the responses is as it was, keys of the user's own too."""
    before, after = read_jsonl(records), read_jsonl(sampled)
    assert len(after) > NUM_PROMPTS * 0.9
    pairs = drawn(before)
    places = [pairs.index(pair) for pair in drawn(after)]
    assert places == sorted(places)
    by_prompt = {(row["prompt_turns"][0]["value"], row["label"]): row for row in before}
    for row in after:
        old = by_prompt[row["prompt_turns"][0]["value"], row["label"]]
        sampled_keys = {"responses": [], "token_ids_digest": DIGEST, "sampling": row["sampling"]}
        assert row | {"responses": []} == old | sampled_keys
        texts = [response["value"] for response in row["responses"]]
        assert len(set(texts)) == len(texts) >= 2
        assert {response["finish_reason"] for response in row["responses"]} == {"stop"}
    read_records(sampled, require=())


def test_records_say_how_they_were_sampled(sampled: Path) -> None:
    """And what isn't there of what was drawn."""
    left_out = 0
    for record in read_records(sampled, require=()):
        sampling = record.sampling
        assert sampling is not None
        assert (sampling.temperature, sampling.top_p, sampling.distinct) == (0.7, 0.9, True)
        assert sampling.drawn == len(record.responses) + sum(sampling.left_out.values())
        assert all(response.sampler_log_prob is not None for response in record.responses)
        left_out += sum(sampling.left_out.values())
    assert left_out > 0


def test_engine_log_q_is_the_models(sampled: Path, model: Path) -> None:
    """log Q'(y|a,x) of the sampled tokens, the stop token included, by torchtune's forward."""
    decoder = llama3(
        vocab_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=128,
        intermediate_dim=384,
        max_seq_len=2048,
        rope_base=10000,
    ).eval()
    decoder.load_state_dict(HFCheckpointer(str(model)).load_checkpoint()["model"])
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    checked = 0
    for record in read_records(sampled, require=())[:8]:
        prompt = encode_prompt(
            template, tokenizer, record.system, record.prompt_turns, record.label
        )
        for response in record.responses:
            assert response.token_ids is not None
            tokens = response.token_ids.tolist()
            with torch.no_grad():
                logps_TV = decoder(torch.tensor([prompt + tokens]))[0].log_softmax(dim=-1)
            found = logps_TV[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None]).sum()
            assert response.extra["engine_log_q"] == pytest.approx(found.item(), abs=1e-3)
            checked += 1
    assert checked > 10


def test_sampled_tokens_are_those_of_the_text_or_marked(sampled: Path) -> None:
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    for record in read_records(sampled, require=()):
        for response in record.responses:
            tokens = (response.token_ids or array("i")).tolist()
            assert tokenizer.decode(tokens[:-1]).removesuffix("\n") == response.value
            same = tokens == encode_response(template, tokenizer, response.value)
            assert same != response.encodes_otherwise


class OneOfEach:
    """A server's answers: two sound ones, one that encodes otherwise, half an emoji, an abort, one
    with a control token; as tokens, or as texts with and without a stop_reason."""

    def __init__(self, known: str) -> None:
        tokenizer = tiny_tokenizer()
        end = encode_response(extra_id_template(), tokenizer, "")
        half = tokenizer.encode("\N{GRINNING FACE}")[:-1]
        letters = [token for letter in "the" for token in tokenizer.encode(letter)]
        strange = tokenizer.token_id("<extra_id_2>")
        assert strange is not None
        tokens = [
            *([*tokenizer.encode(text), *end] for text in ("Paris.", "Rome.")),
            *([*letters, *end], [*half, *end]),
            *([*tokenizer.encode("It is P")], [*letters, strange, *letters, *end]),
        ]
        self.samples = [Sample(each, "stop", -1.0) for each in tokens]
        self.samples[4] = self.samples[4]._replace(finish_reason="abort")
        if known != "tokens":
            self.samples = [
                Sample(tokens, reason, None, tokenizer.decode(tokens[:-1]), known == "stop_reason")
                for tokens, reason, *_ in self.samples[:5]
            ]

    def sample(self, requests: Sequence[Request]) -> list[list[Sample]]:
        return [self.samples for _ in requests]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("known", "kept", "summary"),
    [
        (
            "tokens",
            ["Paris.", "Rome.", "the"],
            "3 responses of 6 sampled (2 truncated, 0 duplicates, 0 empty, 0 too short, "
            "1 not valid UTF-8); left out: 0 groups with fewer than 2 distinct responses, "
            "0 prompts too long; 1 responses of other tokens than their text encodes to",
        ),
        (
            "stop_reason",
            ["Paris.", "Rome.", "the"],
            "0 prompts too long; 3 responses of unknown tokens (the server gives no token_ids): it "
            "is unknown whether their texts encode to what was sampled",
        ),
        (
            "neither",
            ["Paris.", "Rome.", "the"],
            "to what was sampled; it is unknown whether 3 responses came to the stop token",
        ),
    ],
)
def test_what_is_not_what_was_sampled(
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    known: str,
    kept: list[str],
    summary: str,
) -> None:
    """Nothing is said of tokens that the server didn't give."""
    monkeypatch.setattr(sample_responses, "open_server", lambda *arguments: OneOfEach(known))
    options = ("server.url=http://127.0.0.1:1", "max_prompts=1")
    (row,) = run_here(records, tmp_path / "a.jsonl", None, *options)
    assert values([row]) == [kept]
    assert summary in capsys.readouterr().out
    assert [("token_ids" in r) for r in row["responses"]] == [known == "tokens"] * len(kept)
    assert row.get("token_ids_digest") == (DIGEST if known == "tokens" else None)


def test_summary_counts_what_became_of_every_response(
    sampled_run: tuple[Path, str],
) -> None:
    """Those of groups left out count as sampled, not as responses."""
    output, printed = sampled_run
    rows = read_jsonl(output)
    match = re.search(
        r"(\d+) records, (\d+) responses of (\d+) sampled \((\d+) truncated, (\d+) duplicates, "
        r"(\d+) empty, 0 too short, 0 not valid UTF-8\); left out: (\d+) groups .* \d+ tokens/s",
        printed,
    )
    assert match is not None, printed
    num_records, responses, num_sampled, truncated, duplicates, empty, few = map(
        int, match.groups()
    )
    assert num_records == len(rows) == NUM_PROMPTS - few
    assert responses == sum(len(row["responses"]) for row in rows)
    assert num_sampled == NUM_PROMPTS * N
    lost = num_sampled - responses - truncated - duplicates - empty
    assert 0 <= lost <= few  # a group that is left out has one response at most


@pytest.fixture(scope="module")
def resumed_run(tune: Any, records: Path, model: Path) -> tuple[Path, str]:
    """Killed at two places, then run to its end: its output, and what the last run printed."""
    output = records.with_name("resumed.jsonl")
    partial = output.with_name("resumed.jsonl.partial")
    for lines in (3, 17):
        process = tune.start(*arguments(records, output, model))
        while not partial.exists() or partial.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not output.exists()
    return output, tune(*arguments(records, output, model)).stdout


def test_killed_twice_equals_uninterrupted(
    sampled_run: tuple[Path, str], resumed_run: tuple[Path, str]
) -> None:
    """The summary too is that of the whole file, but for tokens per second."""
    (sampled, printed), (resumed, printed_again) = sampled_run, resumed_run
    assert resumed.read_bytes() == sampled.read_bytes()
    counts, again = (
        re.search(r"\d+ records.* encodes to", out) for out in (printed, printed_again)
    )
    assert counts is not None
    assert again is not None
    assert again[0] == counts[0]
    assert not resumed.with_name("resumed.jsonl.partial").exists()


def test_a_complete_file_is_left_as_it_is(
    records: Path, sampled: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again computes nothing."""
    before = sampled.read_bytes()
    run_here(records, sampled, model)
    assert f"{sampled}: complete already" in capsys.readouterr().out
    assert sampled.read_bytes() == before


def test_two_ranks_sample_the_same(
    tune: Any, records: Path, sampled: Path, model: Path, tmp_path: Path
) -> None:
    """And each leaves a log."""
    output = tmp_path / "two_ranks.jsonl"
    tune(*arguments(records, output, model), nproc=2)
    assert ranks_with_logs(tmp_path) == [0, 1]
    one, two = read_jsonl(sampled), read_jsonl(output)
    assert values(two) == values(one)
    for row, other in zip(one, two, strict=True):
        for response, same in zip(row["responses"], other["responses"], strict=True):
            log_q = response.pop("engine_log_q", 0.0)
            assert same.pop("engine_log_q", 0.0) == pytest.approx(log_q, abs=1e-3)
            log_s = response.pop("sampler_log_prob")
            assert same.pop("sampler_log_prob") == pytest.approx(log_s, abs=1e-3)
    assert two == one


def test_a_stopped_rank_is_named_and_the_run_goes_on(
    tune: Any, model: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "records.jsonl", tmp_path / "sampled.jsonl"
    write_records(source, synthetic_records(100, 2, seed=3))
    process = tune.start(
        *arguments(source, output, model, "hang_timeout_seconds=2"),
        *("max_new_tokens=16", "keep_truncated=true"),
        nproc=2,
    )
    stderr = stopped_until_named(process, tmp_path, "sampled.jsonl.partial")
    assert re.search(r"rank 0 on \S+: group \d+, in ", stderr)


def conversations(path: Path) -> Path:
    """The last answer's label, an earlier label, one that ends with the user."""
    ask, again = {"from": "User", "value": "What is one plus two?", "label": None}, "And a dog?"
    rows: list[Json] = [
        {
            "system": "Answer.",
            "conversations": [
                ask,
                {"from": "Assistant", "value": "Three.", "label": "humor:0"},
                {"from": "User", "value": again, "label": None},
                {"from": "Assistant", "value": "A puppy!", "label": "humor:1,verbosity:0"},
            ],
            "mask": "User",
            "lang": "en",
        },
        {"system": "Answer.", "conversations": [ask]},
    ]
    return write_jsonl(path, rows)


def test_prompts_of_conversations(tmp_path: Path, model: Path) -> None:
    """Everything before the last answer, with the labels that earlier ones have; or all of it."""
    source = conversations(tmp_path / "conversations.jsonl")
    options = ("label.kind=fixed", "label.value=humor:2,verbosity:1", "min_responses=1")
    two, one = run_here(source, tmp_path / "sampled.jsonl", model, *options)
    assert [turn["value"] for turn in two["prompt_turns"]] == [
        *("What is one plus two?", "Three.", "And a dog?"),
    ]
    assert [turn.get("label") for turn in two["prompt_turns"]] == [None, "humor:0", None]
    assert (two["label"], two["lang"]) == ("humor:2,verbosity:1", "en")
    assert [turn["value"] for turn in one["prompt_turns"]] == ["What is one plus two?"]


def test_labels_of_the_prompts_own(tmp_path: Path, model: Path) -> None:
    source = conversations(tmp_path / "conversations.jsonl")
    with pytest.raises(ValueError, match=r"1 of 2 prompts have no label of their own \(number 2\)"):
        run_here(source, tmp_path / "sampled.jsonl", model)
    options = ("max_prompts=1", "min_responses=1")
    (row,) = run_here(source, tmp_path / "sampled.jsonl", model, *options)
    assert row["label"] == "humor:1,verbosity:0"


def drawn(rows: Sequence[Json]) -> list[tuple[str, str]]:
    return [(row["prompt_turns"][0]["value"], row["label"]) for row in rows]


UNIFORM = ("label.kind=uniform", "label.attributes=[humor,verbosity]", "min_responses=1")


def test_uniform_labels(records: Path, tmp_path: Path, model: Path) -> None:
    """Three different ones for each prompt, in the schema's order and range; another seed draws
    others, another slicing the same."""
    options = (*UNIFORM, "label.labels_per_prompt=3", "n=2", "max_prompts=20")
    rows = run_here(records, tmp_path / "a.jsonl", model, *options)
    labels = Counter(label for _, label in drawn(rows))
    assert len(labels) > 10
    for label in labels:
        assert list(parse_label(label)) == ["humor", "verbosity"]
        assert set(parse_label(label).values()) <= set(range(5))
    per_prompt = Counter(drawn(rows))
    assert len(rows) > 45
    repeated = [pair for pair, times in per_prompt.items() if times > 1]
    prompts = Counter(row["prompt_turns"][0]["value"] for row in read_jsonl(records)[:20])
    assert all(prompts[prompt] > 1 for prompt, _ in repeated)
    sliced = run_here(records, tmp_path / "b.jsonl", model, *options, "records_per_write=7")
    assert (drawn(sliced), values(sliced)) == (drawn(rows), values(rows))
    other = run_here(records, tmp_path / "c.jsonl", model, *options, "seed=1")
    assert drawn(other) != drawn(rows)


def test_empirical_labels(records: Path, tmp_path: Path, model: Path) -> None:
    """Drawn as often as they are in the file: 9 of 10 here are of one kind."""
    rows = [
        {"system": "", "prompt_turns": [{"from": "User", "value": "a"}], "label": label}
        for label in ["humor:0"] * 9 + ["humor:4"]
    ]
    labelled = write_jsonl(tmp_path / "labelled.jsonl", rows)
    options = ("label.kind=empirical", f"label.file={labelled}", "n=1", "min_responses=1")
    found = Counter(
        label for _, label in drawn(run_here(records, tmp_path / "a.jsonl", model, *options))
    )
    assert set(found) == {"humor:0", "humor:4"}
    assert found["humor:0"] > 3 * found["humor:4"]
    with pytest.raises(ValueError, match="has only 2 different labels"):
        run_here(records, tmp_path / "b.jsonl", model, *options, "label.labels_per_prompt=3")


def test_no_labels(records: Path, tmp_path: Path, model: Path) -> None:
    options = ("label.kind=none", "max_prompts=4", "min_responses=1")
    rows = run_here(records, tmp_path / "a.jsonl", model, *options)
    assert {row["label"] for row in rows} == {None}


def test_truncated_responses_are_marked(records: Path, tmp_path: Path, model: Path) -> None:
    """20 tokens are too few for many. With keep_truncated=true they stay, marked; without, not."""
    options = ("max_new_tokens=20", "min_responses=1", "max_prompts=20", "distinct=false")
    without = run_here(records, tmp_path / "a.jsonl", model, *options)
    with_them = run_here(records, tmp_path / "b.jsonl", model, *options, "keep_truncated=true")
    reasons = Counter(r["finish_reason"] for row in with_them for r in row["responses"])
    assert min(reasons["length"], reasons["stop"]) > 5
    assert {r["finish_reason"] for row in without for r in row["responses"]} == {"stop"}
    for row in with_them:
        complete = [r for r in row["responses"] if r["finish_reason"] == "stop"]
        if cut_off := len(row["responses"]) - len(complete):
            row["sampling"]["left_out"]["cut_off"] = cut_off
        row["responses"] = complete
    assert with_them == without


def test_identical_responses(records: Path, tmp_path: Path, model: Path) -> None:
    """At a low temperature most are the same. distinct=false keeps them; the first of each is what
    distinct=true keeps; what counts for min_responses are different ones in both."""
    options = ("temperature=0.2", "max_prompts=12", "min_responses=2")
    rows = run_here(records, tmp_path / "a.jsonl", model, *options)
    every = run_here(records, tmp_path / "b.jsonl", model, *options, "distinct=false")
    assert [list(dict.fromkeys(texts)) for texts in values(every)] == values(rows)
    assert sum(map(len, values(every))) > sum(map(len, values(rows)))
    assert all(len(set(texts)) >= 2 for texts in values(every))


def test_short_responses_and_long_prompts_are_left_out(
    records: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt that leaves no room for max_new_tokens isn't sampled at all."""
    rows = read_jsonl(records)[:3]
    rows[1]["prompt_turns"][0]["value"] = "good " * 300
    source = write_jsonl(tmp_path / "source.jsonl", rows)
    options = ("max_seq_len=200", "min_new_tokens=8", "min_responses=1")
    found = run_here(source, tmp_path / "sampled.jsonl", model, *options)
    assert "good good" not in json.dumps(found)
    assert ", 1 prompts too long;" in capsys.readouterr().out
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    for texts in values(found):
        assert min(len(encode_response(template, tokenizer, text)) for text in texts) >= 8


def test_nothing_left_is_an_error(records: Path, tmp_path: Path, model: Path) -> None:
    """One token is not enough to say something and stop. Again the second time."""
    for _ in range(2):
        with pytest.raises(
            ValueError, match="no group has 2 distinct responses that came to an end"
        ):
            run_here(records, tmp_path / "a.jsonl", model, "max_new_tokens=1", "max_prompts=3")


def test_an_untrained_model_never_samples_control_tokens(records: Path, tmp_path: Path) -> None:
    """Its 512 tokens are all about as likely; 9 of them are control tokens and none the stop."""
    options = ("temperature=1", "top_p=1", "n=30", "max_new_tokens=200")
    name, _, config, *overrides = arguments(records, tmp_path / "a.jsonl", None, *options)
    recipe = sample_responses.SampleRecipe(recipe_config(name, config, *overrides))
    recipe.setup()
    prompts = [item.encode(recipe.template, recipe.tokenizer) for item in recipe.items[:4]]
    samples = recipe.engine.sample([Request(prompt, i) for i, prompt in enumerate(prompts)])
    sampled = {token for own in samples for sample in own for token in sample.tokens}
    assert len(sampled) > 480
    stop = tiny_tokenizer().token_id("<extra_id_1>")
    assert sampled & set(tiny_tokenizer().control_ids) <= {stop}


def test_mistakes_are_named_together(tune: Any, records: Path, tmp_path: Path) -> None:
    result = tune(
        *arguments(records, tmp_path / "output.jsonl.gz", None, "temperature=0", "top_p=0"),
        *("label.kind=uniform", "label.value=humor:9", "label.labels_per_prompt=0"),
        *("tensor_parallel_dim=2", "min_responses=6", "max_new_tokens=1024"),
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for problem in (
        "'temperature' is 0: all responses of a prompt would be the same; set n=1",
        "'top_p' must be above 0 and at most 1, got 0",
        "'label.labels_per_prompt' must be at least 1, got 0",
        "'label.attributes' is missing: 'label.kind' is uniform",
        "'label.value' is for 'label.kind' fixed, not uniform",
        "humor must be a whole number from 0 to 4, got 9",
        "'tensor_parallel_dim' must be 1: every process holds the whole model",
        "'min_responses' must be at most 'n' (5)",
        "'max_new_tokens' must be below 'max_seq_len'",
        "'output' can't be compressed",
    ):
        assert problem in result.stderr


def test_bad_lines_are_named(tmp_path: Path) -> None:
    rows: list[Json] = [
        {"system": "", "conversations": [{"from": "Assistant", "value": "a"}]},
        {"text": "a"},
        {"system": "", "prompt_turns": [{"from": "User", "value": "a"}], "label": "humor"},
    ]
    source = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: .*odd count, got 0") as caught:
        run_here(source, tmp_path / "output.jsonl", None)
    assert "bad.jsonl:2: neither a conversation (with 'conversations') nor" in str(caught.value)
    assert "bad.jsonl:3: label 'humor'" in str(caught.value)


def test_other_settings_are_refused(records: Path, sampled: Path, model: Path) -> None:
    with pytest.raises(ValueError, match=r"begun with other settings \(temperature, seed\)"):
        run_here(records, sampled, model, "temperature=0.5", "seed=7")


def test_a_server_and_several_processes_are_refused(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run it without --nproc_per_node"):
        run_here(records, tmp_path / "output.jsonl", None, "server.url=http://127.0.0.1:1")


def test_seeds_of_prompts_differ(records: Path, tmp_path: Path, model: Path) -> None:
    """The same prompt twice in a file: two records, with different responses."""
    row = random.Random(0).choice(read_jsonl(records))
    source = write_jsonl(tmp_path / "twice.jsonl", [row, row])
    first, second = values(
        run_here(source, tmp_path / "a.jsonl", model, "min_responses=1", "temperature=1")
    )
    assert first != second
