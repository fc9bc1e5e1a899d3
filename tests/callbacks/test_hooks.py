"""Empty batch hooks are not called, used ones are, and Lightning still passes over what is not callable."""

from pathlib import Path

import yaml
from lightning.pytorch import Callback

from lightning_lm import callbacks
from lightning_lm.callbacks.hooks import LeanHooks


def test_lightning_passes_over_hooks_that_are_none(foreign_module, batches_of, loader_of, trainer_with):
    calls = []

    class Lean(LeanHooks, Callback):
        def on_train_batch_end(self, *args):
            calls.append("end")

    class Defines(Lean):
        def on_train_batch_start(self, *args):
            calls.append("start")

    assert Lean.on_train_batch_start is None
    assert Lean.on_before_zero_grad is None
    loader = loader_of(batches_of([(2, 5)] * 2))
    trainer_with(Lean(), Defines(), max_epochs=1).fit(foreign_module(), loader, loader)
    assert calls == ["start", "end", "end"] * 2


def test_the_callbacks_of_every_recipe_are_lean():
    repository = Path(__file__).parents[2]
    recipe = yaml.safe_load((repository / "recipes" / "base" / "trainer.yaml").read_text())
    names = [c if isinstance(c, str) else c["class_path"] for c in recipe["trainer"]["callbacks"]]
    assert "Perplexity" in names
    for name in names:
        assert issubclass(getattr(callbacks, name), LeanHooks), name
