"""README.md of an export: what a reader of its page on the Hub sees, and how the model is used.

The card is written from steerlm2.json, so it says nothing that the folder doesn't, and no path. An
evaluation comes later, between two comments: the only part of a card that is ever rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from steerlm2.attributes import AttributeSchema, parse_label
from steerlm2.checkpoint_dirs import read_json, resolve_checkpoint_dir
from steerlm2.checkpoints.side_files import CHAT_TEMPLATE, MODEL_CARD
from steerlm2.escaping import markdown_text, printable
from steerlm2.facts import ModelFacts, read_facts
from steerlm2.page_templates import page_template

EVALUATION_START, EVALUATION_END = "<!-- evaluation -->", "<!-- end of evaluation -->"

MEANINGS = {
    "quality": "how good the answer is as a whole",
    "toxicity": "how rude or harmful it is",
    "humor": "how funny it is, against how serious",
    "creativity": "how original it is, against how expected",
    "helpfulness": "how much it helps with what was asked",
    "correctness": "how far its facts are right and none that matter are missing",
    "coherence": "how clear and consistent it is",
    "complexity": "how much the reader must know to follow it",
    "verbosity": "how much it says, measured by what was asked",
}
"""Attributes of Open Assistant and HelpSteer, as their annotators were told them."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_LICENSE_KEYS = ("license", "license_name", "license_link")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_TASKS = {"language model": "text-generation", "attribute model": "text-classification"}


def write_card(folder: Path, facts: ModelFacts, *, is_adapter: bool = False) -> None:
    """Write README.md of an export whose other small files are there.

    Args:
        is_adapter: the weights are a LoRA adapter in PEFT's format.
    """
    template = page_template("steerlm2.checkpoints", "model_card.md.jinja", table_cell)
    trained = dict(facts.trained)
    base = trained.get("base")
    title = str(trained.get("method") or facts.kind) + (f" of {base}" if base else "")
    text = template.render(
        front_matter=_front_matter(facts, is_adapter),
        title=title[0].upper() + title[1:],
        facts=facts,
        system=printable(facts.system or ""),
        base=base,
        trained=_rows(trained),
        validation=trained.get("validation") or {},
        defaults=parse_label(facts.default_label) if facts.default_label else {},
        meanings=MEANINGS,
        has_chat_template=(folder / CHAT_TEMPLATE).is_file(),
        is_adapter=is_adapter,
        example=_example(facts.schema) if facts.schema else None,
        evaluation=f"{EVALUATION_START}\n{EVALUATION_END}",
    )
    (folder / MODEL_CARD).write_text(text, encoding="utf-8")


def origin(checkpoint_dir: str | Path | None) -> dict[str, Any]:
    """Where a training starts from: `from`, its `base` model, and the base's license where known.

    A base is named as on the Hub where its folder tells that, else as its folder; never by a path.

    Args:
        checkpoint_dir: as in a config; None: fresh weights.
    """
    if checkpoint_dir is None:
        return {}
    folder = resolve_checkpoint_dir(checkpoint_dir).resolve()
    name = checkpoint_name(folder)
    if (facts := read_facts(folder)) is not None:
        kept = {k: v for k, v in facts.trained.items() if k in ("base", *_LICENSE_KEYS)}
        return {"from": name} | kept
    return {"from": name, "base": name} | _license(folder)


def checkpoint_name(folder: Path) -> str:
    """What a checkpoint is called: its name on the Hub where known, else as its folder.

    `tune download` notes the name in a file, the Hub's cache in the folder's path, and transformers
    in config.json. Folders of runs are called epoch_1 and the like: the run's name stands before.
    """
    noted = folder / "original_repo_id.json"
    found = [read_json(noted).get("repo_id")] if noted.is_file() else []
    if match := _HUB_CACHE.fullmatch(folder.parent.parent.name):
        found.append(f"{match['owner']}/{match['name']}")
    if (folder / "config.json").is_file():
        found.append(read_json(folder / "config.json").get("_name_or_path"))
    for name in found:
        if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists():
            return name
    is_epoch = re.fullmatch(r"epoch_\d+", folder.name) is not None
    return f"{folder.parent.name}/{folder.name}" if is_epoch else folder.name


def source_name(source: object) -> str:
    """The name of a data source: a path's last part; of a URL neither user nor query."""
    text = str(source)
    return Path(urlsplit(text).path if "://" in text else text).name


def _license(folder: Path) -> dict[str, str]:
    card = folder / MODEL_CARD
    match = _FRONT_MATTER.match(card.read_text("utf-8", "replace")) if card.is_file() else None
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        return {}
    return {key: value for key in _LICENSE_KEYS if isinstance(value := values.get(key), str)}


def _front_matter(facts: ModelFacts, is_adapter: bool) -> str:
    """YAML that the Hub reads."""
    trained = facts.trained
    labelled = facts.kind == "language model" and facts.default_label is not None
    values = {
        "base_model": trained.get("base"),
        "base_model_relation": ("adapter" if is_adapter else "finetune")
        if trained.get("base")
        else None,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": _TASKS[facts.kind],
        **{key: trained.get(key) for key in _LICENSE_KEYS},
        "tags": ["steerlm2", "steerlm", *(["attribute-conditioned"] if labelled else [])],
    }
    known = {key: value for key, value in values.items() if value is not None}
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True).strip()


def _rows(trained: Mapping[str, Any]) -> dict[str, Any]:
    """The table of the training."""
    records = trained.get("records")
    data = trained.get("data")
    rows = {
        "Trained as": trained.get("method"),
        "Started from": trained.get("from", "fresh weights"),
        "Base model": trained.get("base"),
        "Data": data and (f"{data}, {records:,} records" if records else data),
        "Steps": trained.get("steps"),
        "Loss at the last steps": trained.get("loss"),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _example(schema: AttributeSchema) -> dict[str, int]:
    """Values to ask for: much of the first attribute, little of the last."""
    last = {schema.names[-1]: schema.ranges[-1][0]}
    return {**last, schema.names[0]: schema.ranges[0][1]} if len(schema.names) > 1 else last


def table_cell(value: object) -> str:
    """Text in a table's cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return markdown_text(text)
