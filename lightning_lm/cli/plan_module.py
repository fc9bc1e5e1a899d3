"""The module of a configuration on the meta device: built without memory, data or weights."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from torch import Tensor, nn

from lightning_lm.callbacks import LoRA
from lightning_lm.cli.trainer import CommandLine
from lightning_lm.errors import ConfigurationError, UsageError
from lightning_lm.models import ModelConfig
from lightning_lm.models.huggingface.config_json import config_from_huggingface
from lightning_lm.models.huggingface.folder import PretrainedCheckpoint
from lightning_lm.models.huggingface.transformers_model import TransformersConfig
from lightning_lm.models.huggingface.weights import read_json
from lightning_lm.models.own_model import whole_logits
from lightning_lm.modules import DPOModule, GRPOModule, KTOModule, LMModule, PretrainModule, RewardModule, SFTModule
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.checkpoint import CheckpointModel, load_config
from lightning_lm.modules.preference.precomputed_reference import PrecomputedReference
from lightning_lm.modules.reward_model import RewardModel
from lightning_lm.protocols import is_language_model
from lightning_lm.storage import resolve_checkpoint
from lightning_lm.tokenizers import TrainBPE, load_tokenizer

__all__ = ["Batch", "Objective", "PlannedCommandLine"]

_KNOWN = (PretrainModule, SFTModule, DPOModule, KTOModule, RewardModule, GRPOModule)


class Batch(NamedTuple):
    """Rows of an optimizer step."""

    examples: int
    """Rows, pairs or prompts of the datamodule."""
    context_length: int


class Objective(NamedTuple):
    """Cost of an objective beside the forward and backward pass of its model."""

    rows_per_example: float
    forward_only: float
    """Forward passes of the reference or of the old policy, for each one of the model that is trained."""
    has_logits: bool
    note: str = ""


class PlannedCommandLine(CommandLine):
    """The command line of ``fit`` that builds the module, on the meta device, and nothing else.

    Args:
        words: The command line after the verb, as ``fit`` takes it.

    Attributes:
        module: The configured module.
        settings: All that was parsed.
        compiles: True if the layers are compiled.
        checkpointing: Activations that the backward pass recomputes.
    """

    module: LMModule
    settings: Any
    compiles: bool
    checkpointing: ActivationCheckpointing

    def __init__(self, words: list[str]) -> None:
        super().__init__("fit", words)

    def _set_seed(self) -> None:
        """Draw nothing."""

    def before_instantiate_classes(self) -> None:
        """Train as on a GPU, whatever this machine has."""
        trainer = self.config[self.subcommand]["trainer"]
        if trainer.get("precision") is None:
            trainer["precision"] = "bf16-mixed"
        super().before_instantiate_classes()
        self.save_config_callback = None

    def _instantiate(self) -> None:
        self.settings = self.config[self.subcommand]
        parsed = Namespace(model=self.settings.model)  # type: ignore[no-untyped-call]
        built = self._parser(self.subcommand).instantiate(parsed)
        self.module = self._on_meta(built.model)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def _on_meta(self, module: Any) -> LMModule:
        if not isinstance(module, _KNOWN):
            names = ", ".join(cls.__name__ for cls in _KNOWN)
            raise UsageError(f"plan knows what {names} compute, not {type(module).__name__}.")
        if module.model_config is not None:
            module.model_config = _without_weights(module.model_config, self._vocab_size())
        self.compiles, self.checkpointing = module.compile_what == "blocks", module.activation_checkpointing
        module.compile_what = module.activation_checkpointing = "none"  # the trace counts for them
        with torch.device("meta"):
            module.configure_model()
            for adapters in self._adapters():
                adapters.attach(module.model)
        true = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
        return module.to(true.get(str(self.settings.trainer.precision), torch.float32))

    def _vocab_size(self) -> int | None:
        tokenizer = self._of_data("tokenizer")
        given = getattr(tokenizer, "init_args", None)
        if given is None:
            return None if self._data_class() != "TextDataModule" else TrainBPE.vocab_size
        path = given.get("path")
        size = given.get("vocab_size")
        return int(size) if size is not None else load_tokenizer(path).vocab_size if path is not None else None

    def _adapters(self) -> list[Any]:
        callbacks = self.settings.trainer.get("callbacks") or []
        chosen = [one for one in callbacks if str(one.get("class_path")).endswith(".LoRA")]
        parsed = Namespace({"trainer.callbacks": chosen})  # type: ignore[no-untyped-call]
        built = self._parser(self.subcommand).instantiate(parsed).trainer.callbacks if chosen else []
        return [callback.adapters for callback in built if isinstance(callback, LoRA)]

    def _data_class(self) -> str:
        return str(self.settings.data.class_path).rpartition(".")[2]

    def _of_data(self, name: str) -> Any:
        data = self.settings.data.get("init_args") or {}
        return data.get(name)

    # --- what a step is ---

    def batch(self, examples: int | None, context_length: int | None) -> Batch:
        """Return the rows of an optimizer step, by default as the datamodule has them.

        Args:
            examples: Rows, pairs or prompts.
            context_length: Tokens of a row.

        Raises:
            UsageError: If nothing says how large a step is.
        """
        rows, own = self._of_data("rows") or {}, self._of_data("context_length")
        rows = rows.get("init_args") or rows  # a part, or its fields
        length = own or rows.get("context_length") or rows.get("max_length")
        if isinstance(self.module, GRPOModule):
            prompts = self._of_data("max_prompt_tokens")
            length = None if prompts is None else prompts + self.module.plan.max_new_tokens
        size, length = examples or self._of_data("batch_size"), context_length or length
        if size is None or length is None:
            missing = "--batch ROWS" if size is None else "--sequence-length TOKENS"
            raise UsageError(f"{self._data_class()} does not say how large a step is; give {missing}.")
        return Batch(int(size), int(length))

    @property
    def objective(self) -> Objective:
        """Cost of the module's objective."""
        module = self.module
        if isinstance(module, GRPOModule):
            plan = module.plan
            passes = (int(module.needs_reference) + int(plan.steps > 1)) / plan.epochs
            rows = plan.samples_per_prompt / plan.minibatches
            note = "Rollouts are left out: speeds are those of the optimizer's passes over finished completions."
            return Objective(rows, passes, True, note)
        if isinstance(module, RewardModule):
            return Objective(2, 0, has_logits=False)
        if isinstance(module, DPOModule | KTOModule):
            compares = module.reference is not None and not isinstance(module.reference_part, PrecomputedReference)
            pairs = isinstance(module, DPOModule)
            return Objective(2 if pairs else 1, float(compares) + (0 if pairs else 2), has_logits=True)
        return Objective(1, 0, has_logits=True)

    @property
    def language_model(self) -> nn.Module:
        """The model whose layers are counted."""
        model: Any = self.module.model
        found: nn.Module = model.backbone if isinstance(model, RewardModel) else model
        return found

    @property
    def forward(self) -> Callable[[Any, Tensor], Any]:
        """The forward pass that is counted: up to the hidden states, if the loss takes those."""
        if is_language_model(self.language_model):
            return lambda model, ids: model.hidden(ids)
        return lambda model, ids: whole_logits(model, {"input_ids": ids})


def _without_weights(config: ModelConfig, vocab_size: int | None) -> ModelConfig:
    """Return a config that builds the same model without reading weights, its vocabulary known.

    Raises:
        ConfigurationError: If a checkpoint does not describe its model, or the vocabulary is not known.
    """
    described = config
    if isinstance(config, CheckpointModel | PretrainedCheckpoint):
        path = resolve_checkpoint(config.checkpoint)
        found = _of_folder(path, config.context_length) if path.is_dir() else load_config(path)
        if found is None:
            raise ConfigurationError(f"{path} does not describe its model. Give a config: --model.model ...")
        described = found
    size = described.vocab_size or config.vocab_size or vocab_size
    if size is None:
        raise UsageError("The vocabulary is not known before there is a tokenizer; give --model.model.vocab_size N.")
    return dataclasses.replace(described, vocab_size=size)


def _of_folder(folder: Path, context_length: int) -> ModelConfig:
    """Describe the model of a folder in the format of Hugging Face by its ``config.json`` alone."""
    settings = read_json(folder / "config.json")
    try:
        config = config_from_huggingface(settings)
    except ConfigurationError:  # then it trains as a model of transformers, as it does with weights
        pass
    else:
        return dataclasses.replace(config, context_length=context_length) if context_length else config
    size = (settings.get("text_config") or settings).get("vocab_size")
    return TransformersConfig(vocab_size=size, config=json.dumps(settings))
