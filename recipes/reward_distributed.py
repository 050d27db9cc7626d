"""Attribute models: a decoder with a linear head that scores a response on every attribute.

Regression on human labels (HelpSteer2 paper, section 3), or Bradley-Terry on preferences
(HelpSteer2-Preference paper), where the reward is one attribute's score. The scores are
read at the last token of the text, the one that would begin a label:

    [system, turns, response, label start] -> hidden state -> head -> one score an attribute

    tune run reward_distributed --config tiny/reward
    tune run --nproc_per_node 8 reward_distributed --config llama2/13B_reward

One file for every world size: alone it is one process on a CPU or GPU, under torchrun arguments
FSDP2 x tensor parallel with replicas. `train` is the algorithm; what surrounds its steps is
`steerlm2.training.run.TrainingRun`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steerlm2.attributes import as_schema, schema_argument
from steerlm2.config.completion import (
    complete_model,
    complete_schema,
    complete_schema_from_data,
)
from steerlm2.config.keys import TrainingKeys, at_least_one, schema_problems
from steerlm2.config.loader import Component, instantiate
from steerlm2.data.packing import PackedRewardGroups, RewardGroup, pack_for_reward
from steerlm2.datasets import RewardDataset
from steerlm2.distributed.parallelize import clip_gradients, reduce_gradients
from steerlm2.evaluation.agreement import (
    attribute_calibration,
    attribute_metrics,
    mean_baseline,
    preference_calibration,
    preference_metrics,
    table_text,
)
from steerlm2.facts import ModelFacts
from steerlm2.losses import bradley_terry_sum, num_labelled, squared_error_sum
from steerlm2.runs.entry import recipe_main
from steerlm2.training.forward import attribute_scores, score_attributes
from steerlm2.training.run import TrainingRun
from steerlm2.training.setup import (
    RewardHeadOptions,
    build_model,
    build_optimizer,
    lay_out_model,
)
from steerlm2.training.step_plan import StepBatches, microbatches_by_rank


@dataclass(kw_only=True)
class RewardConfig(TrainingKeys):
    """What an attribute model has beside the keys of every training run."""

    loss: Literal["regression", "regular_bt", "margin_bt", "scaled_bt"] = "regression"
    """Squared error on labels (attributes with ranges of different widths weigh alike: errors are
    scaled to their mean width), or Bradley-Terry on pairs: without the preference's strength, with
    it as a margin, or as a factor."""
    schema: dict[str, Any] | None = None
    """The attributes, in the order of labels: {formality: [0, 10], length: [1, 5]}, each with its
    lowest and highest value, or those that share a range, {names: [...], min_value: 0, max_value:
    4}; null: those that the training data were written with, or the default nine, from 0 to 4. On
    the command line schema={...} replaces it, and schema.names=[...] changes the second form."""
    reward_attribute: str = "helpfulness"
    """Attribute whose score is the reward of the Bradley-Terry losses."""
    load_reward_head: bool = False
    """Start with the head of a checkpoint that has one; false: with a fresh head."""
    max_tokens_per_microbatch: int = 4096
    """Token budget of a micro-batch."""

    TAKEN: ClassVar[dict[str, str]] = {"template": "template", "schema": "schema", "pairs": "loss"}

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        found = list(complete_model(values))
        if values.get("load_reward_head"):
            found += complete_schema(values, values, "equal")
        return [*found, *complete_schema_from_data(values)]

    def problems(self) -> list[str]:
        found = super().problems()
        if self.val_every_n_steps and not self.dataset_val:
            found.append("'val_every_n_steps' needs 'dataset_val'")
        if self.load_reward_head and self.checkpointer is None:
            found.append("'load_reward_head' needs a 'checkpointer'")
        if not list(schema_problems(self.schema)):
            schema = as_schema(self.schema)
            names = schema.names
            if self.loss != "regression" and self.reward_attribute not in names:
                found.append(
                    f"'reward_attribute' must be one of schema.names ({', '.join(names)}), got "
                    f"{self.reward_attribute!r}"
                )
            elif self.loss != "regression" and len(names) > 1 and not self.load_reward_head:
                found.append(
                    f"loss={self.loss} trains the score of {self.reward_attribute} alone, the "
                    "others of a fresh head would be noise: set "
                    f"{schema_argument(schema.select([self.reward_attribute]))}, or "
                    "load_reward_head=true"
                )
        return [*found, *at_least_one(self, "max_tokens_per_microbatch")]


class RewardRecipe:
    """An attribute model: setup -> train (with validate) -> export."""

    def __init__(self, cfg: RewardConfig, run: TrainingRun) -> None:
        self.cfg, self.run = cfg, run
        self.schema = as_schema(cfg.schema)

    def setup(self) -> None:
        cfg, run, world = self.cfg, self.run, self.run.world
        self.tokenizer, self.template = instantiate(cfg.tokenizer), instantiate(cfg.template)
        self.train_set = self._dataset(cfg.dataset)
        if cfg.loss == "regression" and not cfg.load_reward_head:
            self.train_set.refuse_unlabelled(self.schema)
        self.val_set = self._dataset(cfg.val_data) if cfg.val_data else None
        run.plan(len(self.train_set))

        longest = max(data.longest() for data in (self.train_set, self.val_set) if data)
        num_attributes = len(self.schema.names)
        self.model = build_model(cfg, longest=longest, num_attributes=num_attributes)
        head = RewardHeadOptions(self.template, self.schema, cfg.load_reward_head)
        self.checkpointer = lay_out_model(cfg, self.model, self.tokenizer, world, head)
        self.optimizer, self.lr_scheduler = build_optimizer(cfg, self.model, run.total_steps)
        self.calibrations = run.json_lines("calibration.jsonl")
        pairwise = cfg.loss != "regression"
        data_state: dict[str, Any] = {
            "groups": len(self.train_set),
            "tokens": sum(group.num_tokens for group in self.train_set.groups),
            "shuffle": cfg.data.shuffle,
            "attributes": list(self.schema.names),
            "loss": cfg.loss,
            "reward_attribute": cfg.reward_attribute if pairwise else "",
        }
        if self.schema.shared_range is None:
            data_state["error_scales"] = list(self.schema.error_scales)
        data = self.train_set.groups, self.val_set.groups if self.val_set else []
        run.begin(self.model, self.optimizer, self.lr_scheduler, data_state, *data)
        val_summary = self.val_set.summary(self.schema) if self.val_set else ""
        train_summary = self.train_set.summary(self.schema)
        run.describe(train_summary, val_summary, "pairs" if pairwise else "texts")
        run.say(f"reward head: {'of the checkpoint' if cfg.load_reward_head else 'fresh'}")

    def train(self) -> None:
        """Every optimizer step, from the groups to the log line."""
        cfg, run, world = self.cfg, self.run, self.run.world
        if run.validates_at_start():
            self.validate(run.first_step)
        with run.steps(self.prepare) as steps:
            for step, work in steps:
                # Every rank knows the whole step's number of labels (or pairs): a micro-batch's
                # sum divided by it is that micro-batch's part of the step's mean.
                count = self._loss_count(work.records)
                loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
                for i, batch in enumerate(work.micro_batches):
                    run.at(f"step {step}, micro-batch {i + 1}")
                    last = i + 1 == len(work.micro_batches)
                    reduce_gradients(self.model, world, last, cfg.fsdp_reduce_every_microbatch)
                    batch = batch.to(world.device)
                    scores_NA = attribute_scores(self.model, batch)
                    loss = self._loss_sum(scores_NA, batch.labels_NA, batch.strength_G) / count
                    # FSDP2 takes the mean over the data-parallel ranks.
                    (loss * world.dp_size).backward()
                    loss_sum += loss.detach()

                grad_norm = clip_gradients(self.model.parameters(), cfg.clip_grad_norm)
                due = run.due(step, grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.lr_scheduler.step()

                if due.log:
                    run.log(step, {"loss": world.sum(loss_sum).item()}, shown=("loss",))
                if due.save:
                    run.save(step)
                if due.validate:
                    self.validate(step)

    def validate(self, step: int) -> None:
        """Loss, agreement with the labels and calibration."""
        cfg, world = self.cfg, self.run.world
        assert self.val_set is not None
        limit = (cfg.limit_val_batches or len(self.val_set)) * cfg.global_batch_size
        groups = self.val_set.groups[:limit]
        with self.run.validation(step):
            budget = cfg.max_tokens_per_microbatch
            scored = score_attributes(self.model, groups, world, max_tokens_per_microbatch=budget)
        scores_NA = torch.tensor([scores for group in scored for scores in group])
        labels_NA = torch.tensor(_labels(groups), dtype=torch.float64)
        strength_P = torch.tensor([group.strength or 0.0 for group in groups], dtype=torch.float64)
        loss_sum = self._loss_sum(scores_NA, labels_NA, strength_P)
        # Rank 0's: what follows from it must not differ between ranks in the last bit.
        metrics = {"loss": world.from_main(loss_sum.item()) / self._loss_count(groups)}
        if cfg.loss == "regression":
            scores, labels = scores_NA.tolist(), labels_NA.tolist()
            metrics |= attribute_metrics(scores, labels, self.schema)
            metrics |= mean_baseline(_labels(self.train_set.groups), labels, self.schema)
            calibration = attribute_calibration(scores, labels, self.schema)
        else:
            rewards_P2 = scores_NA[:, self._reward_index()].view(-1, 2).tolist()
            metrics |= preference_metrics(rewards_P2, strength_P.tolist())
            calibration = preference_calibration(rewards_P2, strength_P.tolist())
        if world.is_main:
            self.calibrations.append({"step": step, "calibration": calibration})
        self.run.log_validation(step, metrics)

    def export(self) -> None:
        """The weights as a Hugging Face sequence classifier, and the run's results."""
        template = self.cfg.template
        facts = ModelFacts(kind="attribute model", template=template, schema=self.schema)
        data = "labels" if self.cfg.loss == "regression" else "preferences"
        method = f"attribute model ({self.cfg.loss} on {data})"
        step = self.run.export(self.model, self.checkpointer, facts, method=method)
        tables = {entry["step"]: entry["calibration"] for entry in self.calibrations.read()}
        calibration = table_text(tables[step]) if step in tables else ""
        table = ("loss", "grad_norm", "lr")
        self.run.report(step, table=table, curves=("loss",), calibration=calibration)

    # Helpers

    def _dataset(self, component: Component) -> RewardDataset:
        arguments: dict[str, Any] = {"template": self.template, "schema": self.schema}
        if self.cfg.loss != "regression":
            arguments["pairs"] = True
        return instantiate(component, self.tokenizer, **arguments)

    def prepare(self, step: int) -> StepBatches[RewardGroup, PackedRewardGroups]:
        """A step's groups of all ranks, and this rank's micro-batches of them."""
        world, budget = self.run.world, self.cfg.max_tokens_per_microbatch
        indices = self.run.batch(step, self.cfg.data.shuffle)
        groups = [self.train_set.groups[i] for i in indices]
        by_rank = microbatches_by_rank(groups, world.dp_size, budget, self.run.pair_cost)
        own = [
            pack_for_reward(part, multiple_of=world.padding_multiple)
            for part in by_rank[world.dp_rank]
        ]
        return StepBatches(groups, own)

    def _reward_index(self) -> int:
        return self.schema.names.index(self.cfg.reward_attribute)

    def _loss_count(self, groups: Sequence[RewardGroup]) -> int:
        """What the loss is a mean over: the labels of these groups, or the pairs."""
        if self.cfg.loss != "regression":
            return len(groups)
        return num_labelled(torch.tensor(_labels(groups)))

    def _loss_sum(
        self, scores_NA: Tensor, labels_NA: Tensor | None, strength_P: Tensor | None
    ) -> Tensor:
        kind = self.cfg.loss
        if kind == "regression":
            assert labels_NA is not None
            scale_A = scores_NA.new_tensor(self.schema.error_scales, dtype=torch.float64)
            return squared_error_sum(scores_NA, labels_NA, scale_A)
        assert strength_P is not None
        return bradley_terry_sum(scores_NA[:, self._reward_index()], strength_P, kind)


def _labels(groups: Sequence[RewardGroup]) -> list[Sequence[float]]:
    return [labels for group in groups for labels in group.labels or ()]


@recipe_main(RewardConfig)
def main(cfg: RewardConfig) -> None:
    with TrainingRun(cfg) as run:
        recipe = RewardRecipe(cfg, run)
        recipe.setup()
        recipe.train()
        if not run.stopped:
            recipe.export()


if __name__ == "__main__":
    main()
