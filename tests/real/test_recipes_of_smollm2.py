"""The recipes that start from SmolLM2, two steps each."""

import pytest

from lightning_lm.cli import main

SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu"]
QUIET = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
"""No checkpoint: model and optimizer are 1.6 GB."""
SMALL = {
    "sft/smollm2": ["--data.train.questions", "{card: 2}", "--data.rows.context_length", "127"],
    "sft/smollm2_lora": ["--data.train.questions", "{card: 2}", "--data.rows.context_length", "127"],
    "dpo/smollm2": ["--data.train.questions", "{brief: 2}", "--data.batch_size", "1"],
}
CALLBACKS = {"sft/smollm2": "[LMSummary]"}


@pytest.mark.parametrize("recipe", SMALL)
def test_a_recipe_trains_two_steps_from_the_published_model(recipe, smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").symlink_to(smollm2.folder)
    callbacks = ["--trainer.callbacks", CALLBACKS.get(recipe, "[LMSummary, LoRA]")]
    assert main(["fit", "--config", recipe, *SMALL[recipe], *callbacks, *SHORT, *QUIET]) == 0
