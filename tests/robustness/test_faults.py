"""The short form of `long_form.py`: some kills, full disks and flipped bits of every kind of file."""

import random
import warnings

import pytest
from robustness.faults import fill_everywhere, flip_everywhere, kill_everywhere
from robustness.writers import WRITERS

every_writer = pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged caches are announced
        yield


@every_writer
def test_a_kill_leaves_the_old_or_the_new(writer, tmp_path):
    assert kill_everywhere(writer, tmp_path, step=4 if "export" in writer.name or writer.name == "adapters" else 1) > 0


@every_writer
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_or_the_new(writer, tmp_path):
    kill_everywhere(writer, tmp_path, step=5, in_write=True)


@every_writer
def test_a_full_disk_leaves_the_old_and_names_the_path(writer, tmp_path):
    assert fill_everywhere(writer, tmp_path, limits=(0, 150)) > 0


@every_writer
def test_a_flipped_bit_is_found_or_has_no_effect(writer, tmp_path):
    found, harmless = flip_everywhere(writer, tmp_path, 16, random.Random(0).randrange)
    assert found > harmless
