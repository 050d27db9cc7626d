"""What can be wrong with the keys that recipes share."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from steerlm2.attributes import AttributeSchema
from steerlm2.config.keys import (
    DistributedKeys,
    LabelOptions,
    SamplingKeys,
    ScoringKeys,
    ServerOptions,
    TrainingKeys,
    output_problems,
    settings_of,
)
from steerlm2.config.loader import Component

SCHEMA = AttributeSchema(("humor", "verbosity"))
MODEL = {"tokenizer": Component(_component_="t"), "model": Component(_component_="m")}


def keys_in(problems: list[str]) -> list[str]:
    """The keys that the problems begin with."""
    return [problem.split("'")[1] for problem in problems]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (LabelOptions(kind="fixed"), "'label.value' is missing: 'label.kind' is fixed"),
        (LabelOptions(kind="uniform"), "'label.attributes' is missing"),
        (LabelOptions(kind="empirical"), "'label.file' is missing"),
        (LabelOptions(file="f"), "'label.file' is for 'label.kind' empirical, not record"),
        (LabelOptions(labels_per_prompt=0), "'label.labels_per_prompt' must be at least 1, got 0"),
        (LabelOptions(labels_per_prompt=2), "'label.kind' record has one label a prompt"),
        (LabelOptions(kind="fixed", value="humor:5"), "humor must be a whole number from 0 to 4"),
        (LabelOptions(kind="uniform", attributes=["wit"]), "unknown attribute 'wit'"),
        (
            LabelOptions(kind="uniform", attributes=["humor", "humor"], labels_per_prompt=6),
            "there are only 5 labels",
        ),
    ],
)
def test_labels(options: LabelOptions, problem: str) -> None:
    (found,) = options.problems(SCHEMA)
    assert problem in found


def test_good_options_have_no_problems() -> None:
    every_label = LabelOptions(
        kind="uniform", attributes=["humor", "verbosity"], labels_per_prompt=25
    )
    for options in (LabelOptions(), LabelOptions(kind="none"), every_label):
        assert list(options.problems(SCHEMA)) == []
    assert list(ServerOptions(url="http://127.0.0.1:8000").problems()) == []
    greedy: dict[str, Any] = {"n": 1, "temperature": 0.0, "top_p": 1.0}
    assert SamplingKeys(**MODEL, **greedy, max_new_tokens=8, max_seq_len=9).problems() == []
    assert ScoringKeys(**MODEL).problems() == []


def test_the_number_of_labels_is_a_product_of_the_ranges() -> None:
    schema = AttributeSchema(("formality", "length"), ((0, 10), (1, 5)))
    names = ["formality", "length"]
    most = LabelOptions(kind="uniform", attributes=names, labels_per_prompt=55)
    assert list(most.problems(schema)) == []
    most.labels_per_prompt = 56
    assert list(most.problems(schema)) == ["'label.labels_per_prompt': there are only 55 labels"]


def test_settings_say_equal_schemas_alike_and_tell_orders_apart() -> None:
    forms = [
        {"formality": [0, 10], "length": [1, 5]},
        {"names": ["formality", "length"], "ranges": [[0, 10], [1, 5]]},
        {"length": [1, 5], "formality": [0, 10]},
        {"names": ["humor", "wit"]},
        {"humor": [0, 4], "wit": [0, 4]},
    ]
    one, same, turned, shared, also_shared = (
        settings_of(ScoringKeys(**MODEL, schema=schema), ["schema", "bins"]) for schema in forms
    )
    assert one == same != turned
    assert shared == also_shared
    assert one["bins"] == "midpoint"
    default = settings_of(ScoringKeys(**MODEL, schema={"max_value": 4}), ["schema"])
    assert default == settings_of(ScoringKeys(**MODEL), ["schema"]) == {"schema": None}


def test_servers_are_named_by_their_place_in_the_config() -> None:
    server = ServerOptions(url="u", concurrency=0, timeout=0, retries=-1)
    assert keys_in(list(server.problems("models.a.server"))) == [
        "models.a.server.concurrency",
        "models.a.server.timeout",
        "models.a.server.retries",
    ]


def test_timeouts_are_positive() -> None:
    """No hang timeout at all means that nobody watches; a collective always has one."""
    wrong = DistributedKeys(**MODEL, hang_timeout_seconds=0, collective_timeout_seconds=-1)
    assert keys_in(wrong.problems()) == ["hang_timeout_seconds", "collective_timeout_seconds"]
    assert DistributedKeys(**MODEL, hang_timeout_seconds=None).problems() == []


def test_adapters_alone_need_the_model_that_they_are_added_to() -> None:
    """Fresh weights are in no file."""
    given: dict[str, Any] = MODEL | dict.fromkeys(("dataset", "optimizer"), MODEL["model"])
    limits: dict[str, Any] = {"output_dir": "out", "lr": 1.0, "max_steps": 1}
    keys = TrainingKeys(**given, **limits, save_adapter_weights_only=True)
    (problem,) = keys.problems()
    assert problem.startswith("'save_adapter_weights_only' needs 'checkpointer'")
    assert dataclasses.replace(keys, checkpointer=MODEL["model"]).problems() == []


def test_sampling() -> None:
    wrong = SamplingKeys(**MODEL, n=2, temperature=0, top_p=0, max_new_tokens=9, max_seq_len=9)
    assert keys_in(wrong.problems()) == ["top_p", "temperature", "max_new_tokens"]
    (negative,) = SamplingKeys(**MODEL, temperature=-1).problems()
    assert negative == "'temperature' must be at least 0, got -1"


def test_labels_are_only_checked_against_a_schema_that_is_one() -> None:
    label = LabelOptions(kind="fixed", value="wit:1")
    (unknown,) = SamplingKeys(**MODEL, label=label).problems()
    assert "unknown attribute 'wit'" in unknown
    (broken,) = SamplingKeys(**MODEL, label=label, schema={"names": ["a b"]}).problems()
    assert broken.startswith("'schema': ")


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("tensor_parallel_dim", 2, "1"),
        ("data_parallel_replicate_dim", 2, "1"),
        ("data_parallel_shard_dim", 2, "-1"),
        ("fsdp_cpu_offload", True, "false"),
        ("fsdp_reshard_after_forward", False, "true"),
    ],
)
def test_processes_that_hold_the_whole_model_do_not_split_it(
    key: str, value: Any, needed: str
) -> None:
    (problem,) = SamplingKeys(**MODEL, **{key: value}).problems()
    assert problem.startswith(f"'{key}' must be {needed}: every process holds the whole model")


def test_scoring() -> None:
    counts = {"records_per_write": 0, "max_tokens_per_microbatch": 0}
    found = ScoringKeys(**MODEL, **counts, concentration=0, schema={"names": []}).problems()
    assert keys_in(found) == [
        *("records_per_write", "schema", "max_tokens_per_microbatch", "concentration"),
    ]


def test_output_is_a_file_of_its_own_that_can_be_appended_to() -> None:
    assert list(output_problems("in.jsonl", "./in.jsonl")) == [
        "'output' must be another file than 'input'"
    ]
    assert keys_in(list(output_problems("in.jsonl.gz", "out.jsonl.gz"))) == ["output"]
    assert list(output_problems("in.jsonl.gz", "out.jsonl")) == []
