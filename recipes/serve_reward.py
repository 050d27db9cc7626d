"""An HTTP server of an attribute model, for clients in any language.

    tune run serve_reward --config tiny/serve_reward
    curl http://127.0.0.1:8000/v1/attributes -H 'Content-Type: application/json' \\
        -d '{"conversations": [{"conversations": [{"from": "User", "value": "What is 2 + 2?"},
            {"from": "Assistant", "value": "4"}]}]}'

    {"model": ..., "attributes": ["humor", "verbosity"], "scores": [{"humor": 0.1, ...}]}

Texts of concurrent requests are scored together. SIGTERM and SIGINT end the server once it has
answered what it has accepted. It knows no passwords and no encryption: whoever reaches the port may
use it, so it listens on 127.0.0.1 unless told otherwise.
"""

from __future__ import annotations

import importlib.util
import math
import signal
import socket
from dataclasses import dataclass
from typing import Any

from steerlm2.attributes import as_schema
from steerlm2.checkpoint_dirs import resolve_checkpoint_dir
from steerlm2.config.completion import complete_schema
from steerlm2.config.keys import ModelKeys, above_zero, at_least_one, schema_problems
from steerlm2.config.loader import instantiate
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT
from steerlm2.distributed.parallelize import DTYPES
from steerlm2.distributed.world import init_world
from steerlm2.inference.attribute_model import load_attribute_model
from steerlm2.runs.entry import recipe_main

REQUIRED = ("fastapi", "prometheus_client", "uvicorn")
"""Packages of the extra `serve`."""

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection is kept open. A choice: longer than the 60 s of common proxies, which
otherwise reuse connections that the server has just closed."""


@dataclass(kw_only=True)
class ServeConfig(ModelKeys):
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

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all IPv4 addresses of the machine, for everybody there."""
    port: int = 8000
    """Port to listen on; 0: any free one, which the start-up message names."""
    max_body_bytes: int = 1_048_576
    """Bytes of a request."""
    max_items: int = 64
    """Conversations or texts of a request."""
    max_queue: int = 1024
    """Texts that wait, of all requests together; more get 503."""
    request_timeout: float = 60.0
    """Seconds from a request's header to its answer."""
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
            *("max_body_bytes", "max_items", "max_queue"),
            *("max_seq_len", "max_tokens_per_microbatch"),
        )
        found += above_zero(self, "request_timeout")
        if self.max_queue < self.max_items:
            found.append(
                f"'max_queue' ({self.max_queue}) must be at least 'max_items' ({self.max_items}): "
                "the texts of a request wait together"
            )
        if not 0 <= self.port <= 65535:
            found.append(f"'port' must be 0 to 65535, got {self.port}")
        found += schema_problems(self.schema)
        return found


class ServeRecipe:
    """The run: setup -> serve."""

    def __init__(self, cfg: ServeConfig) -> None:
        self.cfg = cfg
        if lacking := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
            raise ValueError(
                f'the server needs {", ".join(lacking)}: pip install "steerlm2[serve]"'
            )
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
            max_items=cfg.max_items,
            max_queue=cfg.max_queue,
            request_timeout=cfg.request_timeout,
            truncate=cfg.truncate,
        )
        self.app = create_app(
            model, self._model_name(), limits=limits, system_prompt=cfg.system_prompt
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
        import uvicorn

        cfg = self.cfg
        server = uvicorn.Server(
            uvicorn.Config(
                self.app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(cfg.request_timeout),
            )
        )

        def stop(signum: int, frame: object) -> None:
            server.should_exit = True

        # uvicorn replaces these handlers while it runs, and raises the signal again afterwards,
        # which would end the process with a status other than 0.
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, stop)
        self.socket.listen()
        host, port = self.socket.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        names = ", ".join(as_schema(cfg.schema).names)
        print(f"serving {names} on http://{address}:{port}/v1/attributes", flush=True)
        server.run(sockets=[self.socket])

    def _model_name(self) -> str:
        cfg = self.cfg
        if cfg.model_name is not None:
            return cfg.model_name
        if cfg.checkpointer is None:
            return "untrained"
        folder = resolve_checkpoint_dir(cfg.checkpointer["checkpoint_dir"])
        return "/".join(folder.absolute().parts[-2:])


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address but doesn't accept connections yet.

    Raises:
        ValueError: where the address can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(
            f"can't listen on host {host!r}, port {port}: {error.strerror}. Give another host= or "
            "port= (port=0 takes any free one)"
        ) from error
    return bound


@recipe_main(ServeConfig)
def main(cfg: ServeConfig) -> None:
    recipe = ServeRecipe(cfg)
    recipe.setup()
    recipe.serve()


if __name__ == "__main__":
    main()
