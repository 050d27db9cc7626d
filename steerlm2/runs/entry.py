"""The command-line entry of a recipe: `--config FILE key=value ...`, and the end of its process."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch.distributed as dist
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steerlm2._tune import INTERRUPTED, recipe_directories
from steerlm2.config.docs import help_text, keys_of
from steerlm2.config.keys import ModelKeys, check_checkpoints
from steerlm2.config.loader import CONFIG_CLASS, LOG, ConfigT, load_config
from steerlm2.distributed.world import end_rank
from steerlm2.escaping import shown
from steerlm2.torchtune_private import parse_arguments

USER_ERRORS = (ValueError, OSError, yaml.YAMLError, OmegaConfBaseException)

TRACEBACK_VARIABLE = "STEERLM2_TRACEBACK"

SECONDS_FOR_RANK_0 = 5.0
"""How long the other ranks wait before they print an error, so that rank 0, which mostly has the
same one, prints it and torchrun ends them. A choice: it only delays errors of single ranks."""

_AND_GO_ON = ", and give the same command again: what was complete is kept"
CANNOT_WRITE = {
    errno.ENOSPC: "Free some space where the outputs are" + _AND_GO_ON,
    errno.EDQUOT: "Free some of the quota where the outputs are" + _AND_GO_ON,
    errno.EROFS: "Make the outputs' file system writable" + _AND_GO_ON,
}
"""What to do about errors whose own text says what the matter is, but not always where."""

HELP_FLAGS = {"-h", "--help"}


def recipe_main(config_class: type[ConfigT]) -> Callable[[Callable[[ConfigT], None]], Callable]:
    """Make `main(cfg)` a recipe's entry: `--config FILE key=value ...`, as torchtune parses it.

    A user's mistake (ValueError, a missing file, a full or read-only disk) ends in one message on
    stderr and exit status 1, without a traceback; STEERLM2_TRACEBACK=1 shows it. Ctrl-C ends in one
    line and exit status 130. If `main` joined a world, the process ends with `end_rank`. SIGTERM
    ends the process, except inside of a `StopRequest`. `--help` prints every key,
    with what the config says if one is given.
    """

    def decorate(main: Callable[[ConfigT], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def entry() -> None:
            sys.excepthook = _print_traceback
            # What on_node starts ignores it, for torchrun's sake.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                if HELP_FLAGS & set(sys.argv[1:]):
                    _print_help(config_class, main.__globals__)
                    return
                values = parse_arguments(sys.argv[1:])
                config = load_config(config_class, values, main.__globals__)
                if isinstance(config, ModelKeys):
                    check_checkpoints(config)
                main(config)
                sys.exit()
            except KeyboardInterrupt as interrupt:
                _end_by_interrupt(interrupt)
            except Exception as error:
                LOG.error("ended by an error", exc_info=True)
                if not isinstance(error, USER_ERRORS) or os.environ.get(TRACEBACK_VARIABLE) == "1":
                    if dist.is_initialized():
                        _print_traceback(type(error), error, error.__traceback__)
                        end_rank(1)  # torchrun then ends the other ranks, which wait for this one
                    raise
                sys.stdout.flush()
                if os.environ.get("RANK", "0") != "0":
                    # Mostly all ranks have the same error: rank 0 prints it.
                    time.sleep(SECONDS_FOR_RANK_0)
                print(shown(_error_message(error)), file=sys.stderr, flush=True)
                end_rank(1)
                sys.exit(1)
            end_rank()

        setattr(entry, CONFIG_CLASS, config_class)
        return entry

    return decorate


def _end_by_interrupt(interrupt: KeyboardInterrupt) -> None:
    """One line, from rank 0, and the exit status of a command that Ctrl-C ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what ends shall end
    sys.stdout.flush()
    if os.environ.get("RANK", "0") == "0":
        text = str(interrupt) or "SIGINT: stopped; what was complete is kept"
        print(f"\n{shown(text)}" if sys.stderr.isatty() else shown(text), file=sys.stderr)
    end_rank(INTERRUPTED)
    sys.exit(INTERRUPTED)


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    print(shown("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _print_help(config_class: type, namespace: dict[str, Any]) -> None:
    """Print every key; rank 0 does. Of a config that has problems, these too."""
    if os.environ.get("RANK", "0") != "0":
        return
    file = Path(namespace["__file__"]).resolve()
    recipe = file.stem if file.parent == recipe_directories()[0] else os.path.relpath(file)
    values = _given_values()
    plain = None if values is None else OmegaConf.to_container(values, resolve=False)
    keys = keys_of(config_class, namespace)
    print(help_text(recipe, namespace.get("__doc__"), keys, cast(dict[str, Any] | None, plain)))
    if values is not None:
        try:
            load_config(config_class, values, namespace)
        except ValueError as error:
            print(shown(str(error)))


def _given_values() -> DictConfig | None:
    """The config of the command line with its `key=value` arguments; none without `--config`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config")
    arguments = [argument for argument in sys.argv[1:] if argument not in HELP_FLAGS]
    known, _ = parser.parse_known_args(arguments)
    if not known.config:  # `tune run` needs one: without, steerlm2._tune gives it an empty name
        return None
    return parse_arguments(arguments)


def _error_message(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError) and error.filename:
        text = f"there is no file {os.path.abspath(error.filename)}"
        if str(error.filename) in map(os.path.abspath, sys.argv):  # an unknown name, to torchtune
            text += " and no ready-made config of that name (`tune ls` lists them)"
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        text += ". " + CANNOT_WRITE[error.errno]
    if isinstance(error, yaml.YAMLError):
        text = f"the config is not valid YAML: {text}"
    rank = os.environ.get("RANK", "0")
    where = "error" if rank == "0" else f"error on rank {rank}"
    hint = "" if _raised_by_us(error) else f"\n({TRACEBACK_VARIABLE}=1 shows where)"
    return f"{where}: {text}{hint}"


def _raised_by_us(error: BaseException) -> bool:
    """Whether steerlm2 or the recipe itself raised the error, with a message meant for the user."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].split(".")[0] in ("steerlm2", "__main__")
