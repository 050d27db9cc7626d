"""Problems between the keys of `label:`, `server:` and sampling."""

from __future__ import annotations

import pytest

from steerlm2.attributes import AttributeSchema
from steerlm2.config.sections import LabelOptions, ServerOptions, sampling_problems

SCHEMA = AttributeSchema(("humor", "verbosity"))


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
    assert list(ServerOptions("http://127.0.0.1:8000").problems()) == []
    wanted = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8, "max_seq_len": 9}
    assert list(sampling_problems(n=1, **wanted)) == []  # type: ignore[arg-type]


def test_servers_are_named_by_their_place_in_the_config() -> None:
    found = list(
        ServerOptions("u", concurrency=0, timeout=0, retries=-1).problems("models.a.server")
    )
    assert [problem.split(" must")[0] for problem in found] == [
        "'models.a.server.concurrency'",
        "'models.a.server.retries'",
        "'models.a.server.timeout'",
    ]


def test_sampling() -> None:
    found = list(sampling_problems(n=2, temperature=0, top_p=0, max_new_tokens=9, max_seq_len=9))
    assert [problem.split("'")[1] for problem in found] == [
        *("temperature", "top_p", "max_new_tokens"),
    ]
    (negative,) = sampling_problems(n=2, temperature=-1, top_p=1, max_new_tokens=8, max_seq_len=9)
    assert negative == "'temperature' must be at least 0, got -1"
