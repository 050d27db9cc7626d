"""What a config leaves out comes from its checkpoints; what it gives must agree with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from steerlm2.attributes import AttributeSchema, as_schema, schema_to_json
from steerlm2.config.docs import ready_made_recipes
from steerlm2.config.loader import load_config
from steerlm2.data.settings import settings_file
from steerlm2.facts import FACTS_FILE, ModelFacts, write_facts

LLAMA3 = {"_component_": "steerlm2.data.llama3_template"}
EXTRA_ID = {"_component_": "steerlm2.data.extra_id_template"}
SCHEMA = AttributeSchema(("formality", "length"), ((0, 10), (1, 5)))


def checkpoint(folder: Path, **facts: Any) -> str:
    """A folder that is complete as far as configs look."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    whole = {"kind": "language model", "template": LLAMA3, "schema": SCHEMA} | facts
    write_facts(folder, ModelFacts(**whole))
    return str(folder)


def config(recipe: str, **values: Any) -> Any:
    _, config_class = ready_made_recipes()[recipe]
    return load_config(config_class, {"device": "cpu", "dtype": "fp32"} | values)


def sampling(folder: str, **values: Any) -> Any:
    given = {"input": "in.jsonl", "output": "out.jsonl", "checkpointer": {"checkpoint_dir": folder}}
    return config("sample_responses", **given | values)


def scoring(proposal: str, **folders: str) -> Any:
    """Of log Q' by a proposal, and of the quantities whose models' folders are given."""
    return config(
        "score_responses",
        input="in.jsonl",
        output="out.jsonl",
        quantities=["log_q", *folders],
        checkpointer={"checkpoint_dir": proposal},
        **{name: {"checkpointer": {"checkpoint_dir": own}} for name, own in folders.items()},
    )


def test_a_folder_is_all_that_names_a_model(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "acsft")
    cfg = sampling(folder)
    assert cfg.checkpointer["_component_"] == "steerlm2.checkpoints.HFCheckpointer"
    assert cfg.tokenizer == {"_component_": "steerlm2.data.hf_tokenizer", "path": folder}
    assert cfg.model == {"_component_": "steerlm2.models.from_checkpoint"}
    assert cfg.template == LLAMA3
    assert as_schema(cfg.schema) == SCHEMA


@pytest.mark.parametrize(
    "recipe", ["sft_distributed", "reward_distributed", "steerlm2_distributed", "chat"]
)
def test_another_family_is_refused_before_data_or_weights_are_read(
    tmp_path: Path, recipe: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    problem = f"{tmp_path}/config.json: model_type gemma3_text: only llama, mistral, qwen2, qwen3"
    with pytest.raises(ValueError, match=re.escape(problem)):
        config(recipe, checkpointer={"checkpoint_dir": str(tmp_path)})


def test_a_run_stands_for_its_export(tmp_path: Path) -> None:
    export = tmp_path / "epoch_1"
    checkpoint(export)
    (export / "model.safetensors").touch()
    assert sampling(str(tmp_path)).template == LLAMA3


def test_a_checkpoint_of_somebody_else_leaves_the_template_to_the_default(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base")
    (tmp_path / "base" / FACTS_FILE).unlink()
    assert sampling(folder).template == EXTRA_ID
    assert sampling(folder).schema is None


@pytest.mark.parametrize(
    ("tokens", "template"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "chatml_template"),
        (
            ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            "llama3_template",
        ),
        (["<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "<pad>"], "extra_id_template"),
        (["<|im_start|>"], "extra_id_template"),
    ],
    ids=["ChatML", "Llama 3", "published", "no template's"],
)
@pytest.mark.parametrize(
    "given",
    [{}, {"template": None}, {"template": {"_component_": None}}],
    ids=["left out", "null", "null on the command line"],
)
def test_a_folder_of_somebody_else_has_the_template_of_its_tokenizer(
    tmp_path: Path, tokens: list[str], template: str, given: dict[str, Any]
) -> None:
    """Those that no template fits are told so when they are loaded."""
    folder = checkpoint(tmp_path / "base")
    (tmp_path / "base" / FACTS_FILE).unlink()
    added = [{"id": i, "content": token} for i, token in enumerate(tokens)]
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert sampling(folder, **given).template == {"_component_": f"steerlm2.data.{template}"}
    assert sampling(folder, template=EXTRA_ID).template == EXTRA_ID


def test_a_checkpoint_that_is_still_to_be_trained_is_taken_as_it_will_be(tmp_path: Path) -> None:
    assert sampling(str(tmp_path / "later")).tokenizer["path"] == str(tmp_path / "later")


def test_a_server_s_model_is_known_by_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = {
        "_component_": "steerlm2.data.hf_tokenizer",
        "path": checkpoint(tmp_path / "acsft"),
    }
    model = {"_component_": "steerlm2.models.from_checkpoint"}
    server = {"url": "http://127.0.0.1:1"}
    cfg = sampling("", checkpointer=None, tokenizer=tokenizer, model=model, server=server)
    assert cfg.template == LLAMA3
    assert as_schema(cfg.schema) == SCHEMA


def test_the_same_template_may_be_given(tmp_path: Path) -> None:
    own = EXTRA_ID | {"control_tokens": {"<extra_id_0>": "<a>"}}
    folder = checkpoint(tmp_path / "acsft", template=own)
    assert sampling(folder, template=own).template == own


def test_code_that_a_checkpoint_names_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config names what is run, and a checkpoint is none. Who knows the code of a template names
    it in the config; then the two are compared, and it isn't run for that either."""
    monkeypatch.chdir(tmp_path)
    planted = {"_component_": "os.mkdir", "path": str(tmp_path / "ran")}
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})")
    for number, template in enumerate((planted, {"_component_": "evil.Template"})):
        folder = checkpoint(tmp_path / str(number), template=template)
        with pytest.raises(ValueError, match=r"what a checkpoint names isn't run: set 'template'"):
            sampling(folder)
        with pytest.raises(ValueError, match="'template' isn't the template"):
            sampling(folder, template=EXTRA_ID)
    assert sampling(str(tmp_path / "0"), template=planted).template == planted
    assert not (tmp_path / "ran").exists()


def test_another_template_is_refused_with_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'template' isn't the template .*llama3_template"):
        sampling(checkpoint(tmp_path / "acsft"), template=EXTRA_ID)


@pytest.mark.parametrize("names", [["formality", "length"], ["length"]])
def test_a_language_model_may_be_asked_for_a_part_of_its_schema(
    tmp_path: Path, names: list[str]
) -> None:
    schema = {name: list(SCHEMA.range_of(name)) for name in names}
    assert sampling(checkpoint(tmp_path / "acsft"), schema=schema).schema == schema


@pytest.mark.parametrize(
    "schema",
    [
        {"formality": [0, 10], "humor": [0, 4]},
        {"length": [1, 5], "formality": [0, 10]},
        {"formality": [0, 10], "length": [0, 5]},
        {"humor": [0, 4]},
    ],
    ids=["another attribute", "another order", "another range", "none of its attributes"],
)
def test_another_schema_is_refused(tmp_path: Path, schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'schema' isn't the one that the model"):
        sampling(checkpoint(tmp_path / "acsft"), schema=schema)


def test_an_attribute_model_scores_all_of_its_schema(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "reward", kind="attribute model")
    part = {"length": [1, 5]}
    with pytest.raises(ValueError, match="'schema' isn't the one that the model"):
        config(
            "annotate_attributes",
            input="in.jsonl",
            output="out.jsonl",
            checkpointer={"checkpoint_dir": folder},
            schema=part,
        )


def test_each_model_of_an_evaluation_has_its_own_template(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one")
    other = checkpoint(tmp_path / "other", template=EXTRA_ID)
    scorer = checkpoint(tmp_path / "reward", kind="attribute model", template=EXTRA_ID)
    cfg = config(
        "evaluate_steering",
        output_dir=str(tmp_path / "out"),
        prompts="prompts.jsonl",
        models={
            "one": {"checkpointer": {"checkpoint_dir": one}},
            "other": {"checkpointer": {"checkpoint_dir": other}},
        },
        attribute_model={"checkpointer": {"checkpoint_dir": scorer}},
    )
    assert cfg.models["one"].template == LLAMA3
    assert cfg.models["other"].template == EXTRA_ID
    assert cfg.attribute_model.template == EXTRA_ID
    assert cfg.models["other"].tokenizer["path"] == other
    assert as_schema(cfg.schema) == SCHEMA


def test_each_model_that_scores_has_its_own_template_and_tokenizer(tmp_path: Path) -> None:
    proposal = checkpoint(tmp_path / "acsft")
    plain = checkpoint(tmp_path / "sft", schema=None)
    scorer = checkpoint(tmp_path / "reward", kind="attribute model", template=EXTRA_ID)
    cfg = scoring(proposal, log_p_response=plain, log_p_attributes=scorer)
    assert (cfg.template, cfg.log_p_attributes.template) == (LLAMA3, EXTRA_ID)
    assert cfg.tokenizer["path"] == proposal
    assert cfg.log_p_response.tokenizer["path"] == plain
    assert cfg.log_p_attributes.tokenizer["path"] == scorer


def test_the_schema_of_scores_is_the_attribute_model_s(tmp_path: Path) -> None:
    labels = AttributeSchema.sharing(["length"], 1, 5)
    proposal = checkpoint(tmp_path / "acsft", schema=labels)
    scorer = checkpoint(tmp_path / "reward", kind="attribute model")
    cfg = scoring(proposal, log_p_attributes=scorer)
    assert as_schema(cfg.schema) == SCHEMA


def test_fine_tuning_goes_on_with_the_schema_of_its_start_unless_another_is_given(
    tmp_path: Path,
) -> None:
    folder = checkpoint(tmp_path / "acsft")
    other = {"names": ["humor"]}
    values = {
        "output_dir": str(tmp_path / "out"),
        "dataset": {"_component_": "steerlm2.datasets.dialogue_dataset", "source": "train.jsonl",
                    "max_seq_len": 8, "use_labels": True},
        "optimizer": {"_component_": "torch.optim.AdamW"},
        "lr": 1e-3,
        "max_steps": 1,
        "checkpointer": {"checkpoint_dir": folder},
    }  # fmt: skip
    assert as_schema(config("sft_distributed", **values).schema) == SCHEMA
    assert config("sft_distributed", **values, schema=other).schema == other
    reward = values | {
        "dataset": {"_component_": "steerlm2.datasets.attribute_dataset", "source": "train.jsonl",
                    "max_seq_len": 8}}  # fmt: skip
    assert config("reward_distributed", **reward).schema is None, "a fresh head has its own schema"


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"kind": "x", "template": LLAMA3})])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    folder = checkpoint(tmp_path / "acsft")
    (tmp_path / "acsft" / FACTS_FILE).write_text(text)
    with pytest.raises(ValueError, match=FACTS_FILE):
        sampling(folder)


def training(recipe: str, source: Path, **values: Any) -> Any:
    """Of a model that says nothing of itself."""
    component = f"steerlm2.datasets.{'attribute' if 'reward' in recipe else 'dialogue'}_dataset"
    dataset = {"_component_": component, "source": str(source), "max_seq_len": 64}
    return config(
        recipe,
        output_dir="run",
        optimizer={"_component_": "torch.optim.AdamW", "lr": 0.1},
        max_steps=1,
        dataset=dataset | values.pop("dataset", {}),
        **{"checkpointer": {"checkpoint_dir": "base"}} | values,
    )


def data_with(schema: AttributeSchema | None, folder: Path) -> Path:
    settings = {"schema": schema and schema_to_json(schema)}
    settings_file(folder / "train.jsonl").write_text(json.dumps(settings))
    return folder / "train.jsonl"


@pytest.mark.parametrize(
    ("recipe", "dataset"),
    [("reward_distributed", {}), ("sft_distributed", {"use_labels": True})],
)
def test_training_takes_the_schema_of_its_data(
    recipe: str, dataset: dict[str, Any], tmp_path: Path
) -> None:
    cfg = training(recipe, data_with(SCHEMA, tmp_path), dataset=dataset)
    assert as_schema(cfg.schema) == SCHEMA


def test_without_labels_the_schema_of_the_data_says_nothing(tmp_path: Path) -> None:
    source = data_with(SCHEMA, tmp_path)
    assert training("sft_distributed", source, dataset={"use_labels": False}).schema is None


def test_data_without_a_schema_of_their_own_say_nothing(tmp_path: Path) -> None:
    assert training("reward_distributed", data_with(None, tmp_path)).schema is None
    assert training("reward_distributed", tmp_path / "other.jsonl").schema is None


def test_a_checkpoints_schema_comes_before_that_of_the_data(tmp_path: Path) -> None:
    """Of the same ranges: it may have been trained on fewer attributes."""
    folder = checkpoint(tmp_path / "acsft", schema=SCHEMA.select(["length"]))
    cfg = training(
        "sft_distributed",
        data_with(SCHEMA, tmp_path),
        dataset={"use_labels": True},
        checkpointer={"checkpoint_dir": folder},
    )
    assert as_schema(cfg.schema) == SCHEMA.select(["length"])


@pytest.mark.parametrize("given", [{"formality": [0, 20]}, {"warmth": [0, 4]}])
def test_other_ranges_than_the_datas_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    source = data_with(SCHEMA, tmp_path)
    with pytest.raises(ValueError, match="were written with formality 0 to 10, length 1 to 5"):
        training("reward_distributed", source, schema=given)


def test_some_of_the_datas_attributes_can_be_chosen(tmp_path: Path) -> None:
    cfg = training("reward_distributed", data_with(SCHEMA, tmp_path), schema={"length": [1, 5]})
    assert as_schema(cfg.schema).names == ("length",)


def test_damaged_settings_of_data_are_named(tmp_path: Path) -> None:
    source = data_with(SCHEMA, tmp_path)
    settings_file(source).write_text("{")
    with pytest.raises(ValueError, match=r"train.jsonl.settings.json is damaged"):
        training("reward_distributed", source)
