"""Reward models in the format of Hugging Face: folders that ``AutoModelForSequenceClassification`` opens, both ways.

``transformers`` reads the score at a row's last token that is not the padding token. A padding token that also ends
texts would hide them, so it is written only if it is another one; without it ``transformers`` takes one row at a time.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import CheckpointError, ConfigurationError, MissingDependencyError
from lightning_lm.models import TransformersModel, export_model
from lightning_lm.models.huggingface.folder import known_by
from lightning_lm.models.huggingface.weights import StoredTensor, read_json, read_tensors, write_json, write_tensors
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import DIGESTS, filling

__all__ = ["PublishedRewardModel", "export_reward_model", "read_backbone"]

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_KIND = "ForSequenceClassification"


class PublishedRewardModel(nn.Module):
    """A sequence classifier of ``transformers`` with one label, whose logit is the reward.

    Args:
        folder: Holds its ``config.json`` and safetensors.

    Raises:
        CheckpointError: If it is another kind of model, or cannot be read.
        MissingDependencyError: If ``transformers`` is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise MissingDependencyError("transformers", "read a published reward model", "hf") from error
        _require_classifier(Path(folder))
        factory: Any = transformers.AutoModelForSequenceClassification
        try:
            model = factory.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"transformers cannot read the model in {folder}: {error}") from error
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or len(score.weight) != 1:
            raise CheckpointError(
                f"{folder} holds a {type(model).__name__} with {model.config.num_labels} labels; a reward model gives "
                "one number per text, from a linear layer called score."
            )
        self.body, self.score, self.config = model.base_model, score, model.config

    def forward(self, input_ids: Int[Tensor, "rows seq"], lengths: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return the reward of each row, read at its last token, in float32.

        Args:
            input_ids: Prompts with answers, padded on the right.
            lengths: Tokens of each row, without padding.
        """
        mask = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
        hidden = self.body(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        rows = torch.arange(len(lengths), device=lengths.device)
        scores: Tensor = self.score(hidden[rows, lengths.clamp(min=1) - 1])
        return scores[:, 0].float()


def _require_classifier(folder: Path) -> None:
    named = [str(name) for name in read_json(folder / "config.json").get("architectures") or ()]
    if not any(name.endswith(_KIND) for name in named):
        raise CheckpointError(
            f"{folder} holds {', '.join(named) or 'an unnamed model'}, and a reward model is a ...{_KIND} with one "
            "label. Train one with RewardModule, or name another folder."
        )


def read_backbone(folder: Path) -> tuple[TransformersModel, Tensor]:
    """Return the language model below a published reward model, and the weight of the reward's linear layer.

    The output layer of the language model is not in the folder; it is new, and a reward model does not use it.

    Args:
        folder: Holds the ``config.json`` and safetensors of a sequence classifier with one label.

    Raises:
        CheckpointError: If it is another kind of model, or cannot be read.
        MissingDependencyError: If ``transformers`` is not installed.
    """
    _require_classifier(folder)
    score = dict(read_tensors(folder)).get("score.weight")
    if score is None or len(score) != 1:
        found = "no tensor score.weight" if score is None else f"{len(score)} labels"
        raise CheckpointError(f"{folder} has {found}; a reward model gives one number per text, by its layer score.")
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("transformers", "read a published reward model", "hf") from error
    factory: Any = transformers.AutoModelForCausalLM
    try:
        model = factory.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot read the model in {folder}: {error}") from error
    backbone = TransformersModel(model.train())
    return backbone, score.float() / backbone._scale


def export_reward_model(
    backbone: nn.Module,
    score: nn.Linear,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
) -> None:
    """Write a reward model so that ``AutoModelForSequenceClassification.from_pretrained`` gives the same scores.

    Args:
        backbone: The language model of a `RewardModel`; adapters are merged already.
        score: Its output layer.
        folder: Created if needed; each file in it is replaced whole.
        tokenizer: That of the model.
        dtype: That of the weights in the files; ``None`` for the model's own.
        family: The ``model_type`` to write a `models.Transformer` as; ``None`` for the first that can express it.

    Raises:
        ConfigurationError: If no family, or no classifier of ``transformers``, can express it.
    """
    with tempfile.TemporaryDirectory() as place, filling(Path(folder), known_by=known_by(tokenizer)) as fresh:
        body = Path(place)
        export_model(backbone, body, tokenizer, dtype=dtype, family=family)
        config = {**read_json(body / "config.json"), "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        config["architectures"] = [_classifier(str(name), backbone) for name in config["architectures"]]
        tensors = dict(read_tensors(body))
        tensors.pop("lm_head.weight", None)
        for path in body.iterdir():  # tokenizer and generation settings
            if path.name not in ("config.json", DIGESTS) and ".safetensors" not in path.name:
                shutil.copyfile(path, fresh / path.name)
        kind = next(iter(tensors.values())).dtype
        scale = backbone._scale if isinstance(backbone, TransformersModel) else 1.0
        tensors["score.weight"] = (score.weight.detach().float() * scale).to("cpu", kind)
        stored = [StoredTensor(name, value.nbytes, partial(value.clone)) for name, value in tensors.items()]
        write_tensors(fresh, stored, max_shard_bytes=5_000_000_000)
        write_json(fresh / "config.json", {**config, "pad_token_id": _pad_id(config)})


def _classifier(architecture: str, backbone: nn.Module) -> str:
    name = architecture
    for end in _CAUSAL:
        name = name.removesuffix(end)
    if isinstance(backbone, TransformersModel):
        import transformers

        if not hasattr(transformers, name + _KIND):
            raise ConfigurationError(
                f"transformers {transformers.__version__} has no {name}{_KIND}, so this reward model has no form that "
                "it opens. Use the checkpoint: load_reward_model, or LearnedReward(checkpoint=...)."
            )
    return name + _KIND


def _pad_id(config: dict[str, Any]) -> int | None:
    ends = config.get("eos_token_id")
    pad = config.get("pad_token_id")
    return None if pad in (ends if isinstance(ends, list) else [ends]) else pad
