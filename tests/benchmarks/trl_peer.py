"""TRL's GRPO as it is compared with ours: Dr. GRPO without a reference, on the CPU in float32, quiet."""

from typing import Any


def grpo_config(folder: str, *, seed: int, **options: Any) -> Any:
    """Return the arguments of TRL's trainer: what every comparison has in common, and the options of one.

    Args:
        folder: Where the trainer may write.
        seed: Of the trainer.
        **options: Sizes, the learning rate and its schedule, and what else one comparison sets.
    """
    import trl

    return trl.GRPOConfig(
        output_dir=folder,
        seed=seed,
        temperature=1.0,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        epsilon=0.2,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
