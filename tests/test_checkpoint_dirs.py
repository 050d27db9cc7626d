"""A path to a checkpoint is its folder, or a run whose newest complete export is meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from steerlm2 import checkpoint_dirs
from steerlm2.checkpoint_dirs import (
    INDEX_FILE,
    file_digest,
    newest_export,
    resolve_checkpoint_dir,
    weights_digest,
)


def export(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in files or ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_a_checkpoint_is_itself(tmp_path: Path) -> None:
    """Also one that has epochs beside its config.json, or no weights: what reads it says that."""
    folder = export(tmp_path / "model", "config.json")
    export(folder / "epoch_3")
    assert resolve_checkpoint_dir(str(folder)) == folder


def test_of_a_run_the_highest_epoch_is_meant(tmp_path: Path) -> None:
    """By number: 10 comes after 9. `epoch_best` and `epoch_11_old` are no epochs."""
    for name in ("epoch_9", "epoch_10", "epoch_2", "epoch_best", "epoch_11_old"):
        export(tmp_path / name)
    assert resolve_checkpoint_dir(tmp_path) == tmp_path / "epoch_10"


def sharded(folder: Path, *there: str) -> None:
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    export(folder, "config.json", *there)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": names}))


def test_an_incomplete_export_is_passed_over(tmp_path: Path) -> None:
    """Without config.json (it comes last), without weights, without one of two shards; adapters."""
    export(tmp_path / "epoch_1")
    export(tmp_path / "epoch_2", "model.safetensors")
    export(tmp_path / "epoch_3", "config.json")
    sharded(tmp_path / "epoch_4", "model-2.safetensors")
    export(tmp_path / "epoch_5" / "adapter", "adapter_config.json")
    assert newest_export(tmp_path) == tmp_path / "epoch_1"
    sharded(tmp_path / "epoch_6", "model-1.safetensors", "model-2.safetensors")
    assert newest_export(tmp_path) == tmp_path / "epoch_6"


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_neither_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    folder = tmp_path / name
    with pytest.raises(FileNotFoundError) as error:
        resolve_checkpoint_dir(folder, "checkpointer.checkpoint_dir")
    assert str(error.value) == (
        f"{folder} has no config.json: checkpointer.checkpoint_dir must be a Hugging Face "
        "checkpoint (`tune download NAME --output-dir DIR`), an export, or the output_dir of a run "
        "that has a complete epoch_N folder"
    )
    assert resolve_checkpoint_dir(folder, missing_ok=True) == folder


def test_import_loads_no_torch() -> None:
    """Tokenizers look for their files with it."""
    code = "import sys, steerlm2.checkpoint_dirs; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_digests_tell_weights_apart(tmp_path: Path) -> None:
    """Other values, another size, another name; not another time, nor other files."""
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(10_000))
    first = weights_digest(tmp_path)
    file.touch()
    (tmp_path / "README.md").write_text("words")
    assert weights_digest(tmp_path) == first
    changed = {first}
    for content in (bytes(9_999) + b"1", bytes(9_999)):
        file.write_bytes(content)
        changed.add(weights_digest(tmp_path))
    file.rename(tmp_path / "other.safetensors")
    changed.add(weights_digest(tmp_path))
    assert len(changed) == 4
    assert file_digest(tmp_path / "README.md") != file_digest(tmp_path / "other.safetensors")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no config"):
        weights_digest(tmp_path)


def test_of_large_weights_only_pieces_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data files are read whole: a change of one line counts."""
    monkeypatch.setattr(checkpoint_dirs, "LARGE_FILE", 10)
    for name, differ in (("model.safetensors", False), ("data.jsonl", True)):
        file = tmp_path / name
        file.write_bytes(bytes(2**20))
        first = file_digest(file)
        file.write_bytes(bytes(5_000) + b"1" + bytes(2**20 - 5_001))
        assert (file_digest(file) != first) == differ
        file.write_bytes(b"1" * 2**20)
        assert file_digest(file) != first
