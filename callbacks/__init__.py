"""Drop-in callbacks for any LightningModule that meets the protocols of ``lightning_lm.protocols``."""

if __name__ != "lightning_lm.callbacks":
    raise ImportError(f"This folder was imported as {__name__!r}; import it as 'lightning_lm.callbacks'.")

from lightning_lm.callbacks.completions import Completions
from lightning_lm.callbacks.compression_report import CompressionReport
from lightning_lm.callbacks.ema import EMA
from lightning_lm.callbacks.evaluate import Evaluate
from lightning_lm.callbacks.gradient_noise_scale import GradientNoiseScale
from lightning_lm.callbacks.kernel_swap import KernelSwap
from lightning_lm.callbacks.last_checkpoint import LastCheckpoint
from lightning_lm.callbacks.lora import (
    Adapters,
    LoRA,
    PretrainedAdapters,
    has_adapters,
    load_merged,
    merge_adapters,
    save_adapters,
)
from lightning_lm.callbacks.loss_spike import LossSpike
from lightning_lm.callbacks.memory_report import MemoryReport
from lightning_lm.callbacks.perplexity import Perplexity
from lightning_lm.callbacks.profile import Profile
from lightning_lm.callbacks.progress_bar import LMProgressBar
from lightning_lm.callbacks.router_stats import RouterStats
from lightning_lm.callbacks.run_report import RunReport
from lightning_lm.callbacks.sample_text import SampleText
from lightning_lm.callbacks.scaling_law import ScalingLaw
from lightning_lm.callbacks.summary import LMSummary
from lightning_lm.callbacks.text_metrics import TextMetric, TextMetrics, text_scores
from lightning_lm.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "Adapters",
    "Completions",
    "CompressionReport",
    "Evaluate",
    "GradientNoiseScale",
    "KernelSwap",
    "LMProgressBar",
    "LMSummary",
    "LastCheckpoint",
    "LoRA",
    "LossSpike",
    "MemoryReport",
    "Perplexity",
    "PretrainedAdapters",
    "Profile",
    "RouterStats",
    "RunReport",
    "SampleText",
    "ScalingLaw",
    "TextMetric",
    "TextMetrics",
    "Throughput",
    "has_adapters",
    "load_merged",
    "merge_adapters",
    "save_adapters",
    "text_scores",
]
