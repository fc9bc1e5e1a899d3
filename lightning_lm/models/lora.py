"""Low-rank adapters of ``peft``: put on a model, described in checkpoints, merged into the weights."""

import abc
import copy
import dataclasses
import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.models.roles import parameter_roles
from lightning_lm.models.transformer import TransformerConfig
from lightning_lm.parts import Limit, Part
from lightning_lm.protocols import is_language_model

__all__ = [
    "AdapterPart",
    "Adapters",
    "attach_adapters",
    "default_adapters",
    "describe_adapters",
    "merge_adapters",
    "remove_adapters",
    "require_same_adapters",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterPart(Part, abc.ABC):
    """Base of the adapters that YAML can name: new ones, or those of a folder."""

    @abc.abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Put the adapters on a model, in place, and freeze everything else.

        Args:
            model: Has none yet.
        """

    def differences(self, model: nn.Module) -> list[str]:  # noqa: ARG002
        """Return the settings in which the adapters that a model has already differ from these.

        Args:
            model: Has adapters of ``peft``.
        """
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters(AdapterPart, limits={"rank": Limit.COUNT, "alpha": Limit.POSITIVE, "dropout": Limit.BELOW_ONE}):
    """Low-rank adapters: each matched matrix becomes ``W + (alpha / rank) B A``, with ``B`` zero at first.

    Args:
        rank: Rows of ``A``.
        alpha: Scale of the adapter, divided by the rank (by its root with ``rank_stabilized``). Unitless.
        dropout: Probability with which a feature that the adapter reads is dropped in training.
        targets: Names, or ends of names, of linear layers; empty for every one whose role is ``matrix``.
        trained: Names of modules that are trained whole beside the adapters, for example a new output layer.
        rank_stabilized: Divide ``alpha`` by the root of the rank, so that high ranks learn as fast.

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    rank_stabilized: bool = False

    def attach(self, model: nn.Module) -> None:
        """Put adapters on a model, in place, and freeze everything else.

        Args:
            model: Its matrices are `torch.nn.Linear`, or another kind that ``peft`` knows.

        Raises:
            ConfigurationError: If a name matches no module, or a module that cannot have an adapter.
            MissingDependencyError: If ``peft`` is not installed.
        """
        for argument, names in (("targets", self.targets), ("trained", self.trained)):
            _require_modules(model, argument, names)
        settings = {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets) or _matrices(model),
            "modules_to_save": list(self.trained) or None,
            "use_rslora": self.rank_stabilized,
        }
        attach_adapters(model, settings)

    def differences(self, model: nn.Module) -> list[str]:
        """Return the settings in which the adapters that a model has already differ from these.

        Args:
            model: Has adapters of ``peft``.
        """
        (settings,) = _settings(model).values()
        names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rank_stabilized": "use_rslora"}
        present = {name: getattr(settings, theirs, None) for name, theirs in names.items()}
        differing = [f"{name}={value}" for name, value in present.items() if value != getattr(self, name)]
        parts = dict(model.named_modules())
        kinds = {name: {base.__name__ for base in type(part).__mro__} for name, part in parts.items()}
        adapted = {name for name in parts if "BaseTunerLayer" in kinds[name]}
        trained = {name for name in parts if "ModulesToSaveWrapper" in kinds[name]}
        matrices = {name.removesuffix(".base_layer") for name in _matrices(model) if ".lora_" not in name}
        wanted = {name for name in parts if _named(name, self.targets)} if self.targets else matrices - trained
        if adapted != wanted & (adapted | set(_linear_layers(model))):
            differing.append(f"targets={tuple(sorted({name.rpartition('.')[-1] for name in adapted}))}")
        if trained != {name for name in parts if _named(name, self.trained)}:
            differing.append(f"trained={tuple(sorted(trained))}")
        return differing


def require_same_adapters(model: nn.Module, adapters: AdapterPart) -> bool:
    """Return whether a model has adapters, and refuse those that are not the wanted ones.

    Args:
        model: Model to train.
        adapters: Adapters that it is to have.

    Raises:
        ConfigurationError: If it has others.
    """
    settings = _settings(model)
    if not settings:
        return False
    kinds = [f"{name} ({part.peft_type.rpartition('.')[-1]})" for name, part in settings.items()]
    other = len(settings) > 1 or any("LORA" not in kind for kind in kinds)
    differing = [f"the adapters {', '.join(kinds)}"] if other else adapters.differences(model)
    if differing:
        raise ConfigurationError(
            f"The model that LoRA({adapters}) would put adapters on has some already (a PeftModel, or a module of a "
            f"checkpoint), with {', '.join(differing)}. To train those, remove LoRA from the callbacks; to train new "
            "ones instead, give the model with the old ones merged: peft_model.merge_and_unload()."
        )
    return True


def _settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a model's adapters by their name, wherever ``peft`` has left them."""
    adapted = any(base.__name__ == "BaseTunerLayer" for part in model.modules() for base in type(part).__mro__)
    settings = (dict(found) for part in model.modules() if (found := getattr(part, "peft_config", None)))
    return next(settings, {}) if adapted else {}  # merged adapters leave settings behind


def attach_adapters(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Put adapters on a model, in place, and freeze everything else.

    Args:
        model: Has none yet.
        description: The fields of a ``peft`` ``LoraConfig``, as in an ``adapter_config.json``, or `Adapters.to_dict`.

    Raises:
        ConfigurationError: If they fit no module of the model.
        MissingDependencyError: If ``peft`` is not installed.
    """
    if "part" in description:
        AdapterPart.from_dict(description).attach(model)
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.utils.other import ModulesToSaveWrapper
    except ImportError as error:
        raise MissingDependencyError("peft", "train low-rank adapters", "hf") from error
    if description.get("peft_type", "LORA") != "LORA":
        raise ConfigurationError(
            f"Adapters of the kind {description['peft_type']!r} are not supported; only LORA is. Merge them first: "
            "peft.PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(folder)."
        )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    settings = LoraConfig(**{name: value for name, value in description.items() if name in known})
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise ConfigurationError(
            f"No adapter was put on targets={settings.target_modules}: {error} Linear layers here: "
            f"{', '.join(_linear_layers(model)[:8])}."
        ) from error
    for name, child in list(model.named_modules()):  # peft takes "norm" for the end of "mixer_norm" too
        if isinstance(child, ModulesToSaveWrapper) and not _named(name, settings.modules_to_save or ()):
            model.set_submodule(name, child.original_module)
    score: Any = getattr(model, "score", None)
    if isinstance(score, nn.Linear):
        score.requires_grad_(True)  # that of a reward model is new
    _check_output_layer(model, settings.lora_dropout)
    model.train(model.training)  # the new modules begin in the mode of the model


def describe_adapters(model: nn.Module) -> dict[str, Any] | None:
    """Return the adapters of a model as plain data for `attach_adapters`; ``None`` if it has none.

    Args:
        model: Any model.
    """
    settings = getattr(model, "peft_config", None)
    if not settings:
        return None
    (adapter,) = settings.values() if len(settings) == 1 else (settings["default"],)
    described: dict[str, Any] = json.loads(json.dumps(adapter.to_dict(), default=sorted))
    return described


def default_adapters(model: Any) -> Any:
    """Return the settings of low-rank adapters of ``peft``, each module named as seen from a `TransformersModel`.

    Args:
        model: Any model.

    Returns:
        ``None`` if it has no adapters, or some of another kind or name, or several.
    """
    settings = getattr(model, "peft_config", {})
    if list(settings) != ["default"] or settings["default"].peft_type != "LORA":
        return None
    names: dict[str, set[str]] = {"BaseTunerLayer": set(), "ModulesToSaveWrapper": set()}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, part in inner.named_modules():
        for kind in {base.__name__ for base in type(part).__mro__} & names.keys():
            names[kind].add(f"model.{name}")
    if not names["BaseTunerLayer"]:
        return None  # they have been merged
    described = copy.copy(settings["default"])
    described.target_modules = names["BaseTunerLayer"]
    described.modules_to_save = sorted(names["ModulesToSaveWrapper"]) or None
    described.layers_to_transform = described.layers_pattern = described.exclude_modules = None
    return described


def merge_adapters(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which the adapters are part of the weights, and their modules are gone.

    An output layer or embedding that has been trained apart from the other is untied from it.

    Args:
        model: Has adapters of ``peft``. It stays as it is.

    Raises:
        MissingDependencyError: If ``peft`` is not installed.
    """
    return _without_adapters(model, merge=True)


def remove_adapters(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its adapters: the weights that they were put on.

    Args:
        model: Has adapters of ``peft``. It stays as it is.

    Raises:
        MissingDependencyError: If ``peft`` is not installed.
    """
    return _without_adapters(model, merge=False)


def _without_adapters(model: nn.Module, *, merge: bool) -> nn.Module:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper
    except ImportError as error:
        raise MissingDependencyError("peft", "merge low-rank adapters", "hf") from error
    plain = copy.deepcopy(model)
    shared = _shared_weights(plain)
    for name, child in list(plain.named_modules()):
        if isinstance(child, BaseTunerLayer):
            base: Any = child.get_base_layer()
            if merge:
                if id(base.weight) in shared:  # the delta belongs to this module, not to the other one
                    base.weight = nn.Parameter(base.weight.detach().clone())
                child.merge()
            plain.set_submodule(name, base)
        elif isinstance(child, ModulesToSaveWrapper):
            kept = child.modules_to_save[child.active_adapters[0]] if merge else child.original_module
            plain.set_submodule(name, kept)
    for part in plain.modules():  # peft leaves it on the model inside its own too
        part.__dict__.pop("peft_config", None)
    if shared - _shared_weights(plain):
        _declare_untied(plain)
    return plain.requires_grad_(True)


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that more than one module has."""
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {known for known, count in counts.items() if count > 1}


def _declare_untied(model: nn.Module) -> None:
    """Say in the model's config that output layer and embedding are two matrices."""
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if isinstance(config, TransformerConfig) and config.tie_embeddings:
            part.config = dataclasses.replace(config, tie_embeddings=False)  # type: ignore[assignment]
        elif getattr(config, "tie_word_embeddings", False):
            for settings in (config, config.get_text_config()):
                settings.tie_word_embeddings = False


def _require_modules(model: nn.Module, argument: str, names: Sequence[str]) -> None:
    """Refuse names that are the name, or the end of the name, of no module: ``peft`` would pass over them."""
    known = [name for name, _ in model.named_modules() if name]
    for wanted in names:
        if not any(_named(name, [wanted]) for name in known):
            ends = dict.fromkeys([*known, *(name.rpartition(".")[-1] for name in known)])
            near = difflib.get_close_matches(wanted, list(ends), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(
                f"{argument}={tuple(names)}: no module is called {wanted!r}.{hint} Linear layers here: "
                f"{', '.join(_linear_layers(model)[:8])}."
            )


def _named(name: str, wanted: Sequence[str]) -> bool:
    """Return True if one of these is a module's name or the end of it."""
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _check_output_layer(model: nn.Module, dropout: float) -> None:
    """Refuse dropout in an adapter of the output layer: losses read its weight and never call it."""
    if is_language_model(model) and dropout and hasattr(model.head, "lora_A"):
        raise ConfigurationError(
            f"dropout={dropout} cannot be applied before an adapter of the output layer, whose weight the losses read "
            "without calling it. Set dropout to 0, leave the output layer out of targets, or name it in trained."
        )


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]


def _matrices(model: nn.Module) -> list[str]:
    """Return the names of the linear layers whose role is ``matrix``."""
    roles = parameter_roles(model)
    return [name for name in _linear_layers(model) if roles.get(f"{name}.weight") == "matrix"]
