"""plan_memory as a user meets it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, cast

import pytest

import plan_memory
from ready_made import recipe_config

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """`plan("tiny/sft", "world_size=2")` is what it writes, without a process of its own."""

    def run(config: str, *overrides: str) -> Json:
        output = tmp_path / "plan.json"
        cfg = recipe_config("plan_memory", config, *overrides, f"output={output}")
        plan_memory.PlanRecipe(cfg).run()
        return cast(Json, json.loads(output.read_text()))

    return run


def test_from_the_command_line(tune_command: Any, tmp_path: Path) -> None:
    """One process, no weights, no GPU; the file has the documented keys."""
    output = tmp_path / "plan.json"
    run = tune_command(
        *("plan_memory", "--config", "llama3_1/8B_steerlm2", "world_size=8", "gpu=H100"),
        *("model.planned_as=torchtune.models.llama3_2.llama3_2_1b", f"output={output}"),
    )
    plan = json.loads(output.read_text())
    assert plan.keys() >= {"per_gpu_gib", "fits", "step_seconds", "gpu_hours", "collectives"}
    parts = {kind: gib for kind, gib in plan["per_gpu_gib"].items() if kind != "total"}
    assert sum(parts.values()) == pytest.approx(plan["per_gpu_gib"]["total"])
    assert plan["fits"]
    # 1.24e9 weights in float32 over 8 GPUs; AdamW keeps twice as much
    assert parts["gradients"] == pytest.approx(1.236e9 * 4 / 8 / 2**30, rel=0.01)
    assert parts["optimizer"] == pytest.approx(2 * parts["gradients"], rel=0.01)
    assert "fits" in run.stdout
    assert "is no checkpoint yet: planned as torchtune.models.llama3_2.llama3_2_1b" in run.stdout
    assert "1184 H100 node-hours" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny/sft", "world_size=2", "gpu=H1000"), "unknown gpu 'H1000'"),
        (("tiny/score_responses", "world_size=2"), "is a config of score_responses"),
        (("tiny/sft", "world_size=3", "tensor_parallel_dim=2"), r"3 process\(es\) can't form"),
        (("tiny/sft",), "'world_size' is missing"),
        (("tiny/sft", "world_size=2", "worldsize=2"), "unknown key 'worldsize'"),
        (("tiny/sft", "world_size=2", "efficiency=45"), "at most 1"),
    ],
    ids=["gpu", "other recipe", "not divisible", "no world size", "unknown key", "efficiency"],
)
def test_mistakes(
    plan: Any,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    path = ROOT / "recipe_configs" / f"{arguments[0]}.yaml"
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", "--config", str(path)])
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("tiny/steerlm2", "steerlm2_distributed"),
        ("tiny/sft", "sft_distributed"),
        ("tiny/reward", "reward_distributed"),
    ],
)
def test_a_copied_config_tells_its_recipe_by_its_keys(
    plan: Any, config: str, expected: str
) -> None:
    """`--config my.yaml`: no ready-made name to go by."""
    assert plan(config, "world_size=2")["recipe"] == expected


def test_the_suggested_change_makes_it_fit(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """On a card with nine tenths of what the run needs."""
    given = ("tiny/sft", "world_size=2", "runtime_gib=0", "model.num_layers=6")
    needed = plan(*given)["per_gpu_gib"]["total"]
    card = (*given, f"gpu_gib={0.9 * needed}")
    found = plan(*card)
    assert not found["fits"]
    assert "DOES NOT FIT" in capsys.readouterr().out
    suggestion = found["suggestion"]
    changed = plan(*card, *suggestion["overrides"])
    assert changed["fits"]
    assert changed["per_gpu_gib"]["total"] == pytest.approx(suggestion["per_gpu_gib"]["total"])


def test_a_card_too_small_for_the_state_is_not_helped_by_smaller_rows(
    plan: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the shards alone are too much, only what makes them less is tried."""
    given = ("tiny/sft", "world_size=2", "runtime_gib=0")
    gib = plan(*given)["per_gpu_gib"]
    state = gib["parameters"] + gib["gradients"] + gib["optimizer"]
    plan(*given, f"gpu_gib={0.95 * state}")
    tried = [x for x in capsys.readouterr().out.splitlines() if x.startswith("trying")]
    assert tried
    assert not any("microbatch" in line or "checkpointing" in line for line in tried)


def test_offloaded_state_is_on_the_host(plan: Any) -> None:
    given = ("tiny/sft", "world_size=2", "device=cuda")
    kept, offloaded = plan(*given), plan(*given, "fsdp_cpu_offload=true")
    state = sum(kept["per_gpu_gib"][kind] for kind in ("parameters", "gradients", "optimizer"))
    assert offloaded["host_gib_per_gpu"] == pytest.approx(state, rel=0.01)
    assert offloaded["per_gpu_gib"]["optimizer"] == 0


def test_hours_of_the_job(plan: Any) -> None:
    """640 records in steps of 32, 3 epochs: 60 steps; max_steps ends it earlier."""
    given = ("tiny/sft", "world_size=2", "prompts=640", "epochs=3", "max_steps=null")
    found = plan(*given)
    assert found["steps"] == 60
    assert found["gpu_hours"] == pytest.approx(60 * found["step_seconds"] * 2 / 3600)
    assert plan(*given[:-1], "max_steps=7")["steps"] == 7


CONFIGS = ROOT / "recipe_configs"
STATED = re.compile(r"(\d+\.\d)\s+(?:# )?GiB\s+(?:# )?with\s+(?:# )?activations")
CARDS = {"24 GB": "RTX4090", "24\n# GB": "RTX4090", "40 GB": "A100-40GB"}
EVERY_PLAN = "STEERLM2_EVERY_PLAN"
"""With it in the environment the large ones are planned too, which takes minutes."""


def stating() -> list[Any]:
    """The configs whose headers say how much memory they take, but not as whole nodes."""
    texts = {
        str(file.relative_to(CONFIGS))[:-5]: file.read_text() for file in CONFIGS.rglob("*.yaml")
    }
    found = {name: text for name, text in texts.items() if STATED.search(text)}
    skip = pytest.mark.skipif(EVERY_PLAN not in os.environ, reason=f"{EVERY_PLAN}=1 plans it")
    return [
        pytest.param(name, text, marks=() if name == "llama3_2/1B_steerlm2" else skip, id=name)
        for name, text in sorted(found.items())
    ]


@pytest.mark.parametrize(("name", "text"), stating())
def test_headers_have_the_planned_memory(name: str, text: str, plan: Any) -> None:
    """And it fits on the card that they name."""
    match = STATED.search(text)
    assert match is not None
    card = next(card for words, card in CARDS.items() if words in text)
    planned = plan(name, "world_size=1", f"gpu={card}", "suggest=false")
    assert planned["per_gpu_gib"]["total"] == pytest.approx(float(match[1]), abs=0.06)
    assert planned["fits"]
