"""SteerLM 2.0 training: make a model's relative probabilities of n answers match target weights.

For every prompt x with a wanted label a and n sampled answers y_i,

    w'_i = softmax_i(log P(a|x,y_i) + log P(y_i|x) - log Q'(y_i|a,x))    fixed, from the data
    b'_i = softmax_i(log Q_theta(y_i|a,x) - log Q'(y_i|a,x))             the model being trained

and the loss is the mean over prompts of KL(w' || b') / mean answer length (HelpSteer2 paper,
section 4.5, and NeMo-Aligner; `steerlm2/losses.py` has the arithmetic, and what `loss.baseline`
below 1 is for).

    tune run steerlm2_distributed --config tiny/steerlm2
    tune run --nproc_per_node 8 steerlm2_distributed --config llama3_1/8B_steerlm2 lr=2e-7

One file for every world size: alone it is one process on a CPU or GPU, under torchrun arguments
FSDP2 x tensor parallel with replicas. `train` is the algorithm, `TrainingRun`
(steerlm2/training/run.py) what surrounds its steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from steerlm2.checkpoints.side_files import TrainedText
from steerlm2.config.keys import DataOptions, GenerationOptions, TrainingKeys, at_least_one
from steerlm2.config.loader import Component, instantiate, takes
from steerlm2.data.packing import Group, PackedGroups, Targets, targets_of
from steerlm2.data.templates import response_end
from steerlm2.datasets import SteerLM2Dataset, language_model_facts, with_log_probs
from steerlm2.datasets.sampled import (
    SamplingRules,
    as_sampled,
    as_stored,
    share_missing,
    unlike_samples_of_q,
)
from steerlm2.distributed.parallelize import clip_gradients, reduce_gradients
from steerlm2.inference.validation_answers import ValidationAnswers
from steerlm2.losses import METRIC_NAMES, metric_sums
from steerlm2.runs.entry import recipe_main
from steerlm2.training.forward import check_finite, response_logps, score_groups
from steerlm2.training.ratio_watch import RatioWatch
from steerlm2.training.run import TrainingRun
from steerlm2.training.setup import build_loss, build_model, build_optimizer, lay_out_model
from steerlm2.training.step_plan import GroupBatches, Strategy, pack_step, plan_step

LOGGED = ("loss", *METRIC_NAMES)


@dataclass(kw_only=True)
class SteerLM2Options:
    """The `steerlm2:` section."""

    strategy: Strategy = "auto"
    """single_pass: a group is one micro-batch or a part of one. two_pass: log-probs without a graph
    first, then gradients slice by slice. auto: two_pass for groups over the token budget."""
    max_tokens_per_microbatch: int = 4096
    """Token budget of a micro-batch: prompts with their responses."""
    micro_batch_size: int = 1
    """Responses of a backward of two_pass."""
    forward_micro_batch_size: int = 1
    """Responses of a forward without a graph of two_pass."""
    normalize: Literal["mean_response_length", "none"] = "mean_response_length"
    """Divide a group's loss by its mean response length (NeMo-Aligner), or not (the paper)."""
    log_q_tolerance: float = 0.05
    """Mean difference between the stored log Q' and the start weights', nats a token, above which
    the run refuses to start; where the loss needs samples of Q', that between log Q' and the
    sampler's log-probs too. Numerics (bf16, another layout) stay far below it, another template,
    checkpoint or sampler far above."""
    score_with_start_model: bool = False
    """Take log P(y|x) and log Q' from the start weights instead of the data."""
    use_sampler_log_probs: bool = False
    """Put the log-probs that the sampler drew with, which the records have, in the place of log Q'
    in w' and b': answers sampled at another temperature are then right for loss.baseline below 1.
    It needs top_p 1, and that the sampler recorded them (the local one does)."""
    assume_samples_of_q: bool = False
    """Take the answers for samples of Q' at temperature 1 and top_p 1, which loss.baseline below 1
    and loss.samples_per_prompt need, whatever their records say or don't say of it; with
    use_sampler_log_probs for samples from all that the sampler's model can give."""


@dataclass(kw_only=True)
class SteerLM2DataOptions(DataOptions):
    """The `data:` section."""

    sample: bool = False
    """Load only the max_steps * global_batch_size records that are needed, drawn with `seed`."""


@dataclass(kw_only=True)
class SteerLM2Config(TrainingKeys):
    """What SteerLM 2.0 has beside the keys of every training run."""

    loss: Component = field(
        default_factory=lambda: Component(_component_="steerlm2.losses.SteerLM2Loss")
    )
    """The loss of log-probs, log Q' and target weights: steerlm2.losses.GroupLoss says what it is
    called with. A function that is one, or a class or function that makes one."""
    steerlm2: SteerLM2Options = field(default_factory=SteerLM2Options)
    """How a step is computed."""
    data: SteerLM2DataOptions = field(default_factory=SteerLM2DataOptions)
    """How the data are drawn; `sample` loads no more than needed."""
    generation: GenerationOptions | None = None
    """Answers to sample at every validation; null: none."""
    export: Literal["best", "last"] = "last"
    """Weights to export: the last, or those of the lowest validation loss, where there is one."""

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        if isinstance(values.get("loss"), dict):
            values["loss"].setdefault("_component_", "steerlm2.losses.SteerLM2Loss")
        return super().complete(values)

    def problems(self) -> list[str]:
        found = super().problems()
        if "normalize" in self.loss:
            found.append("'loss.normalize' is taken from 'steerlm2.normalize': set that")
        else:
            try:
                build_loss(self.loss, self.steerlm2.normalize)
            except ValueError as error:
                found.append(f"'loss': {error}")
        if self.data.sample and self.max_steps is None:
            found.append("'data.sample' needs 'max_steps'")
        if self.val_every_n_steps and not (self.dataset_val or self.generation):
            found.append("'val_every_n_steps' needs 'dataset_val' or 'generation'")
        if self.generation:
            found += self.generation.problems()
        budget = "max_tokens_per_microbatch"
        sizes = (budget, "micro_batch_size", "forward_micro_batch_size")
        return [*found, *at_least_one(self.steerlm2, *sizes, section="steerlm2.")]


class SteerLM2Recipe:
    """The run: setup -> train (with validate) -> export."""

    def __init__(self, cfg: SteerLM2Config, run: TrainingRun) -> None:
        self.cfg, self.run = cfg, run

    def setup(self) -> None:
        cfg, run, world = self.cfg, self.run, self.run.world
        self.tokenizer, self.template = instantiate(cfg.tokenizer), instantiate(cfg.template)
        self.stop_id = response_end(self.template, self.tokenizer)[1]
        train_set = self._dataset(cfg.dataset)
        val_set = self._dataset(cfg.val_data) if cfg.val_data else None
        self.facts = language_model_facts(train_set.conversations(), cfg.template, cfg.schema)
        conversations = val_set.conversations() if val_set else []
        self.answers = ValidationAnswers(
            cfg.generation,
            self.template,
            self.tokenizer,
            conversations,
            run.json_lines("samples.jsonl"),
        )
        run.plan(len(train_set))

        longest = [data.longest() for data in (train_set, val_set) if data]
        self.model = build_model(cfg, longest=max([*longest, self.answers.longest]))
        self.checkpointer = lay_out_model(cfg, self.model, self.tokenizer, world)
        self.loss_fn = build_loss(cfg.loss, cfg.steerlm2.normalize)
        self.optimizer, self.lr_scheduler = build_optimizer(cfg, self.model, run.total_steps)

        # Q_theta is Q' only now: after a training state is loaded it has moved on.
        self.train_groups = self._scored(train_set, "dataset")
        self.val_groups = self._scored(val_set, "dataset_val") if val_set else []
        of_groups = self.train_groups, train_set.records
        unlike = "" if cfg.steerlm2.assume_samples_of_q else unlike_samples_of_q(*of_groups)
        if cfg.steerlm2.use_sampler_log_probs:
            unlike = "the ratios are to the log-probs of their sampler, where few carry the mean"
        baseline = getattr(self.loss_fn, "baseline", 1.0)
        self.ratios = RatioWatch(baseline, unlike, share_missing(*of_groups))
        tokens = sum(group.num_tokens for group in self.train_groups)
        data_state = {"groups": len(train_set), "tokens": tokens, "shuffle": cfg.data.shuffle}
        stored_val = as_stored(val_set.groups if val_set else [], self.val_groups)
        stored = as_stored(train_set.groups, self.train_groups), stored_val
        run.begin(self.model, self.optimizer, self.lr_scheduler, data_state, *stored)
        run.describe(train_set.summary(), val_set.summary() if val_set else "", "prompts")
        if run.first_step == 0:
            self._check_drift()

    def train(self) -> None:
        """Every optimizer step, from the groups to the log line."""
        cfg, run, world = self.cfg, self.run, self.run.world
        if run.validates_at_start(has_loss=bool(self.val_groups)):
            self.validate(run.first_step)
        with run.steps(self.prepare) as steps:
            for step, work in steps:
                # Groups too large for one micro-batch: log Q_theta of all their responses without a
                # graph, then the gradient of the loss with respect to each.
                with torch.no_grad():
                    logps = [
                        response_logps(self.model, batch.to(world.device), world)
                        for batch in work.no_grad
                    ]
                micro_batches: list[tuple[PackedGroups, Tensor | None]] = []
                if work.two_pass:
                    whole = targets_of(work.two_pass).to(world.device)
                    grad_N = self.loss_gradient(torch.cat(logps), whole, len(work.records))
                    grads = grad_N.split([batch.num_responses for batch in work.second_pass])
                    micro_batches += zip(work.second_pass, grads, strict=True)

                # All others: forward, gradient of the loss, backward.
                micro_batches += [(batch, None) for batch in work.single_pass]
                for i, (batch, known_grad_N) in enumerate(micro_batches):
                    run.at(f"step {step}, micro-batch {i + 1}")
                    last = i + 1 == len(micro_batches)
                    reduce_gradients(self.model, world, last, cfg.fsdp_reduce_every_microbatch)
                    batch = batch.to(world.device)
                    logps_N = response_logps(self.model, batch, world)
                    if known_grad_N is not None:
                        grad_N = known_grad_N
                    else:
                        grad_N = self.loss_gradient(logps_N, batch, len(work.records))
                        logps.append(logps_N.detach())
                    # FSDP2 takes the mean over the data-parallel ranks; the loss has the whole
                    # step's number of groups in it already.
                    logps_N.backward(grad_N * world.dp_size)

                grad_norm = clip_gradients(self.model.parameters(), cfg.clip_grad_norm)
                due = run.due(step, grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.lr_scheduler.step()

                if due.log:
                    sums = world.sum(self._metric_sums(torch.cat(logps), work.own_records))
                    means = (sums / len(work.records)).tolist()
                    metrics = dict(zip(LOGGED, means, strict=True))
                    metrics["rank_imbalance"] = work.imbalance
                    run.log(step, metrics, shown=("loss", "distance"))
                    if warning := self.ratios.trained(metrics["mean_ratio"]):
                        run.say(warning)
                if due.save:
                    run.save(step)
                if due.validate:
                    self.validate(step)

    def loss_gradient(self, logps_N: Tensor, targets: Targets, num_groups: int) -> Tensor:
        """d loss / d log Q_theta [N], the loss being the mean over all groups of the step."""
        leaf_N = logps_N.detach().requires_grad_()
        loss = self._loss(leaf_N, targets) * (len(targets.sizes_G) / num_groups)
        return torch.autograd.grad(loss, leaf_N)[0]

    def validate(self, step: int) -> None:
        """Loss and distance on validation groups, and answers to a few prompts."""
        cfg, run, world = self.cfg, self.run, self.run.world
        with run.validation(step):
            metrics: dict[str, float] = {}
            if self.val_groups:
                limit = (cfg.limit_val_batches or len(self.val_groups)) * cfg.global_batch_size
                groups = self.val_groups[:limit]
                logps = [logp for scores in self._score(groups) for logp in scores]
                logps_N = torch.tensor(logps, dtype=torch.float64, device=world.device)
                means = (self._metric_sums(logps_N, groups) / len(groups)).tolist()
                metrics |= zip(LOGGED, world.from_main(means), strict=True)
                self.ratios.validated(metrics["mean_ratio"])
            metrics |= self.answers.sample(self.model, world, step=step, seed=cfg.seed)
        if metrics:
            run.log_validation(step, metrics)

    def export(self) -> None:
        """The trained weights as Hugging Face safetensors, and the run's table and plot."""
        text = TrainedText(self.tokenizer, self.template, self.stop_id)
        step = self.run.export(
            self.model, self.checkpointer, self.facts, text, method="SteerLM 2.0"
        )
        table = ("distance", "loss", *METRIC_NAMES[1:], "grad_norm", "lr")
        self.run.report(step, table=table, curves=("distance", "loss"))

    # Helpers

    def _dataset(self, component: Component) -> SteerLM2Dataset:
        cfg = self.cfg
        arguments: dict[str, Any] = {"template": self.template}
        if cfg.steerlm2.score_with_start_model and takes(component, "require"):
            arguments["require"] = ("log_p_attributes",)
        if cfg.data.sample and component is cfg.dataset and cfg.max_steps:
            arguments["num_samples"] = cfg.max_steps * cfg.global_batch_size
            arguments["seed"] = cfg.seed
        return instantiate(component, self.tokenizer, **arguments)

    def prepare(self, step: int) -> GroupBatches:
        """What this rank computes in a step."""
        options, world = self.cfg.steerlm2, self.run.world
        groups = self._batch(step)
        sizes = {
            "micro_batch_size": options.micro_batch_size,
            "forward_micro_batch_size": options.forward_micro_batch_size,
        }
        plan = plan_step(
            groups,
            rank=world.dp_rank,
            num_ranks=world.dp_size,
            strategy=options.strategy,
            max_tokens_per_microbatch=options.max_tokens_per_microbatch,
            pair_cost=self.run.pair_cost,
            **sizes,
        )
        return pack_step(groups, plan, multiple_of=world.padding_multiple, **sizes)

    def _batch(self, step: int) -> list[Group]:
        return [self.train_groups[i] for i in self.run.batch(step, self.cfg.data.shuffle)]

    def _score(self, groups: list[Group]) -> list[list[float]]:
        budget = self.cfg.steerlm2.max_tokens_per_microbatch
        return score_groups(self.model, groups, self.run.world, max_tokens_per_microbatch=budget)

    def _scored(self, dataset: SteerLM2Dataset, key: str) -> list[Group]:
        """The groups with log-probs and target weights, stored or from the start weights."""
        if self.cfg.steerlm2.score_with_start_model:
            self.run.at("scoring with the start weights", patience=math.inf)
            log_p, log_q = self._score(dataset.without_label()), self._score(dataset.groups)
            groups = [
                with_log_probs(group, log_p_response=p, log_q=q)
                for group, p, q in zip(dataset.groups, log_p, log_q, strict=True)
            ]
            return self._as_sampled(groups, dataset, key)
        if any(group.weights is None for group in dataset.groups):
            raise ValueError(
                f"`{key}` has no log P(y|x) and log Q'(y|a,x): run score_responses on it, or set "
                "steerlm2.score_with_start_model=true if the start weights are both the P and the "
                "Q' of this run"
            )
        return self._as_sampled(dataset.groups, dataset, key)

    def _as_sampled(self, groups: list[Group], dataset: SteerLM2Dataset, key: str) -> list[Group]:
        """The groups with what the loss needs to know of how they were sampled."""
        options = self.cfg.steerlm2
        rules = SamplingRules(
            baseline=getattr(self.loss_fn, "baseline", 1.0),
            samples_per_prompt=getattr(self.loss_fn, "samples_per_prompt", None),
            use_sampler_log_probs=options.use_sampler_log_probs,
            assume_samples_of_q=options.assume_samples_of_q,
            log_q_tolerance=options.log_q_tolerance,
        )
        drawn = ", as data.sample drew them" if key == "dataset" and self.cfg.data.sample else ""
        where = f"`{key}` ({getattr(self.cfg, key).get('source', 'without a file')}{drawn})"
        sampled, warnings = as_sampled(groups, dataset.records, rules, where)
        for warning in warnings:
            self.run.say(warning)
        return sampled

    def _loss(self, logps_N: Tensor, targets: Targets) -> Tensor:
        if not len(targets.sizes_G):  # of a rank without a group: a mean of nothing may be nan
            return logps_N.sum()
        assert targets.log_q_N is not None
        assert targets.w_N is not None
        drawn = {} if targets.drawn_G is None else {"drawn_G": targets.drawn_G}
        return self.loss_fn(
            logps_N,
            targets.log_q_N,
            targets.w_N,
            targets.sizes_G,
            targets.response_lengths_N,
            **drawn,
        )

    def _metric_sums(self, logps_N: Tensor, groups: list[Group]) -> Tensor:
        """Sums over groups of the loss and of METRIC_NAMES."""
        targets = targets_of(groups).to(self.run.world.device)
        loss_sum = self._loss(logps_N, targets) * len(groups)
        assert targets.log_q_N is not None
        assert targets.w_N is not None
        sums = metric_sums(logps_N, targets.log_q_N, targets.w_N, targets.sizes_G, targets.drawn_G)
        return torch.cat([loss_sum[None], sums])

    def _check_drift(self) -> None:
        """Before the first update Q_theta is Q': its log-probs must be the stored ones."""
        groups = self._batch(1)
        scores = self._score(groups)
        check_finite([logp for logps in scores for logp in logps], "log-probs", "the start model")
        drifts = [
            abs(logp - log_q) / len(response)
            for group, logps in zip(groups, scores, strict=True)
            for logp, log_q, response in zip(logps, group.log_q or (), group.responses, strict=True)
        ]
        mean, worst = sum(drifts) / len(drifts), max(drifts)
        self.run.say(
            f"log Q' drift on the first batch: mean {mean:.2g}, max {worst:.2g} nats a token"
        )
        tolerance = self.cfg.steerlm2.log_q_tolerance
        if not mean <= tolerance:
            raise ValueError(
                f"the start weights give log-probs that differ from the stored log(Q(y|a,x)) by "
                f"{mean:.3g} nats per token (max {worst:.3g}), more than "
                f"steerlm2.log_q_tolerance={tolerance}. Likely causes: another checkpoint, "
                "template, tokenizer or system prompt than the one that scored the data, or "
                "log-probs taken from a sampler (they are tempered, or renormalised by top-p). "
                "Score the data again with score_responses and this checkpoint."
            )


@recipe_main(SteerLM2Config)
def main(cfg: SteerLM2Config) -> None:
    with TrainingRun(cfg) as run:
        recipe = SteerLM2Recipe(cfg, run)
        recipe.setup()
        recipe.train()
        if not run.stopped:
            recipe.export()


if __name__ == "__main__":
    main()
