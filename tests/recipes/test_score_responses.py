"""score_responses from its command line: its numbers, kills in between, other world sizes."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder

import score_responses
from processes import ranks_with_logs, stopped_until_named
from ready_made import recipe_config
from steerlm2.attributes import beta_log_prob, parse_label
from steerlm2.checkpoints import decoder as decoder_module
from steerlm2.checkpoints.checkpointer import ScratchCheckpointer
from steerlm2.checkpoints.weights import load_weights
from steerlm2.data.records import (
    LOG_PROB_KEYS,
    Record,
    Response,
    Turn,
    read_records,
    write_records,
)
from steerlm2.data.templates import (
    encode_prompt,
    encode_response,
    extra_id_template,
    token_ids_digest,
)
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.inference import attribute_model as attribute_model_module

Json = dict[str, Any]

MAX_SEQ_LEN = 72
"""As the groups of conftest.py are made for."""
SIZES = [3, 2, 4, 2, 2, 5] * 10
"""In groups 0, 2, 4, ... the second response is too long: 2 + 3 + 1 are left, and 2 + 2 + 5."""
GROUPS_KEPT, RESPONSES_KEPT = 50, 140
"""10 x 5 groups (one response alone is no group) and 10 x (2 + 2 + 3 + 2 + 5) responses."""


@pytest.fixture(scope="module")
def groups(write_groups: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with attribute scores, and no log-prob yet."""
    path = write_groups(tmp_path_factory.mktemp("groups") / "groups.jsonl", SIZES, too_long=5)
    rng = random.Random(1)
    records = []
    for record in read_records(path, require=()):
        names = [*parse_label(record.label or ""), "quality"]
        responses = [
            dataclasses.replace(
                response,
                log_p_attributes=None,
                scores={name: rng.uniform(-0.5, 4.5) for name in names},
            )
            for response in record.responses
        ]
        records.append(dataclasses.replace(record, responses=responses))
    write_records(path, records)
    return path


def arguments(groups: Path, output: Path, *more: str) -> list[str]:
    return [
        *("score_responses", "--config", "tiny/score_responses", f"input={groups}"),
        *(f"output={output}", f"max_seq_len={MAX_SEQ_LEN}", "records_per_write=1"),
        *("quantities=[log_p_attributes,log_p_response,log_q]", *more),
    ]


def run_here(groups: Path, output: Path, *more: str) -> None:
    """The recipe in this process."""
    name, _, config, *overrides = arguments(groups, output, *more)
    recipe = score_responses.ScoreRecipe(recipe_config(name, config, *overrides))
    recipe.score()
    recipe.compare_with_engine()


@pytest.fixture(scope="module")
def scored_run(tune_command: Any, groups: Path) -> tuple[Path, str]:
    """An uninterrupted run on one process: its output file and what it printed."""
    output = groups.with_name("scored.jsonl")
    return output, tune_command(*arguments(groups, output)).stdout


@pytest.fixture(scope="module")
def scored(scored_run: tuple[Path, str]) -> Path:
    return scored_run[0]


def kept_of(record: Record) -> list[int]:
    """Indices of the responses that fit into MAX_SEQ_LEN together with the labelled prompt."""
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    prompt = encode_prompt(template, tokenizer, record.system, record.prompt_turns, record.label)
    lengths = [len(encode_response(template, tokenizer, r.value)) for r in record.responses]
    return [i for i, length in enumerate(lengths) if len(prompt) + length <= MAX_SEQ_LEN]


def test_adds_log_probs_and_changes_nothing_else(groups: Path, scored: Path) -> None:
    """Input order; responses that don't fit are left out, and groups of fewer than two others."""
    expected = []
    for record in read_records(groups, require=()):
        responses = [record.responses[i] for i in kept_of(record)]
        if len(responses) >= 2:
            expected.append(dataclasses.replace(record, responses=responses))
    written = read_records(scored, require=tuple(LOG_PROB_KEYS))
    unknown = dict.fromkeys(LOG_PROB_KEYS)
    stripped = [
        dataclasses.replace(
            record, responses=[dataclasses.replace(r, **unknown) for r in record.responses]
        )
        for record in written
    ]
    assert stripped == expected
    assert (len(written), sum(len(r.responses) for r in written)) == (GROUPS_KEPT, RESPONSES_KEPT)


def test_single_answers_can_be_scored(tmp_path: Path, scored_run: tuple[Path, str]) -> None:
    """Each group's first response alone, as it is among the others."""
    scored = read_records(scored_run[0])[:3]
    alone = tmp_path / "alone.jsonl"
    write_records(alone, [dataclasses.replace(r, responses=r.responses[:1]) for r in scored])
    run_here(alone, tmp_path / "out.jsonl", "min_responses=1")
    again = read_records(tmp_path / "out.jsonl", min_responses=1)
    assert [r.responses[0].log_q for r in again] == pytest.approx(
        [r.responses[0].log_q for r in scored], abs=1e-4
    )


def test_says_how_much_was_left_out(scored_run: tuple[Path, str]) -> None:
    """One response too long in each of the 30 even groups; 10 of those had only one other."""
    assert (
        f"{GROUPS_KEPT} groups with {RESPONSES_KEPT} responses "
        "(responses left out: 30 too long; groups with too few left: 10)"
    ) in scored_run[1]


def test_log_p_attributes_is_the_beta_rule_over_the_labels_attributes(scored: Path) -> None:
    """log P(a|x,y) = sum of log P(a_k | score_k) over what the label names; not over `quality`."""
    for record in read_records(scored):
        label = parse_label(record.label or "")
        for response in record.responses:
            assert response.scores is not None
            expected = sum(
                beta_log_prob(
                    torch.tensor([[response.scores[name]]], dtype=torch.float64),
                    torch.tensor([[float(value)]], dtype=torch.float64),
                ).item()
                for name, value in label.items()
            )
            assert response.log_p_attributes == pytest.approx(expected, abs=1e-9)


def plain_log_prob(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> float:
    """sum_t log softmax(logits)[y_t] over one unpacked sequence, without a mask of ours."""
    tokens = torch.tensor([[*prompt, *response]])
    logps = model(tokens)[0].double().log_softmax(dim=-1)
    places = torch.arange(len(prompt), tokens.shape[1])
    return logps[places - 1, tokens[0, places]].sum().item()


def fresh_model() -> torch.nn.Module:
    """That of tiny/score_responses."""
    model = llama3(
        vocab_size=512, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=128,
        intermediate_dim=384, max_seq_len=2048, rope_base=10000, norm_eps=1e-5,
    )  # fmt: skip
    weights = ScratchCheckpointer(model, tiny_tokenizer(), seed=42, output_dir="").weights
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def test_log_probs_are_the_models_own(scored: Path) -> None:
    """log P(y|x) from the prompt without its label, log Q'(y|a,x) from the prompt with it."""
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    model = fresh_model()
    for record in read_records(scored)[:6]:
        for label, name in ((None, "log_p_response"), (record.label, "log_q")):
            prompt = encode_prompt(template, tokenizer, record.system, record.prompt_turns, label)
            for response in record.responses:
                tokens = encode_response(template, tokenizer, response.value)
                expected = plain_log_prob(model, prompt, tokens)
                assert getattr(response, name) == pytest.approx(expected, abs=5e-4)


# What was sampled


@torch.no_grad()
def test_sampled_tokens_are_what_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a text that encodes to others, letter by letter, both log-probs are those of the sampled
    tokens, and they equal the engine's; what isn't what was sampled is left out and counted."""
    template, tokenizer = extra_id_template(), tiny_tokenizer()
    *_, stop = encode_response(template, tokenizer, "")
    letters = [*(token for letter in "the\n" for token in tokenizer.encode(letter)), stop]
    whole = encode_response(template, tokenizer, "the capital")
    assert letters != encode_response(template, tokenizer, "the")
    turns, label = [Turn("User", "why?")], "humor:1"
    model = fresh_model()
    prompt = encode_prompt(template, tokenizer, "", turns, label)
    bare = encode_prompt(template, tokenizer, "", turns, None)
    known = [
        Response(
            text,
            token_ids=array("i", tokens),
            encodes_otherwise=tokens == letters,
            finish_reason="stop",
            extra={"engine_log_q": plain_log_prob(model, prompt, tokens)},
        )
        for text, tokens in (("the", letters), ("the capital", whole))
    ]
    others = [
        Response("the good", finish_reason="abort"),
        Response("the \ufffd", finish_reason="stop"),
        Response("the good", finish_reason="stop"),
    ]
    digest = token_ids_digest(template, tokenizer)
    record = Record("", turns, label, known + others, token_ids_digest=digest)
    source, output = tmp_path / "sampled.jsonl", tmp_path / "scored.jsonl"
    write_records(source, [record])
    run_here(source, output, "quantities=[log_p_response,log_q]")
    (scored,) = read_records(output, require=("log_p_response", "log_q"))
    assert [r.value for r in scored.responses] == ["the", "the capital", "the good"]
    for response, tokens in zip(scored.responses, (letters, whole), strict=False):
        expected = [plain_log_prob(model, text, tokens) for text in (bare, prompt)]
        assert [response.log_p_response, response.log_q] == pytest.approx(expected, abs=5e-4)
    printed = capsys.readouterr().out
    assert (
        "1 groups with 3 responses, 1 of unknown tokens "
        "(responses left out: 1 cut off, 1 not valid UTF-8;"
    ) in printed
    assert compared(output)["responses"] == 2
    assert compared(output)["per_token"]["max"] < 1e-3


# How far an engine's log-probs lie apart


@pytest.fixture(scope="module")
def with_engine(scored: Path) -> Path:
    """The scored groups as an engine would have left them: every third response without its log Q'
    or with NaN, the others off by 0.001, 0.002, ... nats, in turn upwards and downwards."""
    path = scored.with_name("with_engine.jsonl")
    records, number = [], 0
    for record in read_records(scored):
        responses = []
        for i, response in enumerate(record.responses):
            extra, finish_reason = {}, None
            if i % 3 != 2:
                number += 1
                assert response.log_q is not None
                gap = 0.001 * number * (-1) ** number
                extra, finish_reason = {"engine_log_q": response.log_q + gap}, "stop"
            elif number % 3 == 0:  # what JSON writers make of a server's NaN: no number, no gap
                extra, finish_reason = {"engine_log_q": float("nan")}, "stop"
            unknown = dict.fromkeys(LOG_PROB_KEYS)
            known = {"extra": extra, "finish_reason": finish_reason}
            responses.append(dataclasses.replace(response, **known, **unknown))
        records.append(dataclasses.replace(record, responses=responses))
    write_records(path, records)
    return path


def compared(output: Path) -> Json:
    return json.loads(output.with_name(f"{output.name}.engine_log_q.json").read_text())


@pytest.fixture(scope="module")
def compared_run(tune: Any, with_engine: Path) -> tuple[Path, str]:
    output = with_engine.with_name("compared.jsonl")
    return output, tune(*arguments(with_engine, output)).stdout


def test_says_how_far_the_engines_log_probs_lie_apart(compared_run: tuple[Path, str]) -> None:
    """Gaps of 0.001 to 0.001 N nats a sequence: mean and median 0.001 (N + 1) / 2, the 99th
    percentile 1 + 0.99 (N - 1) of them, the last one the largest. A token's are those through the
    tokens of each response."""
    output, stdout = compared_run
    found = compared(output)
    lengths = [
        len(encode_response(extra_id_template(), tiny_tokenizer(), response.value))
        for record in read_records(output)
        for response in record.responses
        if math.isfinite(response.extra.get("engine_log_q", math.nan))
    ]
    count = len(lengths)
    assert 80 < count < RESPONSES_KEPT
    middle = 0.001 * (count + 1) / 2
    expected = {"mean": middle, "median": middle, "p99": 0.001 * (1 + 0.99 * (count - 1)),
                "max": 0.001 * count}  # fmt: skip
    assert found["responses"] == count
    assert found["per_sequence"] == pytest.approx(expected, abs=2e-5)
    per_token = sorted(0.001 * (i + 1) / length for i, length in enumerate(lengths))
    assert found["per_token"]["mean"] == pytest.approx(sum(per_token) / count, abs=2e-5)
    assert found["per_token"]["median"] == pytest.approx(statistics.median(per_token), abs=2e-5)
    assert found["per_token"]["max"] == pytest.approx(per_token[-1], abs=2e-5)
    (line,) = [line for line in stdout.splitlines() if "the engine's log Q' differs" in line]
    assert f"over {count} responses, by mean {middle:.3g}, median {middle:.3g}, p99" in line
    assert "nats a sequence; mean" in line
    assert "WARNING" not in stdout


def test_says_of_how_many_responses_the_engines_log_prob_is_unknown(
    compared_run: tuple[Path, str],
) -> None:
    """Those with NaN; where nothing says that an engine sampled them, nothing is missing."""
    output, stdout = compared_run
    extras = [response.extra for record in read_records(output) for response in record.responses]
    unknown = [e for e in extras if "engine_log_q" in e and not math.isfinite(e["engine_log_q"])]
    assert 0 < len(unknown) < len(extras)
    assert f"the engine's log Q' is unknown of {len(unknown)} responses" in stdout


def test_a_run_that_finds_everything_done_says_the_same(
    tune: Any, with_engine: Path, compared_run: tuple[Path, str]
) -> None:
    output, stdout = compared_run
    first = compared(output)
    output.with_name(f"{output.name}.engine_log_q.json").unlink()
    again = tune(*arguments(with_engine, output)).stdout
    assert compared(output) == first
    line = next(line for line in stdout.splitlines() if "the engine's log Q' differs" in line)
    assert line in again


def test_an_engine_far_from_ours_is_warned_about(
    tune: Any, with_engine: Path, tmp_path: Path
) -> None:
    """Another model: fresh weights of another seed, whose log-probs differ by more than 0.05 nats a
    token."""
    stdout = tune(*arguments(with_engine, tmp_path / "out.jsonl", "seed=7")).stdout
    assert compared(tmp_path / "out.jsonl")["per_token"]["mean"] > 0.05
    assert "WARNING: that is more than 0.05 nats a token: the engine had another" in stdout


def test_nothing_is_compared_without_log_q_or_without_an_engine(
    tune: Any, scored: Path, with_engine: Path, tmp_path: Path
) -> None:
    assert not scored.with_name("scored.jsonl.engine_log_q.json").exists()
    quantities = "quantities=[log_p_attributes]"
    stdout = tune(*arguments(with_engine, tmp_path / "out.jsonl", quantities)).stdout
    assert "engine" not in stdout
    assert not (tmp_path / "out.jsonl.engine_log_q.json").exists()


def test_training_on_the_output_passes_a_strict_drift_check(
    tune: Any, scored: Path, tmp_path: Path
) -> None:
    """The stored log Q' are the trainer's own to 1e-4 nats a token (the default allows 0.05)."""
    tune(
        *("steerlm2_distributed", "--config", "tiny/steerlm2", f"output_dir={tmp_path}"),
        *("dataset=steerlm2.datasets.steerlm2_dataset", f"dataset.source={scored}"),
        *(f"dataset.max_seq_len={MAX_SEQ_LEN}", "~dataset.num_records", "~dataset.split"),
        *("~dataset.responses_per_prompt", "dataset_val=null", "~val_every_n_steps"),
        *("generation=null", "save_every_n_steps=null", "max_steps=2"),
        *("lr_scheduler.warmup_steps=0", "lr_scheduler.constant_steps=0"),
        *("steerlm2.score_with_start_model=false", "steerlm2.log_q_tolerance=1e-4"),
    )


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], partial: Path, lines: int) -> None:
    deadline = time.monotonic() + 120
    while whole_lines(partial) < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_after(process: subprocess.Popen[str], partial: Path, lines: int) -> None:
    """SIGKILL, which no process can clean up after, once `partial` has so many whole lines."""
    wait_for_lines(process, partial, lines)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def resumed(tune: Any, groups: Path) -> Path:
    """Killed in the midst of it, with a line cut off, and run again."""
    output = groups.with_name("resumed.jsonl")
    partial = output.with_name("resumed.jsonl.partial")
    kill_after(tune.start(*arguments(groups, output)), partial, lines=5)
    assert not output.exists()
    assert 5 <= whole_lines(partial) < GROUPS_KEPT
    with partial.open("ab") as file:
        file.write(b'{"system": "Answer.", "prompt_tu')
    tune(*arguments(groups, output))
    return output


def test_killed_and_run_again_equals_uninterrupted(scored: Path, resumed: Path) -> None:
    """Byte for byte: the same lines in input order, none twice, none missing, none cut off."""
    assert resumed.read_bytes() == scored.read_bytes()
    assert not resumed.with_name("resumed.jsonl.partial").exists()


def test_complete_output_is_left_as_it_is(tune: Any, groups: Path, resumed: Path) -> None:
    """Nothing is scored again: the file is the same one, and no other appears."""

    def state() -> tuple[object, ...]:
        info = resumed.stat()
        files = sorted(path.name for path in resumed.parent.iterdir())
        return resumed.read_bytes(), info.st_mtime_ns, info.st_ino, files

    before = state()
    tune(*arguments(groups, resumed))
    assert state() == before


def test_other_settings_are_refused(tune: Any, groups: Path, resumed: Path) -> None:
    """The lines of two seeds in one file would be log-probs of two models."""
    before = resumed.read_bytes()
    result = tune(*arguments(groups, resumed, "seed=7", "dtype=bf16"), check=False)
    assert result.returncode == 1
    assert "was begun with other settings (seed, dtype)" in result.stderr
    assert "Traceback" not in result.stderr
    assert resumed.read_bytes() == before


def log_probs(path: Path) -> Iterator[float]:
    for line in path.read_text().splitlines():
        for response in json.loads(line)["responses"]:
            yield from (response[key] for key in LOG_PROB_KEYS.values())


@pytest.mark.parametrize("tensor_parallel_dim", [1, 2], ids=["FSDP2", "TP2"])
def test_two_ranks_give_the_same(
    tune: Any, groups: Path, scored: Path, tmp_path: Path, tensor_parallel_dim: int
) -> None:
    """Sums of up to 60 log-probs to 1e-4 nats. The folder of the output is made, and has logs."""
    output = tmp_path / "new" / "scored.jsonl"
    layout = f"tensor_parallel_dim={tensor_parallel_dim}"
    tune(*arguments(groups, output, layout, "records_per_write=64"), nproc=2)
    expected = list(log_probs(scored))
    assert len(expected) == 3 * RESPONSES_KEPT
    assert list(log_probs(output)) == pytest.approx(expected, rel=0, abs=1e-4)
    assert ranks_with_logs(output.parent) == [0, 1]


def test_a_stopped_rank_is_named_and_the_run_goes_on(
    tune: Any, groups: Path, tmp_path: Path
) -> None:
    many = tmp_path / "groups.jsonl"
    many.write_bytes(groups.read_bytes() * 2)
    output = tmp_path / "scored.jsonl"
    process = tune.start(*arguments(many, output, "hang_timeout_seconds=2"), nproc=2)
    stderr = stopped_until_named(process, tmp_path, "scored.jsonl.partial")
    assert "WARNING: no rank has made progress for 2 seconds" in stderr
    assert re.search(r"rank 0 on \S+: .*log_q, group \d+, in ", stderr)


# A model for each quantity, in one run


@pytest.fixture(scope="module")
def three_models(
    tmp_path_factory: pytest.TempPathFactory, attribute_model: Path
) -> dict[str, Path]:
    """An exported folder for each quantity."""
    folders = {"log_p_attributes": attribute_model}
    for seed, name in enumerate(["log_p_response", "log_q"], start=7):
        model = llama3(vocab_size=512, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=128,
                       intermediate_dim=384, max_seq_len=2048, rope_base=10000)  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        checkpointer = ScratchCheckpointer(
            model, tiny_tokenizer(), seed=seed, output_dir=str(folder)
        )
        checkpointer.save_checkpoint(checkpointer.load_checkpoint(), epoch=0)
        folders[name] = folder / "epoch_0"
    return folders


@pytest.fixture(scope="module")
def unscored(groups: Path) -> Path:
    """The groups without `scores`, labelled with what the attribute model knows."""
    path = groups.with_name("unscored.jsonl")
    records = [
        dataclasses.replace(
            record, responses=[dataclasses.replace(r, scores=None) for r in record.responses]
        )
        for record in read_records(groups, require=())
    ]
    write_records(path, records)
    return path


def with_models(models: dict[str, Path], prefix: str = "{}.checkpointer") -> list[str]:
    """Overrides that give every quantity its checkpoint."""
    component = "steerlm2.checkpoints.HFCheckpointer"
    return [
        override
        for name, folder in models.items()
        for key in [prefix.format(name)]
        for override in (f"{key}._component_={component}", f"{key}.checkpoint_dir={folder}")
    ]


SCHEMA = ("schema.names=[humor,verbosity]",)


@pytest.fixture(scope="module")
def by_three_models(tune: Any, unscored: Path, three_models: dict[str, Path]) -> Path:
    output = unscored.with_name("three.jsonl")
    tune(*arguments(unscored, output, *SCHEMA, *with_models(three_models)))
    return output


def test_three_models_in_one_run_are_three_runs_with_one_each(
    tune: Any, unscored: Path, three_models: dict[str, Path], by_three_models: Path, tmp_path: Path
) -> None:
    """annotate_attributes, then log P(y|x), then log Q': byte for byte the same."""
    first, second, third = (tmp_path / f"{i}.jsonl" for i in (1, 2, 3))
    attribute_model = {"log_p_attributes": three_models["log_p_attributes"]}
    tune(
        *("annotate_attributes", "--config", "tiny/annotate_attributes"),
        *(f"input={unscored}", f"output={first}", "records_per_write=1", "max_seq_len=72"),
        *with_models(attribute_model, "checkpointer"),
    )
    for source, target, name in ((first, second, "log_p_response"), (second, third, "log_q")):
        checkpoint = with_models({name: three_models[name]}, "checkpointer")
        tune(*arguments(source, target, f"quantities=[{name}]", *checkpoint))
    assert by_three_models.read_bytes() == third.read_bytes()


def test_one_model_is_in_memory_at_a_time(
    unscored: Path, three_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoders() -> int:
        return sum(type(thing) is TransformerDecoder for thing in gc.get_objects())

    alive = []

    def count_decoders(*arguments: Any, **options: Any) -> None:
        alive.append(decoders() - before)
        load_weights(*arguments, **options)

    for module in (decoder_module, attribute_model_module):
        monkeypatch.setattr(module, "load_weights", count_decoders)
    gc.collect()  # what other tests have left
    before = decoders()
    name, _, config, *overrides = arguments(
        unscored, tmp_path / "out.jsonl", *SCHEMA, *with_models(three_models)
    )
    score_responses.ScoreRecipe(recipe_config(name, config, *overrides)).score()
    assert alive == [1, 1, 1]


def test_nothing_is_left_of_what_the_models_handed_on(by_three_models: Path) -> None:
    names = {path.name for path in by_three_models.parent.glob("three.jsonl*")}
    assert names == {"three.jsonl", "three.jsonl.settings.json"}


@pytest.mark.parametrize("stage", [".log_p_attributes", ""])
def test_killed_under_any_model_equals_uninterrupted(
    tune: Any,
    unscored: Path,
    three_models: dict[str, Path],
    by_three_models: Path,
    tmp_path: Path,
    stage: str,
) -> None:
    output = tmp_path / "out.jsonl"
    command = arguments(unscored, output, *SCHEMA, *with_models(three_models))
    kill_after(tune.start(*command), tmp_path / f"out.jsonl{stage}.partial", lines=5)
    tune(*command)
    assert output.read_bytes() == by_three_models.read_bytes()


def test_scores_are_enough_for_log_p_attributes(tune: Any, groups: Path, tmp_path: Path) -> None:
    """No model is built: one that can't be doesn't matter."""
    output = tmp_path / "out.jsonl"
    command = arguments(groups, output, "quantities=[log_p_attributes]", "checkpointer=null")
    tune(*command, "model.vocab_size=1")
    assert len(read_records(output, require=("log_p_attributes",))) == GROUPS_KEPT


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("log_q.checkpointer=null", "'log_q' says how to score what 'quantities' doesn't ask for"),
        ("log_p_attributes.model=null", "'log_p_attributes' needs a 'checkpointer'"),
    ],
)
def test_sections_that_make_no_sense(
    tune: Any, groups: Path, tmp_path: Path, override: str, message: str
) -> None:
    quantities = "quantities=[log_p_attributes,log_p_response]"
    result = tune(*arguments(groups, tmp_path / "out.jsonl", quantities, override), check=False)
    assert result.returncode == 1
    assert message in result.stderr
