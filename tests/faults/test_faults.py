"""A short campaign with a fixed seed, and the long one; `driver.py` runs both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults import driver
from tests.faults.campaign import KINDS, kind_of, table

SEED = 7
STATE = "DIFFMOE_FAULTS_STATE"
"""Variable with a directory in which an interrupted long campaign is continued."""


def test_every_kind_has_its_turn():
    """Trials in a row have all kinds, and the kind of a trial does not depend on how many there are."""
    for start in (0, len(KINDS), 5 * len(KINDS)):
        assert {kind_of(SEED, number) for number in range(start, start + len(KINDS))} == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults", (pytest.param(len(KINDS), id="short"), pytest.param(1000, id="long", marks=pytest.mark.long))
)
def test_faults_lose_nothing_never_hang_and_name_who_was_hit(tmp_path, faults):
    """One trial of every kind in CI."""
    (tmp_path / "runs").mkdir()
    state = Path(os.environ[STATE]) if STATE in os.environ and faults > len(KINDS) else tmp_path
    outcomes = driver.campaign(tmp_path / "runs", state, SEED, range(faults))
    print(table(outcomes))
    failed = driver.failures(outcomes)
    assert not failed, "\n".join(failed)
    assert len(outcomes) == faults
