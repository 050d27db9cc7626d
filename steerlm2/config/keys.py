"""The keys that recipes share: a recipe's config class inherits them, flat as in torchtune.

    ModelKeys -> DistributedKeys -> TrainingKeys
                                 -> InferenceKeys -> SamplingKeys
                                                  -> ScoringKeys
              -> ServingKeys
              -> SteeredKeys

Each key is a field with a docstring: `--help` and recipe_configs/KEYS.md are made from them. What a
key may be stands in `problems`, which a recipe's own `problems` extends.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from steerlm2.attributes import (
    DEFAULT_SCHEMA,
    AttributeSchema,
    as_schema,
    parse_label,
    schema_to_json,
)
from steerlm2.checkpoint_dirs import resolve_checkpoint_dir
from steerlm2.config.completion import (
    CHECKPOINTER,
    MODEL,
    SchemaRule,
    complete_model,
    complete_schema,
    complete_schema_from_data,
)
from steerlm2.config.loader import Component, to_plain
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT

ActivationCheckpointing = Literal["full", "selective"]
"""What of a layer the backward computes again: all, or all but matrix products and attention."""


DEFAULT_OUTPUTS = "./steerlm2_outputs/mine"
"""`outputs` of any/*."""


def default_template() -> Component:
    return Component(_component_="steerlm2.data.extra_id_template")


def default_schedule() -> Component:
    return Component(_component_="steerlm2.training.warmup_cosine_hold")


def at_least_one(config: object, *names: str, section: str = "") -> Iterator[str]:
    """Which of a config's whole numbers are below 1; None is none.

    Args:
        section: where they stand in the YAML, with a point at its end.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            yield f"'{section}{name}' must be at least 1, got {value}"


def above_zero(config: object, *names: str, section: str = "") -> Iterator[str]:
    """Which of a config's numbers aren't above 0; arguments as of `at_least_one`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            yield f"'{section}{name}' must be above 0, got {value}"


def host_problems(hosts: Iterable[str]) -> Iterator[str]:
    """What is wrong with `allowed_hosts`."""
    for host in hosts:
        try:
            fits = bool(ipaddress.ip_network(host, strict=False))
        except ValueError:
            fits = host == "*" or re.fullmatch(r"(\*\.)?[\w.-]+", host) is not None
        if not fits:
            yield (
                f"'allowed_hosts' has {host!r}: give names without a port (reward.example, "
                '*.example, "*" for all), addresses, or networks (10.0.0.0/8)'
            )


def sampling_problems(config: Any, section: str = "") -> Iterator[str]:
    """Problems of `temperature` and `top_p`."""
    if not config.temperature >= 0:
        yield f"'{section}temperature' must be at least 0, got {config.temperature}"
    if not 0 < config.top_p <= 1:
        yield f"'{section}top_p' must be above 0 and at most 1, got {config.top_p}"


def schema_problems(schema: dict[str, Any] | None) -> Iterator[str]:
    """Problems of a `schema:` section."""
    try:
        as_schema(schema)
    except (ValueError, TypeError) as error:
        yield f"'schema': {error}"


def settings_of(config: Any, keys: Iterable[str]) -> dict[str, Any]:
    """The plain values of these keys, on which an output depends.

    Schemas are alike where they are equal, in whatever form they are given; their order counts.
    """
    plain = to_plain(config)
    schema = as_schema(plain["schema"])
    plain["schema"] = None if schema == DEFAULT_SCHEMA else schema_to_json(schema)
    return {key: plain[key] for key in keys}


def outputs_problems(config: Any) -> Iterator[str]:
    """Whether `outputs` is given to a config that has no ${outputs}."""
    given = config.outputs
    if given is None or Path(given) == Path(DEFAULT_OUTPUTS):
        return
    others = {key: value for key, value in to_plain(config).items() if key != "outputs"}
    if not any(Path(text).is_relative_to(given) for text in _texts(others)):
        yield f"'outputs' is {given}, but no path of this config is in it: set the paths themselves"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def output_problems(source: str, output: str) -> Iterator[str]:
    """Problems of the keys `input` and `output` of a recipe that writes in slices."""
    if Path(source).absolute() == Path(output).absolute():
        yield "'output' must be another file than 'input'"
    if Path(output).suffix == ".gz":
        yield "'output' can't be compressed: it is appended to; give a .jsonl name"


def check_checkpoints(config: Any) -> None:
    """Check that the folders of a config's checkpoints are there, but for what a server has.

    Where a whole pipeline is checked before it runs, they aren't yet: this isn't one of `problems`.

    Raises:
        FileNotFoundError: naming all that aren't.
    """
    lacking = []
    for key, folder in _checkpoint_dirs(config, ""):
        try:
            resolve_checkpoint_dir(folder, key)
        except FileNotFoundError as error:
            lacking.append(str(error))
    if lacking:
        raise FileNotFoundError("\n".join(lacking))


def _checkpoint_dirs(section: Any, where: str) -> Iterator[tuple[str, str]]:
    checkpointer = getattr(section, "checkpointer", None)
    served = getattr(section, "server", None) is not None
    if checkpointer and checkpointer["_component_"] == CHECKPOINTER and not served:
        yield f"{where}checkpointer.checkpoint_dir", checkpointer["checkpoint_dir"]
    own = vars(section) if is_dataclass(section) else section
    for name, value in own.items():
        if is_dataclass(value) or name == "models":
            yield from _checkpoint_dirs(value, f"{where}{name}.")


@dataclass(kw_only=True)
class OutputsKeys:
    """Where the runs of any/* meet."""

    outputs: str | None = None
    """Folder of all that belongs to one model, as ${outputs} in the other keys: what a run of any/*
    reads and writes where nothing else is said."""


@dataclass(kw_only=True)
class SchemaKeys:
    """Attributes that a run writes, or asks for."""

    schema: dict[str, Any] | None = None
    """The attributes, in the order of labels: {formality: [0, 10], length: [1, 5]}, each with its
    lowest and highest value, or those that share a range, {names: [...], min_value: 0, max_value:
    4}; null: the default nine, from 0 to 4. On the command line schema={...} replaces it, and
    schema.names=[...] changes the second form."""


@dataclass(kw_only=True)
class ModelKeys(OutputsKeys):
    """A model with its tokenizer and template, and what it is computed on."""

    tokenizer: Component
    """Builder of the tokenizer, e.g. steerlm2.data.hf_tokenizer; left out: the checkpoint's."""
    model: Component
    """Builder of the decoder: steerlm2.models.from_checkpoint, what the checkpoint's config.json
    describes (a Llama, Mistral, Qwen2 or Qwen3), or e.g. torchtune.models.llama3_1.llama3_1_8b,
    which must compute the same; an attribute model's backbone, whose output layer gives way to the
    head; left out: the checkpoint's."""
    template: Component = field(default_factory=default_template)
    """How a conversation becomes tokens: steerlm2.data.extra_id_template, llama3_template or
    chatml_template (Qwen, SmolLM2); left out: as the checkpoint was trained, if an export of ours
    says so, or the one whose control tokens the tokenizer has. A model is used with the template
    it was trained with."""
    checkpointer: Component | None = None
    """Where the weights come from, and where trained ones go; null: fresh weights from `seed`."""
    seed: int = 0
    """Of fresh weights, of the order of the data, and of sampling."""
    device: Literal["cpu", "cuda"] = "cuda"
    """What the model is computed on; a rank takes the GPU of its number on the node."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the computation."""
    compile: bool = False
    """Compile the layers with torch.compile."""

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        """Fill in what the values leave out and the checkpoint says; problems with what is given.

        Args:
            values: of the whole config, not checked yet.
        """
        return list(complete_model(values))

    def problems(self) -> list[str]:
        """Problems between keys that are right by themselves."""
        return list(outputs_problems(self))


@dataclass(kw_only=True)
class DistributedKeys(ModelKeys):
    """How a model is laid out over processes, and how the processes are watched."""

    tensor_parallel_dim: int = 1
    """Ranks that split each matrix; best kept within a node."""
    data_parallel_replicate_dim: int = 1
    """Replicas of the sharded model (HSDP)."""
    data_parallel_shard_dim: int = -1
    """Ranks that share one copy of the parameters (FSDP2); -1: all that are left."""
    fsdp_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the host's memory."""
    fsdp_reshard_after_forward: bool = True
    """Let go of a layer's gathered parameters after its forward: less memory, one more gather."""
    hang_timeout_seconds: float | None = 45.0
    """Seconds without progress after which the ranks that are missing are named; null: never."""
    collective_timeout_seconds: float = 3600.0
    """Seconds after which a collective that hangs ends the run."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.fsdp_cpu_offload and self.device == "cpu":
            found.append("'fsdp_cpu_offload' needs 'device: cuda'")
        found += above_zero(self, "hang_timeout_seconds", "collective_timeout_seconds")
        return found

    def whole_model_problems(self) -> Iterator[str]:
        """What can't be had where every process holds the whole model, to sample from it."""
        for key, default in (
            ("tensor_parallel_dim", 1),
            ("data_parallel_replicate_dim", 1),
            ("data_parallel_shard_dim", -1),
            ("fsdp_cpu_offload", False),
            ("fsdp_reshard_after_forward", True),
        ):
            if getattr(self, key) != default:
                yield (
                    f"'{key}' must be {str(default).lower()}: every process holds the whole model; "
                    "for a larger one start a vLLM server and give server.url"
                )


@dataclass(kw_only=True)
class DataOptions:
    """The `data:` section."""

    dir: str | None = None
    """Folder of train.jsonl and val.jsonl, as ${data.dir} in dataset.source and dataset_val.source;
    null where these name their files."""
    shuffle: bool = True
    """Draw each epoch's order from `seed`; false: the order of the file."""


@dataclass(kw_only=True)
class TrainingKeys(DistributedKeys):
    """What every training run has: data, optimizer, steps, validation, checkpoints, logs."""

    data: DataOptions = field(default_factory=DataOptions)
    """How the data are drawn."""
    output_dir: str
    """Folder of the run: checkpoints, exported weights, metrics.jsonl, logs."""
    dataset: Component
    """Builder of the training data; steerlm2.datasets has them."""
    dataset_val: Component | None = None
    """Builder of the validation data."""
    schema: dict[str, Any] | None = None
    """Attributes of the labels, with their ranges; null: the checkpoint's, or those that the
    training data were written with, or those of the default schema that the labels name."""
    optimizer: Component
    """E.g. torch.optim.AdamW with its arguments."""
    lr: float | None = None
    """Peak learning rate; shorthand for optimizer.lr."""
    lr_scheduler: Component = field(default_factory=default_schedule)
    """Learning rate schedule; gets the number of steps from `max_steps` and `epochs`."""
    clip_grad_norm: float | None = None
    """Norm that all gradients together are scaled down to; null: they are left as they are."""
    global_batch_size: int = 128
    """Records (prompts with their responses, conversations, texts or pairs) of an optimizer step,
    all ranks together."""
    epochs: int | None = None
    """Passes over the data; the smaller of `epochs` and `max_steps` ends the run."""
    max_steps: int | None = None
    """Optimizer steps."""

    val_every_n_steps: int | None = None
    """Steps between validations; one comes before the first step and one after the last; null:
    none."""
    limit_val_batches: int | None = None
    """Global batches of a validation; null: all data."""
    export: Literal["best", "last"] = "best"
    """Weights to export: those of the lowest validation loss, where there is one, or the last."""
    save_every_n_steps: int | None = None
    """Steps between training states, from which a stopped run continues; null: none but at
    SIGTERM."""
    keep_last_n_checkpoints: int | None = None
    """Training states to keep; null: all."""
    pin_checkpoint_memory: bool = True
    """On a GPU, copy training states into page-locked host memory; false: slower, for nodes that
    don't allow so much of it."""
    resume_from_checkpoint: bool = False
    """Continue from the newest training state in `output_dir`."""
    save_adapter_weights_only: bool = False
    """Export LoRA adapters alone, without the merged model; they need the checkpointer's folder."""

    param_dtype: Literal["fp32", "bf16"] | None = None
    """Of the trained weights; null: `dtype`. fp32 with dtype bf16: master weights by FSDP2."""
    save_dtype: Literal["fp32", "bf16"] | None = None
    """Of the exported weights; null: `param_dtype`."""
    float8: bool = False
    """Matrix products of the layers in 8 bits; H100 and newer, not with adapters."""
    enable_activation_checkpointing: bool = False
    """Compute activations again in the backward instead of keeping them."""
    ac_mode: ActivationCheckpointing = "full"
    """Which: all of a layer; or (selective) all but outputs of matrix products and attention."""
    fsdp_reduce_every_microbatch: bool = True
    """Reduce gradients in every micro-batch; false: once a step, which saves traffic and keeps
    whole float32 gradients on every rank."""

    metric_logger: Component | None = None
    """torchtune's metric loggers (W&B, TensorBoard, ...), beside metrics.jsonl."""
    log_every_n_steps: int = 1
    """Steps between log lines."""
    log_peak_memory_stats: bool = True
    """Log peak_memory_gib."""
    profiler: Component | None = None
    """torchtune's profiler, e.g. torchtune.training.setup_torch_profiler."""

    TAKEN: ClassVar[dict[str, str]] = {"template": "template"}
    """Arguments of the data sets that are taken from other keys."""

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        found = [*super().complete(values), *complete_schema(values, values, "any")]
        return [*found, *complete_schema_from_data(values)]

    def problems(self) -> list[str]:
        found = super().problems()
        found += schema_problems(self.schema)
        found += self._folder_problems()
        if self.epochs is None and self.max_steps is None:
            found.append("set 'epochs' or 'max_steps' (the smaller of the two ends the run)")
        if self.lr is None and "lr" not in self.optimizer:
            found.append("'lr' is missing")
        if self.lr is not None and self.optimizer.get("lr", self.lr) != self.lr:
            found.append(
                f"lr={self.lr} and optimizer.lr={self.optimizer['lr']} disagree: set only 'lr'"
            )
        found += taken_elsewhere("dataset", self.dataset, self.TAKEN)
        found += taken_elsewhere("dataset_val", self.dataset_val, self.TAKEN)
        origin = {"num_training_steps": "max_steps and epochs"}
        found += taken_elsewhere("lr_scheduler", self.lr_scheduler, origin)
        found += self._float8_problems()
        if self.save_adapter_weights_only and self.checkpointer is None:
            found.append(
                "'save_adapter_weights_only' needs 'checkpointer': without one the model that the "
                "adapters are added to is written nowhere"
            )
        found += above_zero(self, "clip_grad_norm")
        found += at_least_one(
            self,
            *("global_batch_size", "epochs", "max_steps", "log_every_n_steps"),
            *("val_every_n_steps", "limit_val_batches"),
            *("save_every_n_steps", "keep_last_n_checkpoints"),
        )
        return found

    @property
    def val_data(self) -> Component | None:
        """`dataset_val`, where validations are wanted."""
        return self.dataset_val if self.val_every_n_steps else None

    @property
    def peak_lr(self) -> float:
        lr = self.optimizer.get("lr", self.lr)
        assert lr is not None  # `problems`
        return float(lr)

    def _folder_problems(self) -> Iterator[str]:
        """Where `data.dir` and the sources disagree; that of any/* may go unused."""
        folder, given = self.data.dir, [self.dataset, self.dataset_val]
        sources = [str(each["source"]) for each in given if each and "source" in each]
        outside = [source for source in sources if folder and Path(source).parent != Path(folder)]
        by_default = folder is not None and Path(folder).is_relative_to(DEFAULT_OUTPUTS)
        if outside and not (by_default and len(outside) == len(sources)):
            yield (
                f"'data.dir' is {folder}, but not the folder of {' and '.join(outside)}: set "
                "data.dir alone; or data.dir=null with dataset.source and dataset_val.source"
            )

    def _float8_problems(self) -> Iterator[str]:
        if not self.float8:
            return
        if self.device != "cuda":
            yield "'float8' needs 'device: cuda'"
        if self.dtype != "bf16":
            yield "'float8' needs 'dtype: bf16' (param_dtype may be fp32)"
        if self.tensor_parallel_dim > 1:
            yield "'float8' needs 'tensor_parallel_dim: 1': FSDP2 alone shards the layers then"


def taken_elsewhere(
    section: str, component: Component | None, origins: dict[str, str]
) -> Iterator[str]:
    """Arguments of a component that a recipe gives it itself.

    Args:
        origins: by argument, the key that it is taken from.
    """
    for argument, origin in origins.items():
        if component is not None and argument in component:
            yield f"'{section}.{argument}' is taken from '{origin}': set that"


@dataclass(kw_only=True)
class GenerationOptions:
    """The `generation:` section: answers sampled at every validation."""

    prompts: list[str] = field(default_factory=list)
    """Questions to answer."""
    label: str | None = None
    """Label under which `prompts` are answered."""
    system: str = DEFAULT_SYSTEM_PROMPT
    """System text of `prompts`."""
    from_dataset_val: int = 0
    """The first so many records of dataset_val are asked too, each with its own label."""
    max_new_tokens: int = 64
    """Tokens of an answer, the stop token among them."""
    temperature: float = 0.7
    """Of sampling; 0: the most likely token."""
    top_p: float = 0.9
    """Sample from the most likely tokens that together have this probability."""
    metrics: list[Component] = field(default_factory=list)
    """Functions called with (prompts, labels, responses), lists of one length; each gives a mapping
    from names to numbers, logged as val_NAME."""

    def problems(self) -> Iterator[str]:
        """Problems of its keys."""
        if not self.prompts and not self.from_dataset_val:
            yield "'generation' needs 'prompts' or 'from_dataset_val'"
        if self.from_dataset_val < 0:
            yield f"'generation.from_dataset_val' is negative: {self.from_dataset_val}"
        yield from at_least_one(self, "max_new_tokens", section="generation.")
        yield from sampling_problems(self, "generation.")
        if self.label is not None:
            try:
                parse_label(self.label)
            except ValueError as error:
                yield f"'generation.label': {error}"


@dataclass(kw_only=True)
class LabelOptions:
    """The `label:` section: which labels the prompts get."""

    kind: Literal["record", "fixed", "uniform", "empirical", "none"] = "record"
    """record: the prompt's own label, a conversation's last answer's; fixed: `value` for all;
    uniform: any values of `attributes`, drawn; empirical: drawn from the labels in `file`, as often
    as they are there; none: no label."""
    value: str | None = None
    """Of kind fixed, e.g. "humor:2,verbosity:1"."""
    attributes: list[str] | None = None
    """Of kind uniform: the attributes that get values."""
    file: str | None = None
    """Of kind empirical: conversations or SteerLM2 records."""
    labels_per_prompt: int = 1
    """Of kinds uniform and empirical: so many different ones, each a record of its own."""

    def problems(self, schema: AttributeSchema) -> Iterator[str]:
        """Problems of its keys."""
        yield from at_least_one(self, "labels_per_prompt", section="label.")
        for kind, key in (("fixed", "value"), ("uniform", "attributes"), ("empirical", "file")):
            given = getattr(self, key)
            if self.kind == kind and not given:
                yield f"'label.{key}' is missing: 'label.kind' is {kind}"
            if self.kind != kind and given:
                yield f"'label.{key}' is for 'label.kind' {kind}, not {self.kind}"
        if self.labels_per_prompt > 1 and self.kind not in ("uniform", "empirical"):
            yield (
                f"'label.kind' {self.kind} has one label a prompt: set label.labels_per_prompt=1"
            )
        try:
            if self.value:
                parse_label(self.value, schema)
            if self.attributes:
                schema.select(self.attributes)
        except ValueError as error:
            yield f"'label': {error}"
        if self.kind == "uniform" and self.attributes:
            known = set(self.attributes) & set(schema.names)
            grid = math.prod(len(schema.values_of(name)) for name in known)
            if self.labels_per_prompt > grid:
                yield f"'label.labels_per_prompt': there are only {grid} labels"


@dataclass(kw_only=True)
class InferenceKeys(SchemaKeys, DistributedKeys):
    """What runs of a model over a file have in common."""

    records_per_write: int = 128
    """Records that are written at a time; a stopped run repeats at most so many."""

    SCHEMA_RULE: ClassVar[SchemaRule] = "within"

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        return [*super().complete(values), *complete_schema(values, values, cls.SCHEMA_RULE)]

    def problems(self) -> list[str]:
        found = super().problems()
        found += at_least_one(self, "records_per_write")
        found += schema_problems(self.schema)
        return found


@dataclass(kw_only=True)
class SamplingKeys(InferenceKeys):
    """Answers to prompts with labels, sampled by processes that each hold the whole model."""

    label: LabelOptions = field(default_factory=LabelOptions)
    """The labels that are asked for."""
    max_prompts: int | None = None
    """The first so many prompts of the file; null: all."""
    n: int = 10
    """Answers to a prompt with a label."""
    temperature: float = 0.7
    """Of sampling; 0: the most likely token."""
    top_p: float = 0.9
    """Sample from the most likely tokens that together have this probability."""
    max_new_tokens: int = 1024
    """Tokens of an answer, the stop token among them; a longer one is cut off."""
    max_seq_len: int = 4096
    """Tokens of a prompt with an answer; a prompt that leaves no room for `max_new_tokens` isn't
    asked."""
    max_cache_tokens: int = 65536
    """Tokens of the prompts, with all their answers, that are sampled together on a process."""

    def problems(self) -> list[str]:
        found = super().problems()
        found += at_least_one(
            self, "max_prompts", "n", "max_new_tokens", "max_seq_len", "max_cache_tokens"
        )
        found += sampling_problems(self)
        if self.temperature == 0 and self.n > 1:
            found.append("'temperature' is 0: all responses of a prompt would be the same; set n=1")
        if self.max_new_tokens >= self.max_seq_len:
            found.append("'max_new_tokens' must be below 'max_seq_len': a prompt has tokens too")
        if not list(schema_problems(self.schema)):
            found += self.label.problems(as_schema(self.schema))
        found += self.whole_model_problems()
        return found


@dataclass(kw_only=True)
class ScoringKeys(InferenceKeys):
    """Given texts, scored by a model that is laid out over the processes."""

    max_tokens_per_microbatch: int = 4096
    """Tokens that a data-parallel rank computes at a time, over packed texts."""
    concentration: float = 24.0
    """alpha + beta of the Beta distribution by which P(a|x,y) follows from a score."""
    bins: Literal["midpoint", "uniform"] = "midpoint"
    """Parts of that distribution that belong to one value of an attribute: with edges halfway
    between values, or all of one width."""

    def problems(self) -> list[str]:
        found = super().problems()
        found += at_least_one(self, "max_tokens_per_microbatch")
        found += above_zero(self, "concentration")
        return found


@dataclass(kw_only=True)
class ServingKeys(ModelKeys):
    """What servers have in common."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all IPv4 addresses of the machine, for everybody there."""
    port: int = 8000
    """Port to listen on; 0: any free one, which the start-up message names."""
    allowed_hosts: list[str] | None = None
    """Hosts that requests may be for, so that no web page reaches the server under a name of its
    own: names, *.NAME, addresses and networks, or "*" for all. null: those of loopback (localhost,
    127.0.0.0/8, ::1); where it listens beyond that also every address and the machine's own name;
    all, where requests need a key."""
    max_body_bytes: int = 1_048_576
    """Bytes of a request."""
    max_pending_bytes: int = 67_108_864
    """Bytes of all requests that are read or answered at a time; more get 503."""
    max_connections: int = 1024
    """Connections at a time, as far as the process may open files. A new one closes that which has
    been without a request for the longest time; requests beyond it get 503, but for /health."""
    header_timeout: float = 10.0
    """Seconds for a request's header."""
    body_timeout: float = 30.0
    """Seconds from a request's header to the end of its body."""
    request_timeout: float = 60.0
    """Seconds from a request's header to the end of its answer."""

    def problems(self) -> list[str]:
        found = super().problems()
        found += at_least_one(self, "max_body_bytes")
        found += above_zero(self, "header_timeout", "body_timeout", "request_timeout")
        if self.max_connections < 2:
            found.append(f"'max_connections' must be at least 2, got {self.max_connections}")
        if self.max_pending_bytes < self.max_body_bytes:
            found.append(
                f"'max_pending_bytes' ({self.max_pending_bytes}) must be at least "
                f"'max_body_bytes' ({self.max_body_bytes})"
            )
        found += host_problems(self.allowed_hosts or [])
        if not 0 <= self.port <= 65535:
            found.append(f"'port' must be 0 to 65535, got {self.port}")
        return found


@dataclass(kw_only=True)
class ModelOptions:
    """A model under a section of its own: what is null is what the whole config says."""

    checkpointer: Component | None = None
    """Where its weights come from."""
    model: Component | None = None
    """Its builder."""
    tokenizer: Component | None = None
    """Its tokenizer's builder."""
    template: Component | None = None
    """How a conversation becomes its tokens."""


@dataclass(kw_only=True)
class ServerOptions:
    """The `server:` section: a server that samples or scores instead of the checkpoint."""

    url: str
    """Its address, e.g. http://127.0.0.1:8000."""
    model: str | None = None
    """The model's name at the server; null: its first one."""
    concurrency: int = 64
    """Requests at a time."""
    timeout: float = 600.0
    """Seconds for an answer."""
    retries: int = 5
    """Tries more of a failed request, with pauses of 0.5 s, 1 s, 2 s, ..."""

    def problems(self, section: str = "server") -> Iterator[str]:
        """Problems of its keys; `section` is the config key of the section."""
        yield from at_least_one(self, "concurrency", section=f"{section}.")
        yield from above_zero(self, "timeout", section=f"{section}.")
        if self.retries < 0:
            yield f"'{section}.retries' must be at least 0, got {self.retries}"


@dataclass(kw_only=True)
class SteeredKeys(ModelKeys):
    """A language model that is asked with attributes, from its checkpoint or at a vLLM server, and
    an attribute model for its answers."""

    server: ServerOptions | None = None
    """A vLLM server that generates, instead of the checkpoint; tokenizer.path then names the folder
    that it serves."""
    attribute_model: ModelOptions | None = None
    """What scores answers; null: nothing does."""
    schema: dict[str, Any] | None = None
    """Attributes of the labels, with their ranges; null: the checkpoint's, which are none where its
    folder has no steerlm2.json."""
    default_label: str | None = None
    """Values of attributes that a request leaves out; null: the most frequent ones of the
    checkpoint's training."""
    system: str | None = None
    """System text of conversations without one; null: the most frequent one of the checkpoint's
    training, or that of the published data."""
    max_new_tokens: int = 1024
    """Tokens of an answer, the stop token among them, where a request doesn't say."""
    max_seq_len: int = 4096
    """Tokens of a prompt with an answer, and of a text to be scored."""
    max_cache_tokens: int = 65536
    """Tokens of prompts and answers that are generated together by a checkpoint."""
    max_tokens_per_microbatch: int = 4096
    """Tokens that the attribute model computes at a time, over packed texts."""

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        scorer = values.get("attribute_model")
        found: list[str] = []
        if isinstance(scorer, dict):  # first: it has its own model and tokenizer
            found += complete_model(values, scorer, "attribute_model.")
        if values.get("server"):
            values.setdefault("model", {"_component_": MODEL})
        found += super().complete(values)
        return [*found, *complete_schema(values, values, "any")]

    def problems(self) -> list[str]:
        found = super().problems()
        found += at_least_one(
            self,
            *("max_new_tokens", "max_seq_len", "max_cache_tokens", "max_tokens_per_microbatch"),
        )
        found += schema_problems(self.schema)
        if self.server is not None:
            found += self.server.problems()
        if self.attribute_model is not None and self.attribute_model.checkpointer is None:
            found.append("'attribute_model.checkpointer' is missing: the folder of what scores")
        if self.default_label is not None and not list(schema_problems(self.schema)):
            try:
                parse_label(self.default_label, as_schema(self.schema))
            except ValueError as error:
                found.append(f"'default_label': {error}")
        return found
