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
    read_json,
    read_own,
    resolve_checkpoint_dir,
    weight_files,
    weights_digest,
)
from steerlm2.files import sha256, write_sums


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


@pytest.mark.parametrize("target", ["../secret", "../elsewhere/secret", "/etc/hostname", "first"])
def test_a_link_to_another_file_is_refused(target: str, tmp_path: Path) -> None:
    """A repository of somebody else may have them; an export would publish what they lead to. Also
    one by way of a link in the folder."""
    folder = export(tmp_path / "model", "config.json")
    (tmp_path / "elsewhere").mkdir()
    for secret in (tmp_path / "secret", tmp_path / "elsewhere" / "secret"):
        secret.write_text("a private key")
    (folder / "first").symlink_to(tmp_path / "secret")
    (folder / "merges.txt").symlink_to(target)
    with pytest.raises(ValueError, match=r"merges\.txt is a link to .* an export would publish it"):
        read_own(folder / "merges.txt")


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """snapshots/REVISION/NAME leads to blobs/HASH of the same repository, of no other."""
    repository, other = tmp_path / "models--a--b", tmp_path / "models--c--d"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for folder in (repository, other):
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs" / "4567").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    (snapshot / "merges.txt").symlink_to(other / "blobs" / "4567")
    assert read_json(snapshot / "config.json") == {"a": 1}
    (tmp_path / "model").symlink_to(snapshot)  # the folder itself may be one
    assert read_json(tmp_path / "model" / "config.json") == {"a": 1}
    with pytest.raises(ValueError, match="is a link to"):
        read_own(snapshot / "merges.txt")
    (repository / "blobs" / "89").symlink_to(other / "blobs" / "4567")
    (snapshot / "vocab.json").symlink_to("../../blobs/89")
    with pytest.raises(ValueError, match="is a link to"):
        read_own(snapshot / "vocab.json")


def test_links_within_a_folder_and_to_the_same_file_elsewhere_are_followed(tmp_path: Path) -> None:
    """People put folders together of links to a model's files."""
    model = export(tmp_path / "model", "config.json", "tokenizer.json")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "tokenizer.json").symlink_to(model / "tokenizer.json")
    (model / "generation_config.json").symlink_to("config.json")
    assert read_json(mine / "tokenizer.json") == {}
    assert read_json(model / "generation_config.json") == {}


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "a/b.safetensors", "..", ".", "", 3]
)
def test_an_index_names_files_of_its_folder(name: object, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="weight_map must name files of that folder"):
        weight_files(tmp_path)


def test_a_small_file_that_was_changed_is_read_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """People edit config.json; a disk does too. The warning comes once."""
    folder = export(tmp_path / "model", "config.json", "tokenizer.json")
    write_sums(folder, {name: sha256(folder / name) for name in ("config.json", "tokenizer.json")})
    (folder / "config.json").write_text('{"a": 1}')
    for _ in range(2):
        assert read_json(folder / "config.json") == {"a": 1}
        assert read_json(folder / "tokenizer.json") == {}
    warning = capsys.readouterr().err
    assert warning.startswith(f"WARNING: {folder}: config.json changed since SHA256SUMS was")
    assert warning.count("\n") == 1
