"""Loads of experts over a run: logged, drawn, and a router that collapses is warned of."""

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lm.callbacks.hooks import LeanHooks, LogInterval, emit
from lightning_lm.html_report import Series, figures, line_chart, page, prose
from lightning_lm.modules.expert_loads import StepLoad, expert_layers
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.storage import replacing

__all__ = ["RouterStats"]

_MEASURES = {
    "max_load": "largest load over the mean load",
    "dead_experts": "experts without a token",
    "entropy": "entropy of the router, as a share of the largest possible",
    "dropped": "share of choices that were dropped",
}


class RouterStats(LeanHooks, Callback):
    """Log how busy the experts of each layer are, and draw it over time.

    Loads are those of whole optimizer steps, over all ranks and micro-batches, without padding. Logged are, for each
    layer and as a mean over layers (``moe/...``), ``max_load`` (the largest load over the mean: 1 is even),
    ``dead_experts``, ``entropy`` of the router's distributions as a share of the largest possible, and ``dropped``, the
    share of choices beyond the capacity; also ``moe/auxiliary_loss``, per token. For modules of `LMModule` whose model
    has `MoE` layers; beside others it does nothing.

    Args:
        path: File of the picture, an HTML page that is written at every log; ``None`` for ``router.html`` in the
            folder of the run.
        collapse_load: Warn once of each layer whose largest load is at least this multiple of the mean, and more than
            half of the largest possible.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import RouterStats
        >>> trainer = Trainer(callbacks=[RouterStats()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, path: str | Path | None = None, *, collapse_load: float = 4.0) -> None:
        check_numbers({"collapse_load": Limit.POSITIVE}, {"collapse_load": collapse_load})
        self._path, self._collapse_load = path, collapse_load
        self._interval = LogInterval()
        self._steps: list[int] = []
        self._history: dict[str, dict[str, list[float]]] = {}
        self._warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Return what was drawn so far."""
        return {"steps": self._steps, "history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was drawn so far."""
        self._steps, self._history = state_dict["steps"], state_dict["history"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an interval."""
        self._interval.reset(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log and draw where an interval ends; only then is a device waited for."""
        if not self._interval.stepped(trainer) or not self._interval.ends(trainer):
            return
        layers = expert_layers(pl_module)
        loads = {name: layer.last_load for name, layer in layers.items() if hasattr(layer, "last_load")}
        if not loads:
            return
        found = {name: self._measured(load, layers[name].chosen) for name, load in loads.items()}
        metrics = {f"moe/{name}/{key}": value for name, values in found.items() for key, value in values.items()}
        for key in _MEASURES:
            metrics[f"moe/{key}"] = math.fsum(values[key] for values in found.values()) / len(found)
        tokens = [float(load.tokens) for load in loads.values()]
        metrics["moe/auxiliary_loss"] = math.fsum(float(load.loss) for load in loads.values()) / max(1.0, *tokens)
        emit(trainer, metrics)
        self._remember(trainer.global_step, found)
        self._warn(found, {name: layers[name].num_experts / layers[name].chosen for name in found})
        if trainer.is_global_zero:
            self._draw(trainer)

    def _measured(self, load: StepLoad, chosen: int) -> dict[str, float]:
        counts, tokens = load.counts.tolist(), max(1.0, float(load.tokens))
        return {
            "max_load": max(counts) * len(counts) / max(1.0, math.fsum(counts)),
            "dead_experts": float(sum(count == 0 for count in counts)),
            "entropy": float(load.entropy) / tokens / max(1e-9, math.log(len(counts))),
            "dropped": float(load.dropped) / (tokens * chosen),
        }

    def _remember(self, step: int, found: dict[str, dict[str, float]]) -> None:
        self._steps.append(step)
        for name, values in found.items():
            for key, value in values.items():
                self._history.setdefault(key, {}).setdefault(name, []).append(value)

    def _warn(self, found: dict[str, dict[str, float]], largest: dict[str, float]) -> None:
        for name, values in found.items():
            load = values["max_load"]
            if name not in self._warned and load >= self._collapse_load and load > largest[name] / 2:
                self._warned.add(name)
                rank_zero_warn(
                    f"The router of {name} collapses: one expert gets {load:.1f} times the mean load, and "
                    f"{values['dead_experts']:.0f} get nothing. Raise the rate of LoadBias or the weight of a loss, "
                    "or lower the learning rate."
                )

    def _draw(self, trainer: Trainer) -> None:
        path = Path(self._path or Path(trainer.log_dir or trainer.default_root_dir) / "router.html")
        charts = []
        for key, title in _MEASURES.items():
            curves = self._history.get(key, {})
            series = [Series(_short(name), self._steps[-len(y) :], y) for name, y in curves.items()]
            charts.append(line_chart(title, series, x_label="optimizer step"))
        path.parent.mkdir(parents=True, exist_ok=True)
        text = page("Loads of experts", prose("Each curve is a layer."), figures(*charts))
        with replacing(path) as file:
            file.write(text.encode())


def _short(name: str) -> str:
    """Return the name of a layer without what all have in common."""
    return name.removeprefix("model.").removesuffix(".ffn")
