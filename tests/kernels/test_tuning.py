"""Tuning in small, in the interpreter: times are made up, all else is as on a GPU."""

import ast
import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightning_lm.kernels
from lightning_lm.errors import UsageError
from lightning_lm.kernels.runtime import launch_settings
from lightning_lm.kernels.runtime.launch_settings import read_table
from lightning_lm.kernels.tuning import TUNABLE, Bench, Stopwatch, add_to_table, parse_target, tune

BENCH = Bench(torch.device("cpu"), torch.float32, tokens=8)
REHEARSAL = replace(BENCH, tokens=2, rehearsal=True)


@pytest.fixture
def fast(monkeypatch):
    """Let the settings that are given take half the time of all others."""
    wanted = {}

    def timed(self, run):
        tables_seen.clear()
        run()
        return 1.0 if any(wanted.items() <= seen.items() for seen in tables_seen) else 2.0

    tables_seen = []
    original = launch_settings.settings

    def spying(operation, *args, **kwargs):
        found = original(operation, *args, **kwargs)
        tables_seen.append({"operation": operation, **found})
        return found

    for name in ("runtime.rows", "flash_attention.operation", "rope", "newton_schulz", "lm_head.logits"):
        module = importlib.import_module(f"lightning_lm.kernels.{name}")
        monkeypatch.setattr(module, "settings", spying)
    monkeypatch.setattr(Stopwatch, "__call__", timed)
    return wanted


def name_of(call):
    return call.func.id if isinstance(call.func, ast.Name) else ""


def test_every_kernel_that_looks_up_settings_can_be_tuned():
    found = set()
    for path in Path(lightning_lm.kernels.__file__).parent.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        names = {"settings", "row_settings", "pieces", "tiles"}
        found |= {call.args[0].value for call in calls if name_of(call) in names and type(call.args[0]) is ast.Constant}
    assert found == set(TUNABLE)


@pytest.mark.parametrize("operation", TUNABLE)
def test_each_runs_its_candidates_and_leaves_no_trial_behind(triton, operation):
    ((_, dims),) = parse_target(operation, rehearsal=True)
    found = tune(operation, dims, REHEARSAL)
    assert 1 <= found.tried <= 3
    assert found.failed == 0
    assert not launch_settings._trials
    assert set(found.before) <= set(found.entry.settings)


def test_the_fastest_is_written_and_launched_from_then_on(triton, fast, tmp_path):
    fast["ROWS"] = 4
    found = tune("softmax", (48,), BENCH)
    entry = found.entry
    assert (found.before["ROWS"], entry.settings["ROWS"], found.ratio) == (32, 4, 0.5)
    assert (entry.before_us, entry.after_us) == (2, 1)
    path = tmp_path / "table.json"
    assert add_to_table(path, [found]) == 1
    assert read_table(path) == [entry]
    assert (entry.device, entry.operation, entry.dims, entry.dtype) == ("interpreter", "softmax", (48,), "float32")
    launch_settings.use_table(path)
    try:
        again = tune("softmax", (48,), BENCH)
    finally:
        launch_settings.use_table(None)
    assert (again.before, again.is_faster) == (entry.settings, False)


def test_nothing_is_written_where_nothing_is_faster_and_other_entries_stay(triton, fast, tmp_path):
    fast["ROWS"] = 4
    path = tmp_path / "table.json"
    for name, size, number in (("softmax", 48, 1), ("layer_norm", 40, 2), ("softmax", 48, 2)):
        assert add_to_table(path, [tune(name, (size,), BENCH)]) == number
    fast.clear()  # all are equally fast
    found = tune("softmax", (48,), BENCH)
    assert (found.is_faster, add_to_table(tmp_path / "empty.json", [found])) == (False, 0)


def test_a_candidate_that_computes_something_else_is_no_candidate(triton, fast, monkeypatch):
    softmax, wrong = TUNABLE["softmax"], {"ROWS": 2, "num_warps": 1}
    fast.update(wrong)

    def work(bench, size):
        run = softmax.work(bench, size)
        return lambda: tuple(2 * one if launch_settings._trials[-1].settings == wrong else one for one in run())

    choices = {"ROWS": (2,), "num_warps": (1,)}
    monkeypatch.setitem(TUNABLE, "softmax", softmax._replace(work=work, choices=choices))
    found = tune("softmax", (48,), BENCH)
    assert (found.tried, found.failed, found.is_faster) == (1, 1, False)


def test_what_slows_down_the_device_slows_down_all(triton, monkeypatch):
    """In the middle round the device is busy; the ratios of each round decide, not the times."""
    choices = {"ROWS": (2,), "num_warps": (1,)}
    monkeypatch.setitem(TUNABLE, "softmax", TUNABLE["softmax"]._replace(choices=choices))
    times = iter([1.0, *[1.0, 0.5, 20.0, 10.0] * 4])
    monkeypatch.setattr(Stopwatch, "__call__", lambda self, run: next(times))
    found = tune("softmax", (48,), BENCH)
    assert (found.ratio, found.is_faster) == (0.5, True)


def test_a_kernel_that_cannot_run_is_said_to():
    with pytest.raises(UsageError, match=r"softmax:48 looked up no launch settings for torch.float32.*kernels report"):
        tune("softmax", (48,), REHEARSAL)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rmsnorm", r"no kernel 'rmsnorm'.*mean 'rms_norm'.*There are: rms_norm, "),
        ("rope:32x8", r"heads x kv_heads x head_dim, such as rope:32x8x128; got '32x8'"),
        ("softmax:0", "got '0'"),
        ("softmax:12,a", "got 'a'"),
    ],
)
def test_words_that_name_nothing(text, reason):
    with pytest.raises(UsageError, match=reason):
        parse_target(text)


def test_words_and_sizes():
    assert parse_target("rope:32x8x128,1x1x2") == [("rope", (32, 8, 128)), ("rope", (1, 1, 2))]
    assert parse_target("flash_attention") == [("flash_attention", (64,)), ("flash_attention", (128,))]
