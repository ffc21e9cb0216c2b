"""The command line: ``diffmoe train``, ``sample``, ``prepare``, ``checkpoint`` and ``doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from diffmoe_ds.distributed import signals
from diffmoe_ds.distributed.launch import resolve_launch
from diffmoe_ds.errors import AlreadyReportedError, ConfigError, DiffMoEError, NonFiniteError, Requeue


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; a user's mistake is one sentence on stderr, without a traceback.

    Args:
        argv: the arguments after the program's name; none takes those of this process, which is then the command's
            own: signals that ask it to stop are noted from here on, before torch is even imported.
    """
    # When a peer is gone torch would print a page of C++ frames for every attempt to reach it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if argv is not None or "train" not in sys.argv[1:3]:  # the deepspeed launcher puts --local_rank first
        return run_command(_parser().parse_args(argv))
    signals.listen()
    try:
        return run_command(_parser().parse_args(argv))
    finally:
        signals.ignore()


def run_command(args: argparse.Namespace) -> int:
    """Run what a parser chose (``args.run``) and return the exit code; benchmarks and examples use it too."""
    try:
        args.run(args)
    except Requeue as stop:
        if resolve_launch().rank == 0:
            print(f"diffmoe: {stop}", file=sys.stderr, flush=True)
        return stop.exit_code
    except DiffMoEError as error:
        if _should_say(error):
            print(f"diffmoe: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _should_say(error: DiffMoEError) -> bool:
    """Rank 0 says what all ranks find alike; where ranks cannot be told apart, all do."""
    if isinstance(error, AlreadyReportedError):
        return False
    try:
        return not isinstance(error, (ConfigError, NonFiniteError)) or resolve_launch().rank == 0
    except DiffMoEError:
        return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffmoe", description="DiffMoE diffusion transformers on DeepSpeed.")
    # What `deepspeed --module diffmoe_ds.cli` puts before the command; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # Imported here, not run: the modules behind the commands load torch and DeepSpeed only when they are used.
    from diffmoe_ds.cli import checkpoint, doctor, prepare, sample, train

    for name, text, module, add, run in (
        ("train", "train a model", train, train.add_train_arguments, train.train_command),
        ("sample", "generate images", sample, sample.add_sample_arguments, sample.sample_command),
        (
            "doctor", "examine these hosts and say what to fix", doctor,
            doctor.add_doctor_arguments, doctor.doctor_command,
        ),
        (
            "checkpoint", "inspect, reshard, export and import checkpoints", checkpoint,
            checkpoint.add_checkpoint_arguments, checkpoint.checkpoint_command,
        ),
        ("prepare", "make shards of images", prepare, prepare.add_prepare_arguments, prepare.prepare_command),
    ):  # fmt: skip
        sub = commands.add_parser(
            name, help=text, description=text.capitalize() + ".", epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        add(sub)
        sub.set_defaults(run=run)
    return parser
