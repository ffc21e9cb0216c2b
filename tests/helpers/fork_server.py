"""A process that has imported torch, DeepSpeed and this package, and forks a rank for every request.

``fork_server.py FD PARENT MODULE ...``: requests arrive on the socket FD, each with an open file for the rank's
output; the server exits with the process PARENT.  A rank that starts cold spends seconds importing; a forked one starts
at once, and then runs and exits like any interpreter.  Only a process with a single thread can fork safely: the server
starts no others, and checks that before each fork.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

REPOSITORY = str(Path(__file__).resolve().parents[2])
POLL_SECONDS = 0.02
MAX_REQUEST_BYTES = 1 << 18
PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, the process ``parent``, exits."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def check_single_thread() -> None:
    """Raise an error if this process has more than one thread."""
    count = max(threading.active_count(), len(os.listdir("/proc/self/task")))
    if count != 1:
        raise RuntimeError(f"the fork server has {count} threads and cannot fork; an import starts them")


def report_ends(connection: socket.socket, running: dict[int, int]) -> None:
    """Report the exit codes of children that have ended; ``running`` maps process ids to request numbers."""
    for pid, number in list(running.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del running[pid]
            connection.send(json.dumps({"number": number, "code": os.waitstatus_to_exitcode(status)}).encode())


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork a child for every request; return the request in the child, and None in the server at the end."""
    running: dict[int, int] = {}
    while True:
        readable, _, _ = select.select([connection], [], [], POLL_SECONDS if running else None)
        if readable:
            message, files, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 1)
            if not message:
                return None
            request = json.loads(message)
            if "kill" in request:
                for pid in (pid for pid, number in running.items() if number == request["kill"]):
                    os.killpg(pid, signal.SIGKILL)
            else:
                check_single_thread()
                server = os.getpid()
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    enter(request, files[0], server)
                    return request
                running[pid] = request["number"]
                connection.send(json.dumps({"number": request["number"], "pid": pid}).encode())
                os.close(files[0])
        report_ends(connection, running)


def enter(request: dict[str, Any], output: int, server: int) -> None:
    """Give a child of the process ``server`` its own process group, environment, directory and files."""
    os.setsid()
    die_with_parent(server)
    for target in (1, 2):
        os.dup2(output, target)
    os.close(output)
    os.environ.clear()
    os.environ.update(request["environment"])
    if "FAULTS" in os.environ:
        ctypes.CDLL(None).faults_parse()  # of `tests/faults/shim.c`, which this server has preloaded
    os.chdir(request["directory"])


def run_main(arguments: list[str], directory: str) -> None:
    """Run ``python SCRIPT ...`` or ``python -m MODULE ...`` in this process."""
    if arguments[0] == "-m":
        sys.path[0] = directory
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    sys.path[0] = REPOSITORY
    gc.disable()  # collections would be a sixth of the time of these imports
    for name in sys.argv[3:]:
        import_module(name)
    gc.collect()
    gc.freeze()  # the children share these pages
    gc.enable()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        run_main(request["arguments"], request["directory"])
