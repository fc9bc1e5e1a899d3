"""Checkpoint files under kills, full disks and foreign content, all for real."""

import contextlib
import multiprocessing
import os
import pickle
import re
import resource
import signal
from pathlib import Path

import pytest
import torch

from lightning_lm.errors import CheckpointError
from lightning_lm.strategies import AtomicCheckpointIO

FIRST = {"state_dict": {"weight": torch.arange(10.0)}, "epoch": 3}


def in_a_process(work, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def holds_first(path: Path) -> bool:
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    return loaded.get("epoch") == 3 and torch.equal(loaded["state_dict"]["weight"], torch.arange(10.0))


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "runs" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(FIRST, path)
    return path


def test_round_trip_leaves_one_file(saved):
    assert holds_first(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def save_within_limit(path: Path, answer: Path) -> None:
    """A limit on the size of files stands for the end of the disk: writing fails half-way with an error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    weights = {str(index): torch.zeros(50_000) for index in range(4)}
    try:
        AtomicCheckpointIO().save_checkpoint({"state_dict": weights}, path)
    except CheckpointError as error:
        answer.write_text(str(error))


def test_a_full_disk_leaves_the_previous_file(saved, tmp_path):
    in_a_process(save_within_limit, saved, tmp_path / "answer").join()
    answer = (tmp_path / "answer").read_text()
    assert "last.ckpt was not written: File too large" in answer
    assert "untouched" in answer
    assert holds_first(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def save_forever(path: Path) -> None:
    weights = {str(index): torch.zeros(250_000) for index in range(40)}
    while True:
        AtomicCheckpointIO().save_checkpoint({"state_dict": weights}, path)


def test_kill_in_the_middle_of_a_save_leaves_a_whole_file(saved):
    process = in_a_process(save_forever, saved)
    while not _sizes(saved.parent.glob(".last.ckpt.*.tmp")) > 10**6:
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    # Between the look at its size and the kill a save may have been completed: then that one is whole.
    assert holds_first(saved) or len(AtomicCheckpointIO().load_checkpoint(saved)["state_dict"]) == 40
    AtomicCheckpointIO().save_checkpoint(FIRST, saved)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]  # what the kill left is cleared away


def _sizes(paths) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in paths)
    return 0


@pytest.mark.parametrize("kept", [0, 1, 100, -1], ids=["empty", "one byte", "head", "all but a byte"])
def test_a_truncated_file_is_a_clear_error(saved, kept):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"last\.ckpt .*(truncated|no checkpoint)"):
        AtomicCheckpointIO().load_checkpoint(saved)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("weights_only", [None, False, True])
def test_foreign_objects_are_never_unpickled(tmp_path, monkeypatch, write, weights_only):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"not loaded|cannot be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=weights_only)
    assert not (tmp_path / "executed").exists()


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("none.ckpt")):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


def test_an_object_that_cannot_be_saved_leaves_nothing_behind(saved):
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        AtomicCheckpointIO().save_checkpoint({"state_dict": lambda: None}, saved)
    assert holds_first(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]
