"""Checkpoints of a plain Trainer: no copy in memory, and the previous file until the next one is whole."""

import subprocess
import sys

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_lm.datamodules import TextDataModule
from lightning_lm.errors import CheckpointError
from lightning_lm.models import TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.modules.checkpoint_files import _FileCheckpointIO
from lightning_lm.strategies import AtomicCheckpointIO
from lightning_lm.tokenizers import Bytes


@pytest.fixture
def fitted(make_trainer):
    def fitted(**settings):
        module = PretrainModule(TransformerConfig(d_model=16, num_layers=1, context_length=16))
        data = TextDataModule(["one two three four " * 9], tokenizer=Bytes(), context_length=16, batch_size=2)
        trainer = make_trainer(max_steps=1, **settings)
        trainer.fit(module, data)
        return trainer

    return fitted


class Mine(TorchCheckpointIO):
    pass


@pytest.mark.parametrize("chosen", [AtomicCheckpointIO(), Mine(), AsyncCheckpointIO(TorchCheckpointIO())])
def test_a_plugin_that_was_chosen_stays(fitted, chosen):
    assert fitted(plugins=[chosen]).strategy.checkpoint_io is chosen


def test_a_plain_trainer_writes_what_lightning_writes(fitted, tmp_path):
    trainer = fitted()
    assert type(trainer.strategy.checkpoint_io) is _FileCheckpointIO
    trainer.save_checkpoint(tmp_path / "folder" / "ours.ckpt")
    TorchCheckpointIO().save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), tmp_path / "theirs.ckpt")
    ours, theirs = (torch.load(tmp_path / name) for name in ("folder/ours.ckpt", "theirs.ckpt"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items())
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["ours.ckpt"]


class Unwritable:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_the_previous_file(tmp_path):
    path, files = tmp_path / "last.ckpt", _FileCheckpointIO()
    files.save_checkpoint({"a": 1}, path)
    with pytest.raises(CheckpointError, match=r"No space left on device\. The previous file of that name is untouched"):
        files.save_checkpoint({"a": 2, "b": Unwritable()}, path)
    assert torch.load(path) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


SAVE = """
import resource, sys, torch
from lightning_lm.modules.checkpoint_files import _FileCheckpointIO
content = {"weights": torch.ones(16, 1 << 20)}
_FileCheckpointIO().save_checkpoint({"a": torch.ones(3)}, sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (int(open("/proc/self/statm").read().split()[0]) * 4096 + (32 << 20),) * 2)
_FileCheckpointIO().save_checkpoint(content, sys.argv[1])
"""


def test_saving_needs_half_the_memory_of_what_is_saved_at_most(tmp_path):
    """64 MiB of weights with 32 MiB of memory left."""
    subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / "one.ckpt")], check=True)
    assert torch.load(tmp_path / "one.ckpt")["weights"].sum() == 16 << 20
