"""FlashAttention ahead of time, as it is launched: no spills, tensor cores, shared memory within limits."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_lm.kernels import flash_kernels
from lightning_lm.kernels.launch import is_installed

pytestmark = pytest.mark.skipif(not is_installed(), reason="Triton is not installed")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTC"}
KERNELS = {"forward_kernel": "flash_attention", "query_kernel": "flash_attention_queries"}
KERNELS["key_kernel"] = "flash_attention_keys"
SHAPES = [(128, 80), (128, 90), (64, 90), (128, 100)]
WIDE = dict.fromkeys(("lse_ptr", "along_ptr"), "*fp32") | dict.fromkeys(("first_ptr", "last_ptr"), "*i32")


def job(kernel, size, capability, tiles):
    constants = {"GROUP": 4, "SIZE": size, "BLOCK_D": size, "FIRST": True, "SOFTCAP": False, "PRECISION": "tf32"}
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    constants |= tiles
    names = [name for name in inspect.signature(getattr(flash_kernels, kernel).function).parameters]
    kinds = {name: "fp32" if name in ("scale", "factor", "cap") else "i32" for name in names}
    kinds |= {name: WIDE.get(name, "*bf16") for name in names if name.endswith("_ptr")}
    aligned = [name for name in names if name.endswith(("_row", "_head", "_batch"))]
    return {
        "module": flash_kernels.__name__,
        "kernel": kernel,
        "types": kinds,
        "aligned": aligned,
        "constants": constants,
        "options": options,
        "capabilities": [capability],
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    from unittest import mock

    module = sys.modules["lightning_lm.kernels.flash_attention"]
    jobs = {}
    for size, capability in SHAPES:
        with mock.patch.object(module, "architecture", return_value=f"sm_{capability}"):
            for kernel, name in KERNELS.items():
                tiles = module._tiles(name, torch.empty(1, 1, 1, size, dtype=torch.bfloat16))
                jobs[kernel, size, capability] = job(kernel, size, capability, tiles)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, Path(__file__).with_name("aot.py")]
    request = json.dumps([*jobs.values()])
    result = subprocess.run(command, input=request, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return {key: found for key, (found,) in zip(jobs, json.loads(result.stdout), strict=True)}


def test_nothing_spills_and_shared_memory_suffices(compiled):
    assert {key: found["spilled"] for key, found in compiled.items() if found["spilled"]} == {}
    assert {key: found["shared"] for key, found in compiled.items() if found["shared"] > SHARED[key[2]]} == {}


def test_products_are_those_of_tensor_cores_and_nothing_is_double(compiled):
    for (_, _, capability), found in compiled.items():
        assert any(name.startswith(PRODUCTS[capability]) for name in found["products"]), found["products"]
        assert found["double"] == []


def test_loads_and_stores_are_128_bits_wide(compiled):
    for key, found in compiled.items():
        wide = [name for name in found["loads"] + found["stores"] if ".128" in name]
        assert any(name.startswith("STG") for name in wide), key
