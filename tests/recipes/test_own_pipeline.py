"""A model folder, a CSV and a config of a dozen lines become a steered model and a report."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from steerlm2.attributes import AttributeSchema, parse_label
from steerlm2.checkpoint_dirs import newest_export
from steerlm2.data.conversations import iter_conversations
from steerlm2.data.records import read_records
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.facts import read_facts

SCHEMA = AttributeSchema(("formality", "length"), ((0, 10), (1, 5)))

CONFIG = """\
extends: pipeline
output_dir: mine
base_model: base
template: {_component_: steerlm2.data.extra_id_template}
data: answers.csv
data_builder: {columns: {prompt: question, response: answer}}
schema: {formality: [0, 10], length: [1, 5]}
machine: {device: cpu, dtype: fp32, compile: false}
training: {max_steps: 80, global_batch_size: 8, val_every_n_steps: null}
fine_tuning: {lr: 6.0e-3}
sampling: {n: 4, max_new_tokens: 12, keep_truncated: true}
max_seq_len: 256
iterations: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has: a model of transformers, and rated answers in a table."""
    folder = tmp_path_factory.mktemp("own")
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(
        LlamaConfig(**sizes, **shape, max_position_embeddings=512, tie_word_embeddings=True)
    ).save_pretrained(folder / "base")
    tiny_tokenizer().save(folder / "base")
    rng = random.Random(0)
    with open(folder / "answers.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer", "formality", "length"])
        for i in range(48):
            formality, length = rng.randint(0, 10), rng.randint(1, 5)
            table.writerow([f"Why {i}?", "ok " * length + "!" * formality, formality, length])
    (folder / "mine.yaml").write_text(CONFIG)
    return folder


@pytest.mark.slow
def test_a_dozen_lines_make_a_steered_model(tune: Any, folder: Path) -> None:
    run = replace(tune, cwd=folder)
    printed = run("steerlm2_pipeline", "--config", "mine.yaml").stdout
    mine = folder / "mine"
    assert "steering_mae" in printed
    assert "formality" in (mine / "report.html").read_text()
    summary = json.loads((mine / "summary.json").read_text())
    assert set(summary["steering_mae"]) == {"acsft", "steerlm2_iter1"}

    rated = iter_conversations(mine / "data" / "train.jsonl")
    labels = [parse_label(str(each.turns[-1].label), SCHEMA) for each in rated]
    assert max(label["formality"] for label in labels) == 10, "beyond the default range"
    for record in read_records(mine / "score_iter1" / "groups.jsonl"):
        assert list(parse_label(str(record.label), SCHEMA)) == list(SCHEMA.names)

    trained = newest_export(mine / "steerlm2_iter1")
    assert trained is not None
    facts = read_facts(trained)
    assert facts is not None
    assert facts.schema == SCHEMA
    prompt = AutoTokenizer.from_pretrained(trained).apply_chat_template(
        [{"role": "user", "content": "Why?"}],
        attributes={"formality": 9, "length": 1},
        add_generation_prompt=True,
        tokenize=False,
    )
    assert prompt.endswith("Assistant\n<extra_id_2>formality:9,length:1\n")
