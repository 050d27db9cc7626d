"""The other recipes on the GPU: sampling, scoring, evaluation, and the pipeline of all."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from checking import (
    CONTEXT,
    ROOT,
    check,
    expect,
    folder,
    largest_difference,
    note,
    on_gpu,
    start_tune,
    tune,
)

LOG_Q = "log(Q(y|a,x))"


@check(330)
def quickstart() -> None:
    """tiny/quickstart on the GPU with a tenth of its steps; then the same command again, which must
    find everything done. A rehearsal only makes the pipeline check its stages' commands."""
    file = shortened_quickstart(shorter=10)
    started = time.perf_counter()
    if not on_gpu():
        planned = tune("steerlm2_pipeline", str(file), "dry_run=true")
        note(stages=planned.count("tune run"))
        expect(CONTEXT.figures["stages"] >= 10, "not all stages are planned")
        return
    pipeline = start_tune("steerlm2_pipeline", str(file))
    logs = folder() / "run" / "logs"
    while pipeline.poll() is None:
        note(stages=" ".join(log.stem for log in sorted(logs.glob("*.log"), key=os.path.getmtime)))
        time.sleep(1)
    for log in sorted(logs.glob("*.log"), key=os.path.getmtime)[-2:]:
        print(f"---- {log.name}\n{log.read_text()[-2500:]}", flush=True)
    pipeline.output()
    note(seconds=time.perf_counter() - started)
    started = time.perf_counter()
    tune("steerlm2_pipeline", str(file))
    note(seconds_again=time.perf_counter() - started)
    summary = json.loads((folder() / "run" / "summary.json").read_text())
    note(summary=json.dumps(summary)[:1500])


def shortened_quickstart(shorter: int) -> Path:
    """A copy of tiny/quickstart with fewer steps and data, one iteration, on the check's device."""
    import yaml

    config = yaml.safe_load((ROOT / "recipe_configs/tiny/quickstart.yaml").read_text())
    config["output_dir"] = str(folder() / "run")
    config["iterations"] = 1
    for name, stage in config["stages"].items():
        overrides = stage["overrides"]
        if name == "data":
            overrides["builder"]["num"] //= shorter
        if stage["recipe"] == "prepare_data":
            continue
        overrides["device"] = CONTEXT.device
        for key in ("max_steps", "val_every_n_steps"):
            if overrides.get(key):
                overrides[key] = max(overrides[key] // shorter, 20)
    config["stages"]["sample"]["overrides"]["max_prompts"] = 200 // shorter
    config["stages"]["evaluate"]["overrides"]["max_prompts"] = 60 // shorter
    file = folder() / "quickstart.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


@check(150, needs=["cpu_reference"])
def sample_score_evaluate() -> None:
    """sample_responses, score_responses and evaluate_steering on the GPU: the answers and log-probs
    of the CPU; the first two in bf16 as well."""
    model = folder("cpu_reference") / "run"
    here = folder()
    hf = "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer"
    weights = (hf, f"checkpointer.checkpoint_dir={model}")
    tune("prepare_data", "data/grammar_prompts", f"output_dir={here}/prompts")
    # Few tokens: the model has learned little, and of more bytes few texts would be valid UTF-8.
    prompts, n, new = (24, 16, 4) if on_gpu() else (4, 8, 3)
    sampling = (f"max_prompts={prompts}", f"n={n}", f"max_new_tokens={new}", "keep_truncated=true")

    def lines(file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (here / file).read_text().splitlines()]

    def responses(file: str) -> list[dict[str, Any]]:
        return [r | {"prompt": i} for i, line in enumerate(lines(file)) for r in line["responses"]]

    ours = f"device={CONTEXT.device}"
    ways = {"cpu": ("device=cpu",), "ours": (ours,), "bf16": (ours, "dtype=bf16")}
    started = time.perf_counter()
    asked = f"input={here}/prompts/train.jsonl"
    samplers = [
        start_tune(
            *("sample_responses", "tiny/sample_responses", *weights, *sampling),
            *(asked, f"output={here}/{name}.jsonl", *where),
        )
        for name, where in ways.items()
    ]
    models = (f"models.m.{hf}", f"models.m.checkpointer.checkpoint_dir={model}")
    evaluation = start_tune(
        *("evaluate_steering", "tiny/evaluate_steering", *models, ours),
        *(f"max_prompts={prompts // 2}", "n=2", f"max_new_tokens={new}"),
        *(f"prompts={here}/prompts/val.jsonl", f"output_dir={here}/steering"),
    )
    for sampler in samplers:
        sampler.output()
    note(sample_seconds=time.perf_counter() - started)
    texts = [{(r["prompt"], r["value"]) for r in responses(f"{n}.jsonl")} for n in ("cpu", "ours")]
    note(same_answers=len(texts[0] & texts[1]) / max(len(texts[0] | texts[1]), 1))
    scorers = [
        start_tune(
            *("score_responses", "tiny/score_responses", *weights, f"input={here}/cpu.jsonl"),
            *(f"output={here}/scored_{name}.jsonl", *where),
        )
        for name, where in ways.items()
    ]
    for scorer in scorers:
        scorer.output()
    scores = {name: [r[LOG_Q] for r in responses(f"scored_{name}.jsonl")] for name in ways}
    note(responses=len(scores["cpu"]))
    note(log_q_difference=largest_difference(scores["ours"], scores["cpu"]))
    note(log_q_difference_bf16=largest_difference(scores["bf16"], scores["cpu"]))
    evaluation.output()
    note(seconds=time.perf_counter() - started)
    expect(CONTEXT.figures["same_answers"] >= 0.9, "the GPU samples other answers than the CPU")
    expect(CONTEXT.figures["log_q_difference"] <= 1e-4, "log Q' differs from the CPU's")
    expect(CONTEXT.figures["log_q_difference_bf16"] <= 0.05, "bf16's log Q' differs")
