"""The command line: ``diffmoe init``, ``train``, ``sample``, ``evaluate``, ``report``, ``prepare``, ``checkpoint``,
``plan``, ``config``, ``doctor`` and ``scripts``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any, NoReturn

from diffmoe_ds.cli import console
from diffmoe_ds.distributed import signals
from diffmoe_ds.distributed.launch import resolve_launch
from diffmoe_ds.distributed.shutdown import shutdown
from diffmoe_ds.errors import AlreadyReportedError, CheckpointError, DiffMoEError, Requeue, as_reported
from diffmoe_ds.text import shortened

COMMANDS = {
    "init": "look at images and write a recipe that fits them",
    "train": "train a model",
    "sample": "generate images",
    "evaluate": "compare images with a reference: Frechet distance or FID, KID, precision, recall",
    "doctor": "check these hosts, their network and storage",
    "checkpoint": "inspect, reshard, export and import checkpoints",
    "prepare": "convert images to shards",
    "plan": "plan parameters, memory, traffic and time of a run",
    "config": "document the keys of a recipe",
    "report": "describe a run on one HTML page with figures",
    "scripts": "copy the launchers, Slurm scripts and DeepSpeed JSON files that come with the package",
}
"""Command NAME is the module `diffmoe_ds.cli.NAME` with ``add_NAME_arguments``, ``NAME_command`` and ``EXAMPLES``."""

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names under which torch looks for settings of its GPU allocator; it reads only one of them."""

BATCH_SIZE = (
    "the batch size is in the DeepSpeed section or JSON: --set deepspeed.train_batch_size=N (images per step) or "
    "deepspeed.train_micro_batch_size_per_gpu=N"
)
LENGTH = "the length of a run is a number of images: --set run.total_images=N"
ADVICE = {
    **dict.fromkeys(("batch_size", "train_batch_size", "micro_batch", "micro_batch_size"), BATCH_SIZE),
    **dict.fromkeys(("epochs", "num_epochs", "steps", "max_steps", "num_steps", "iterations"), LENGTH),
}
"""Options that other programs have for training, and what to use here."""
MAX_MESSAGE = 4000
"""Most characters of an error; one that quotes a hostile file could have millions."""


def main(argv: Sequence[str] | None = None, *, handle_signals: bool | None = None) -> int:
    """Run a command and return its exit code; user errors are one sentence on stderr, without a traceback.

    Args:
        argv: the arguments after the program's name; those of this process if None.
        handle_signals: whether this process exits afterwards, so that ``train`` may handle the signals that ask a run
            to stop, and a hung collective cannot delay the exit. Default: True if ``argv`` is None.
    """
    console.protect()
    configure_torch()
    parser = _parser()
    args, surplus = parser.parse_known_args(argv)
    if surplus:
        args.parser.error(f"unrecognized arguments: {' '.join(surplus)}{_advice(args.command, surplus)}")
    args.command_line = shlex.join(["diffmoe", *(sys.argv[1:] if argv is None else argv)])
    if handle_signals is None:
        handle_signals = argv is None
    listens = handle_signals and args.command == "train"
    if listens:
        signals.listen()  # before torch is imported, which takes seconds
    try:
        code = run_command(args)
    except Exception:
        if not handle_signals:
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        if listens:
            signals.ignore()
    shutdown(code if handle_signals else None)
    return code


def configure_torch() -> None:
    """Set environment variables that torch reads when it is imported, unless the user has set them."""
    # otherwise torch prints a C++ stack trace for every attempt to reach a lost peer
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # On CPUs each step allocates new gradients for the experts. With pages of 2 MB instead of 4 kB the kernel hands
    # them out faster: the product that fills a gradient of 38 MB took 15 instead of 24 ms on two cores.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        # Ragged rows differ in size from step to step, and fixed segments of GPU memory fragment.
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def run_command(args: argparse.Namespace) -> int:
    """Run the parsed command (``args.run``) and return the exit code; benchmarks and examples use it too."""
    console.protect()
    code = _run(args)
    lost = console.lost_output()
    is_run = getattr(args, "command", None) == "train" and not args.dry_run  # its result is not what it prints
    if code == 0 and lost is not None and not is_run:
        print(f"diffmoe: error: standard output: cannot be written: {lost.strerror}.", file=sys.stderr, flush=True)
        return CheckpointError.exit_code
    return code


def _run(args: argparse.Namespace) -> int:
    try:
        args.run(args)
    except Requeue as stop:
        if resolve_launch().rank == 0:
            print(f"diffmoe: {stop}", file=sys.stderr, flush=True)
        return stop.exit_code
    except (DiffMoEError, OSError) as raised:
        error = as_reported(raised)
        if _should_print(error):
            print(f"diffmoe: error: {shortened(str(error), MAX_MESSAGE)}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _advice(command: str, surplus: Sequence[str]) -> str:
    """Return how to set a recipe's key if an option that ``train`` does not have is named like one, such as --lr."""
    if command != "train":
        return ""
    from diffmoe_ds.config.reference import keys_named

    options = [text.partition("=")[0].lstrip("-").replace("-", "_") for text in surplus if text.startswith("--")]
    for option in options:
        if option in ADVICE:
            return f"; {ADVICE[option]}"
    keys = [key for option in options for key in keys_named(option)]
    return f"; keys of the recipe are set with --set {keys[0]}=VALUE" if keys else ""


def _should_print(error: DiffMoEError) -> bool:
    """Return whether this rank is the one that reports the error."""
    if isinstance(error, AlreadyReportedError):
        return False
    try:
        return not error.same_on_all_ranks or resolve_launch().rank == 0
    except DiffMoEError:  # the launcher's variables are invalid
        return True


class _OptionParser(argparse.ArgumentParser):
    """A parser that takes numbers in ASCII digits only, and shortens errors that quote long arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for kind in (int, float):
            self.register("type", kind, partial(_number, kind))

    def error(self, message: str) -> NoReturn:
        super().error(shortened(message, MAX_MESSAGE))


class _CommandParser(_OptionParser):
    """The parser of one command, whose module is imported only when the command is chosen."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        name = self.prog.rpartition(" ")[2]
        module = import_module(f"diffmoe_ds.cli.{name}")
        self.epilog = module.EXAMPLES
        getattr(module, f"add_{name}_arguments")(self)
        self.set_defaults(command=name, parser=self, run=getattr(module, f"{name}_command"))
        return super().parse_known_args(args, namespace)

    def add_subparsers(self, **kwargs: Any) -> Any:
        """Add plain parsers for the subcommands of a command; argparse would make them of this class."""
        return super().add_subparsers(parser_class=_OptionParser, **kwargs)


def _number(kind: Callable[[str], float], text: str) -> float:
    """Return the number in an argument.

    Raises:
        ValueError: it is not one, or has spaces or other digits than those of ASCII.
    """
    if not text.isascii() or text != text.strip():
        raise ValueError
    return kind(text)


def _parser() -> argparse.ArgumentParser:
    parser = _OptionParser(prog="diffmoe", description="DiffMoE diffusion transformers on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('diffmoe_ds')}")
    # `deepspeed --module diffmoe_ds.cli` passes it before the command; LOCAL_RANK has the same value
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, text in COMMANDS.items():
        commands.add_parser(
            name, help=text, description=text.capitalize() + ".", formatter_class=argparse.RawDescriptionHelpFormatter
        )
    return parser
