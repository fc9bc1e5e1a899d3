"""Peak dense matrix FLOP/s by chip and precision: the denominator of MFU."""

import re

import torch

__all__ = ["peak_flops_per_s"]

# Dense figures of the vendors' data sheets in TFLOP/s; sheets that print twice as much count a structured sparsity that
# no language model here uses. Per chip: 16-bit floats with float32 accumulation, TF32, float32. The first fit counts.
_TERAFLOPS: dict[str, tuple[float, float, float]] = {
    "GB200": (2500.0, 1250.0, 80.0),
    "B200": (2250.0, 1125.0, 75.0),
    "H200 NVL": (835.5, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "GH200": (989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.5, 378.0, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165.0, 82.0, 10.3),
    "RTX A6000": (154.8, 77.4, 38.7),
    "A10G": (70.0, 35.0, 35.0),
    "A10": (125.0, 62.5, 31.2),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
    "V100": (125.0, 15.7, 15.7),
    "T4": (65.0, 8.1, 8.1),
    "MI300X": (1307.4, 653.7, 163.4),
    "MI250X": (383.0, 95.7, 95.7),
}


def peak_flops_per_s(device: torch.device, precision: str) -> float | None:
    """Return the dense matrix FLOP/s that a device's data sheet promises, or ``None`` where it is not known.

    Args:
        device: The training device; only CUDA and ROCm devices are in the table.
        precision: A name as ``trainer.precision`` has it, such as ``bf16-mixed`` or ``32-true``.
    """
    if device.type != "cuda" or precision.startswith("64"):
        return None
    peaks = _of_chip(torch.cuda.get_device_name(device))
    if peaks is None:
        return None
    half, tf32, single = peaks
    if "16" in precision:
        return half * 1e12
    return (single if torch.get_float32_matmul_precision() == "highest" else tf32) * 1e12


def _of_chip(name: str) -> tuple[float, float, float] | None:
    fits = (peaks for chip, peaks in _TERAFLOPS.items() if re.search(rf"\b{chip}\b(?! (Ti|D|Laptop|SUPER))", name))
    return next(fits, None)
