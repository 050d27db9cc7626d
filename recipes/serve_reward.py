"""An HTTP server of an attribute model, for clients in any language.

    tune run serve_reward --config tiny/serve_reward
    curl http://127.0.0.1:8000/v1/attributes -H 'Content-Type: application/json' \\
        -d '{"conversations": [{"conversations": [{"from": "User", "value": "What is 2 + 2?"},
            {"from": "Assistant", "value": "4"}]}]}'

    {"model": ..., "attributes": ["humor", "verbosity"], "scores": [{"humor": 0.1, ...}]}

Texts of concurrent requests are scored together. SIGTERM and SIGINT end the server once it has
answered what it has accepted. Where the environment has STEERLM2_API_KEY, requests need that key.
Otherwise whoever reaches the port may use it, so it listens on 127.0.0.1 unless told otherwise, and
answers only to hosts that no web page can name (`allowed_hosts`). It knows no encryption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steerlm2.attributes import as_schema
from steerlm2.config.completion import complete_schema
from steerlm2.config.keys import ServingKeys, at_least_one, schema_problems
from steerlm2.config.loader import instantiate
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT
from steerlm2.distributed.parallelize import DTYPES
from steerlm2.distributed.world import init_world
from steerlm2.inference.attribute_model import load_attribute_model
from steerlm2.inference.server_client import own_api_key
from steerlm2.runs.entry import recipe_main
from steerlm2.serving.listening import (
    allowed_hosts,
    bound_socket,
    check_packages,
    serve,
    served_name,
)


@dataclass(kw_only=True)
class ServeConfig(ServingKeys):
    """The keys of serve_reward."""

    schema: dict[str, Any] | None = None
    """The attributes, in the order of labels: {formality: [0, 10], length: [1, 5]}, each with its
    lowest and highest value, or those that share a range, {names: [...], min_value: 0, max_value:
    4}; null: the default nine, from 0 to 4. On the command line schema={...} replaces it, and
    schema.names=[...] changes the second form."""
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    """System text of conversations without one, and of texts."""
    model_name: str | None = None
    """The model's name in answers; null: the checkpoint's last two folders."""

    max_items: int = 64
    """Conversations or texts of a request."""
    max_queue: int = 1024
    """Texts that wait, of all requests together; more get 503."""
    truncate: bool = False
    """A text that is too long loses its beginning; false: it is refused."""
    max_seq_len: int = 4096
    """Tokens of a text with its conversation."""
    max_tokens_per_microbatch: int = 4096
    """Tokens that are computed at a time, over packed texts."""

    @classmethod
    def complete(cls, values: dict[str, Any]) -> list[str]:
        return [*super().complete(values), *complete_schema(values, values, "equal")]

    def problems(self) -> list[str]:
        found = super().problems()
        found += at_least_one(
            self,
            *("max_items", "max_queue", "max_seq_len", "max_tokens_per_microbatch"),
        )
        if self.max_queue < self.max_items:
            found.append(
                f"'max_queue' ({self.max_queue}) must be at least 'max_items' ({self.max_items}): "
                "the texts of a request wait together"
            )
        found += schema_problems(self.schema)
        return found


class ServeRecipe:
    """The run: setup -> serve."""

    def __init__(self, cfg: ServeConfig) -> None:
        self.cfg = cfg
        self.api_key = own_api_key()
        check_packages()
        self.socket = bound_socket(cfg.host, cfg.port)  # fails before the model is loaded
        self.world = init_world(cfg.device)

    def setup(self) -> None:
        from steerlm2.serving.reward_server import Limits, create_app

        cfg = self.cfg
        model = load_attribute_model(
            cfg.model,
            cfg.checkpointer,
            instantiate(cfg.tokenizer),
            instantiate(cfg.template),
            as_schema(cfg.schema),
            self.world,
            max_seq_len=cfg.max_seq_len,
            max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
            dtype=DTYPES[cfg.dtype],
            seed=cfg.seed,
            compile=cfg.compile,
        )
        # A first score finds mismatches, and takes the warm-up out of the first request.
        model.score([model.encode(cfg.system_prompt, [], ["Hello."])[0]])
        limits = Limits(
            max_body_bytes=cfg.max_body_bytes,
            max_pending_bytes=cfg.max_pending_bytes,
            body_timeout=cfg.body_timeout,
            max_items=cfg.max_items,
            max_queue=cfg.max_queue,
            request_timeout=cfg.request_timeout,
            truncate=cfg.truncate,
        )
        self.app = create_app(
            model,
            served_name(cfg.model_name, cfg.checkpointer),
            limits=limits,
            system_prompt=cfg.system_prompt,
            api_key=self.api_key,
            allowed_hosts=allowed_hosts(cfg, self.socket, self.api_key),
        )
        if cfg.checkpointer is None:
            print(
                f"the weights are UNTRAINED (fresh from seed {cfg.seed}), so the scores mean "
                "nothing. To serve a folder that reward_distributed exported:\n"
                "  checkpointer._component_=steerlm2.checkpoints.HFCheckpointer "
                "checkpointer.checkpoint_dir=DIR"
            )

    def serve(self) -> None:
        """Answer requests until SIGTERM or SIGINT."""
        cfg = self.cfg
        names = ", ".join(as_schema(cfg.schema).names)
        serve(self.app, self.socket, names, "/v1/attributes", cfg, api_key=self.api_key)


@recipe_main(ServeConfig)
def main(cfg: ServeConfig) -> None:
    recipe = ServeRecipe(cfg)
    recipe.setup()
    recipe.serve()


if __name__ == "__main__":
    main()
