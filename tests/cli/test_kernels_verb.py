"""`lightning-lm kernels`: a rehearsal without a GPU, what is refused, and the report."""

import contextlib

import pytest
import torch

from lightning_lm.cli import main
from lightning_lm.kernels import tuning
from lightning_lm.kernels.runtime import launch_settings
from lightning_lm.kernels.runtime.launch_settings import read_table


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    launch_settings.use_table(None)
    yield
    monkeypatch.undo()
    launch_settings.use_table(None)


def test_a_rehearsal_prints_the_table_and_writes_only_where_it_is_told(tmp_path, capsys):
    pytest.importorskip("triton")
    assert main(["kernels", "tune", "--interpret", "softmax:40", "rms_norm_backward", "--tokens", "3"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split(": ")[0] for row in rows] == ["softmax:40", "rms_norm_backward:64"]
    assert all(" us (" in row and "3 tried, 0 failed" in row for row in rows)
    assert "nothing is written" in last
    assert not (tmp_path / "cache").exists()
    path = tmp_path / "table.json"
    assert main(["kernels", "tune", "--interpret", "softmax:40", "--output", str(path)]) == 0
    assert f"LIGHTNING_LM_KERNEL_TABLE={path}" in capsys.readouterr().out
    assert {entry.device for entry in read_table(path)} <= {"interpreter"}


def test_a_run_that_is_cut_keeps_what_it_has_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    measured = tuning.tune

    def cut(operation, dims, bench):
        if operation != "softmax":
            raise KeyboardInterrupt
        return measured(operation, dims, bench)._replace(before={})  # whatever it is, it is another setting

    monkeypatch.setattr(tuning, "tune", cut)
    path = tmp_path / "table.json"
    with contextlib.suppress(KeyboardInterrupt):
        main(["kernels", "tune", "--interpret", "softmax:40", "rope:4x2x16", "--output", str(path)])
    assert [(entry.operation, tuple(entry.dims)) for entry in read_table(path)] == [("softmax", (40,))]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["tune", "softmaxx"], 2, "Did you mean 'softmax'?"),
        (["tune", "rope:4"], 2, "heads x kv_heads x head_dim"),
        (["tune", "--interpret", "--dtype", "bfloat16"], 2, "--interpret computes bfloat16 wrongly"),
        (["tune", "--interpret", "softmax:100000"], 1, "last axis must have 1 to"),
    ],
)
def test_what_cannot_be_tuned(words, status, text, capsys):
    assert main(["kernels", *words]) == status
    assert text in capsys.readouterr().err


def test_without_a_gpu_it_says_where_to_tune(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["kernels", "tune"]) == 1
    text = capsys.readouterr().err
    assert "no CUDA device" in text
    assert "--interpret rehearses" in text


def test_work_that_does_not_fit_says_what_to_change(monkeypatch, capsys):
    pytest.importorskip("triton")

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    monkeypatch.setattr("lightning_lm.kernels.tuning.tune", fail)
    assert main(["kernels", "tune", "--interpret", "softmax"]) == 1
    assert "8 rows do not fit: CUDA out of memory. Use fewer --tokens." in capsys.readouterr().err


def test_the_report_names_backends_and_tables(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.json").write_text("{")
    monkeypatch.setenv(launch_settings.VARIABLE, str(tmp_path / "bad.json"))
    with pytest.warns(UserWarning, match="bad.json"):
        assert main(["kernels", "report"]) == 0
    text = capsys.readouterr().out
    assert "rms_norm" in text
    assert "bad.json cannot be read" in text
    assert "kernels.json: not there" in text
