"""Every parser of files, on valid files with changed bytes: it accepts them or raises an error of ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fuzz import changed_bytes, fuzz
from tests.helpers.parsers import PARSERS, changing, outcome

pytestmark = pytest.mark.usefixtures("hang_limit")


@pytest.mark.parametrize("name", PARSERS)
def test_valid_files_are_accepted(tmp_path, name):
    assert outcome(PARSERS[name], PARSERS[name].write(tmp_path)) == ""


@pytest.mark.parametrize("name", PARSERS)
@fuzz(5)
@given(data=st.data())
def test_changed_bytes(name, data):
    with changing(name) as path:
        path.write_bytes(data.draw(changed_bytes(path.read_bytes())))
