"""Faults in every stage of tiny/quickstart: the end must be that of an undisturbed run.

    python tests/benchmarks/faults.py --output DIR
    python tests/benchmarks/faults.py --output DIR --per-stage 2 names.seed=2

Runs the pipeline once undisturbed. Then it runs it again in another folder, where faults meet each
stage, `--per-stage` of them at random moments; after each the same command goes on. Faults (KINDS):
SIGKILL to everything, to the pipeline alone, and to its stage alone; SIGTERM; Ctrl-C; a full disk;
folders that nobody can write to. The last two need root: the folder is then a file system of its
own, in memory.

After each fault the pipeline has to end by itself, with all its processes and without a traceback
in what it prints. At the end results and weights are compared, byte by byte. Other arguments go to
the pipeline.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from server_process import TUNE

MARKER = "STEERLM2_FAULTS"
"""The environment variable by which a pipeline's processes are known."""
PATIENCE = 120.0
"""Seconds for a pipeline to end after a fault."""
SHARE = 0.6
"""Of the seconds that a stage took undisturbed, in which a fault comes: a stage goes on from what
the run before saved, and one that is complete isn't run again."""
SECONDS_TO_SAVE = 30.0
"""For a stage whose pipeline has gone: SIGTERM reaches it, and it may save."""
COMPARED = ("summary.json", "evaluate/steering.json", "*/epoch_*/*.safetensors", "*/*.jsonl")
"""What must be the same, byte by byte: results, weights, data and samples."""
TIMED = ("metrics.jsonl", "earlier_metrics.jsonl")
"""What isn't: seconds stand in it."""


@dataclass
class Fault:
    """One fault, and what came of it."""

    kind: str
    stage: str
    seconds: float
    """Since the stage that it was meant for began."""
    status: int | None = None
    """Of the pipeline; None where it had to be killed."""
    seconds_to_end: float = 0.0
    left: int = 0
    """Processes that were there when the pipeline had ended, and SECONDS_TO_SAVE later."""
    traceback: bool = False
    said: str = ""


class Pipeline:
    """A running pipeline in a session of its own, as from a terminal."""

    def __init__(self, folder: Path, overrides: list[str], log: Path) -> None:
        self.folder, self.log = folder, log
        self.mark = uuid.uuid4().hex
        tune = [str(TUNE), "run", "steerlm2_pipeline", "--config", "tiny/quickstart"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*tune, f"output_dir={folder}", *overrides],
                env=os.environ
                | {MARKER: self.mark, "PATH": f"{TUNE.parent}:{os.environ.get('PATH', '')}"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def stage(self) -> str | None:
        """What it is at; None before its first stage."""
        with contextlib.suppress(OSError):
            told = (self.folder / "state" / "doing").read_text()  # or what one before it told
            found = re.search(rf"process {self.process.pid} .* at stage (\S+) since", told)
            return found and found[1]
        return None

    def processes(self) -> list[int]:
        """All of it, wherever they were started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARKER}={self.mark}".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def text(self) -> str:
        return self.log.read_text(errors="replace")


# The faults. Each returns what mends it, or None.

Mend = Callable[[], object] | None


def kill_all(pipeline: Pipeline) -> Mend:
    os.killpg(pipeline.process.pid, signal.SIGKILL)
    return None


def kill_pipeline(pipeline: Pipeline) -> Mend:
    pipeline.process.kill()
    return None


def kill_stage(pipeline: Pipeline) -> Mend:
    for process in pipeline.processes():
        if process != pipeline.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    return None


def terminate(pipeline: Pipeline) -> Mend:
    pipeline.process.terminate()
    return None


def ctrl_c(pipeline: Pipeline) -> Mend:
    os.killpg(pipeline.process.pid, signal.SIGINT)
    return None


def fill_disk(pipeline: Pipeline) -> Mend:
    ballast = pipeline.folder.parent / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return ballast.unlink


def make_read_only(pipeline: Pipeline) -> Mend:
    """Neither root nor the owner makes, renames or removes files in an immutable folder."""
    folders = [path for path in (pipeline.folder, *pipeline.folder.rglob("*")) if path.is_dir()]
    subprocess.run(["chattr", "+i", *folders], stderr=subprocess.DEVNULL)  # some are gone by now
    return lambda: subprocess.run(["chattr", "-R", "-i", pipeline.folder], check=True)


KINDS: dict[str, Callable[[Pipeline], Mend]] = {
    "SIGKILL, everything": kill_all,
    "SIGKILL, the pipeline": kill_pipeline,
    "SIGKILL, the stage": kill_stage,
    "SIGTERM": terminate,
    "Ctrl-C": ctrl_c,
    "full disk": fill_disk,
    "read-only folders": make_read_only,
}
OF_DISKS = ("full disk", "read-only folders")


@contextlib.contextmanager
def own_file_system(folder: Path, size: int) -> Iterator[bool]:
    """Whether the folder is one, of so many bytes."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def hit(pipeline: Pipeline, kind: str, stages: list[str], delay: float) -> Fault | None:
    """Wait until one of the stages has run for so long, and do it.

    Returns None where the pipeline ended before.
    """
    seen = None
    while pipeline.process.poll() is None:
        if pipeline.stage() in stages:
            seen = seen or time.monotonic()
        if seen is not None and time.monotonic() > seen + delay:
            break
        time.sleep(0.01)
    if pipeline.process.poll() is not None or seen is None:
        return None
    fault = Fault(kind, pipeline.stage() or "between stages", time.monotonic() - seen)
    struck, mend = time.monotonic(), KINDS[kind](pipeline)
    try:
        fault.status = pipeline.process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(pipeline.process.pid, signal.SIGKILL)
        pipeline.process.wait()
    fault.seconds_to_end = time.monotonic() - struck
    until = time.monotonic() + SECONDS_TO_SAVE
    while (left := pipeline.processes()) and time.monotonic() < until:
        time.sleep(0.05)
    fault.left = len(left)
    if mend is not None:
        mend()
    text = pipeline.text()
    fault.traceback = "Traceback" in text
    fault.said = text.strip().rsplit("\n", 1)[-1][:300]
    return fault


def seconds_of_stages(folder: Path) -> dict[str, float]:
    """In the order in which they were done."""
    files = sorted((folder / "state").glob("*.json"), key=lambda file: file.stat().st_mtime)
    return {file.stem: json.loads(file.read_text())["seconds"] for file in files}


def differences(whole: Path, faulty: Path) -> tuple[int, list[str]]:
    """How many files were compared, and which aren't the same."""
    names = [
        file.relative_to(whole)
        for pattern in COMPARED
        for file in whole.glob(pattern)
        if file.name not in TIMED
    ]
    other = [
        str(name)
        for name in names
        if not (faulty / name).is_file()
        or (faulty / name).read_bytes() != (whole / name).read_bytes()
    ]
    return len(names), other


def table(faults: list[Fault]) -> str:
    """By kind, in Markdown."""
    rows = ["| fault | times | exit status | longest, s | left behind | tracebacks |"]
    rows += ["|---|---|---|---|---|---|"]
    for kind in KINDS:
        own = [fault for fault in faults if fault.kind == kind]
        if not own:
            continue
        statuses = ", ".join(sorted({str(fault.status) for fault in own}))
        longest = max(fault.seconds_to_end for fault in own)
        left, shown = sum(f.left for f in own), sum(f.traceback for f in own)
        rows.append(f"| {kind} | {len(own)} | {statuses} | {longest:.1f} | {left} | {shown} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--per-stage", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args, overrides = parser.parse_known_args()
    rng, faults = random.Random(args.seed), list[Fault]()
    args.output.mkdir(parents=True, exist_ok=True)
    whole = args.output.resolve() / "whole"
    undisturbed = Pipeline(whole, overrides, args.output / "whole.log")
    if undisturbed.process.wait() != 0:
        raise SystemExit(undisturbed.text())
    took = seconds_of_stages(whole)
    bytes_of_whole = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
    disk = args.output.resolve() / "disk"
    with own_file_system(disk, 3 * bytes_of_whole) as is_own:
        faulty = disk / "faulty"
        kinds = [kind for kind in KINDS if is_own or kind not in OF_DISKS]
        for number, (stage, seconds) in enumerate(took.items()):
            left = list(took)[number:]
            while [fault.stage for fault in faults].count(stage) < args.per_stage:
                pipeline = Pipeline(faulty, overrides, args.output / f"{len(faults):03}.log")
                kind, delay = kinds[len(faults) % len(kinds)], rng.uniform(0, SHARE * seconds)
                fault = hit(pipeline, kind, left, delay)
                if fault is None:
                    break
                faults.append(fault)
                print(json.dumps(asdict(fault)), flush=True)
                if fault.stage != stage:
                    break  # it is complete
        last = Pipeline(faulty, overrides, args.output / "last.log")
        if last.process.wait() != 0:
            raise SystemExit(last.text())
        compared, other = differences(whole, faulty)
        shutil.copytree(faulty, args.output / "faulty", dirs_exist_ok=True)
    (args.output / "faults.json").write_text(json.dumps([asdict(f) for f in faults], indent=1))
    print(table(faults))
    print(f"{len(faults)} faults in {len({fault.stage for fault in faults})} stages")
    print(f"{compared - len(other)} of {compared} files are the same", *other, sep="\n")
    if other:
        sys.exit(1)


if __name__ == "__main__":
    main()
