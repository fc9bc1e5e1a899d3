"""A causal language model of ``transformers`` as plain data, so that checkpoints say what they hold the weights of."""

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.models.config import ModelConfig

if TYPE_CHECKING:
    from lightning_lm.models.huggingface.transformers_model import TransformersModel

__all__ = ["TransformersConfig"]


@dataclass(frozen=True, kw_only=True)
class TransformersConfig(ModelConfig):
    """A model of ``transformers``, built without weights from its own config.

    Checkpoints hold it for a module that was given such a model as an object. To train one from a folder, see
    `lightning_lm.modules.CheckpointModel`.

    Args:
        vocab_size: Number of token ids; that of the config.
        context_length: Positions that the model was made for.
        config: ``PretrainedConfig.to_dict()`` as JSON.
        generation: ``GenerationConfig.to_dict()`` as JSON.
    """

    config: str = "{}"
    generation: str = "{}"

    @classmethod
    def of(cls, model: Any) -> "TransformersConfig | None":
        """Describe a model; ``None`` if ``transformers`` alone does not know how to build it.

        Args:
            model: A causal language model of ``transformers``.
        """
        transformers = sys.modules["transformers"]  # whoever has such a model has imported it
        known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(model.config) not in known or type(model) is not known[type(model.config)]:
            return None
        text = model.config.get_text_config()
        length = getattr(text, "max_position_embeddings", None)
        return cls(
            vocab_size=text.vocab_size,
            context_length=cls.context_length if length is None else length,
            config=model.config.to_json_string(use_diff=False),
            generation=model.generation_config.to_json_string(use_diff=False),
        )

    def build(self, vocab_size: int | None = None) -> "TransformersModel":
        """Return the model, with random weights.

        Args:
            vocab_size: That of the tokenizer.

        Raises:
            ConfigurationError: If the tokenizer has more ids, or the installed ``transformers`` does not know the kind.
            MissingDependencyError: If ``transformers`` is not installed.
        """
        try:
            import transformers
        except ImportError as error:
            raise MissingDependencyError("transformers", "build one of its models", "hf") from error
        from lightning_lm.models.huggingface.transformers_model import TransformersModel

        if (vocab_size or 0) > (self.vocab_size or 0):
            raise ConfigurationError(
                f"The tokenizer has {vocab_size} ids, and the model {self.vocab_size}. Use its own."
            )
        fields = json.loads(self.config)
        kind = fields.pop("model_type", None)
        try:
            config = transformers.AutoConfig.for_model(kind, **fields)
        except ValueError as error:
            raise ConfigurationError(
                f"transformers {transformers.__version__} knows no model_type {kind!r}; install the version that the "
                f"model was trained with ({fields.get('transformers_version')})."
            ) from error
        factory: Any = transformers.AutoModelForCausalLM
        model = factory.from_config(config)
        model.generation_config = transformers.GenerationConfig.from_dict(json.loads(self.generation))
        return TransformersModel(model)
