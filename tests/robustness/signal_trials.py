"""Runs that a signal ends, as users start them: by one process, by Lightning's launcher and by torchrun.

As a script: all strategies, launchers and signals, and the table for README.md in this folder::

    python tests/robustness/signal_trials.py
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

RECIPE = """
base: base/trainer
seed_everything: 1
trainer: {{max_steps: {max_steps}, val_check_interval: 7, limit_val_batches: {val_batches}, log_every_n_steps: 1,
  accelerator: cpu, devices: {devices}, strategy: {strategy}, precision: 32-true,
  logger: {{init_args: {{name: {name}}}}},
  callbacks: [{{class_path: LastCheckpoint, init_args: {{every_n_train_steps: 1000000}}}}, beacon.{beacon}],
  enable_progress_bar: false, enable_model_summary: false{more}}}
model: {{class_path: {module}, init_args: {{optimizer: {{class_path: AdamW}}, schedule: Constant,
  model: {{class_path: TransformerConfig,
    init_args: {{d_model: 16, num_layers: 2, layers: {{mixer: {{num_heads: 2}}}}}}}}}}}}
data: {{train: corpus, validation: corpus, tokenizer: Bytes, context_length: 16, batch_size: 4}}
"""
BEACON = '''
"""Tells the trial, by one byte in a pipe with a name, that the run has come so far."""
import os
import threading
from lightning.pytorch import Callback

class Never(Callback):
    pass

class InTraining(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == {step}:
            tell(trainer)

class InValidation(Callback):
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == 7 and batch_idx == 3:
            tell(trainer)

class InSetup(Callback):
    def setup(self, trainer, pl_module, stage):
        tell(trainer)
        threading.Event().wait(60)

class Hanging(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == {step}:
            tell(trainer)
            threading.Event().wait(600)

def tell(trainer):
    if os.path.exists("ready"):
        with open("ready.pids", "a") as file:
            file.write("%d %d\\n" % (trainer.global_rank, os.getpid()))
        if trainer.is_global_zero:
            with open("ready", "wb", buffering=0) as file:
                file.write(b"!")
'''
STRATEGIES = {
    "ddp": "ddp",
    "zero1": "zero1",
    "zero2": "zero2",
    "fsdp2": "{class_path: TensorParallelStrategy, init_args: {tensor_parallel_size: 1}}",
    "tensor parallel": "{class_path: TensorParallelStrategy, init_args: {tensor_parallel_size: 2}}",
    "pipeline": "PipelineStrategy",
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
START_S = 240.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run that is ended by a signal.

    Args:
        launcher: ``one`` process, ``lightning`` or ``torchrun`` with two.
        strategy: A key of `STRATEGIES`.
        signum: The signal.
        target: The process that gets it: ``main``, ``group`` (a terminal's Ctrl-C), ``rank 1``.
        beacon: The moment: a class of `BEACON`.
    """

    launcher: str
    strategy: str
    signum: signal.Signals
    target: str = "main"
    beacon: str = "InTraining"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Args:
        status: Exit status of the process that was started.
        seconds: From the signal to the end of the last process.
        saved_s: From the signal to the checkpoint; ``None`` if there is none. Seconds.
        output: All that was printed.
        step: Of the checkpoint that was saved; ``None`` if there is none.
    """

    status: int
    seconds: float
    saved_s: float | None
    output: str
    step: int | None


def prepare(folder: Path, name: str, trial: Trial, **changes: object) -> None:
    """Write the corpus, the recipe and the callback."""
    (folder / "corpus").mkdir(exist_ok=True)
    for number in range(20):
        (folder / "corpus" / f"{number}.txt").write_text(f"document {number}: " + "abc def " * 40)
    (folder / "beacon.py").write_text(BEACON.format(step=4))
    settings = {
        "max_steps": 1_000_000,
        "val_batches": 1_000_000 if trial.beacon == "InValidation" else 0,
        "devices": 1 if trial.launcher == "one" else 2,
        "strategy": "auto" if trial.launcher == "one" else STRATEGIES[trial.strategy],
        "module": "PipelineModule" if trial.strategy == "pipeline" else "PretrainModule",
        "beacon": trial.beacon,
        "more": ", gradient_clip_val: null" if trial.strategy == "pipeline" else "",
    }
    (folder / f"{name}.yaml").write_text(RECIPE.format(name=name, **settings | changes))


def words_of(name: str, trial: Trial, *more: str) -> list[str]:
    """Return the command that starts a run."""
    launcher = TORCHRUN if trial.launcher == "torchrun" else []
    return [sys.executable, *launcher, "-m", "lightning_lm.cli", "fit", "--config", f"{name}.yaml", *more]


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a run."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    return inherited | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}


def execute(folder: Path, trial: Trial, *, limit_s: float = 60.0, signals: int = 1) -> Outcome:
    """Start a run, send a signal once it has come so far, and wait for the end of all its processes.

    Args:
        folder: An empty folder, or that of an earlier trial.
        trial: The run and its signal.
        limit_s: Time to end in; after it the processes are killed and the status is -9. Seconds.
        signals: How often the signal is sent, 1.5 s apart.
    """
    prepare(folder, "run", trial)
    os.mkfifo(folder / "ready")
    ready = os.open(folder / "ready", os.O_RDWR | os.O_NONBLOCK)
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            words_of("run", trial),
            cwd=folder,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        came = select.select([ready], [], [], START_S)[0]
        assert came, (folder / "output").read_text()[-3000:]
        start, start_time = time.monotonic(), time.time()
        for number in range(signals):
            time.sleep(1.5 if number else 0)
            send(folder, process, trial)
        status = waited(process, limit_s)
        seconds = time.monotonic() - start
    finally:
        os.close(ready)
        (folder / "ready").unlink()
        kill_group(process.pid)
    path = checkpoint_of(folder)
    saved_s = None if path is None else path.stat().st_mtime - start_time
    return Outcome(status, seconds, saved_s, (folder / "output").read_text(errors="replace"), saved_step(folder))


def send(folder: Path, process: "subprocess.Popen[bytes]", trial: Trial) -> None:
    """Send the signal of a trial."""
    if trial.target == "main":
        process.send_signal(trial.signum)
    elif trial.target == "group":
        os.killpg(process.pid, trial.signum)
    else:
        pids = dict(line.split() for line in (folder / "ready.pids").read_text().splitlines())
        os.kill(int(pids[trial.target.removeprefix("rank ")]), trial.signum)


def waited(process: "subprocess.Popen[bytes]", limit_s: float) -> int:
    """Return the exit status once every process of the session is gone; -9 if that takes too long."""
    deadline = time.monotonic() + limit_s
    try:
        status = process.wait(limit_s)
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    except ProcessLookupError:
        return status
    return -signal.SIGKILL


def kill_group(pid: int) -> None:
    """End whatever a trial has left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def checkpoint_of(folder: Path, name: str = "run") -> Path | None:
    """Return the last checkpoint of a run."""
    found = sorted((folder / "runs" / name).glob("version_*/checkpoints/last*.ckpt"))
    return found[-1] if found else None


def saved_step(folder: Path) -> int | None:
    """Return the step of the last checkpoint."""
    path = checkpoint_of(folder)
    return None if path is None else int(load(path)["global_step"])


def load(path: Path) -> dict:
    """Read a checkpoint, of one file or sharded."""
    from lightning_lm.strategies import AtomicCheckpointIO

    return AtomicCheckpointIO().load_checkpoint(path)


def continuation_is_equal(folder: Path, trial: Trial, more_steps: int = 5) -> bool:
    """Resume a trial's run for a few steps, and compare its weights with those of a run without interruption."""
    path = checkpoint_of(folder)
    step = int(load(path)["global_step"])
    for name, words in (("rest", ["--ckpt_path", str(path)]), ("whole", [])):
        prepare(folder, name, trial, max_steps=step + more_steps, val_batches=2, beacon="Never")
        subprocess.run(words_of(name, trial, *words), cwd=folder, env=environment(folder), check=True, timeout=START_S)
    rest, whole = (load(checkpoint_of(folder, name))["state_dict"] for name in ("rest", "whole"))
    return all(torch.equal(value, whole[name]) for name, value in rest.items())


def trials() -> list[Trial]:
    """Return the trials of the long form."""
    one = [Trial("one", "-", signum) for signum in SIGNALS]
    several = [Trial(*found) for found in itertools.product(("lightning", "torchrun"), STRATEGIES, SIGNALS)]
    several = [trial for trial in several if (trial.launcher, trial.signum) != ("torchrun", signal.SIGUSR1)]
    special = [
        Trial("one", "-", signal.SIGTERM, beacon="InValidation"),
        Trial("one", "-", signal.SIGINT, beacon="InSetup"),
        Trial("lightning", "ddp", signal.SIGINT, "group"),
        Trial("lightning", "zero2", signal.SIGINT, "group"),
        Trial("lightning", "ddp", signal.SIGTERM, "rank 1"),
        Trial("lightning", "fsdp2", signal.SIGTERM, "rank 1"),
        Trial("torchrun", "zero1", signal.SIGTERM, "rank 1"),
        Trial("lightning", "zero2", signal.SIGTERM, "group", "InValidation"),
        Trial("torchrun", "fsdp2", signal.SIGTERM, beacon="InValidation"),
    ]
    return one + several + special


def main() -> None:
    """Print a row for each trial."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="launcher or strategy")
    parser.add_argument("--compare", action="store_true", help="also resume each run and compare its weights")
    parser.add_argument("--numbers", type=int, nargs="+", help="rows of the table, from 0 on")
    arguments = parser.parse_args()
    head = (
        "launcher | strategy | signal | to | moment | status | saved after, s | ended after, s | saved step | resumed"
    )
    print(f"| {head} |\n" + "|---" * 10 + "|")
    for number, trial in enumerate(trials()):
        if arguments.only not in (trial.launcher, trial.strategy, "") or number not in (arguments.numbers or [number]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = execute(Path(folder), trial)
            equal = "-"
            if arguments.compare and outcome.step is not None:
                equal = "bit-equal" if continuation_is_equal(Path(folder), trial) else "DIFFERS"
        cells = (trial.launcher, trial.strategy, trial.signum.name, trial.target, trial.beacon, outcome.status)
        times = ["-" if found is None else f"{found:.1f}" for found in (outcome.saved_s, outcome.seconds)]
        print("|", *(f"{cell} |" for cell in (*cells, *times, outcome.step, equal)), flush=True)
        if outcome.status not in (128 + trial.signum, 1) or outcome.seconds > 10:
            print(outcome.output[-3000:], file=sys.stderr)


if __name__ == "__main__":
    main()
