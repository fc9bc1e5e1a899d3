"""Empty batch hooks are not called, used ones are, and Lightning still passes over what is not callable."""

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


def test_every_callback_here_is_lean():
    for name in callbacks.__all__:
        assert issubclass(getattr(callbacks, name), LeanHooks), name
