"""What a config leaves out, from the checkpoints that it names (steerlm2.json, `steerlm2.facts`).

A section with a checkpointer needs no tokenizer (its folder's), no model (what config.json
describes), no template and no schema where the folder is an export of ours. What is given all the
same must be what the model was trained with. Of any other folder the template is the one whose
control tokens its tokenizer has. A checkpoint is data: of the code that it names only our own
templates are run. A schema that no checkpoint says is that of the training data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from omegaconf import MISSING

from steerlm2.attributes import as_schema, schema_to_json
from steerlm2.checkpoint_dirs import resolve_checkpoint_dir
from steerlm2.config.loader import instantiate
from steerlm2.data.digest import template_digest
from steerlm2.data.settings import schema_of_data, settings_file
from steerlm2.data.templates import fitting_template, is_ours
from steerlm2.data.tokenizers import added_tokens
from steerlm2.facts import FACTS_FILE, ModelFacts, read_facts
from steerlm2.models.config_json import unsupported_family

CHECKPOINTER = "steerlm2.checkpoints.HFCheckpointer"
TOKENIZER = "steerlm2.data.hf_tokenizer"
MODEL = "steerlm2.models.from_checkpoint"

Values = dict[str, Any]

SchemaRule = Literal["equal", "within", "any"]
"""What a given schema must be: the checkpoint's own, a part of it, or any."""


def complete_model(values: Values, section: Values | None = None, where: str = "") -> Iterator[str]:
    """Fill in what a model's keys leave out.

    Args:
        values: of the whole config.
        section: of a model under a section of its own, which takes what it doesn't say from the
            whole config; None: the whole config's own model.
        where: the section's key with a point at its end.

    Yields:
        What is given and isn't what the checkpoint's model was trained with.
    """
    own = values if section is None else section
    checkpointer = own.get("checkpointer")
    if not isinstance(checkpointer, dict):
        checkpointer = {}
    folder = _path(checkpointer.get("checkpoint_dir"))
    if "checkpoint_dir" in checkpointer:
        checkpointer.setdefault("_component_", CHECKPOINTER)
        if not own.get("tokenizer") and not values.get("tokenizer"):
            own["tokenizer"] = {"_component_": TOKENIZER, "path": folder or ""}
        if not own.get("model") and not values.get("model"):
            own["model"] = {"_component_": MODEL}
    try:
        facts = read_facts(folder) if folder else _facts_of_tokenizer(own)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    for keys in (own, values):
        if keys.get("template") in (None, {"_component_": None}):  # null in YAML, on a command line
            keys.pop("template", None)
    if folder and checkpointer.get("_component_") == CHECKPOINTER:
        unsupported = unsupported_family(resolve_checkpoint_dir(folder, missing_ok=True))
        if unsupported is not None:
            yield unsupported
            return
    given = own.get("template") or values.get("template")
    if facts is None:
        if not given:
            tokenizer = own.get("tokenizer") or values.get("tokenizer")
            path = _path(tokenizer.get("path")) if isinstance(tokenizer, dict) else None
            fitting = fitting_template(added_tokens(path)) if path else None
            if fitting is not None:
                own["template"] = {"_component_": fitting}
        return
    if not given and not is_ours(facts.template["_component_"]):
        key = f"{where}template" if section is not None else "template"
        yield (
            f"{folder or 'the tokenizer'} was trained with a template that isn't steerlm2's, "
            f"{_shown(facts.template)}, and what a checkpoint names isn't run: set '{key}' to it, "
            "if you know its code"
        )
    elif not given:
        own["template"] = dict(facts.template)
    elif not _same_template(given, facts.template):
        key = f"{where}template" if own.get("template") else "template"
        yield (
            f"'{key}' isn't the template that the model of {where}checkpointer was trained with, "
            f"which is {_shown(facts.template)} ({folder or 'the tokenizer'}, {FACTS_FILE}): leave "
            f"'{key}' out, and it is that one"
        )


def complete_schema(
    values: Values, section: Mapping[str, Any], rule: SchemaRule, where: str = ""
) -> Iterator[str]:
    """Fill in the `schema` that a config leaves out, from the checkpoint of a section.

    Args:
        where: the section's key with a point at its end.

    Yields:
        How the given schema differs.
    """
    try:
        folder = _path((section.get("checkpointer") or {}).get("checkpoint_dir"))
        facts = read_facts(folder) if folder else _facts_of_tokenizer(section)
        schema = facts.schema if facts else None
        if schema is None:
            return
        if values.get("schema") is None:
            values["schema"] = schema_to_json(schema)
            return
        given = as_schema(values["schema"])
        shared = [name for name in schema.names if name in given.names]
        own = schema.select(shared) if shared else schema
        allowed = {"equal": schema, "within": own, "any": given}[rule]
    except (ValueError, TypeError, AttributeError, OSError):
        return  # the key's own check names it
    if given != allowed:
        yield (
            f"'schema' isn't the one that the model of {where}checkpointer was trained with: "
            f"it has {given}, {FACTS_FILE} of {folder or 'the tokenizer'} has {schema}: "
            "leave 'schema' out, and it is that one"
        )


def complete_schema_from_data(values: Values) -> Iterator[str]:
    """Fill in the `schema` that a training config still leaves out, from what wrote its data.

    Yields:
        Which attributes have other ranges there.
    """
    for key in ("dataset", "dataset_val"):
        section = values.get(key)
        source = _path(section.get("source")) if isinstance(section, dict) else None
        if source is None or values[key].get("use_labels", True) is False:
            continue
        try:
            written = schema_of_data(source)
        except (ValueError, OSError) as error:
            yield str(error)
            continue
        if written is None:
            continue
        if values.get("schema") is None:
            values["schema"] = schema_to_json(written)
        try:
            given = as_schema(values["schema"])
        except (ValueError, TypeError):
            continue  # the key's own check names it
        shared = [name for name in given.names if name in written.names]
        if not shared or given.select(shared) != written.select(shared):
            yield (
                f"'schema' is {given}, but the labels of {source} were written with {written} "
                f"({settings_file(source)}): give that one, or write the data with this one"
            )


def complete_sections(values: Values, sections: Mapping[str, Any]) -> Iterator[str]:
    """Fill in models under sections of their own, and what all of them share from the first.

    Args:
        sections: by their keys; those that aren't mappings are left alone.
    """
    chosen = {key: section for key, section in sections.items() if isinstance(section, dict)}
    for key, section in chosen.items():
        yield from complete_model(values, section, f"{key}.")
    for name in ("tokenizer", "model"):
        known = [section[name] for section in chosen.values() if section.get(name)]
        if known and not values.get(name):
            values[name] = known[0]


def _facts_of_tokenizer(section: Mapping[str, Any]) -> ModelFacts | None:
    """Facts of the folder of the tokenizer: where a server has the model, nothing else names it."""
    tokenizer = section.get("tokenizer")
    path = _path(tokenizer.get("path")) if isinstance(tokenizer, dict) else None
    return read_facts(path) if path else None


def _path(value: Any) -> str | None:
    return value if isinstance(value, str) and value not in ("", MISSING) else None


def _same_template(given: Any, own: Mapping[str, Any]) -> bool:
    component = {"_component_": given} if isinstance(given, str) else given
    if not is_ours(own["_component_"]):
        return bool(component == own)
    try:
        return template_digest(instantiate(component)) == template_digest(instantiate(own))
    except (ValueError, TypeError, KeyError, AttributeError):
        return True  # the key's own check names it


def _shown(component: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{k}={v}" for k, v in component.items() if k != "_component_")
    return f"{component['_component_']}({arguments})"
