"""Supervised fine-tuning, plain or attribute-conditioned: P(y|x) and Q'(y|a,x) of SteerLM.

Next-token prediction on the assistant's text and its stop token. With `dataset.use_labels=true` a
response's label stands in its prompt, and the model learns to answer under a label: the proposal
Q'(y|a,x) of SteerLM 2.0. Without, it is the P(y|x) of its target weights (HelpSteer2 paper,
section 4.5).

    tune run sft_distributed --config tiny/sft
    tune run --nproc_per_node 8 sft_distributed --config llama3_1/8B_acsft lr=5e-6

The loss is the mean over all target tokens of a step, on all ranks. One file for every world size:
alone it is one process on a CPU or GPU, under torchrun arguments FSDP2 x tensor parallel with
replicas. `train` is the algorithm; what surrounds its steps is
`steerlm2.training.run.TrainingRun`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerlm2.checkpoints.side_files import TrainedText
from steerlm2.config.keys import GenerationOptions, TrainingKeys, at_least_one
from steerlm2.config.loader import Component, instantiate
from steerlm2.data.packing import Dialogue, PackedDialogues, pack_dialogues
from steerlm2.data.templates import response_end
from steerlm2.datasets import DialogueDataset, language_model_facts
from steerlm2.distributed.parallelize import clip_gradients, reduce_gradients
from steerlm2.inference.validation_answers import ValidationAnswers
from steerlm2.runs.entry import recipe_main
from steerlm2.training.forward import target_logps
from steerlm2.training.run import TrainingRun
from steerlm2.training.setup import build_model, build_optimizer, lay_out_model
from steerlm2.training.step_plan import StepBatches, microbatches_by_rank


@dataclass(kw_only=True)
class SFTConfig(TrainingKeys):
    """What fine-tuning has beside the keys of every training run."""

    max_tokens_per_microbatch: int = 4096
    """Token budget of a micro-batch."""
    generation: GenerationOptions | None = None
    """Answers to sample at every validation; null: none."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.val_every_n_steps and not self.dataset_val:
            found.append("'val_every_n_steps' needs 'dataset_val'")
        if self.generation:
            found += self.generation.problems()
            if not self.val_every_n_steps:
                found.append("'generation' needs 'val_every_n_steps'")
        return [*found, *at_least_one(self, "max_tokens_per_microbatch")]


class SFTRecipe:
    """P(y|x) or Q'(y|a,x): setup -> train (with validate) -> export."""

    def __init__(self, cfg: SFTConfig, run: TrainingRun) -> None:
        self.cfg, self.run = cfg, run

    def setup(self) -> None:
        cfg, run, world = self.cfg, self.run, self.run.world
        self.tokenizer, self.template = instantiate(cfg.tokenizer), instantiate(cfg.template)
        self.stop_id = response_end(self.template, self.tokenizer)[1]
        self.train_set = self._dataset(cfg.dataset)
        self.val_set = self._dataset(cfg.val_data) if cfg.val_data else None
        self.facts = language_model_facts(self.train_set.conversations, cfg.template, cfg.schema)
        conversations = self.val_set.conversations if self.val_set else []
        self.answers = ValidationAnswers(
            cfg.generation,
            self.template,
            self.tokenizer,
            conversations,
            run.json_lines("samples.jsonl"),
        )
        run.plan(len(self.train_set))

        longest = [data.longest() for data in (self.train_set, self.val_set) if data]
        self.model = build_model(cfg, longest=max([*longest, self.answers.longest]))
        self.checkpointer = lay_out_model(cfg, self.model, self.tokenizer, world)
        self.optimizer, self.lr_scheduler = build_optimizer(cfg, self.model, run.total_steps)
        dialogues = self.train_set.dialogues
        data_state = {
            "dialogues": len(dialogues),
            "tokens": sum(dialogue.num_tokens for dialogue in dialogues),
            "targets": sum(len(dialogue.target_positions) for dialogue in dialogues),
            "shuffle": cfg.data.shuffle,
        }
        data = dialogues, self.val_set.dialogues if self.val_set else []
        run.begin(self.model, self.optimizer, self.lr_scheduler, data_state, *data)
        val_summary = self.val_set.summary() if self.val_set else ""
        run.describe(self.train_set.summary(), val_summary, "conversations")

    def train(self) -> None:
        """Every optimizer step, from the conversations to the log line."""
        cfg, run, world = self.cfg, self.run, self.run.world
        if run.validates_at_start():
            self.validate(run.first_step)
        with run.steps(self.prepare) as steps:
            for step, work in steps:
                # Every rank knows the whole step's number of targets: a micro-batch's sum divided
                # by it is that micro-batch's part of the step's mean.
                num_targets = sum(len(dialogue.target_positions) for dialogue in work.records)
                loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
                for i, batch in enumerate(work.micro_batches):
                    run.at(f"step {step}, micro-batch {i + 1}")
                    last = i + 1 == len(work.micro_batches)
                    reduce_gradients(self.model, world, last, cfg.fsdp_reduce_every_microbatch)
                    logps_R = target_logps(self.model, batch.to(world.device), world)
                    loss = -logps_R.double().sum() / num_targets
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
        """Loss on validation conversations, and answers to a few of them."""
        cfg, run, world = self.cfg, self.run, self.run.world
        assert self.val_set is not None
        with run.validation(step):
            limit = (cfg.limit_val_batches or len(self.val_set)) * cfg.global_batch_size
            dialogues = self.val_set.dialogues[:limit]
            loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
            for batch in self._own_micro_batches(dialogues):
                loss_sum -= target_logps(self.model, batch.to(world.device), world).double().sum()
            num_targets = sum(len(dialogue.target_positions) for dialogue in dialogues)
            metrics = {"loss": world.sum(loss_sum).item() / num_targets}
            metrics |= self.answers.sample(self.model, world, step=step, seed=cfg.seed)
        run.log_validation(step, metrics)

    def export(self) -> None:
        """The weights as Hugging Face safetensors, and the run's table and plot."""
        text = TrainedText(self.tokenizer, self.template, self.stop_id)
        is_labelled = self.facts.default_label is not None
        method = "attribute-conditioned fine-tuning" if is_labelled else "supervised fine-tuning"
        step = self.run.export(self.model, self.checkpointer, self.facts, text, method=method)
        self.run.report(step, table=("loss", "grad_norm", "lr"), curves=("loss",))

    # Helpers

    def _dataset(self, component: Component) -> DialogueDataset:
        return instantiate(component, self.tokenizer, template=self.template)

    def prepare(self, step: int) -> StepBatches[Dialogue, PackedDialogues]:
        """A step's dialogues of all ranks, and this rank's micro-batches of them."""
        indices = self.run.batch(step, self.cfg.data.shuffle)
        dialogues = [self.train_set.dialogues[i] for i in indices]
        return StepBatches(dialogues, self._own_micro_batches(dialogues, self.run.pair_cost))

    def _own_micro_batches(
        self, dialogues: list[Dialogue], pair_cost: float = 0
    ) -> list[PackedDialogues]:
        world, budget = self.run.world, self.cfg.max_tokens_per_microbatch
        by_rank = microbatches_by_rank(dialogues, world.dp_size, budget, pair_cost)
        return [
            pack_dialogues(own, multiple_of=world.padding_multiple)
            for own in by_rank[world.dp_rank]
        ]


@recipe_main(SFTConfig)
def main(cfg: SFTConfig) -> None:
    with TrainingRun(cfg) as run:
        recipe = SFTRecipe(cfg, run)
        recipe.setup()
        recipe.train()
        if not run.stopped:
            recipe.export()


if __name__ == "__main__":
    main()
