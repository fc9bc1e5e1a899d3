"""GRPO on the reversal task: from noisy demonstrations to right answers, by a reward alone."""


def test_twenty_rollouts_teach_to_reverse(warm_start, run_demo):
    demo = run_demo("grpo/reverse", "grpo_reverse")
    assert warm_start.accuracy <= 0.40
    assert demo.accuracy >= 0.90
    curves = demo.curves
    assert len(curves["train/reward"]) == 20  # one rollout an entry
    assert abs(curves["val/pass@1"][-1] - demo.accuracy) < 0.05  # other numbers, the same measure
    assert curves["train/entropy"][-1] < curves["train/entropy"][0]
    assert curves["train/frac_reward_zero_std"][-1] > curves["train/frac_reward_zero_std"][0]
    assert max(curves["train/sampling/sampling_logp_difference/max"]) < 1e-4
