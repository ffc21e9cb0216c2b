"""Parse the members of a shard that describe the format of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from diffmoe_ds.control_files import parse_json
from diffmoe_ds.errors import DataError
from diffmoe_ds.text import reason

Format = TypeVar("Format")


def parse_member(data: bytes, parse: Callable[[Any], Format], problem: str, remedy: str) -> Format:
    """Return the format that a member describes in JSON.

    Args:
        data: its contents.
        parse: returns the format for plain data; raises `ValueError` if it is invalid.
        problem: start of the message: shard, member and what it describes.
        remedy: the command that makes such shards.

    Raises:
        DataError: it is invalid.
    """
    try:
        return parse(parse_json(data.decode()))
    except ValueError as error:
        raise DataError(f"{problem}: {reason(error)[:200]}; regenerate the shards with {remedy}") from None
