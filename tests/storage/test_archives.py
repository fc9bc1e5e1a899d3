"""One flipped bit in a checkpoint: found, or without effect. The oracle is the content that torch reads then."""

import random

import pytest
import torch

from lightning_lm.errors import CheckpointError
from lightning_lm.modules import load_model
from lightning_lm.modules.checkpoint import read_checkpoint
from lightning_lm.storage import SWITCH, check_archive
from lightning_lm.strategies import AtomicCheckpointIO
from lightning_lm.tokenizers import load_tokenizer

CONTENT = {
    "state_dict": {f"layer.{index}": torch.arange(600.0) + index for index in range(6)},
    "optimizer": {"names": ["a" * 50, "b"], "step": 7},
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(CONTENT, path)
    return path


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and list(first) == list(second)
            and all(map(equal, *map(dict.values, (first, second))))
        )
    return first == second


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def weights_of(path):
    return path.read_bytes().index(torch.arange(600.0).numpy().tobytes()[:64])


def test_no_flipped_bit_changes_what_is_read(saved):
    whole, choose, found = saved.read_bytes(), random.Random(0), 0
    directory = whole.index(b"PK\1\2")  # a few hundred bytes that say where everything lies: half of the trials
    for trial in range(400):
        saved.write_bytes(whole)
        flip(saved, choose.randrange(8 * directory * (trial % 2), 8 * len(whole)))
        try:
            loaded = AtomicCheckpointIO().load_checkpoint(saved)
        except CheckpointError:
            found += 1
        else:
            assert equal(loaded, CONTENT)
    assert found > 250


def test_the_error_names_the_record_its_place_and_the_switch(saved, monkeypatch):
    place = weights_of(saved)
    flip(saved, 8 * (place + 5))
    with pytest.raises(
        CheckpointError, match=rf"last\.ckpt is damaged: last/data/0, bytes {place:,} to {place + 2400:,}.*{SWITCH}=0"
    ):
        read_checkpoint(saved)
    monkeypatch.setenv(SWITCH, "0")
    assert not equal(read_checkpoint(saved), CONTENT)


@pytest.mark.parametrize("read", [load_model, load_tokenizer])
def test_models_and_tokenizers_are_not_taken_from_a_damaged_file(saved, read):
    flip(saved, 8 * weights_of(saved))
    with pytest.raises(CheckpointError, match="is damaged"):
        read(saved)


def test_a_file_that_has_changed_is_looked_at_again(saved):
    check_archive(saved)
    flip(saved, 8 * weights_of(saved))
    with pytest.raises(CheckpointError, match="is damaged"):
        check_archive(saved)


def test_formats_without_checksums_are_left_to_torch(tmp_path):
    torch.save(CONTENT, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert equal(AtomicCheckpointIO().load_checkpoint(tmp_path / "old.ckpt"), CONTENT)


def test_every_length_of_a_cut_file_is_refused(saved):
    whole = saved.read_bytes()
    for length in range(0, len(whole), 997):
        saved.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|no checkpoint"):
            read_checkpoint(saved)
