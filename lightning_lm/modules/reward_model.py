"""A language model that judges completions, and its use as a reward for reinforcement learning."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.data.post_training.chat import ChatTemplate, Plain, encode_pair
from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models import ModelConfig, TransformersModel, attach_adapters, merge_adapters
from lightning_lm.models.roles import with_role
from lightning_lm.models.unpadding import outputs_at
from lightning_lm.modules.checkpoint import ENTRY, check_weights, read_checkpoint, saved_adapters, tokenizer_of_folder
from lightning_lm.modules.reward_folder import PublishedRewardModel, read_backbone
from lightning_lm.parts import Limit
from lightning_lm.protocols import Tokenizer, is_language_model
from lightning_lm.rewards import Reward
from lightning_lm.storage import resolve_checkpoint
from lightning_lm.tokenizers import tokenizer_from_files

__all__ = ["LearnedReward", "ModelReward", "RewardCheckpoint", "RewardModel", "load_reward_model"]


class RewardModel(nn.Module):
    """A language model whose last features become one number per row.

    Args:
        backbone: Meets `protocols.LanguageModel`, or is a causal language model of ``transformers``. Its output layer
            is not used, and frozen unless it is tied to the embedding.

    Attributes:
        backbone: As given.
        score: The new output layer.
    """

    backbone: Any
    score: nn.Linear

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone if is_language_model(backbone) else TransformersModel(backbone)
        weight: Tensor = self.backbone.head.weight
        width = weight.shape[1]
        self.score = with_role(nn.Linear(width, 1, bias=False), "head").to(weight)
        nn.init.normal_(self.score.weight, std=(width + 1) ** -0.5)
        _freeze_unused(self.backbone)

    @property
    def description(self) -> Any:
        """The description that rebuilds the backbone without its weights, for checkpoints."""
        return getattr(self.backbone, "description", self.config)

    @property
    def config(self) -> Any:
        """The description of the backbone, if it has one."""
        return getattr(self.backbone, "config", None)

    def forward(self, input_ids: Int[Tensor, "rows seq"], lengths: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return the reward of each row, in float32.

        It is read at the row's last token, found by its length: ids of padding may be those of real tokens.

        Args:
            input_ids: Prompts with completions, padded on the right.
            lengths: Tokens of each row, without padding.
        """
        is_last = torch.arange(input_ids.shape[1], device=lengths.device) == lengths.clamp(min=1)[:, None] - 1
        last = outputs_at(self.backbone, {"input_ids": input_ids}, is_last)
        rewards: Tensor = (last.float() * self.score.weight.float()).sum(-1)
        return rewards

    def as_reward(
        self, tokenizer: Tokenizer, template: ChatTemplate = Plain(), *, batch_size: int = 64
    ) -> "ModelReward":
        """Return this model as a reward for reinforcement learning.

        Args:
            tokenizer: The one it was trained with.
            template: The one it was trained with.
            batch_size: Rows that are read at once.
        """
        return ModelReward(self, tokenizer, template, batch_size=batch_size)


def _freeze_unused(backbone: Any) -> None:
    """Freeze the output layer: parameters that never get a gradient make data-parallel training wait for ever."""
    embeddings = [module.weight for module in backbone.modules() if isinstance(module, nn.Embedding)]
    for parameter in backbone.head.parameters():
        if not any(parameter is weight for weight in embeddings):
            parameter.requires_grad_(False)


class ModelReward:
    """A reward model of the form of `protocols.RewardFunction`: texts in, rewards out.

    Args:
        model: Judges the completions.
        tokenizer: The one it was trained with; the policy may have another.
        template: The one it was trained with.
        batch_size: Rows that are read at once.
    """

    name = "reward_model"

    def __init__(
        self,
        model: RewardModel | PublishedRewardModel,
        tokenizer: Tokenizer,
        template: ChatTemplate = Plain(),
        *,
        batch_size: int = 64,
    ) -> None:
        self._model, self._tokenizer, self._template, self._batch_size = model, tokenizer, template, batch_size

    @torch.no_grad()
    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        """Return the reward of each completion, read as a finished completion to its prompt."""
        rows = [self._ids(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        was_training = self._model.training
        self._model.eval()
        rewards: list[float] = []
        for first in range(0, len(rows), self._batch_size):
            rewards += self._score(rows[first : first + self._batch_size])
        self._model.train(was_training)
        return rewards

    def _ids(self, prompt: Any, answer: Any) -> list[int]:
        limits = (getattr(self._model.config, name, None) for name in ("context_length", "max_position_embeddings"))
        longest = next(filter(None, limits), sys.maxsize)
        prompt_ids, answer_ids, _ = encode_pair(prompt, answer, self._tokenizer, self._template, longest)
        return [*prompt_ids, *answer_ids]

    def _score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        device = self._model.score.weight.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        ids = [torch.tensor(row, dtype=torch.int64, device=device) for row in rows]
        rewards: list[float] = self._model(nn.utils.rnn.pad_sequence(ids, batch_first=True), lengths).tolist()
        return rewards


@dataclass(frozen=True, kw_only=True)
class LearnedReward(Reward, limits={"batch_size": Limit.COUNT}):
    """The reward model of a checkpoint; loaded when it is first asked.

    Args:
        checkpoint: A ``.ckpt`` that a `RewardModule` wrote, or the folder of a published reward model.
        template: The one it was trained with.
        device: Device on which it scores.
        batch_size: Rows that are read at once.
    """

    checkpoint: str = field(kw_only=False)
    template: ChatTemplate = Plain()
    device: str = "cpu"
    batch_size: int = 64

    @cached_property
    def _reward(self) -> ModelReward:
        model, tokenizer = load_reward_model(self.checkpoint)
        model = model.to(self.device)
        if tokenizer is None:
            raise ConfigurationError(
                f"{self.checkpoint} carries no tokenizer. Load it with load_reward_model, and give "
                "model.as_reward(tokenizer) as the reward."
            )
        return ModelReward(model, tokenizer, self.template, batch_size=self.batch_size)

    def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """Return the reward of each completion, read as a finished completion to its prompt."""
        return self._reward(prompts=prompts, completions=completions, **columns)


@dataclass(frozen=True, kw_only=True)
class RewardCheckpoint(ModelConfig):
    """A reward model to train on: as the model of `RewardModule`, or the start of PPO's critic (`Critic.model`).

    Args:
        vocab_size: Ids that are needed; ``None`` for those of the tokenizer.
        context_length: Tokens of a row; not used, the checkpoint has its own.
        checkpoint: A ``.ckpt`` that a `RewardModule` wrote, the folder of its runs, or the folder of a published
            reward model, a sequence classifier of ``transformers`` with one label.
    """

    checkpoint: str = field(kw_only=False)
    context_length: int = 0

    def build(self, vocab_size: int | None = None) -> RewardModel:
        """Return the reward model, in training mode.

        Args:
            vocab_size: That of the tokenizer.

        Raises:
            CheckpointError: If there is no reward model, or it cannot be read.
            ConfigurationError: If the tokenizer has ids that the checkpoint lacks.
        """
        path = resolve_checkpoint(self.checkpoint)
        if Path(path).is_dir():
            backbone, score = read_backbone(Path(path))
            model = RewardModel(backbone)
            with torch.no_grad():
                model.score.weight.copy_(score)
        else:
            model = cast(RewardModel, load_reward_model(path)[0])
            _freeze_unused(model.backbone)  # merging adapters unfreezes it
        known, needed = len(model.backbone.head.weight), self.vocab_size or vocab_size
        if needed is not None and needed > known:
            raise ConfigurationError(
                f"The tokenizer has {needed} ids and the model in {self.checkpoint} has {known}; use the tokenizer in "
                "it: --data.tokenizer null."
            )
        return model.train()


def load_reward_model(path: Path | str) -> tuple[RewardModel | PublishedRewardModel, Tokenizer | None]:
    """Return the reward model of a checkpoint, ready for use, and its tokenizer if it carries one.

    Args:
        path: A ``.ckpt`` that a `RewardModule` wrote, the folder of its runs, for the newest that has finished, or a
            folder with a sequence classifier of ``transformers`` that has one label. Adapters are merged.

    Raises:
        CheckpointError: If the file is truncated, foreign, or of another kind of module.
        FileNotFoundError: If there is no such file.
    """
    path = resolve_checkpoint(path) if Path(path).is_dir() else path
    if Path(path).is_dir():
        return PublishedRewardModel(path).eval(), tokenizer_of_folder(Path(path))
    checkpoint = read_checkpoint(path)
    entry = checkpoint.get(ENTRY)
    if entry is None or entry["model"] is None or not any(".score." in name for name in checkpoint["state_dict"]):
        raise CheckpointError(
            f"{path} holds no reward model that can be built again. Give a checkpoint that RewardModule wrote, trained "
            "from a model config; of other kinds, load_model reads the language model."
        )
    model = RewardModel(ModelConfig.from_dict(entry["model"]).build())
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }
    adapters = saved_adapters(checkpoint)
    if adapters is not None:
        attach_adapters(model, adapters)
    check_weights(weights, model.state_dict(), source=str(path))
    model.to(weights["score.weight"].dtype).load_state_dict(weights)
    model = model if adapters is None else cast(RewardModel, merge_adapters(model))
    files = entry["tokenizer"]
    return model.eval(), None if files is None else tokenizer_from_files(files)
