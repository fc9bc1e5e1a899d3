"""BLEU, chrF and ROUGE of what an encoder-decoder writes to the sources of the validation data."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lm.callbacks.hooks import Attempt, LeanHooks, clocks_stopped, reason_of, without_side_effects
from lightning_lm.callbacks.prompts import find_tokenizer
from lightning_lm.distributed import Ranks, runs_alone, whole_model
from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.generation import Generator, Sampling, beam_search
from lightning_lm.generation.prompt_checks import room_for
from lightning_lm.generation.sources import padded_sources
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.protocols import Tokenizer
from lightning_lm.types import IGNORE_INDEX

__all__ = ["TextMetric", "TextMetrics", "text_scores"]

TextMetric = Literal["bleu", "chrf", "rouge"]
"""Name of a metric of texts against references."""

_GREEDY = Sampling(temperature=0.0)
_ROUGE = ("rouge1", "rouge2", "rougeL")
_LENGTH = 64


_Place = tuple[int, int, int, int]
_Pair = tuple[_Place, tuple[str, str]]


class _Example(NamedTuple):
    place: _Place
    """Batch, row, rank and document: the order of one process."""
    source: list[int]
    target: list[int]
    """Begin token, then the reference."""


def text_scores(
    texts: Sequence[str], references: Sequence[str], metrics: Sequence[TextMetric] = ("bleu", "chrf", "rouge")
) -> dict[str, float]:
    """Return metrics of a corpus, each from 0 to 100.

    ``bleu`` and ``chrf`` are those of sacrebleu with its settings (tokenizer 13a; six orders of letters, no words);
    ``rouge1``, ``rouge2`` and ``rougeL`` are the mean F1 of ROUGE, without a stemmer.

    Args:
        texts: Texts that were written.
        references: One reference for each.
        metrics: Names of the metrics.

    Raises:
        MissingDependencyError: If a metric's package is not installed.

    Source:
        Papineni et al. 2002 (BLEU); Popović 2015 (chrF); Lin 2004 (ROUGE); Post 2018, arXiv:1804.08771 (sacrebleu).
    """
    _check_packages(metrics)
    scores: dict[str, float] = {}
    if "bleu" in metrics or "chrf" in metrics:
        import sacrebleu

        if "bleu" in metrics:
            scores["bleu"] = float(sacrebleu.corpus_bleu(list(texts), [list(references)]).score)
        if "chrf" in metrics:
            scores["chrf"] = float(sacrebleu.corpus_chrf(list(texts), [list(references)]).score)
    if "rouge" in metrics:
        from torchmetrics.functional.text import rouge_score

        found = rouge_score(list(texts), list(references), rouge_keys=_ROUGE)
        scores |= {name: 100.0 * float(found[f"{name}_fmeasure"]) for name in _ROUGE}
    return scores


class TextMetrics(LeanHooks, Callback):
    """Write texts to sources of the validation data, and log ``val/bleu``, ``val/chrf`` and ``val/rouge1`` to ``L``.

    The first sources of the first loader are taken, the same in every validation and however many ranks there are;
    ranks that can run the model alone share them. The metrics are those of `text_scores` over all of them, from 0 to
    100; in ``trainer.test`` their names begin with ``test/``. Random state, modes and gradients are restored. For
    modules whose batches are `types.Seq2SeqBatch`, such as `Seq2SeqModule`. In a fit an error in generation is reported
    once and does not end the run.

    Args:
        metrics: Names of the metrics.
        limit: Most sources that texts are written to.
        max_new_tokens: Longest text, tokens; by default 64, or as many as the context length leaves.
        num_beams: Hypotheses of a beam search; 1 for greedy decoding.
        batch_size: Sources of a forward pass.
        tokenizer: Tokenizer of the targets; by default ``trainer.datamodule.tokenizer``.

    Attributes:
        texts: Texts and references of the newest evaluation.

    Raises:
        ConfigurationError: If a metric is unknown or a number is out of range; when a run begins, if there is no
            tokenizer, or the model reads no sources.
        MissingDependencyError: If a metric's package is not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import TextMetrics
        >>> trainer = Trainer(callbacks=[TextMetrics(["rouge"])], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        metrics: Sequence[TextMetric] = ("bleu", "chrf"),
        *,
        limit: int = 128,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        batch_size: int = 32,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        given = {"limit": limit, "max_new_tokens": max_new_tokens, "num_beams": num_beams, "batch_size": batch_size}
        check_numbers(dict.fromkeys(given, Limit.COUNT), given)
        unknown = sorted(set(metrics) - set(get_args(TextMetric)))
        if isinstance(metrics, str) or unknown or not metrics:
            raise ConfigurationError(
                f"metrics={metrics!r} must be a list of {', '.join(get_args(TextMetric))}, one or more of them."
            )
        _check_packages(metrics)
        self.texts: list[tuple[str, str]] = []
        self._metrics, self._limit, self._num_beams = tuple(metrics), limit, num_beams
        self._max_new_tokens, self._batch_size, self._tokenizer = max_new_tokens, batch_size, tokenizer
        self._examples: list[_Example] = []
        self._fails = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run without a tokenizer early, rather than after the first validation."""
        self._fails = False
        find_tokenizer(trainer, self._tokenizer, "TextMetrics")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last evaluation; refuse a model that reads no sources."""
        self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the sources and references of a batch until there are enough."""
        self._take(trainer, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the texts and log their metrics."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last evaluation; refuse a model that reads no sources."""
        self._start(pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the sources and references of a batch until there are enough."""
        self._take(trainer, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the texts and log their metrics."""
        self._finish(trainer, pl_module, "test")

    def _start(self, pl_module: LightningModule) -> None:
        self._examples = []
        model = getattr(pl_module, "model", None)
        if not hasattr(model, "given"):
            raise ConfigurationError(
                f"TextMetrics writes texts to sources, and the model of {type(pl_module).__name__}, "
                f"{type(model).__name__}, has no given(source_ids). Use it with Seq2SeqModule; Evaluate and SampleText "
                "are for models that continue texts."
            )

    def _take(self, trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        if dataloader_idx == 0 and not trainer.sanity_checking and len(self._examples) < self._limit:
            self._examples += _examples(batch, batch_idx, Ranks(trainer).rank)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.sanity_checking or self._fails:
            return
        ranks = Ranks(trainer)
        everywhere = sorted(example for part in ranks.gather_objects(self._examples) for example in part)
        chosen, self._examples = everywhere[: self._limit], []
        if not chosen:
            return
        alone = runs_alone(trainer)
        pairs: list[_Pair] = []
        with Attempt() as attempt:
            mine = [entry for entry in chosen if entry.place[2] == ranks.rank] if alone else chosen
            pairs = self._pairs(trainer, pl_module, mine)
        # Together: the others wait for the texts of this rank.
        self._fails = trainer.strategy.reduce_boolean_decision(attempt.error is not None, all=False)
        if self._fails:
            self._report(trainer, attempt.error)
            return
        parts = ranks.gather_objects(pairs) if alone else [pairs]
        self.texts = [pair for _, pair in sorted(entry for part in parts for entry in part)]
        texts, references = ([pair[side] for pair in self.texts] for side in (0, 1))
        for name, score in text_scores(texts, references, self._metrics).items():
            pl_module.log(f"{stage}/{name}", score, sync_dist=True)

    def _report(self, trainer: Trainer, error: BaseException | None) -> None:
        if trainer.state.fn != "fit" and error is not None:
            raise error
        rank_zero_warn(f"TextMetrics measures nothing more in this run: writing texts failed ({reason_of(error)})")

    def _pairs(self, trainer: Trainer, pl_module: LightningModule, examples: list[_Example]) -> list[_Pair]:
        """Return text and reference of each example, beside its place."""
        tokenizer = find_tokenizer(trainer, self._tokenizer, "TextMetrics")
        found: list[_Pair] = []
        precision = trainer.precision_plugin.val_step_context()
        effects = without_side_effects(pl_module, pl_module.device)
        with clocks_stopped(trainer), effects, whole_model(trainer), precision:
            for first in range(0, len(examples), self._batch_size):
                batch = examples[first : first + self._batch_size]
                for example, ids in zip(batch, self._write(pl_module, batch, tokenizer), strict=True):
                    texts = (_text(tokenizer, ids), _text(tokenizer, example.target[1:]))
                    found.append((example.place, texts))
        return found

    def _write(self, pl_module: LightningModule, batch: list[_Example], tokenizer: Tokenizer) -> list[Sequence[int]]:
        """Return the ids that the model writes to each source."""
        model: Any = pl_module.model
        lm = model.given(*(part.to(pl_module.device) for part in padded_sources([example.source for example in batch])))
        prompts = [example.target[:1] for example in batch]
        length = self._max_new_tokens or room_for(lm, tokenizer, prompts, _LENGTH)
        if self._num_beams == 1:
            written = Generator(lm, tokenizer).generate(prompts, sampling=_GREEDY, max_new_tokens=length)
            return [completion.token_ids for completion in written]
        stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        options = {"num_beams": self._num_beams, "max_new_tokens": length}
        return [beams[0].token_ids for beams in beam_search(lm, prompts, stop_ids=stop, **options)]


def _check_packages(metrics: Sequence[TextMetric]) -> None:
    if {"bleu", "chrf"} & set(metrics) and importlib.util.find_spec("sacrebleu") is None:
        raise MissingDependencyError("sacrebleu", "compute BLEU and chrF", "evals")


def _examples(batch: Mapping[str, Tensor], batch_idx: int, rank: int) -> Iterator[_Example]:
    """Return the sources of a batch with their targets; rows without labels are padding."""
    ids, labels, sources = (batch[name].cpu() for name in ("input_ids", "labels", "source_ids"))
    documents, source_documents = (
        torch.zeros_like(like) if batch.get(name) is None else batch[name].cpu()
        for name, like in (("document_ids", ids), ("source_document_ids", sources))
    )
    for row in range(len(ids)):
        wanted = labels[row] != IGNORE_INDEX
        for number in documents[row][wanted].unique().tolist():
            own = documents[row] == number
            source = sources[row][source_documents[row] == number].tolist()
            target = [int(ids[row][own][0]), *labels[row][own & wanted].tolist()]
            yield _Example((batch_idx, row, rank, number), source, target)


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of ids up to the first end token."""
    ids = list(ids)
    end = tokenizer.eos_id
    return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
