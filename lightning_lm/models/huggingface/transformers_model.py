"""Let any causal language model of ``transformers`` stand where one of ours can, and describe it in checkpoints."""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as remembered
from itertools import repeat
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.models.config import ModelConfig
from lightning_lm.models.huggingface.document_attention import document_attention
from lightning_lm.models.huggingface.transformers_cache import TransformersCache
from lightning_lm.models.lora import default_adapters
from lightning_lm.models.packing_trial import ONE_PER_ROW, keeps_documents_apart, several_documents

__all__ = [
    "TransformersCache",
    "TransformersConfig",
    "TransformersModel",
    "as_language_model",
    "is_of_transformers",
    "unsupported",
]


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


_SCALES_LOGITS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")
_MULTIPLIES = {"cohere": "logit_scale", "falcon_h1": "lm_head_multiplier", "hyperclovax": "logits_scaling"}
_DIVIDES = {"granite": "logits_scaling", "minicpm3": "logits_scaling"}
"""Families by the beginning of their ``model_type``, and what they scale logits with."""
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class TransformersModel(nn.Module):
    """A ``transformers`` causal language model that meets `lightning_lm.protocols.LanguageModel`.

    Packed rows are handled by ``transformers`` itself, which keeps the documents of most models apart if positions
    restart. Not of all (GPT-OSS, Qwen3-Next, Mamba, OPT), so a trial precedes the first batch with documents, and rows
    of several documents are refused if it fails. If a model scales its logits (Granite, Cohere) its hidden states are
    scaled instead: the same for a head without a bias.

    Args:
        model: For example ``AutoModelForCausalLM.from_pretrained(...)``, bare or with adapters in a ``PeftModel``. The
            low-rank adapters of a ``PeftModel`` are described in checkpoints as those of the callback `LoRA` are.

    Raises:
        ConfigurationError: If the model is not a decoder whose logits are ``soft-cap(scale * head(hidden))``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _check_supported(model)
        self.model = model
        self.training = model.training  # what from_pretrained returns is in evaluation mode: whoever trains it must see
        adapters = default_adapters(model)
        if adapters is not None:
            self.model, self.peft_config = _without_wrapper(model), {"default": adapters}
        caps = (getattr(_text_config(model), name, None) for name in _SOFT_CAPS)
        self.logit_softcap: float | None = next((cap for cap in caps if cap is not None), None)
        self._scale = _logit_scale(_text_config(model)) or 1.0
        self._keeps_apart: bool | None = None

    @property
    def description(self) -> TransformersConfig | None:
        """Description that rebuilds such a model without its weights; ``None`` with adapters or foreign code."""
        return None if hasattr(self.model, "get_base_model") else TransformersConfig.of(self.model)

    @property
    def head(self) -> Any:
        """The output embedding of the model, an `nn.Linear` or one with an adapter."""
        return self.model.get_output_embeddings()  # type: ignore[operator]

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        cache: TransformersCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return next-token logits."""
        logits: Tensor = self.head(
            self.hidden(input_ids, position_ids=position_ids, document_ids=document_ids, cache=cache)
        )
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def hidden(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        cache: TransformersCache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the features that ``head`` turns into logits.

        Raises:
            ConfigurationError: If documents are given together with a cache, with positions that do not restart at
                each of them, or in rows of several to a model that does not keep them apart.
        """
        mask: Tensor | None = None
        if cache is not None:
            if document_ids is not None:
                raise ConfigurationError("A cache holds one document per row; leave document_ids out.")
            if cache.length and input_ids.shape[1] > 1 and cache.is_recurrent(some=True):
                # Mamba continues its state by single tokens only.
                places = repeat(None) if position_ids is None else position_ids.split(1, dim=1)
                tokens = zip(input_ids.split(1, dim=1), places, strict=False)
                return torch.cat([self.hidden(ids, position_ids=at, cache=cache) for ids, at in tokens], dim=1)
            positions, mask = cache.columns(input_ids.shape[1])
            if mask is not None and cache.is_recurrent(some=False):
                mask = mask[:, -input_ids.shape[1] :]  # a state has no columns to mask
            position_ids = positions if position_ids is None else position_ids
        elif document_ids is not None:
            position_ids = _restarting_positions(document_ids, position_ids)
            self._require_apart(input_ids, document_ids)
        elif position_ids is not None:
            # Without a mask transformers would read a jump in the positions as the border of a document.
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        with document_attention(self.model, document_ids):
            hidden = self._decode(input_ids, position_ids, mask, cache)
        return hidden if self._scale == 1.0 else hidden * self._scale

    def _decode(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        mask: Tensor | None = None,
        cache: TransformersCache | None = None,
    ) -> Tensor:
        decoder = _decoder(self.model)
        caching = {} if cache is None else {_cache_keyword(type(decoder).forward): cache.past}
        output = decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            use_cache=cache is not None,
            **caching,
        )
        if cache is not None:
            cache.length += input_ids.shape[1]
        hidden: Tensor = output.last_hidden_state
        return hidden

    def keeps_documents_apart(self, device: torch.device) -> bool:
        """Return whether the documents of packed rows do not see each other; tried once.

        Collective for sharded weights: call on all ranks.

        Args:
            device: Device of the model.
        """
        if self._keeps_apart is None:
            self._keeps_apart = keeps_documents_apart(
                self,
                lambda inputs: self._decode(inputs["input_ids"], inputs["position_ids"]),
                num_ids=self.head.weight.shape[0],
                device=device,
            )
        return self._keeps_apart

    def _require_apart(self, input_ids: Tensor, document_ids: Tensor) -> None:
        """Refuse rows of several documents if one can be seen from another."""
        if torch.compiler.is_compiling():
            return
        apart = self.keeps_documents_apart(input_ids.device)
        if not apart and several_documents(input_ids, document_ids):
            model: Any = _without_wrapper(self.model)
            flash = "flash" in str(getattr(model.config, "_attn_implementation", None))
            raise ConfigurationError(
                f"The rows hold packed documents, and {type(model).__name__} of transformers lets each see the one "
                "before it: in a trial, a document after another had other hidden states than alone. "
                + ('Load the model with attn_implementation="sdpa". Or: ' if flash else "")
                + ONE_PER_ROW
            )

    def make_cache(
        self, batch_size: int, max_length: int, starts: Int[Tensor, " batch"] | None = None
    ) -> TransformersCache:
        """Return an empty cache; it grows as columns are written.

        Args:
            batch_size: Number of rows; decided by the first call all the same.
            max_length: Most columns that may be written.
            starts: First valid column of each row, int64 [batch], where prompts are padded on the left.

        Raises:
            ConfigurationError: If ``starts`` is not one number per row.
        """
        if starts is not None and starts.shape != (batch_size,):
            raise ConfigurationError(f"starts has shape {tuple(starts.shape)}; give one number for each of the rows.")
        try:
            from transformers import DynamicCache
        except ImportError as error:
            raise MissingDependencyError("transformers", "cache keys and values of its models", "hf") from error
        config: Any = self.model.config
        return TransformersCache(DynamicCache(config=config), max_length, starts)


def as_language_model(model: nn.Module) -> nn.Module:
    """Return a causal language model of ``transformers`` in a `TransformersModel`, and any other module as it is.

    Called bare, such a model makes all logits, and generates without a cache. One whose logits are not those of
    `TransformersModel` stays bare all the same; it cannot be given packed rows, see `models.own_model.whole_logits`.

    Args:
        model: Model of the user.
    """
    return TransformersModel(model) if is_of_transformers(model) and not unsupported(model) else model


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether it is a model of ``transformers``, or one in a ``PeftModel``; then they are imported already."""
    kinds = [
        (sys.modules.get(name), kind) for name, kind in (("transformers", "PreTrainedModel"), ("peft", "PeftModel"))
    ]
    return any(module is not None and isinstance(model, getattr(module, kind)) for module, kind in kinds)


def _without_wrapper(model: nn.Module) -> nn.Module:
    """Return the model that ``peft`` has put its adapters into."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _decoder(model: nn.Module) -> Any:
    """Return the part that turns ids into hidden states. Classes that misname it (Llama 4) are their own base model."""
    inner: Any = _without_wrapper(model)
    base = inner.base_model
    return inner.model if base is inner else base


def _text_config(model: Any) -> Any:
    """Return the config of the language model, which models of images and text (Gemma 4) have inside theirs."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@remembered
def _cache_keyword(forward: Callable[..., Any]) -> str:
    """Return the name under which the forward of a class takes its cache: it differs between releases."""
    parameters = inspect.signature(forward).parameters
    name = next((name for name in ("cache", "past_key_values", "cache_params") if name in parameters), None)
    if name is None:
        raise ConfigurationError(
            f"{forward.__qualname__} takes no key-value cache ({', '.join(parameters)}). Generate without a cache: "
            "lightning_lm.generation.TransformersGenerator."
        )
    return name


def _logit_scale(config: Any) -> float | None:
    """Return the factor of the logits, ``None`` where it is not known."""
    kind = str(getattr(config, "model_type", ""))
    for families, sign in ((_MULTIPLIES, 1), (_DIVIDES, -1)):
        for family, name in families.items():
            if kind.startswith(family):
                return float(getattr(config, name, None) or 1.0) ** sign
    return 1.0 if all(getattr(config, name, None) in (None, 1, 1.0) for name in _SCALES_LOGITS) else None


def _check_supported(model: nn.Module) -> None:
    reason = unsupported(model)
    if reason is not None:
        raise ConfigurationError(f"{type(model).__name__} {reason}")


def unsupported(model: nn.Module) -> str | None:
    """Return why a model cannot be a `TransformersModel`; ``None`` if it can."""
    config = getattr(model, "config", None)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    layer = getattr(head, "base_layer", getattr(head, "original_module", head))  # below adapters
    if config is None or not isinstance(layer, nn.Linear) or getattr(config, "is_encoder_decoder", False):
        return (
            "is not a causal language model of transformers with a linear head; give what "
            "AutoModelForCausalLM.from_pretrained returns."
        )
    if any(getattr(part, "is_prompt_learning", False) for part in getattr(model, "peft_config", {}).values()):
        return "has learned prompts of peft, which stand before every row. Use adapters such as LoraConfig."
    between = _between(model, head, layer)
    if between:
        return (
            f"has more than a linear head behind its decoder ({', '.join(between[:3])}), and losses are computed from "
            "the decoder's hidden states and the head's weight. Give a model whose logits are head(hidden)."
        )
    config = _text_config(model)
    scale = _logit_scale(config)
    if scale is None or (scale != 1.0 and head.bias is not None):
        scaled = {name: getattr(config, name) for name in _SCALES_LOGITS if getattr(config, name, None) is not None}
        return (
            f"scales its logits in a way that is not known here ({scaled}); only models whose logits are "
            "soft-cap(scale * head(hidden)) can be used. Fold the factor into the weight of the head."
        )
    return None


def _between(model: Any, head: nn.Module, layer: nn.Linear) -> list[str]:
    """Return the names of parameters that act behind the decoder, apart from those of a linear head."""
    known = {*_decoder(model).parameters(), layer.weight, layer.bias}
    if head is not layer:  # with adapters
        known |= {*head.parameters()}
    return [name for name, value in _without_wrapper(model).named_parameters() if value not in known]


def _restarting_positions(
    document_ids: Int[Tensor, "batch seq"], position_ids: Int[Tensor, "batch seq"] | None
) -> Int[Tensor, "batch seq"]:
    """Return positions that count from 0 in each document, which is how transformers is told of documents."""
    columns = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    restarting = columns - torch.where(starts, columns, 0).cummax(dim=1).values
    if position_ids is not None and not torch.equal(position_ids, restarting):
        raise ConfigurationError(
            "transformers tells documents apart by positions that restart at 0 in each; these position_ids do not. "
            "Leave position_ids out, or load the model with lightning_lm.models.load_huggingface."
        )
    return restarting
