"""The steered model that a config describes, for the recipes that ask one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerlm2.attributes import as_schema
from steerlm2.config.keys import SteeredKeys
from steerlm2.config.loader import instantiate
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT
from steerlm2.data.templates import response_end
from steerlm2.distributed.parallelize import DTYPES
from steerlm2.distributed.world import World
from steerlm2.facts import ModelFacts, read_facts
from steerlm2.inference.answers import load_whole_decoder
from steerlm2.inference.attribute_model import AttributeModel, load_attribute_model
from steerlm2.inference.engines import forbidden_ids
from steerlm2.inference.local_streaming import LocalStreamingEngine
from steerlm2.inference.steered import SteeredModel
from steerlm2.inference.streaming import StreamingEngine
from steerlm2.inference.vllm_streaming import VllmStreamingEngine


def load_steered_model(cfg: SteeredKeys, world: World) -> SteeredModel:
    """Load the checkpoint, or connect to the server, and load the attribute model.

    Raises:
        ValueError: where the parts of the config don't fit together.
        FileNotFoundError: where a checkpoint, or a file of it, doesn't exist.
        ConnectionError: where the server doesn't answer.
    """
    facts = facts_of(cfg)
    tokenizer, template = instantiate(cfg.tokenizer), instantiate(cfg.template)
    scorer = None if cfg.attribute_model is None else _attribute_model(cfg, world)
    stop_id = response_end(template, tokenizer)[1]
    engine: StreamingEngine
    if cfg.server is not None:
        engine = VllmStreamingEngine(
            cfg.server,
            stop_id=stop_id,
            forbidden_ids=forbidden_ids(template, tokenizer),
            max_seq_len=cfg.max_seq_len,
        )
    else:
        decoder = load_whole_decoder(
            cfg.model,
            cfg.checkpointer,
            tokenizer,
            world,
            dtype=DTYPES[cfg.dtype],
            max_seq_len=cfg.max_seq_len,
            seed=cfg.seed,
            compile=cfg.compile,
        )
        engine = LocalStreamingEngine(
            decoder,
            stop_id=stop_id,
            forbidden_ids=forbidden_ids(template, tokenizer, decoder.tok_embeddings.num_embeddings),
            max_seq_len=cfg.max_seq_len,
            max_cache_tokens=cfg.max_cache_tokens,
        )
    system, usual_label = cfg.system, cfg.default_label
    if facts is not None:
        system = facts.system if system is None else system
        usual_label = usual_label or facts.default_label
    return SteeredModel(
        template,
        tokenizer,
        None if cfg.schema is None else as_schema(cfg.schema),
        usual_label,
        DEFAULT_SYSTEM_PROMPT if system is None else system,
        engine,
        scorer,
    )


def facts_of(cfg: SteeredKeys) -> ModelFacts | None:
    """What the folder of the checkpoint, or of the server's tokenizer, says of its training.

    Raises:
        ValueError: where it is an attribute model's.
    """
    folder = _folder(cfg.checkpointer) or cfg.tokenizer.get("path")
    facts = read_facts(str(folder)) if folder else None
    if facts is not None and facts.kind != "language model":
        raise ValueError(
            f"{folder} has an attribute model, which gives scores but no answers: put it under "
            "attribute_model.checkpointer, or serve it by serve_reward"
        )
    return facts


def _attribute_model(cfg: SteeredKeys, world: World) -> AttributeModel:
    own = cfg.attribute_model
    assert own is not None
    folder = _folder(own.checkpointer)
    facts = read_facts(folder) if folder else None
    model = load_attribute_model(
        own.model or cfg.model,
        own.checkpointer,
        instantiate(own.tokenizer or cfg.tokenizer),
        instantiate(own.template or cfg.template),
        facts.schema if facts and facts.schema else as_schema(cfg.schema),
        world,
        max_seq_len=cfg.max_seq_len,
        max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
        dtype=DTYPES[cfg.dtype],
        seed=cfg.seed,
        compile=cfg.compile,
    )
    # A first score finds mismatches, and takes the warm-up out of the first request.
    model.score([model.encode("", [], ["Hello."])[0]])
    return model


def _folder(checkpointer: Mapping[str, Any] | None) -> str | None:
    return None if checkpointer is None else str(checkpointer["checkpoint_dir"])
