"""Triton kernels, each with a torch reference that is chosen where there is no Triton or no GPU.

Every operation has one public function; `report` says what runs it here and why.
"""

from lightning_lm.kernels.attention import attention
from lightning_lm.kernels.flash_attention.operation import flash_attention
from lightning_lm.kernels.grouped_linear import grouped_linear
from lightning_lm.kernels.layer_norm import layer_norm
from lightning_lm.kernels.lm_head.cross_entropy import cross_entropy
from lightning_lm.kernels.lm_head.head import output_layer
from lightning_lm.kernels.lm_head.linear_cross_entropy import linear_cross_entropy, measured_cross_entropy
from lightning_lm.kernels.lm_head.linear_logprob import linear_logprob, linear_nll, linear_target_scores
from lightning_lm.kernels.newton_schulz import symmetric_product
from lightning_lm.kernels.recurrence.operation import linear_recurrence
from lightning_lm.kernels.relu_squared import relu_squared
from lightning_lm.kernels.rms_norm import rms_norm
from lightning_lm.kernels.rope import rope
from lightning_lm.kernels.runtime.backend import Choice, choices, force_backend, report, unavailable
from lightning_lm.kernels.runtime.flop_formulas import register_flops
from lightning_lm.kernels.runtime.launch_settings import use_table
from lightning_lm.kernels.softmax import softmax
from lightning_lm.kernels.swiglu import geglu, swiglu

__all__ = [
    "Choice",
    "attention",
    "choices",
    "cross_entropy",
    "flash_attention",
    "force_backend",
    "geglu",
    "grouped_linear",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_nll",
    "linear_recurrence",
    "linear_target_scores",
    "measured_cross_entropy",
    "output_layer",
    "register_flops",
    "relu_squared",
    "report",
    "rms_norm",
    "rope",
    "softmax",
    "swiglu",
    "symmetric_product",
    "unavailable",
    "use_table",
]
