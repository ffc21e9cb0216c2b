"""Our results match torch-fidelity's, including its Inception network; see `tests/helpers/fidelity.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.features import assert_same
from tests.helpers.processes import clean_environment
from tests.helpers.sources import ROOT

LIBRARIES = Path(sys.prefix) / "inception"
"""Where `make test` installs torch-fidelity and torchvision, separate from all other packages."""


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARIES.is_dir(), reason=f"torch-fidelity is not in {LIBRARIES}; make test installs it")
def test_numbers_are_those_of_torch_fidelity(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "fidelity.py"), str(tmp_path)],
        env=clean_environment(PYTHONPATH=f"{ROOT}:{LIBRARIES}"), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout)
    for name, (ours, theirs) in found["metrics"].items():
        assert ours == pytest.approx(theirs, rel=1e-6), name
        assert abs(ours) > 1e-3, f"{name} must differ from 0 for the comparison to mean anything"
    assert all(difference < 1e-3 for difference in found["features"].values()), found["features"]

    assert len(found["refused"]) == 4
    for message in found["refused"][:3]:
        assert "does not hold the weights of the 2015 Inception graph" in message
    assert "missing.pth: cannot be read: No such file or directory" in found["refused"][3]

    images, saved, adm = found["evaluate"]
    assert images["fid"] == images["frechet"] > 0 and images["sfid"] > 0 and images["inception_score"] >= 1
    assert images["extractor"].startswith("inception:") and images["kid"] is not None
    assert_same(saved, images)
    assert_same(adm, images)
