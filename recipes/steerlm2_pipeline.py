"""The whole of SteerLM 2.0 in one command: every stage a `tune run` of its own recipe.

    tune run steerlm2_pipeline --config tiny/quickstart
    tune run steerlm2_pipeline --config llama3_1/70B_pipeline dry_run=true

    prepare -> reward -> annotate -> SFT -> AC-SFT -> [sample -> score -> steerlm2] x iterations
            -> evaluate

The config names the stages, their recipes and configs, and what of these configs is set otherwise.
In iteration k the answers are sampled from the model of iteration k-1, the first ones from the
attribute-conditioned model.

A stage writes into output_dir/STAGE, and what it prints into output_dir/logs/STAGE.log. A rerun
skips what is complete; a stage that was stopped goes on; one whose config or input has changed is
done again, and its earlier folder goes to output_dir/earlier. `only=` and `from=` choose stages,
`dry_run=true` prints the commands, one a line, that a rerun would run.

SIGUSR1 says that the running stage is being stopped (recipes/launch/pipeline.sbatch sends it): its
end is waited for, it isn't taken for complete, and no other stage begins.

At the end output_dir has summary.json (every metric of the evaluation, model by model) and
report.html, and the commands are printed that chat with the last model, and serve it with a page.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from steerlm2.checkpoint_dirs import newest_export
from steerlm2.config.environment import escaped, resolved, variables_in, with_variables_kept
from steerlm2.config.loader import REST, as_yaml, config_problems, load_recipe, yaml_key
from steerlm2.evaluation.model_card import add_evaluation
from steerlm2.evaluation.report import markdown_table, read_report
from steerlm2.files import open_own, sync_all, write_durably
from steerlm2.masking import masked
from steerlm2.pipeline.next_steps import next_steps
from steerlm2.pipeline.page import evaluated_models, pipeline_page
from steerlm2.pipeline.plan import (
    Stage,
    StageOptions,
    config_file,
    extended,
    find_recipe,
    plan_stages,
    recipe_file,
    select,
    unused_values,
)
from steerlm2.pipeline.state import (
    PipelineState,
    StageRecord,
    files_in,
    fingerprint,
    inputs_of,
    set_aside,
)
from steerlm2.runs.child_process import ChildProcess
from steerlm2.runs.entry import INTERRUPTED, recipe_main
from steerlm2.runs.logs import tell
from steerlm2.runs.output import make_output_dir
from steerlm2.runs.stopping import InterruptedRunError
from steerlm2.torchtune_private import merge_arguments

LAST_LINES = 20
SUMMARY, REPORT = "summary.json", "report.html"


@dataclass(kw_only=True)
class PipelineConfig:
    """The keys of steerlm2_pipeline."""

    extends: str | None = None
    """Config of which this one is a variant: what it doesn't say is that one's."""
    output_dir: str
    """Folder of the stages, their logs, and the report."""
    values: dict[str, Any] = field(default_factory=dict, metadata={REST: True})
    """Any other key: a value that stages share, as ${KEY}."""
    stages: dict[str, StageOptions]
    """The stages by name, in their order."""
    proposal: list[str] = field(default_factory=list)
    """Stages that train a model to sample from; the last one before a stage is its {proposal}."""
    iterations: int = 2
    """Of the stages with each_iteration."""
    bootstrap: bool = False
    """For stages that say `when: ${bootstrap}`."""
    names: dict[str, Any] = field(default_factory=dict)
    """Values that stages share, as ${names.NAME}."""
    torchrun: str | None = None
    """Its arguments, e.g. --nproc_per_node 8, for recipes that run on several processes."""
    launch: str | None = None
    """What stands before `tune run` where there are such arguments, e.g. srun."""
    only: str | list[str] | None = None
    """The stages to run; null: all."""
    from_stage: str | None = field(default=None, metadata={"key": "from"})
    """The first stage to run; null: the first of all."""
    dry_run: bool = False
    """Print the commands that would run, instead of running them."""
    adopt: bool = False
    """Take what is in the stages' folders for complete: their commands were run by hand."""
    show_output: bool = False
    """Show what the stages print here, instead of writing it into their logs."""

    @staticmethod
    def expand(values: DictConfig) -> DictConfig:
        """The config that it extends with its own values, which must all be used.

        Raises:
            ValueError: naming values that no stage uses.
            FileNotFoundError: where there is no config of that name.
        """
        whole = extended(values, "steerlm2_pipeline")
        known = {yaml_key(each) for each in dataclasses.fields(PipelineConfig)}
        if problems := unused_values(whole, known):
            raise ValueError("the config has problems:\n  - " + "\n  - ".join(problems))
        # Stages resolve the environment's variables: commands and records have only their names.
        kept = with_variables_kept(whole).get("stages") or {}
        for name, stage in kept.items() if isinstance(kept, dict) else ():
            for key in ("use", "overrides"):
                if isinstance(stage, dict) and variables_in(stage.get(key)):
                    whole.stages[name][key] = escaped(stage[key])
        return whole

    def problems(self) -> list[str]:
        found = []
        if self.iterations < 0:
            found.append(f"'iterations' must be at least 0, got {self.iterations}")
        if unknown := [name for name in self.proposal if name not in self.stages]:
            found.append(f"'proposal' names {', '.join(unknown)}, which 'stages' doesn't have")
        if self.bootstrap and all(stage.when is None for stage in self.stages.values()):
            found.append("'bootstrap' is true, but no stage says `when: ${bootstrap}`")
        return found


class PipelineRecipe:
    """The run: setup -> run -> report, or dry_run."""

    def __init__(self, cfg: PipelineConfig) -> None:
        self.cfg = cfg
        self.output_dir = Path(cfg.output_dir)
        self.state = PipelineState(self.output_dir)
        self.stopping = False  # by SIGUSR1

    def setup(self) -> None:
        """Plan all stages and check their configs, before the first one takes time.

        Raises:
            ValueError: naming all problems of all stages.
        """
        cfg = self.cfg
        self.plan = plan_stages(
            cfg.stages,
            output_dir=str(self.output_dir),
            iterations=cfg.iterations,
            proposal=cfg.proposal,
            torchrun=cfg.torchrun or "",
            launch=cfg.launch or "",
        )
        self.selected = select(self.plan, cfg.only, cfg.from_stage)
        self.values: dict[str, dict[str, Any]] = {}
        problems = []
        for stage in self.plan:
            try:
                values = self.values[stage.name] = stage_values(stage)
                problems += [f"{stage.name}: {found}" for found in stage_problems(stage, values)]
            except (ValueError, OSError, YAMLError, OmegaConfBaseException) as error:
                problems.append(f"{stage.name}: {error}")
        if problems:
            raise ValueError("the stages have problems:\n  - " + "\n  - ".join(problems))

    def dry_run(self) -> None:
        """Print the commands that `run` would run."""
        changed: set[str] = set()  # stages that will have run
        for stage in self.selected:
            if changed.isdisjoint(stage.needs) and self._is_complete(stage):
                print(f"# {stage.name} is complete")
            else:
                changed.add(stage.name)
                tell(stage.command)

    def run(self) -> None:
        if problems := lacking_checkpoints(self.selected, self.values, self.output_dir):
            raise ValueError("the stages have problems:\n  - " + "\n  - ".join(problems))
        signal.signal(signal.SIGUSR1, self._stop)
        make_output_dir(self.output_dir)
        with self.state.lock() as lock:
            write_durably(self.output_dir / "config.yaml", as_yaml(self.cfg))
            for name in (SUMMARY, REPORT):
                (self.output_dir / name).unlink(missing_ok=True)  # of an earlier evaluation
            for stage in self.selected:
                number = f"[{self.plan.index(stage) + 1:2}/{len(self.plan)}] {stage.name:<16}"
                if self.cfg.adopt:
                    self._adopt(stage)
                if self._is_complete(stage):
                    print(f"{number} complete", flush=True)
                    continue
                self._check_needs(stage)
                if self.stopping:
                    raise ValueError(
                        f"stopped before stage {stage.name}; the same command goes on with it"
                    )
                print(number, end=" ", flush=True)
                print(f"{self._run_stage(stage, lock):.0f} s", flush=True)

    def report(self) -> None:
        """Write summary.json, report.html, and the results into the cards of the pipeline's models,
        if the evaluation is complete."""
        evaluations = [s for s in self.plan if s.recipe == "evaluate_steering"]
        if not evaluations or not self._is_complete(evaluations[-1]):
            return
        results = read_report(evaluations[-1].folder / "steering.json")
        metrics = dict.fromkeys(name for result in results.values() for name in result.metrics)
        summary = {
            metric: {
                model: result.metrics[metric]
                for model, result in results.items()
                if metric in result.metrics
            }
            for metric in metrics
        }
        page = pipeline_page(self.output_dir, self.plan, self.values, evaluations[-1])
        write_durably(self.output_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")
        write_durably(self.output_dir / REPORT, page)
        for folder in evaluated_models(self.plan, self.values, list(results)):
            add_evaluation(folder, results)
        shown = [metric for metric in ("exact_kl", "steering_mae") if metric in summary]
        rows: list[dict[str, Any]] = [
            {"model": model, **{metric: summary[metric].get(model) for metric in shown}}
            for model in results
        ]
        print(f"\n{markdown_table(rows)}\n\nreport: {self.output_dir / REPORT}")
        for use, command in next_steps(self.plan, self.values).items():
            tell(f"{use}: {command}")

    # Helpers

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _is_complete(self, stage: Stage) -> bool:
        record = self.state.read(stage.name)
        if record is None or not record.complete or record.fingerprint != self._fingerprint(stage):
            return False
        return all((stage.folder / name).exists() for name in record.files)

    def _adopt(self, stage: Stage) -> None:
        """Record a stage's folder as this stage's, if it has no record: as complete, or, where its
        training hasn't ended, to be gone on with."""
        if self.state.read(stage.name) is None and (files := files_in(stage.folder)):
            complete = not self._lacks_model(stage)
            record = StageRecord(self._fingerprint(stage), masked(stage.command), complete)
            self.state.write(stage.name, dataclasses.replace(record, files=files))

    def _lacks_model(self, stage: Stage) -> bool:
        """Whether the stage trains one and hasn't exported it."""
        return "save_every_n_steps" in self.values[stage.name] and not newest_export(stage.folder)

    def _fingerprint(self, stage: Stage) -> str:
        values = self.values[stage.name]
        return fingerprint(
            OmegaConf.to_container(OmegaConf.load(config_file(stage.recipe, stage.config))),
            stage.arguments,
            None if find_recipe(stage.recipe) else recipe_file(stage.recipe),
            str(self.output_dir),
            inputs_of(values, stage.folder, self.output_dir),
        )

    def _check_needs(self, stage: Stage) -> None:
        """Check that all stages that this one reads from are complete.

        Raises:
            ValueError: naming those that aren't, because they were left out.
        """
        by_name = {each.name: each for each in self.plan}
        lacking = [name for name in stage.needs if not self._is_complete(by_name[name])]
        if lacking:
            raise ValueError(
                f"stage {stage.name} reads what {', '.join(lacking)} writes, which is not complete "
                f"or has changed: run it too, from={lacking[0]}"
            )

    def _run_stage(self, stage: Stage, lock: int) -> float:
        """Run a stage's command; returns its seconds.

        Raises:
            ValueError: where it fails.
        """
        now = self._fingerprint(stage)
        record = self.state.read(stage.name)
        if record is None or record.fingerprint != now:
            if stage.folder.exists() and any(stage.folder.iterdir()):
                print(f"(earlier one: {set_aside(stage.folder)})", end=" ", flush=True)
            record = StageRecord(now, masked(stage.command))
        record = dataclasses.replace(record, complete=False, runs=record.runs + 1)
        self.state.write(stage.name, record)

        log = None if self.cfg.show_output else self.output_dir / "logs" / f"{stage.name}.log"
        (self.output_dir / "logs").mkdir(exist_ok=True)
        self.state.now_at(f"stage {stage.name}")
        started = time.monotonic()
        status = run_command(stage.command, log, lock)
        record.seconds += time.monotonic() - started
        unfinished = status == 0 and self._lacks_model(stage)
        # Whatever its status: it may save and end well.
        stopped = self.stopping or unfinished or status == INTERRUPTED
        if status == 0 and not stopped:
            record.complete, record.files = True, files_in(stage.folder)
            sync_all(stage.folder, record.files)
        self.state.write(stage.name, record)
        if stopped:
            raise ValueError(
                f"stage {stage.name} was stopped before its end; the same command goes on with it"
            )
        if status != 0:
            raise ValueError(failure(stage, status, log))
        return record.seconds


def stage_values(stage: Stage) -> dict[str, Any]:
    """The values of a stage's config with its arguments, merged as by `tune run`.

    Raises:
        ValueError: for arguments that can't be merged.
        FileNotFoundError: where there is no such config.
    """
    file = config_file(stage.recipe, stage.config)
    if not file.is_file():
        raise FileNotFoundError(f"there is no config {stage.config} (`tune ls` lists them)")
    plain = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file), resolve=False))
    merged = merge_arguments(plain, stage.arguments)
    return resolved(merged)


def lacking_checkpoints(
    stages: Sequence[Stage], values: Mapping[str, dict[str, Any]], output_dir: Path
) -> list[str]:
    """The models that stages start from and that aren't there, but for those that stages make."""
    found: dict[str, str] = {}
    for stage in stages:
        checkpointer = values.get(stage.name, {}).get("checkpointer")
        folder = checkpointer.get("checkpoint_dir") if isinstance(checkpointer, dict) else None
        if isinstance(folder, str) and folder:
            path = Path(folder).expanduser()
            made = path.resolve().is_relative_to(output_dir.resolve())
            if not made and not path.exists():
                found.setdefault(folder, stage.name)
    return [
        f"{name}: {Path(folder).absolute()} does not exist (checkpointer.checkpoint_dir)"
        for folder, name in found.items()
    ]


def stage_problems(stage: Stage, values: dict[str, Any]) -> list[str]:
    """Problems of a config that its recipe finds, for recipes of this package."""
    file = recipe_file(stage.recipe)
    if not file.is_file():
        return [f"there is no recipe {stage.recipe} (`tune ls` lists them)"]
    return config_problems(getattr(load_recipe(file), "main", None), values)


def run_command(command: str, log: Path | None, lock: int) -> int:
    """Run a line in a shell; returns its exit status. It is ended when this process ends.

    An `srun` in it then gets SIGTERM, and kills its tasks before they can save.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }
    with open_own(log or Path(os.devnull), "ab") as output:
        output.write(f"\n$ {masked(command)}\n".encode())
        output.flush()
        with ChildProcess(
            ["bash", "-c", command],
            seconds_to_end=None,  # a stage may take its time to save
            output=None if log is None else output,
            env=environment,
            pass_fds=(lock,),
        ) as stage:
            return stage.wait()


def failure(stage: Stage, status: int, log: Path | None) -> str:
    """The message about a stage that failed."""
    text = f"stage {stage.name} failed with exit status {status}"
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):  # the latter from a shell
        text += " (SIGKILL: so ends what a machine has no memory for)"
    if log is not None:
        lines = [
            line.rpartition("\r")[2]
            for line in log.read_bytes().decode(errors="replace").split("\n")
        ]
        text += f"; the end of {log}:\n\n" + "\n".join(lines[-LAST_LINES:]) + "\n"
    return f"{text}\nOnce that is mended, the same command continues with this stage"


@recipe_main(PipelineConfig)
def main(cfg: PipelineConfig) -> None:
    recipe = PipelineRecipe(cfg)
    try:
        recipe.setup()
        if cfg.dry_run:
            recipe.dry_run()
        else:
            recipe.run()
            recipe.report()
    except KeyboardInterrupt:
        raise InterruptedRunError("SIGINT: stopped; the same command continues") from None


if __name__ == "__main__":
    main()
