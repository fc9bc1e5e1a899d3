"""Expert iteration on the reversal task: a model imitates those of its answers that are right."""


def test_ten_rollouts_of_imitating_right_answers_teach_to_reverse(warm_start, run_demo):
    words = ("--trainer.max_steps", "40", "--trainer.limit_val_batches", "0")
    demo = run_demo("expert_iteration/reverse", "expert_iteration_reverse", *words)
    assert warm_start.accuracy <= 0.40
    assert demo.accuracy >= 0.85
    rewards = demo.curves["train/reward"]
    assert len(rewards) == 10
    assert rewards[0] < 0.45 < 0.7 < rewards[-1]
