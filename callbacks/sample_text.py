"""Completions of a few prompts while a model trains: the quickest look at whether it learns what it should."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.text import Text

from lightning_lm.callbacks.batches import logits_of
from lightning_lm.callbacks.formatting import visible
from lightning_lm.callbacks.hooks import Attempt, LeanHooks, clocks_stopped, reason_of, without_side_effects
from lightning_lm.callbacks.prompts import Prompt, find_tokenizer, sample_prompts
from lightning_lm.generation import Generator, Sampling, read_sources
from lightning_lm.generation.prompt_checks import room_for
from lightning_lm.modules import LMModule, PipelineModule
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.protocols import LanguageModel, Tokenizer

__all__ = ["SampleText"]

_LENGTH = 64


class SampleText(LeanHooks, Callback):
    """Print completions of prompts, and write them to TensorBoard, after each validation and at the end of a fit.

    Random state, training modes and gradients are restored, so a run with samples and one without are bit-equal. Every
    rank generates the same text, because the ranks of a sharded model need each other; rank 0 shows it. A strategy that
    gathers the weights for generation has ``generation_context(module)``.

    Works with any module: its ``model`` if that is a `lightning_lm.protocols.LanguageModel` or the model of an
    `LMModule`, otherwise its own ``forward(input_ids)``. To an encoder-decoder the prompts are sources. An error in
    generation is reported once and does not end the run.

    Args:
        prompts: Texts to continue; by default two prompts or sources of the validation data, or the beginnings of its
            texts.
        every_n_steps: Optimizer steps between samples; by default after each validation.
        max_new_tokens: Longest completion, tokens; by default 64, or as many as the context length leaves.
        sampling: Sampling settings; the seed is 0 by default, so that samples differ only by the model.
        tokenizer: Tokenizer of the prompts; by default ``trainer.datamodule.tokenizer``.

    Raises:
        ConfigurationError: At fit start, if there is no tokenizer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import SampleText
        >>> samples = SampleText(["def main("], every_n_steps=100)
        >>> trainer = Trainer(callbacks=[samples], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        prompts: Sequence[str] | None = None,
        *,
        every_n_steps: int | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling = Sampling(temperature=0.8, top_p=0.95),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_numbers(
            {"every_n_steps": Limit.COUNT, "max_new_tokens": Limit.COUNT},
            {"every_n_steps": every_n_steps, "max_new_tokens": max_new_tokens},
        )
        self._prompts = [Prompt(text) for text in prompts or ()]
        self._every_n_steps = every_n_steps
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling if sampling.seed is not None else dataclasses.replace(sampling, seed=0)
        self._tokenizer = tokenizer
        self._last_step = -1
        self._fails = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse early rather than after the first validation."""
        self._find_tokenizer(trainer)
        self._fails = isinstance(pl_module, PipelineModule)
        if self._fails:
            rank_zero_warn("SampleText shows nothing in this run: each rank has one stage of the model, not all of it.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample if it is time."""
        if self._every_n_steps is not None and trainer.global_step % self._every_n_steps == 0:
            self._sample(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample unless steps decide."""
        if self._every_n_steps is None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample from the final weights."""
        self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self._fails:
            return
        if not self._prompts:
            self._prompts = sample_prompts(trainer, self._find_tokenizer(trainer))
        texts: list[str] = []
        with Attempt() as attempt, clocks_stopped(trainer):
            texts = self._complete(trainer, pl_module)
        # Together: samples of a sharded model need all ranks.
        self._fails = trainer.strategy.reduce_boolean_decision(attempt.error is not None, all=False)
        if self._fails:
            rank_zero_warn(f"SampleText shows nothing in this run: generating failed ({reason_of(attempt.error)})")
        elif trainer.is_global_zero:
            shown = [prompt.text for prompt in self._prompts]
            if hasattr(getattr(pl_module, "model", None), "given"):
                shown = [f"{source} -> " for source in shown]
            _print(trainer.global_step, shown, texts)
            _write(trainer, shown, texts)

    def _complete(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        tokenizer = self._find_tokenizer(trainer)
        model: Any = _language_model(trainer, pl_module)
        gather = getattr(trainer.strategy, "generation_context", contextlib.nullcontext)
        precision = trainer.precision_plugin.val_step_context()
        with without_side_effects(pl_module, pl_module.device), gather(pl_module), precision:
            given: Sequence[str | list[int]] = [prompt.ids or prompt.text for prompt in self._prompts]
            if hasattr(model, "given"):
                model, given = read_sources(model, tokenizer, given)
            length = self._max_new_tokens or room_for(model, tokenizer, given, _LENGTH)
            completions = Generator(model, tokenizer).generate(given, sampling=self._sampling, max_new_tokens=length)
        return [completion.text for completion in completions]

    def _find_tokenizer(self, trainer: Trainer) -> Tokenizer:
        return find_tokenizer(trainer, self._tokenizer, "SampleText")


def _language_model(trainer: Trainer, pl_module: LightningModule) -> Any:
    model = getattr(pl_module, "model", None)
    if isinstance(model, LanguageModel) or hasattr(model, "given"):
        return model
    forward: Any = model if isinstance(pl_module, LMModule) else pl_module
    return lambda input_ids: logits_of(trainer, forward, input_ids)


def _print(step: int, prompts: list[str], texts: list[str]) -> None:
    console = rich.get_console()
    for prompt, text in zip(prompts, texts, strict=True):
        # Brackets, because many terminals and every log file show no bold.
        shown = ("[", "dim"), (visible(prompt), "bold"), ("]", "dim")
        console.print(Text.assemble((f"sample at step {step:,}: ", "dim"), *shown, visible(text)))


def _write(trainer: Trainer, prompts: list[str], texts: list[str]) -> None:
    for logger in trainer.loggers:
        add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
        if add_text is None:
            continue
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            # TensorBoard reads Markdown: indented lines stay as they are.
            indented = "    " + f"{prompt}{text}".replace("\n", "\n    ")
            add_text(f"samples/{index}", indented, global_step=trainer.global_step)
