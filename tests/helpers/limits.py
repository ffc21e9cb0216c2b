"""Run every file of the corpus through its parser within a memory limit: ``python -m tests.helpers.limits FORMAT...``.

Prints one line per case: its name, then the CPU seconds it took and the unexpected error, if any. A hang ends the
process by SIGALRM between the two.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers.data import PNG, write_tar
from tests.helpers.parsers import PARSERS, outcome

CORPUS = Path(__file__).parent.parent / "corpus"
MEMORY = 1 << 30
"""Bytes that a parser may allocate."""
HANG_S = 60
"""Seconds after which a parser hangs; those of a slow machine are far fewer."""


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 3 << 30)


EVERYWHERE: dict[str, Callable[[Path], None]] = {
    "fifo": fifo,
    "directory": directory,
    "device": device,
    "sparse": sparse,
    "empty": lambda path: path.write_bytes(b"") and None,
    "lists": lambda path: path.write_text("[" + "[]," * ((1 << 19) - 2) + "1]") and None,
    "numbers": lambda path: path.write_text("[" + "1," * (8 << 20) + "1]") and None,
    "nested": lambda path: path.write_text("[" * (1 << 20)) and None,
    "spaces": lambda path: path.write_bytes(b" " * (24 << 20)) and None,
}
"""Cases for every format."""
NO_FILES = ("slurm", "latents")
"""Formats that are not in a file of their own."""


def pax(payload: bytes) -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = b"x", len(payload)
    return info.tobuf(tarfile.GNU_FORMAT) + payload + bytes(-len(payload) % 512)


def prepend(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data + path.read_bytes()) and None


def compressed_zeros(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(400):
            file.write(bytes(1 << 20))


def zeros_in_npz(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w") as file,
    ):
        file.write(b"\x93NUMPY\1\0F\0{'descr': '|u1', 'fortran_order': False, 'shape': (400, 1024, 1024, 1)}".ljust(80))
        for _ in range(400):
            file.write(bytes(1 << 20))


def members_of_npz(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"{number}.npy", b"")


def tensors(path: Path) -> None:
    entry = b'"fp32/w%d@0":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % number for number in range(140_000)) + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def bomb_in_yaml(path: Path) -> None:
    path.write_text("a: [" + "x," * 32_000 + "]")


BOMBS: dict[str, dict[str, Callable[[Path], None]]] = {
    "shard": {
        "pax-headers": prepend(pax(b"10 path=a\n") * 700),
        "pax-digits": prepend(pax(b"9" * (64 << 10))),
        "pax-megabytes": prepend(pax(b"9" * (2 << 20))),
        "name-megabyte": lambda path: write_tar(path, [("a" * (1 << 19) + ".png", PNG)]) and None,
    },
    "compressed-shard": {"zeros": compressed_zeros},
    "npz": {"zeros": zeros_in_npz, "members": members_of_npz},
    "deepspeed": {"keys": lambda path: path.write_text(json.dumps(dict.fromkeys(map(str, range(90_000))))) and None},
    "recipe": {"values": bomb_in_yaml},
    "metrics": {"long-line": lambda path: path.write_text('{"images": 8, "x": "' + "x" * (40 << 20)) and None},
    "safetensors": {"tensors": tensors},
}
"""Cases that are too large to be kept."""


def cases(name: str) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield the cases of a format: how each replaces a valid file."""
    for path in sorted((CORPUS / name).iterdir()) if (CORPUS / name).is_dir() else ():
        yield path.name, lambda target, path=path: shutil.copyfile(path, target)  # type: ignore[misc]
    if name not in NO_FILES:
        yield from EVERYWHERE.items()
    yield from BOMBS.get(name, {}).items()


def run(name: str, case: str, replace: Callable[[Path], object]) -> None:
    """Try one case and print what happened."""
    with tempfile.TemporaryDirectory() as folder:
        target = PARSERS[name].write(Path(folder))
        replace(target)
        print(json.dumps({"case": f"{name}/{case}"}), end=" ", flush=True)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        start, error = time.process_time(), ""
        signal.alarm(HANG_S)
        try:
            outcome(PARSERS[name], target)
        except BaseException:
            error = traceback.format_exc()[-2000:]
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(json.dumps({"error": error, "seconds": round(time.process_time() - start, 3)}), flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for case, replace in cases(name):
            run(name, case, replace)
