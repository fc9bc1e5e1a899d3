"""Let any causal language model of ``transformers`` stand where one of ours can."""

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import cache as remembered
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.models.packed_rows import ONE_PER_ROW, keeps_documents_apart, several_documents
from lightning_lm.models.saved_transformers import TransformersConfig
from lightning_lm.models.transformer import Transformer
from lightning_lm.models.transformers_cache import TransformersCache

__all__ = [
    "TransformersCache",
    "TransformersModel",
    "accepted_inputs",
    "as_language_model",
    "mixed_documents",
    "whole_logits",
]

_SCALES_LOGITS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
_MULTIPLIES = {"cohere": "logit_scale", "falcon_h1": "lm_head_multiplier", "hyperclovax": "logits_scaling"}
_DIVIDES = {"granite": "logits_scaling"}
"""Families by the beginning of their ``model_type``, and what they scale logits with."""
_TRIED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of users that were given packed rows."""


class TransformersModel(nn.Module):
    """A ``transformers`` causal language model that meets `lightning_lm.protocols.LanguageModel`.

    Packed rows are handled by ``transformers`` itself, which keeps the documents of most models apart if positions
    restart. Not of all (GPT-OSS, Qwen3-Next, Mamba, OPT), so a trial precedes the first batch with documents, and rows
    of several documents are refused if it fails. If a model scales its logits (Granite, Cohere) its hidden states are
    scaled instead: the same for a head without a bias.

    Args:
        model: For example ``AutoModelForCausalLM.from_pretrained(...)``, bare or with adapters in a ``PeftModel``.

    Raises:
        ConfigurationError: If the model is not a decoder whose logits are ``soft-cap(scale * head(hidden))``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _check_supported(model)
        self.model = model
        self.logit_softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._scale = _logit_scale(model.config) or 1.0
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
            positions, mask = cache.columns(input_ids.shape[1])
            position_ids = positions if position_ids is None else position_ids
        elif document_ids is not None:
            position_ids = _restarting_positions(document_ids, position_ids)
            self._require_apart(input_ids, document_ids)
        elif position_ids is not None:
            # Without a mask transformers would read a jump in the positions as the border of a document.
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        hidden = self._decode(input_ids, position_ids, mask, cache)
        return hidden if self._scale == 1.0 else hidden * self._scale

    def _decode(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        mask: Tensor | None = None,
        cache: TransformersCache | None = None,
    ) -> Tensor:
        base: Any = _without_wrapper(self.model).base_model
        caching = {} if cache is None else {_cache_keyword(type(base).forward): cache.past}
        output = base(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            use_cache=cache is not None,
            **caching,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _require_apart(self, input_ids: Tensor, document_ids: Tensor) -> None:
        """Refuse rows of several documents if one can be seen from another; tried once."""
        if torch.compiler.is_compiling():
            return
        if self._keeps_apart is None:
            self._keeps_apart = keeps_documents_apart(
                self,
                lambda inputs: self._decode(inputs["input_ids"], inputs["position_ids"]),
                num_ids=self.head.weight.shape[0],
                device=input_ids.device,
            )
        if not self._keeps_apart and several_documents(input_ids, document_ids):
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
    `TransformersModel` stays bare all the same; it cannot be given packed rows, see `whole_logits`.

    Args:
        model: Model of the user.
    """
    return TransformersModel(model) if _is_of_transformers(model) and not _unsupported(model) else model


def whole_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch seq vocab"]:
    """Return the logits of a model that has no `hidden` and `head`.

    Args:
        model: Returns logits, an object that has them as ``logits``, or a tuple that begins with them.
        inputs: ``input_ids``, and what else its forward may take: ``position_ids``, ``document_ids``.

    Raises:
        ConfigurationError: If rows of several documents are given to a bare model of ``transformers``, which would
            ignore the borders between them; or if the logits are not those of every token.
    """
    ids, documents = inputs["input_ids"], inputs.get("document_ids")
    if documents is not None and _is_of_transformers(model):
        if several_documents(ids, documents):
            raise ConfigurationError(
                f"The rows hold packed documents, and {type(model).__name__} cannot be told to keep them apart: it "
                f"{_unsupported(model)} {ONE_PER_ROW}"
            )
        inputs = {name: value for name, value in inputs.items() if name != "document_ids"}
    given = accepted_inputs(model, inputs)
    output = model(**given) if _takes_keyword(model, "input_ids") else model(given.pop("input_ids"), **given)
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    if _is_of_transformers(model):
        logits = logits[:, -ids.shape[1] :]  # learned prompts of peft stand before the row
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigurationError(
            f"{type(model).__name__}.forward returned {found} for input_ids of shape {tuple(ids.shape)}; return the "
            "logits of every token, [batch, seq, vocab]."
        )
    return logits


def accepted_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``input_ids`` and those of the other inputs that the forward of a model takes.

    Warns at the first packed rows that a user's own model is given, if it does not keep their documents apart.

    Args:
        model: Any; one with `hidden` and `head` is asked for what `hidden` takes.
        inputs: ``input_ids``, ``position_ids``, ``document_ids``.
    """
    if isinstance(model, Transformer | TransformersModel):
        return dict(inputs)
    ids, documents = inputs["input_ids"], inputs.get("document_ids")
    if documents is not None and model not in _TRIED and several_documents(ids, documents):
        how = mixed_documents(model, inputs)
        if how is not None:
            warnings.warn(
                f"The rows hold packed documents, and {type(model).__name__} {how}. {ONE_PER_ROW}", stacklevel=2
            )
    return {name: value for name, value in inputs.items() if name == "input_ids" or _takes_keyword(model, name)}


def mixed_documents(model: nn.Module, inputs: Mapping[str, Tensor]) -> str | None:
    """Return how a user's own model mixes the documents of packed rows; ``None`` if it keeps them apart.

    Args:
        model: Not of ``transformers``: those are tried by `TransformersModel`.
        inputs: Rows of several documents.
    """
    _TRIED.add(model)
    lost = [name for name in ("document_ids", "position_ids") if not _takes_keyword(model, name)]
    if "document_ids" in lost:
        return f"does not take {' and '.join(lost)}, so tokens see the earlier documents of their row"

    def run(inputs: dict[str, Tensor]) -> Tensor:
        language_model: Any = model
        if _has_hidden(model):
            return cast(Tensor, language_model.hidden(**accepted_inputs(model, inputs)))
        return whole_logits(model, inputs)

    ids = inputs["input_ids"]
    apart = keeps_documents_apart(model, run, num_ids=int(ids.max()) + 1, device=ids.device)
    return None if apart else "takes document_ids, but a document after another gets other logits than alone"


def _has_hidden(model: nn.Module) -> bool:
    return hasattr(model, "hidden") and hasattr(model, "head")


def _takes_keyword(model: nn.Module, name: str) -> bool:
    """Return whether a model's `hidden`, or its forward if it has none, takes an argument by this name."""
    inner: Any = getattr(model, "_orig_mod", model)  # the wrapper of torch.compile takes anything
    function = inner.hidden if _has_hidden(inner) else inner.forward
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.name == name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL):
        return True
    # Where ids have another name they are the first argument, whatever else may be given by name.
    by_place = any(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) for parameter in parameters
    )
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return any_name and not (name == "input_ids" and by_place)


def _is_of_transformers(model: nn.Module) -> bool:
    """Return whether it is a model of ``transformers``, or one in a ``PeftModel``; then they are imported already."""
    kinds = [
        (sys.modules.get(name), kind) for name, kind in (("transformers", "PreTrainedModel"), ("peft", "PeftModel"))
    ]
    return any(module is not None and isinstance(model, getattr(module, kind)) for module, kind in kinds)


def _without_wrapper(model: nn.Module) -> nn.Module:
    """Return the model that ``peft`` has put its adapters into."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


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
    reason = _unsupported(model)
    if reason is not None:
        raise ConfigurationError(f"{type(model).__name__} {reason}")


def _unsupported(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if config is None or not isinstance(head, nn.Linear) or getattr(config, "is_encoder_decoder", False):
        return (
            "is not a causal language model of transformers with a linear head; give what "
            "AutoModelForCausalLM.from_pretrained returns."
        )
    if any(getattr(part, "is_prompt_learning", False) for part in getattr(model, "peft_config", {}).values()):
        return "has learned prompts of peft, which stand before every row. Use adapters such as LoraConfig."
    scale = _logit_scale(config)
    if scale is None or (scale != 1.0 and head.bias is not None):
        scaled = {name: getattr(config, name) for name in _SCALES_LOGITS if getattr(config, name, None) is not None}
        return (
            f"scales its logits in a way that is not known here ({scaled}); only models whose logits are "
            "soft-cap(scale * head(hidden)) can be used. Fold the factor into the weight of the head."
        )
    return None


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
