"""A reference whose log-probabilities are computed once, before training."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.modules.checkpoint import reading
from lightning_lm.modules.preference.pairs import counted_pairs
from lightning_lm.modules.preference.reference import Reference, ReferenceScores, completion_logprobs
from lightning_lm.storage import cache_folder, replacing

__all__ = ["NumberedPairs", "PrecomputedReference"]

Batch = Mapping[str, Tensor]


@runtime_checkable
class NumberedPairs(Protocol):
    """Interface of a datamodule whose log-probabilities can be computed before training."""

    num_pairs: int
    """Largest number in ``pair_ids``, plus one."""
    pairs_key: str
    """Hex digest of everything that decides the ids of the pairs, and their numbers."""

    def numbered_pairs(self) -> Iterable[Batch]:
        """Yield every pair once over all ranks, training and validation; equally many batches on each rank."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecomputedReference(Reference):
    """Log-probabilities of all pairs, computed once before training. Costs 8 bytes a pair, and no forward passes later.

    They are kept in a cache, under a key of weights, tokenizer, length and data, and in checkpoints.

    Args:
        cache_dir: Folder that keeps them for other runs. By default ``lightning-lm`` in ``$XDG_CACHE_HOME`` or
            ``~/.cache``.
    """

    cache_dir: str | None = None

    def build(self, model: nn.Module, data: object) -> "ReferenceScores":
        """Return the reference, still to be computed.

        Raises:
            ConfigurationError: If the datamodule does not number its pairs.
        """
        if not isinstance(data, NumberedPairs):
            raise ConfigurationError(
                "PrecomputedReference needs a datamodule that numbers its pairs, such as PreferenceDataModule; "
                f"got {type(data).__name__}. Use reference=CopyReference() otherwise."
            )
        return _ScoreTable(data.num_pairs, cache_folder(self.cache_dir))


class _ScoreTable(ReferenceScores):
    table: Tensor
    """float32 [pairs, 2], NaN where nothing is known yet."""

    def __init__(self, num_pairs: int, cache: Path) -> None:
        super().__init__()
        self._cache = cache
        self.register_buffer("table", torch.full((num_pairs, 2), torch.nan))

    def logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.table[batch["pair_ids"]].T.flatten()

    def prepare(self, module: LightningModule) -> None:
        if not self.table.isnan().any():
            return  # restored from a checkpoint
        data = cast(NumberedPairs, module.trainer.datamodule)  # type: ignore[attr-defined]
        model = cast(nn.Module, module.model)
        file = self._cache / f"reference-{_key(_weights_digests(model, module), data.pairs_key)}.pt"
        is_first = module.trainer.is_global_zero
        known = _read(file, self.table.shape) if is_first else None
        known = module.trainer.strategy.broadcast(known)
        self.table.copy_(self._computed(module, model, data) if known is None else known)
        if known is None and is_first:
            _write(file, self.table.cpu())

    def _computed(self, module: LightningModule, model: nn.Module, data: NumberedPairs) -> Tensor:
        strategy = module.trainer.strategy
        table = torch.zeros_like(self.table)
        for batch in data.numbered_pairs():
            moved = strategy.batch_to_device(batch, module.device)
            with strategy.precision_plugin.val_step_context():
                scores = completion_logprobs(model, moved).float().view(2, -1).T
            real = counted_pairs(moved)
            table[moved["pair_ids"][real]] = scores[real]
        return torch.as_tensor(strategy.reduce(table, reduce_op="sum"))


def _weights_digests(model: nn.Module, module: LightningModule) -> Sequence[str]:
    """Return a digest of the weights, or of each rank's share where they are sharded."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        local = value.to_local() if hasattr(value, "to_local") else value
        digest.update(name.encode())
        digest.update(local.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    mine = digest.hexdigest()
    if module.trainer.world_size == 1:
        return [mine]
    gathered: list[Any] = [None] * module.trainer.world_size
    torch.distributed.all_gather_object(gathered, mine)
    return sorted(set(gathered))


def _key(digests: Sequence[str], pairs_key: str) -> str:
    return hashlib.sha256(repr((digests, pairs_key)).encode()).hexdigest()[:32]


def _read(file: Path, shape: torch.Size) -> Tensor | None:
    """Return the table of a file; ``None`` if there is none, or it is damaged and must be computed again."""
    if not file.is_file():
        return None
    try:
        with reading(file):
            table = torch.load(file, weights_only=True)
    except CheckpointError as error:
        rank_zero_warn(f"{error} The log-probabilities of the reference are computed again.")
        return None
    return table if isinstance(table, Tensor) and table.shape == shape else None


def _write(file: Path, table: Tensor) -> None:
    """Write a file that is whole or not there."""
    with replacing(file) as stream:
        torch.save(table, stream)
