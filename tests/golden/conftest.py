"""Golden numbers are compared in full fp32, on a GPU too."""

from __future__ import annotations

import pytest

from diffmoe_ds.precision import set_tf32


@pytest.fixture(autouse=True)
def without_tf32() -> None:
    set_tf32(False)
