"""A short campaign with a fixed seed; `driver.py` runs longer ones."""

from __future__ import annotations

import pytest

from tests.faults import driver


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "others"), (pytest.param(1, 1, id="short"), pytest.param(15, 10, id="long", marks=pytest.mark.long))
)
def test_faults_lose_nothing_and_never_hang(tmp_path, kill, others):
    """One trial per fault in CI, 15 kills of each kind and 10 of every other fault in the long campaign."""
    rows = driver.run(
        tmp_path, seed=7, kill=kill, kill_in_save=kill, others=others, report=lambda text, rows: print(text)
    )
    print(driver.table(rows))
    assert rows["SIGKILL of a rank"].runs == rows["SIGKILL inside a save"].runs == kill
    for fault in ("SIGSTOP of a rank", "SIGUSR1 to a rank", "truncated file", "flipped byte", "removed file"):
        assert rows[fault].runs >= others
        assert rows[fault].longest_s < driver.LEAVE_LIMIT_S
