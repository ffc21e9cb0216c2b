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


def shortened(text: str, length: int = 80) -> str:
    """Return at most ``length`` characters of a text, the last three of them dots if there are more."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def quoted(name: str) -> str:
    """Return the ``repr`` of a name that a file holds, of which a long one is shortened."""
    return repr(shortened(name, 100))


def reason(error: Exception) -> str:
    """Return the message of a library's or system's error without full stop and number, to continue a sentence."""
    text = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
    return ERROR_NUMBER.sub("", text).strip().rstrip(".")
