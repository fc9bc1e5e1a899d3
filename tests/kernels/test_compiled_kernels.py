"""Ahead of time for Ampere, Hopper and Blackwell: no spills, 128-bit loads, no double precision, memory within limits.

Compiled in a process of its own, because this one runs Triton's interpreter.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_lm.kernels import rms_norm_wide
from lightning_lm.kernels.runtime.launch import is_installed, next_power_of_two
from lightning_lm.kernels.runtime.rows import row_settings

pytestmark = pytest.mark.skipif(not is_installed(), reason="Triton is not installed")
CAPABILITIES = [80, 90, 100]
MOST_SHARED = 227 * 1024
LARGEST = 8192
VOCABULARY = 50304


def job(module, kernel, constants, options, *, dtype="*bf16", narrow=()):
    """Describe a kernel of a module by its argument names: pointers, strides and sizes, constants."""
    module = f"lightning_lm.kernels.{module}"
    function = getattr(sys.modules[module], kernel).function
    names = [name for name in inspect.signature(function).parameters if name not in constants]
    return {
        "module": module,
        "kernel": kernel,
        "types": {name: kind_of(name, dtype, narrow) for name in names},
        "aligned": [name for name in names if name.endswith(("stride", "_head", "_seq", "_batch", "width"))],
        "constants": constants,
        "options": options,
        "capabilities": CAPABILITIES,
    }


def kind_of(name, dtype, narrow):
    if name.endswith("_ptr"):
        return narrow.get(name, dtype) if isinstance(narrow, dict) else dtype
    return "fp32" if name in ("eps", "offset", "softcap", "inverse_temperature") else "i32"


def row_job(module, kernel, size):
    """A kernel over whole rows as it is launched for a size."""
    flags = {
        "rms_norm": {"WEIGHT": True, "RESIDUAL": True, "ROUND": False},
        "layer_norm": {"WEIGHT": True, "BIAS": True},
        "softmax": {},
    }[module]
    sizes = {"SIZE": size, "BLOCK": next_power_of_two(size)}
    wide = dict.fromkeys(("scale_ptr", "partial_ptr", "mean_ptr", "of_weight_ptr", "of_bias_ptr"), "*fp32")
    settings = row_settings(module, size, torch.empty(1, size, dtype=torch.bfloat16))
    options = {"num_warps": settings.pop("num_warps")}
    return job(module, kernel, {**sizes, **flags, **settings}, options, narrow=wide)


def wide_job(kernel, **flags):
    """A kernel that loops over rows that are too long for a program."""
    gain = kernel == "_gain_kernel"
    options = {"num_warps": rms_norm_wide._GAIN_WARPS if gain else rms_norm_wide._NUM_WARPS}
    sizes = {"SIZE": 2 * LARGEST, "BLOCK": rms_norm_wide._GAIN_BLOCK if gain else rms_norm_wide._BLOCK, **flags}
    return job("rms_norm_wide", kernel, sizes, options, narrow=dict.fromkeys(("scale_ptr", "partial_ptr"), "*fp32"))


def rope_job(kernel, heads=32, kv_heads=8, dim=128):
    tiles = {"Q_TILE": heads, "K_TILE": kv_heads, "BLOCK": dim}
    sizes = {"Q_HEADS": heads, "K_HEADS": kv_heads, "DIM": dim, "ROTARY": dim, "INTERLEAVED": False, "NORM": True}
    tables = dict.fromkeys(("cos_ptr", "sin_ptr", "partial_ptr"), "*fp32")
    return job("rope", kernel, {**tiles, **sizes}, {"num_warps": 8}, narrow=tables)


def vocabulary_job(kernel, flags, narrow):
    numbers = dict.fromkeys(("peak_ptr", "log_total_ptr", "softmax_ptr", "target_ptr", "constant_ptr"), "*fp32")
    numbers |= {"entropy_ptr": "*fp32", "targets_ptr": "*i64", **narrow}
    constants = {"VOCAB": VOCABULARY, "BIAS": False, "CAP": True, "BLOCK": 4096, **flags}
    return job("lm_head.logits", kernel, constants, {"num_warps": 8}, narrow=numbers)


def jobs():
    forward, backward = "_forward_kernel", "_backward_kernel"
    found = {f"{name} {kernel}": row_job(name, kernel, LARGEST)
             for name in ("rms_norm", "layer_norm") for kernel in (forward, backward)}  # fmt: skip
    found["rms_norm forward 768"] = row_job("rms_norm", forward, 768)
    found["rms_norm backward 768"] = row_job("rms_norm", backward, 768)
    found["wide rms_norm"] = wide_job(forward, WEIGHT=True, RESIDUAL=True, ROUND=False)
    found["wide rms_norm input"] = wide_job("_input_kernel", WEIGHT=True, RESIDUAL=True)
    found["wide rms_norm gain"] = wide_job("_gain_kernel", ROWS=rms_norm_wide._GAIN_ROWS, ROUND=True)
    found["softmax forward"] = row_job("softmax", forward, LARGEST)
    for kernel in (forward, backward):
        found[f"relu_squared {kernel}"] = job("relu_squared", kernel, {"BLOCK": 1024}, {"num_warps": 4})
    for activation, kernel in (("silu", backward), ("gelu_tanh", backward), ("silu", forward)):
        constants = {"BLOCK": 1024, "ACTIVATION": activation}
        found[f"{activation} {kernel}"] = job("swiglu", kernel, constants, {"num_warps": 4})
    found["rope forward"], found["rope backward"] = rope_job(forward), rope_job(backward)
    measured = {"AVERAGED": True, "MEASURED": True}
    found["statistics"] = vocabulary_job("_statistics_kernel", measured, {"out_ptr": "*fp32"})
    found["gradient"] = vocabulary_job("_gradient_kernel", {"CONSTANT": True, "ENTROPY": True}, {})
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    work = jobs()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    program = Path(__file__).with_name("aot.py")
    result = subprocess.run(
        [sys.executable, program], input=json.dumps([*work.values()]), env=environment, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(work, json.loads(result.stdout), strict=True))


def test_nothing_spills(compiled):
    spilled = {
        (name, one["capability"]): one["spilled"] for name, found in compiled.items() for one in found if one["spilled"]
    }
    assert spilled == {}


def test_shared_memory_fits(compiled):
    assert max(one["shared"] for found in compiled.values() for one in found) <= MOST_SHARED


def test_loads_and_stores_are_128_bits_wide(compiled):
    narrow = {
        (name, one["capability"]): (one["loads"], one["stores"])
        for name, found in compiled.items()
        for one in found
        if not any(".128" in load for load in one["loads"])
        or (not name.startswith("statistics") and not any(".128" in store for store in one["stores"]))
    }
    assert narrow == {}


def test_nothing_is_computed_in_double_precision(compiled):
    assert {name: one["double"] for name, found in compiled.items() for one in found if one["double"]} == {}
