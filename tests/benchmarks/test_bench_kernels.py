"""The benchmark of kernels in small: what it times is the same operation everywhere, and it judges as it says."""

import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is one without a GPU")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run the program in this process, and return what it prints."""
    from bench_kernels import main

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *map(str, options)])
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            main()
        return capsys.readouterr().out

    return run


def test_a_dry_run_records_every_provider_and_goes_on_where_it_stopped(tmp_path, bench):
    record = tmp_path / "kernels.json"
    assert "No GPU: a dry run" in bench("--only", "relu_squared", "--rounds", 1, "--output", record)
    second = bench("--only", "relu_squared", "linear_nll*", "--rounds", 1, "--output", record, "--resume")
    assert "relu_squared 8x96" not in second
    results = json.loads(record.read_text())["results"]
    assert {name.split()[0] for name in results} == {"dry_run", "ceilings", "relu_squared", "linear_nll"}
    found = results["relu_squared 8x96"]
    assert {"ours", "torch", "torch_compiled", "liger", "goals"} == set(found)
    assert max(found["ours"]["relative_errors"]) < 4e-3  # half of a bfloat16's last bit
    assert {one["verdict"] for one in found["goals"]} == {"dry run"}
    assert "backward_ms" not in results["linear_nll 16x32x96"]["ours"]


def test_an_operation_is_wrong_only_beside_what_torch_itself_rounds():
    from bench_kernels import sizes_in_turn, wrong
    from kernel_cases import Case
    from kernel_goals import Work

    errors = {"torch": {"relative_errors": [1e-3, 0.04]}}
    assert wrong({"ours": {"relative_errors": [9e-3, 0.07]}, **errors}) is None
    assert wrong({"ours": {"relative_errors": [9e-3, 0.09]}, **errors}) == "number 1 is off by 0.09, allowed 0.08"
    assert wrong({"ours": {"relative_errors": [0.011]}, "torch": {"failed": "no memory"}}) is not None
    assert "off by nan" in wrong({"ours": {"relative_errors": [float("nan")]}, **errors})
    assert wrong({"ours": {"failed": "RuntimeError: launch"}, **errors}) == "RuntimeError: launch"
    named = [
        Case(name, list, {}, list, Work("bytes", 1.0)) for name in ("norm 8", "norm 16", "rope 4", "norm 32", "rope 8")
    ]
    assert [case.name for case in sizes_in_turn(named)] == ["norm 8", "rope 4", "norm 16", "rope 8", "norm 32"]


def test_a_check_against_float64_fails_if_ours_does(tmp_path, bench, monkeypatch):
    import bench_kernels
    from kernel_cases import cases

    record = tmp_path / "correct.json"
    assert "relu_squared 8x96: correct" in bench("--correct", "--only", "relu_squared", "--output", record)
    assert {"ours", "torch", "goals"} == set(json.loads(record.read_text())["results"]["relu_squared 8x96"])
    (case,) = (one for one in cases() if one.name.startswith("relu_squared"))
    case.providers["ours"] = lambda x: 1.02 * torch.relu(x).square()
    monkeypatch.setattr(bench_kernels, "cases", lambda: [case])
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--correct"])
    assert bench_kernels.main() == 1


def test_a_name_that_is_none_is_refused_with_those_that_are(bench, capsys):
    with pytest.raises(SystemExit) as refused:
        bench("--only", "rsm_norm")
    said = f"{refused.value.code}{capsys.readouterr().err}"
    assert "names no operation; there are add_rms_norm, attention" in said


def test_goals():
    from kernel_goals import Exact, Faster, Floor, Smaller, Work, judged

    work, ceilings = Work("bytes", 4e9, 8e9), {"copy_tb_per_s": 4.0, "product_tflop_per_s": 1.0}  # 1 ms and 2 ms
    found = {
        "ours": {"forward_ms": 1.25, "backward_ms": 2.0, "peak_mib": 10, "relative_errors": [1e-4, 3e-3]},
        "theirs": {"forward_ms": 2.5, "peak_mib": 40},
        "broken": {"failed": "RuntimeError"},
    }
    goals = (
        (Floor("forward", 0.8), 0.8, "pass"),
        (Floor("forward", 0.81), 0.8, "miss"),
        (Floor("backward", 1.0), 1.0, "pass"),
        (Faster("forward", "theirs", 2.0), 2.0, "pass"),
        (Faster("forward", "theirs", 2.1), 2.0, "miss"),
        (Faster("forward", "broken", 2.0), None, "not judged: broken failed"),
        (Faster("backward", "theirs", 2.0), None, "not judged: nothing was measured: 'backward_ms'"),
        (Smaller("theirs", 0.25), 0.25, "pass"),
        (Smaller("theirs", 0.2), 0.25, "miss"),
        (Exact(1, 2.5e-3), 3e-3, "miss"),
        (Exact(0, 2.5e-3), 1e-4, "pass"),
    )
    verdicts = judged(tuple(goal for goal, _, _ in goals), found, work, ceilings)
    assert [(one.get("reached"), one["verdict"]) for one in verdicts] == [(reached, word) for _, reached, word in goals]
    (dry,) = judged((Floor("forward", 0.8),), found, work, ceilings, dry=True)
    assert dry["verdict"] == "dry run"
    assert Work("flops", 1e12, 2e12).floor_ms("forward_backward", ceilings) == pytest.approx(3000)


def test_every_provider_that_runs_here_computes_the_same():
    from kernel_cases import cases

    torch.manual_seed(0)
    there = []
    for case in cases():
        inputs = [x.detach() for x in case.make()]
        exact = case.oracle(*(x.double() for x in inputs))
        exact = exact if isinstance(exact, tuple) else (exact,)
        there.append(case.name.split()[0])
        for name, function in case.providers.items():
            if name == "torch_compiled" or name.startswith(
                ("liger", "cut_cross_entropy", "sdpa_cudnn", "flash_linear")
            ):
                continue
            found = function(*inputs)
            for value, reference in zip(found if isinstance(found, tuple) else (found,), exact, strict=True):
                error = (value.double() - reference).norm() / reference.norm()
                assert error < 2e-2, (case.name, name, error)  # iterations of newton_schulz round each product
    assert {
        "softmax",
        "layer_norm",
        "cross_entropy",
        "geglu",
        "qk_norm_rope",
        "linear_nll",
        "grouped_linear",
        "ssd",
        "gated_delta",
    } <= set(there)
