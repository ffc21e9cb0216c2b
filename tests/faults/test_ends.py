"""Processes that use process groups exit with code 0 and leave no gloo threads; `ends.py` runs more of them."""

from __future__ import annotations

import pytest

from tests.faults import ends


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ranks"),
    (pytest.param(1, (2,), id="short"), pytest.param(200, (2, 3, 4), id="long", marks=pytest.mark.long)),
)
def test_every_process_exits_with_code_0(tmp_path, number, ranks):
    rows = ends.run(tmp_path, number, ranks)
    print(ends.table(rows))
    assert not [failure for row in rows.values() for failure in row.failures]
    assert not [row.command for row in rows.values() if row.left]
    assert all(row.processes >= ends.share(name, number) for name, row in rows.items())
