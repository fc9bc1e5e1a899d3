"""GRPO on the reversal task with two processes under stock DDP: it learns what one process learns."""


def test_two_processes_learn_as_one_does(warm_start, run_demo):
    """Eight rollouts; one process has passed 0.9 after five."""
    name = "grpo_two_processes"
    demo = run_demo(
        "grpo/reverse",
        name,
        *("--trainer.devices", "2", "--trainer.strategy", "ddp_fork", "--trainer.max_steps", "16"),
        *("--trainer.limit_val_batches", "0", "--trainer.logger.init_args.name", name),
    )
    assert warm_start.accuracy <= 0.40
    assert demo.accuracy >= 0.85
    assert len(demo.curves["train/reward"]) == 8
