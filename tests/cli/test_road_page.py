"""The page of a road: what one stage, no score, or values that cannot be drawn look like."""

import pytest

from lightning_lm.cli.road.page import report_page

STAGE = {
    "name": "sft",
    "status": "failed",
    "command": "lightning-lm fit --config 'a <b>'",
    "score_commands": [],
    "wall_s": 61.0,
    "cpu_s": 30.0,
    "memory_bytes": 2**20,
    "measuring_wall_s": 1.0,
    "measuring_cpu_s": 2.0,
    "attempts": 2,
    "num_tokens": None,
    "checkpoint": None,
    "log": "x.log",
    "curves": {"train/loss": {"steps": [1, 2], "values": [3.0, float("nan")]}},
    "scores": {},
    "samples": [],
}
REPORT = {
    "title": "<script>",
    "version": "1",
    "time": "now",
    "machine": "m",
    "command": "lightning-lm road",
    "output": "road",
    "prompts": ["<b>"],
    "metrics": ["val/reward"],
    "untrained": {"scores": {}, "samples": []},
    "stages": [STAGE],
    "totals": {"wall_s": 62.0, "cpu_s": 32.0, "num_tokens": 0, "memory_bytes": 2**20},
}


def test_a_stage_that_failed_is_shown_with_its_curve_and_nothing_else():
    text = report_page(REPORT)
    assert "failed; 1:01 (min:s), 30 CPU-seconds, 1 MiB, in 2 attempts" in text
    assert "a &lt;b&gt;" in text
    assert "<script" not in text
    assert "Scores after" not in text
    assert "Samples on" not in text


@pytest.mark.parametrize("value", [-1.5, float("inf"), 0.0])
def test_scores_of_any_size_are_shown(value):
    stages = [{**STAGE, "scores": {"val/reward": value}, "samples": ["<i>\x00"], "checkpoint": "last.ckpt"}]
    text = report_page({**REPORT, "stages": stages})
    assert "after sft" in text
    assert "&lt;i&gt;\N{REPLACEMENT CHARACTER}" in text
