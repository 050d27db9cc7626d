"""Fine-tuning and Bradley-Terry training of one Hugging Face model, ours against TRL, on a CPU.

    python3 -m venv trl && trl/bin/pip install torch==2.13.0 trl
    python tests/benchmarks/against_trl.py --trl-python trl/bin/python --json FILE

One model (`Model`), one set of conversations and one of pairs, made of words of the tiny tokenizer.
Our data sets tokenise them; TRL gets the same token ids with the same targets, ready-made, so that
neither side tokenises while it is measured. Both train in float32 with the same AdamW, without
activation checkpointing, one pass over the data in their order:

    ours       `tune run sft_distributed --config any/sft`, `reward_distributed --config any/reward`
    8          TRL, micro-batches of 8 padded rows (its default); of 8 pairs, 16 rows, for rewards
    1          TRL, micro-batches of one row, hence without padding; of one pair
    packed     TRL, `packing=True` with rows of `--packed-row` tokens; it has no packing of pairs

The ways take turns, each side in a process of its own, and ratios are of the medians over the
rounds. What is measured is the training loop: no imports, no tokenising, no export. Tokens per
second are of CPU time and don't count padding; a pair's prompt counts twice, whoever computes it
once. Peak memory is above what the process had before: weights are not in it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from trl_training import Json, measured, work

from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.datasets import attribute_dataset, dialogue_dataset

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("a", "the", "of", "and", "is", "to", "it", "has", "you", "for", "this", "capital", "good")
"""Each is one token of the tiny tokenizer."""
WAYS = {"sft": ("ours", "8", "1", "packed"), "reward": ("ours", "8", "1")}
LOSS_TOLERANCE = 1e-4
"""Of the first step's losses, relative."""


@dataclass(frozen=True)
class Model:
    """33.6M parameters with 8 layers, 4.2M of them embeddings and as many the output matrix."""

    vocab_size: int = 8192
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4


# The data, the same for both


def conversation(rng: random.Random, question: str, label: str | None = None) -> Json:
    """A question with an answer of 64 to 448 words, in the conversation format."""
    answer = words(rng, rng.randint(64, 448))
    turns = [
        {"from": "User", "value": question, "label": None},
        {"from": "Assistant", "value": answer, "label": label},
    ]
    return {"system": "Answer.", "mask": "User", "conversations": turns}


def words(rng: random.Random, number: int) -> str:
    return " ".join(rng.choices(WORDS, k=number))


def write_data(folder: Path, records: int) -> None:
    """sft.jsonl with conversations, reward.jsonl with half as many pairs; the first is preferred.

    Beside them sft.json and reward.json, the same as token ids for TRL.
    """
    rng = random.Random(0)
    questions = [words(rng, rng.randint(32, 256)) for _ in range(records)]
    singles = [conversation(rng, question) for question in questions]
    pairs = [
        conversation(rng, question, "preference:-1")
        for question in questions[: records // 2]
        for _ in range(2)
    ]
    for task, rows in (("sft", singles), ("reward", pairs)):
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{task}.json").write_text(json.dumps(token_ids(folder, task)))


def token_ids(folder: Path, task: str) -> list[Json]:
    """What our data set makes of a file, as TRL takes ready-made token ids."""
    source, tokenizer = str(folder / f"{task}.jsonl"), tiny_tokenizer()
    if task == "reward":
        groups = attribute_dataset(tokenizer, source=source, max_seq_len=4096, pairs=True).groups
        return [
            {
                "chosen_ids": [*group.prompt, *group.responses[0]],
                "rejected_ids": [*group.prompt, *group.responses[1]],
            }
            for group in groups
        ]
    dialogues = dialogue_dataset(
        tokenizer, source=source, max_seq_len=4096, use_labels=False
    ).dialogues
    return [
        {
            "input_ids": list(dialogue.tokens),
            "completion_mask": [
                int(position in set(dialogue.target_positions))
                for position in range(len(dialogue.tokens))
            ],
        }
        for dialogue in dialogues
    ]


def num_tokens(records: Sequence[Json]) -> int:
    """Tokens without padding, a pair's prompt counted twice."""
    return sum(len(ids) for record in records for key, ids in record.items() if "ids" in key)


def write_models(folder: Path, model: Model) -> None:
    """The language model, and the same with a fresh head for one score."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id, "bos_token_id": None}
    config = LlamaConfig(**vars(model), **ids, max_position_embeddings=4096)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    config.num_labels, config.problem_type = 1, "regression"
    config.id2label, config.label2id = {0: "helpfulness"}, {"helpfulness": 0}
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward_model")
    for name in ("model", "reward_model"):
        tokenizer.save(folder / name)


# Our side


def train_ours(folder: Path, task: str, way: str, settings: Json) -> Json:
    """What `tune run` does from setup to the last step; the loop is measured."""
    sys.path += [str(ROOT / "recipes"), str(ROOT / "tests" / "recipes")]
    import reward_distributed
    import sft_distributed
    from ready_made import recipe_config
    from steerlm2.training.run import TrainingRun

    torch.set_num_threads(settings["threads"])
    recipe, config, model, *more = {
        "sft": ("sft_distributed", "any/sft", "model"),
        "reward": (
            *("reward_distributed", "any/reward", "reward_model"),
            *("schema.names=[helpfulness]", "loss=regular_bt", "load_reward_head=true"),
        ),
    }[task]
    with tempfile.TemporaryDirectory() as output_dir:
        cfg = recipe_config(
            *(recipe, config, f"output_dir={output_dir}", *more),
            *(f"checkpointer.checkpoint_dir={folder / model}", "dataset_val=null"),
            *("template=steerlm2.data.extra_id_template", f"dataset.source={folder}/{task}.jsonl"),
            *("device=cpu", "dtype=fp32", "param_dtype=null", "save_dtype=null", "compile=false"),
            *("enable_activation_checkpointing=false", "val_every_n_steps=null", "export=last"),
            *("save_every_n_steps=null", "data.shuffle=false", "epochs=1", f"lr={settings['lr']}"),
            *("lr_scheduler.warmup_steps=0", "optimizer.fused=true"),
            f"optimizer.betas={settings['betas']}",
            f"optimizer.weight_decay={settings['weight_decay']}",
            *(f"{key}={settings[key]}" for key in ("global_batch_size", "clip_grad_norm")),
            f"max_tokens_per_microbatch={settings['max_tokens_per_microbatch']}",
        )
        recipes = {"sft": sft_distributed.SFTRecipe, "reward": reward_distributed.RewardRecipe}
        with TrainingRun(cfg) as run:
            trained = recipes[task](cfg, run)
            trained.setup()

            def train() -> list[float]:
                trained.train()
                return [entry["loss"] for entry in run.metrics.read() if "loss" in entry]

            found = measured(train)
    return {"step_0": found["losses"][0], **found}


# The comparison


class Worker:
    """A process that trains one way or the other, over and over (`trl_training.work`)."""

    def __init__(self, *command: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def train(self, *task: object) -> Json:
        """The answer is its last line: libraries print others before it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"step_0"'):
                return json.loads(line)
        raise SystemExit(f"a process of {self.process.args} ended")

    def close(self) -> None:
        self.process.communicate()


def summary(runs: dict[str, list[Json]], tokens: int) -> list[Json]:
    """A row for each way: medians over its runs, and their ratios to ours.

    Raises:
        AssertionError: where the first losses of a way aren't ours.
    """
    rows = []
    ours = runs["ours"]
    for way, own in runs.items():
        step_0, expected = own[0]["step_0"], ours[0]["step_0"]
        difference = abs(step_0 - expected) / abs(expected)
        assert difference <= LOSS_TOLERANCE, f"{way}: the first loss is {step_0}, not {expected}"
        row: Json = {"way": way, "step_0": step_0}
        # A process that has trained before keeps memory, which a later peak isn't above.
        middle = {"cpu_seconds": statistics.median, "wall_seconds": statistics.median}
        for key, of in (middle | {"peak_bytes": max}).items():
            row[key] = of([each[key] for each in own])
            row[f"{key}_ratio"] = row[key] / of([each[key] for each in ours])
        row["tokens_per_cpu_second"] = tokens / row["cpu_seconds"]
        rows.append(row)
    return rows


def table(task: str, rows: Sequence[Json]) -> str:
    lines = [
        f"| {task} | step 0 loss | CPU s | / ours | tokens / CPU s | peak MB | / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["way"] if row["way"] in ("ours", "packed") else f"rows of {row['way']}"
        lines.append(
            f"| {name} | {row['step_0']:.6f} | {row['cpu_seconds']:.1f} "
            f"| {row['cpu_seconds_ratio']:.2f} | {row['tokens_per_cpu_second']:.0f} "
            f"| {row['peak_bytes'] / 1e6:.0f} | {row['peak_bytes_ratio']:.2f} |"
        )
    return "\n".join(lines)


def compare(args: argparse.Namespace, folder: Path) -> Json:
    write_data(folder, args.records)
    write_models(folder, Model(num_hidden_layers=args.layers))
    settings = {
        "lr": 1e-5,
        "betas": [0.9, 0.98],
        "weight_decay": 0.01,
        "clip_grad_norm": 1.0,
        "global_batch_size": args.batch,
        "max_tokens_per_microbatch": args.max_tokens_per_microbatch,
        "packed_row": args.packed_row,
        "threads": args.threads,
    }
    ours = Worker(sys.executable, __file__, "--worker")
    trl = Worker(args.trl_python, str(Path(__file__).with_name("trl_training.py")))
    found: Json = {"settings": settings, "records": args.records}
    for task in args.tasks:
        runs: dict[str, list[Json]] = {way: [] for way in WAYS[task]}
        for _ in range(args.rounds):
            for way, own in runs.items():
                worker = ours if way == "ours" else trl
                own.append(worker.train(str(folder), task, way, settings))
                shown = {key: value for key, value in own[-1].items() if key != "losses"}
                print(task, way, shown, file=sys.stderr, flush=True)
        tokens = num_tokens(json.loads((folder / f"{task}.json").read_text()))
        found[task] = {"tokens": tokens, "rows": summary(runs, tokens), "runs": runs}
        print(f"{tokens} tokens\n{table(task, found[task]['rows'])}", flush=True)
    ours.close()
    trl.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trl-python", help="of an environment with TRL")
    parser.add_argument("--records", type=int, default=64, help="conversations; half as many pairs")
    parser.add_argument("--layers", type=int, default=Model.num_hidden_layers)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-tokens-per-microbatch", type=int, default=2048, help="ours")
    parser.add_argument("--packed-row", type=int, default=1024, help="tokens of TRL's packed rows")
    parser.add_argument("--tasks", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=16, help="records of an optimizer step")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(train_ours)
        return
    if not args.trl_python:
        parser.error("--trl-python is needed: a Python that TRL is installed for")
    with tempfile.TemporaryDirectory() as folder:
        found = compare(args, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
