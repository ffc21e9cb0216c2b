"""Errors that are reported to users, each with the exit code that scripts rely on.

A message is one sentence: the key or file, the value found, and what is valid. The command line prints it without a
traceback and exits with ``exit_code``; `slurm/train.sbatch` decides from the code whether a restart can help.
"""

import os


class DiffMoEError(Exception):
    """Base class of errors that are reported as a sentence instead of a traceback."""

    exit_code = 1
    same_on_all_ranks = False
    """Whether every rank raises the same error, so that only rank 0 prints it."""


class ConfigError(DiffMoEError, ValueError):
    """A recipe, ``--set`` or the DeepSpeed JSON has an unknown key, an invalid value or conflicting values."""

    exit_code = 2
    same_on_all_ranks = True


class TopologyError(ConfigError):
    """The numbers of ranks and experts and the expert-parallel size do not divide each other."""


class NonFiniteError(DiffMoEError):
    """A loss or gradient is NaN or infinite."""

    exit_code = 3
    same_on_all_ranks = True


class DataError(DiffMoEError):
    """A shard is missing, unreadable, or contains something that is not a training sample."""

    exit_code = 4


class CheckpointError(DiffMoEError):
    """A checkpoint is missing, damaged, does not match the model, or cannot be written."""

    exit_code = 5


class LaunchError(DiffMoEError):
    """The ranks could not find each other: a host is down, a port is in use, a rank did not join."""


class RunDirectoryBusyError(ConfigError):
    """Another job is writing into the run directory."""


class AlreadyReportedError(DiffMoEError):
    """Another rank has reported the error; this one exits silently with the same code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("error already reported by another rank")
        self.exit_code = exit_code


class RankLostError(DiffMoEError):
    """Another rank died or stopped responding; the same command resumes from the last checkpoint."""

    exit_code = 85


class WorkerLostError(DiffMoEError):
    """A process that reads images for a rank died, often for lack of memory; the run has saved and can be restarted."""

    exit_code = 85


class Requeue(DiffMoEError):
    """The run was asked to stop, has saved, and should be requeued; not a failure."""

    exit_code = 85


def as_reported(error: DiffMoEError | OSError) -> DiffMoEError:
    """Return the error to report: a system error about a file, such as one of a network disk, becomes a sentence.

    Raises:
        OSError: the error itself, if it is not about a file.
    """
    if isinstance(error, DiffMoEError):
        return error
    if error.filename is None:
        raise error
    return CheckpointError(f"{os.fsdecode(error.filename)}: cannot be used: {error.strerror}.")
