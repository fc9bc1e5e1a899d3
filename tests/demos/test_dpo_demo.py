"""DPO on the reversal task: told which of two answers is better, a model that mostly copied learns to reverse."""

import math


def test_sixty_steps_of_preferences_teach_to_reverse(warm_start, run_demo):
    words = ("--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "4")
    demo = run_demo("dpo/reverse", "dpo_reverse", *words)
    curves = demo.curves
    assert abs(curves["train/loss"][0] - math.log(2)) < 1e-6
    assert curves["train/rewards/accuracies"][0] == 0.5  # every pair is tied
    assert curves["train/rewards/margins"][0] == 0.0
    assert warm_start.accuracy <= 0.40
    assert demo.accuracy >= 0.60
    assert curves["val/loss"] == sorted(curves["val/loss"], reverse=True)
    assert curves["val/rewards/accuracies"][-1] > 0.95
