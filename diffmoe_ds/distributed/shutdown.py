"""Destroy the process groups before the interpreter finalizes.

Gloo's threads release the tensors of a collective after its caller has returned, for which they need the GIL.  If the
interpreter finalizes in between, CPython ends the thread inside a C++ destructor, and the process dies by SIGABRT with
"terminate called without an active exception" (https://github.com/pytorch/pytorch/issues/179291).  Only the destructor
of a process group joins these threads, and ``destroy_process_group`` does not run it while anything still refers to the
group: DeepSpeed's hooks, caches and module globals, the frames of an exception, or torch's own default arguments (see
the import of ``torch.distributed.nn.functional`` in `diffmoe_ds.distributed.collectives`).
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from pathlib import Path

LIMIT_S = 20.0
"""Seconds after which the process exits even if a hung collective prevents the destruction of its groups."""
SETTLE_S = 1.0
"""Seconds to wait for the kernel to remove joined threads."""
LEFT = "threads of process groups are left"
"""Printed to stderr if threads remain and the variable `TELL` is set; `tests.faults.ends` searches for it."""
TELL = "DIFFMOE_TELL_THREADS_LEFT"
"""An environment variable; set for tests only."""
GROUP_THREAD = "pt_gloo_runloop"
"""The name that torch gives to the threads of a gloo process group."""
STORE_THREADS = ("rendezvous", "surplus", "watchdog")
"""The names of our threads that use the store, in which they may block forever."""


def shutdown(exit_code: int | None = None) -> None:
    """Destroy all process groups and wait until their threads have ended.

    Call this once no stack frame or pending exception refers to code that used the groups.

    Args:
        exit_code: the code with which this process is about to exit.  If a hung collective prevents the destruction of
            the groups, it exits here, without finalizing the interpreter.  None if the process continues.
    """
    if "torch.distributed" not in sys.modules:
        return
    timer = threading.Timer(LIMIT_S, leave, (exit_code,))
    timer.daemon = True
    if exit_code is not None:
        timer.start()
    try:
        _destroy_groups()
    except Exception:
        if exit_code is None:
            raise
        _finalize_mpi()
        leave(exit_code)  # a library that cannot clean up, such as on a dead disk, must not change the exit code
    deadline = time.monotonic() + SETTLE_S
    while (left := group_threads()) and time.monotonic() < deadline:
        gc.collect()  # again: freeing autograd's graph leaves new cycles
        time.sleep(0.005)
    if left and os.environ.get(TELL):
        print(f"diffmoe: {left} {LEFT}", file=sys.stderr, flush=True)
    if exit_code is not None:
        timer.cancel()
        timer.join()
        if left or waits_for_store():
            _finalize_mpi()
            leave(exit_code)


def leave(exit_code: int) -> None:
    """Exit immediately after flushing output and logs, without finalizing the interpreter."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(exit_code)


def group_threads() -> int:
    """Return the number of threads of this process that belong to gloo process groups; 0 where /proc is missing."""
    count = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        try:
            count += path.read_text().strip() == GROUP_THREAD
        except OSError:  # it has ended
            continue
    return count


def waits_for_store() -> bool:
    """Return whether a thread is inside a call of a store that did not answer in time; it would end as gloo's do."""
    return any(thread.name in STORE_THREADS for thread in threading.enumerate())


def _finalize_mpi() -> None:
    """Finalize MPI as the interpreter would; mpirun counts a process that exits without it as failed."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def _destroy_groups() -> None:
    import torch.distributed as dist

    initialized = dist.is_available() and dist.is_initialized()
    if not initialized and not group_threads():
        return  # most commands use no groups, and collecting garbage takes a quarter of a second
    seam = sys.modules.get("diffmoe_ds.distributed.deepspeed_seam")
    if seam is not None:
        seam.release_engines()  # first: DeepSpeed asks for the rank
    if initialized:
        dist.destroy_process_group()
    if seam is not None:
        seam.forget_groups()
    gc.collect()  # engines, hooks and the frames of exceptions refer to themselves
