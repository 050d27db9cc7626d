"""A JSONL output that a stopped run continues, without lost or duplicate lines.

    done = output.begin(len(items))  # on rank 0
    for start, chosen in remaining_slices(items, range(done, len(items), slice_size), watch):
        output.append(...)           # on rank 0
    output.finish()                  # on rank 0

Lines are appended in slices of a fixed size to `NAME.partial`, which is renamed to NAME when it is
complete. A run that starts again truncates it to its complete slices and continues there, so that
it computes the same slices as a run that was never stopped. `NAME.settings.json` has the settings
that the lines depend on, so that lines of different settings aren't mixed in one file.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from tqdm import tqdm

from steerlm2.checkpoint_dirs import file_digest, is_checkpoint, weights_digest
from steerlm2.data.settings import settings_file
from steerlm2.files import open_own, parse_json, replace_durably, write_durably
from steerlm2.masking import comparable_values
from steerlm2.runs.hangs import LONG, HangWatch
from steerlm2.runs.lock import is_in_place, lock_file
from steerlm2.runs.output import make_output_dir

T = TypeVar("T")


class ResumableOutput:
    """The output, written by one process: check -> begin -> append, append, ... -> finish.

    Args:
        path: of the complete file.
        input_file: that the lines are computed from; its digest is one of the settings.
        settings: JSON values that the lines depend on. The path of a checkpoint is replaced by the
            digest of its weights, and a secret has one beside its mask.
        slice_size: lines of an `append`; only the last one may have fewer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        input_file: str | Path,
        settings: Mapping[str, Any],
        slice_size: int,
    ) -> None:
        self.path = Path(path)
        self.input_file = Path(input_file)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.settings_file = settings_file(self.path)
        self.settings = comparable_values(_with_weights_for_folders(settings))
        self.slice_size = slice_size
        self._file: IO[bytes] | None = None

    def check(self) -> None:
        """Check that an output that exists was begun with the same settings and input.

        Raises:
            ValueError: where it wasn't.
            FileNotFoundError: where there is no input.
        """
        self.settings["input_sha256"] = file_digest(self.input_file)
        written = self.path if self.path.exists() else self.partial
        if not written.exists() or (written == self.partial and written.stat().st_size == 0):
            return  # an output without lines counts as not begun
        try:
            known = self.settings_file.exists()
            earlier = parse_json(self.settings_file.read_bytes()) if known else {}
            if not isinstance(earlier, dict):
                raise ValueError("it isn't a JSON object")
        except ValueError as error:
            raise ValueError(
                f"{self.settings_file} is damaged ({error}): what {written} was written with isn't "
                f"known; give another output, or remove {self.path}*"
            ) from error
        changed = [key for key in self.settings if self.settings[key] != earlier.get(key)]
        if changed:
            raise ValueError(
                f"{self.path} was begun with other settings ({', '.join(changed)}): give "
                f"another output, or remove {self.path}*"
            )

    def begin(self, num_lines: int) -> int:
        """Make the output ready for `append`, without an incomplete slice of an earlier run.

        Args:
            num_lines: of the complete file.

        Returns:
            The number of lines that exist.

        Raises:
            ValueError: where the folder isn't writable, or another run writes to this output.
        """
        if self.path.exists():
            self.partial.unlink(missing_ok=True)  # of a `finish` that was killed
            return num_lines
        make_output_dir(self.path.parent, "the folder of output")
        self._file = open_own(self.partial, "a+b")
        try:
            # A worker of an earlier run can outlive its launcher.
            lock_file(self._file)
        except BlockingIOError as error:
            raise ValueError(
                f"another run writes to {self.partial}: wait for it, or end it"
            ) from error
        if self.partial.stat().st_size == 0:
            write_durably(self.settings_file, json.dumps(self.settings, indent=2) + "\n")
        done, size = self._whole_slices(self._file, num_lines)
        self._file.truncate(size)
        return done

    def append(self, lines: Iterable[bytes]) -> None:
        """Write the next slice, and wait until it is on the disk (fsync).

        Raises:
            ValueError: where the output was removed meanwhile.
        """
        assert self._file is not None
        self._check_place(self._file)
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, final_line: Callable[[bytes], bytes] | None = None) -> None:
        """Rename the output to its final name; it must have all lines.

        Args:
            final_line: converts an appended line for the final file; b"" leaves it out.
        """
        if self._file is None:
            return
        self._check_place(self._file)
        self._file.close()
        if final_line is not None:
            final = self.path.with_name(self.path.name + ".final")
            with self.partial.open("rb") as lines, open_own(final, "wb") as file:
                file.writelines(map(final_line, lines))
            replace_durably(final, self.path)
            self.partial.unlink()
        else:
            replace_durably(self.partial, self.path)

    def _check_place(self, file: IO[bytes]) -> None:
        if not is_in_place(file, self.partial):
            raise ValueError(
                f"{self.partial} was removed or replaced while the run wrote into it: what it had "
                "is lost, and the same command begins anew"
            )

    def _whole_slices(self, file: IO[bytes], num_lines: int) -> tuple[int, int]:
        """Lines and bytes of the complete slices of an earlier run.

        A power cut can leave NULs in place of the last slice, or of a part of it.
        """
        done, size, offset = 0, 0, 0
        file.seek(0)
        for number, line in enumerate(file, start=1):
            offset += len(line)
            if b"\0" in line:
                break
            whole = line.endswith(b"\n")  # a kill may have cut the last line off
            if whole and (number % self.slice_size == 0 or number == num_lines):
                done, size = number, offset
        return done, size


def remaining_slices(
    items: Iterable[T],
    starts: range,
    watch: HangWatch,
    *,
    unit: str = "group",
    text: str = "",
    patience: float = 1.0,
) -> Iterator[tuple[int, list[T]]]:
    """The slices that earlier runs left to do, each after the index of its first item.

    Rank 0 shows a bar, and the watch is told where the run is.

    Args:
        items: of the complete output.
        starts: range(items that are done, number of items, items of a slice).
        unit: what an item is called.
        text: what is done, before the bar.
        patience: of the watch. The first slice has LONG: in it models are loaded, and compile.

    Raises:
        ValueError: where the items end before the output is complete.
    """
    items = itertools.islice(items, starts.start, None)
    where = f"{text}, {unit}" if text else unit
    shown = watch.world.is_main
    with tqdm(
        desc=text, total=starts.stop, initial=starts.start, disable=not shown, unit=unit
    ) as bar:
        for start in starts:
            chosen = list(itertools.islice(items, starts.step))
            if len(chosen) < min(starts.step, starts.stop - start):
                raise ValueError(
                    f"the input ends after {start + len(chosen)} {unit}s, and had {starts.stop} "
                    "when they were counted: it was changed meanwhile"
                )
            watch.at(f"{where} {start + 1}", patience=LONG if start == starts.start else patience)
            yield start, chosen
            bar.update(len(chosen))


def _with_weights_for_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with digests of weights for paths of checkpoints: a checkpoint may be moved."""
    return {
        key: _with_weights_for_folders(value)
        if isinstance(value, Mapping)
        else weights_digest(value)
        if isinstance(value, str) and is_checkpoint(value)
        else value
        for key, value in settings.items()
    }
