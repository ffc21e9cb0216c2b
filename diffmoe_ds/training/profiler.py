"""A trace of some steps, for Perfetto or TensorBoard: which operators and kernels ran when, on rank 0."""

from __future__ import annotations

import sys

from torch.profiler import profile, schedule

from diffmoe_ds.outputs import make_directory
from diffmoe_ds.training.log_files import require_owned
from diffmoe_ds.training.run_log import RunLog
from diffmoe_ds.training.setup import Run
from diffmoe_ds.training.step import StepResult


def profiled_steps(value: int | str) -> range:
    """Return the optimizer steps, from 1, that ``run.profile_steps`` names: 0, a step, or ``FIRST-LAST``."""
    first, _, last = str(value).partition("-")
    return range(int(first), int(last or first) + 1) if value != 0 else range(0)


class ProfileSteps:
    """Hook that writes ``profile/steps_FIRST-LAST.pt.trace.json.gz``; it must be the last hook of a step."""

    def __init__(self, run: Run, log: RunLog) -> None:
        """Start if the next step is the first one to profile, or the one before, in which the profiler warms up."""
        self._run, self._log = run, log
        self._steps = profiled_steps(run.config.run.profile_steps) if run.is_main else range(0)
        self._profile: profile | None = None
        self._start_if_due()

    def __call__(self, step: StepResult) -> None:
        if self._profile is None:
            self._start_if_due()
            return
        self._profile.step()  # calls `_write` after the last step
        if self._run.is_complete or self._run.step + 1 not in range(self._steps.start, self._steps.stop):
            self._profile.stop()
            self._profile = None

    def _start_if_due(self) -> None:
        following, first = self._run.step + 1, self._steps.start
        if first - 1 <= following < self._steps.stop and not self._run.is_complete:
            warmup = max(first - following, 0)
            active = self._steps.stop - following - warmup
            self._profile = profile(
                schedule=schedule(wait=0, warmup=warmup, active=active, repeat=1),
                on_trace_ready=self._write,
                acc_events=True,
            )
            self._profile.start()

    def _write(self, finished: profile) -> None:
        if self._run.step < self._steps.start:
            return  # the run ended while the profiler warmed up
        folder, own = self._run.directory / "profile", self._run.owner.directory(self._run.directory)
        path = folder / f"steps_{self._steps.start}-{self._run.step}.pt.trace.json.gz"
        try:
            require_owned(own)
            make_directory(folder, own)
            tmp = own / path.name
            finished.export_chrome_trace(str(tmp))
            tmp.rename(path)
            print(f"{'profile':>11}  {path}", flush=True)
        except OSError as error:  # a failed trace must not end the run
            print(f"*** WARNING: {path}: cannot be written: {error.strerror or error} ***", file=sys.stderr, flush=True)
        self._log.pause()
