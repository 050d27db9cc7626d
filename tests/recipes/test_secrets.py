"""What a run and a pipeline print and write has none of the secrets that they were given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

SECRET = "S3CRplanted"
VARIABLES = {
    "HF_TOKEN": f"hf_{SECRET}",
    "WANDB_API_KEY": f"{SECRET}-wandb",
    "STEERLM2_API_KEY": f"{SECRET}-server",
    "PLANTED_WORD": f"{SECRET}-word",
    "PLANTED_URL": f"http://al:{SECRET}@127.0.0.1:9",
    "PLANTED_KEY": f"/{SECRET}'\"key",
}
"""Port 9 answers nobody."""


@pytest.fixture
def secretive_tune(tune: Any) -> Any:
    return replace(tune, variables=tune.variables | VARIABLES)


def leaks(folder: Path, *printed: str) -> Iterator[str]:
    """Where the secret stands: files' names and contents, and what was printed."""
    for file in folder.rglob("*"):
        if SECRET in file.name or (file.is_file() and SECRET.encode() in file.read_bytes()):
            yield str(file)
    yield from (line for text in printed for line in text.splitlines() if SECRET in line)


def test_a_run_tells_no_secret(secretive_tune: Any, write_groups: Any, tmp_path: Path) -> None:
    """Of URLs and of variables, in its config, on its command line and in its environment; it goes
    on from its own state as ever."""
    data = write_groups(tmp_path / "groups.jsonl", [2, 3, 2])
    logger = {
        "_component_": "torchtune.training.metric_logging.StdoutLogger",
        "address": f"https://al:{SECRET}@h/x?token={SECRET}&a=b",
        "nested": ["${oc.env:PLANTED_URL}", {"api_key": "${oc.env:WANDB_API_KEY}"}],
        "spaced": ["${ oc.env: PLANTED_KEY }", "got ${oc.env:PLANTED_WORD}"],
    }
    out = tmp_path / "out"
    arguments = (
        *("steerlm2_distributed", "--config", "tiny/steerlm2", f"output_dir={out}"),
        *("dataset=steerlm2.datasets.steerlm2_dataset", f"dataset.source={data}"),
        *("dataset.max_seq_len=72", "~dataset.num_records", "~dataset.responses_per_prompt"),
        *("~dataset.split", "dataset_val=null", "val_every_n_steps=null", "generation=null"),
        *("global_batch_size=3", "save_every_n_steps=1", "resume_from_checkpoint=true"),
        *(f"metric_logger={json.dumps(logger)}", "metric_logger.word=${oc.env:PLANTED_WORD}"),
        "metric_logger.other=http://${oc.env:PLANTED_WORD}@h",
        f"metric_logger.quoted=http://al:{SECRET}'x@h",
    )
    first = secretive_tune(*arguments, "max_steps=1")
    again = secretive_tune(*arguments, "max_steps=2")
    assert "resumed from" in again.stdout
    printed = [first.stdout, first.stderr, again.stdout, again.stderr]
    assert list(leaks(tmp_path, *printed)) == []
    written = yaml.safe_load((out / "config.yaml").read_text())["metric_logger"]
    assert written["nested"] == logger["nested"]
    assert written["spaced"] == ["${oc.env:PLANTED_KEY}", "got ${oc.env:PLANTED_WORD}"]
    assert written["quoted"] == "http://***@h"
    assert written["address"] == "https://***@h/x?token=***&a=b"
    assert json.loads((out / "run.json").read_text())["config"]["metric_logger"] == written


def test_a_pipeline_tells_no_secret(secretive_tune: Any, tmp_path: Path) -> None:
    """Not in its plan, its state, its messages, nor its stages' logs. A variable's new value is
    another server to a stage that names it."""
    out = tmp_path / "out"
    sample = {
        "input": "{data}/train.jsonl",
        "output": "{here}/groups.jsonl",
        "server": {"url": "${names.server}", "retries": 0},
    }
    stages = {
        "data": {
            "recipe": "prepare_data",
            "config": "data/grammar_prompts",
            "overrides": {"output_dir": "{here}"},
        },
        "sample": {
            "recipe": "sample_responses",
            "config": "tiny/sample_responses",
            "overrides": sample,
        },
    }
    plan = {"output_dir": str(out), "iterations": 0, "stages": stages}
    for name, server in {
        "variable": "${oc.env:PLANTED_URL}/",
        "literal": VARIABLES["PLANTED_URL"],
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(plan | {"names": {"server": server}}))
    texts = []
    for name in ("variable", "literal"):
        command = ("steerlm2_pipeline", "--config", str(tmp_path / f"{name}.yaml"))
        dry = secretive_tune(*command, "dry_run=true")
        ended = secretive_tune(*command, check=False)
        assert ended.returncode == 1
        assert "the server at http://127.0.0.1:9 doesn't answer" in ended.stderr
        texts += [dry.stdout, dry.stderr, ended.stdout, ended.stderr]
        if name == "literal":
            (tmp_path / f"{name}.yaml").unlink()  # it has the secret itself
        else:
            assert "'server.url=${oc.env:PLANTED_URL}/'" in dry.stdout
            assert "${oc.env:PLANTED_URL}/" in (out / "state" / "sample.json").read_text()
            assert "${oc.env:PLANTED_URL}/" in (out / "config.yaml").read_text()
    assert list(leaks(tmp_path, *texts)) == []
    assert "server.url=http://***@127.0.0.1:9" in texts[4]
