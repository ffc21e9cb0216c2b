"""A campaign with a trial of every kind, the long one of `driver.py`, and the rules by which they are judged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults import driver
from tests.faults.campaign import KINDS, kind_of, table
from tests.faults.checks import Expected, announced, blamed, check_end, check_rows, resumed
from tests.faults.processes import STEPS, Failed
from tests.faults.trial import NOT_RUN, Outcome

SEED = 186
"""Its first trials of each kind are short ones: no rank is lost before all have joined."""
STATE = "DIFFMOE_FAULTS_STATE"
"""Variable with a directory in which an interrupted long campaign is continued."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults", (pytest.param(len(KINDS), id="short"), pytest.param(1000, id="long", marks=pytest.mark.long))
)
def test_faults_lose_nothing_never_hang_and_name_who_was_hit(tmp_path, faults):
    (tmp_path / "runs").mkdir()
    state = Path(os.environ[STATE]) if STATE in os.environ and faults > len(KINDS) else tmp_path
    outcomes = driver.campaign(tmp_path / "runs", state, SEED, range(faults))
    print(table(outcomes))
    failed = driver.failures(outcomes)
    assert not failed, "\n".join(failed)
    assert len(outcomes) == faults


def test_trials_in_a_row_have_all_kinds():
    for start in (0, len(KINDS), 5 * len(KINDS)):
        assert {kind_of(SEED, number) for number in range(start, start + len(KINDS))} == set(KINDS)


def test_an_interrupted_campaign_goes_on(tmp_path, monkeypatch, capsys):
    """Trials that have run are not repeated, except one whose line was cut off; failures are collected."""
    ran: list[int] = []

    def run_trials(folder, seed, numbers):
        for number in numbers:
            if len(ran) == 3:
                raise KeyboardInterrupt
            ran.append(number)
            yield Outcome(number, seed, kind_of(seed, number), result="hang" if number == 1 else "passed")

    monkeypatch.setattr(driver, "run_trials", run_trials)
    with pytest.raises(KeyboardInterrupt):
        driver.campaign(tmp_path, tmp_path, 0, range(5))
    log = tmp_path / "trials.jsonl"
    log.write_text(log.read_text()[:-9])
    ran.clear()
    outcomes = driver.campaign(tmp_path, tmp_path, 0, range(5), tmp_path / "table.md")
    assert ran == [2, 3, 4] and [outcome.number for outcome in outcomes] == list(range(5))
    assert len(driver.failures(outcomes)) == 1 and "--only 1" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == table(outcomes)
    with pytest.raises(ValueError, match="another seed"):
        driver.campaign(tmp_path, tmp_path, 1, range(5))


def test_the_table_counts_violations_by_kind():
    kind = next(iter(KINDS))
    outcomes = [
        Outcome(0, 0, kind, seconds=1.25, codes=[85], repeated=2),
        Outcome(1, 0, kind, seconds=9.0, codes=[1], result="hang"),
        Outcome(2, 0, kind, result=NOT_RUN, seconds=-1),
    ]
    assert table(outcomes).splitlines()[2:] == [f"| {kind} | 2 | 9.0 s | 1, 85 | 2 | 1 | 0 | 0 | 0 |"]


def test_messages_are_understood():
    assert blamed("diffmoe: error: rank 1 on host-0 died in step 3; the other ranks exit.") == {1}
    assert blamed("diffmoe: error: rank 1 on h has been stuck for 6 s in step 3; rank 0 exits.") == {1}
    assert blamed("diffmoe: error: rank 1 on h cannot reach rank 0 at h:29500 within 9 s; check") == {0}
    assert blamed("diffmoe: error: rank(s) 1 of 2 did not join within 9 s; run `diffmoe doctor`.") == {1}
    assert blamed("      launch  2 ranks; rank 0 on this host") == set()
    assert announced("      saved  /x/checkpoints/images_000000000096_2 (training waited 0.1 s)\n") == 96
    assert resumed("length  3,200 images; continues /x/images_000000001600 at 1,600 images") == 1600
    assert resumed("length  192 images; starting from scratch") == 0


@pytest.mark.parametrize(
    ("text", "codes", "result"),
    (
        ("diffmoe: error: rank 0 on h died in step 3; the other ranks exit.", [85], "blame"),
        ("", [85], "blame"),
        ("diffmoe: error: rank 1 on h died in step 3; the other ranks exit.", [2], "other"),
        ("diffmoe: error: rank 1 on h died in step 3; the other ranks exit.", [1], "other"),
        ("Traceback (most recent call last):", [0], "other"),
    ),
)
def test_violations_are_found(text, codes, result):
    with pytest.raises(Failed) as failure:
        check_end(text, codes, Expected(victims=(1,)))
    assert failure.value.result == result


def test_lost_repeated_and_different_rows_are_found():
    rows = [{"step": step, "loss": 1.0, "grad_norm": 1.0, "images": step, "capacity_loss": 1.0} for step in (1, 2, 3)]
    expected = {row["step"]: row for row in rows}
    check_rows(rows, expected, complete=False)
    for wrong in (rows[1:], rows + rows[2:], [{**rows[0], "loss": 1.0 + 1e-15}]):
        with pytest.raises(Failed):
            check_rows(wrong, expected, complete=False)
    assert len(rows) < STEPS
    with pytest.raises(Failed):
        check_rows(rows, expected, complete=True)
