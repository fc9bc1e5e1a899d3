"""PPO on the reversal task: right answers, and a critic that comes to know which answers go wrong."""


def test_twelve_rollouts_teach_policy_and_critic(warm_start, run_demo):
    words = ("--trainer.max_steps", "24", "--trainer.limit_val_batches", "0")
    demo = run_demo("ppo/reverse", "ppo_reverse", *words)
    assert warm_start.accuracy <= 0.40
    assert demo.accuracy >= 0.85
    explained = demo.curves["train/explained_variance"]
    assert abs(explained[0]) < 1e-3  # it begins knowing nothing
    assert max(explained) > 0.15
    assert sum(explained[2:10]) / 8 > 0.05  # while there is something left to explain
