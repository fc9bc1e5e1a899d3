"""Tuning in small, in the interpreter: times are made up, all else is as on a GPU."""

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lightning_lm.kernels
from lightning_lm.errors import UsageError
from lightning_lm.kernels.runtime import launch_settings
from lightning_lm.kernels.runtime.launch_settings import read_table
from lightning_lm.kernels.tuning import tune
from lightning_lm.kernels.tuning.targets import TUNABLE, Bench
from lightning_lm.kernels.tuning.tune import Stopwatch, take_turns

SMALL = tune.Effort(repetitions=1, finalists=2, rounds=3, most=3)
BENCH = Bench(device=torch.device("cpu"), dtype=torch.float32, tokens=8)


@pytest.fixture
def fast(monkeypatch):
    """Let the settings that are given take half the time of all others."""
    wanted = {}

    def timed(self, run):
        with launch_settings.trial("none"):
            run()
        return 1.0 if wanted.items() <= tables_seen[-1].items() else 2.0

    tables_seen = []
    original = launch_settings.settings

    def spying(operation, *args, **kwargs):
        found = original(operation, *args, **kwargs)
        tables_seen.append({"operation": operation, **found})
        return found

    for name in ("rows", "flash_tiles", "rope", "newton_schulz", "vocabulary"):
        module = inspect.importlib.import_module(f"lightning_lm.kernels.{name}")
        monkeypatch.setattr(module, "settings", spying)
    monkeypatch.setattr(Stopwatch, "__call__", timed)
    return wanted


def name_of(call):
    return call.func.id if isinstance(call.func, ast.Name) else ""


def test_every_kernel_that_looks_up_settings_can_be_tuned():
    found = set()
    for path in Path(lightning_lm.kernels.__file__).parent.glob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        names = {"settings", "row_settings", "pieces", "tiles"}
        found |= {call.args[0].value for call in calls if name_of(call) in names and type(call.args[0]) is ast.Constant}
    assert found == set(TUNABLE)


@pytest.mark.parametrize("operation", TUNABLE)
def test_each_runs_its_candidates_and_leaves_no_trial_behind(triton, operation):
    (target,) = tune.parse_target(operation, rehearsal=True)
    advanced = []
    effort = tune.Effort(repetitions=1, finalists=1, rounds=1, most=2)
    found = tune.tune(target, replace(BENCH, tokens=2), effort=effort, advance=lambda: advanced.append(1))
    assert found.tried == len(advanced) <= 2
    assert found.failed == 0
    assert not launch_settings._trials
    assert set(found.before) <= set(found.after)


def test_the_fastest_is_written_and_launched_from_then_on(triton, fast, tmp_path):
    fast["ROWS"] = 4
    (target,) = tune.parse_target("softmax:48")
    effort = tune.Effort(repetitions=1, finalists=8, rounds=3)
    found = tune.tune(target, BENCH, effort=effort)
    assert (found.before["ROWS"], found.after["ROWS"], found.ratio, found.before_us, found.after_us) == (
        32,
        4,
        0.5,
        2,
        1,
    )
    path = tmp_path / "table.json"
    assert tune.add_to_table(path, [found], BENCH) == 1
    (entry,) = read_table(path)
    assert (entry.device, entry.operation, entry.dims, entry.dtype) == ("interpreter", "softmax", (48,), "float32")
    launch_settings.use_table(path)
    try:
        again = tune.tune(target, BENCH, effort=effort)
    finally:
        launch_settings.use_table(None)
    assert (again.before, again.is_faster) == (found.after, False)


def test_nothing_is_written_where_nothing_is_faster_and_other_entries_stay(triton, fast, tmp_path):
    fast["ROWS"] = 4
    path, effort = tmp_path / "table.json", tune.Effort(repetitions=1, finalists=8, rounds=1)
    for text, number in (("softmax:48", 1), ("layer_norm:40", 2), ("softmax:48", 2)):
        (target,) = tune.parse_target(text)
        assert tune.add_to_table(path, [tune.tune(target, BENCH, effort=effort)], BENCH) == number
    fast.clear()  # all are equally fast
    found = tune.tune(target, BENCH, effort=effort)
    assert (found.is_faster, tune.add_to_table(tmp_path / "empty.json", [found], BENCH)) == (False, 0)


def test_a_candidate_that_computes_something_else_is_no_candidate(triton, fast, monkeypatch):
    (target,) = tune.parse_target("softmax:48")
    softmax, wrong = TUNABLE["softmax"], {"ROWS": 2}
    fast.update(wrong)

    def work(dims, bench):
        run = softmax.work(dims, bench)
        return lambda: tuple(2 * one if launch_settings._trials[-1].settings == wrong else one for one in run())

    monkeypatch.setitem(TUNABLE, "softmax", replace(softmax, work=work, candidates=lambda *_: iter([wrong])))
    found = tune.tune(target, BENCH, effort=SMALL)
    assert (found.tried, found.failed, found.is_faster) == (1, 1, False)


def test_a_kernel_that_cannot_run_is_said_to():
    (target,) = tune.parse_target("softmax:48")
    with pytest.raises(UsageError, match=r"softmax:48 looked up no launch settings for torch.float32.*kernels report"):
        tune.tune(target, BENCH, effort=SMALL)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rmsnorm", r"no kernel 'rmsnorm'.*mean 'rms_norm'.*There are: rms_norm, "),
        ("rope:32x8", r"heads x kv_heads x head_dim, such as rope:32x8x128; '32x8' is"),
        ("softmax:0", "'0' is something else"),
        ("softmax:12,a", "'a' is something else"),
    ],
)
def test_words_that_name_nothing(text, reason):
    with pytest.raises(UsageError, match=reason):
        tune.parse_target(text)


def test_words_and_sizes():
    assert [str(target) for target in tune.parse_target("rope:32x8x128,1x1x2")] == ["rope:32x8x128", "rope:1x1x2"]
    assert [target.dims for target in tune.parse_target("flash_attention")] == [(64,), (128,)]


def test_what_slows_down_the_device_slows_down_all():
    clock = iter([1.0, 2.0, 10.0, 20.0, 3.0, 6.0])  # the middle round ran on a busy device
    made = []

    def make():
        made.append(1)
        return [lambda: None, lambda: None]

    assert take_turns(make, lambda run: next(clock), 3) == [(3.0, 1.0), (6.0, 2.0)]
    assert len(made) == 3
