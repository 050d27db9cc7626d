"""The state that a stopped run continues from, written in the background.

A state is a torch.distributed.checkpoint directory `step_000100`, each rank writing its own shards.
The run pauses only while they are copied to the host's memory. A thread writes the copy to a
directory of another name and renames that when it is complete, so a directory named `step_...` is
always complete. Its SHA256SUMS shows damage of its files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from steerlm2.checkpoints.quantized_state import (
    State,
    plain_state,
    quantizes,
    read_converted,
    split_by_form,
)
from steerlm2.checkpoints.state_reader import (
    METADATA,
    DamagedError,
    StateReader,
    load_plain,
    read_state,
)
from steerlm2.checkpoints.state_writer import HashingWriter
from steerlm2.distributed.world import World
from steerlm2.escaping import shown
from steerlm2.files import changed, read_sums, sha256, sync, write_durably, write_sums

STATE_FILE = "state.json"
DIGESTS = "digests"
MODEL = "model"
TRAINING_ORDER = "order of the training data"
"""Among the digests: of all of the training data, one record after the other."""
SECONDS_TO_CLOSE = 600.0
"""How long a failed run waits for a state that is being written. A choice: enough for the state of
a large model on a slow file system; a run that has lost a rank ends so much later, at most."""
BEST = "best"
CLOSES_STAGERS = not torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
"""Before 2.13 a stager is closed after its first use (pytorch/pytorch#183413)."""

# A single process without a mesh has no process group; dcp warns of that on every save.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


def staging_options(device: torch.device, *, pin_memory: bool) -> StagingOptions:
    """How a state is copied to the host: at once, and on a GPU without waiting for each tensor if
    the memory is pinned."""
    pinned = pin_memory and device.type == "cuda"
    return StagingOptions(
        use_pinned_memory=pinned,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=pinned,
    )


class StateWriter:
    """Writes a run's states into a folder, one at a time, in a background thread.

    It works like `dcp.async_save`, and then renames the directory and removes old states.

    A run doesn't end when a state can't be written: it prints a warning, and waits until the next
    state is written. It ends if that one can't be written either, if no other follows, or if the
    best weights can't be written, which would be lost.

    Args:
        folder: created at the first save.
        keep_last_n: number of states to keep; older ones are removed once a newer one is complete.
            None keeps all. States of later steps, which a resumed run found broken, are not
            removed until the run has passed them.
        pin_memory: on a GPU, copy into page-locked host memory, which is faster.
        on_complete: called on rank 0, in the thread, with each complete directory.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep_last_n: int | None = None,
        pin_memory: bool = True,
        on_complete: Callable[[Path], None] | None = None,
    ) -> None:
        self.folder = folder
        self.keep_last_n = keep_last_n
        self.on_complete = on_complete
        # A separate group: the thread's collectives must not mix with those of training.
        group = None
        if world.mesh is not None:
            group = dist.new_group(timeout=world.timeout, backend="gloo")
        self.world = dataclasses.replace(world, group=group)
        self._staging = staging_options(world.device, pin_memory=pin_memory)
        self._stager = DefaultStager(self._staging)

        def begin() -> None:
            # Otherwise every rank's thread would create a context on GPU 0.
            if world.device.type == "cuda":
                torch.cuda.set_device(world.device)

        self._thread = ThreadPoolExecutor(1, "checkpoint", begin)
        self._writing: list[tuple[str, Future[None]]] = []
        self._staged: tuple[int, Any] | None = None  # step and copied weights of the last call
        self._failed: dict[str, ValueError] = {}  # of the last "step" and of the last "best"
        self._pause = 0.0
        world.on_main(lambda: _recover(folder))

    def save(
        self, step: int, decoder: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Begin to write `step_{step}`: weights, optimizer, random states, and `state` (JSON).

        State and best weights of one step share the copy of the weights, in either order, so that
        the run needn't wait until the first is written.

        Raises:
            ValueError: where neither the previous state nor this one could be written, or the best
                weights couldn't be written (after an attempt to write this state).
        """

        def tensors() -> dict[str, Any]:
            options = StateDictOptions(ignore_frozen_params=True)
            model_state, optimizer_state = get_state_dict(decoder, optimizer, options=options)
            if quantizes(optimizer):
                plain = plain_state(cast(State, optimizer_state["state"]))
                return {"model": model_state, "optimizer": {**optimizer_state, "state": plain}}
            return {"model": model_state, "optimizer": optimizer_state}

        self._begin(self.folder / f"step_{step:06d}", tensors, step, state)

    def save_best(self, step: int, decoder: nn.Module, state: Mapping[str, Any]) -> None:
        """Begin to write `best`: only the trained weights, and `state` with the step."""

        def tensors() -> dict[str, Any]:
            options = StateDictOptions(ignore_frozen_params=True)
            return {"model": get_model_state_dict(decoder, options=options)}

        self._begin(self.folder / BEST, tensors, step, state)

    def wait(self) -> None:
        """Wait until everything that was begun is complete.

        Raises:
            ValueError: on every rank, where the last state or the last best weights couldn't be
                written.
        """
        self._collect()
        if self._failed:
            failures = "; ".join(map(str, self._failed.values()))
            raise ValueError(
                f"{failures}. Earlier checkpoints are unchanged; free some disk space, and resume "
                "with resume_from_checkpoint=true"
            )

    def close(self) -> None:
        """After a failure: wait for what was begun, but at most SECONDS_TO_CLOSE.

        The ranks write a state together, and one of them may be lost.
        """
        futures.wait([writing for _, writing in self._writing], timeout=SECONDS_TO_CLOSE)

    def take_pause(self) -> float:
        """Seconds that the run has paused for its states since the last call."""
        pause, self._pause = self._pause, 0.0
        return pause

    def _begin(
        self,
        final: Path,
        tensors: Callable[[], dict[str, Any]],
        step: int,
        state: Mapping[str, Any],
    ) -> None:
        """Copy the tensors, except weights that are copied already; the thread writes all."""
        started = time.perf_counter()
        state_text = json.dumps({"step": step, **state})
        copied = {}
        if self._staged is not None and self._staged[0] == step:
            copied["model"] = self._staged[1]
        if not copied:  # otherwise the thread may go on writing the copied weights, which stay
            self._collect()
            if self.world.is_main:
                for error in self._failed.values():
                    print(shown(f"WARNING: {error}; writing {final.name}"), file=sys.stderr)
        to_copy = {name: part for name, part in tensors().items() if name not in copied}
        if CLOSES_STAGERS:
            self._stager = DefaultStager(self._staging)
        staged = {**cast(dict[str, Any], self._stager.stage(to_copy)), **copied}
        random = io.BytesIO()
        torch.save(_random_state(self.world.device), random)
        writing = self._thread.submit(self._write, final, staged, state_text, random.getvalue())
        self._writing.append((final.name.partition("_")[0], writing))
        if self._failed and final.name != BEST:
            self.wait()
        self._staged = step, staged["model"]
        self._pause += time.perf_counter() - started

    def _collect(self) -> None:
        """Wait for what is being written; keep a failure until the next of its kind succeeds."""
        while self._writing:
            kind, writing = self._writing.pop(0)
            self._failed.pop(kind, None)
            try:
                writing.result()
            except ValueError as error:
                self._failed[kind] = error

    def _write(self, final: Path, staged: Any, state_text: str, random: bytes) -> None:
        """Write a state; an earlier directory of the same name stays until it is complete."""
        world, partial = self.world, final.with_suffix(".partial")
        writer = HashingWriter(partial)
        random_file = f"random_{world.rank}.pt"

        def make_room() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            sync(self.folder.parent)

        def complete(sums: dict[str, str]) -> None:
            write_durably(partial / STATE_FILE, state_text)
            write_sums(partial, sums | {STATE_FILE: sha256(state_text.encode())})
            earlier = final.with_suffix(".earlier")
            if final.exists():
                final.rename(earlier)
            partial.rename(final)
            sync(self.folder)
            shutil.rmtree(earlier, ignore_errors=True)
            if self.keep_last_n is not None and final.name != BEST:
                # States of later steps were broken when the run resumed, so they don't count.
                states = checkpoints(self.folder)
                upto_now = states[: states.index(final) + 1]
                for old in upto_now[: -self.keep_last_n]:
                    # A kill leaves it a renamed directory, which `_recover` removes.
                    shutil.rmtree(old.rename(old.with_suffix(".removed")))

        try:
            world.on_main(make_room)
            world.on_all(lambda: write_durably(partial / random_file, random))
            with _plain_messages():
                dcp.save(
                    staged,
                    storage_writer=writer,
                    process_group=world.group,
                    no_dist=world.mesh is None,
                )
            of_ranks = world.gather(writer.sums | {random_file: sha256(random)})
            sums = {name: digest for own in of_ranks for name, digest in own.items()}
            world.on_main(lambda: complete(sums))
        except (OSError, ValueError, RuntimeError) as error:
            if world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"{final} could not be written ({error})") from error
        if world.is_main and self.on_complete is not None:
            self.on_complete(final)


def best_state(folder: Path, world: World) -> dict[str, Any] | None:
    """The `state` that was saved with the best weights, and its step; None where there are none.

    Damaged ones are reported, and count as none. Called by all ranks.
    """
    state_file = folder / BEST / STATE_FILE
    if not world.computed_on_main(state_file.exists):
        return None
    if (problem := _damage(folder / BEST, world)) is not None:
        if world.is_main:
            text = f"{folder / BEST} is broken ({problem}): the best weights from here on count"
            print(shown(f"WARNING: {text}"), file=sys.stderr)
        return None
    return world.computed_on_main(lambda: json.loads(state_file.read_bytes()))


def load_best_weights(folder: Path, decoder: nn.Module, world: World) -> None:
    """Load the weights of `folder/best` into the decoder. Called by all ranks.

    Raises:
        ValueError: where they were damaged since they were written.
    """
    if (problem := _damage(folder / BEST, world)) is not None:
        raise ValueError(
            f"{folder / BEST} is broken ({problem}): the best weights can't be exported. The last "
            "ones can, by resume_from_checkpoint=true export=last"
        )
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    tensors = {"model": get_model_state_dict(decoder, options=options)}
    with _plain_messages():
        read_state(tensors, StateReader(folder / BEST), no_dist=world.mesh is None)
    set_model_state_dict(decoder, tensors["model"], options=options)


def checkpoints(folder: Path) -> list[Path]:
    """The complete training states in a folder, oldest first."""
    found = (path.parent for path in folder.glob(f"step_*[0-9]/{STATE_FILE}"))
    return sorted(found, key=_step)


def newest_whole(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest undamaged state of a folder (None: there is none), and problems of newer ones.

    Called by all ranks.
    """
    problems: list[str] = []

    def find() -> list[Path]:
        named = folder.glob("step_*")
        steps = [path for path in named if path.name.removeprefix("step_").isdecimal()]
        return sorted(steps, key=_step, reverse=True)

    for path in world.computed_on_main(find):
        if (problem := _damage(path, world)) is None:
            return path, problems
        problems.append(f"{path} is broken ({problem})")
    return None, problems


def resume_training(
    folder: Path,
    decoder: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: LambdaLR,
    data_state: Mapping[str, Any],
    world: World,
) -> tuple[Path, int] | None:
    """Continue from the newest complete checkpoint of a folder; broken ones are reported.

    Weights, the optimizer's moments and the random states are the checkpoint's; the optimizer's
    settings and the learning rate schedule are the config's, at the checkpoint's step.

    Args:
        data_state: values that the order of the batches depends on, as passed to
            `StateWriter.save`; `digests` among them, by name, says what the run is trained on and
            starts from, and `model` what the decoder computes (`models.config_json.computation`).

    Returns:
        The checkpoint and its step; None where there is no checkpoint.

    Raises:
        ValueError: where the checkpoint is of another model, or has another `data_state`.
    """
    newest, broken = newest_whole(folder, world)
    if world.is_main:
        for problem in broken:
            print(shown(f"WARNING: {problem}: ignored"), file=sys.stderr)
    if newest is None:
        return None
    configured = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    written = json.loads((newest / STATE_FILE).read_text())["data"]
    unknown = {DIGESTS: "data, checkpoint and template", MODEL: "settings of `model`"}
    lacking = [unknown[key] for key in unknown if key in data_state and key not in written]
    if lacking and world.is_main:
        print(
            f"NOTE: {newest} doesn't say which {' and which '.join(lacking)} it is of (an earlier "
            "version wrote it): whether they are this run's isn't checked",
            file=sys.stderr,
        )
    if differences := list(_differences(written, data_state)):
        raise ValueError(
            f"{newest} was written with other things than this run has:\n  - "
            + "\n  - ".join(differences)
            + "\nResuming would go on with something else: use the same ones, or start in another "
            "output_dir"
        )
    state = load_training_state(newest, decoder, optimizer, world)
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)
    lr_scheduler.last_epoch = state["step"]
    for group, base_lr, factor in zip(
        optimizer.param_groups, lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base_lr * factor(state["step"])
    return newest, state["step"]


def _differences(written: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two `data_state`s; digests, and settings of the model, that one of them
    lacks aren't compared."""
    for key in sorted((written.keys() | now.keys()) - {DIGESTS, MODEL}):
        if written.get(key) != now.get(key):
            yield f"{key}: {written.get(key)!r} then, {now.get(key)!r} now"
    model, as_configured = written.get(MODEL, {}), now.get(MODEL, {})
    for key in as_configured:
        if key in model and model[key] != as_configured[key]:
            yield f"model, {key}: {model[key]!r} then, {as_configured[key]!r} now"
    before, digests = written.get(DIGESTS, {}), now.get(DIGESTS, {})
    others = [name for name in digests if name in before and before[name] != digests[name]]
    if len(others) > 1 and TRAINING_ORDER in others:
        others.remove(TRAINING_ORDER)  # follows from the others
    yield from others


def load_training_state(
    checkpoint: Path, decoder: nn.Module, optimizer: Optimizer, world: World
) -> dict[str, Any]:
    """Restore weights, optimizer and random states; returns the JSON `state` with its `step`.

    Raises:
        ValueError: where the checkpoint is of another model.
    """
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    model_state, optimizer_state = get_state_dict(decoder, optimizer, options=options)
    reader = StateReader(checkpoint)
    keys = reader.read_metadata().state_dict_metadata
    present, converted = split_by_form(
        cast(State, optimizer_state["state"]), keys, quantized=quantizes(optimizer)
    )
    to_read: dict[str, Any] = {
        "model": model_state,
        "optimizer": {**optimizer_state, "state": present},
    }
    try:
        with _plain_messages():
            read_state(to_read, reader, no_dist=world.mesh is None)
            world.on_all(lambda: read_converted(converted, reader))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint} can't be resumed with this config's `model` ({error}): use the model it "
            "was written with, or another output_dir"
        ) from error
    set_state_dict(
        decoder,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=options,
    )
    random_file = checkpoint / f"random_{world.rank}.pt"
    if random_file.exists():  # none for a rank that the saving run didn't have
        random_state = load_plain(random_file, random_file.name)
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and world.device.type == "cuda":
            torch.cuda.set_rng_state(random_state["cuda"], world.device)
    return json.loads((checkpoint / STATE_FILE).read_text())


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _damage(checkpoint: Path, world: World) -> str | None:
    """What is wrong with a state, on every rank; None where it is as it was written.

    Each rank reads a part of the files: its own, which it then loads from the page cache.
    """
    if (problem := world.computed_on_main(lambda: _unreadable(checkpoint))) is not None:
        return problem
    return next(filter(None, world.gather(_changed(checkpoint, world))), None)


def _changed(checkpoint: Path, world: World) -> str | None:
    """Which of this rank's part of the files that SHA256SUMS names aren't what it says."""

    def is_ours(name: str) -> bool:
        number = re.search(r"\d+", name)  # of the rank that wrote it
        return int(number[0] if number else 0) % world.size == world.rank

    try:
        names = list(filter(is_ours, read_sums(checkpoint)))
        if missing := [name for name in names if not (checkpoint / name).is_file()]:
            return f"no {', '.join(missing)}"
        found = changed(checkpoint, names)
    except (ValueError, OSError) as error:
        return str(error)
    return f"{', '.join(sorted(found))} changed since it was written" if found else None


def _unreadable(checkpoint: Path) -> str | None:
    """Why a state can't be read; None where it can."""
    looked_at = STATE_FILE
    try:
        state = json.loads((checkpoint / STATE_FILE).read_bytes())
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            return f"{STATE_FILE} has no step"
        if checkpoint.name != BEST and not isinstance(state.get("data"), dict):
            return f"{STATE_FILE} doesn't say what was trained on"
        looked_at = METADATA
        reader = StateReader(checkpoint)
        written = reader.read_metadata().storage_data or {}
        for part in written.values():
            file = checkpoint / part.relative_path
            if file.stat().st_size < part.offset + part.length:
                return f"{file.name} is cut off"
        for file in checkpoint.glob("random_*.pt"):
            looked_at = file.name
            if not zipfile.is_zipfile(file):  # torch.save's zip has its directory at the end
                return f"{file.name} is cut off"
            load_plain(file, file.name)
        reader.check_plain_values()
    except OSError as error:
        return f"no {Path(error.filename or looked_at).name}"
    except DamagedError as error:
        return str(error)
    except Exception as error:  # unpickling a damaged file raises anything
        return f"{looked_at}: {type(error).__name__}: {error}"
    return None


def _recover(folder: Path) -> None:
    """Complete or remove what a killed run left of an unfinished save."""
    for earlier in folder.glob("*.earlier"):
        final = earlier.with_suffix("")
        if final.exists():
            shutil.rmtree(earlier)
        else:
            earlier.rename(final)
    for rest in (*folder.glob("*.partial"), *folder.glob("*.removed")):
        shutil.rmtree(rest)


@contextlib.contextmanager
def _plain_messages() -> Iterator[None]:
    """Raise the first rank's own error in place of the CheckpointException around it."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
