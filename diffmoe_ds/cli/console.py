"""Standard streams that never raise: a closed pipe, a full disk or an odd file name must not end a run."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from typing import Any

ERRORS = "diffmoe.escape"
"""Name under which `_escape` is registered as an encoding error handler."""


class _Output(io.FileIO):
    """Raw standard stream that drops what it cannot write; closing it leaves the file descriptor open."""

    error: OSError | None = None
    """The first error."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


_outputs: list[_Output] = []


def protect() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` of this process, unless a notebook or a test has replaced them."""
    codecs.register_error(ERRORS, _escape)
    _open_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _protected(stream))


def lost_output() -> OSError | None:
    """Return why output was lost; None if it was not, or if nobody wanted to read it, as in ``diffmoe plan | head``."""
    if sys.stdout is not None:
        sys.stdout.flush()
    errors = [output.error for output in _outputs if output.error is not None]
    return next((error for error in errors if error.errno != errno.EPIPE), None)


def _open_closed() -> None:
    """Open the null device in place of closed standard streams.

    Otherwise the next files to be opened get their numbers, and what C libraries print ends up in these files.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _protected(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    output = _Output(stream.fileno(), "w", closefd=False)
    _outputs.append(output)
    return io.TextIOWrapper(
        output if stream.write_through else io.BufferedWriter(output),  # without a buffer for python -u
        encoding=stream.encoding,
        errors=ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what an encoding lacks: bytes of a file name that are not valid UTF-8 as they are, the rest as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)
