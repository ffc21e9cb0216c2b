"""Errors a user can cause or meet, each with the exit code that scripts rely on.

A message is one sentence: the key or file, the value found, and what would be valid.  The command line
prints it without a traceback and leaves with ``exit_code``; `slurm/train.sbatch` decides from the code
whether starting again can help.
"""


class DiffMoEError(Exception):
    """Base of every error that is reported to the user as a sentence instead of a traceback."""

    exit_code = 1


class ConfigError(DiffMoEError, ValueError):
    """A recipe, a ``--set`` or the DeepSpeed JSON asks for something that does not exist or does not fit."""

    exit_code = 2


class TopologyError(ConfigError):
    """Ranks, expert-parallel size and experts do not divide each other."""


class NonFiniteError(DiffMoEError):
    """A loss or gradient became NaN or infinite."""

    exit_code = 3


class DataError(DiffMoEError):
    """A shard is missing, unreadable, or holds something that is not a training sample."""

    exit_code = 4


class CheckpointError(DiffMoEError):
    """A checkpoint is missing, damaged or of another model, or could not be written."""

    exit_code = 5


class LaunchError(DiffMoEError):
    """The ranks did not find each other: a host is down, a port is taken, a rank never came."""


class RunDirectoryBusyError(ConfigError):
    """Another job is writing into the run directory."""


class AlreadyReportedError(DiffMoEError):
    """Another rank has reported the error; this one exits silently with the same code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("error already reported by another rank")
        self.exit_code = exit_code


class RankLostError(DiffMoEError):
    """Another rank died or stopped answering; the same command continues from the last checkpoint."""

    exit_code = 85


class Requeue(DiffMoEError):
    """The run was asked to stop, has saved, and wants to be started again: not an error of anybody's."""

    exit_code = 85
