"""How much expert parallelism sends between nodes: nothing while every EP group lies on one."""

from __future__ import annotations

from collections.abc import Sequence

from diffmoe_ds.config.deepspeed import DeepSpeedSettings
from diffmoe_ds.config.schema import Config


def assumed_hosts(world: int, local_world: int) -> tuple[str, ...]:
    """Names for hosts that are filled one after the other, for when the ranks have not met."""
    return tuple(f"node {rank // local_world}" for rank in range(world))


def crossing_share(hosts: Sequence[str], ep_size: int) -> float:
    """Share of all routed rows whose expert lies on another node than the token; groups are consecutive ranks.

    Args:
        hosts: the host of each rank.
        ep_size: ranks P of an EP group.
    """
    crossing = 0
    for first in range(0, len(hosts), ep_size):
        group = hosts[first : first + ep_size]
        crossing += sum(mine != other for mine in group for other in group)
    return crossing / (len(hosts) * ep_size)


def all_to_all_bytes(config: Config, settings: DeepSpeedSettings, world: int) -> int:
    """Bytes of all rows that are sent to experts and back in an optimizer step, over all ranks and layers.

    On average, where tokens choose (token_choice, dynamic counts); a rank's rows to itself are counted too.
    """
    layers = config.size.depth // 2 if config.routing.interleave else config.size.depth
    images = settings.micro_batch * settings.accumulation * world
    rows = round(images * config.tokens_per_image * config.routing.capacity)
    # to the experts and back, in the forward and in the backward pass, and once more where blocks are recomputed
    exchanges = 6 if config.model.activation_checkpointing else 4
    return rows * config.size.hidden_size * (2 if settings.bf16 else 4) * exchanges * layers


def crossing_warning(config: Config, settings: DeepSpeedSettings, hosts: Sequence[str]) -> str | None:
    """One sentence about expert traffic between nodes; none if there is none.

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
        advice = f"a node has {per_node} rank(s), and an autoep_size of at most that keeps them inside"
    else:
        advice = "start the ranks node by node (srun --distribution=block, mpirun --map-by slot) to keep them inside"
    return f"EP groups of {settings.ep_size} span nodes: about {_size(total)} of all-to-all cross per step; {advice}"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
