"""Kernels with products ahead of time, as they are launched: no spills, tensor cores, shared memory within limits.

``FEW_SHAPES`` in the environment leaves out small heads and most of float32: for another Triton than the installed one.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from lightning_lm.kernels import newton_schulz
from lightning_lm.kernels.flash_attention import operation, triton_kernels
from lightning_lm.kernels.recurrence import chunk_scan
from lightning_lm.kernels.runtime.launch import is_installed

grouped = importlib.import_module("lightning_lm.kernels.grouped_linear")  # the package has a function of that name
pytestmark = pytest.mark.skipif(not is_installed(), reason="Triton is not installed")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRODUCTS = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTC",)}
FLASH = {"forward_kernel": "flash_attention", "query_kernel": "flash_attention_queries"}
FLASH["key_kernel"] = "flash_attention_keys"
WIDE = dict.fromkeys(("lse_ptr", "along_ptr"), "*fp32") | dict.fromkeys(
    ("first_ptr", "last_ptr", "expert_ptr", "end_ptr"), "*i32"
)
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
HALF = [
    ("bf16", size, capability) for size, capability in ((128, 80), (64, 80), (128, 90), (64, 90), (128, 100), (64, 100))
]
SINGLE = [
    ("tf32", 128, 80),
    ("tf32", 128, 90),
    ("tf32", 128, 100),
    ("ieee", 128, 90),
    ("ieee", 64, 90),
    ("ieee", 128, 100),
]
GROUPED = [("_product_kernel", "bf16", 90), ("_weight_kernel", "bf16", 90), ("_product_kernel", "tf32", 90)]
SCANS = [("_forward_kernel", "tf32", 90), ("_backward_kernel", "tf32", 90)]
SHAPES, KINDS = [*HALF, *SINGLE], (*DTYPES,)
if os.environ.get("FEW_SHAPES"):
    SHAPES, KINDS = [*(shape for shape in HALF if shape[1] == 128), ("tf32", 128, 90)], ("bf16",)


def job(module, kernel, constants, options, capability, kind):
    names = [name for name in inspect.signature(getattr(module, kernel).function).parameters if name not in constants]
    pointer = "*bf16" if kind == "bf16" else "*fp32"
    kinds = {name: "fp32" if name in ("scale", "factor", "cap", "alpha", "beta") else "i32" for name in names}
    kinds |= {name: WIDE.get(name, pointer) for name in names if name.endswith("_ptr")}
    endings = ("_row", "_head", "_batch", "_matrix", "num_rows", "num_columns", "inner", "width", "height", "_dim")
    return {
        "module": module.__name__,
        "kernel": kernel,
        "types": kinds,
        "aligned": [name for name in names if name.endswith(endings)],
        "constants": constants,
        "options": {name: options.pop(name) for name in ("num_warps", "num_stages")},
        "capabilities": [capability],
    }


def flash_job(kernel, kind, size, capability):
    with mock.patch.object(operation, "architecture", return_value=f"sm_{capability}"):
        tile = operation.tiles(FLASH[kernel], torch.empty(1, 1, 1, size, dtype=DTYPES[kind]))
    constants = {"GROUP": 4, "SIZE": size, "BLOCK_D": size, "FIRST": True, "SOFTCAP": False, "PRECISION": "tf32"}
    constants |= {name: tile[name] for name in ("BLOCK_Q", "BLOCK_K")} | ({"PRECISION": kind} if kind != "bf16" else {})
    return job(triton_kernels, kernel, constants, tile, capability, kind)


def symmetric_job(kind, capability):
    precision = "tf32" if kind == "bf16" else kind
    tile = newton_schulz._tiles(torch.empty(1, 1024, 4096, dtype=DTYPES[kind]), precision)
    constants = {name: tile[name] for name in ("BLOCK", "BLOCK_K")} | {"ADDED": True, "PRECISION": precision}
    return job(newton_schulz, "_symmetric_kernel", constants, tile, capability, kind)


def grouped_job(kernel, kind, capability):
    weight = torch.empty(8, 256, 128, dtype=DTYPES[kind])
    tile = grouped._tiles(weight, weight)
    constants = {name: tile.pop(name) for name in ("BLOCK", "BLOCK_K", "PRECISION")}
    constants |= {"TRANSPOSED": True} if kernel == "_product_kernel" else {}
    return job(grouped, kernel, constants, tile, capability, kind)


def scan_job(kernel, kind, capability):
    keys = torch.empty(1, 1, 1, 64, 128)
    tile = chunk_scan._tiles(keys, keys)
    names = "SIZE", "BLOCK_K", "BLOCK_V", "PRECISION"
    constants = {name: tile.pop(name) for name in names} | {"REMOVED": True}
    return job(chunk_scan, kernel, constants, tile, capability, kind)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    jobs = {}
    for kind, size, capability in SHAPES:
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        jobs |= {(kernel, kind, size, capability): flash_job(kernel, kind, size, capability) for kernel in FLASH}
    torch.set_float32_matmul_precision("highest")
    for kind in KINDS:
        jobs |= {("_symmetric_kernel", kind, 0, capability): symmetric_job(kind, capability) for capability in SHARED}
    for kernel, kind, capability in GROUPED:
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        jobs[kernel, kind, 0, capability] = grouped_job(kernel, kind, capability)
    for kernel, kind, capability in SCANS:
        jobs[kernel, kind, 0, capability] = scan_job(kernel, kind, capability)
    torch.set_float32_matmul_precision("highest")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, Path(__file__).with_name("aot.py")]
    request = json.dumps([*jobs.values()])
    result = subprocess.run(command, input=request, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return {key: found for key, (found,) in zip(jobs, json.loads(result.stdout), strict=True)}


def test_nothing_spills(compiled):
    assert {key: found["spilled"] for key, found in compiled.items() if found["spilled"]} == {}


def test_shared_memory_suffices(compiled):
    assert {key: found["shared"] for key, found in compiled.items() if found["shared"] > SHARED[key[3]]} == {}


def test_products_are_those_of_tensor_cores_where_precision_allows(compiled):
    for (kernel, kind, _, capability), found in compiled.items():
        wanted = PRODUCTS[capability]
        if kind == "tf32" and kernel in ("query_kernel", "key_kernel"):
            wanted = ("HMMA",)  # on Hopper a wgmma takes 64 rows, and the sums of so many spill in float32
        right = any(name.startswith(wanted) for name in found["products"])
        assert right == (kind != "ieee"), (kernel, kind, capability, found["products"])


def test_nothing_is_computed_in_double_precision(compiled):
    assert {key: found["double"] for key, found in compiled.items() if found["double"]} == {}


def test_loads_and_stores_are_128_bits_wide(compiled):
    for key, found in compiled.items():
        assert any(".128" in name for name in found["loads"]), key
        assert any(".128" in name for name in found["stores"]), key
