"""The benchmark of whole steps in small: every way is the same training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is one without a GPU")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def test_a_dry_run_takes_the_same_step_in_every_way(tmp_path):
    record = tmp_path / "training.json"
    command = [sys.executable, HERE / "bench_training_kernels.py", "--models", "0.5B", "--rounds", "1", "--packed"]
    result = subprocess.run([*command, "--output", record], text=True, capture_output=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    found = json.loads(record.read_text())["results"]["0.5B"]
    ways = {f"{way}{suffix}" for way in ("logits", "default", "swap") for suffix in ("", ", compiled")}
    losses = found["losses"]
    assert set(losses) == ways
    assert max(losses.values()) - min(losses.values()) < 5e-3  # bfloat16 has 8 bits; losses are averages over 64 tokens
    assert all(found[way]["tokens_per_s"] > 0 for way in ways)
    assert "[not judged]" in result.stdout


def test_ratios_are_taken_within_rounds_and_failures_are_kept():
    from bench_training_kernels import summarised

    turns = {
        "logits": [{"step_s": 2.0, "peak_gb": 3.0}, {"step_s": 8.0, "peak_gb": 4.0}, {"step_s": 4.0, "peak_gb": 3.0}],
        "swap": [{"step_s": 1.0, "peak_gb": 1.0}, {"step_s": 2.0, "peak_gb": 1.5}, {"step_s": 4.0, "peak_gb": 1.0}],
        "default": [],
    }
    found = summarised(turns, {"default": "failed: OutOfMemoryError"}, tokens=100)
    assert found["default"] == {"failed": "failed: OutOfMemoryError"}
    assert found["swap"] == {
        "step_ms": 2000.0, "tokens_per_s": 50.0, "times_as_fast_as_logits": 2.0, "range": [1.0, 4.0], "peak_gb": 1.5,
    }  # fmt: skip


def test_the_models_have_the_sizes_of_their_names(monkeypatch):
    import bench_training_kernels as bench

    monkeypatch.setattr(bench, "ON_GPU", True)
    with torch.device("meta"):
        sizes = {
            name: sum(x.numel() for x in bench.shape_of(name).config.build().parameters()) for name in bench.MODELS
        }
    assert sizes["124M"] == pytest.approx(124e6, rel=0.02)
    assert sizes["0.5B"] == pytest.approx(494e6, rel=0.01)
