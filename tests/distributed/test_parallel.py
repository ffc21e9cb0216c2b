"""Selection and all-to-all over process groups, topologies, and the variables of every launcher."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from diffmoe_ds.distributed import launch
from diffmoe_ds.distributed.launch import first_host, resolve_launch
from diffmoe_ds.errors import TopologyError
from diffmoe_ds.moe.experts import Experts
from diffmoe_ds.planning.traffic import crossing_share
from diffmoe_ds.topology import Topology, largest_ep_size
from tests.helpers.processes import WORKERS, run_ranks


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
    """Dispatch, compute and combine match a single process, forward and backward, even if some ranks send no rows."""
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
    with pytest.raises(
        TopologyError, match=rf"autoep_size must divide .* 4 rank\(s\) .* 8 expert\(s\), got {ep}; valid: 1, 2, 4"
    ):
        Topology(rank=0, world=4, ep_size=ep, num_experts=8)


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_SIZE": "2"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}  # sbatch's script itself, not a step of it
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
TORCHRUN_IN_STEP = {**SRUN, **TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}  # one torchrun per node, started by srun
INTERACTIVE = {  # what `srun --pty bash` leaves in the shell
    "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "node1",
}  # fmt: skip
DAEMON = {**INTERACTIVE, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "node[2-4]"}
MPIRUN = {f"OMPI_COMM_WORLD_{k}": v for k, v in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "2402", strict=True)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    (
        ({}, (0, 1, 0, 1)),
        (TORCHRUN, (3, 4, 1, 2)),
        (BATCH_SCRIPT, (0, 1, 0, 1)),
        (SRUN, (5, 8, 1, 4)),
        (MPIRUN, (2, 4, 0, 2)),
        (TORCHRUN_IN_STEP, (3, 4, 1, 2)),
        ({**BATCH_SCRIPT, **DEEPSPEED}, (3, 4, 1, 2)),
        ({**SRUN, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),
        ({**INTERACTIVE, **MPIRUN}, (2, 4, 0, 2)),
        ({**DAEMON, **MPIRUN}, (2, 4, 0, 2)),
        ({**SRUN, "PMIX_RANK": "5", "PMI_RANK": "5", "PMI_SIZE": "8"}, (5, 8, 1, 4)),
    ),
)
def test_every_launcher_is_understood(environment, expected):
    found = resolve_launch(environment)
    assert (found.rank, found.world, found.local_rank, found.local_world) == expected


def test_another_mpi_in_a_slurm_job_is_queried_through_mpi4py(monkeypatch):
    """Hydra's daemons are tasks of a step, whose variables their ranks inherit."""
    asked = launch.Launch(6, 24, 2, 8, "MPI through mpi4py")
    monkeypatch.setattr(launch, "_from_mpi", lambda: asked)
    assert resolve_launch({**DAEMON, "PMI_RANK": "6", "PMI_SIZE": "24"}) == asked
    assert resolve_launch({**DAEMON, "PMI_RANK": "1", "PMI_SIZE": "24"}) == asked


@pytest.mark.parametrize("name", ("PMI", "MV2_COMM_WORLD"))
def test_an_mpi_that_is_not_the_launchers_is_an_error(monkeypatch, name):
    """For it, every rank is the only one, and each would train alone."""
    monkeypatch.setattr(launch, "_from_mpi", lambda: launch.Launch(0, 1, 0, 1, "MPI through mpi4py"))
    with pytest.raises(TopologyError, match=f"{name}_SIZE is '2', but this is rank 0 of 1 for mpi4py"):
        resolve_launch({f"{name}_RANK": "1", f"{name}_SIZE": "2"})
    assert resolve_launch({f"{name}_RANK": "0", f"{name}_SIZE": "1"}).world == 1


@pytest.mark.parametrize("error", (RuntimeError("cannot load MPI library\nlibmpi.so"), ImportError("no mpi4py")))
def test_a_missing_mpi_library_is_an_error(monkeypatch, error):
    class Missing:
        @property
        def MPI(self):
            raise error

    monkeypatch.setitem(sys.modules, "mpi4py", Missing())
    monkeypatch.setenv("PMI_RANK", "0")
    with pytest.raises(TopologyError, match=r"PMI_RANK is set, but mpi4py cannot load MPI \((cannot load|no mpi4py)"):
        resolve_launch({"PMI_RANK": "0"})


@pytest.mark.parametrize(
    ("environment", "message"),
    (
        ({"RANK": "0"}, "WORLD_SIZE must be a number, got None"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "the rank must be from 0 to 3 in a world of 4, got 4"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK must be a number, got 'x'"),
        ({**SRUN, **TORCHRUN}, "RANK is 3, but SLURM_PROCID is '5': two launchers contradict each other"),
        ({**SRUN, "RANK": "5", "WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but SLURM_STEP_NUM_TASKS is '8'"),
        ({**MPIRUN, "RANK": "0", "WORLD_SIZE": "4"}, "RANK is 0, but OMPI_COMM_WORLD_RANK is '2'"),
        ({"RANK": "3.7", "WORLD_SIZE": "4"}, "RANK must be a number, got '3.7'"),
        ({**TORCHRUN, "LOCAL_RANK": "9"}, r"LOCAL_RANK must be less than LOCAL_WORLD_SIZE \(2\), got 9"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "WORLD_SIZE is '4' but RANK is not set"),
        ({"MASTER_PORT": "ssh"}, "MASTER_PORT must be a port from 1 to 65535, got 'ssh'"),
    ),
)
def test_invalid_launcher_variables_are_named(environment, message):
    with pytest.raises(TopologyError, match=message):
        resolve_launch(environment)


STEP = {**SRUN, "SLURM_STEP_NODELIST": "rack2-node[003-5,9],other", "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "address", "port"),
    (
        (STEP, "rack2-node003", 20071),
        ({**STEP, "SLURM_JOB_ID": "12071"}, "rack2-node003", 20071),
        ({**STEP, "SLURM_STEP_ID": "1"}, "rack2-node003", 26222),
        ({**STEP, "MASTER_ADDR": "10.0.0.1"}, "10.0.0.1", 20071),
        ({**STEP, "MASTER_PORT": "7000"}, "rack2-node003", 7000),
        ({**TORCHRUN, "MASTER_ADDR": "node1", "MASTER_PORT": "29501"}, "node1", 29501),
        (MPIRUN, None, None),
        ({**DAEMON, **MPIRUN}, None, None),
    ),
)
def test_rendezvous_address(environment, address, port):
    found = resolve_launch(environment)
    assert (found.master_addr, found.master_port) == (address, port)
    assert address is None or f"rendezvous at {address}:{port}" in found.describe()


@pytest.mark.parametrize(
    ("nodelist", "first"),
    (("n1", "n1"), ("n[3-5]", "n3"), ("n[08,11]", "n08"), ("a[1-2]b[7-8],c", "a1b7"), ("login,n[1-2]", "login")),
)
def test_first_host_of_slurms_lists(nodelist, first):
    assert first_host(nodelist) == first


HOSTS = ("a", "a", "b", "b")


@pytest.mark.parametrize(
    ("hosts", "ep", "share"),
    ((HOSTS, 1, 0), (HOSTS, 2, 0), (HOSTS, 4, 0.5), ("abab", 2, 0.5), ("abcd", 4, 0.75), ("aabbb" + "b", 2, 0)),
)
def test_share_of_rows_that_leave_their_node(hosts, ep, share):
    assert crossing_share(tuple(hosts), ep) == share


@pytest.mark.parametrize("mlp", ("gelu", "swiglu"))
def test_gradient_order_does_not_depend_on_token_counts(mlp):
    """DeepSpeed fills buckets in gradient order, so replicas of an expert must use the same order for any rows."""
    orders = set()
    for rows in ([4, 4], [3, 5], [0, 8], [0, 0], torch.tensor([3, 5])):
        experts = Experts(mlp, 2, 8, 16)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter)
        order = []
        for name, parameter in experts.named_parameters():
            parameter.register_hook(lambda gradient, name=name, order=order: order.append(name))
        experts(torch.randn(int(sum(rows)), 8, requires_grad=True), rows).sum().backward()
        orders.add(tuple(order))
    assert len(orders) == 1 and len(orders.pop()) == 3
