"""Checkpoints written by a thread: order, errors, and kills in the middle, all for real."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_lm.callbacks import LastCheckpoint
from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.strategies import AtomicCheckpointIO, BackgroundCheckpointIO


@pytest.fixture
def gate(monkeypatch):
    """While it is closed, no file is finished; it keeps how many were being finished at once."""

    class Gate(threading.Event):
        inside = most = 0

        def fsync(self, descriptor):
            self.inside += 1
            self.most = max(self.most, self.inside)
            assert self.wait(60)
            self.inside -= 1

    gate = Gate()
    gate.set()
    monkeypatch.setattr(os, "fsync", gate.fsync)
    return gate


@pytest.fixture
def writer(tmp_path):
    writer = BackgroundCheckpointIO()
    writer.save_checkpoint({"number": torch.tensor(1)}, tmp_path / "1.ckpt")  # the first of a folder is waited for
    yield writer
    writer.teardown()


def number_in(path) -> int:
    return int(AtomicCheckpointIO().load_checkpoint(path)["number"])


def test_a_save_does_not_wait_and_holds_what_was_there_when_it_was_asked_for(writer, gate, tmp_path):
    gate.clear()
    number, places = torch.tensor(2), [1, 2]
    writer.save_checkpoint({"number": number, "places": places}, tmp_path / "2.ckpt")
    number.add_(40)
    places.append(3)
    assert not (tmp_path / "2.ckpt").exists()
    gate.set()
    loaded = writer.load_checkpoint(tmp_path / "2.ckpt")  # waits
    assert (loaded["number"], loaded["places"]) == (2, [1, 2])


def test_the_file_is_the_one_that_would_be_written_at_once(writer, tmp_path):
    tied = torch.randn(100, 100)
    content = {"state_dict": {"a": tied, "b": tied, "e": torch.empty(0)}, "lists": [{"x": torch.ones(3, 2).T}]}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "plain" / "x.ckpt")
    writer.save_checkpoint(content, tmp_path / "2.ckpt")
    loaded = writer.load_checkpoint(tmp_path / "2.ckpt")
    assert loaded["state_dict"]["a"].data_ptr() == loaded["state_dict"]["b"].data_ptr()
    assert torch.equal(loaded["lists"][0]["x"], torch.ones(2, 3))
    assert loaded["lists"][0]["x"].stride() == (1, 2)
    sizes = [(tmp_path / name).stat().st_size for name in ("plain/x.ckpt", "2.ckpt")]
    assert abs(sizes[0] - sizes[1]) < 1000 < tied.nbytes


def test_the_old_file_goes_only_when_the_new_one_is_whole(writer, gate, tmp_path):
    gate.clear()
    writer.save_checkpoint({"number": 2}, tmp_path / "2.ckpt")
    writer.remove_checkpoint(tmp_path / "1.ckpt")
    assert number_in(tmp_path / "1.ckpt") == 1
    gate.set()
    writer.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["2.ckpt"]


def test_one_file_at_a_time_and_no_more_waiting_than_allowed(writer, gate, tmp_path):
    gate.clear()
    for number in (2, 3):
        writer.save_checkpoint({"number": number}, tmp_path / f"{number}.ckpt")
    third = threading.Thread(target=writer.save_checkpoint, args=({"number": 4}, tmp_path / "4.ckpt"))
    third.start()
    third.join(0.1)
    assert third.is_alive()  # two are pending: it waits
    gate.set()
    third.join()
    writer.teardown()
    assert gate.most == 1
    assert sorted(number_in(path) for path in tmp_path.iterdir()) == [1, 2, 3, 4]


def unwritable(folder: Path) -> Path:
    """Return a path at which no file can be put, because there is a folder."""
    (folder / "bad.ckpt" / "inside").mkdir(parents=True)
    return folder / "bad.ckpt"


MEETS = {
    "save": lambda writer, folder: writer.save_checkpoint({"number": 3}, folder / "3.ckpt"),
    "load": lambda writer, folder: writer.load_checkpoint(folder / "1.ckpt"),
    "end": lambda writer, folder: writer.teardown(),
}


@pytest.mark.parametrize("meet", MEETS.values(), ids=MEETS)
def test_an_error_comes_up_later_and_costs_no_other_file(writer, gate, tmp_path, meet):
    gate.clear()
    writer.save_checkpoint({"number": 2}, unwritable(tmp_path))
    writer.remove_checkpoint(tmp_path / "1.ckpt")  # what it was to replace
    gate.set()
    writer._thread.submit(int).result()  # behind both
    with pytest.raises(CheckpointError, match=r"bad\.ckpt was not written: "):
        meet(writer, tmp_path)
    assert number_in(tmp_path / "1.ckpt") == 1
    writer.save_checkpoint({"number": 3}, tmp_path / "3.ckpt")  # it was said: the run may go on
    writer.teardown()
    assert number_in(tmp_path / "3.ckpt") == 3


def test_the_first_save_says_at_once_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="was not written"):
        BackgroundCheckpointIO().save_checkpoint({}, unwritable(tmp_path))


def test_a_folder_with_a_link_is_never_left_behind(writer, gate, tmp_path):
    (tmp_path / "last.ckpt").symlink_to("1.ckpt")
    writer.save_checkpoint({"number": 2}, tmp_path / "2.ckpt")
    assert number_in(tmp_path / "2.ckpt") == 2  # nothing was waited for here


def test_nothing_may_wait():
    with pytest.raises(ConfigurationError, match="max_pending=0"):
        BackgroundCheckpointIO(max_pending=0)


# --- with a Trainer ---


class Large(LightningModule):
    """Large enough that a file takes longer to write than a step to compute."""

    def __init__(self, size=1500):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size, size))

    def training_step(self, batch, batch_idx):
        loss = (self.weight[0] - batch).square().mean()
        self.log("loss", -float(self.global_step))  # every step is the best
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trained(folder, plugin, save_last, *, size=8, max_steps=7, ckpt_path=None) -> Trainer:
    torch.manual_seed(0)
    best = ModelCheckpoint(
        folder,
        "{step}",
        monitor="loss",
        save_top_k=2,
        save_last=save_last,
        every_n_train_steps=1,
        enable_version_counter=False,
    )
    trainer = Trainer(
        accelerator="cpu",
        plugins=[plugin],
        callbacks=[best, LastCheckpoint(2, folder / "newest")],
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Large(size), DataLoader([torch.ones(size)] * 10, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def content(folder: Path):
    return {
        str(path.relative_to(folder)): AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["weight"].tolist()
        for path in sorted(folder.rglob("*.ckpt"))
    }


@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_trainer_leaves_the_same_files(tmp_path, save_last):
    plain = trained(tmp_path / "plain", AtomicCheckpointIO(), save_last)
    ours = trained(tmp_path / "ours", BackgroundCheckpointIO(), save_last)
    found = content(tmp_path / "ours")
    assert found == content(tmp_path / "plain")
    assert sorted(found) == ["last.ckpt", "newest/last.ckpt", "step=6.ckpt", "step=7.ckpt"]
    assert Path(ours.checkpoint_callback.best_model_path).name == Path(plain.checkpoint_callback.best_model_path).name
    ours.save_checkpoint(tmp_path / "after.ckpt")  # nobody will wait for it: it is there
    assert (tmp_path / "after.ckpt").exists()


def train_for_ever(folder, save_last):
    trained(folder, BackgroundCheckpointIO(), save_last, size=1500, max_steps=-1)


@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_kill_while_a_file_is_written_leaves_whole_ones(tmp_path, save_last):
    process = multiprocessing.get_context("fork").Process(target=train_for_ever, args=(tmp_path, save_last))
    process.start()
    while not ((tmp_path / "step=3.ckpt").exists() and half_written(tmp_path)):
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    files = [path for path in tmp_path.rglob("*.ckpt") if not path.name.startswith(".")]
    loaded = {str(path): AtomicCheckpointIO().load_checkpoint(path)["global_step"] for path in files}
    assert len(list(tmp_path.glob("step=*.ckpt"))) >= 2  # the top two, or one more
    newest = max(loaded[str(path)] for path in tmp_path.rglob("last*.ckpt"))
    assert newest >= max(loaded.values()) - 2
    resumed = trained(tmp_path, BackgroundCheckpointIO(), save_last, size=1500, max_steps=newest + 1, ckpt_path="last")
    assert loaded[resumed.ckpt_path] == newest
    assert resumed.global_step == newest + 1
    assert not list(tmp_path.glob(".last*.tmp"))  # what the kill left behind


def half_written(folder: Path) -> bool:
    for path in folder.glob(".*.tmp"):
        try:
            if path.stat().st_size > 10**6:
                return True
        except FileNotFoundError:
            pass
    return False
