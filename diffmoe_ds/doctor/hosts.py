"""Checks over ssh, without a launcher: whether each host of a hostfile is reachable and can start a rank."""

from __future__ import annotations

import re
import secrets
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from diffmoe_ds.control_files import MAX_TEXT_BYTES, parse_json, read_text
from diffmoe_ds.errors import ConfigError

SSH_TIMEOUT_S = 10
"""Timeout of one ssh connection."""
HOST_TIMEOUT_S = 60
"""Timeout of the whole check of one host."""
HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.:@%-]{0,252})[ \t]+slots=([0-9]{1,6})")
"""A line of a hostfile; a host that began with a hyphen would be an option of ssh."""
MAX_SAID = 500
"""Last characters of ssh's errors that a message repeats."""
AT_ONCE = 32
"""Simultaneous connections."""
PROBE = (
    "import json,sys,os;from importlib.metadata import version;"
    "print('probe '+json.dumps([version(n) for n in ('diffmoe_ds','torch','deepspeed')]+[os.path.exists(sys.argv[1])]))"
)
"""Runs on each host: prints versions, and whether our file exists there. Imports nothing heavy."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the hosts and their slots, in order.

    Raises:
        ConfigError: the file cannot be read, or a line is not ``HOST slots=NUMBER``.
    """
    try:
        text = read_text(path, MAX_TEXT_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read: {getattr(error, 'strerror', error)}.") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.partition("#")[0].strip()
        if not stripped:
            continue
        match = HOST.fullmatch(stripped)
        if match is None or int(match[2]) < 1:
            raise ConfigError(f"--hostfile {path}: line {number} must be HOST slots=NUMBER, got {stripped[:80]!r}.")
        if match[1] in hosts:
            raise ConfigError(f"--hostfile {path}: duplicate host {match[1]!r} in line {number}.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"--hostfile {path}: the file lists no hosts.")
    return hosts


def check_hosts(hosts: list[str]) -> list[str]:
    """Check every host over ssh and return one sentence for each host with a problem."""
    token = Path.cwd() / f".diffmoe-doctor-{secrets.token_hex(4)}"
    try:
        token.touch()
    except OSError as error:
        return [f"{Path.cwd()}: cannot be written on this host: {error.strerror}."]
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = pool.map(lambda host: _check(host, token), hosts)
            return [sentence for sentence in found if sentence is not None]
    finally:
        token.unlink(missing_ok=True)


def _check(host: str, token: Path) -> str | None:
    words = " ".join(shlex.quote(word) for word in (sys.executable, "-c", PROBE, str(token)))
    remote = f"cd {shlex.quote(str(token.parent))} && {words}"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT_S}"]
    try:
        done = subprocess.run(
            ["ssh", *options, "--", host, remote], stdin=subprocess.DEVNULL, capture_output=True,
            text=True, encoding="utf-8", errors="replace",  # a banner may have any encoding
            timeout=HOST_TIMEOUT_S, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return f"{host}: cannot be checked: ssh is not installed on this host."
    except OSError as error:
        return f"{host}: cannot be checked: ssh does not start on this host: {error.strerror}."
    except subprocess.TimeoutExpired:
        return f"{host}: did not answer within {HOST_TIMEOUT_S} s."
    if done.returncode < 0:
        return f"{host}: cannot be checked: ssh was killed by signal {-done.returncode} on this host."
    said = "".join(c if c.isprintable() else " " for c in done.stderr[-MAX_SAID:])
    said = " ".join(said.split()) or f"exit code {done.returncode}"
    if done.returncode == 255:
        if "Host key verification failed" in said or "IDENTIFICATION HAS CHANGED" in said:
            return f"{host}: its host key has changed or is unknown; verify the machine, then ssh-keygen -R."
        if "Permission denied" in said:
            return f"{host}: refuses our ssh key ({said}); run ssh-copy-id {host}."
        return f"{host}: cannot be reached over ssh ({said})."
    if done.returncode in (126, 127):
        return f"{host}: has no {sys.executable}; install Python at the same path, or on the shared file system."
    answer = re.search(r"^probe (.*)$", done.stdout, re.MULTILINE)
    if answer is None:
        if "cd:" in said:
            return f"{host}: has no directory {token.parent}; it must be shared by all hosts."
        return f"{host}: Python does not work there ({said})."
    try:
        *versions, shared = parse_json(answer[1])
    except (ValueError, TypeError):
        return f"{host}: Python does not work there ({answer[1][:80]!r})."
    if not shared:
        return f"{host}: {token.parent} is not the same directory as on this host; it must be shared by all hosts."
    for name, theirs in zip(("diffmoe_ds", "torch", "deepspeed"), versions, strict=False):
        if theirs != version(name):
            return f"{host}: has {name} {theirs}, but this host has {version(name)}; install the same version."
    return None
