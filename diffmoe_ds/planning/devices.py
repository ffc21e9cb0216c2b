"""GPUs by name: memory, peak throughput and bandwidths, from NVIDIA's data sheets.

Peaks are for dense bf16 products with fp32 accumulation; data sheets often print twice as much, with sparsity. NVLink
and PCIe bandwidths are for one direction; data sheets print the sum of both. Memory is what ``nvidia-smi`` reports.
The network is that of the usual eight-GPU server: one port per GPU in DGX A100 (200 Gbit/s), DGX H100, H200 and B200
(400 Gbit/s); 200 Gbit/s per GPU is assumed for servers with H100 PCIe and NVL, 100 with L40S, and 10 for workstations.
NVLink bridges connect only two H100 NVL, so PCIe counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True)
class Device:
    """One GPU model, and the links of the servers that it is usually in."""

    name: str
    """Name in ``diffmoe plan --gpu``."""
    memory_bytes: int
    """Memory of one GPU."""
    bf16_flops: float
    """Peak of dense bf16 matrix products, in operations per second."""
    memory_bandwidth: float
    """Bytes per second between the GPU and its memory."""
    link_bandwidth: float
    """Bytes per second and direction between GPUs of one node: NVLink, or PCIe where there is none."""
    network_bandwidth: float
    """Bytes per second and direction of a GPU's share of its node's network."""


DEVICES = {
    device.name: device
    for device in (
        #       name           memory          bf16 flop/s  memory B/s  link B/s  network B/s
        Device("A100-40GB",     40_960 * MIB,  312e12,      1.555e12,   300e9,    25e9),
        Device("A100-80GB",     81_920 * MIB,  312e12,      2.039e12,   300e9,    25e9),
        Device("H100",          81_559 * MIB,  989e12,      3.35e12,    450e9,    50e9),
        Device("H100-PCIe",     81_559 * MIB,  756e12,      2.0e12,     64e9,     25e9),
        Device("H100-NVL",      95_830 * MIB,  835e12,      3.938e12,   64e9,     25e9),
        Device("H200",         143_771 * MIB,  989e12,      4.8e12,     450e9,    50e9),
        Device("B200",         183_359 * MIB, 2250e12,      8.0e12,     900e9,    50e9),
        Device("L40S",          46_068 * MIB,  362e12,      0.864e12,   32e9,     12.5e9),
        Device("RTX-4090",      24_564 * MIB,  165e12,      1.008e12,   32e9,     1.25e9),
    )
}  # fmt: skip
"""The GPUs that `diffmoe plan` knows, by name."""

_REPORTED = (
    ("A100-SXM4-40GB", "A100-40GB"), ("A100-PCIE-40GB", "A100-40GB"), ("A100", "A100-80GB"),
    ("H100 PCIe", "H100-PCIe"), ("H100 NVL", "H100-NVL"), ("H100", "H100"), ("H200", "H200"), ("B200", "B200"),
    ("L40S", "L40S"), ("RTX 4090", "RTX-4090"),
)  # fmt: skip
"""What the driver's name of a GPU contains, and ours; the first match counts."""


def device_named(name: str) -> Device:
    """Return a GPU of the table.

    Args:
        name: a key of `DEVICES`, in any case.

    Raises:
        ConfigError: the table does not have it.
    """
    for known, device in DEVICES.items():
        if known.lower() == name.lower():
            return device
    raise ConfigError(unknown("--gpu", name, DEVICES))


def device_reported(name: str) -> Device | None:
    """Return the GPU that the driver calls ``name`` (``torch.cuda.get_device_name()``), or None if it is unknown."""
    for part, known in _REPORTED:
        if part.lower() in name.lower():
            return DEVICES[known]
    return None
