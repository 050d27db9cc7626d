"""What the model card of an export tells its readers to run, and our scores to compare with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.facts import read_facts
from steerlm2.inference.attribute_model import AttributeModel, load_attribute_model


def card_blocks(folder: Path, language: str) -> list[str]:
    """The code blocks of a language in an export's card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def card_request(folder: Path) -> dict[str, Any]:
    """The body of the request that the card's curl sends, without the name of the model."""
    (command,) = (block for block in card_blocks(folder, "sh") if block.startswith("curl"))
    body: dict[str, Any] = json.loads(command.partition(" -d '")[2].strip().removesuffix("'"))
    del body["model"]
    return body


def scorer(folder: Path) -> AttributeModel:
    """An attribute model of the tiny configs, loaded from its export."""
    facts = read_facts(folder)
    assert facts is not None
    assert facts.schema is not None
    component = "steerlm2.checkpoints.HFCheckpointer"
    return load_attribute_model(
        {"_component_": "steerlm2.models.from_checkpoint", "checkpoint_dir": str(folder)},
        {"_component_": component, "checkpoint_dir": str(folder)},
        tiny_tokenizer(),
        extra_id_template(),
        facts.schema,
        World(torch.device("cpu")),
        max_seq_len=512,
        max_tokens_per_microbatch=512,
        dtype=torch.float32,
    )
