"""Low-rank adapters in the format of ``peft``: ``adapter_config.json`` and ``adapter_model.safetensors``, both ways.

The files name modules as ``transformers`` does. Those of a `Transformer` are found through the family that it is
exported as. GPT-2 has queries, keys and values in one matrix: three adapters are written as one with a block-diagonal
``B``, and one is read as three, each with the rows of ``A`` that it uses.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models.huggingface.config_json import config_to_huggingface
from lightning_lm.models.huggingface.families import FAMILIES
from lightning_lm.models.huggingface.peft_settings import require_plain, scale_of
from lightning_lm.models.huggingface.renames import Joined, Rename, renames_for
from lightning_lm.models.huggingface.transformers_model import TransformersModel
from lightning_lm.models.huggingface.weights import read_file, read_json, write_file, write_json
from lightning_lm.models.lora import AdapterPart, attach_adapters, describe_adapters
from lightning_lm.models.transformer import Transformer
from lightning_lm.parts import Limit
from lightning_lm.storage import filling

__all__ = ["PretrainedAdapters", "adapter_base", "is_adapter_folder", "save_adapters"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_ROOT = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(\.weight)?")
"""Initial values of adapters that leave the weights below them as they are."""


@dataclass(frozen=True, kw_only=True)
class PretrainedAdapters(AdapterPart, limits={"dropout": Limit.BELOW_ONE}):
    """Adapters that ``peft`` or `save_adapters` has written, to be trained on or merged.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        dropout: Probability with which a feature that an adapter reads is dropped in training; ``None`` for that of
            the folder.
    """

    folder: str = field(kw_only=False)
    dropout: float | None = None

    def attach(self, model: nn.Module) -> None:
        """Put the adapters on a model, in place, and freeze everything else.

        Args:
            model: The one that they were trained on: a `Transformer`, or a model of ``transformers``.

        Raises:
            CheckpointError: If files are missing or broken, or the adapters are those of another model.
            ConfigurationError: If they are more than low-rank adapters.
            MissingDependencyError: If ``peft`` is not installed.
        """
        folder = Path(self.folder)
        settings = read_json(folder / _CONFIG)
        require_plain(settings, str(folder))
        names = {entry.theirs: entry for entry in _renames(_bare(model), None)}
        parts = _parts_of(folder, settings, names, dict(_bare(model).named_parameters(remove_duplicate=False)))
        prefix = "" if _bare(model) is model else "model."
        ranks = {prefix + name: factors.rank for name, factors in parts.adapted.items()}
        stable = bool(settings.get("use_rslora"))
        attach_adapters(
            model,
            {
                "r": max(ranks.values(), default=1),
                "lora_dropout": settings.get("lora_dropout", 0.0) if self.dropout is None else self.dropout,
                "use_rslora": stable,
                "fan_in_fan_out": bool(settings.get("fan_in_fan_out")) and not isinstance(model, Transformer),
                "target_modules": list(ranks),
                "rank_pattern": ranks,
                "alpha_pattern": {prefix + name: factors.alpha(stable) for name, factors in parts.adapted.items()},
                "modules_to_save": [prefix + name for name in parts.trained] or None,
            },
        )
        parts.load_into(_bare(model))


def save_adapters(
    model: nn.Module,
    folder: str | Path,
    *,
    base: str | None = None,
    family: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapters of a model so that ``peft.PeftModel.from_pretrained`` puts them on its exported base model.

    Args:
        model: A `Transformer` or a model of ``transformers``, with the adapters on.
        folder: Created if needed; each file in it is replaced whole.
        base: Folder or name of the model without adapters, written as ``base_model_name_or_path``.
        family: The ``model_type`` that a `Transformer` is exported as; ``None`` for the first that can express it.
        dtype: That of the weights in the file; ``None`` for their own.

    Raises:
        ConfigurationError: If the model has no adapters, other ones than LoRA, or no family can express it.
    """
    bare = _bare(model)
    settings = describe_adapters(model) or describe_adapters(getattr(model, "model", model))
    if settings is None:
        raise ConfigurationError(f"This {type(bare).__name__} has no adapters. Write the model with export_model.")
    require_plain(settings, "The model")
    entries = _renames(bare, family)
    stable = bool(settings.get("use_rslora"))
    adapted, whole = _joined(bare, entries)
    rank, alpha = (
        Counter(values).most_common(1)[0][0] if values else 1
        for values in ([f.rank for f in adapted.values()], [f.alpha(stable) for f in adapted.values()])
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": settings.get("lora_dropout", 0.0),
        "use_rslora": stable,
        "target_modules": _shortest(list(adapted), [entry.theirs.rpartition(".")[0] for entry in entries]),
        "rank_pattern": {name: factors.rank for name, factors in adapted.items() if factors.rank != rank},
        "alpha_pattern": {name: f.alpha(stable) for name, f in adapted.items() if f.alpha(stable) != alpha},
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
        "fan_in_fan_out": any(entry.transposed for entry in entries) or bool(settings.get("fan_in_fan_out")),
        "bias": "none",
        "inference_mode": True,
    }
    with filling(Path(folder), known_by=(_CONFIG,)) as fresh:
        write_file(fresh / _WEIGHTS, {name: value.to(dtype) for name, value in _tensors(adapted, whole)})
        write_json(fresh / _CONFIG, config)


def is_adapter_folder(folder: str | Path) -> bool:
    """Tell whether a folder has adapters of ``peft`` and no whole model.

    Args:
        folder: To look into.
    """
    return (Path(folder) / _CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def adapter_base(folder: str | Path, base: str | Path | None = None) -> Path:
    """Return the folder of the model that a folder of adapters belongs to.

    Args:
        folder: Holds the adapters.
        base: The model's folder; ``None`` for the one that the adapters name.

    Raises:
        CheckpointError: If there is no such folder.
    """
    named = base or read_json(Path(folder) / _CONFIG).get("base_model_name_or_path")
    for path in () if named is None else (Path(named), Path(folder) / named):
        if path.is_dir():
            return path
    download = "" if base or not named else f" (one of the Hub: hf download {named} --local-dir FOLDER)"
    raise CheckpointError(
        f"{folder} holds adapters of the model {str(named)!r}, and there is no such folder{download}. Name it: "
        "--base FOLDER, or --model.model.base FOLDER where a run starts from it."
    )


@dataclass(frozen=True)
class _Factors:
    """The update ``scale * B A`` of a matrix [out, in]; of an embedding, of its transpose."""

    a: Tensor
    b: Tensor
    scale: float
    embeds: bool = False

    @property
    def rank(self) -> int:
        return len(self.a)

    def alpha(self, stable: bool) -> int | float:
        alpha = self.scale * (math.sqrt(self.rank) if stable else self.rank)
        return round(alpha) if math.isclose(alpha, round(alpha)) else alpha


@dataclass(frozen=True)
class _Parts:
    """The content of a folder by the names of the model that it goes to.

    Args:
        adapted: By module.
        whole: Parameters that are no adapters.
        trained: Modules among them that are trained; others stand in for weights of the base model.
    """

    adapted: Mapping[str, _Factors]
    whole: Mapping[str, Tensor]
    trained: Sequence[str]

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for name, factors in self.adapted.items():
            for mine, read in zip(_layer_factors(modules[name]), (factors.a, factors.b), strict=True):
                mine.copy_(read)
        for name, value in self.whole.items():
            module, _, kind = name.rpartition(".")
            owner: Any = modules[module]
            owner = owner.modules_to_save["default"] if module in self.trained else getattr(owner, "base_layer", owner)
            getattr(owner, kind).copy_(value)


def _parts_of(
    folder: Path, settings: Mapping[str, Any], names: Mapping[str, Rename], weights: Mapping[str, Tensor]
) -> _Parts:
    """Read the tensors of a folder, and give them the names of the model.

    Raises:
        CheckpointError: If the model has no such modules, or of another shape.
    """
    if not (folder / _WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} has no {_WEIGHTS}. Pickles (adapter_model.bin) are not read: open them with peft once, and "
            "save_pretrained writes safetensors."
        )
    tensors = {name.removeprefix(_ROOT): tensor for name, tensor in read_file(folder / _WEIGHTS)}
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    adapted, trained = {}, {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is not None:
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
            continue
        entry = _known(names, _plain_name(name), folder)
        whole.update(zip(entry.ours, entry.split(tensor, [weights[ours].shape for ours in entry.ours]), strict=True))
        if any(entry.theirs.rpartition(".")[0].endswith(saved) for saved in settings.get("modules_to_save") or ()):
            trained.update(dict.fromkeys(ours.rpartition(".")[0] for ours in entry.ours))
    for module, pair in factors.items():
        entry = _known(names, f"{module}.weight", folder)
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{folder} has only one factor of the adapter of {module}; save it again.")
        scale = scale_of(settings, module, len(pair["A"]))
        unused = ~pair["B"].any(0)
        widths = [len(weights[ours]) for ours in entry.ours]
        for ours, piece in zip(entry.ours, entry.layout.split(pair["B"], widths), strict=True):
            mine = piece.any(0) | unused  # what only other blocks use belongs to them
            if mine.any():
                adapted[ours.rpartition(".")[0]] = _Factors(pair["A"][mine], piece[:, mine], scale)
    return _Parts(adapted, whole, list(trained))


def _known(names: Mapping[str, Rename], name: str, folder: Path) -> Rename:
    if name not in names:
        raise CheckpointError(f"{folder} has adapters of another model: there is no {name} here. Name the right one.")
    return names[name]


def _joined(model: nn.Module, entries: Sequence[Rename]) -> tuple[dict[str, _Factors], dict[str, Tensor]]:
    """Return a model's adapters by module, and the parameters that are trained whole, under the names of the files."""
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    every = dict(model.named_parameters(remove_duplicate=False))
    base = {_plain_name(name): value.detach() for name, value in every.items()}
    trained = {_saved_name(name): value.detach() for name, value in every.items() if ".modules_to_save." in name}
    adapted: dict[str, _Factors] = {}
    whole: dict[str, Tensor] = {}
    for entry in entries:
        mine = [layers.get(name.rpartition(".")[0]) if name.endswith("weight") else None for name in entry.ours]
        saved = any(name in trained for name in entry.ours)
        if saved and any(layer is not None for layer in mine):
            raise ConfigurationError(
                f"{entry.theirs} has parts with an adapter and parts that are trained whole, which peft cannot say. "
                "Export the model with its adapters merged."
            )
        if saved:
            whole[entry.theirs] = entry.join([trained.get(name, base[name]) for name in entry.ours])
        elif any(layer is not None for layer in mine):
            widths = [len(base[name]) for name in entry.ours]
            adapted[entry.theirs.rpartition(".")[0]] = _block_diagonal(mine, widths, entry.layout)
    return adapted, whole


def _block_diagonal(layers: Sequence[Any], widths: list[int], layout: Joined) -> _Factors:
    """Return one adapter for matrices that theirs holds together, of which some have none."""
    known = [layer for layer in layers if layer is not None]
    scales = [layer.scaling[layer.active_adapters[0]] for layer in known]
    embeds = not len(known[0].lora_A)
    if len(layers) == 1:
        return _Factors(*_layer_factors(known[0]), scales[0], embeds)
    blocks = []
    for layer, width in zip(layers, widths, strict=True):
        if layer is None:
            blocks.append(known[0].weight.new_zeros(width, 0))
        else:
            blocks.append(_layer_factors(layer)[1] * (layer.scaling[layer.active_adapters[0]] / scales[0]))
    rows = torch.block_diag(*blocks).split(widths)
    return _Factors(torch.cat([_layer_factors(layer)[0] for layer in known]), layout.join(rows), scales[0])


def _layer_factors(layer: Any) -> tuple[Tensor, Tensor]:
    name = layer.active_adapters[0]
    if name in layer.lora_A:
        return layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    return layer.lora_embedding_A[name].detach(), layer.lora_embedding_B[name].detach()


def _tensors(adapted: Mapping[str, _Factors], whole: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield what is written, under the names of ``peft``."""
    for name, factors in adapted.items():
        ends = ("lora_embedding_A", "lora_embedding_B") if factors.embeds else ("lora_A.weight", "lora_B.weight")
        yield f"{_ROOT}{name}.{ends[0]}", factors.a
        yield f"{_ROOT}{name}.{ends[1]}", factors.b
    for name, value in whole.items():
        yield f"{_ROOT}{name}", value


def _shortest(adapted: list[str], known: list[str]) -> list[str]:
    """Return the last parts of names where they mean no other module, as is usual, or the whole names."""
    ends = {name.rpartition(".")[-1] for name in adapted}
    return sorted(ends if {name for name in known if name.rpartition(".")[-1] in ends} <= set(adapted) else adapted)


def _renames(model: nn.Module, family: str | None) -> list[Rename]:
    """Return the names of a model's parameters in files of ``transformers``, whatever adapters it has."""
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names = dict.fromkeys(
        _plain_name(name) for name in every if ".lora_" not in name and ".modules_to_save" not in name
    )
    if not isinstance(model, Transformer):
        return [Rename(name, (name,)) for name in names]
    kind = config_to_huggingface(model.config, family=family)["model_type"]
    return renames_for(FAMILIES[kind].names_for(model.config), names, model.config.num_layers)


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "").replace(".original_module", "")


def _saved_name(name: str) -> str:
    return re.sub(r"\.modules_to_save\.[^.]+", "", name)


def _bare(model: Any) -> nn.Module:
    inner: nn.Module = model.model if isinstance(model, TransformersModel) else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # type: ignore[operator]
