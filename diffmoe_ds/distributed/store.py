"""The rendezvous store: a key-value server on rank 0, and the ranks' connections to it.

Every rank keeps two connections open for the whole run: one for the rendezvous and then for torch's process groups, and
a clone of it for the watchdog. One is not enough, because a connection is locked while a call waits on it, and the
watchdog must work while the main thread waits.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.errors import LaunchError, RankLostError
from diffmoe_ds.files import allow_open_files

CONNECTIONS_PER_RANK = 2
"""Connections that every rank keeps open; NCCL opens more."""
OTHER_FILES = 512
"""Open files that the rank with the store needs besides: libraries, shards, logs, and the process groups' sockets."""
LINGER_S = 10.0
"""Seconds that rank 0 keeps serving the store after an error, for the others to read it."""
RESOLVER_OPTIONS = "timeout:1 attempts:5"
"""Options of the C library's resolver; by default, a lost packet costs 5 seconds instead of 1."""
POLL_S = 1.0
"""Longest blocking wait; Ctrl-C takes effect only in between."""
SILENCE_S = 60.0
"""Seconds without a response after which the store counts as lost, where no watchdog runs."""
SERVER_RESOLVER_OPTIONS = "timeout:1 attempts:1"
"""Those of the server's thread: torch looks up no more names after the first failure, and needs none."""
SCHEME = "diffmoe"
"""Scheme of `init_method`."""
T = TypeVar("T")
_joined: list[tuple[dist.Store, int, int]] = []
"""The store, rank and world of the process group to create."""


def open_store(launch: Launch, timeout_s: float) -> dist.Store:
    """Connect to the store, which rank 0 serves.

    Args:
        launch: this process's place among the ranks, with the rendezvous address; see `move_to_own_store`.
        timeout_s: seconds to wait for the server.

    Raises:
        LaunchError: the server cannot be reached, or cannot be started.
    """
    serves = launch.rank == 0
    if serves:
        raise_file_limit(CONNECTIONS_PER_RANK * launch.world + OTHER_FILES, launch.world)
    # for its logs, torch looks up the name of every peer, on the server in its only thread
    os.environ.setdefault("RES_OPTIONS", RESOLVER_OPTIONS)
    assert launch.master_addr is not None and launch.master_port is not None, "set by `export_launch`"
    try:
        with _server_resolver() if serves else contextlib.nullcontext():
            store = connect(launch.master_addr, launch.master_port, timeout_s, serves=serves)
    except (RuntimeError, TimeoutError) as error:
        host = socket.gethostname()
        if serves and "EADDRINUSE" in str(error):
            raise LaunchError(
                f"rank 0 on {host}: port {launch.master_port} is in use; set MASTER_PORT (deepspeed: --master_port) to "
                "a free one."
            ) from None
        raise LaunchError(
            f"rank {launch.rank} on {host} cannot reach rank 0 at {launch.address} within {timeout_s:g} s; check that "
            "the address is right, that rank 0 was started and that the port is open."
        ) from None
    return dist.PrefixStore("diffmoe", store)


def connect(host: str, port: int, timeout_s: float, *, serves: bool = False) -> dist.Store:
    """Connect to a store.

    Args:
        host: its host.
        port: its port.
        timeout_s: seconds to wait for it.
        serves: serve it in this process, too.

    Raises:
        RuntimeError: it cannot be reached.
        TimeoutError: it accepts connections, but does not answer.
    """
    timeout = timedelta(seconds=timeout_s)
    return answer_within(
        timeout_s + POLL_S,
        lambda: dist.TCPStore(host, port, is_master=serves, timeout=timeout, wait_for_workers=False),
    )


def answer_within(limit_s: float, call: Callable[[], T]) -> T:
    """Return what a call of a store returns; torch waits without limit for a server that is frozen.

    Args:
        limit_s: seconds to wait.
        call: the call. It runs in a thread, which keeps waiting if no answer comes.

    Raises:
        TimeoutError: there is none.
        Exception: what the call raises.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:  # for the caller
            answer.set_exception(error)

    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    try:
        return answer.result(limit_s)
    except FutureTimeoutError:  # another class in Python 3.10
        raise TimeoutError(f"no answer for {limit_s:g} s") from None


@contextlib.contextmanager
def _server_resolver() -> Iterator[None]:
    """Start a server within the context; its thread reads the resolver's options at its first connection."""
    options = os.environ["RES_OPTIONS"]
    if options == RESOLVER_OPTIONS:  # not the user's
        os.environ["RES_OPTIONS"] = SERVER_RESOLVER_OPTIONS
    try:
        yield
    finally:
        os.environ["RES_OPTIONS"] = options


def init_method(store: dist.Store, launch: Launch) -> str:
    """Return an ``init_method`` with which torch.distributed creates a process group over the store.

    Args:
        store: from `open_store`, or any other for a single rank.
        launch: this process's place among the ranks.
    """
    _joined[:] = [(store, launch.rank, launch.world)]
    with contextlib.suppress(RuntimeError):  # registered before
        # afterwards only the process group refers to the store, which closes its port with its last reference
        dist.register_rendezvous_handler(SCHEME, lambda url, **_: iter([_joined.pop()]))
    return f"{SCHEME}://"


def raise_file_limit(needed: int, world: int) -> None:
    """Raise this process's soft limit of open files to its hard limit if it is too low.

    Args:
        needed: files that the process has to open.
        world: number of ranks, for the message.

    Raises:
        LaunchError: the hard limit is too low as well.
    """
    limit = allow_open_files(needed)
    if limit < needed:
        raise LaunchError(
            f"rank 0 on {socket.gethostname()} may open only {limit} files, but needs {needed} to serve {world} ranks; "
            "raise the hard limit of open files on that host (`ulimit -Hn`)."
        )


def read_from_rank_0(store: dist.Store, key: str, rank_0: str, timeout_s: float, silence_s: float) -> bytes:
    """Wait for what rank 0 writes under a key, on another rank.

    Args:
        store: from `open_store`.
        key: the key.
        rank_0: name of rank 0, for the message.
        timeout_s: seconds to wait for the key.
        silence_s: seconds that the store may go without answering.

    Raises:
        RankLostError: rank 0 died, or did not write the key in time, or the store does not answer.
    """
    found: list[bytes | dist.DistError] = []
    start = answered = time.monotonic()

    def wait() -> None:
        nonlocal answered
        while not found:
            try:
                store.wait([key], timedelta(seconds=POLL_S))
                found.append(store.get(key))
            except dist.DistStoreError:  # the timeout
                answered = time.monotonic()
            except dist.DistError as error:
                found.append(error)

    # a thread, because torch waits without limit for a server that is frozen
    thread = threading.Thread(target=wait, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        before = time.monotonic()
        thread.join(POLL_S)
        now = time.monotonic()
        if now - before > silence_s + POLL_S:  # this process was suspended, perhaps with all others
            start, answered = start + now - before, now
        if not found and (now - start > timeout_s or now - answered > silence_s + POLL_S):
            waited_s = min(now - start, max(now - answered, timeout_s))
            found.append(b"")  # ends the thread
            raise silent_since_startup(rank_0, waited_s)
    if isinstance(found[0], bytes):
        return found[0]
    raise RankLostError(f"{rank_0} died during startup; the other ranks exit.") from None


def silent_since_startup(rank_0: str, waited_s: float) -> RankLostError:
    """Return the error that rank 0, by its name, has not answered yet."""
    return RankLostError(f"{rank_0} has not answered for {waited_s:.0f} s, since startup; the other ranks exit.")


def wait_for(store: dist.Store, keys: list[str], timeout_s: float) -> None:
    """Wait for keys that other ranks write.

    Args:
        store: from `open_store`.
        keys: the keys.
        timeout_s: seconds to wait.

    Raises:
        DistStoreError: they were not written in time.
    """
    store.wait(keys, timedelta(seconds=timeout_s))


def let_others_read(store: dist.Store, launch: Launch) -> None:
    """Call this on every rank after it has read an error: rank 0, which serves the store, returns last."""
    if launch.rank:
        with contextlib.suppress(TimeoutError, RuntimeError):  # rank 0 may be gone
            answer_within(LINGER_S, lambda: store.add("left", 1))
        return
    deadline = time.monotonic() + LINGER_S
    while time.monotonic() < deadline and store.add("left", 0) < launch.world - 1:
        time.sleep(0.05)
