"""Download URLs with fsspec: `https://`, `s3://`, `gs://`, `hf://`, or the output of a `pipe:COMMAND`.

`cache.py` decides what is downloaded and keeps it.
"""

from __future__ import annotations

import errno
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import fsspec

from diffmoe_ds.errors import DataError

ATTEMPTS = 6
FIRST_DELAY = 1.0
"""Seconds before the second attempt; the delay doubles with each further one, half a minute in all."""
CONNECT_TIMEOUT = 30.0
READ_TIMEOUT = 60.0
"""Seconds without a single byte.  A large shard may take as long as it needs."""
RETRIED_STATUSES = (408, 425, 429)
"""HTTP statuses below 500 that a later attempt may not meet again."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
INSTALL = {
    "s3": "s3fs, which is not installed: pip install 'diffmoe_ds[s3]'",
    "gs": "gcsfs, which is not installed: pip install 'diffmoe_ds[gcs]'",
    "gcs": "gcsfs, which is not installed: pip install 'diffmoe_ds[gcs]'",
    "hf": "huggingface_hub, which is not installed: pip install huggingface_hub",
}
"""What a scheme needs beyond the dependencies of this package."""


def is_url(path: str) -> bool:
    """Return whether a path has to be downloaded: it has a URL scheme or is a `pipe:COMMAND`."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]*://", path) is not None


def fetch(url: str, target: Path) -> None:
    """Download a URL into a file, with retries if the connection or the server fails.

    Args:
        url: a URL of any scheme that fsspec knows, or `pipe:COMMAND`, whose standard output is the file.
        target: must not exist; may be incomplete after an error.

    Raises:
        DataError: the URL cannot be opened or the download is incomplete.
        OSError: the local disk is full or read-only.
    """
    if url.startswith("pipe:"):
        _run(url, target)
        return
    scheme = url.partition("://")[0]
    for attempt in range(1, ATTEMPTS + 1):
        try:
            fsspec.filesystem(scheme, **_options(scheme)).get_file(url, str(target))
            return
        except Exception as error:  # each scheme's client has its own exceptions
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            if attempt == ATTEMPTS or not _is_transient(error):
                raise DataError(f"shard {url} cannot be fetched: {_reason(error, scheme)}") from None
        time.sleep(FIRST_DELAY * 2 ** (attempt - 1))


def _run(url: str, target: Path) -> None:
    with open(target, "xb") as file:
        code = subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=file, stdin=subprocess.DEVNULL).returncode
    if code:
        raise DataError(f"shard {url} cannot be fetched: the command failed with exit code {code}")


def _options(scheme: str) -> dict[str, Any]:
    """Return the arguments of fsspec's file system for a scheme."""
    if scheme not in ("http", "https"):
        return {}
    import aiohttp

    # aiohttp's default is five minutes for a whole download.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
    # URLs are sent as they are: quoting the query of a signed URL again would change its signature.
    return {"encoded": True, "client_kwargs": {"timeout": timeout, "trust_env": True}}


def _is_transient(error: Exception) -> bool:
    """Return whether a further attempt may succeed."""
    import aiohttp

    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in RETRIED_STATUSES or status >= 500
    if isinstance(error, (FileNotFoundError, PermissionError, aiohttp.ClientConnectorError, aiohttp.InvalidURL)):
        return False
    return isinstance(error, (OSError, aiohttp.ClientError, TimeoutError))


def _reason(error: Exception, scheme: str) -> str:
    """Return one line with the reason of a failed download, and a fix if the scheme is the reason."""
    if isinstance(error, ImportError) and scheme in INSTALL:
        return f"{scheme}:// needs {INSTALL[scheme]}"
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return (
            f"unknown scheme {scheme!r}; use https://, s3://, gs:// or hf://, or pipe:COMMAND to read the output of a "
            "command"
        )
    text = " ".join(str(error).split())[:300]
    return f"not found: {text}" if isinstance(error, FileNotFoundError) else text or type(error).__name__
