"""Tables of launch settings: which one wins, and that a wrong one is named and changes nothing."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from lightning_lm import kernels
from lightning_lm.errors import DataError
from lightning_lm.kernels.runtime import launch_settings
from lightning_lm.kernels.runtime.launch import triton_version
from lightning_lm.kernels.runtime.launch_settings import Entry, read_table, write_table

ENTRY = Entry(
    device="interpreter",
    operation="softmax",
    dims=(48,),
    dtype="float32",
    triton=triton_version(),
    settings={"ROWS": 4, "num_warps": 1},
    before_us=2.0,
    after_us=1.0,
    torch="2.13",
    date="2026-11-21",
)


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(launch_settings.VARIABLE, raising=False)
    launch_settings.use_table(None)
    yield
    monkeypatch.undo()
    launch_settings.use_table(None)


def looked_up(**changed):
    asked = {"operation": "softmax", "dims": (48,), "dtype": torch.float32, **changed}
    default = {"ROWS": 32, "num_warps": 4}
    return launch_settings.settings(*asked.values(), device=torch.device("cpu"), default=default)["ROWS"]


def write(path, rows):
    write_table(path, [replace(ENTRY, settings={"ROWS": rows})])
    return path


def test_the_given_table_then_that_of_the_environment_then_the_users_own(tmp_path, monkeypatch):
    assert looked_up() == 32
    write(launch_settings.user_table(), 1)
    launch_settings.use_table(None)
    assert looked_up() == 1
    monkeypatch.setenv(launch_settings.VARIABLE, str(write(tmp_path / "named.json", 2)))
    launch_settings.use_table(None)
    assert looked_up() == 2
    launch_settings.use_table(write(tmp_path / "given.json", 4))
    assert looked_up() == 4
    assert [source.path.name for source in launch_settings.sources()] == ["given.json", "kernels.json", "tables.json"]


@pytest.mark.parametrize("changed", [{"operation": "rms_norm"}, {"dims": (49,)}, {"dtype": torch.float16}], ids=str)
def test_an_entry_is_for_one_kernel_its_sizes_and_its_type(changed):
    write(launch_settings.user_table(), 1)
    assert looked_up(**changed) == 32


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "folder" / "table.json"
    other = replace(ENTRY, device="NVIDIA H100 80GB HBM3", dims=(32, 8, 128))
    write_table(path, [ENTRY, other])
    write_table(path, [ENTRY, other])
    assert sorted(read_table(path), key=lambda entry: entry.device) == [other, ENTRY]
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def broken(**changed):
    return json.dumps({"format": 1, "entries": [{**vars(ENTRY), **changed}]})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "not a table of kernels of format 1"),
        ('{"format": 2, "entries": []}', "it says 2"),
        ('{"format": 1, "entries": [{"device": "x"}]}', "entry 1"),
        (broken(settings={"ROWS": 3}), "cannot be launched with"),
        (broken(settings={"ROWS": -4}), "cannot be launched with"),
        (broken(settings={"ROWS": True}), "cannot be launched with"),
        (broken(settings={}), "cannot be launched with"),
        (broken(dims=["48"]), "does not name"),
        (broken(speed=1), "speed"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_once_and_ignored(tmp_path, text, reason):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        read_table(path)
    launch_settings.use_table(path)
    with pytest.warns(UserWarning, match=f"{path}.*{reason}.*ignored.*kernels tune") as caught:
        assert (looked_up(), looked_up(dims=(49,))) == (32, 32)
    assert len(caught) == 1


def test_a_table_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(launch_settings.VARIABLE, str(tmp_path / "nowhere.json"))
    with pytest.warns(UserWarning, match=r"nowhere.json cannot be read"):
        assert looked_up() == 32


def test_entries_of_another_triton_are_stale(tmp_path):
    path = tmp_path / "table.json"
    write_table(path, [replace(ENTRY, triton="3.5"), replace(ENTRY, dims=(49,))])
    launch_settings.use_table(path)
    with pytest.warns(UserWarning, match=r"table.json is stale: 1 of its 2 entries are of Triton 3.5"):
        assert (looked_up(), looked_up(dims=(49,))) == (32, 4)


def test_an_entry_with_a_setting_that_the_kernel_does_not_know_is_stale(tmp_path):
    launch_settings.use_table(tmp_path / "table.json")
    write_table(tmp_path / "table.json", [replace(ENTRY, settings={"ROWS": 4, "SPLITS": 2})])
    with pytest.warns(UserWarning, match=r"softmax takes no setting 'SPLITS'.*stale"):
        assert looked_up() == 32


def test_the_table_that_is_shipped_is_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (source,) = launch_settings.sources()
    assert (source.path.name, source.problem) == ("tables.json", "")


def test_a_launch_reads_it(triton, tmp_path):
    kernels.use_table(write(tmp_path / "table.json", 4))
    with launch_settings.trial("softmax") as seen:
        kernels.softmax(torch.randn(5, 48))
    assert seen.launched == {"ROWS": 4, "num_warps": 4}
