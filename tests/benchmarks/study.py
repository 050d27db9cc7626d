"""How far the iterations of SteerLM 2.0 go in the synthetic world, and what holds them back.

    python tests/benchmarks/study.py --output DIR --jobs 2
    python tests/benchmarks/study.py --output DIR --report --plot FILE.png

The stages are those of tiny/quickstart, run by its recipes, in three worlds (seeds of all draws)
and from three strengths of attribute-conditioned fine-tuning (its steps). For each there are five
iterations in seven variants: tiny/quickstart's (half of the baseline, 32 samples a pair, 300 steps)
with the paper's loss (share of the baseline 1, samples of temperature 1.3) beside it, at its rate
and at half of it; and with 16 samples and 200 steps the paper's with temperatures of 1.3 and 1, and
shares of 0.5 and 0. Ablations exchange one thing each (VARIANTS), from the start or where the
quickstart's iterations do nothing any more: the exact P(a|x,y) and P(y|x), the number of samples,
the steps, the learning rate, how often is sampled, the share by iteration.

Of every model the whole distribution is known, so nothing is estimated: KL(P || Q) in nats, its
conditional part KL(P || Q given that the answer is one of the world's), what it loses to other
strings (-log of the answers' mass), and the steering error, on the 100 pairs of question and label
that nobody samples for, and on 25 of the 400 others.

What is done is kept in DIR (records/*.json, one a model), and the same command goes on after it was
stopped; the order is that of `cells`, first what tiny/quickstart does. The library's code isn't
part of what a result is recognised by: take another DIR after changes of it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import resource
import runpy
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fork_server import NO_THREADS, PR_SET_PDEATHSIG, preload, run_to_the_end

os.environ |= NO_THREADS  # read by what is imported next

import torch
from omegaconf import DictConfig, OmegaConf

from steerlm2.config.loader import instantiate
from steerlm2.data.grammar import (
    Pair,
    answers,
    grammar_pairs,
    grammar_record,
    prompts,
)
from steerlm2.data.records import Record, read_records, write_records
from steerlm2.distributed.world import World
from steerlm2.evaluation.exact_kl import exact_kl, model_scorer
from steerlm2.inference.answers import load_whole_decoder
from steerlm2.pipeline.plan import Stage, StageOptions, config_file, plan_stages, recipe_file

SEEDS = (0, 1, 2)
STRENGTHS = ("250", "400", "800")
"""Of attribute-conditioned fine-tuning; the first is the quickstart's."""
STARTS = {
    **{steps: {"max_steps": int(steps), "lr": 2e-3} for steps in STRENGTHS},
    "250, lr 1e-3": {"max_steps": 250, "lr": 1e-3},
    "250, lr 3e-3": {"max_steps": 250, "lr": 3e-3},
    "250, lr 4e-3": {"max_steps": 250, "lr": 4e-3},
}
"""Keys of attribute-conditioned fine-tuning."""
ITERATIONS = 5
QUICKSTART = Path(__file__).parents[2] / "recipe_configs" / "tiny" / "quickstart.yaml"
LOOP = ("sample", "score", "steerlm2")
QUANTITIES = ("log_p_attributes", "log_p_response", "log_q")


@dataclass(frozen=True)
class Variant:
    """What is done otherwise than in tiny/quickstart."""

    sample: dict[str, Any] = field(default_factory=dict)
    """Keys of sample_responses."""
    train: dict[str, Any] = field(default_factory=dict)
    """Keys of steerlm2_distributed."""
    exact: tuple[str, ...] = ()
    """Quantities that are the world's own, not a model's: log_p_attributes, log_p_response."""
    rounds: int = 1
    """An iteration samples so many times, each for its share of the steps."""
    baselines: tuple[float, ...] = ()
    """The share of the baseline in each iteration; the last goes on."""
    hard_n: int = 0
    """So many answers, sampled anew, to each of the half of the pairs whose w' are least even."""
    after: tuple[str, int] = ("", 0)
    """Another variant, and how many iterations of it come first."""


def share(
    baseline: float,
    n: int = 16,
    temperature: float = 1.0,
    train: dict[str, Any] | None = None,
    corrected: bool = True,
) -> Variant:
    """A share of the baseline, with what is the study's own: whatever the quickstart says."""
    settings = {
        "loss._component_": "steerlm2.losses.SteerLM2Loss",
        "loss.baseline": baseline,
        "loss.samples_per_prompt": n if corrected else None,
        "lr": 7e-4,
        "lr_scheduler.warmup_steps": 10,
        "max_steps": 200,
    }
    return Variant({"temperature": temperature, "n": n}, settings | (train or {}))


OURS = "0.5, lr 1.4e-3, n=32, 300 steps"
OURS_TRAIN = {"lr": 1.4e-3, "max_steps": 300}
QUICKSTARTS = {
    OURS: share(0.5, n=32, train=OURS_TRAIN),
    "paper, T=1.3, n=32, 300 steps": share(
        1.0, n=32, temperature=1.3, train={"max_steps": 300}, corrected=False
    ),
    "paper, T=1.3, lr 1.4e-3, n=32, 300 steps": share(
        1.0, n=32, temperature=1.3, train=OURS_TRAIN, corrected=False
    ),
}
"""tiny/quickstart's, with the paper's loss beside it, at the study's rate and at the same one."""
MAIN = {
    "paper, T=1.3": share(1.0, temperature=1.3, corrected=False),
    "paper, T=1": share(1.0, corrected=False),
    "0.5": share(0.5),
    "0": share(0.0),
}
"""The shares: what is done from all strengths, through all iterations."""
TO_THE_END = {
    "0.5, both exact": dataclasses.replace(share(0.5), exact=QUANTITIES[:2]),
    "0.5, n=64": share(0.5, n=64),
    "0.5, 400 steps": share(0.5, train={"max_steps": 400}),
    "0.5, 4 rounds": dataclasses.replace(share(0.5), rounds=4),
    "1 to 0": dataclasses.replace(share(0.5), baselines=(1.0, 0.5, 0.25, 0.0)),
    "0 to 1": dataclasses.replace(share(0.5), baselines=(0.0, 0.25, 0.5, 1.0)),
}
"""Ablations of the share of 0.5."""
THEN = {
    f"{OURS}; then {name}": dataclasses.replace(variant, after=(OURS, 3))
    for name, variant in {
        "both exact": dataclasses.replace(QUICKSTARTS[OURS], exact=QUANTITIES[:2]),
        "n=64": share(0.5, n=64, train=OURS_TRAIN),
        "lr 3.5e-4": share(0.5, n=32, train=OURS_TRAIN | {"lr": 3.5e-4}),
        "4 rounds": dataclasses.replace(QUICKSTARTS[OURS], rounds=4),
        "1": share(1.0, n=32, train=OURS_TRAIN),
        "0": share(0.0, n=32, train=OURS_TRAIN),
    }.items()
}
"""Where does it stop? What else the fourth and fifth iteration could be, where the quickstart's do
nothing any more."""
ABLATIONS = {
    "0.5, lr 1.4e-3": share(0.5, train={"lr": 1.4e-3}),
    "0.5, lr 3.5e-4": share(0.5, train={"lr": 3.5e-4}),
    "0.5, 100 steps": share(0.5, train={"max_steps": 100}),
    "0.5, n=4": share(0.5, n=4),
    "0.5, n=8 or 24": Variant(
        {"temperature": 1.0, "n": 8},
        {**share(0.5).train, "loss.samples_per_prompt": "recorded"},
        hard_n=24,
    ),
    "0.5, exact P(a|x,y)": dataclasses.replace(share(0.5), exact=("log_p_attributes",)),
    "0.5, exact P(y|x)": dataclasses.replace(share(0.5), exact=("log_p_response",)),
    "0.75": share(0.75),
    "0.25": share(0.25),
    "0.5, not corrected": share(0.5, corrected=False),
    "0.5, lr 1.4e-3, n=32": share(0.5, n=32, train={"lr": 1.4e-3}),
    "0.5, lr 1.4e-3, n=32, 8 pairs": share(0.5, n=32, train={"lr": 1.4e-3, "global_batch_size": 8}),
}
"""What holds it back, and what else could help? What these do in two iterations."""
VARIANTS = QUICKSTARTS | MAIN | TO_THE_END | THEN | ABLATIONS


@dataclass(frozen=True)
class Cell:
    """One model: what comes out of an iteration; iteration 0 is the fine-tuned model."""

    seed: int
    start: str
    """One of STARTS."""
    variant: str = ""
    iteration: int = 0

    @property
    def name(self) -> str:
        return f"seed {self.seed}, acsft {self.start}, {self.variant}, {self.iteration}"


def cells() -> Iterator[Cell]:
    """All of the study, in the order in which it is done; some more than once."""
    own, others = STRENGTHS[0], STRENGTHS[1:]

    def chosen(starts: Sequence[str], variants: Iterable[str], last: int) -> Iterator[Cell]:
        for i in range(1, last + 1):
            yield from (Cell(s, start, v, i) for start in starts for v in variants for s in SEEDS)

    yield from chosen([own], QUICKSTARTS | MAIN, ITERATIONS)
    yield from chosen([own], TO_THE_END, 2)
    yield from chosen([own], THEN, 4)
    yield from chosen(others, MAIN, ITERATIONS)
    yield from chosen([own], THEN, ITERATIONS)
    yield from chosen(others, QUICKSTARTS, ITERATIONS)
    yield from chosen([own], TO_THE_END, ITERATIONS)
    yield from chosen([own], ABLATIONS, 2)
    yield from (Cell(seed, start) for start in STARTS for seed in SEEDS)


# What is done for a cell


@dataclass(frozen=True)
class Task:
    """Something that is done once and leaves a record."""

    name: str
    needs: tuple[str, ...]
    stages: tuple[Stage, ...] = ()
    """Recipes, one after the other."""
    links: dict[Path, Path] = field(default_factory=dict)
    """Folders of other tasks, under the names that the stages know."""
    before_scoring: Callable[[Stage], None] | None = None
    """Changes what score_responses reads."""
    after_scoring: Callable[[Stage], None] | None = None
    """Changes what score_responses has written."""
    evaluate: Callable[[], dict[str, Any]] | None = None
    """Makes the record's results."""


class Study:
    """All tasks, and what is in the folder of the study.

    output/seed0/NAME are the stages up to fine-tuning, output/seed0/from_250/VARIANT the folder of
    a pipeline that begins with them (links), output/records what is done.
    """

    def __init__(self, output: Path) -> None:
        self.output = output.resolve()
        self.records = self.output / "records"
        self.records.mkdir(parents=True, exist_ok=True)

    def tasks(self, chosen: Sequence[Cell]) -> dict[str, Task]:
        """What makes the cells, and what they need, in order."""
        found: dict[str, Task] = {}
        for cell in chosen:
            start = Cell(cell.seed, cell.start)
            if start.name not in found:
                for task in self._until(start):
                    found.setdefault(task.name, task)
            for iteration in range(1, cell.iteration + 1):
                variant, earlier = VARIANTS[cell.variant].after
                if iteration > earlier:
                    variant = cell.variant
                step = dataclasses.replace(cell, variant=variant, iteration=iteration)
                if step.name not in found:
                    found[step.name] = self._iteration(step)
        return found

    def _until(self, cell: Cell) -> Iterator[Task]:
        """The tasks up to a fine-tuned model."""
        world = self.output / f"seed{cell.seed}"
        for stage in plan_stages(shared_stages(cell), output_dir=str(world), iterations=0):
            task = Task(
                in_world(cell, stage.name),
                tuple(in_world(cell, name) for name in stage.needs),
                (stage,),
            )
            if stage.name == "targets":
                evaluate = functools.partial(evaluate_targets, stage.folder)
                task = dataclasses.replace(task, before_scoring=put_all_answers, evaluate=evaluate)
            yield task
        start = acsft_of(cell)
        yield Task(
            Cell(cell.seed, cell.start).name,
            (in_world(cell, start),),
            evaluate=lambda: evaluate_model(world / start),
        )

    def _iteration(self, cell: Cell) -> Task:
        world, variant = self.output / f"seed{cell.seed}", VARIANTS[cell.variant]
        folder = world / f"from_{folder_name(cell.start)}" / folder_name(cell.variant)
        last = cell.iteration * variant.rounds
        planned = plan_stages(
            loop_stages(cell),
            output_dir=str(folder),
            iterations=last,
            proposal=("acsft", "steerlm2"),
        )
        rounds = range(last - variant.rounds + 1, last + 1)
        names = {f"{name}_iter{number}" for name in LOOP for number in rounds}
        before = dataclasses.replace(cell, iteration=cell.iteration - 1)
        other, earlier = variant.after
        if before.iteration == earlier:
            before = dataclasses.replace(before, variant=other)
        shared = {"prompts": "prompts", "reward": "reward", "sft": "sft"}
        shared["acsft"] = acsft_of(cell)
        links = {folder / name: world / target for name, target in shared.items()}
        if earlier:
            others = folder.with_name(folder_name(other)) / f"steerlm2_iter{earlier}"
            links[folder / f"steerlm2_iter{earlier * variant.rounds}"] = others
        return Task(
            cell.name,
            (before.name, *(in_world(cell, name) for name in shared.values())),
            tuple(stage for stage in planned if stage.name in names),
            links=links,
            before_scoring=functools.partial(put_exact, quantities=variant.exact),
            after_scoring=functools.partial(
                sample_more_for_hard, {stage.name: stage for stage in planned}, variant.hard_n
            ),
            evaluate=lambda: evaluate_model(folder / f"steerlm2_iter{last}"),
        )

    # Records

    def fingerprints(self, tasks: dict[str, Task]) -> dict[str, str]:
        """Of all settings that the results of the tasks follow from."""
        found: dict[str, str] = {}
        for name, task in tasks.items():
            own = [
                (
                    stage.recipe,
                    read_text(config_file(stage.recipe, stage.config)),
                    *sorted(stage.arguments),
                )
                for stage in task.stages
            ]
            text = json.dumps([own, [found[each] for each in task.needs]])
            text = text.replace(str(self.output), "")
            found[name] = hashlib.sha256(text.encode()).hexdigest()
        return found

    def record(self, name: str) -> dict[str, Any] | None:
        file = self._file(name)
        return json.loads(file.read_text()) if file.exists() else None

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Whole or not at all."""
        temporary = self._file(name).with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.rename(self._file(name))

    def _file(self, name: str) -> Path:
        return self.records / f"{folder_name(name)}.json"

    # Work

    def run(self, tasks: dict[str, Task], jobs: int) -> None:
        """Do what isn't done, `jobs` tasks at a time, each in a process that is forked."""
        preload()
        for prompt in prompts():
            answers(prompt)  # is cached
        prints = self.fingerprints(tasks)
        done: set[str] = set()
        failed: set[str] = set()
        running: dict[int, str] = {}
        for name in tasks:
            record = self.record(name)
            if record and record["complete"] and record["fingerprint"] == prints[name]:
                done.add(name)
        while True:
            waiting = [n for n in tasks if n not in done | failed and n not in running.values()]
            ready = [n for n in waiting if done.issuperset(tasks[n].needs)]
            for name in ready[: jobs - len(running)]:
                running[self._start(tasks[name], prints[name])] = name
            if not running:
                break
            pid, status = os.wait()
            name = running.pop(pid)
            (failed if status else done).add(name)
            left = len(tasks) - len(done)
            print(f"{name}: {'FAILED' if status else 'done'}, {left} tasks left", flush=True)
        if failed:
            sys.exit(f"failed: {'; '.join(sorted(failed))} (see {self.output / 'logs'})")

    def _start(self, task: Task, fingerprint: str) -> int:
        earlier = self.record(task.name)
        if earlier is None or earlier["fingerprint"] != fingerprint:
            for stage in task.stages:
                shutil.rmtree(stage.folder, ignore_errors=True)
        begun = {"fingerprint": fingerprint, "complete": False}
        self.write(task.name, begun)
        log = self.output / "logs" / f"{folder_name(task.name)}.log"
        return forked(lambda: self._do(task, begun), log)

    def _do(self, task: Task, record: dict[str, Any]) -> None:
        for link, target in task.links.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(target, link.parent))
        for stage in task.stages:
            if task.before_scoring and stage.recipe == "score_responses":
                task.before_scoring(stage)
            wait_for(forked(functools.partial(run_recipe, stage)))
            if task.after_scoring and stage.recipe == "score_responses":
                task.after_scoring(stage)
        if task.evaluate:
            record = record | {"results": task.evaluate()}
        for stage in task.stages:  # what isn't needed again
            if stage.recipe == "steerlm2_distributed":
                record = record | {"training": training_metrics(stage.folder)}
            shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)
            if stage.recipe in ("sample_responses", "score_responses"):
                shutil.rmtree(stage.folder)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        seconds = sum(each.ru_utime + each.ru_stime for each in used)
        self.write(task.name, record | {"complete": True, "cpu_seconds": round(seconds, 1)})


# Stages


@functools.cache
def read_text(file: Path) -> str:
    return file.read_text()


def in_world(cell: Cell, name: str) -> str:
    return f"seed {cell.seed}, {name}"


def acsft_of(cell: Cell) -> str:
    return re.sub(r"\W+", "_", f"acsft_{cell.start}")


def folder_name(text: str) -> str:
    """Without what a shell or a config would take for something else."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_")


def quickstart_stages(seed: int) -> dict[str, StageOptions]:
    """The stages of tiny/quickstart but its evaluation."""
    config = OmegaConf.merge(read_quickstart(), {"names": {"seed": seed}})
    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    stages = {name: StageOptions(**options) for name, options in values["stages"].items()}
    del stages["evaluate"]
    return stages


@functools.cache
def read_quickstart() -> DictConfig:
    return cast(DictConfig, OmegaConf.load(QUICKSTART))


def shared_stages(cell: Cell) -> dict[str, StageOptions]:
    """What comes before the iterations, with fine-tuning from the cell's start."""
    stages = {name: s for name, s in quickstart_stages(cell.seed).items() if name not in LOOP}
    acsft = stages.pop("acsft")
    own = STARTS[cell.start]
    acsft.overrides |= own | {"val_every_n_steps": own["max_steps"]}
    targets = quickstart_stages(cell.seed)["score"]
    targets.each_iteration = False
    targets.overrides |= {"input": "{here}/all.jsonl", "quantities": list(QUANTITIES[:2])}
    del targets.overrides["checkpointer"]
    return stages | {"targets": targets, acsft_of(cell): acsft}


def loop_stages(cell: Cell) -> dict[str, StageOptions]:
    """The quickstart's stages as the cell's variant has them."""
    variant, stages = VARIANTS[cell.variant], quickstart_stages(cell.seed)
    train = dict(variant.train)
    if variant.baselines:
        train["loss.baseline"] = variant.baselines[: cell.iteration][-1]
    steps = train.get("max_steps", stages["steerlm2"].overrides["max_steps"])
    stages["sample"].overrides |= variant.sample
    stages["steerlm2"].overrides |= train | {"max_steps": steps // variant.rounds}
    scored = stages["score"].overrides
    scored["quantities"] = [name for name in scored["quantities"] if name not in variant.exact]
    for name in variant.exact:
        scored.pop(f"{name}.checkpointer")
    return stages


def put_exact(stage: Stage, quantities: Sequence[str]) -> None:
    """Give sampled answers the world's own log P(a|x,y) or log P(y|x)."""
    if not quantities:
        return
    file = stage.folder.with_name(stage.name.replace("score", "sample")) / "groups.jsonl"
    records = []
    for record in read_records(file, require=()):
        exact = exact_record(record, [response.value for response in record.responses])
        responses = [
            dataclasses.replace(own, **{name: getattr(known, name) for name in quantities})
            for own, known in zip(record.responses, exact.responses, strict=True)
        ]
        records.append(dataclasses.replace(record, responses=responses))
    write_records(file, records)


def sample_more_for_hard(stages: Mapping[str, Stage], n: int, score: Stage) -> None:
    """Put n new answers in the place of those of the half of the groups with the fewest effective
    samples under w'. New ones: the old ones have decided which groups these are."""
    if not n:
        return
    groups, folder = score.folder / "groups.jsonl", score.folder / "hard"
    records = read_records(groups)
    folder.mkdir(exist_ok=True)
    write_records(folder / "asked.jsonl", sorted(records, key=evenness)[: len(records) // 2])
    sample = stages[score.name.replace("score", "sample")]
    sampled, scored = folder / "sampled.jsonl", folder / "scored.jsonl"
    for stage, changed in (
        (sample, {"input": folder / "asked.jsonl", "output": sampled, "n": n, "seed": 1000}),
        (score, {"input": sampled, "output": scored}),
    ):
        kept = [each for each in stage.arguments if each.partition("=")[0] not in changed]
        arguments = (*kept, *(f"{key}={value}" for key, value in changed.items()))
        wait_for(
            forked(functools.partial(run_recipe, dataclasses.replace(stage, arguments=arguments)))
        )
    again = {pair_of(record): record for record in read_records(scored)}
    write_records(groups, [again.get(pair_of(record), record) for record in records])


def pair_of(record: Record) -> Pair:
    return Pair(record.prompt_turns[0].value, record.label or "")


def evenness(record: Record) -> float:
    """Effective samples under w', as a share of the samples."""
    values = [
        [response.log_p_attributes, response.log_p_response, response.log_q]
        for response in record.responses
    ]
    a_N, y_N, q_N = torch.tensor(values, dtype=torch.float64).T
    weights_N = (a_N + y_N - q_N).softmax(dim=0)
    return 1 / (len(weights_N) * weights_N.square().sum().item())


def put_all_answers(stage: Stage) -> None:
    """All answers of the world to the questions that are held out."""
    pairs = grammar_pairs("validation")
    stage.folder.mkdir(exist_ok=True)
    records = [grammar_record(pair, answers(pair.prompt).texts) for pair in pairs]
    write_records(stage.folder / "all.jsonl", records)


def exact_record(record: Record, texts: Sequence[str]) -> Record:
    return grammar_record(pair_of(record), texts)


def run_recipe(stage: Stage) -> None:
    """As `tune run` does, in this process."""
    file = str(recipe_file(stage.recipe))
    sys.argv[:] = [file, "--config", str(config_file(stage.recipe, stage.config)), *stage.arguments]
    runpy.run_path(file, run_name="__main__")


# Results


def evaluate_targets(folder: Path) -> dict[str, Any]:
    """KL of P to what the models take for it, held-out pairs: where an iteration without any error
    would end. One factor of P(a|x,y) P(y|x) is a model's, or both are."""
    kl: dict[str, list[float]] = {"attribute model": [], "SFT": [], "both": []}
    for record in read_records(folder / "groups.jsonl", require=()):
        exact = exact_record(record, [response.value for response in record.responses])
        a_N, y_N, exact_a_N, exact_y_N = (
            torch.tensor([getattr(r, name) for r in own.responses], dtype=torch.float64)
            for own in (record, exact)
            for name in QUANTITIES[:2]
        )
        log_p_N = (exact_a_N + exact_y_N).log_softmax(dim=0)
        for name, logits_N in {
            "attribute model": a_N + exact_y_N,
            "SFT": exact_a_N + y_N,
            "both": a_N + y_N,
        }.items():
            gap_N = log_p_N - logits_N.log_softmax(dim=0)
            kl[name].append((log_p_N.exp() @ gap_N).item())
    return {name: statistics.mean(values) for name, values in kl.items()}


def evaluate_model(folder: Path) -> dict[str, Any]:
    """Exact figures of a language model."""
    pairs = {"held_out": grammar_pairs("validation"), "train": grammar_pairs("train")[::16]}
    settings = OmegaConf.load(config_file("evaluate_steering", "tiny/evaluate_steering"))
    tokenizer, template = instantiate(settings.tokenizer), instantiate(settings.template)
    world = World(torch.device("cpu"))
    decoder = load_whole_decoder(
        settings.model,
        {"_component_": "steerlm2.checkpoints.HFCheckpointer", "checkpoint_dir": str(folder)},
        tokenizer,
        world,
        dtype=torch.float32,
        max_seq_len=1024,
        seed=0,
        compile=False,
    )
    scorer = model_scorer(decoder, world, max_tokens_per_microbatch=2048)
    results = {}
    for split, chosen in pairs.items():
        found = exact_kl(scorer, tokenizer, template, chosen)
        lost = -found.mass_P.log().mean().item()
        results[split] = {
            "kl": found.mean(),
            "conditional": found.mean() - lost,
            "lost": lost,
            "mass": found.mass_P.mean().item(),
            "error": found.steering_error_PA.mean().item(),
            "least_error": found.least_error_PA.mean().item(),
        }
    return results


def training_metrics(folder: Path) -> dict[str, float]:
    """Medians over the last fifth of the steps: a single group can carry a mean of ratios away."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    last = steps[-max(len(steps) // 5, 1) :]
    return {name: statistics.median(row[name] for row in last) for name in SHOWN if name in last[0]}


SHOWN = ("distance", "ess_target", "ess_baseline", "mean_log_ratio", "mean_ratio", "log_mean_ratio")


# Processes


def forked(function: Callable[[], object], log: Path | None = None) -> int:
    """The id of a process that calls the function and ends; it doesn't outlive this one.

    Args:
        log: where it prints to.
    """
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        _become(function, log)
    return pid


def _become(function: Callable[[], object], log: Path | None) -> NoReturn:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if log is not None:
        log.parent.mkdir(exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    run_to_the_end(function)


def wait_for(pid: int) -> None:
    """Raises:
    ChildProcessError: where it failed.
    """
    _, status = os.waitpid(pid, 0)
    if status:
        raise ChildProcessError(f"process {pid} ended with {os.waitstatus_to_exitcode(status)}")


# Report


HEADER = f"""# Every model of the study

Printed by `python tests/benchmarks/study.py --output DIR --report`; README.md says what it is
about. Values are those of seeds {", ".join(map(str, SEEDS))}, `-` where one hasn't been run, and
in brackets the mean of all. KL(P ‖ Q) in nats, on pairs of question and label that nobody samples
for; "lost" is its part that is lost to strings which are no answers, "conditional" the rest; "mean
ratio" is `mean_ratio`, a median over the last fifth of the steps."""


def report(study: Study) -> str:
    """All results there are, as a document of tables."""
    lines = [HEADER, "", "## KL of P to the models' own P(a|x,y) P(y|x)", ""]
    lines += ["| seed | attribute model's | SFT model's | both models' |", "|---|---|---|---|"]
    for seed in SEEDS:
        record = study.record(in_world(Cell(seed, ""), "targets"))
        if record and record["complete"]:
            row = (f"{value:.3f}" for value in record["results"].values())
            lines.append(f"| {seed} | {' | '.join(row)} |")
    for strength in STARTS:
        if any(results(study, Cell(seed, strength)) for seed in SEEDS):
            lines += ["", f"## Attribute-conditioned fine-tuning of {strength} steps", ""]
            lines += [*means_by_iteration(study, strength), "", *all_models(study, strength)]
    return "\n".join(lines)


def means_by_iteration(study: Study, strength: str) -> list[str]:
    """A table of the KL, a row for each variant: means of all seeds, as far as all of them go."""
    lines = [f"| mean KL after iteration | {' | '.join(map(str, range(ITERATIONS + 1)))} |"]
    lines.append("|---" * (ITERATIONS + 2) + "|")
    for variant in VARIANTS:
        row = [mean_kl(study, strength, variant, i) for i in range(ITERATIONS + 1)]
        if any(row[1:]):
            lines.append(f"| {in_a_table(variant)} | {' | '.join(row)} |")
    return lines


def mean_kl(study: Study, strength: str, variant: str, iteration: int) -> str:
    """Of all seeds; empty where one isn't there yet."""
    variant = variant if iteration else ""
    found = [results(study, Cell(seed, strength, variant, iteration)) for seed in SEEDS]
    return f"{statistics.mean(own['held_out kl'] for own in found):.3f}" if all(found) else ""


def all_models(study: Study, strength: str) -> list[str]:
    """A table of all quantities, a row for each variant and iteration."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    starts = {seed: results(study, Cell(seed, strength)) for seed in SEEDS}
    rows = itertools.product(VARIANTS, range(1, ITERATIONS + 1))
    for variant, iteration in [("", 0), *rows]:
        found = {s: results(study, Cell(s, strength, variant, iteration)) for s in SEEDS}
        if any(found.values()):
            lines.append(row_of(variant or "start", iteration, found, starts))
    return lines


def in_a_table(text: str) -> str:
    return text.replace("|", r"\|")


def results(study: Study, cell: Cell) -> dict[str, float]:
    """Flat; empty where there are none yet."""
    record = study.record(cell.name)
    if record is None or not record["complete"]:
        return {}
    flat = {f"{s} {name}": v for s, own in record["results"].items() for name, v in own.items()}
    return flat | record.get("training", {})


COLUMNS = (
    "iteration",
    "KL",
    "of the start's",
    "conditional",
    "lost",
    "error",
    "KL, pairs sampled for",
    "mean ratio",
)


def row_of(
    variant: str,
    iteration: int,
    found: dict[int, dict[str, float]],
    starts: dict[int, dict[str, float]],
) -> str:
    """Of each seed, - for those that aren't there, and the mean of all."""

    def cell(name: str, digits: int = 3) -> str:
        values = [own.get(name) for own in found.values()]
        known = [value for value in values if value is not None]
        text = ", ".join("-" if value is None else f"{value:.{digits}f}" for value in values)
        return text + (f" ({statistics.mean(known):.{digits}f})" if known == values else "")

    for seed, own in found.items():
        if own and starts[seed]:
            own["share"] = own["held_out kl"] / starts[seed]["held_out kl"]
    names = ["held_out kl", "share", "held_out conditional", "held_out lost", "held_out error"]
    row = [cell(name, 2 if name == "share" else 3) for name in names]
    row += [cell("train kl"), cell("mean_ratio", 2)]
    return f"| {in_a_table(variant)} | {iteration} | {' | '.join(row)} |"


DRAWN = QUICKSTARTS | MAIN
PARTS = {
    "held_out kl": "KL(P ‖ Q), nats",
    "held_out conditional": "conditional part",
    "held_out lost": "lost to other strings",
}


def runs_of(study: Study, strength: str, variant: str) -> list[list[dict[str, float]]]:
    """Of each seed the results of the start and of the iterations after it, as far as they go."""
    runs = []
    for seed in SEEDS:
        after = (Cell(seed, strength, variant, i) for i in range(1, ITERATIONS + 1))
        found = (results(study, cell) for cell in (Cell(seed, strength), *after))
        runs.append(list(itertools.takewhile(bool, found)))
    return runs


def plot(study: Study, file: Path) -> None:
    """KL on held-out pairs and its parts over the iterations: seeds, and their mean as far as all
    of them go; a row for each start."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = {
        strength: {variant: runs_of(study, strength, variant) for variant in DRAWN}
        for strength in STRENGTHS
    }
    shown = [
        strength
        for strength, of_start in known.items()
        if any(len(run) > 1 for runs in of_start.values() for run in runs)
    ]
    figure = Figure(figsize=(11, 3 * len(shown) + 0.7), layout="constrained")
    panels = figure.subplots(len(shown), len(PARTS), sharex=True, sharey="col", squeeze=False)
    for strength, row in zip(shown, panels, strict=True):
        for (name, title), panel in zip(PARTS.items(), row, strict=True):
            for number, (variant, runs) in enumerate(known[strength].items()):
                curves = [[found[name] for found in run] for run in runs]
                for curve in curves:
                    panel.plot(curve, color=f"C{number}", linewidth=0.6, alpha=0.5)
                means = [statistics.mean(values) for values in zip(*curves, strict=False)]
                panel.plot(means, "o-", color=f"C{number}", markersize=4, label=variant)
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
            panel.tick_params(which="both", labelsize=7)
            panel.set_xticks(range(ITERATIONS + 1))
            panel.set_title(f"{title}; start of {strength} steps", fontsize=9)
            panel.grid(alpha=0.3, which="both")
    for panel in panels[-1]:
        panel.set_xlabel("iteration", fontsize=8)
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=4, fontsize=8)
    FigureCanvasAgg(figure).print_png(str(file))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, a core each")
    parser.add_argument("--first", type=int, help="only the first so many models, in their order")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    parser.add_argument("--plot", type=Path, help="a figure of the main variants, as PNG")
    args = parser.parse_args()
    study = Study(args.output)
    if not args.report:
        chosen = list(dict.fromkeys(cells()))[: args.first]
        study.run(study.tasks(chosen), args.jobs)
    print(report(study))
    if args.plot:
        plot(study, args.plot)


if __name__ == "__main__":
    main()
