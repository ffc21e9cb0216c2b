"""What needs real ranks: the pool over process groups, the exchange of rows, and steps that nobody may hang in."""

from __future__ import annotations

import json

import pytest
import torch

from diffmoe_ds.errors import TopologyError
from diffmoe_ds.model.experts import Experts
from diffmoe_ds.parallel.launch import resolve_launch
from diffmoe_ds.parallel.topology import Topology, largest_ep_size
from tests.conftest import WORKERS, run_ranks


@pytest.mark.parametrize("world", (2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)))
def test_selection_over_ranks_is_exact_and_its_traffic_constant(world):
    finished = run_ranks(world, [str(WORKERS / "selection.py")])
    assert finished.code == 0, finished.output
    result = json.loads(finished.output.splitlines()[-1])
    assert result["checked"] == 28
    few, many = result["traffic"]
    assert few == many > 0, f"bytes for 1,000 and 100,000 tokens: {few}, {many}"


@pytest.mark.parametrize("world", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_exchange_and_skewed_layers(world):
    """Dispatch, compute and combine equal one process, forward and backward, whatever rank sends nothing."""
    finished = run_ranks(world, [str(WORKERS / "exchange.py")], timeout=90)
    assert finished.code == 0, finished.output
    assert "all equal" in finished.output


def test_topology_numbers():
    topology = Topology(rank=5, world=8, ep_size=4, num_experts=16)
    assert (topology.edp_size, topology.ep_rank, topology.num_local_experts, topology.first_expert) == (2, 1, 4, 4)
    assert largest_ep_size(num_experts=8, world=12, local_world=4) == 4
    assert largest_ep_size(num_experts=1, world=4, local_world=4) == 1


@pytest.mark.parametrize("ep", (0, 3, 8))
def test_ep_must_divide(ep):
    with pytest.raises(TopologyError, match=rf"autoep_size is {ep}, .* 4 rank\(s\) .* 8 expert\(s\); valid: 1, 2, 4"):
        Topology(rank=0, world=4, ep_size=ep, num_experts=8)


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}  # sbatch's script itself, not a step of it
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
MPIRUN = {f"OMPI_COMM_WORLD_{k}": v for k, v in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "2402", strict=True)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    (
        ({}, (0, 1, 0, 1)),
        (TORCHRUN, (3, 4, 1, 2)),
        (BATCH_SCRIPT, (0, 1, 0, 1)),
        (SRUN, (5, 8, 1, 4)),
        (MPIRUN, (2, 4, 0, 2)),
        ({**SRUN, **TORCHRUN}, (3, 4, 1, 2)),
    ),
)
def test_every_launcher_is_understood(environment, expected):
    launch = resolve_launch(environment)
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    (
        ({"RANK": "0"}, "WORLD_SIZE is None, but it must be a number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "the rank is 4, but it must be from 0 to 3"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK is 'x', but it must be a number"),
    ),
)
def test_broken_launchers_are_named(environment, message):
    with pytest.raises(TopologyError, match=message):
        resolve_launch(environment)


@pytest.mark.parametrize("mlp", ("gelu", "swiglu"))
def test_gradients_finish_in_an_order_that_counts_do_not_change(mlp):
    """DeepSpeed's buckets hold gradients as they come: replicas of an expert with other rows must finish alike."""
    orders = set()
    for rows in ([4, 4], [3, 5], [0, 8], [0, 0]):
        experts = Experts(mlp, 2, 8, 16)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter)
        order = []
        for name, parameter in experts.named_parameters():
            parameter.register_hook(lambda gradient, name=name, order=order: order.append(name))
        experts(torch.randn(sum(rows), 8, requires_grad=True), rows, even=False).sum().backward()
        orders.add(tuple(order))
    assert len(orders) == 1 and len(orders.pop()) == 3
