"""The chain of commands with any/*: each finds what those before it wrote; little is to be said."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import OmegaConf

from ready_made import recipe_config
from steerlm2._tune import RECIPES
from steerlm2.config.keys import check_checkpoints

ROOT = Path(__file__).resolve().parents[2]
CHAIN = [
    *(("prepare_data", "data/chat"), ("reward_distributed", "any/reward")),
    *(("annotate_attributes", "any/annotate_attributes"), ("sft_distributed", "any/sft")),
    *(("sft_distributed", "any/acsft"), ("sample_responses", "any/sample_responses")),
    *(("score_responses", "any/score_responses"), ("steerlm2_distributed", "any/steerlm2")),
    ("evaluate_steering", "any/evaluate_steering"),
]
USE = [(name, f"any/{name}") for name in ("chat", "serve_steerlm", "serve_reward")]


def texts(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [text for item in items for text in texts(item)]
    return [value] if isinstance(value, str) else []


def paths(config: str) -> tuple[set[str], set[str]]:
    """What a config reads and writes in `outputs`."""
    values = OmegaConf.load(ROOT / "recipe_configs" / f"{config}.yaml")
    OmegaConf.update(values, "outputs", "OUTPUTS")
    OmegaConf.resolve(values)
    plain = cast(dict[str, Any], OmegaConf.to_container(values))
    del plain["outputs"]
    written = {str(plain.pop(key)) for key in ("output", "output_dir") if key in plain}
    return {text for text in texts(plain) if text.startswith("OUTPUTS")}, written


def test_readme_says_at_most_twenty_five_keys() -> None:
    """Nine commands, of which the eight up to SteerLM 2.0 have five keys."""
    text = (ROOT / "README.md").read_text().partition("By hand,")[2].partition("\n## ")[0]
    joined = text.replace("\\\n", " ")
    commands = [shlex.split(line) for line in re.findall(r"^tune run (.*)$", joined, re.MULTILINE)]
    assert [(command[0], command[2]) for command in commands] == CHAIN
    keys = [word for command in commands for word in command[3:]]
    assert len(keys) == 5 <= 25


def test_each_config_reads_what_those_before_it_write() -> None:
    there: set[str] = set()
    for _, config in [*CHAIN, *USE]:
        read, written = paths(config)
        lacking = {path for path in read if not any(Path(path).is_relative_to(w) for w in there)}
        assert lacking == set(), config
        assert written.isdisjoint(there), config
        assert all(path.startswith("OUTPUTS/") for path in written), config
        there |= written


MODEL = "checkpointer.checkpoint_dir=base"


def test_all_of_any_is_in_the_chain() -> None:
    configs = {config for each in RECIPES.values() for config in each if config.startswith("any/")}
    assert configs == {config for _, config in [*CHAIN, *USE]} - {"data/chat"}


def test_data_of_another_folder_are_one_key() -> None:
    cfg = recipe_config("sft_distributed", "any/sft", MODEL, "data.dir=oasst")
    assert (cfg.dataset["source"], cfg.dataset_val["source"]) == (
        "oasst/train.jsonl",
        "oasst/val.jsonl",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("any/sft", "dataset.source=oasst/train.jsonl"),  # validated on other data
        ("any/sft", "dataset_val.source=oasst/val.jsonl"),
        ("any/sft", "data.dir=oasst", "dataset.source=a/t.jsonl", "dataset_val.source=a/v.jsonl"),
        ("llama3_1/8B_acsft", "data.dir=oasst"),  # which has paths of its own
    ],
)
def test_data_folder_and_files_agree(arguments: tuple[str, ...]) -> None:
    config, *more = arguments
    with pytest.raises(ValueError, match=r"'data.dir' is .*, but not the folder of"):
        recipe_config("sft_distributed", config, MODEL, *more)


@pytest.mark.parametrize(
    "more",
    [
        ("dataset.source=a/t.jsonl", "dataset_val.source=b/v.jsonl"),
        ("dataset.source=a/t.jsonl", "dataset_val=null", "val_every_n_steps=null"),
        ("data.dir=null", "dataset.source=a/t.jsonl", "dataset_val.source=b/v.jsonl"),
        ("outputs=qwen",),
        ("outputs=qwen/",),
        ("outputs=.",),
    ],
)
def test_files_can_be_named_instead_of_a_folder(more: tuple[str, ...]) -> None:
    cfg = recipe_config("sft_distributed", "any/sft", MODEL, *more)
    if "qwen" in more[0]:
        assert Path(cfg.dataset["source"]) == Path("qwen/data/train.jsonl")


@pytest.mark.parametrize(
    ("recipe", "config", "more"),
    [
        ("sft_distributed", "llama3_1/8B_acsft", ()),
        ("chat", "tiny/chat", ()),
        ("prepare_data", "data/oasst", ("output_dir=data",)),
    ],
)
def test_outputs_of_a_config_that_has_other_paths_is_refused(
    recipe: str, config: str, more: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"'outputs' is qwen, but no path"):
        recipe_config(recipe, config, "outputs=qwen", *more)


def test_models_that_are_not_there_are_named_together(tmp_path: Path) -> None:
    """Before anything else is looked at, which would fail for want of what they say."""
    cfg = recipe_config("score_responses", "any/score_responses", f"outputs={tmp_path}")
    with pytest.raises(FileNotFoundError) as error:
        check_checkpoints(cfg)
    lines = str(error.value).splitlines()
    assert [line.split(" has no ")[0] for line in lines] == [
        str(tmp_path / name) for name in ("acsft", "sft", "reward")
    ]
    assert "log_p_response.checkpointer.checkpoint_dir must be" in lines[1]


def test_a_servers_model_may_be_elsewhere() -> None:
    tokenizer = ("tokenizer._component_=steerlm2.data.hf_tokenizer", "tokenizer.path=base")
    more = ("server.url=http://here:1", *tokenizer, "outputs=qwen")
    check_checkpoints(recipe_config("sample_responses", "any/sample_responses", *more))
