"""A server of a steered model: OpenAI's API with attributes, and a page to try it.

    tune run serve_steerlm --config tiny/serve_steerlm
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}],
            "attributes": {"verbosity": 4}}'

Any client of OpenAI's API can ask it; `attributes` is a field of its own, or stands behind the
model's name, "name@helpfulness:4,verbosity:1". With an attribute model `best_of: 8` gives the
nearest of 8 answers to the request, and `scores: true` what was obtained.

The answers come from the checkpoint in this process, several requests at a time, or from a vLLM
server (`server.url`), the way for real loads. SIGTERM and SIGINT end this server once it has
answered what it has accepted. Where the environment has STEERLM2_API_KEY, requests need that key.
Otherwise whoever reaches the port may use it, so it listens on 127.0.0.1 unless told otherwise, and
answers only to hosts that no web page can name (`allowed_hosts`). It knows no encryption.
"""

from __future__ import annotations

from dataclasses import dataclass

from steerlm2.config.keys import ServingKeys, SteeredKeys, at_least_one
from steerlm2.distributed.world import init_world
from steerlm2.inference.load_steered import load_steered_model
from steerlm2.inference.server_client import own_api_key
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.processes import use_cores_in_other_threads
from steerlm2.serving.listening import (
    allowed_hosts,
    bound_socket,
    check_packages,
    serve,
    served_name,
)


@dataclass(kw_only=True)
class ServeConfig(SteeredKeys, ServingKeys):
    """The keys of serve_steerlm."""

    model_name: str | None = None
    """The model's name for callers; null: the checkpoint's last two folders."""
    max_n: int = 16
    """Answers to a request: its `n` and `best_of`."""
    max_items: int = 64
    """Conversations or texts of a request for scores."""
    max_queue: int = 1024
    """Requests that are answered at a time; more get 503."""

    def problems(self) -> list[str]:
        return [*super().problems(), *at_least_one(self, "max_n", "max_items", "max_queue")]


class ServeRecipe:
    """The run: setup -> serve."""

    def __init__(self, cfg: ServeConfig) -> None:
        self.cfg = cfg
        self.api_key = own_api_key()
        check_packages()
        self.socket = bound_socket(cfg.host, cfg.port)  # fails before the model is loaded
        self.world = init_world("cpu" if cfg.server and not cfg.attribute_model else cfg.device)

    def setup(self) -> None:
        from steerlm2.serving.steering_server import SteeringLimits, create_app

        cfg = self.cfg
        use_cores_in_other_threads()
        model = load_steered_model(cfg, self.world)
        limits = SteeringLimits(
            max_body_bytes=cfg.max_body_bytes,
            max_pending_bytes=cfg.max_pending_bytes,
            body_timeout=cfg.body_timeout,
            max_items=cfg.max_items,
            max_queue=cfg.max_queue,
            request_timeout=cfg.request_timeout,
            max_n=cfg.max_n,
            max_new_tokens=cfg.max_new_tokens,
        )
        self.name = self._name()
        self.app = create_app(
            model,
            self.name,
            limits=limits,
            api_key=self.api_key,
            allowed_hosts=allowed_hosts(cfg, self.socket, self.api_key),
        )
        if cfg.checkpointer is None and cfg.server is None:
            print(
                f"the weights are UNTRAINED (fresh from seed {cfg.seed}), so the answers mean "
                "nothing. To serve a folder that was exported: checkpointer.checkpoint_dir=DIR"
            )

    def serve(self) -> None:
        """Answer requests until SIGTERM or SIGINT."""
        outgoing = 0 if self.cfg.server is None else self.cfg.server.concurrency
        serve(
            self.app,
            self.socket,
            self.name,
            "/",
            self.cfg,
            api_key=self.api_key,
            outgoing=outgoing,
        )

    def _name(self) -> str:
        cfg = self.cfg
        if cfg.server is None:
            return served_name(cfg.model_name, cfg.checkpointer)
        folder = {"checkpoint_dir": cfg.tokenizer["path"]} if "path" in cfg.tokenizer else None
        return served_name(cfg.model_name or cfg.server.model, folder)


@recipe_main(ServeConfig)
def main(cfg: ServeConfig) -> None:
    recipe = ServeRecipe(cfg)
    recipe.setup()
    recipe.serve()


if __name__ == "__main__":
    main()
