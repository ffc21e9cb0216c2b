"""A short campaign with a fixed seed; `driver.py` runs longer ones."""

from __future__ import annotations

import pytest

from tests.faults import driver


@pytest.mark.slow
def test_faults_lose_nothing_and_hang_nowhere(tmp_path):
    rows = driver.run(tmp_path, seed=7, kill=2, kill_in_save=2, others=2, report=lambda text, rows: print(text))
    print(driver.table(rows))
    assert rows["SIGKILL of a rank"].runs == rows["SIGKILL inside a save"].runs == 2
    for fault in ("SIGSTOP of a rank", "SIGUSR1 to a rank", "truncated file", "flipped byte", "removed file"):
        assert rows[fault].runs >= 2
        assert rows[fault].longest_s < driver.LEAVE_LIMIT_S
