"""Expert-parallel traffic between nodes; zero if every EP group fits on one node."""

from __future__ import annotations

from collections.abc import Sequence

from diffmoe_ds.config.deepspeed import DeepSpeedSettings
from diffmoe_ds.config.schema import Config


def assumed_hosts(world: int, local_world: int) -> tuple[str, ...]:
    """Return host names for ranks that have not joined yet, assuming that ranks fill one host after another.

    Args:
        world: number of ranks W.
        local_world: ranks per host.

    Returns:
        The host of each rank.
    """
    return tuple(f"node {rank // local_world}" for rank in range(world))


def crossing_share(hosts: Sequence[str], ep_size: int) -> float:
    """Return the fraction of routed rows whose expert is on a different node than the token.

    Args:
        hosts: the host of each rank.
        ep_size: ranks P of an EP group; groups are consecutive ranks.
    """
    crossing = 0
    for first in range(0, len(hosts), ep_size):
        group = hosts[first : first + ep_size]
        crossing += sum(mine != other for mine in group for other in group)
    return crossing / (len(hosts) * ep_size)


def all_to_all_bytes(config: Config, settings: DeepSpeedSettings, world: int) -> int:
    """Return the bytes of all rows sent to experts and back in one optimizer step, over all ranks and layers.

    This is an average where counts vary (``token_choice``, dynamic counts). Rows that a rank sends to itself are
    included.

    Args:
        config: the run.
        settings: its resolved DeepSpeed JSON.
        world: number of ranks W.
    """
    images = settings.micro_batch * settings.accumulation * world
    rows = round(images * config.tokens_per_image * config.routing.capacity * (1 - config.null_fraction))
    exchanges = 4  # dispatch and combine, in the forward and the backward pass
    return rows * config.size.hidden_size * (2 if settings.bf16 else 4) * exchanges * len(config.moe_blocks)


def crossing_warning(config: Config, settings: DeepSpeedSettings, hosts: Sequence[str]) -> str | None:
    """Return a warning about expert traffic between nodes, or None without such traffic.

    Args:
        config: the run.
        settings: its resolved DeepSpeed JSON.
        hosts: the host of each rank.
    """
    share = crossing_share(hosts, settings.ep_size)
    if not share or config.num_experts == 1:
        return None
    total = share * all_to_all_bytes(config, settings, len(hosts))
    per_node = max(hosts.count(host) for host in hosts)
    if settings.ep_size > per_node:
        advice = f"set autoep_size to at most {per_node}, the ranks per node, to keep each group on one node"
    else:
        advice = "start the ranks node by node (srun --distribution=block, mpirun --map-by slot) to avoid this"
    return (
        f"EP groups of {settings.ep_size} span nodes: about {size_text(total)} of all-to-all traffic crosses nodes per "
        f"step; {advice}"
    )


def size_text(count: float) -> str:
    """Return a number of bytes in decimal units, with three digits."""
    if count == 1:
        return "1 byte"
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:  # larger numbers are printed as 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
