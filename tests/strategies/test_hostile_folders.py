"""Folders that were made to run code when they are read, or to reach files outside: each is refused by name."""

import contextlib
import io
import os
import pickle
import shutil

import pytest
import torch
from split_runs import STRATEGIES, Rows, model_config, run, save_run, trainer_for
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from lightning_lm.cli import main
from lightning_lm.errors import CheckpointError
from lightning_lm.modules import PretrainModule
from lightning_lm.strategies import AtomicCheckpointIO
from lightning_lm.strategies.checkpoints.folder_reader import read_metadata
from lightning_lm.strategies.checkpoints.sharded import read_sharded

CONFIG = model_config(num_layers=1)


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, marker, key=None):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def sound(folder):
    return FileSystemReader(folder).read_metadata()


def instead(folder, payload):
    return payload


def beside(folder, payload):
    return {"metadata": sound(folder), "more": payload}


def as_an_attribute(folder, payload):
    metadata = sound(folder)
    metadata.more = payload
    return metadata


def within_planner_data(folder, payload):
    metadata = sound(folder)
    metadata.planner_data = {"state_dict/x": [payload]}
    return metadata


def as_a_place(folder, payload):
    metadata = sound(folder)
    metadata.storage_data = {**metadata.storage_data, MetadataIndex("x"): payload}
    return metadata


def as_the_description_of_a_tensor(folder, payload):
    metadata = sound(folder)
    metadata.state_dict_metadata["state_dict/model.embed.weight"] = payload
    return metadata


def as_the_type_of_a_tensor(folder, payload):
    metadata = sound(folder)
    next(iter(metadata.state_dict_metadata.values())).properties.dtype = payload
    return metadata


HIDDEN = [
    instead,
    beside,
    as_an_attribute,
    within_planner_data,
    as_a_place,
    as_the_description_of_a_tensor,
    as_the_type_of_a_tensor,
]


@pytest.fixture
def folder(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "last.ckpt")
    (path / "digests.json").unlink()  # whoever tampers with a folder can write its digests too
    return path


def put(folder, metadata):
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_metadata_is_what_torch_reads(ranks, saved, tmp_path):
    ranks(2).run(save_run, "tp2 sp", tmp_path / "split")
    for path in (saved, tmp_path / "split"):
        ours, theirs = read_metadata(path), sound(path)
        theirs.storage_meta.load_id = None
        assert type(ours.storage_meta.checkpoint_id).__name__ == "PurePosixPath"
        ours.storage_meta.checkpoint_id = theirs.storage_meta.checkpoint_id
        assert ours == theirs
        assert [type(info) for info in ours.storage_data.values()] == [
            type(info) for info in theirs.storage_data.values()
        ]


@pytest.mark.parametrize("protocol", [0, 2, pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("hide", HIDDEN, ids=lambda hide: hide.__name__)
def test_nothing_hidden_in_metadata_runs(folder, tmp_path, hide, protocol):
    metadata = hide(folder, Payload(tmp_path / "marker"))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    reason = "was not loaded: it names posix.mkdir" if protocol > 3 else "it contains the pickle operation"
    with pytest.raises(CheckpointError, match=rf"\.metadata .*{reason}"):
        read_sharded(folder)
    assert not (tmp_path / "marker").exists()
    with contextlib.suppress(AttributeError):
        FileSystemReader(folder).read_metadata()
    assert (tmp_path / "marker").exists()  # the payload is real


def validate(path):
    trainer = trainer_for(STRATEGIES["fsdp2"](), plugins=[AtomicCheckpointIO()])
    with pytest.raises(CheckpointError) as caught:
        trainer.validate(PretrainModule(CONFIG), Rows(trainer, 1, 96), ckpt_path=path, verbose=False)
    return str(caught.value)


def resume(name, path):
    with pytest.raises(CheckpointError) as caught:
        run(STRATEGIES[name](), config=CONFIG, ckpt_path=path, plugins=[AtomicCheckpointIO()])
    return str(caught.value)


def test_every_reader_of_folders_refuses(ranks, folder, tmp_path, capsys):
    put(folder, as_an_attribute(folder, Payload(tmp_path / "marker")))
    messages = ranks(2).run(validate, folder)
    for name in ("fsdp2", "tp2", "zero1", "ddp"):
        messages += ranks(2).run(resume, name, folder)
    assert main(["consolidate", str(folder), "--output", str(tmp_path / "whole.ckpt")]) == 1
    messages.append(capsys.readouterr().err)
    for message in messages:
        assert ".metadata was not loaded: it names posix.mkdir" in message
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "whole.ckpt").exists()


def test_an_object_in_the_place_of_a_tensor_is_not_unpickled(folder, tmp_path):
    """torch reads what metadata calls "bytes" without ``weights_only``, also where a tensor was asked for."""
    metadata = sound(folder)
    for name in list(metadata.state_dict_metadata):
        index = next(index for index in metadata.storage_data if index.fqn == name)
        content = io.BytesIO()
        torch.save(Payload(tmp_path / "marker"), content)
        (folder / "payload").write_bytes(content.getvalue())
        info = metadata.storage_data.pop(index)
        info.relative_path, info.offset, info.length = "payload", 0, len(content.getvalue())
        metadata.storage_data[MetadataIndex(name)] = info
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
    put(folder, metadata)
    with pytest.raises(CheckpointError, match="is no tensor in the folder"):
        read_sharded(folder)
    assert not (tmp_path / "marker").exists()


def test_an_object_in_a_shard_is_not_unpickled(folder, tmp_path):
    metadata = sound(folder)
    content = io.BytesIO()
    torch.save(Payload(tmp_path / "marker"), content)
    (folder / "payload").write_bytes(content.getvalue())
    for info in metadata.storage_data.values():
        info.relative_path, info.offset, info.length = "payload", 0, len(content.getvalue())
    put(folder, metadata)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_sharded(folder)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("place", ["../outside", "/etc/passwd", "..", "sub/x", "..\\outside"])
def test_no_file_outside_the_folder_is_read(folder, place):
    metadata = sound(folder)
    next(iter(metadata.storage_data.values())).relative_path = place
    put(folder, metadata)
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        read_sharded(folder)


def text(value):
    return b"\x8c" + bytes([len(value)]) + value


def test_classes_stay_as_they_are(folder):
    """A pickle can also set attributes of the classes that it may name, which would outlive it."""
    named = text(b"torch.distributed.checkpoint.metadata") + text(b"Metadata") + b"\x93"
    (folder / ".metadata").write_bytes(b"\x80\x04" + named + b"N}" + text(b"version") + text(b"bad") + b"s\x86b.")
    with pytest.raises(CheckpointError):
        read_metadata(folder)
    assert Metadata.version is None


DAMAGED = [b"", b"\x80\x04", b"hello", b"\x80\x04N.", b"\x80\x04}."]
DAMAGED += [b"(" * 100_000, b"\x80\x04Nr\xff\xff\xff\x7f."]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_metadata_is_one_error(folder, content):
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_sharded(folder)


def test_deep_metadata_is_one_error(folder):
    metadata = sound(folder)
    nest = []
    for _ in range(100):
        nest = [nest]
    metadata.planner_data = nest
    put(folder, metadata)
    read_sharded(folder)
    (folder / ".metadata").write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    with pytest.raises(CheckpointError, match="damaged"):
        read_sharded(folder)


def test_missing_files_are_named(folder):
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp"):
        read_sharded(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"has no \.metadata"):
        read_sharded(folder)
