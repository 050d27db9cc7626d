"""metrics.jsonl, and the table and plot that a run ends with.

metrics.jsonl has one entry (a JSON object) a logged step, also beside another metric logger.
Validation results are entries of their own, with keys that begin with `val_`.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from steerlm2.config.loader import instantiate
from steerlm2.distributed.world import World
from steerlm2.files import open_own, parse_json, write_durably


class JsonLines:
    """Appends entries with a `step` to a .jsonl file; whole lines survive a kill at any moment.

    Damaged lines, which a crash of the machine or an editor can leave, are skipped: what is logged
    isn't what a run goes on from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, entry: Mapping[str, Any]) -> None:
        with open_own(self.path, "a") as file:
            file.write(_line(entry))

    def keep_until(self, step: int) -> None:
        """Drop entries after `step`: a resumed run writes them again."""
        if self.path.exists():
            kept = [entry for entry in self.read() if entry["step"] <= step]
            write_durably(self.path, "".join(map(_line, kept)))

    def read(self) -> list[dict[str, Any]]:
        """The entries, without a last line that a kill cut off; none where there is no file.

        Of damaged lines a warning says how many they are, once.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        entries = [entry for line in lines if (entry := _entry(line)) is not None]
        if len(entries) < len(lines) and not self._warned:
            self._warned = True
            print(
                f"WARNING: {self.path}: {len(lines) - len(entries)} damaged line(s) left out",
                file=sys.stderr,
            )
        return entries


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry of a line; None where the line is damaged."""
    try:
        entry = parse_json(line)
    except ValueError:  # also of text that isn't UTF-8
        return None
    whole = isinstance(entry, dict) and isinstance(entry.get("step"), int)
    return entry if whole else None


def logged_validation_loss(metrics: JsonLines, step: int, world: World) -> float | None:
    """The validation loss of `step` in metrics.jsonl; None: it has none. Called by all ranks."""

    def find() -> float | None:
        entries = metrics.read()
        return next((e["val_loss"] for e in entries if e["step"] == step and "val_loss" in e), None)

    return world.from_main(world.on_main(find))


def answer_metrics(
    components: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    labels: Sequence[str | None],
    responses: Sequence[str],
) -> dict[str, float]:
    """The values of a config's metric functions for answers.

    Args:
        components: metric functions of the config; each is called with the three lists below.
        prompts: one a response; labels and responses alike.

    Raises:
        ValueError: where a function returns anything but a mapping from names to numbers, or a
            name that another function returns, or `loss`.
    """
    metrics: dict[str, float] = {}
    for component in components:
        found = instantiate(component, prompts, labels, responses)
        try:
            found = {str(name): float(value) for name, value in found.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{component['_component_']} must return a mapping from names to numbers ({error})"
            ) from error
        if taken := found.keys() & {"loss", *metrics}:
            raise ValueError(
                f"{component['_component_']} returns {', '.join(sorted(taken))}: the validation "
                "loss or another metric function has that name"
            )
        metrics |= found
    return metrics


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far, GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def summary_table(entries: Sequence[Mapping[str, Any]], keys: Sequence[str], parts: int = 5) -> str:
    """A text table: the logged training steps in consecutive parts, each metric's mean over each.

    Args:
        entries: of metrics.jsonl; an entry without the first key is no training step.
        keys: the metrics to show.
        parts: at most so many columns.
    """
    train = [entry for entry in entries if keys[0] in entry]
    if not train:
        return "no training step was logged"
    parts = min(parts, len(train))
    edges = [round(i * len(train) / parts) for i in range(parts + 1)]
    columns = [train[a:b] for a, b in itertools.pairwise(edges)]
    heads = [
        f"{part[0]['step']}-{part[-1]['step']}" if len(part) > 1 else str(part[0]["step"])
        for part in columns
    ]
    lines = ["mean over steps".ljust(24) + "".join(head.rjust(14) for head in heads)]
    lines.append("-" * len(lines[0]))
    for key in keys:
        values = ([entry[key] for entry in part if key in entry] for part in columns)
        means = (sum(part) / len(part) if part else math.nan for part in values)
        lines.append(key.ljust(24) + "".join(f"{mean:>14.4g}" for mean in means))
    return "\n".join(lines)


def validation_table(entries: Sequence[Mapping[str, Any]], step: int) -> str:
    """The validation after a step as text; empty where there was none."""
    lines = [
        f"  {name.removeprefix('val_'):<34}{value:>10.4g}"
        for entry in entries
        if entry["step"] == step
        for name, value in entry.items()
        if name.startswith("val_")
    ]
    return "\n".join([f"validation at step {step}", *lines]) if lines else ""


def plot_curves(entries: Sequence[Mapping[str, Any]], keys: Sequence[str], path: Path) -> None:
    """One panel for each key over steps, with its validation values (`val_` + key), as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = 5 * len(keys), 3.6
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # A layout that is computed takes as long as all else here.
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.2 / width, bottom=0.5 / height, top=1 - 0.3 / height
    )
    for panel, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for name, label, marker in ((key, "train", ""), ("val_" + key, "validation", "o")):
            points = [(e["step"], e[name]) for e in entries if name in e]
            if points:
                panel.plot(*zip(*points, strict=True), marker=marker, label=label)
        panel.set(xlabel="step", ylim=(0, None))
        # Its place would else be computed from all labels.
        panel.set_title(key, y=1, parse_math=False)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    path.unlink(missing_ok=True)  # a link's target would be written over
    figure.savefig(path, dpi=120)
