"""All checks of steerlm2 on a GPU, in order of value, within a budget of seconds.

    bash tests/gpu/gpu_check.sh                          # everything, 8 minutes
    bash tests/gpu/gpu_check.sh --only steps_fp32,flex_gradients --budget 120
    bash tests/gpu/gpu_check.sh --only speed_8b_lora,speed_sampling
    python tests/gpu/gpu_check.py --device cpu --forks   # a rehearsal without a GPU

Each check is a process of its own with a time limit; a failing one ends nothing else. Checks of
correctness run several at a time; then those that measure time run one at a time, for which a part
of the budget is kept. What doesn't fit into the budget is skipped. In --out: results.jsonl (one
object a check, written as they end), summary.txt (the table that is printed last), logs.txt (the
ends of all outputs).

Statuses: passed; failed (a figure is outside its tolerance: `why`); error (`traceback`); timeout;
skipped (`why`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import checks_numerics  # noqa: F401
import checks_speed  # noqa: F401
import checks_stages  # noqa: F401
import checks_training  # noqa: F401
from checking import (
    CHECKS,
    CONTEXT,
    Child,
    OutsideTolerance,
    ask_card,
    number_of_gpus,
    write_result,
)

ORDER = (
    # the longest first, beside what others need and what says most
    *("environment", "cpu_reference", "quickstart", "flex_gradients", "decoder_gradients_compiled"),
    *("decoder_gradients", "steps_fp32", "steps_like_8b", "sample_score_evaluate", "float8"),
    *("qlora", "token_logps_exact", "sft", "reward", "resume", "planned_memory", "steps_bf16"),
    *("adamw8bit", "steps_cpu_offload", "steps_torchrun", "steps_two_gpus"),
    *("steps_two_gpus_tensor_parallel", "steps_selective_compiled"),
    *("steps_compile", "steps_two_pass", "steps_checkpointing", "steps_selective"),
    # alone
    *("speed_1b", "lora_8b", "speed_1b_long", "logprob_memory", "speed_8b_lora", "speed_sampling"),
)
PRELOADED = (
    *("torch._dynamo", "torch._inductor.config", "torchao.optim", "torchtune._cli.tune"),
    *("steerlm2.training.forward", "steerlm2.distributed.parallelize", "steerlm2.checkpoints"),
    *("datasets", "matplotlib.pyplot", "tokenizers"),
)
"""What forks needn't import again."""


def run_one(name: str) -> None:
    """Run a check in this process, to its end; the result is written as JSON."""
    result: dict[str, Any] = {"status": "passed"}
    try:
        CHECKS[name].run()
    except OutsideTolerance as outside:
        result = {"status": "failed", "why": str(outside)}
    except BaseException as error:
        traceback.print_exc()
        result = {"status": "error", "why": (str(error).strip().splitlines() or [""])[-1]}
        result["traceback"] = traceback.format_exc()[-4000:]
    write_result(**result, figures=CONTEXT.figures)
    sys.stdout.flush()
    os._exit(0)  # whatever threads and process groups there still are


def environment_of_checks(args: argparse.Namespace, *, alone: bool) -> dict[str, str]:
    """For one machine, whose name and other interfaces may lead nowhere, and with one cache of
    compiled kernels for all processes."""
    caches = args.work / "compiled"
    return {
        "OMP_NUM_THREADS": str(args.threads),
        "TORCHINDUCTOR_COMPILE_THREADS": "16" if alone else "4",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }


class Running:
    """A check's process."""

    def __init__(self, name: str, args: argparse.Namespace, limit: float) -> None:
        self.name, self.limit, self.started = name, limit, time.monotonic()
        self.result = args.work / f"{name}.json"
        self.result.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--inner", name, "--device", args.device]
        command += ["--work", args.work, "--out", args.out, *["--forks"] * args.forks]
        env = environment_of_checks(args, alone=CHECKS[name].alone)
        self.child = Child(command, args.work / f"{name}.log", env=env, fork=args.forks)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def ended(self) -> dict[str, Any] | None:
        """Its result, once it has ended or its time is up."""
        if (status := self.child.poll()) is None:
            if self.seconds < self.limit:
                return None
            self.child.kill()
            found = self._read() | {"status": "timeout", "why": f"after {self.limit:.0f} s"}
        else:
            found = self._read()
            if "status" not in found:
                tail = self.child.log.read_text(errors="replace")[-2000:]
                why = f"the process ended with {status}"
                found |= {"status": "error", "why": why, "traceback": tail}
        return {"check": self.name, "seconds": round(self.seconds, 1)} | found

    def _read(self) -> dict[str, Any]:
        return json.loads(self.result.read_text()) if self.result.exists() else {}


class Driver:
    """Runs the chosen checks and writes down what they find."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.results: dict[str, dict[str, Any]] = {}
        self.running: list[Running] = []
        self.gpus = number_of_gpus() if args.device == "cuda" else math.inf
        self.wanted = chosen_checks(args)
        self.pending = list(self.wanted)
        self.results_file = args.out / "results.jsonl"
        self.results_file.write_text("")
        (args.out / "logs.txt").write_text("")

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def passed(self) -> bool:
        return all(r["status"] in ("passed", "skipped") for r in self.results.values())

    def run(self) -> None:
        def stop(*_: Any) -> None:
            for one in self.running:
                one.child.kill()
            print(self.summary())
            sys.exit(1)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        while self.pending or self.running:
            for one in list(self.running):
                if (result := one.ended()) is not None:
                    self.running.remove(one)
                    self.end(one.name, result, one.child.log)
            self.start()
            time.sleep(0.05)
        print(self.summary())

    def start(self) -> None:
        """The next checks that may run now."""
        together = [name for name in self.pending if not CHECKS[name].alone]
        if not together:
            if self.pending and not self.running:
                self.begin(self.pending[0])
            return
        for name in together:
            if len(self.running) >= self.args.jobs:
                return
            needed = [need for need in CHECKS[name].needs if need in self.wanted]
            states = [self.results.get(need, {}).get("status") for need in needed]
            if any(state not in (None, "passed") for state in states):
                self.end(name, {"status": "skipped", "why": f"needs {needed}"})
            elif None not in states:
                self.begin(name)

    def begin(self, name: str) -> None:
        """Start a check, or skip it where too little time is left or a GPU is missing."""
        if (wanted := CHECKS[name].gpus) > self.gpus:
            why = f"it needs {wanted} GPUs, and there are {self.gpus}"
            return self.end(name, {"status": "skipped", "why": why})
        left = self.seconds_for(name)
        if left < CHECKS[name].least:
            why = f"{max(left, 0):.0f} s of the budget are left for it"
            return self.end(name, {"status": "skipped", "why": why})
        self.pending.remove(name)
        limit = min(CHECKS[name].seconds * self.args.patience, left)
        self.running.append(Running(name, self.args, limit))

    def seconds_for(self, name: str) -> float:
        """Until the budget is spent, without what is kept for the checks that run alone."""
        left = self.args.budget - self.elapsed
        if CHECKS[name].alone:
            return left
        return left - sum(CHECKS[other].least for other in self.pending if CHECKS[other].alone)

    def end(self, name: str, result: dict[str, Any], log: Path | None = None) -> None:
        """Write down a result."""
        if name in self.pending:
            self.pending.remove(name)
        result = {"check": name, "at": round(self.elapsed, 1)} | result
        self.results[name] = result
        with self.results_file.open("a") as file:
            file.write(json.dumps(result) + "\n")
        if log is not None:
            size = 3_000 if result["status"] == "passed" else 40_000
            text = log.read_text(errors="replace")[-size:]
            with (self.args.out / "logs.txt").open("a") as file:
                file.write(f"\n======== {name}: {result['status']}\n{text}\n")
        print(one_line(result), flush=True)
        (self.args.out / "summary.txt").write_text(self.summary())

    def summary(self) -> str:
        """A line a check, and how many there are of each status."""
        lines = [one_line(self.results[name]) for name in self.wanted if name in self.results]
        statuses = [result["status"] for result in self.results.values()]
        said = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
        return "\n".join(["", *lines, f"\n{said}; {self.elapsed:.0f} s"]) + "\n"


def chosen_checks(args: argparse.Namespace) -> list[str]:
    """Names in order, with what the chosen ones need unless an earlier call left it in --work."""
    chosen = args.only.split(",") if args.only else every_check(args.device)
    skipped = args.skip.split(",") if args.skip else []
    if unknown := [name for name in [*chosen, *skipped] if name not in CHECKS]:
        raise SystemExit(f"no such check: {', '.join(unknown)}; there are {', '.join(ORDER)}")
    wanted = {name for name in chosen if name not in skipped}
    needed = {need for name in wanted for need in CHECKS[name].needs}
    wanted |= {need for need in needed if not passed_before(args.work / f"{need}.json")}
    return [name for name in ORDER if name in wanted]


def every_check(device: str) -> list[str]:
    """In order; on a CPU without those that would do there what another one does, on a GPU without
    those that must be named."""
    if device == "cuda":
        return [name for name in ORDER if not CHECKS[name].named]
    return [name for name in ORDER if not CHECKS[name].rehearsed_by]


def passed_before(result: Path) -> bool:
    return result.exists() and json.loads(result.read_text()).get("status") == "passed"


def one_line(result: dict[str, Any]) -> str:
    figures = result.get("figures", {})
    said = " ".join(f"{key}={str(value)[:60]}" for key, value in figures.items())
    why = f" [{result['why']}]" if result.get("why") else ""
    seconds = result.get("seconds", 0)
    return f"{result['status']:8}{result['check']:27}{seconds:6.1f} s{why[:300]} {said[:600]}"


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal at tiny sizes"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check_out")))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gpu_check_work")
    parser.add_argument("--budget", type=float, default=480, help="seconds, all together")
    parser.add_argument("--jobs", type=int, help="checks of correctness at a time")
    parser.add_argument("--threads", type=int, default=2, help="of each process, on the CPU")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the time limits")
    parser.add_argument("--only", help="names, with commas between them")
    parser.add_argument("--skip", help="likewise")
    parser.add_argument("--list", action="store_true", help="the checks, and nothing else")
    parser.add_argument(
        "--forks", action="store_true", help="import packages once and fork; for rehearsals"
    )
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out, args.work = args.out.resolve(), args.work.resolve()
    if args.jobs is None:
        args.jobs = 6 if args.device == "cuda" else 1
        if args.device == "cuda" and not args.inner and "Exclusive" in ask_card("compute_mode"):
            args.jobs = 1
    return args


def main() -> None:
    args = parsed_arguments()
    if args.list:
        for name in ORDER:
            one = CHECKS[name]
            kind = "together"
            if one.alone:
                kind = "by name" if one.named else "alone"
            about = " ".join((one.run.__doc__ or "").split())[:90]
            print(f"{name:27}{one.seconds:5} s  {kind:9} {about}")
        return
    for path in (args.out, args.work):
        path.mkdir(parents=True, exist_ok=True)
    if args.inner:
        CONTEXT.device, CONTEXT.work = args.device, args.work
        CONTEXT.name, CONTEXT.forks = args.inner, args.forks
        run_one(args.inner)
    if args.forks:
        os.environ.update(environment_of_checks(args, alone=False))
        for module in PRELOADED:
            importlib.import_module(module)
    driver = Driver(args)
    driver.run()
    sys.exit(0 if driver.passed else 1)


if __name__ == "__main__":
    main()
