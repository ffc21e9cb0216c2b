"""A job of `sbatch slurm/train.sbatch` that loses a node."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.sbatch import EXACT, LIMIT, STEP, Sbatch, assert_undisturbed, undisturbed_run

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

SHORT = 200
"""Steps of these runs."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict]:
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"), SHORT)


@pytest.mark.parametrize(
    "lost",
    (
        pytest.param("node1", id="the batch node with rank 0"),
        pytest.param("node2", id="another node", marks=pytest.mark.long),
    ),
)
def test_a_node_loses_power(cluster: Cluster, project: Path, undisturbed, lost: str):
    """Three of four nodes remain; a batch of 16 images uses two of them."""
    sbatch = Sbatch(cluster, project, SHORT, save_every=20)
    job = sbatch.submit("2-4")
    sbatch.until_steps(50)
    cluster.freeze("node3")
    cluster.power(lost, "off")
    cluster.thaw("node3")
    try:
        cluster.until(lambda: cluster.job(job).restarts >= 1, LIMIT, "the restart", sbatch.text)
        before = len(sbatch.rows())
        assert before < SHORT, "the run ended before the node was lost"
        ended = sbatch.until_ended(job)
    finally:
        cluster.power(lost, "on")
    assert (ended.state, ended.exit_code) == ("COMPLETED", "0"), sbatch.text()
    assert "cannot train on 3 nodes, using 2" in sbatch.text()
    assert "world  4 =" in sbatch.text() and "world  2 =" in sbatch.text()
    resumed = int(re.findall(r"continues .* at ([\d,]+) images", sbatch.text())[0].replace(",", ""))
    assert 20 * STEP <= resumed <= before * STEP, "resumes from the last checkpoint or the one before it"
    assert len(sbatch.rows()) == SHORT
    assert_undisturbed(sbatch.rows(), undisturbed, EXACT)
