"""A small recipe's config class, and values that are right for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from steerlm2.config.loader import Component

TEMPLATE = "steerlm2.data.extra_id_template"


@dataclass
class Inner:
    strategy: Literal["auto", "two_pass"] = "auto"
    max_tokens: int = 4096
    tolerance: float = 0.05


@dataclass
class Config:
    output_dir: str
    model: Component
    lr: float | None = None
    steps: int | None = None
    compile: bool = False
    prompts: list[str] = field(default_factory=list)
    steerlm2: Inner = field(default_factory=Inner)
    validation: Inner | None = None
    named: dict[str, Inner] = field(default_factory=dict)

    def problems(self) -> list[str]:
        return ["'steps' and 'lr' go together"] if self.steps and self.lr is None else []


GOOD: dict[str, Any] = {"output_dir": "out", "model": {"_component_": TEMPLATE}}
