"""Wording shared by messages and reports."""

from __future__ import annotations

import re

ERROR_NUMBER = re.compile(r"\[Errno \d+\] ")


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 image`` or ``1,000 images``.

    Args:
        count: the number.
        noun: in the singular, with a plural in -s.
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def reason(error: Exception) -> str:
    """Return the message of a library's or system's error without full stop and number, to continue a sentence."""
    return ERROR_NUMBER.sub("", str(error)).strip().rstrip(".")
