"""`ClassificationModule`: classifiers of texts, such as the quality classifiers of web corpora, in a Trainer.

Any model that returns class logits is trained by cross-entropy. At the end of each validation, a temperature that makes
the probabilities of the validation texts as likely as possible is fitted (Guo et al. 2017, arXiv:1706.04599).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import AUROC, Accuracy, CalibrationError, F1Score, Precision, Recall

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import NgramClassifier, parameter_roles
from lightning_lm.models.ngram_classifier import CLASSIFIER_ENTRY
from lightning_lm.optim import AdamW, Constant, OptimizerPart, Schedule, ScheduledLR
from lightning_lm.parts import Limit, check_numbers

__all__ = ["ClassificationModule", "fit_temperature"]


def fit_temperature(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], *, steps: int = 60) -> float:
    """Return the temperature that minimizes the cross-entropy of ``logits / temperature``, by golden-section search.

    Args:
        logits: Logits of held-out texts.
        labels: Their classes.
        steps: Iterations; each shrinks the interval of the logarithm, from 0.01 to 100, by 0.618.
    """
    logits, low, high, golden = logits.double(), -4.6, 4.6, 0.6180339887498949

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits * torch.tensor(-log_temperature).exp(), labels))

    for _ in range(steps):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return float(torch.tensor((low + high) / 2).exp())


class ClassificationModule(LightningModule):
    """Trains a classifier of texts and logs accuracy, precision, recall, F1, area under the ROC curve and calibration.

    Args:
        model: Model that returns class logits, or an object with ``logits``, of a batch without its ``labels``.
        labels: Names of the classes, by their index. Of two classes the second is the positive one.
        optimizer: Optimizer.
        schedule: Learning-rate schedule, multiplies the base rate.
        class_weights: Weight of each class in the training loss; by default all are equal.

    Attributes:
        model: As given.
        temperature: Temperature fitted in the last validation; probabilities are softmax(logits / temperature).

    Raises:
        ConfigurationError: If there are fewer than two classes, or not one weight for each.
    """

    class_weights: Tensor
    temperature: Tensor

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        labels: Sequence[str] = ("other", "good"),
        optimizer: OptimizerPart = AdamW(lr=0.02, betas=(0.9, 0.99), weight_decay=0.0),
        schedule: Schedule = Constant(),
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_numbers({"class_weights": Limit.NON_NEGATIVE}, {"class_weights": class_weights})
        if len(labels) < 2 or (class_weights is not None and len(class_weights) != len(labels)):
            raise ConfigurationError(
                f"A classifier needs two labels and one class weight for each, got labels={list(labels)} and "
                f"class_weights={class_weights}."
            )
        self.model = NgramClassifier(len(labels)) if model is None else model
        self.labels, self.optimizer_part, self.schedule = tuple(labels), optimizer, schedule
        self.register_buffer("class_weights", torch.tensor(class_weights or [1.0] * len(labels)), persistent=False)
        self.register_buffer("temperature", torch.ones(()))
        self.metrics = _metrics(len(labels))
        self._validated: list[tuple[Tensor, Tensor]] = []

    def forward(self, **inputs: Tensor) -> Float[Tensor, "batch classes"]:
        """Return class logits, as the model returns them.

        Args:
            **inputs: Batch without its labels.
        """
        output = self.model(**inputs)
        return output if isinstance(output, Tensor) else output.logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy, weighted by class.

        Args:
            batch: Inputs of the model, and ``labels``.
            batch_idx: Index of the batch.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        loss = F.cross_entropy(self(**inputs), batch["labels"], self.class_weights)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Collect logits and labels.

        Args:
            batch: Inputs of the model, and ``labels``.
            batch_idx: Index of the batch.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        self._validated.append((self(**inputs).float(), batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        """Fit the temperature and log the metrics of calibrated probabilities."""
        if not self._validated:
            return
        logits, labels = (torch.cat(values) for values in zip(*self._validated, strict=True))
        self._validated.clear()
        logits, labels = self._of_all_ranks(logits), self._of_all_ranks(labels)
        if not self.trainer.sanity_checking:
            self.temperature.fill_(fit_temperature(logits, labels))
        probabilities = (logits / self.temperature).softmax(-1)
        scores = probabilities[:, 1] if len(self.labels) == 2 else probabilities
        found = {name: metric(scores, labels) for name, metric in self.metrics.items()}
        self.metrics.reset()
        self.log_dict(
            {
                "val/loss": F.cross_entropy(logits / self.temperature, labels),
                "val/temperature": self.temperature,
                **found,
            }
        )

    def configure_optimizers(self) -> Any:
        """Return one optimizer and one schedule, stepped after every optimizer step."""
        optimizer = self.optimizer_part.build(self.model, parameter_roles(self.model))
        steps = self.trainer.estimated_stepping_batches
        scheduler = ScheduledLR(optimizer, self.schedule, horizon=1 if steps == float("inf") else int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `lightning_lm.curation.Classify` needs to build the classifier again."""
        if isinstance(self.model, NgramClassifier):
            checkpoint[CLASSIFIER_ENTRY] = {
                "settings": self.model.settings,
                "labels": list(self.labels),
                "temperature": float(self.temperature),
            }

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1) if gathered.dim() > values.dim() else gathered


def _metrics(num_classes: int) -> MetricCollection:
    task: Any = {"task": "binary"} if num_classes == 2 else {"task": "multiclass", "num_classes": num_classes}
    averaged = {**task, "average": "macro"}
    return MetricCollection(
        {
            "val/accuracy": Accuracy(**task),
            "val/precision": Precision(**averaged),
            "val/recall": Recall(**averaged),
            "val/f1": F1Score(**averaged),
            "val/auc": AUROC(**task),
            "val/calibration_error": CalibrationError(**task),
        },
        compute_groups=False,
    )
