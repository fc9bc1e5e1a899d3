"""Runs as users start them, in processes of their own: by Lightning's launcher and by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_lm.cli import main
from lightning_lm.strategies import AtomicCheckpointIO

TINY = """
base: base/trainer
trainer: {{max_steps: 4, val_check_interval: 4, log_every_n_steps: 1, accelerator: cpu, devices: {devices},
  strategy: {strategy}, precision: 32-true, logger: {{init_args: {{name: {name}}}}},
  callbacks: [{{class_path: LastCheckpoint, init_args: {{every_n_train_steps: 2}}}}],
  enable_progress_bar: false, enable_model_summary: false}}
model: {{model: {{class_path: TransformerConfig,
  init_args: {{d_model: 16, num_layers: 1, layers: {{mixer: {{num_heads: 2}}}}}}}}}}
data: {{train: corpus, tokenizer: Bytes, context_length: 16, batch_size: 4}}
"""
TIMEOUT_S = 900


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"document {number}: " + "abc def " * number)
    return tmp_path


def execute(words, folder) -> subprocess.CompletedProcess[str]:
    own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    inherited = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    words = [str(word) for word in words]
    return subprocess.run(
        words, cwd=folder, env=inherited | own, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def written(folder, name, devices, strategy) -> Path:
    (folder / f"{name}.yaml").write_text(TINY.format(name=name, devices=devices, strategy=strategy))
    return folder / f"{name}.yaml"


def weights(folder, name) -> dict[str, torch.Tensor]:
    path = folder / "runs" / name / "version_0" / "checkpoints" / "last.ckpt"
    return AtomicCheckpointIO().load_checkpoint(path)["state_dict"]


def test_the_command_by_both_launchers(folder, monkeypatch):
    module = ["-m", "lightning_lm.cli", "fit", "--config"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for words in (
        [sys.executable, *module, written(folder, "popen", 2, "zero1")],
        [*torchrun, *module, written(folder, "torchrun", 2, "zero2")],
    ):
        done = execute(words, folder)
        assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.chdir(folder)
    assert main(["fit", "--config", str(written(folder, "one", 1, "auto"))]) == 0
    for name in ("popen", "torchrun"):
        for key, value in weights(folder, "one").items():
            torch.testing.assert_close(weights(folder, name)[key], value, rtol=1e-5, atol=1e-6)
