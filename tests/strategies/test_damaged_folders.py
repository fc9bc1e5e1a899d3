"""Folders of sharded runs with flipped bits, cut files and missing files: every reader names the file."""

import json
import os
import random
import shutil

import pytest
import torch
from split_runs import STRATEGIES, model_config, run

from lightning_lm.cli import main
from lightning_lm.errors import CheckpointError
from lightning_lm.strategies import AtomicCheckpointIO
from lightning_lm.strategies.checkpoints.atomic import check_checkpoint
from lightning_lm.strategies.checkpoints.sharded import read_sharded

CONFIG = model_config(num_layers=1)
FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "digests.json", "meta.pt"]
FLIPS = 12
"""In each file, at places all over it."""


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "last.ckpt")


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << place % 8
    file.write_bytes(data)


def test_every_file_has_a_digest(saved):
    assert sorted(path.name for path in saved.iterdir()) == FILES
    assert sorted(json.loads((saved / "digests.json").read_text())["files"]) == [
        name for name in FILES if name != "digests.json"
    ]
    check_checkpoint(saved)


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_is_accepted(folder, name):
    whole, random_places = (folder / name).read_bytes(), random.Random(0)
    for part in range(FLIPS):
        place = int((part + random_places.random()) / FLIPS * len(whole))
        flip(folder / name, place)
        if name == "digests.json" and _means_the_same(whole, (folder / name).read_bytes()):
            continue
        with pytest.raises(CheckpointError, match=r"last\.ckpt/\S+ (is damaged|has [\d,]+ bytes|is missing)"):
            read_sharded(folder)
        (folder / name).write_bytes(whole)
    read_sharded(folder)


def _means_the_same(first, second):
    """White space between entries, and the version, may change."""
    try:
        return json.loads(first)["files"] == json.loads(second)["files"]
    except (ValueError, KeyError):
        return False


def refuse(name, path):
    with pytest.raises(CheckpointError) as caught:
        run(STRATEGIES[name](), config=CONFIG, ckpt_path=path, plugins=[AtomicCheckpointIO()])
    return str(caught.value)


def test_every_reader_names_the_damaged_file(ranks, folder, tmp_path, capsys):
    flip(folder / "__1_0.distcp", 20_000)
    messages = [message for name in ("fsdp2", "tp2", "zero2") for message in ranks(2).run(refuse, name, folder)]
    assert main(["consolidate", str(folder), "--output", str(tmp_path / "whole.ckpt")]) == 1
    messages.append(capsys.readouterr().err)
    for message in messages:
        assert "__1_0.distcp is damaged" in message
        assert "LIGHTNING_LM_VERIFY=0" in message
    assert not (tmp_path / "whole.ckpt").exists()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is damaged"):
        check_checkpoint(folder)


@pytest.mark.parametrize("name", [name for name in FILES if name != "digests.json"])
def test_missing_and_cut_files_are_named_on_every_rank(ranks, folder, name):
    os.truncate(folder / name, 100)
    for message in ranks(2).run(refuse, "fsdp2", folder):
        assert f"{name} has 100 bytes and was written with" in message
    (folder / name).unlink()
    for message in ranks(2).run(refuse, "fsdp2", folder):
        assert f"{name} is missing" in message or f"has no {name}" in message


def test_digests_can_be_left_out_of_it(folder, monkeypatch):
    weight = read_sharded(folder)["state_dict"]["model.embed.weight"]
    shard = folder / "__0_0.distcp"
    flip(shard, shard.read_bytes().index(weight[0].numpy().tobytes()))
    monkeypatch.setenv("LIGHTNING_LM_VERIFY", "0")
    assert (read_sharded(folder)["state_dict"]["model.embed.weight"] != weight).sum() == 1


def test_folders_of_earlier_versions_have_no_digests(folder, saved):
    (folder / "digests.json").unlink()
    found, expected = read_sharded(folder)["state_dict"], read_sharded(saved)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
