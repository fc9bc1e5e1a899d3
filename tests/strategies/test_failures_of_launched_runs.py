"""One of two ranks fails in a run that a user started: in bounded time the output names the rank, and where it was."""

import os
import re
import subprocess
import sys
import time

import pytest

FAILING = """
import os, signal, threading
from datetime import timedelta
from lightning.pytorch import Callback
from torch.distributed.distributed_c10d import _set_pg_timeout

def wait_for_ever():
    threading.Event().wait()

class Failing(Callback):
    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and self.kind == "hangs" and trainer.global_rank == 0:
            _set_pg_timeout(timedelta(seconds=10))  # now that both are here: a busy machine takes long to start them
        if batch_idx == 2 and trainer.global_rank == 1:
            if self.kind == "raises":
                raise ValueError("the last straw")
            if self.kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun waits half a minute before it kills
            wait_for_ever()
"""
RECIPE = """
base: base/trainer
trainer: {{max_steps: 4, val_check_interval: 4, accelerator: cpu, devices: 2, precision: 32-true, logger: false,
  strategy: {{class_path: ShardedOptimizerStrategy, init_args: {{timeout: "0:30:00"}}}},
  callbacks: [{{class_path: failing.Failing, init_args: {{kind: {kind}}}}}],
  enable_progress_bar: false, enable_model_summary: false, enable_checkpointing: false}}
model: {{model: {{class_path: TransformerConfig,
  init_args: {{d_model: 16, num_layers: 1, layers: {{mixer: {{num_heads: 2}}}}}}}}}}
data: {{train: corpus, tokenizer: Bytes, context_length: 16, batch_size: 4}}
"""
LAUNCHERS = {
    "popen": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
SAID = {
    ("popen", "raises"): [
        "ValueError: the last straw",
        "in on_train_batch_start",
        "This was rank 1 of 2, after 2 steps",
    ],
    ("popen", "dies"): [r"Rank 1 of 2 does not respond: it has died|ank: 1\] Child process.* terminated with code -9"],
    ("torchrun", "hangs"): ["Rank 1 of 2 has not failed; it is at", "in wait_for_ever"],
}
"""Lightning and torchrun watch over their processes, and say which one is gone; unless the other rank is quicker."""


@pytest.mark.parametrize(("launcher", "kind"), SAID)
def test_the_output_names_the_rank(tmp_path, launcher, kind):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "0.txt").write_text("abc def " * 100)
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "run.yaml").write_text(RECIPE.format(kind=kind))
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    words = [*LAUNCHERS[launcher], "-m", "lightning_lm.cli", "fit", "--config", "run.yaml"]
    start = time.monotonic()
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0
    for said in SAID[launcher, kind]:
        assert re.search(said, output), output[-5000:]
    assert time.monotonic() - start < 800  # long before the half hour of the strategy's timeout, even on a busy machine
