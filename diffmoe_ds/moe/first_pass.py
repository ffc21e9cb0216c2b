"""Keep what a block communicated in its first forward pass, for when activation checkpointing computes it again.

The second pass then sends nothing: it takes the first pass's selection, counts and exchanged rows. So it cannot select
other tokens than the first, and no rank waits for another one in the middle of its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_results: list[Any] | None = None
"""Results of the pass that is running, in order; None outside recomputed blocks."""
_is_second_pass = False


def remember(compute: Callable[[], T]) -> T:
    """Return ``compute()``; in a second pass, return the first pass's result without calling it."""
    if _results is None:
        return compute()
    if _is_second_pass:
        result: T = _results.pop(0)
        return result
    computed = compute()
    _results.append(computed)
    return computed


def both_passes() -> tuple[Any, Any]:
    """Return the contexts of the first and of the second pass, the ``context_fn`` of `torch.utils.checkpoint`."""
    results: list[Any] = []
    return _running(results, False), _running(results, True)


@contextmanager
def _running(results: list[Any], is_second_pass: bool) -> Iterator[None]:
    global _results, _is_second_pass
    before = _results, _is_second_pass
    _results, _is_second_pass = results, is_second_pass
    try:
        yield
    finally:
        _results, _is_second_pass = before
