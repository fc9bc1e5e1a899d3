"""Data sheets of GPUs: peak FLOP/s, memory and the bandwidths of memory and links.

All figures are those of the vendors' data sheets, per GPU. Sheets that print twice the FLOP/s count a structured
sparsity that no language model here uses, and sheets that print the bandwidth of links for both directions together
are halved. GPUs without NVLink exchange data over PCIe.

Source:
    NVIDIA data sheets: A100 (June 2021), H100 (2024), H200 (2024), Blackwell architecture brief (GB200, B200, 2024),
    L4, L40, L40S, A10, A10G, A30, A40, RTX A6000, GeForce RTX 3090, 4090 and 5090, V100, T4; AMD data sheets: Instinct
    MI250X, MI300X.
"""

import re
from dataclasses import dataclass

from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit, check_numbers

__all__ = ["GPUS", "Gpu", "find_gpu"]

_NETWORK = 50e9
"""One port of 400 Gbit/s for each GPU: H100 and H200 systems with InfiniBand NDR or RoCE."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links.

    Args:
        name: Name as the driver prints it, without the vendor.
        half_flops_per_s: Dense FLOP/s of matmuls of 16-bit floats with float32 accumulation.
        tf32_flops_per_s: The same of TF32.
        single_flops_per_s: The same of float32.
        memory_bytes: Size of its memory, bytes.
        memory_bytes_per_s: Bandwidth of its memory, bytes per second.
        link_bytes_per_s: Bandwidth to the GPUs of the same machine, bytes per second in each direction.
        network_bytes_per_s: Its part of the bandwidth between machines, bytes per second in each direction.
    """

    name: str
    half_flops_per_s: float
    tf32_flops_per_s: float
    single_flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float = _NETWORK

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if name != "name"}
        check_numbers(dict.fromkeys(numbers, Limit.POSITIVE), numbers)

    def flops_per_s(self, precision: str) -> float:
        """Return the peak FLOP/s in a precision of the Trainer; float32 is not rounded to TF32.

        Args:
            precision: Such as ``bf16-mixed`` or ``32-true``.
        """
        return self.half_flops_per_s if "16" in precision else self.single_flops_per_s


# Per GPU: TFLOP/s of 16-bit floats, TF32 and float32; GiB of memory; TB/s of memory; GB/s of the links of a machine.
# The GiB are those that the driver lets programs use, a little less than the sheet's; A100, H100: the 80 GB versions.
_SHEETS: dict[str, tuple[float, float, float, float, float, float]] = {
    "GB200": (2500.0, 1250.0, 80.0, 184.0, 8.0, 900.0),
    "B200": (2250.0, 1125.0, 75.0, 178.0, 7.7, 900.0),
    "H200 NVL": (835.5, 417.5, 60.0, 139.7, 4.8, 450.0),
    "H200": (989.4, 494.7, 66.9, 139.7, 4.8, 450.0),
    "GH200": (989.4, 494.7, 66.9, 94.5, 4.0, 450.0),
    "H100 NVL": (835.5, 417.5, 60.0, 93.1, 3.9, 300.0),
    "H100 PCIe": (756.5, 378.0, 51.2, 79.1, 2.0, 64.0),
    "H100": (989.4, 494.7, 66.9, 79.1, 3.35, 450.0),
    "A100": (312.0, 156.0, 19.5, 79.1, 2.039, 300.0),
    "A40": (149.7, 74.8, 37.4, 44.4, 0.696, 32.0),
    "A30": (165.0, 82.0, 10.3, 23.5, 0.933, 32.0),
    "RTX A6000": (154.8, 77.4, 38.7, 47.5, 0.768, 32.0),
    "A10G": (70.0, 35.0, 35.0, 22.0, 0.6, 32.0),
    "A10": (125.0, 62.5, 31.2, 22.0, 0.6, 32.0),
    "L40S": (362.0, 183.0, 91.6, 44.4, 0.864, 32.0),
    "L40": (181.0, 90.5, 90.5, 44.4, 0.864, 32.0),
    "L4": (121.0, 60.0, 30.3, 22.0, 0.3, 32.0),
    "RTX 5090": (209.5, 104.8, 104.8, 31.4, 1.792, 64.0),
    "RTX 4090": (165.2, 82.6, 82.6, 23.6, 1.008, 32.0),
    "RTX 3090": (71.0, 35.6, 35.6, 23.6, 0.936, 32.0),
    "V100": (125.0, 15.7, 15.7, 31.7, 0.9, 150.0),
    "T4": (65.0, 8.1, 8.1, 14.6, 0.32, 16.0),
    "MI300X": (1307.4, 653.7, 163.4, 191.5, 5.3, 448.0),
    "MI250X": (383.0, 95.7, 95.7, 127.9, 3.277, 400.0),
}

GPUS: dict[str, Gpu] = {
    name: Gpu(
        name=name,
        half_flops_per_s=half * 1e12,
        tf32_flops_per_s=tf32 * 1e12,
        single_flops_per_s=single * 1e12,
        memory_bytes=gibibytes * 2**30,
        memory_bytes_per_s=memory * 1e12,
        link_bytes_per_s=link * 1e9,
    )
    for name, (half, tf32, single, gibibytes, memory, link) in _SHEETS.items()
}
"""GPUs by name; where a device's name fits several, the first counts."""


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name, in lower or upper case, with or without spaces: "h100", "RTX 4090", "mi300x".

    Args:
        name: A key of `GPUS`.

    Raises:
        ConfigurationError: If there is none of that name.
    """
    wanted = re.sub(r"[\W_]", "", name.lower())
    for known, gpu in GPUS.items():
        if re.sub(r"\W", "", known.lower()) == wanted:
            return gpu
    raise ConfigurationError(
        f"No GPU is called {name!r}; there are {', '.join(sorted(GPUS))}. For another one give its figures: "
        "--gpu NAME --memory-gib N --tflops N --memory-bandwidth GB/S --link-bandwidth GB/S."
    )
