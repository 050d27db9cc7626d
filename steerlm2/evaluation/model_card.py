"""The results of an evaluation in the model card of an export.

python -m steerlm2.evaluation.model_card OUTPUT_DIR steering.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from steerlm2.checkpoint_dirs import resolve_checkpoint_dir
from steerlm2.checkpoints.model_card import (
    EVALUATION_END,
    EVALUATION_START,
    MODEL_CARD,
    table_cell,
)
from steerlm2.evaluation.report import SteeringResult, headline_rows, headlines, read_report
from steerlm2.files import write_durably


def add_evaluation(checkpoint_dir: str | Path, results: Mapping[str, SteeringResult]) -> bool:
    """Put an evaluation's table into an export's card, in the place of an earlier one.

    Args:
        checkpoint_dir: its folder, or the output_dir of a run.
        results: by model, as `read_report` gives them. The one that is called as the folder of the
            export's run is said to be the card's.

    Returns:
        False where there is no card, or one without a place for it: it isn't ours to change.
    """
    folder = resolve_checkpoint_dir(checkpoint_dir).resolve()
    card = folder / MODEL_CARD
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8")
    before, start, rest = text.partition(EVALUATION_START)
    _, end, after = rest.partition(EVALUATION_END)
    if not (start and end):
        return False
    own = next((name for name in (folder.name, folder.parent.name) if name in results), None)
    table = _evaluation(results, own)
    write_durably(card, f"{before}{start}\n{table}\n{end}{after}")
    return True


def _evaluation(results: Mapping[str, SteeringResult], own: str | None) -> str:
    columns = headlines(results)
    lines = [["", *(column.title for column in columns)], ["---"] * (len(columns) + 1)]
    for model, cells in headline_rows(results).items():
        texts = [f"**{cell.text}**" if cell.is_best else cell.text for cell in cells]
        texts = [f"{text} {cell.error}".strip() for text, cell in zip(texts, cells, strict=True)]
        name = f"{model} (this model)" if model == own and len(results) > 1 else model
        lines.append([table_cell(name), *texts])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    meanings = "\n".join(
        f"- {column.title}: {column.meaning}" + (f"; {column.better}" if column.better else "")
        for column in columns
    )
    return f"## Evaluation\n\n{table}\n\n{meanings}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m steerlm2.evaluation.model_card",
        description="Put the results of evaluate_steering into the card of an export.",
    )
    parser.add_argument("checkpoint_dir", help="its folder, or the output_dir of a run")
    parser.add_argument("steering", help="steering.json of evaluate_steering")
    arguments = parser.parse_args()
    if not add_evaluation(arguments.checkpoint_dir, read_report(arguments.steering)):
        parser.error(f"{arguments.checkpoint_dir} has no {MODEL_CARD} with {EVALUATION_START}")


if __name__ == "__main__":
    main()
