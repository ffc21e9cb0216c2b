"""Start processes that cannot outlive a test, and collect their exit codes and output."""

from __future__ import annotations

import atexit
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import pytest

from diffmoe_ds.distributed.shutdown import LEFT, TELL

REPOSITORY = Path(__file__).resolve().parents[2]
WORKERS = REPOSITORY / "tests" / "distributed" / "workers"
LAUNCH_TIMEOUT = 240
"""Seconds after which a launch counts as hung."""
MODULES = (
    "tests.helpers.embedded",  # first, so that its threads have ended long before the first fork
    "torch._inductor.compile_fx",  # with torch._dynamo; torch imports them when it creates the optimizer and later
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.tensorboard",
    "diffmoe_ds.cli.train",
    "diffmoe_ds.cli.sample",
    "diffmoe_ds.cli.sample_run",
    "diffmoe_ds.cli.doctor",
    "diffmoe_ds.cli.prepare",
    "diffmoe_ds.training.session",
    "diffmoe_ds.training.loop",
)
"""What ranks import; none of it leaves a thread."""
IGNORED = (
    "PYTEST_CURRENT_TEST",
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # DeepSpeed sets it
    "TORCHINDUCTOR_CACHE_DIR",  # torch sets it
    "TORCH_CPP_LOG_LEVEL",  # ``diffmoe`` sets it
    "THP_MEM_ALLOC_ENABLE",  # likewise
    "PYTORCH_ALLOC_CONF",  # likewise
    "RES_OPTIONS",  # a rank that joins sets it
)
"""Variables that change in the test process without effect on a rank."""
GRACE = 10
"""Seconds for the other processes to exit after one has failed."""


@dataclass(frozen=True)
class Finished:
    """Outcome of a launch."""

    code: int
    """The first exit code that is not 0, negative for a signal, or 0; processes killed here do not count."""
    output: str
    """stdout and stderr of all processes."""


_held_ports: list[socket.socket] = []


def free_port() -> int:
    """Return a TCP port that is free on the loopback interface and that no other pytest process is given.

    The port is outside the kernel's ephemeral range.  An abstract socket, which lasts as long as this process, reserves
    it among pytest processes.
    """
    while True:
        port = random.SystemRandom().randrange(10000, 29000)
        name = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                name.bind(f"\0diffmoe-test-port-{port}")
            except OSError:
                name.close()
                continue
        _held_ports.append(name)
        return port


def clean_environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without any launcher's variables, with one thread per process."""
    prefixes = ("SLURM_", "OMPI_", "PMI", "TORCHELASTIC")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


ENVIRONMENT = clean_environment()
"""The fork server's environment, captured before any test can change it."""


def rank_environment(rank: int, world: int, port: int, **extra: str) -> dict[str, str]:
    """Return the environment of one rank on this machine, as torchrun would set it."""
    return clean_environment(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **{TELL: "1"}, **extra,
    )  # fmt: skip


def first_failure(codes: Sequence[int]) -> int:
    """Return the first exit code that is not 0, or 0; death by a signal (negative) is a failure."""
    return next((code for code in codes if code != 0), 0)


def run_processes(commands: list[tuple[list[str], dict[str, str]]], timeout: float = LAUNCH_TIMEOUT) -> Finished:
    """Run commands in parallel until all have exited, each in a process of its own.

    After one has failed, the others have ``GRACE`` seconds to exit.  What is still running then, or at the timeout, is
    killed by process group.  A launch that is killed although no process has failed fails the test.

    Args:
        commands: arguments and environment of each process.
        timeout: seconds for the whole launch.
    """
    return run_together([lambda file, c=command: ColdProcess(*c, file) for command in commands], timeout)


def run_ranks(world: int, arguments: list[str], timeout: float = LAUNCH_TIMEOUT, **extra: str) -> Finished:
    """Run a Python script or module on ``world`` ranks on this machine, as `run_processes` does.

    A rank that could not stop the threads of its process groups fails the test, whatever its exit code.

    The ranks are forks of a process that has imported everything, unless ``extra`` or the test has changed the
    environment in a way that may affect an import.

    Args:
        world: the number of ranks.
        arguments: ``SCRIPT ...`` or ``-m MODULE ...``.
        timeout: seconds for the whole launch.
        extra: environment variables.
    """
    port = free_port()
    environments = [rank_environment(rank, world, port, **extra) for rank in range(world)]
    if extra or not can_fork() or (arguments[0].startswith("-") and arguments[0] != "-m"):
        finished = run_processes([([sys.executable, *arguments], e) for e in environments], timeout)
    else:
        server = fork_server()
        starts = [lambda file, e=e: server.start(arguments, e, REPOSITORY, file) for e in environments]
        finished = run_together(starts, timeout)
    assert LEFT not in finished.output, finished.output
    return finished


def run_together(starts: Sequence[Callable[[IO[str]], Process]], timeout: float) -> Finished:
    """Start processes, each with a file for its output, and wait as `run_processes` says."""
    deadline = time.monotonic() + timeout
    # not pipes, which a process could fill and block on
    files = [tempfile.TemporaryFile("w+") for _ in starts]  # noqa: SIM115 - closed below
    processes: list[Process] = []
    late: list[Process] = []
    failed_since = None
    try:
        for start, file in zip(starts, files, strict=True):
            processes.append(start(file))
        while any(p.poll() is None for p in processes):
            now = time.monotonic()
            if failed_since is None and any(p.poll() for p in processes):
                failed_since = now
            if now > deadline or (failed_since is not None and now > failed_since + GRACE):
                break
            time.sleep(0.02)
    finally:
        late += [p for p in processes if p.poll() is None]
        for process in late:
            process.kill()
    outputs = []
    for file in files:
        with file:
            file.seek(0)
            outputs.append(file.read())
    text = "".join(outputs)
    code = first_failure([p.poll() or 0 for p in processes if p not in late])
    if late and code == 0:
        pytest.fail(f"hung for {timeout} s:\n{text[-5000:]}")
    return Finished(code, text)


def wait_for_end(pid: int, timeout: float = 10) -> None:
    """Wait until a process that is not our child has exited; kill it and fail after some seconds."""
    deadline = time.monotonic() + timeout
    while is_running(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            pytest.fail(f"process {pid} is still running after {timeout} s")
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether a process exists and has not exited; in a container, nobody may wait for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Process(Protocol):
    """A process that was started here."""

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process runs."""

    def kill(self) -> None:
        """Kill the process group and wait for the process."""


class ColdProcess:
    """A command in a process of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], output: IO[str]) -> None:
        self._process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass(frozen=True)
class ForkedProcess:
    """A fork of the fork server."""

    server: ForkServer
    number: int

    @property
    def pid(self) -> int:
        """The process id; waits until the server has forked."""
        while self.number not in self.server.pids:
            self.server.receive(wait=GRACE)
        return self.server.pids[self.number]

    def poll(self) -> int | None:
        self.server.receive(wait=0)
        return self.server.codes.get(self.number)

    def kill(self) -> None:
        self.server.send({"kill": self.number})
        while self.poll() is None:
            self.server.receive(wait=GRACE)


class ForkServer:
    """Starts `fork_server.py`, which imports ``modules``, and asks it for processes."""

    def __init__(self, modules: Sequence[str] = MODULES, **extra: str) -> None:
        """Start the server with some more environment variables."""
        self.codes: dict[int, int] = {}
        self.pids: dict[int, int] = {}
        self._count = 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the server
        script = str(Path(__file__).with_name("fork_server.py"))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, script, str(theirs.fileno()), str(os.getpid()), *modules],
                env={**ENVIRONMENT, "TORCH_CPP_LOG_LEVEL": "ERROR", **extra}, pass_fds=[theirs.fileno()],
                cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid

    def is_alive(self) -> bool:
        """Return whether the server can take requests."""
        return self._process.poll() is None

    def start(
        self, arguments: list[str], environment: dict[str, str], directory: Path, output: IO[str]
    ) -> ForkedProcess:
        """Start ``python ARGUMENTS`` in a fork; stdout and stderr go to ``output``."""
        self._count += 1
        request = {
            "number": self._count, "arguments": arguments, "environment": environment, "directory": str(directory),
        }  # fmt: skip
        self.send(request, output)
        return ForkedProcess(self, self._count)

    def send(self, request: dict[str, object], *files: IO[str]) -> None:
        """Send a request with open files."""
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [file.fileno() for file in files])
        except OSError as error:
            raise self._died() from error

    def receive(self, wait: float) -> None:
        """Record the process ids and exit codes that the server reports, waiting at most ``wait`` seconds for one."""
        while select.select([self._socket], [], [], wait)[0]:
            try:
                message = self._socket.recv(1 << 16)
            except ConnectionError:
                message = b""
            if not message:
                raise self._died()
            answer = json.loads(message)
            if "pid" in answer:
                self.pids[answer["number"]] = answer["pid"]
            else:
                self.codes[answer["number"]] = answer["code"]
            wait = 0

    def close(self) -> None:
        """Stop the server and, with it, the processes that it has started."""
        self._socket.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _died(self) -> RuntimeError:
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        return RuntimeError(f"the fork server has died:\n{self._log.read()[-5000:]}")


_servers: list[ForkServer] = []


def fork_server() -> ForkServer:
    """Return this process's fork server; start it if it is not running."""
    if not (_servers and _servers[-1].is_alive()):
        server = ForkServer()
        _servers.append(server)
        atexit.register(server.close)
    return _servers[-1]


def can_fork() -> bool:
    """Return whether the environment is still the one in which the fork server imported its modules."""
    return _relevant(clean_environment()) == _relevant(ENVIRONMENT)


def _relevant(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that may affect an import; our DeepSpeed seam sets ``DS_ACCELERATOR`` if it is unset."""
    return {"DS_ACCELERATOR": "cpu", **{k: v for k, v in environment.items() if k not in IGNORED}}
