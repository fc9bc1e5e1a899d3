import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lm.errors import CheckpointError
from lightning_lm.models.huggingface.weights import StoredTensor, read_json, read_tensors, write_json, write_tensors


def tensors(count=5, size=16):
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}": torch.randn(size, generator=generator) for i in range(count)}


def stored(values):
    return [StoredTensor(name, value.nbytes, lambda value=value: value) for name, value in values.items()]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_file_is_what_safetensors_itself_reads(tmp_path):
    values = tensors()
    write_tensors(tmp_path / "new", stored(values), max_shard_bytes=10**9)
    assert files(tmp_path / "new") == ["model.safetensors"]
    loaded = load_file(tmp_path / "new" / "model.safetensors")
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], value) for name, value in values.items())


def test_shards_hold_at_most_the_limit_and_the_index_finds_each_tensor(tmp_path):
    values = tensors()
    write_tensors(tmp_path, stored(values), max_shard_bytes=2 * 16 * 4)
    assert files(tmp_path) == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 16 * 4
    for name, value in values.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], value)
    assert {name: value.tolist() for name, value in read_tensors(tmp_path)} == {
        k: v.tolist() for k, v in values.items()
    }


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path):
    values = {"small": torch.ones(2), "large": torch.ones(100), "last": torch.ones(2)}
    write_tensors(tmp_path, stored(values), max_shard_bytes=16)
    assert {name: value.numel() for name, value in read_tensors(tmp_path)} == {"small": 2, "large": 100, "last": 2}


@pytest.mark.parametrize(
    "name", ["/etc/model.safetensors", "../other/model.safetensors", "sub/x.safetensors", "..", 3, None]
)
def test_an_index_names_files_of_its_own_folder_alone(tmp_path, name):
    (tmp_path / "model").mkdir()
    write_tensors(tmp_path / "other", stored(tensors()), max_shard_bytes=10**9)
    write_json(tmp_path / "model" / "model.safetensors.index.json", {"weight_map": {"layer.0": name}})
    with pytest.raises(CheckpointError, match=r"index\.json names .*no file beside it.*only files in .*model are read"):
        list(read_tensors(tmp_path / "model"))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_names_is_refused(tmp_path, index):
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        list(read_tensors(tmp_path))


def test_pickles_are_refused_with_the_way_out(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle.*save_pretrained"):
        list(read_tensors(tmp_path))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert [name for name, _ in read_tensors(tmp_path)] == ["x"]


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        list(read_tensors(tmp_path))
    write_tensors(tmp_path, stored(tensors()), max_shard_bytes=64)
    (tmp_path / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 5 shards.*00002"):
        list(read_tensors(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    write_tensors(tmp_path, stored(tensors()), max_shard_bytes=10**9)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            list(read_tensors(tmp_path))


def test_json_is_read_back_or_refused(tmp_path):
    write_json(tmp_path / "config.json", {"é": [1, 2]})
    assert read_json(tmp_path / "config.json") == {"é": [1, 2]}
    assert files(tmp_path) == ["config.json"]
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"has no other\.json"):
        read_json(tmp_path / "other.json")
