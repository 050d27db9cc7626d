"""Every ready-made config: it is known, it fits its recipe, and what it names exists."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from torchtune.modules import TransformerDecoder

from steerlm2._tune import RECIPES, SINGLE_PROCESS_RECIPES
from steerlm2.config.keys import DistributedKeys, ModelKeys
from steerlm2.config.loader import instantiate, load_config
from steerlm2.models.decoders import tensor_parallel_problems, unsupported_parts

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path.relative_to(ROOT / "recipe_configs").with_suffix("").as_posix()
    for path in (ROOT / "recipe_configs").rglob("*.yaml")
)
RECIPE_OF = {config: recipe for recipe, configs in RECIPES.items() for config in configs}
CONFIG_CLASSES = {
    "annotate_attributes": "AnnotateConfig",
    "chat": "ChatConfig",
    "evaluate_steering": "EvaluateConfig",
    "plan_memory": "PlanConfig",
    "prepare_data": "PrepareDataConfig",
    "reward_distributed": "RewardConfig",
    "sample_responses": "SampleConfig",
    "score_responses": "ScoreConfig",
    "serve_reward": "ServeConfig",
    "serve_steerlm": "ServeConfig",
    "sft_distributed": "SFTConfig",
    "steerlm2_distributed": "SteerLM2Config",
    "steerlm2_pipeline": "PipelineConfig",
}
WITH_MODEL = [
    name
    for name in CONFIGS
    if "\nmodel:" in (ROOT / "recipe_configs" / f"{name}.yaml").read_text()
    and RECIPE_OF[name] != "steerlm2_pipeline"
]
DISTRIBUTED = [name for name in WITH_MODEL if RECIPE_OF.get(name) not in SINGLE_PROCESS_RECIPES]

EXTRA_ID = "extra_id_template"

each_config = pytest.mark.parametrize("name", CONFIGS)
each_model = pytest.mark.parametrize("name", WITH_MODEL)
each_distributed = pytest.mark.parametrize("name", DISTRIBUTED)


def config_class(recipe: str) -> type:
    return getattr(importlib.import_module(recipe), CONFIG_CLASSES[recipe])


def text_of(name: str) -> str:
    return (ROOT / "recipe_configs" / f"{name}.yaml").read_text()


@functools.cache
def values_of(name: str) -> DictConfig:
    """The YAML, with some text for the keys that the command line must give; it isn't changed."""
    plain = OmegaConf.to_container(OmegaConf.create(text_of(name)), resolve=False)
    return OmegaConf.create(_filled(plain))


def _filled(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _filled(item, str(name)) for name, item in value.items()}
    return f"a_value_for_{key}" if value == MISSING else value


def loaded(name: str, *overrides: str) -> Any:
    values = OmegaConf.merge(values_of(name), OmegaConf.from_dotlist(list(overrides)))
    return load_config(config_class(RECIPE_OF[name]), typing.cast(DictConfig, values))


@functools.cache
def model_of(name: str) -> TransformerDecoder:
    """The config's model without memory for its weights.

    Its linear layers as they would be without NF4, which takes torchao a minute at 70B.
    """
    model = dict(loaded(name).model)
    model["_component_"] = model["_component_"].replace(".qlora_", ".lora_")
    with torch.device("meta"):
        return instantiate(model)


def commands_in_header(name: str) -> list[list[str]]:
    """The words of every `tune run` command in the comment that the YAML begins with."""
    header = text_of(name).split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    joined = re.sub(r"\\\n#\s*", "", header)
    return [shlex.split(line) for line in re.findall(r"^#\s+(tune run .*)$", joined, re.MULTILINE)]


def option(command: list[str], flag: str, default: int) -> int:
    return int(command[command.index(flag) + 1]) if flag in command else default


@each_config
def test_config_fits_its_recipe(name: str) -> None:
    """No unknown, missing or mistyped key, here and inside components, which can be imported."""
    loaded(name)


@each_config
def test_no_config_reads_the_regression_format(name: str) -> None:
    """In its files contents could spell a turn."""
    assert "_reg.jsonl" not in re.sub("(?m)^#.*", "", text_of(name))


@each_config
def test_components_in_comments_exist(name: str) -> None:
    """A user uncomments them. The dotpaths that aren't comments are checked by the same look-up."""
    for dotpath in re.findall(r"_component_: ([a-z][\w.]*)", text_of(name)):
        module, _, attribute = dotpath.rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute))


@each_config
def test_header_says_how_to_start_it(name: str) -> None:
    """Each command of the header names this config and its recipe, and overrides known keys."""
    commands = commands_in_header(name)
    assert commands
    for command in commands:
        at = command.index("--config")
        assert command[at - 1 : at + 2] == [RECIPE_OF[name], "--config", name]
        loaded(name, *command[at + 2 :])


@each_distributed
def test_processes_of_the_header_fit_the_parallel_dims(name: str) -> None:
    """nnodes x nproc_per_node is a multiple of tensor parallel x replicas."""
    for command in commands_in_header(name):
        cfg = loaded(name, *command[command.index("--config") + 2 :])
        processes = option(command, "--nnodes", 1) * option(command, "--nproc_per_node", 1)
        assert processes % (cfg.tensor_parallel_dim * cfg.data_parallel_replicate_dim) == 0


@each_model
def test_model_is_supported(name: str) -> None:
    """Built without memory, at its real size: 70B too."""
    assert list(unsupported_parts(model_of(name))) == []


@each_distributed
def test_model_can_be_split_to_its_tensor_parallel_degree(name: str) -> None:
    tensor_parallel_dim = loaded(name).tensor_parallel_dim
    assert list(tensor_parallel_problems(model_of(name), tensor_parallel_dim)) == []


@pytest.mark.parametrize(
    ("size", "billions"),
    [("1B", 1.24), ("3B", 3.21), ("7B", 7.62), ("8B", 8), ("13B", 13), ("70B", 70)],
)
def test_models_have_the_size_of_their_name(size: str, billions: float) -> None:
    """1.24e9 (Llama 3.2 1B), 3.21e9 (3B), 7.62e9 (Qwen2.5 7B), 8.03e9 (Llama 3.1 8B), 69.0e9 (Llama
    2 70B) and 70.6e9: without adapters, within 2%."""
    names = [name for name in WITH_MODEL if f"/{size}_" in name]
    assert names
    for name in names:
        base = (p for n, p in model_of(name).named_parameters() if "lora_" not in n)
        assert sum(p.numel() for p in base) == pytest.approx(billions * 1e9, rel=0.02)


RUN_MODELS = sorted({RECIPE_OF[name] for name in WITH_MODEL})
DIFFERENT_KEYS = {"data", "loss", "export", "attribute_model"}
"""What attribute models and SteerLM 2.0 are trained on, and with, has a section of its own; and
SteerLM 2.0 exports its last weights where the others export their best. evaluate_steering can also
ask a server for scores."""


def fields_of(section: type) -> dict[str, tuple[Any, Any]]:
    """Key -> type and default."""
    hints = typing.get_type_hints(section)
    return {
        field.name: (
            hints[field.name],
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory(),
        )
        for field in dataclasses.fields(section)
    }


@pytest.mark.parametrize("recipe", RUN_MODELS)
def test_recipes_that_run_models_inherit_the_shared_keys(recipe: str) -> None:
    """tokenizer=, device=, ..., and those of layouts where there may be several processes."""
    shared = ModelKeys if recipe in SINGLE_PROCESS_RECIPES else DistributedKeys
    assert issubclass(config_class(recipe), shared)


def test_a_key_means_the_same_in_all_recipes_that_run_models() -> None:
    """Inherited or not: device=, max_seq_len=, schema=, ... have one type and one default."""
    meanings: dict[str, list[tuple[Any, Any]]] = {}
    for recipe in RUN_MODELS:
        for key, meaning in fields_of(config_class(recipe)).items():
            known = meanings.setdefault(key, [])
            if meaning not in known:
                known.append(meaning)
    assert {key for key, known in meanings.items() if len(known) > 1} <= DIFFERENT_KEYS


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tiny/sft", "tiny/acsft"),
        ("tiny/acsft", "tiny/steerlm2"),
        ("llama2/70B_acsft_multinode", "llama2/70B_steerlm2_multinode"),
        ("llama3/70B_sft_multinode", "llama3/70B_acsft_multinode"),
        ("llama3/70B_reward_multinode", "llama3/70B_acsft_multinode"),
        ("llama3_1/8B_acsft", "llama3_1/8B_steerlm2"),
        ("llama3_1/8B_acsft_lora", "llama3_1/8B_steerlm2_lora"),
        ("llama3_2/1B_acsft", "llama3_2/1B_steerlm2"),
        ("llama3_2/3B_acsft", "llama3_2/3B_steerlm2"),
        ("qwen2_5/7B_acsft", "qwen2_5/7B_steerlm2"),
    ],
)
def test_models_of_one_pipeline_have_one_template(first: str, second: str) -> None:
    """P(y|x), Q'(y|a,x) and what is trained from it see the same tokens."""
    one, other = loaded(first), loaded(second)
    assert (one.model, one.template) == (other.model, other.template)
    assert one.tokenizer["_component_"] == other.tokenizer["_component_"]


def test_every_family_has_its_template() -> None:
    """Llama 3's own headers for all that have them, ChatML for Qwen, the published format else."""
    wanted = {"llama3": "llama3_template", "qwen": "chatml_template"}
    for name in WITH_MODEL:
        template = loaded(name).template["_component_"]
        expected = next((t for key, t in wanted.items() if name.startswith(key)), EXTRA_ID)
        assert template == f"steerlm2.data.{expected}", name


GPT_SFT = {"betas": [0.9, 0.98], "weight_decay": 0.01, "clip_grad_norm": 1.0}
"""NeMo-Aligner, examples/nlp/gpt/conf/gpt_sft.yaml; its guides for SteerLM start from it."""
TRAINING_RM = {"betas": [0.9, 0.98], "weight_decay": 0.1, "clip_grad_norm": 1.0, "seed": 1234}
"""NeMo-Aligner, examples/nlp/gpt/conf/training_rm.yaml, with constant_steps=0 of the guide."""
GUIDE_ACSFT = GPT_SFT | {
    "lr": 6e-6,
    "min_lr": 5e-6,
    "warmup_steps": 1,
    "constant_steps": 200,
    "max_steps": 800,
    "global_batch_size": 128,
    "max_seq_len": 4096,
}
"""NeMo-Aligner, docs/user-guide/steerlm.rst, step 5; steerlm2.rst trains with the same numbers."""
GUIDE_RM_70B = TRAINING_RM | {"lr": 2e-6, "min_lr": 2e-6, "warmup_steps": 10, "max_steps": 317}
"""The same, step 3, HelpSteer2 and the first stage of HelpSteer2-Preference."""
PAPER = (
    GPT_SFT
    | {"lr": 1e-7, "min_lr": 1e-7, "warmup_steps": 0, "epochs": 2}
    | {"global_batch_size": 128}
)
"""HelpSteer2 paper, arXiv 2406.08673, section 4.5 and appendix; it gives none of GPT_SFT's."""
LORA = {"lora_rank": 8, "lora_alpha": 16}
"""torchtune 0.6.1, llama3_1/8B_lora."""

LORA_64 = {
    "lora_rank": 64,
    "lora_alpha": 128,
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
}
"""torchtune 0.6.1, llama3_2/1B_lora and 3B_lora."""
LORA_STEPS = {"lr": 3e-4, "warmup_steps": 100, "weight_decay": 0.01}
"""torchtune 0.6.1, llama3_2/1B_lora, 3B_lora and qwen2_5/7B_lora."""
SMALL_REWARD = LORA_STEPS | {"betas": [0.9, 0.98], "global_batch_size": 128, "max_steps": 317}
SMALL_ACSFT = GPT_SFT | LORA_STEPS | {"global_batch_size": 128}
SMALL_STEERLM2 = {"global_batch_size": 128, "epochs": 2}

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama3_2/1B_reward": SMALL_REWARD | LORA_64,
    "llama3_2/1B_acsft": SMALL_ACSFT | LORA_64,
    "llama3_2/1B_steerlm2": SMALL_STEERLM2 | LORA_64,
    "llama3_2/3B_reward": SMALL_REWARD | LORA_64,
    "llama3_2/3B_acsft": SMALL_ACSFT | LORA_64,
    "llama3_2/3B_steerlm2": SMALL_STEERLM2 | LORA_64,
    "qwen2_5/7B_reward": SMALL_REWARD | LORA,
    "qwen2_5/7B_acsft": SMALL_ACSFT | LORA,
    "qwen2_5/7B_steerlm2": SMALL_STEERLM2 | LORA,
    "any/steerlm2": PAPER,
    "llama2/13B_reward": TRAINING_RM  # step 3; it validates and saves every 10 steps on 32 nodes
    | {"lr": 9e-6, "min_lr": 9e-7, "warmup_steps": 10, "max_steps": 800, "global_batch_size": 512},
    "llama2/70B_acsft_multinode": GUIDE_ACSFT
    | {"nodes": 32, "tensor_parallel_dim": 8, "limit_val_batches": 40, "export": "last"}
    | {"train_on_input": False, "use_labels": True},
    "llama2/70B_steerlm2_multinode": GUIDE_ACSFT
    | {"nodes": 32, "tensor_parallel_dim": 8, "limit_val_batches": 40, "val_every_n_steps": 800}
    | {"micro_batch_size": 2, "forward_micro_batch_size": 2},
    "llama3/70B_acsft_multinode": GUIDE_ACSFT | {"limit_val_batches": 40, "use_labels": True},
    "llama3/70B_reward_multinode": GUIDE_RM_70B
    | {"global_batch_size": 128, "val_every_n_steps": 10, "save_every_n_steps": 10, "nodes": 8},
    "llama3/70B_sft_multinode": GPT_SFT  # HelpSteer2 paper, section 4.2
    | {"lr": 2e-6, "min_lr": 2e-6, "max_steps": 1600, "global_batch_size": 384}
    | {"warmup_steps": 10, "use_labels": False},
    "llama3_1/70B_reward_helpfulness_multinode": GUIDE_RM_70B
    | {"global_batch_size": 128, "val_every_n_steps": 10, "save_every_n_steps": 10, "nodes": 8},
    "llama3_1/70B_reward_scaled_bt_multinode": TRAINING_RM  # step 3, second stage: 64 pairs
    | {"lr": 1e-6, "min_lr": 1e-6, "warmup_steps": 10, "max_steps": 105, "global_batch_size": 64}
    | {"val_every_n_steps": 10, "save_every_n_steps": 10, "nodes": 4, "load_reward_head": True},
    "llama3_1/70B_sample_responses_vllm": {"n": 10, "temperature": 0.7, "top_p": 0.9},
    "llama3_1/70B_steerlm2_multinode": PAPER,
    "llama3_1/70B_steerlm2_qlora": GPT_SFT
    | {"global_batch_size": 128, "epochs": 2}
    | {"lora_rank": 16, "lora_alpha": 32},  # torchtune 0.6.1, llama3_1/70B_lora
    "llama3_1/8B_acsft": GUIDE_ACSFT,
    "llama3_1/8B_acsft_lora": GPT_SFT
    | LORA
    | {"lr": 3e-4, "warmup_steps": 100, "global_batch_size": 128},
    "llama3_1/8B_reward": GUIDE_RM_70B | {"global_batch_size": 128},
    "llama3_1/8B_sample_responses": {"n": 10, "temperature": 0.7, "top_p": 0.9},
    "llama3_1/8B_steerlm2": PAPER,
    "llama3_1/8B_steerlm2_lora": GPT_SFT | LORA | {"global_batch_size": 128, "epochs": 2},
    "llama3_3/70B_steerlm2_multinode": PAPER,
}
"""The numbers that each source gives, and configs take. What a config has otherwise, its header
says."""


def has_published_numbers(name: str) -> bool:
    header = text_of(name).split("\n\n")[0]
    numbers = header.partition("# Numbers:")[2]
    return "NeMo-Aligner" in numbers or "paper" in numbers


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    cfg = loaded(name)
    sections = [getattr(cfg, key, {}) for key in ("optimizer", "lr_scheduler", "dataset", "model")]
    given: dict[str, Any] = {"nodes": option(commands_in_header(name)[0], "--nnodes", 1)}
    for section in (*sections, vars(getattr(cfg, "steerlm2", None) or cfg), vars(cfg)):
        given |= section
    assert {key: given[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_every_config_that_names_a_source_is_compared_with_it() -> None:
    assert set(filter(has_published_numbers, CONFIGS)) <= set(PUBLISHED)


@pytest.mark.parametrize(
    ("training", "scoring"),
    [
        ("tiny/steerlm2", "tiny/score_responses"),
        ("llama3_1/8B_steerlm2", "llama3_1/8B_score_responses"),
        ("llama3_1/70B_steerlm2_multinode", "llama3_1/70B_score_responses_multinode"),
    ],
)
def test_scoring_config_has_the_start_model_of_training(training: str, scoring: str) -> None:
    """Otherwise the drift check of training would fail on what scoring wrote."""
    wanted, given = loaded(training), loaded(scoring)
    for key in ("model", "tokenizer", "template"):
        assert getattr(given, key) == getattr(wanted, key)
    if wanted.checkpointer is None:
        assert (given.checkpointer, given.seed) == (None, wanted.seed)
    else:
        assert given.checkpointer["checkpoint_dir"] == wanted.checkpointer["checkpoint_dir"]
