"""README.md of an export, and that nothing in an export tells where it was made."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchtune.modules.peft import get_adapter_params
from torchtune.training import FullModelHFCheckpointer

from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoints.checkpointer import HFCheckpointer
from steerlm2.checkpoints.model_card import checkpoint_name, origin, source_name
from steerlm2.checkpoints.weights import load_weights, save_weights
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.facts import ModelFacts
from tests.checkpoints.test_side_files import CPU, base_folder, meta_decoder, text_of

LORA = {"lora_attn_modules": ["q_proj"], "lora_rank": 2, "lora_alpha": 4}
SECRET = "hf_planted"
FACTS = ModelFacts(
    kind="language model",
    template={"_component_": "steerlm2.data.extra_id_template"},
    schema=AttributeSchema(("verbosity", "length"), ((0, 4), (-1, 9))),
    default_label="verbosity:2,length:0",
    system="Answer.",
    trained={"method": "SteerLM 2.0", "steps": 8},
)


def downloaded(tmp_path: Path) -> Path:
    """A checkpoint in whose files tools have noted their folders, with a card and a secret."""
    folder = base_folder(tmp_path, generation={"eos_token_id": [1], "cache": str(tmp_path)})
    noted = {
        "config.json": {"_name_or_path": str(tmp_path / "theirs")},
        "tokenizer_config.json": {
            "name_or_path": str(tmp_path),
            "tokenizer_file": str(Path.home() / "tokenizer.json"),
            "vocab_dir": f"~/{SECRET}",
        },
    }
    for name, values in noted.items():
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(known | values))
    card = f"---\nlicense: other\nlicense_name: theirs\n---\n# Base {SECRET}\n"
    (folder / "README.md").write_text(card)
    (folder / "steerlm2.json").unlink(missing_ok=True)
    return folder


def exported(tmp_path: Path, base: Path, *, theirs: bool = False, **lora: Any) -> Path:
    """An export of what was trained from a base, by our checkpointer or torchtune's."""
    trained = {**FACTS.trained, **origin(base), "data": source_name(f"/data/{SECRET}/train.jsonl")}
    decoder = meta_decoder(**lora)
    checkpointer: Any = HFCheckpointer(str(base), str(tmp_path / "run"))
    load_weights(decoder, checkpointer, CPU, seed=0)
    for parameter in get_adapter_params(decoder).values():
        torch.nn.init.normal_(parameter)
    if theirs:
        checkpointer = FullModelHFCheckpointer(
            str(base), ["model.safetensors"], "LLAMA3", str(tmp_path / "run")
        )
        checkpointer.load_checkpoint()
    return save_weights(
        decoder, checkpointer, CPU, epoch=1, dtype=torch.float32, output_dir=tmp_path / "run",
        text=text_of(tiny_tokenizer()), facts=dataclasses.replace(FACTS, trained=trained),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ours", "torchtune's", "adapter"])
def test_an_export_says_nothing_of_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whatever the base's files name, and the environment holds; none of its card stays."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    lora = LORA if kind == "adapter" else {}
    folder = exported(tmp_path, downloaded(tmp_path), theirs=kind == "torchtune's", **lora)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {"README.md", "steerlm2.json", "config.json", "chat_template.jinja"} <= {
        file.name for file in files
    }
    forbidden = [str(tmp_path), str(Path.home()) + "/", os.getcwd(), SECRET, "# Base"]
    found = {
        (file.name, text)
        for file in files
        for text in forbidden
        if text.encode() in file.read_bytes()
    }
    assert not found


def front_matter(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_a_card_says_what_the_hub_shows(tmp_path: Path) -> None:
    folder = exported(tmp_path, downloaded(tmp_path), **LORA)
    assert front_matter(folder) == {
        "base_model": "base/epoch_1",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "theirs",
        "tags": ["steerlm2", "steerlm", "attribute-conditioned"],
    }
    adapter = front_matter(folder / "adapter")
    assert (adapter["library_name"], adapter["base_model_relation"]) == ("peft", "adapter")
    text = (folder / "README.md").read_text()
    for line in (
        "# SteerLM 2.0 of base/epoch_1",
        "| verbosity | 0 to 4 | 2 | how much it says, measured by what was asked |",
        "| length | -1 to 9 | 0 | as in the training data |",
        "    Answer.",
        "| Data | train.jsonl |",
        "| Steps | 8 |",
    ):
        assert line in text.splitlines(), line


def test_the_base_is_handed_on(tmp_path: Path) -> None:
    """Of a model that was trained from an export the base is the export's, and so is its license.
    Without a license there is none."""
    first = exported(tmp_path, downloaded(tmp_path))
    found = origin(first)
    assert found == {
        "from": "run/epoch_1", "base": "base/epoch_1", "license": "other", "license_name": "theirs"
    }  # fmt: skip
    (first / "steerlm2.json").unlink()
    (first / "README.md").write_text("# No front matter\n")
    assert origin(first) == {"from": "run/epoch_1", "base": "run/epoch_1"}
    assert origin(None) == {}


def test_a_checkpoint_is_called_as_on_the_hub_where_that_is_known(tmp_path: Path) -> None:
    def folder(name: str, **config: str) -> Path:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    assert checkpoint_name(folder("plain")) == "plain"
    assert checkpoint_name(folder("by-config", _name_or_path="owner/Model-1B")) == "owner/Model-1B"
    assert checkpoint_name(folder("theirs", _name_or_path="/home/them/model")) == "theirs"
    assert checkpoint_name(folder("models--owner--Model-1B/snapshots/0a1b")) == "owner/Model-1B"
    noted = folder("by-tune", _name_or_path="other/name")
    (noted / "original_repo_id.json").write_text('{"repo_id": "owner/Model-1B"}')
    assert checkpoint_name(noted) == "owner/Model-1B"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/me/data/train.jsonl", "train.jsonl"),
        (f"https://me:{SECRET}@host.example/a/train.jsonl?token={SECRET}", "train.jsonl"),
        ("s3://bucket/train.parquet", "train.parquet"),
        ("steerlm2.datasets.mine", "steerlm2.datasets.mine"),
    ],
)
def test_a_source_is_named_without_its_place(source: str, name: str) -> None:
    assert source_name(source) == name
