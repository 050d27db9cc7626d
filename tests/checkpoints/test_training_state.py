"""A resumed run is the uninterrupted one, bit for bit, whatever befell its checkpoints."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoints.checkpointer import ScratchCheckpointer
from steerlm2.checkpoints.state_reader import StateReader
from steerlm2.checkpoints.training_state import (
    BEST,
    STATE_FILE,
    StateWriter,
    best_state,
    checkpoints,
    load_best_weights,
    load_training_state,
    newest_whole,
    resume_training,
    staging_options,
)
from steerlm2.checkpoints.weights import load_weights, open_reward_checkpointer
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.files import SUMS_FILE, read_sums, sha256
from steerlm2.models.reward_head import add_reward_head

CPU = World(torch.device("cpu"))
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "embed_dim": 32,
    "max_seq_len": 64,
    "intermediate_dim": 48,
}
LORA: dict[str, Any] = {
    "lora_attn_modules": ["q_proj", "v_proj"],
    "lora_rank": 4,
    "lora_alpha": 8,
}


def meta_decoder(**changes: Any) -> TransformerDecoder:
    with torch.device("meta"):
        return llama3(**(TINY | changes))


def meta_lora_decoder() -> TransformerDecoder:
    with torch.device("meta"):
        decoder = lora_llama3(**LORA, **TINY)
    set_trainable_params(decoder, get_adapter_params(decoder))
    return decoder


def scratch(decoder: TransformerDecoder, seed: int = 0, folder: Any = "out") -> ScratchCheckpointer:
    return ScratchCheckpointer(decoder, tiny_tokenizer(), seed=seed, output_dir=str(folder))


def loaded(decoder: TransformerDecoder, seed: int = 0) -> TransformerDecoder:
    load_weights(decoder, scratch(decoder, seed), CPU, seed=seed)
    return decoder


def same_state(first: Any, second: Any) -> bool:
    """Bitwise equality of nested dicts and lists with tensors in them."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same_state(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_state, first, second))
    return first == second


# Training state


def new_run(decoder: TransformerDecoder | None = None) -> tuple[Any, torch.optim.Optimizer]:
    decoder = loaded(decoder or meta_decoder())
    trained = [p for p in decoder.parameters() if p.requires_grad]
    return decoder, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


def train(decoder: TransformerDecoder, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps on tokens from the global random generator."""
    for _ in range(steps):
        logits = decoder(torch.randint(512, (2, 5)))
        (logits.square().mean() - logits.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save(folder: Path, step: int, run: tuple[Any, torch.optim.Optimizer], **options: Any) -> None:
    writer = StateWriter(folder, CPU, **options)
    writer.save(step, *run, {"data": {"seed": 5}})
    writer.wait()


def save_best(folder: Path, step: int, decoder: TransformerDecoder, state: Any) -> None:
    writer = StateWriter(folder, CPU)
    writer.save_best(step, decoder, state)
    writer.wait()


@pytest.mark.parametrize("decoder", [meta_decoder, meta_lora_decoder], ids=["full", "lora"])
def test_a_resumed_run_equals_the_uninterrupted_one(decoder: Any, tmp_path: Path) -> None:
    """2 steps, saved, 3 more; against a fresh start that loads and runs the 3: weights and AdamW's
    state are equal bit for bit. The batches come from the random state, so it is restored too.
    """
    torch.manual_seed(0)
    uninterrupted = new_run(decoder())
    train(*uninterrupted, 2)
    save(tmp_path, 2, uninterrupted)
    train(*uninterrupted, 3)

    torch.manual_seed(99)
    resumed = new_run(decoder())
    load_training_state(tmp_path / "step_000002", *resumed, CPU)
    train(*resumed, 3)
    for first, second in zip(uninterrupted, resumed, strict=True):
        assert same_state(dict(first.state_dict()), dict(second.state_dict()))


def test_saving_changes_nothing_in_the_run_that_goes_on(tmp_path: Path) -> None:
    """5 steps, with and without a save after the second."""
    runs = []
    for saves in (False, True):
        torch.manual_seed(0)
        run = new_run()
        train(*run, 2)
        if saves:
            save(tmp_path, 2, run)
        train(*run, 3)
        runs.append(dict(run[0].state_dict()))
    assert same_state(*runs)


def test_state_comes_back_with_its_step(tmp_path: Path) -> None:
    run = new_run()
    save(tmp_path, 7, run)
    state = load_training_state(tmp_path / "step_000007", *run, CPU)
    assert state == {"step": 7, "data": {"seed": 5}}


def test_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Resumed with another model: a ValueError, which recipes show without a traceback."""
    save(tmp_path, 1, new_run())
    other = new_run(meta_decoder(intermediate_dim=40))
    with pytest.raises(ValueError, match="w1"):
        load_training_state(tmp_path / "step_000001", *other, CPU)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    run = new_run()
    for step in (1, 2, 3, 10):
        save(tmp_path, step, run, keep_last_n=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000010"]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before anything of it is gone; the next start removes what is left."""
    run = new_run()
    save(tmp_path, 1, run)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: None)
        save(tmp_path, 2, run, keep_last_n=1)
    assert checkpoints(tmp_path) == [tmp_path / "step_000002"]
    StateWriter(tmp_path, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_without_a_limit_all_checkpoints_are_kept(tmp_path: Path) -> None:
    run = new_run()
    for step in (1, 2, 3):
        save(tmp_path, step, run)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_00000{i}" for i in (1, 2, 3)]


def whole(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text("{}")
    return folder


def test_incomplete_checkpoints_do_not_count(tmp_path: Path) -> None:
    """A save that was killed leaves another name, or no state file."""
    complete = whole(tmp_path / "step_000010")
    whole(tmp_path / "step_000020.partial")
    (tmp_path / "step_000030").mkdir()
    assert checkpoints(tmp_path) == [complete]


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    """Also where the step outgrows its six digits."""
    names = ["step_000009", "step_000010", "step_999999", "step_1000000"]
    for name in reversed(names):
        whole(tmp_path / name)
    assert [path.name for path in checkpoints(tmp_path)] == names


def test_no_folder_has_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none") == []


def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    """Step 2's save ends before it is complete, with one checkpoint to keep."""
    run = new_run()
    save(tmp_path, 1, run, keep_last_n=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        StateWriter(tmp_path, CPU, keep_last_n=1).save(2, *run, {"data": object()})
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000001"]


def no_room_for(*names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = FileSystemWriter.write_data

    def write_if_room(self: FileSystemWriter, *args: Any) -> Any:
        if Path(self.path).stem in names:
            raise OSError(28, "No space left on device")
        return write(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_if_room)


def test_a_full_disk_harms_no_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipes show a ValueError without a traceback; torch wraps it into a BaseException. What was
    written is removed: there is little room as it is."""
    run = new_run()
    save(tmp_path, 1, run, keep_last_n=1)
    no_room_for("step_000002", monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match=r"step_000002 could not be written \(.*No space left"):
        save(tmp_path, 2, run, keep_last_n=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert newest_whole(tmp_path, CPU) == (tmp_path / "step_000001", [])


def test_a_failed_save_does_not_prevent_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of a SIGTERM, say. Nothing is left to complain of but in a warning."""
    run = new_run()
    no_room_for("step_000001", monkeypatch=monkeypatch)
    writer = StateWriter(tmp_path, CPU)
    writer.save(1, *run, {"data": {}})
    writer.save(2, *run, {"data": {}})
    assert checkpoints(tmp_path) == [tmp_path / "step_000002"]
    writer.wait()
    warning = f"WARNING: {tmp_path}/step_000001 could not be written (No space left"
    assert capsys.readouterr().err.replace("[Errno 28] ", "").startswith(warning)


def test_two_failed_saves_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It doesn't train for days without a checkpoint."""
    run = new_run()
    no_room_for("step_000001", "step_000002", monkeypatch=monkeypatch)
    writer = StateWriter(tmp_path, CPU)
    writer.save(1, *run, {"data": {}})
    with pytest.raises(
        ValueError, match=r"step_000002 could not be written .* free some disk space"
    ):
        writer.save(2, *run, {"data": {}})


def test_lost_best_weights_end_the_run_once_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would export others as the best; resumed from step 2 it knows of the earlier ones only."""
    run = new_run()
    no_room_for(BEST, monkeypatch=monkeypatch)
    writer = StateWriter(tmp_path, CPU)
    writer.save_best(1, run[0], {})
    with pytest.raises(ValueError, match="best could not be written"):
        writer.save(2, *run, {"data": {}})
    assert newest_whole(tmp_path, CPU) == (tmp_path / "step_000002", [])


def test_what_is_saved_is_the_run_at_that_moment(tmp_path: Path) -> None:
    """Not what it is by the time that it is written: 3 steps are taken meanwhile."""
    torch.manual_seed(0)
    run = new_run()
    train(*run, 2)
    before = {name: tensor.clone() for name, tensor in run[0].state_dict().items()}
    writer = StateWriter(tmp_path, CPU)
    writer.save(2, *run, {"data": {}})
    train(*run, 3)
    writer.wait()
    assert not same_state(before, dict(run[0].state_dict()))
    load_training_state(tmp_path / "step_000002", *run, CPU)
    assert same_state(before, dict(run[0].state_dict()))


def test_a_state_of_the_best_step_does_not_wait_for_the_best_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, by 2 steps, before either is written; both are of step 2."""
    write, goes_on = FileSystemWriter.write_data, threading.Event()

    def write_later(self: FileSystemWriter, *args: Any) -> Any:
        assert goes_on.wait(5)
        return write(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_later)
    run = new_run()
    train(*run, 2)
    weights, moments = (copy.deepcopy(part.state_dict()) for part in run)
    writer = StateWriter(tmp_path, CPU)
    writer.save_best(2, run[0], {})
    writer.save(2, *run, {"data": {}})
    train(*run, 2)
    goes_on.set()
    writer.wait()
    load_best_weights(tmp_path, run[0], CPU)
    assert same_state(dict(run[0].state_dict()), dict(weights))
    train(*run, 1)
    load_training_state(tmp_path / "step_000002", *run, CPU)
    assert same_state(dict(run[0].state_dict()), dict(weights))
    assert same_state(run[1].state_dict(), moments)


def test_a_run_that_fails_completes_the_state_that_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_slowly = dcp.save

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return save_slowly(*arguments, **options)

    monkeypatch.setattr(dcp, "save", slow)
    writer = StateWriter(tmp_path, CPU)
    with suppress(KeyError), closing(writer):
        writer.save(1, *new_run(), {"data": {"seed": 5}})
        raise KeyError
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000001"]


@pytest.mark.parametrize(
    ("device", "pin_memory", "pinned"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_memory_is_pinned_on_a_gpu_where_it_may_be(
    device: str, pin_memory: bool, pinned: bool
) -> None:
    """Copies that don't wait are right from pinned memory only."""
    options = staging_options(torch.device(device), pin_memory=pin_memory)
    assert (options.use_pinned_memory, options.use_non_blocking_copy) == (pinned, pinned)


def test_the_pause_is_counted_once(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, CPU)
    assert writer.take_pause() == 0
    writer.save(2, *new_run(), {"data": {}})
    assert 0 < writer.take_pause() < 5
    assert writer.take_pause() == 0
    writer.wait()


def test_a_save_goes_over_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / "step_000002.partial").mkdir(parents=True)
    (tmp_path / "step_000002.partial" / "rest").write_text("")
    save(tmp_path, 2, new_run())
    assert not (tmp_path / "step_000002" / "rest").exists()


def test_frozen_weights_are_not_in_the_training_state(tmp_path: Path) -> None:
    """LoRA's base weights come from their checkpoint again: 2 adapters of 2 matrices are saved."""
    save(tmp_path, 1, new_run(meta_lora_decoder()))
    keys = dcp.FileSystemReader(tmp_path / "step_000001").read_metadata().state_dict_metadata
    assert len([key for key in keys if key.startswith("model.")]) == 4


# Broken checkpoints


def break_state(folder: Path, how: str) -> None:
    (shard,) = folder.glob("*.distcp")
    if how == "no shard":
        shard.unlink()
    elif how == "short shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "no metadata":
        (folder / ".metadata").unlink()
    elif how == "damaged metadata":
        (folder / ".metadata").write_bytes(b"damaged")
    elif how == "no state":
        (folder / STATE_FILE).unlink()
    elif how == "empty random state":
        (folder / "random_0.pt").write_bytes(b"")
    elif how == "short random state":
        (folder / "random_0.pt").write_bytes((folder / "random_0.pt").read_bytes()[:-1])
    else:
        (folder / STATE_FILE).write_text("{")


DAMAGES = {
    "no shard": "no __0_0.distcp",
    "short shard": "__0_0.distcp is cut off",
    "no metadata": "no .metadata",
    "damaged metadata": ".metadata: UnpicklingError",
    "no state": "no state.json",
    "empty random state": "random_0.pt is cut off",
    "short random state": "random_0.pt is cut off",
    "damaged state": "state.json: JSONDecodeError",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_broken_checkpoint_is_passed_over(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a warning; the run goes on from the one before."""
    for step in (3, 6):
        save(tmp_path, step, with_schedule(0.01)[:2])
    break_state(tmp_path / "step_000006", how)
    found = resume_training(tmp_path, *with_schedule(0.01), {"seed": 5}, CPU)
    assert found == (tmp_path / "step_000003", 3)
    warning = capsys.readouterr().err
    assert warning.startswith(f"WARNING: {tmp_path}/step_000006 is broken ({DAMAGES[how]}")
    assert warning.count("\n") == 1


def damage(file: Path, how: str) -> None:
    """What a disk, or a power cut, does to a file; its size stays, or becomes 0."""
    content = bytearray(file.read_bytes())
    if how == "NULs":
        content = bytearray(len(content))
    elif how == "empty":
        content = bytearray()
    else:  # of a shard in the middle of the weights, not in a header of them
        content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


@pytest.fixture(scope="module")
def two_states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "states"
    run = new_run()
    for step in (3, 6):
        save(folder, step, run)
    return folder


@pytest.mark.parametrize("how", ["bit flip", "NULs", "empty"])
@pytest.mark.parametrize(
    "name", ["__0_0.distcp", ".metadata", "random_0.pt", STATE_FILE, SUMS_FILE]
)
def test_a_damaged_state_is_passed_over(
    how: str, name: str, two_states: Path, tmp_path: Path
) -> None:
    """Whichever of its files is damaged, and whether or not it can still be read. The problem names
    the file."""
    folder = shutil.copytree(two_states, tmp_path / "states")
    assert newest_whole(folder, CPU) == (folder / "step_000006", [])
    damage(folder / "step_000006" / name, how)
    found, (problem,) = newest_whole(folder, CPU)
    assert found == folder / "step_000003"
    prefix = f"{folder}/step_000006 is broken ("
    assert problem.startswith(prefix)
    assert name in problem.removeprefix(prefix)


def test_a_state_without_digests_is_resumed(tmp_path: Path) -> None:
    """Those of earlier versions have none."""
    save(tmp_path, 3, with_schedule(0.01)[:2])
    (tmp_path / "step_000003" / SUMS_FILE).unlink()
    found = resume_training(tmp_path, *with_schedule(0.01), {"seed": 5}, CPU)
    assert found == (tmp_path / "step_000003", 3)


def test_a_state_has_the_digests_of_all_its_files(tmp_path: Path) -> None:
    """As `sha256sum` computes them, though they were computed while the files were written."""
    save(tmp_path, 3, new_run())
    state = tmp_path / "step_000003"
    expected = {file.name: sha256(file) for file in state.iterdir() if file.name != SUMS_FILE}
    assert read_sums(state) == expected
    assert expected.keys() == {"__0_0.distcp", ".metadata", "random_0.pt", STATE_FILE}


def test_a_state_is_on_the_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file, and the names in the folder: after that it gets its name, which is waited for."""
    waited: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        waited.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", note)
    save(tmp_path / "states", 3, new_run())
    *files, folder, last = waited
    files_of_state = {file.name for file in (tmp_path / "states" / "step_000003").iterdir()}
    on_disk = {name.removesuffix(".partial").removesuffix(".tmp") for name in files}
    assert files_of_state <= on_disk
    assert (folder, last) == ("step_000003.partial", "states")


@pytest.mark.parametrize("how", ["bit flip", "NULs", "empty"])
def test_damaged_best_weights_are_none(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on finds other best ones; one that has come to its end says what to do."""
    decoder, _ = attribute_model(tmp_path)
    save_best(tmp_path, 4, decoder, {"val_loss": 0.5})
    damage(tmp_path / BEST / "__0_0.distcp", how)
    assert best_state(tmp_path, CPU) is None
    assert "the best weights from here on count" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"best is broken \(__0_0.distcp .* export=last"):
        load_best_weights(tmp_path, decoder, CPU)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def plant(state: Path, where: str, payload: Payload) -> None:
    """Hide a payload in a state; in its values: behind the last file's end, in place of a value."""
    file = state / ".metadata"
    if where == "description":
        file.write_bytes(pickle.dumps(payload))
    elif where == "random state":
        torch.save({"cpu": payload}, state / "random_0.pt")
    else:
        description = pickle.loads(file.read_bytes())
        index = next(i for i in description.storage_data if i.fqn.endswith("param_groups.0.lr"))
        part = description.storage_data[index]
        buffer = io.BytesIO()
        torch.save(payload, buffer)
        values = state / part.relative_path
        part.offset, part.length = values.stat().st_size, buffer.tell()
        values.write_bytes(values.read_bytes() + buffer.getvalue())
        file.write_bytes(pickle.dumps(description))


@pytest.mark.parametrize("where", ["description", "random state", "settings of the optimizer"])
def test_nothing_in_a_state_is_run(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A state from elsewhere, whose pickles hold a payload, is passed over like a broken one."""
    ran = tmp_path / "ran"
    folder = tmp_path / "states"
    for step in (3, 6):
        save(folder, step, with_schedule(0.01)[:2])
    plant(folder / "step_000006", where, Payload(ran))
    found = resume_training(folder, *with_schedule(0.01), {"seed": 5}, CPU)
    assert found == (folder / "step_000003", 3)
    assert re.match(
        rf"WARNING: {folder}/step_000006 is broken \([^:]+: UnpicklingError",
        capsys.readouterr().err,
    )
    assert not ran.exists()


def test_a_terminal_obeys_nothing_in_a_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its description names a module that would set the window's title."""
    save(tmp_path, 3, with_schedule(0.01)[:2])
    module, name = (b"\x8c" + bytes([len(text)]) + text for text in (b"\x1b]0;title\x07", b"x"))
    (tmp_path / "step_000003" / ".metadata").write_bytes(b"\x80\x04" + module + name + b"\x93.")
    assert resume_training(tmp_path, *with_schedule(0.01), {"seed": 5}, CPU) is None
    warning = capsys.readouterr().err
    assert "0;title" in warning
    assert warning.rstrip("\n").isprintable()


def test_a_state_reads_no_files_of_other_folders(tmp_path: Path) -> None:
    save(tmp_path, 3, with_schedule(0.01)[:2])
    file = tmp_path / "step_000003" / ".metadata"
    description = pickle.loads(file.read_bytes())
    for part in description.storage_data.values():
        part.relative_path = "../../elsewhere"
    file.write_bytes(pickle.dumps(description))
    with pytest.raises(ValueError, match="names a file that isn't the state's"):
        StateReader(file.parent).read_metadata()


def test_a_broken_newer_checkpoint_is_not_kept_in_place_of_a_whole_one(tmp_path: Path) -> None:
    """Step 317 is broken, so the run resumed at 300 saves 310. Of the states to keep, 1, that is
    the newest; 317 is none of them, and goes when the run has overtaken it."""
    run = new_run()
    for step in (300, 317):
        save(tmp_path, step, run)
    break_state(tmp_path / "step_000317", "short shard")
    save(tmp_path, 310, run, keep_last_n=1)
    assert newest_whole(tmp_path, CPU)[0] == tmp_path / "step_000310"
    assert not (tmp_path / "step_000300").exists()
    save(tmp_path, 320, run, keep_last_n=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000320"]


def test_only_broken_checkpoints_are_none(tmp_path: Path) -> None:
    save(tmp_path, 3, with_schedule(0.01)[:2])
    break_state(tmp_path / "step_000003", "no shard")
    assert resume_training(tmp_path, *with_schedule(0.01), {"seed": 5}, CPU) is None


@pytest.mark.parametrize("moment", ["written", "set aside", "renamed"])
def test_a_kill_between_the_renames_loses_nothing(moment: str, tmp_path: Path) -> None:
    """The best weights are replaced: the earlier ones go to another name, the new ones come to
    theirs, the earlier ones are removed. After a kill at any point there are best weights."""
    decoder, _ = attribute_model(tmp_path / "model")
    folder = tmp_path / "checkpoints"
    save_best(folder, 4, decoder, {})
    if moment == "written":
        shutil.copytree(folder / BEST, folder / "best.partial")
    elif moment == "set aside":
        shutil.copytree(folder / BEST, folder / "best.partial")
        (folder / BEST).rename(folder / "best.earlier")
    else:
        shutil.copytree(folder / BEST, folder / "best.earlier")
    StateWriter(folder, CPU)
    assert [path.name for path in folder.iterdir()] == [BEST]
    assert best_state(folder, CPU) == {"step": 4}


# Other layouts


@pytest.fixture(scope="module")
def on_ranks(
    tmp_path_factory: pytest.TempPathFactory, run_script: Callable[..., None]
) -> dict[str, Any]:
    """What states_on_ranks.py found, by layout."""
    folder = tmp_path_factory.mktemp("states")
    run_script(Path(__file__).with_name("states_on_ranks.py"), folder)
    found = {file.stem: torch.load(file) for file in folder.glob("*.pt")}
    return {"folder": folder, **found}


def test_each_ranks_files_have_their_digests(on_ranks: dict[str, Any]) -> None:
    """Computed by the rank that wrote the file; the states of other layouts were checked too."""
    state = on_ranks["folder"] / "checkpoints" / "step_000003"
    expected = {file.name: sha256(file) for file in state.iterdir() if file.name != SUMS_FILE}
    assert read_sums(state) == expected
    assert {f"__{rank}_0.distcp" for rank in range(4)} < expected.keys()


def test_resumed_on_the_same_layout_the_run_is_the_same(on_ranks: dict[str, Any]) -> None:
    """TP2 x FSDP2: 5 steps, saved in the background after 3; the last 2 again, bit for bit."""
    saving, resumed = on_ranks["tp2_fsdp2"], on_ranks["tp2_fsdp2_again"]
    assert resumed["losses"] == saving["losses"][3:]
    assert same_state(resumed["weights"], saving["weights"])


@pytest.mark.parametrize("layout", ["plain", "fsdp2", "fsdp4", "tp2", "hsdp2x2"])
def test_resumed_on_other_layouts_the_next_losses_are_the_same(
    layout: str, on_ranks: dict[str, Any]
) -> None:
    """On 1, 2 and 4 ranks, to 1e-5; in one step they change by more than 1e-2."""
    expected = on_ranks["tp2_fsdp2"]["losses"]
    assert abs(expected[4] - expected[3]) > 1e-2 * expected[3]
    assert on_ranks[layout]["losses"] == pytest.approx(expected[3:], rel=1e-5)


# Resuming


def with_schedule(lr: float) -> tuple[Any, torch.optim.Optimizer, Any]:
    """A run whose learning rate is lr / (1 + step)."""
    decoder, optimizer = new_run()
    for group in optimizer.param_groups:
        group["lr"] = lr
    return decoder, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))


def test_a_resumed_run_takes_the_configs_learning_rate_at_its_step(tmp_path: Path) -> None:
    """Saved at step 3 of a run with 0.01; resumed with 0.08: 0.08 / 4 now, 0.08 / 5 after a step.
    The moments are the checkpoint's.
    """
    decoder, optimizer, _ = with_schedule(0.01)
    train(decoder, optimizer, 3)
    save(tmp_path, 3, (decoder, optimizer))
    again, other, schedule = with_schedule(0.08)
    found = resume_training(tmp_path, again, other, schedule, {"seed": 5}, CPU)
    assert found == (tmp_path / "step_000003", 3)
    assert other.param_groups[0]["lr"] == 0.02
    assert same_state(other.state_dict()["state"], optimizer.state_dict()["state"])
    other.step()
    schedule.step()
    assert other.param_groups[0]["lr"] == pytest.approx(0.016)


def test_a_resumed_run_takes_the_configs_optimizer_settings(tmp_path: Path) -> None:
    """weight_decay 0.1 when it was saved, 0.3 in the config that goes on."""
    save(tmp_path, 3, with_schedule(0.01)[:2])
    decoder, optimizer, schedule = with_schedule(0.01)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    resume_training(tmp_path, decoder, optimizer, schedule, {"seed": 5}, CPU)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    run = with_schedule(0.01)
    before = {name: tensor.clone() for name, tensor in run[0].state_dict().items()}
    assert resume_training(tmp_path / "none", *run, {"seed": 5}, CPU) is None
    assert same_state(before, dict(run[0].state_dict()))


def test_another_order_of_the_data_is_refused(tmp_path: Path) -> None:
    """Batches would be repeated and left out."""
    save(tmp_path, 3, with_schedule(0.01)[:2])
    with pytest.raises(ValueError, match="seed: 5 then, 6 now"):
        resume_training(tmp_path, *with_schedule(0.01), {"seed": 6}, CPU)


# The best weights


def attribute_decoder(*, lora: bool = False) -> TransformerDecoder:
    """On the meta device; under LoRA the adapters and the head are trained."""
    with torch.device("meta"):
        decoder = lora_llama3(**LORA, **TINY) if lora else llama3(**TINY)
        add_reward_head(decoder, 2)
    if lora:
        set_trainable_params(decoder, get_adapter_params(decoder))
        decoder.output.requires_grad_()
    return decoder


def attribute_model(folder: Path, *, lora: bool = False, seed: int = 0) -> tuple[Any, Any]:
    decoder = attribute_decoder(lora=lora)
    checkpointer = open_reward_checkpointer(
        None,
        decoder,
        tiny_tokenizer(),
        extra_id_template(),
        AttributeSchema(("humor", "verbosity")),
        seed=seed,
        output_dir=str(folder),
        load_head=False,
    )
    load_weights(decoder, checkpointer, CPU, seed=seed, fresh_head=lora)
    return decoder, checkpointer


def changed(decoder: TransformerDecoder) -> dict[str, Tensor]:
    """All trained parameters are made something else; the state of the decoder after it."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return {name: tensor.clone() for name, tensor in decoder.state_dict().items()}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_best_weights_come_back(lora: bool, tmp_path: Path) -> None:
    """Saved, trained on, loaded: bit for bit, head and frozen weights included."""
    decoder, _ = attribute_model(tmp_path, lora=lora)
    best = changed(decoder)
    save_best(tmp_path, 4, decoder, {"val_loss": 0.5})
    changed(decoder)
    load_best_weights(tmp_path, decoder, CPU)
    assert same_state(dict(decoder.state_dict()), best)


def test_the_best_weights_of_another_process_come_back(tmp_path: Path) -> None:
    """A run that was resumed after its best step: base weights from their checkpoint, the rest
    from the file.
    """
    decoder, _ = attribute_model(tmp_path, lora=True)
    best = changed(decoder)
    save_best(tmp_path, 4, decoder, {})
    again, _ = attribute_model(tmp_path, lora=True)
    load_best_weights(tmp_path, again, CPU)
    assert same_state(dict(again.state_dict()), best)


def test_frozen_weights_are_not_among_the_best(tmp_path: Path) -> None:
    """2 adapters of 2 matrices, and the head."""
    decoder, _ = attribute_model(tmp_path, lora=True)
    save_best(tmp_path, 4, decoder, {})
    keys = dcp.FileSystemReader(tmp_path / BEST).read_metadata().state_dict_metadata
    assert {key.removeprefix("model.") for key in keys} == {
        *get_adapter_params(decoder),
        "output.weight",
    }


def test_better_weights_replace_the_best(tmp_path: Path) -> None:
    decoder, _ = attribute_model(tmp_path)
    save_best(tmp_path, 4, decoder, {"val_loss": 0.5})
    better = changed(decoder)
    save_best(tmp_path, 6, decoder, {"val_loss": 0.25})
    changed(decoder)
    load_best_weights(tmp_path, decoder, CPU)
    assert same_state(dict(decoder.state_dict()), better)
    assert best_state(tmp_path, CPU) == {"step": 6, "val_loss": 0.25}
    assert [path.name for path in tmp_path.iterdir()] == [BEST]


def test_without_best_weights_there_is_no_state(tmp_path: Path) -> None:
    assert best_state(tmp_path, CPU) is None
    (tmp_path / "best.partial").mkdir()
    (tmp_path / "best.partial" / STATE_FILE).write_text("{}")
    assert best_state(tmp_path, CPU) is None


def test_the_best_weights_are_no_checkpoint_to_resume_from(tmp_path: Path) -> None:
    """Nor are they counted, or removed, when old checkpoints are."""
    decoder, _ = attribute_model(tmp_path)
    save_best(tmp_path, 4, decoder, {})
    optimizer = torch.optim.AdamW(decoder.parameters())
    for step in (5, 6):
        save(tmp_path, step, (decoder, optimizer), keep_last_n=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, "step_000006"]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000006"]


def test_a_failed_save_leaves_the_earlier_best(tmp_path: Path) -> None:
    decoder, _ = attribute_model(tmp_path)
    save_best(tmp_path, 4, decoder, {"val_loss": 0.5})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_best(tmp_path, 6, decoder, {"val_loss": object()})
    assert best_state(tmp_path, CPU) == {"step": 4, "val_loss": 0.5}


def test_saving_the_best_weights_leaves_the_random_state(tmp_path: Path) -> None:
    """A run that validates more often trains on the same batches."""
    decoder, _ = attribute_model(tmp_path)
    before = torch.get_rng_state()
    save_best(tmp_path, 4, decoder, {})
    assert torch.equal(torch.get_rng_state(), before)
